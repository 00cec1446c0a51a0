"""What a report shows of a model before and after beside its metrics: texts of a few rows, and where tokens go."""

import itertools
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from moe_unlearn import trace
from moe_unlearn.data import Example
from moe_unlearn.metrics import Continuation, continuations
from moe_unlearn.metrics.memorization import NothingToMeasureError
from moe_unlearn.ranks import Ranks

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer

    from moe_unlearn.runs.run import Run

SAMPLES, TOKENS = 3, 64  # rows of a side that are shown, and tokens of their continuations
_ROWS = 64  # of a side, whose routing is counted

Texts = Mapping[str, Sequence[Continuation | None]]


def paired_texts(before: Texts, after: Texts) -> dict[str, list[dict[str, str]]]:
    """Return the content of `samples.json`, by side: what two models wrote after the same prompts."""
    texts = {
        side: [
            {"prompt": a.prompt, "truth": a.truth, "before": a.answer, "after": b.answer}
            for a, b in zip(own, after[side], strict=True)
            if a and b
        ]
        for side, own in before.items()
    }
    return {side: rows for side, rows in texts.items() if rows}


class Seen:
    """What is seen of a run's model when this is made, on its first rows; `after` sees the same again.

    Every rank makes and calls it.
    """

    def __init__(self, run: "Run", tokenizer: "Tokenizer", samples: int, ranks: Ranks):
        self._run, self._tokenizer, self._ranks = run, tokenizer, ranks
        self._rows = {"forget": run.pairs.forget, "retain": run.pairs.retain}
        self._shown = {side: [own[i] for i in range(min(samples, len(own)))] for side, own in self._rows.items()}
        self._texts = {side: self._continued(own) for side, own in self._shown.items()}
        self._routes = {side: self._frequencies(side) for side in self._rows}

    def after(self) -> tuple[dict[str, Any], dict[str, list[dict[str, str]]]]:
        """Return the content of `routes.json`, empty for a model without routers, and that of `samples.json`."""
        routes: dict[str, Any] = {}
        if all(self._routes.values()):
            routes = {**self._routes, "after": self._frequencies("forget")}
        return routes, paired_texts(self._texts, {side: self._continued(own) for side, own in self._shown.items()})

    def _continued(self, examples: Sequence[Example]) -> Sequence[Continuation | None]:
        with suppress(NothingToMeasureError):  # all are as short as their prompts
            if examples:
                return continuations(self._run.model, self._tokenizer, examples, new_tokens=TOKENS)
        return [None] * len(examples)

    def _frequencies(self, side: str) -> list[list[float]]:
        count = -(-_ROWS // self._run.recipe.batch_size)
        batches = [*itertools.islice(self._run.batches(side), count)]
        with suppress(ValueError):  # a model without routers
            table: list[list[float]] = trace.routing_frequencies(
                self._run.model, batches, self._ranks
            ).frequency.tolist()
            return table
        return []
