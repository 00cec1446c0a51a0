"""The embedded experiment, which compares baselines, each lever and their combination on tiny models.

The quick form of an audit then attacks what the last of the runs has made: rounding, routes, ten steps of relearning.
"""

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from moe_unlearn import metrics
from moe_unlearn.audit import Settings as AuditSettings
from moe_unlearn.audit import audit
from moe_unlearn.audit import summary as words
from moe_unlearn.benchmark import process_pool, tiny_models
from moe_unlearn.benchmark.suite import Progress, unlearning
from moe_unlearn.benchmark.table import Table
from moe_unlearn.benchmark.tiny_models import Experiment, Settings
from moe_unlearn.config import Recipe
from moe_unlearn.runs import report
from moe_unlearn.runs.about import Cost, about
from moe_unlearn.runs.seen import SAMPLES, TOKENS, paired_texts
from moe_unlearn.runs.unlearn import routing_of

RUNS = ("graddiff", "npo", "trace", "wagle", "mollm", "combined")

# Settings for the tiny models, where those of the shipped recipes are for real ones. They were chosen on builtin:pydoc,
# seeds 0 to 4, and results are reported on other seeds; benchmarks/NOTES.md describes the search.
# A batch holds all 40 forget and all 65 visible retain documents.
DEMO_COMMON = ["batch_size=40", "retain_per_forget=1.625", "optimizer.lr=1e-4", "steps=25"]

# A run with MOLLM ends when it reaches a forget loss, after 75 steps at most; the seeds of the search took 35 to 70.
DEMO_OVERRIDES: dict[str, list[str]] = {name: ["steps=75", "stop_forget_loss=0.43"] for name in ("mollm", "combined")}
TRAJECTORY_POINTS = 6

# the quick form of an audit, of as many documents a side
QUICK: dict[str, Any] = {
    "attacks": ("rounding", "routing", "relearning"),
    "settings": AuditSettings(relearn_steps=10, experts=8),
}
QUICK_DOCUMENTS = 40


def demo(
    corpus: str,
    seeds: list[int],
    out: Path,
    runs: tuple[str, ...] = RUNS,
    *,
    size: str | Settings = "demo",
    processes: int | None = None,
    command: str = "",
) -> dict:
    """Run the embedded experiment on `seeds`; write `summary.json`, its report and `audit/` into `out`.

    Models are trained and runs made side by side, in `processes` processes of one thread each (by default as many as
    torch has threads), because models this small leave most of a second thread idle. Deterministic on one machine,
    whatever the number of processes.
    """
    cost = Cost(torch.device("cpu"))
    started = about(command, seeds[0], cost.device)
    with cost.phase("all"), process_pool.Workers(processes or torch.get_num_threads()) as pool:
        settings = tiny_models.settings_of(size)
        batches = sum(-(-n // settings.batch_size) for n in (settings.retain, settings.retain + settings.forget))
        training = [(name, corpus, seed, size) for seed in seeds for name in tiny_models.MODELS]
        total = len(seeds) * settings.epochs * batches
        seconds = pool.run("training", _train, training, total)
        recipes = {name: demo_recipe(name, 0) for name in runs}
        # the longest runs go first, so that none of them keeps a single process busy at the end
        order = sorted(runs, key=lambda name: -recipes[name].steps)
        audited = {(runs[-1], seeds[0]): out / "audit"} if runs else {}
        tasks = [
            (name, corpus, seed, size, audited.get((name, seed)))
            for name in (*order, *tiny_models.MODELS)
            for seed in seeds
        ]
        total = len(seeds) * sum(recipe.steps for recipe in recipes.values())
        made = pool.run("unlearning", _run, tasks, total)
    done = {task[:4]: found for task, found in made.items()}
    table = Table.joined(done[name, corpus, seed, size][0] for seed in seeds for name in (*tiny_models.MODELS, *runs))
    for (name, _, seed, _), spent in seconds.items():
        table.results[seed][name]["seconds"] = spent
    first = {name: done[name, corpus, seeds[0], size] for name in runs}
    trajectories = {name: found[1] for name, found in first.items()}
    routing: dict[str, Any] = next((found[2] for found in first.values() if found[2]), {})
    quick: dict[str, Any] = next((found[3] for found in done.values() if found[3]), {})
    shown: dict[str, Any] = next((found[4] for found in done.values() if found[4]), {})
    content = report.Content(
        table.summary(),
        corpus,
        table.results,
        trajectories,
        routing,
        audit=quick,
        about=started,
        cost=cost.to_dict() | {"measured": None},  # its processes are many
        samples=shown,
    )
    report.save(out, content)
    report.write(out, content)
    return content.summary


def _train(name: str, corpus: str, seed: int, size: str | Settings) -> float:
    start = time.perf_counter()
    tiny_models.train_model(name, corpus, seed, size=size, on_step=process_pool.advance)
    return time.perf_counter() - start


def _run(
    name: str, corpus: str, seed: int, size: str | Settings, audited: Path | None
) -> tuple[Table, list[dict], dict, dict, dict]:
    """Return row, trajectory, routing, quick audit and texts of one run, or of the target or retrained model as it is.

    The audit's own report is written to the folder `audited`; without one there is none.
    """
    made = tiny_models.prepare_experiment(corpus, seed, size=size)
    trajectory: list[dict] = []
    routing: dict[str, Any] = {}
    quick: dict[str, Any] = {}
    shown: dict[str, Any] = {}

    def watch(progress: Progress) -> None:
        recipe, step = recipes[0], progress.unlearn_step
        spared = recipe.steps - progress.step if progress.last else 0
        process_pool.advance(spared + (progress.step > 0))
        if progress.last or progress.step % max(1, recipe.steps // TRAJECTORY_POINTS) == 0:
            trajectory.append(_measure(step.model, made, progress.step) | progress.metrics)
        if progress.last:
            routing.update(routing_of(step))
            if audited is not None:
                quick.update(_audited(name, step.model, made, audited))
                shown.update(_sampled(step.model, made))

    recipes = [] if name in tiny_models.MODELS else [demo_recipe(name, seed)]
    table = unlearning(
        made.fresh_target,
        made.forget,
        made.retain_unlearn,
        recipes,
        tokenizer=made.tokenizer,
        evaluation={"retain": made.retain_eval, "holdout": made.holdout},
        baselines={} if recipes else {name: getattr(made, name)},
        seeds=[seed],
        on_step=watch,
    )
    return table, trajectory, routing, quick, shown


def _audited(name: str, model: nn.Module, made: Experiment, out: Path) -> dict[str, Any]:
    """Attack a run's model in the quick form; write the audit's report and return what the run's report shows."""
    forget, retain, holdout = (rows[:QUICK_DOCUMENTS] for rows in (made.forget, made.retain_eval, made.holdout))
    found = audit(
        model,
        made.tokenizer,
        forget=forget,
        retain=retain,
        holdout=holdout,
        before=made.target,
        reference=made.retrain,
        out=out,
        batch_size=64,
        say=lambda line: None,
        **QUICK,
    )
    rows = [list(row) for row in words.rows(found)]
    return {"run": name, "verdict": found.verdict, "summary": words.summary(found), "rows": rows}


def _sampled(model: nn.Module, made: Experiment) -> dict[str, Any]:
    """Return what the target and a run's model write after the prompts of a few rows."""
    rows = {"forget": made.forget[:SAMPLES], "retain": made.retain_eval[:SAMPLES]}
    before, after = (
        {side: metrics.continuations(own, made.tokenizer, few, new_tokens=TOKENS) for side, few in rows.items()}
        for own in (made.target, model)
    )
    return paired_texts(before, after)


def demo_recipe(name: str, seed: int, *overrides: str) -> Recipe:
    """Load the shipped recipe `name` with the tiny experiment's settings."""
    recipe = Recipe.load(name, [*DEMO_COMMON, *DEMO_OVERRIDES.get(name, []), *overrides])
    return replace(recipe, seed=seed)


def _measure(model: nn.Module, made: Experiment, step: int) -> dict:
    scores = {
        side: metrics.token_scores(model, examples, batch_size=64)
        # as many retain documents as forget documents are enough for a curve; the table is measured on all of them
        for side, examples in (("f", made.forget), ("r", made.retain_eval[: len(made.forget)]))
    }
    return {"step": step, **{f"nll_{side}": metrics.nll(values) for side, values in scores.items()}}
