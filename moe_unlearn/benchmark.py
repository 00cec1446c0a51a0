"""Whole runs: one unlearning run on a user's data, and the embedded experiment with all its rivals."""

import json
import time
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn
from transformers import TrainingArguments

from moe_unlearn import data, experiment, metrics, report, trace, workers
from moe_unlearn.config import Recipe
from moe_unlearn.experiment import Experiment, Settings
from moe_unlearn.step import UnlearnStep
from moe_unlearn.suite import Progress, unlearning
from moe_unlearn.table import Table
from moe_unlearn.trainer import UnlearnTrainer

__all__ = ["Progress", "Table", "demo", "demo_recipe", "unlearn", "unlearning"]
RUNS = ("graddiff", "npo", "trace", "wagle", "mollm", "combined")

# What the tiny models need instead of the shipped recipes' settings, which are for real ones. Chosen on
# builtin:pydoc, seeds 0 to 4, and reported on others; benchmarks/NOTES.md has the search.
# A batch holds all 40 forget and all 65 visible retain documents.
DEMO_COMMON = ["batch_size=40", "retain_per_forget=1.625", "optimizer.lr=1e-4", "steps=25"]
# A run with MOLLM ends at a forget loss, after 75 steps at the most: tuning seeds took 35 to 70.
DEMO_OVERRIDES: dict[str, list[str]] = {name: ["steps=75", "stop_forget_loss=0.43"] for name in ("mollm", "combined")}
TRAJECTORY_POINTS = 6


def unlearn(
    model: nn.Module,
    tokenizer,
    recipe: Recipe,
    sets: dict[str, list],
    out: Path,
    *,
    resume: bool = False,
    evaluate: bool = True,
    cache_dir: Path | None = None,
    verify: int | bool = 0,
    reports: dict[str, data.DataReport] | None = None,
) -> dict:
    """Run `recipe` on `sets` ("forget", "retain" and perhaps "holdout" examples) and write the folder `out`.

    `out` gets `recipe.yaml`, `checkpoints/`, `model/` (loads with `from_pretrained`), `summary.json`,
    `trajectory.json`, `report.md`, with `reports` (by side) `data.json` and, with `verify` as in `UnlearnStep`,
    `verified.txt`, with TRACE `routing.json`; no file where the recipe does not fit model or data, for the preparation
    comes first. With `resume` the newest checkpoint goes on.
    References are kept in `cache_dir`, by default `out/cache`. Returns the summary: run name -> metrics, empty
    without `evaluate`.
    """
    arguments = TrainingArguments(
        output_dir=str(out / "checkpoints"),
        max_steps=recipe.steps,
        per_device_train_batch_size=recipe.batch_size,
        gradient_accumulation_steps=recipe.accumulate,
        learning_rate=recipe.optimizer.lr,
        lr_scheduler_type="constant_with_warmup",
        warmup_steps=recipe.optimizer.warmup_steps,
        max_grad_norm=recipe.optimizer.max_grad_norm or 0.0,
        logging_steps=1,
        save_strategy="steps",
        save_steps=max(1, recipe.steps // 5),
        save_total_limit=2,
        seed=recipe.seed,
        dataloader_pin_memory=torch.cuda.is_available(),  # elsewhere torch warns
        report_to="none",
    )
    if arguments.world_size > 1:
        raise ValueError(f"one process writes a run's folder; got {arguments.world_size}: for these use UnlearnTrainer")
    dataset = data.ForgetRetainDataset(
        sets["forget"], sets["retain"], seed=recipe.seed, retain_per_forget=recipe.retain_per_forget
    )
    trainer = UnlearnTrainer(
        model, arguments, recipe, dataset, processing_class=tokenizer, cache_dir=cache_dir or out / "cache",
        verify=verify,
    )  # fmt: skip
    start = time.perf_counter()
    if not resume:
        trainer.prepare()
    seconds = time.perf_counter() - start
    out.mkdir(parents=True, exist_ok=True)
    (out / "recipe.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
    if reports is not None:
        _write_json(out / "data.json", {side: own.to_dict() for side, own in reports.items()})
    summary = {}
    reference = None
    if evaluate:
        if recipe.data.reference is not None:
            retrained, _ = experiment.load_model(recipe.data.reference)
            summary["retrain"] = metrics.evaluate(retrained, tokenizer, **sets)
            reference = summary["retrain"].get("minkauc")
        summary["target"] = metrics.evaluate(model, tokenizer, **sets, reference_auc=reference)
    start = time.perf_counter()
    try:
        trainer.train(resume_from_checkpoint=resume)
    finally:
        if verify:
            (out / "verified.txt").write_text(trainer.unlearn_step.verifier.summary() + "\n", encoding="utf-8")
    seconds += time.perf_counter() - start
    # not save_model, which would put a pickle of the training arguments beside the weights
    trainer.model.save_pretrained(out / "model")
    tokenizer.save_pretrained(out / "model")
    trajectory = [entry for entry in trainer.state.log_history if "forget_loss" in entry]
    _write_json(out / "trajectory.json", {recipe.name: trajectory})
    if routing := _routing(trainer.unlearn_step):
        _write_json(out / "routing.json", {key: report.as_list(table) for key, table in routing.items()})
    if evaluate:
        after = metrics.evaluate(trainer.model, tokenizer, **sets, reference_auc=reference)
        summary[recipe.name] = after | {"seconds": seconds}
        _write_json(out / "summary.json", summary)
        report.write(out)
    return summary


def demo(
    corpus: str,
    seeds: list[int],
    out: Path,
    runs: tuple[str, ...] = RUNS,
    *,
    size: str | Settings = "demo",
    processes: int | None = None,
) -> dict:
    """The embedded experiment on `seeds`; writes `summary.json`, `report.md` and figures into `out`.

    Models are trained and runs made side by side, in `processes` processes of one thread each (as many as
    torch has threads): models this small leave most of a second thread idle. Deterministic on one machine,
    whatever the number of processes.
    """
    with workers.Workers(processes or torch.get_num_threads()) as pool:
        settings = experiment.settings_of(size)
        batches = sum(-(-n // settings.batch_size) for n in (settings.retain, settings.retain + settings.forget))
        training = [(name, corpus, seed, size) for seed in seeds for name in experiment.MODELS]
        total = len(seeds) * settings.epochs * batches
        seconds = pool.run("training", _train, training, total)
        recipes = {name: demo_recipe(name, 0) for name in runs}
        # the longest first, so that no process is left alone with one at the end
        order = sorted(runs, key=lambda name: -recipes[name].steps)
        tasks = [(name, corpus, seed, size) for name in (*order, *experiment.MODELS) for seed in seeds]
        total = len(seeds) * sum(recipe.steps for recipe in recipes.values())
        done = pool.run("unlearning", _run, tasks, total)
    table = Table.joined(done[name, corpus, seed, size][0] for seed in seeds for name in (*experiment.MODELS, *runs))
    for (name, _, seed, _), spent in seconds.items():
        table.results[seed][name]["seconds"] = spent
    first = {name: done[name, corpus, seeds[0], size] for name in runs}
    trajectories = {name: found[1] for name, found in first.items()}
    routing = next((found[2] for found in first.values() if found[2]), {})
    content = report.Content(corpus=corpus, results=table.results, trajectories=trajectories, routing=routing)
    return report.write_demo(out, content)


def _train(name: str, corpus: str, seed: int, size: str | Settings) -> float:
    start = time.perf_counter()
    experiment.train_model(name, corpus, seed, size=size, on_step=workers.advance)
    return time.perf_counter() - start


def _run(name: str, corpus: str, seed: int, size: str | Settings) -> tuple[Table, list[dict], dict]:
    """Row, trajectory and routing of one run, or of the target or retrained model as it is."""
    made = experiment.prepare_experiment(corpus, seed, size=size)
    trajectory, routing = [], {}

    def watch(progress: Progress) -> None:
        recipe, step = recipes[0], progress.unlearn_step
        spared = recipe.steps - progress.step if progress.last else 0
        workers.advance(spared + (progress.step > 0))
        if progress.last or progress.step % max(1, recipe.steps // TRAJECTORY_POINTS) == 0:
            trajectory.append(_measure(step.model, made, progress.step) | progress.metrics)
        if progress.last:
            routing.update(_routing(step))

    recipes = [] if name in experiment.MODELS else [demo_recipe(name, seed)]
    table = unlearning(
        made.fresh_target, made.forget, made.retain_unlearn, recipes, tokenizer=made.tokenizer,
        evaluation={"retain": made.retain_eval, "holdout": made.holdout},
        baselines={} if recipes else {name: getattr(made, name)}, seeds=[seed], on_step=watch,
    )  # fmt: skip
    return table, trajectory, routing


def _routing(step: UnlearnStep) -> dict:
    """What TRACE saw and chose, as `report` reads it; nothing without TRACE."""
    recipe, prepared = step.recipe.trace, step.prepared
    if prepared.frequencies is None:
        return {}
    routing = {side: counted.frequency for side, counted in prepared.frequencies.items()}
    routing["selected"] = prepared.selected
    if prepared.inactive:
        routing["inactive"] = trace.why_empty(
            **prepared.frequencies, min_ratio=recipe.min_ratio, min_load=recipe.min_load
        )
    return routing


def demo_recipe(name: str, seed: int, *overrides: str) -> Recipe:
    """The shipped recipe `name` with the tiny experiment's settings."""
    recipe = Recipe.load(name, [*DEMO_COMMON, *DEMO_OVERRIDES.get(name, []), *overrides])
    return replace(recipe, seed=seed)


def _measure(model: nn.Module, made: Experiment, step: int) -> dict:
    scores = {
        side: metrics.token_scores(model, examples, batch_size=64)
        # as many retain documents: what a curve needs; the table is measured on all
        for side, examples in (("f", made.forget), ("r", made.retain_eval[: len(made.forget)]))
    }
    return {"step": step, **{f"nll_{side}": metrics.nll(values) for side, values in scores.items()}}


def _write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
