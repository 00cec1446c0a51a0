"""Whole runs: one unlearning run on a user's data, and the embedded experiment with all its rivals."""

import json
import multiprocessing
import signal
import time
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm
from transformers import TrainingArguments

from moe_unlearn import data, experiment, metrics, report, trace
from moe_unlearn.config import Recipe
from moe_unlearn.experiment import Experiment, Settings
from moe_unlearn.step import UnlearnStep
from moe_unlearn.trainer import UnlearnTrainer

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
) -> dict:
    """Run `recipe` on `sets` ("forget", "retain" and perhaps "holdout" examples) and write the folder `out`.

    `out` gets `recipe.yaml`, `checkpoints/`, `model/` (loads with `from_pretrained`), `summary.json`,
    `trajectory.json`, `report.md` and, with `verify` as in `UnlearnStep`, `verified.txt`. With `resume` the
    newest checkpoint goes on. References are kept in `cache_dir`, by default `out/cache`. Returns the summary:
    run name -> metrics, empty without `evaluate`.
    """
    out.mkdir(parents=True, exist_ok=True)
    (out / "recipe.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
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
        report_to="none",
    )
    dataset = data.ForgetRetainDataset(
        sets["forget"], sets["retain"], seed=recipe.seed, retain_per_forget=recipe.retain_per_forget
    )
    trainer = UnlearnTrainer(
        model, arguments, recipe, dataset, processing_class=tokenizer, cache_dir=cache_dir or out / "cache",
        verify=verify,
    )  # fmt: skip
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
    seconds = time.perf_counter() - start
    # not save_model, which would put a pickle of the training arguments beside the weights
    trainer.model.save_pretrained(out / "model")
    tokenizer.save_pretrained(out / "model")
    trajectory = [entry for entry in trainer.state.log_history if "forget_loss" in entry]
    _write_json(out / "trajectory.json", {recipe.name: trajectory})
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
    with _Workers(processes or torch.get_num_threads()) as workers:
        settings = experiment.settings_of(size)
        batches = sum(-(-n // settings.batch_size) for n in (settings.retain, settings.retain + settings.forget))
        training = [(name, corpus, seed, size) for seed in seeds for name in experiment.MODELS]
        total = len(seeds) * settings.epochs * batches
        seconds = workers.run("training", _train, training, total)
        recipes = {name: demo_recipe(name, 0) for name in runs}
        # the longest first, so that no process is left alone with one at the end
        order = sorted(runs, key=lambda name: -recipes[name].steps)
        tasks = [(name, corpus, seed, size) for name in (*order, *experiment.MODELS) for seed in seeds]
        total = len(seeds) * sum(recipe.steps for recipe in recipes.values())
        done = workers.run("unlearning", _run, tasks, total)
    results, trajectories, routing = {}, {}, {}
    for seed in seeds:
        found = {name: done[name, corpus, seed, size] for name in (*experiment.MODELS, *runs)}
        results[seed] = {name: result[0] for name, result in found.items()}
        auc = results[seed]["retrain"]["minkauc"]
        for name, values in results[seed].items():
            values["privleak"] = metrics.privleak(values["minkauc"], auc)
            if name in experiment.MODELS:
                values["seconds"] = seconds[name, corpus, seed, size]
        if seed == seeds[0]:
            trajectories = {name: found[name][1] for name in runs}
            routing = next((found[name][2] for name in runs if found[name][2]), {})
    content = report.Content(corpus=corpus, results=results, trajectories=trajectories, routing=routing)
    return report.write_demo(out, content)


class _Workers:
    """Processes of one thread each that report the steps they have done."""

    def __init__(self, processes: int):
        # not forked: the caller's threads would be missing in the children
        context = multiprocessing.get_context("spawn")
        self._steps = context.Value("q", 0)
        self._pool = ProcessPoolExecutor(processes, context, _start_worker, (self._steps,))

    def __enter__(self) -> "_Workers":
        return self

    def __exit__(self, *exception) -> None:
        if exception[0] is not None:
            self._steps.value = _STOP
        self._pool.shutdown(cancel_futures=True)

    def run(self, title: str, function: Callable, tasks: list[tuple], total: int) -> dict[tuple, Any]:
        """Task -> function(*task), each as it becomes free; a bar of `total` steps where somebody watches."""
        self._steps.value = 0
        futures = {self._pool.submit(function, *task): task for task in tasks}
        pending = set(futures)
        with tqdm(total=total, desc=title, unit="step", disable=None, leave=False) as bar:
            while pending:
                finished, pending = wait(pending, timeout=0.5, return_when=FIRST_COMPLETED)
                bar.update(self._steps.value - bar.n)
                for future in finished:
                    future.result()
        return {task: future.result() for future, task in futures.items()}


_STOP = -1
_steps_done: Any = None  # of this worker's pool; set once, when the process starts


def _start_worker(steps) -> None:
    global _steps_done
    _steps_done = steps
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal interrupts everybody; the caller stops the others


def _advance(steps: int = 1) -> None:
    with _steps_done.get_lock():
        if _steps_done.value == _STOP:
            raise InterruptedError("another run failed, or the demo was interrupted")
        _steps_done.value += steps


def _train(name: str, corpus: str, seed: int, size: str | Settings) -> float:
    start = time.perf_counter()
    experiment.train_model(name, corpus, seed, size=size, on_step=_advance)
    return time.perf_counter() - start


def _run(name: str, corpus: str, seed: int, size: str | Settings) -> tuple[dict, list[dict], dict]:
    """Metrics, trajectory and routing of one run, or of the target or retrained model as it is."""
    made = experiment.prepare_experiment(corpus, seed, size=size)
    sets, trajectory, routing = made.evaluation_sets, [], {}
    if name in experiment.MODELS:
        return metrics.evaluate(getattr(made, name), made.tokenizer, **sets), trajectory, routing
    recipe = demo_recipe(name, seed)
    model, trajectory, step, seconds = unlearn_once(made, recipe, on_step=_advance)
    _advance(recipe.steps - step.steps)  # those that a stop spared
    results = metrics.evaluate(model, made.tokenizer, **sets) | {"seconds": seconds}
    if step.prepared.frequencies is not None:
        f, r = (step.prepared.frequencies[side].frequency for side in ("forget", "retain"))
        routing = {"forget": f, "retain": r, "selected": step.prepared.selected}
        after = trace.routing_frequencies(model, data.batches(made.forget, 32)).frequency
        results["routing_drift"] = metrics.routing_drift(f, after)[1]
    return results, trajectory, routing


def demo_recipe(name: str, seed: int, *overrides: str) -> Recipe:
    """The shipped recipe `name` with the tiny experiment's settings."""
    recipe = Recipe.load(name, [*DEMO_COMMON, *DEMO_OVERRIDES.get(name, []), *overrides])
    return replace(recipe, seed=seed)


def unlearn_once(
    made: Experiment, recipe: Recipe, on_step: Callable[[], None] = lambda: None
) -> tuple[nn.Module, list[dict], UnlearnStep, float]:
    """One run on a copy of the target: the model, its trajectory, the step, and seconds spent in it.

    `on_step` is called after each step.
    """
    torch.manual_seed(recipe.seed)
    model = made.fresh_target()
    step = UnlearnStep(model, recipe)
    start = time.perf_counter()
    size = recipe.batch_size
    step.prepare(data.batches(made.forget, size), data.batches(made.retain_unlearn, size))
    seconds = time.perf_counter() - start
    pairs = data.ForgetRetainDataset(
        made.forget, made.retain_unlearn, seed=recipe.seed, retain_per_forget=recipe.retain_per_forget
    )
    trajectory = [_measure(model, made, 0)]
    for i in range(recipe.steps):
        start = time.perf_counter()
        metrics_ = step(*_pair(pairs, i, size))
        seconds += time.perf_counter() - start
        on_step()
        last = step.done or i + 1 == recipe.steps
        if last or (i + 1) % max(1, recipe.steps // TRAJECTORY_POINTS) == 0:
            trajectory.append(_measure(model, made, i + 1) | metrics_)
        if last:
            break
    return model.eval(), trajectory, step, seconds


def _pair(pairs: data.ForgetRetainDataset, i: int, size: int) -> tuple[dict, dict]:
    """Forget and retain batch of step i: a seeded permutation of the forget set, anew in every epoch."""
    per_epoch = -(-len(pairs) // size)
    epoch, position = divmod(i, per_epoch)
    pairs.set_epoch(epoch)
    order = torch.randperm(len(pairs), generator=data.generator(pairs.seed, epoch)).tolist()
    items = [pairs[j] for j in order[position * size : (position + 1) * size]]
    batch = data.PairCollator()(items)
    return batch["forget"], batch["retain"]


def _measure(model: nn.Module, made: Experiment, step: int) -> dict:
    scores = {
        side: metrics.token_scores(model, examples, batch_size=64)
        # as many retain documents: what a curve needs; the table is measured on all
        for side, examples in (("f", made.forget), ("r", made.retain_eval[: len(made.forget)]))
    }
    return {"step": step, **{f"nll_{side}": metrics.nll(values) for side, values in scores.items()}}


def _write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
