"""Whole runs: one unlearning run on a user's data, and the embedded experiment with all its rivals."""

import json
import time
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm
from transformers import TrainingArguments

from moe_unlearn import data, experiment, metrics, report, trace
from moe_unlearn.config import Recipe
from moe_unlearn.experiment import Experiment
from moe_unlearn.step import UnlearnStep
from moe_unlearn.trainer import UnlearnTrainer

RUNS = ("graddiff", "npo", "trace", "wagle", "mollm", "combined")

# What the tiny models need instead of the shipped recipes' settings, which are for real ones. Chosen on
# builtin:pydoc, seeds 0 to 4, and reported on others; benchmarks/NOTES.md has the search.
# A batch holds all 40 forget and all 65 visible retain documents.
DEMO_COMMON = ["batch_size=40", "retain_per_forget=1.625", "optimizer.lr=1e-4", "steps=25"]
# A run with MOLLM ends at a forget loss, after 75 steps at the most: tuning seeds took 35 to 70.
DEMO_OVERRIDES: dict[str, list[str]] = {name: ["steps=75", "stop_forget_loss=0.43"] for name in ("mollm", "combined")}
TRAJECTORY_POINTS = 8


def unlearn(
    model: nn.Module,
    tokenizer,
    recipe: Recipe,
    sets: dict[str, list],
    out: Path,
    *,
    resume: bool = False,
    evaluate: bool = True,
) -> dict:
    """Run `recipe` on `sets` ("forget", "retain" and perhaps "holdout" examples) and write the folder `out`.

    `out` gets `recipe.yaml`, `checkpoints/`, `model/` (loads with `from_pretrained`), `summary.json`,
    `trajectory.json` and `report.md`. With `resume` the newest checkpoint goes on. Returns the summary: run
    name -> metrics, empty without `evaluate`.
    """
    out.mkdir(parents=True, exist_ok=True)
    (out / "recipe.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
    arguments = TrainingArguments(
        output_dir=str(out / "checkpoints"),
        max_steps=recipe.steps,
        per_device_train_batch_size=recipe.batch_size,
        gradient_accumulation_steps=recipe.accumulate,
        learning_rate=recipe.optimizer.lr,
        lr_scheduler_type="constant",
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
    trainer = UnlearnTrainer(model, arguments, recipe, dataset, processing_class=tokenizer)
    summary = {}
    reference = None
    if evaluate:
        if recipe.data.reference is not None:
            retrained, _ = experiment.load_model(recipe.data.reference)
            summary["retrain"] = metrics.evaluate(retrained, tokenizer, **sets)
            reference = summary["retrain"].get("minkauc")
        summary["target"] = metrics.evaluate(model, tokenizer, **sets, reference_auc=reference)
    start = time.perf_counter()
    trainer.train(resume_from_checkpoint=resume)
    seconds = time.perf_counter() - start
    trainer.save_model(str(out / "model"))
    tokenizer.save_pretrained(out / "model")
    trajectory = [entry for entry in trainer.state.log_history if "forget_loss" in entry]
    _write_json(out / "trajectory.json", {recipe.name: trajectory})
    if evaluate:
        after = metrics.evaluate(trainer.model, tokenizer, **sets, reference_auc=reference)
        summary[recipe.name] = after | {"seconds": seconds}
        _write_json(out / "summary.json", summary)
        report.write(out)
    return summary


def demo(corpus: str, seeds: list[int], out: Path, runs: tuple[str, ...] = RUNS) -> dict:
    """The embedded experiment on `seeds`; writes `summary.json`, `report.md` and figures into `out`."""
    results, trajectories, routing = {}, {}, {}
    for seed in seeds:
        tqdm.write(f"seed {seed}: target and retrain models")
        made = experiment.prepare_experiment(corpus, seed)
        results[seed], trajectories[seed], routing[seed] = run_seed(made, runs)
    content = report.Content(
        corpus=corpus, results=results, trajectories=trajectories[seeds[0]], routing=routing[seeds[0]]
    )
    return report.write_demo(out, content)


def run_seed(made: Experiment, runs: tuple[str, ...] = RUNS) -> tuple[dict, dict, dict]:
    """All runs of one seed: metrics by run, trajectories by run, and the routing of the target."""
    sets = made.evaluation_sets
    retrain = metrics.evaluate(made.retrain, made.tokenizer, **sets)
    auc = retrain["minkauc"]
    results = {
        "target": metrics.evaluate(made.target, made.tokenizer, **sets, reference_auc=auc),
        "retrain": retrain | {"privleak": 0.0},
    }
    for name in ("target", "retrain"):
        results[name]["seconds"] = made.seconds[name]
    trajectories, routing = {}, {}
    for name in runs:
        model, steps, step, seconds = unlearn_once(made, demo_recipe(name, made.seed))
        trajectories[name] = steps
        results[name] = metrics.evaluate(model, made.tokenizer, **sets, reference_auc=auc)
        results[name]["seconds"] = seconds
        if step.prepared.frequencies is not None:
            f, r = (step.prepared.frequencies[side].frequency for side in ("forget", "retain"))
            routing = {"forget": f, "retain": r, "selected": step.prepared.selected}
            after = trace.routing_frequencies(model, data.batches(made.forget, 32)).frequency
            results[name]["routing_drift"] = metrics.routing_drift(f, after)[1]
    return results, trajectories, routing


def demo_recipe(name: str, seed: int, *overrides: str) -> Recipe:
    """The shipped recipe `name` with the tiny experiment's settings."""
    recipe = Recipe.load(name, [*DEMO_COMMON, *DEMO_OVERRIDES.get(name, []), *overrides])
    return replace(recipe, seed=seed)


def unlearn_once(made: Experiment, recipe: Recipe) -> tuple[nn.Module, list[dict], UnlearnStep, float]:
    """One run on a copy of the target: the model, its trajectory, the step, and seconds spent in it."""
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
    for i in tqdm(range(recipe.steps), desc=recipe.name, unit="step", disable=None, leave=False):
        start = time.perf_counter()
        metrics_ = step(*_pair(pairs, i, size))
        seconds += time.perf_counter() - start
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
