"""Makes a run, from its data to its folder: the steps between two measurements, and what it writes."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

from torch import nn
from transformers import PreTrainedTokenizerBase as Tokenizer

from moe_unlearn import data, progress, survive, trace
from moe_unlearn.config import Recipe
from moe_unlearn.config.adapter import bits_of
from moe_unlearn.data import Example
from moe_unlearn.files import make_private, write_json, write_text
from moe_unlearn.model.adapters import merged
from moe_unlearn.model.quantised import is_quantised
from moe_unlearn.model.saving import save_model
from moe_unlearn.ranks import is_first, on_first, sharded
from moe_unlearn.runs import folder
from moe_unlearn.runs.about import Cost, about
from moe_unlearn.runs.clock import Clock
from moe_unlearn.runs.measured import Measured
from moe_unlearn.runs.own_texts import keep, own_texts
from moe_unlearn.runs.planning import plan_of_config
from moe_unlearn.runs.run import SIDES, Run
from moe_unlearn.runs.seen import SAMPLES
from moe_unlearn.runs.summary import Summary, check_name
from moe_unlearn.step import UnlearnStep
from moe_unlearn.trainer.checkpoints import PREFIX

Existing = Literal["refuse", "resume", "overwrite"]


@dataclass(frozen=True)
class Before:
    """Holds what is known before a run and belongs to its folder.

    `loaded` says how the model was loaded (`loading.described`), `reports` what became of the data, by side,
    `retrain` has the metrics of the retrained model (`retrained`), `command` is the command line, and `samples` of how
    many rows a side the report shows the texts before and after. The name of a folder that is `new` is told once
    nothing of model, recipe and data was refused.
    """

    loaded: dict[str, Any] = field(default_factory=dict)
    reports: dict[str, data.DataReport] | None = None
    retrain: dict[str, float] | None = None
    command: str = ""
    samples: int = SAMPLES
    new: bool = False


def unlearn(
    model: nn.Module,
    tokenizer: Tokenizer,
    recipe: Recipe,
    sets: Mapping[str, Sequence[Example]],
    out: Path,
    *,
    existing: Existing = "refuse",
    evaluate: bool = True,
    cache_dir: Path | None = None,
    verify: int | bool = 0,
    known: Before | None = None,
) -> Summary | None:
    """Run `recipe` on `sets` of examples by side, and write the folder `out`.

    `sets` has "forget" and "retain", and perhaps "retain_eval", "unseen", "earlier" and "holdout". Training sees no row
    of "retain_eval": the metrics of the retain side are of these, beside those of "retain".

    `out`, which its owner alone may enter if it is new, gets `recipe.yaml`, `batch.json` (what one step takes),
    `checkpoints/`, `model/` (which `from_pretrained` loads; of a recipe with an adapter that alone, or the model with
    it merged), `summary.json`, `trajectory.json` and the report (`runs.report`) with what it is made of; from what is
    `known` also `loaded.json` and `data.json`, with `verify` (as in `UnlearnStep`) `verified.txt`, and with TRACE
    `routing.json`; and what `runs.folder` keeps. Preparation comes first, so that nothing is written if the recipe does
    not fit model or data. References are kept in `cache_dir`, by default `out/cache`. Returns the summary: run name ->
    metrics, empty without `evaluate`, which writes no report.

    `existing` says what becomes of a run that `out` has: "refuse", "overwrite", or "resume", which continues from its
    newest whole checkpoint, or from the beginning where there is none. Of a run that is finished it returns None, says
    so and changes nothing. Raises ValueError, which names what differs, for the run of something else.

    Ranks of torch.distributed share the rows of every step and every metric: each takes `batch_size` rows at a time, so
    that a step has `batch_size` times `accumulate` times the number of ranks. The first rank writes; all return the
    summary. The weights are those of one process whose `accumulate` is as many times larger, up to the rounding of
    sums, as long as the ranks share the batches of an epoch without a rest.
    """
    check_name(recipe.name)
    known = Before() if known is None else known
    if existing == "refuse":
        on_first(partial(folder.check_unused, out))
    begun = out if existing == "resume" else None
    sets = {**sets, "sampled": own_texts(model, tokenizer, recipe, sets["forget"], begun)}
    run = Run(model, tokenizer, recipe, sets)
    run.checkpoint_activations()
    make_private(out)
    trainer = run.trainer(
        out / folder.CHECKPOINTS,
        cache_dir=cache_dir or out / "cache",
        verify=verify,
        held_out=sets.get("retain_eval", ()),
    )
    step, ranks, resume = trainer.unlearn_step, trainer.args.world_size, existing == "resume"
    facts = folder.facts_of(step, {**sets, **run.trained}, ranks)
    if resume:
        on_first(partial(folder.check_same, out, facts, recipe))
        if _is_finished(out, step, evaluate):
            print(f"{out} has this run, and it is finished: nothing is left to do")
            return None
        resume = any((out / folder.CHECKPOINTS).glob(f"{PREFIX}*"))
    cost = Cost(next(model.parameters()).device)
    checkpoint = trainer.checkpoint_of(resume)  # before anything is written: what is refused changes nothing
    clock = Clock.of_checkpoint(checkpoint)
    trainer.add_callback(clock)
    if known.new:
        progress.say(f"the run's folder is {out}")
    if checkpoint is None:
        with clock.running():
            trainer.prepare()

    def write_settings() -> None:
        if existing == "overwrite":
            folder.clear(out)
        folder.write_facts(out, facts)
        keep(out, sets["sampled"])
        if not (resume and (out / "about.json").exists()):
            write_json(out / "about.json", about(known.command, recipe.seed, cost.device))
        _write_settings(out, recipe, ranks, known)

    on_first(write_settings)
    measured: Measured | None = None
    if evaluate:
        measured = Measured(run, sets, cost, step.ranks, retrain=known.retrain, samples=known.samples)
    try:
        with clock.running():
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    finally:
        if verify and is_first():  # alone, since an error may have ended the others elsewhere
            write_text(out / "verified.txt", step.verifier.summary() + "\n")
    if recipe.survive is not None:
        _survive(run, step, recipe.survive)
    trainer.check_weights()
    if evaluate and ranks == 1 and not sharded(model):
        cost.planned = _planned(run, step)
    unlearned: Any = trainer.model
    if recipe.adapter is not None and recipe.adapter.merge:
        unlearned = merged(unlearned)  # which is then what the metrics are of
    save_model(unlearned, out / folder.MODEL, tokenizer)
    on_first(partial(_write_results, out, recipe.name, trainer.state.log_history, routing_of(step)))
    if measured is not None:
        measured.after(unlearned, clock.seconds, out)
    on_first(partial(folder.seal, out, recipe.steps))
    return {} if measured is None else measured.summary


def _planned(run: Run, step: UnlearnStep) -> int | None:
    """Return the planned peak of a step: of weights that the recipe rounds from the config, of others so unknown."""
    sides = [*map(run.batches, SIDES)]
    if not is_quantised(run.model):
        return step.plan(*sides, stored=True).peak
    if bits_of(run.recipe.adapter) is None:
        return None
    model: Any = run.model
    config = copy.deepcopy(model.config)
    del config.quantization_config
    dtype = str(model.dtype).removeprefix("torch.")
    return plan_of_config(config, run.recipe, *sides, fits=(), dtype=dtype, advise=False).peak


def _is_finished(out: Path, step: UnlearnStep, evaluate: bool) -> bool:
    """Return whether the run in `out` is finished, and was measured if that is asked for; every rank calls this."""
    wanted = ("trajectory.json", "summary.json") if evaluate else ("trajectory.json",)
    return step.ranks.said_by_first(partial(folder.finished, out, step.recipe.steps, wanted))


def _write_settings(out: Path, recipe: Recipe, ranks: int, known: Before) -> None:
    """Write what a run is made with: recipe, factors of a step, model and data."""
    write_text(out / "recipe.yaml", recipe.to_yaml())
    batch = {"ranks": ranks, "batch_size": recipe.batch_size, "accumulate": recipe.accumulate}
    write_json(out / "batch.json", batch)
    if known.loaded:
        write_json(out / "loaded.json", known.loaded)
    if known.reports is not None:
        write_json(out / "data.json", {side: own.to_dict() for side, own in known.reports.items()})


def _survive(run: Run, step: UnlearnStep, grid: str) -> None:
    """Move the trained weights within reach of the grid, and say how many moved."""
    moved = survive.hold(step.model, grid, run.batches("forget"), run.batches("retain"), step.masks)
    if is_first():
        print(f"survive: {moved.moved:,} of {moved.weights:,} weights moved within reach of {grid}")


def _write_results(out: Path, name: str, log: Sequence[Mapping[str, Any]], routing: Mapping[str, Any]) -> None:
    """Write the metrics of every step, and what TRACE measured where it did."""
    steps = [dict(sorted(entry.items())) for entry in log if "forget_loss" in entry]
    write_json(out / "trajectory.json", {name: steps})
    if routing:
        write_json(out / "routing.json", routing)


def routing_of(step: UnlearnStep) -> dict:
    """Return the frequencies TRACE measured and the experts it chose, as `report` has them; empty without TRACE."""
    recipe, prepared = step.recipe.trace, step.prepared
    if prepared.frequencies is None:
        return {}
    assert prepared.selected is not None  # it comes with the frequencies
    routing: dict[str, Any] = {side: counted.frequency.tolist() for side, counted in prepared.frequencies.items()}
    routing["selected"] = prepared.selected.tolist()
    if prepared.inactive:
        assert recipe is not None
        routing["inactive"] = trace.why_empty(
            **prepared.frequencies, min_ratio=recipe.min_ratio, min_load=recipe.min_load
        )
    return routing
