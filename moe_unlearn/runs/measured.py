"""Measures the model of a run before and after it, and writes what the report shows of that."""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase as Tokenizer

from moe_unlearn import metrics
from moe_unlearn.config import Recipe
from moe_unlearn.data import Example
from moe_unlearn.files import write_json
from moe_unlearn.metrics.privacy import add_privleak
from moe_unlearn.model import loading
from moe_unlearn.ranks import Ranks, on_first
from moe_unlearn.runs import report
from moe_unlearn.runs.about import Cost
from moe_unlearn.runs.run import Run
from moe_unlearn.runs.seen import Seen
from moe_unlearn.runs.summary import Summary


def retrained(
    recipe: Recipe, tokenizer: Tokenizer, sets: Mapping[str, Sequence[Example]], how: loading.Loading
) -> dict[str, float] | None:
    """Return the metrics of the retrained model that a recipe names as `data.reference`, None where it names none.

    No other model needs to be in memory meanwhile, and it is gone afterwards.
    """
    if recipe.data.reference is None:
        return None
    model, _ = loading.load_model(recipe.data.reference, how)
    return metrics.evaluate(model, tokenizer, **_by_keyword(sets), intervals=True)


class Measured:
    """Holds the metrics of a run's model: those before it from the start, those after it from `after` on.

    `summary` is run name -> metrics, with those of the retrained model where they are known. `samples` rows of a side
    are shown with their texts. Every rank makes and calls it.
    """

    def __init__(
        self,
        run: Run,
        sets: Mapping[str, Sequence[Example]],
        cost: Cost,
        ranks: Ranks,
        *,
        retrain: dict[str, float] | None,
        samples: int,
    ):
        self._run, self._sets, self._cost = run, _by_keyword(sets), cost
        self.summary: Summary = {} if retrain is None else {"retrain": retrain}
        with cost.phase("evaluation before"):
            self.summary["target"] = self._metrics(run.model)
            self._seen = Seen(run, run.tokenizer, samples, ranks)

    def after(self, model: nn.Module, seconds: float, out: Path) -> None:
        """Measure the unlearned model, which took `seconds` to prepare and make, and write the report into `out`."""
        name = self._run.recipe.name
        self._cost.seconds["preparation and steps"] = seconds
        with self._cost.phase("evaluation after"):
            found = self._metrics(model)
            routes, texts = self._seen.after()
        self.summary[name] = found | {"seconds": seconds}
        add_privleak([self.summary["target"], self.summary[name]], self.summary.get("retrain", {}))
        on_first(partial(self._write, out, routes, texts))

    def _metrics(self, model: nn.Module) -> dict[str, float]:
        return metrics.evaluate(model, self._run.tokenizer, **self._sets, intervals=True)

    def _write(self, out: Path, routes: Mapping[str, Any], texts: Mapping[str, Any]) -> None:
        made = {"routes": routes, "cost": self._cost.to_dict(), "samples": texts, "summary": self.summary}
        for name, content in made.items():
            if content:
                write_json(out / f"{name}.json", content)
        report.write(out, report.read(out))


def _by_keyword(sets: Mapping[str, Sequence[Example]]) -> dict[str, Any]:
    """Return the sets that metrics are of, by the keywords of `metrics.evaluate`.

    Rows of the retain side that training does not see are `retain` there. Text that `level` steers by and what earlier
    requests forgot are measured nowhere.
    """
    measured: dict[str, Any] = {side: rows for side, rows in sets.items() if side not in ("earlier", "unseen")}
    held_out = measured.pop("retain_eval", ())
    return measured | {"retain": held_out, "seen": sets["retain"]} if held_out else measured
