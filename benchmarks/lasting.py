"""Measure how deep forgetting goes and what it costs: python -m benchmarks.lasting [--seeds 0 1 2] [--minutes M]

Each run unlearns a tiny model of its own, trained here, by the recipe `level` or, for comparison, `mollm`, with one
lever changed. What is measured stands beside the retrained model and the goal of `GOAL`. Runs are resumable: each is
a line of `results/lasting.jsonl`, and a run that has one is not made again. `results/lasting.json` and the
figure `results/lasting.png` are made of all lines; `python -m benchmarks.readme` puts them into RESULTS.md.

Settings may be chosen by the seeds `TUNED` alone. Numbers are deterministic on one machine.
"""

import argparse
import dataclasses
import json
import math
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from benchmarks.journal import Journal, of_kind, read
from benchmarks.plots import pyplot
from benchmarks.stamp import RESULTS
from moe_unlearn import metrics
from moe_unlearn.benchmark import tiny_models
from moe_unlearn.benchmark.tiny_models import Experiment, Settings
from moe_unlearn.config import Recipe
from moe_unlearn.data import Example
from moe_unlearn.files import write_json
from moe_unlearn.runs.own_texts import own_texts
from moe_unlearn.runs.run import SIDES, Run
from moe_unlearn.step import UnlearnStep

JOURNAL, REPORT, FIGURE = "lasting.jsonl", "lasting.json", "lasting.png"
CORPUS = "builtin:pydoc"
TUNED = (0, 1, 2)
SETTINGS = dataclasses.replace(tiny_models.SIZES["test"], holdout=48)
COMMON = ("batch_size=16", "retain_per_forget=1", "optimizer.lr=1e-3", "steps=40")
#: what is to be reached: distances to the retrained model's values, and shares of the target's
GOAL = {"privleak": 10.0, "verbmem_f": 0.05, "knowmem_f": 0.05, "verbmem_r": 0.95, "knowmem_r": 0.95}
KEYS = ("nll_f", "nll_r", "nll_h", "verbmem_f", "verbmem_r", "knowmem_f", "knowmem_r", "minkauc")


@dataclass(frozen=True, kw_only=True)
class Lever:
    """One point of the frontier: a recipe with overrides, and what lies beside a recipe.

    `samples` texts that the model itself writes before unlearning join the retain rows (`data.sampled`), and a step has
    so many `rows` more.
    `falling` lets the step size fall to a twentieth, `averaged` measures the running average of the weights.
    """

    recipe: str = "level"
    overrides: Sequence[str] = field(default=())
    samples: int = 0
    rows: int = 0
    falling: bool = False
    averaged: bool = False


LEVERS = {
    "mollm": Lever(recipe="mollm"),
    "level": Lever(),
    "falling": Lever(falling=True),
    "no hold": Lever(falling=True, overrides=("forget.hold=0",)),
    "sampled": Lever(falling=True, samples=128, rows=24),
    "sampled, smaller steps": Lever(falling=True, samples=128, rows=24, overrides=("optimizer.lr=3e-4",)),
    "sampled, twice as long": Lever(falling=True, samples=128, rows=24, overrides=("steps=80",)),
    "sampled, 4 x as long": Lever(falling=True, samples=512, rows=48, overrides=("steps=160", "optimizer.lr=3e-4")),
    "sampled, 8 x as long": Lever(falling=True, samples=1024, rows=48, overrides=("steps=320", "optimizer.lr=2e-4")),
    "sampled, averaged": Lever(falling=True, averaged=True, samples=128, rows=24),
    "sampled, sequences": Lever(falling=True, samples=128, rows=24, overrides=("forget.unit=sequence",)),
    "sampled, WAGLE": Lever(falling=True, samples=128, rows=24, overrides=("wagle.keep=0.8",)),
    "sampled, TRACE": Lever(
        falling=True, samples=128, rows=24, overrides=("trace.min_ratio=1.2", "trace.allow_empty=true")
    ),
}


def unseen_of(seed: int, settings: Settings = SETTINGS) -> list[Example]:
    """Return the documents of the forget subjects that no model of the seed was trained on and no metric reads."""
    every = tiny_models.build_data(CORPUS, seed, dataclasses.replace(settings, forget=10**6))[1]
    return every[settings.forget :]


def unlearned(made: Experiment, lever: Lever) -> nn.Module:
    """Return the target model after a run of the lever, in evaluation mode."""
    recipe = dataclasses.replace(Recipe.load(lever.recipe, [*COMMON, *lever.overrides]), seed=made.seed)
    model, sets = made.fresh_target(), {"forget": made.forget, "retain": made.retain_unlearn}
    if lever.samples:
        share = max(1.0, (len(made.retain_unlearn) + lever.rows) / len(made.forget))
        settings = dataclasses.replace(recipe.data, sampled=lever.samples, max_length=made.settings.max_length)
        recipe = dataclasses.replace(recipe, data=settings, retain_per_forget=share)
        sets["sampled"] = own_texts(model, made.tokenizer, recipe, made.forget)
    if recipe.forget.objective == "level":
        sets["unseen"] = unseen_of(made.seed, made.settings)
    run = Run(model, made.tokenizer, recipe, sets)
    step, average = UnlearnStep(run.model, recipe), None
    step.prepare(*map(run.batches, SIDES))
    for i in range(recipe.steps):
        for group in step.optimizer.param_groups if lever.falling else ():
            group["lr"] = recipe.optimizer.lr * max(0.05, 1 - i / recipe.steps)
        batch = run.micro_batch(i)
        step(batch["forget"], batch["retain"])
        if lever.averaged:
            now = [p.detach().clone() for p in run.model.parameters()]
            average = now if average is None else [torch.lerp(a, b, 0.1) for a, b in zip(average, now, strict=True)]
    if average is not None:
        with torch.no_grad():
            for p, mean in zip(run.model.parameters(), average, strict=True):
                p.copy_(mean)
    return run.model.eval()


def measured(name: str, seed: int, settings: Settings = SETTINGS) -> dict[str, float]:
    """Return the metrics of a lever's run, or of `target` or `retrain`, for one seed."""
    made = tiny_models.prepare_experiment(CORPUS, seed, size=settings)
    model = getattr(made, name) if name in tiny_models.MODELS else unlearned(made, LEVERS[name])
    found = metrics.evaluate(model, made.tokenizer, **made.evaluation_sets)
    return {key: float(found[key]) for key in KEYS}


def recorded(results: Path) -> list[dict]:
    """Return the lines of all runs; none where there is no journal yet."""
    return read(results / JOURNAL) if (results / JOURNAL).exists() else []


def points(lines: Sequence[dict]) -> dict[str, dict[int, dict[str, float]]]:
    """Return the metrics of all recorded runs, lever -> seed -> metrics, with `privleak` beside the retrained model."""
    found: dict[str, dict[int, dict[str, float]]] = {}
    for line in of_kind(lines, "run"):
        found.setdefault(line["name"], {})[line["seed"]] = dict(line["metrics"])
    for by_seed in found.values():
        for seed, values in by_seed.items():
            if (retrained := found.get("retrain", {}).get(seed)) is not None:
                values["privleak"] = 100 * (values["minkauc"] - retrained["minkauc"]) / retrained["minkauc"]
    return found


def missed(values: dict[str, float], target: dict[str, float], retrained: dict[str, float]) -> dict[str, float]:
    """Return how far a run is from each part of `GOAL`; 0 is reached."""
    apart = {name: abs(values[name] - retrained[name]) - GOAL[name] for name in ("verbmem_f", "knowmem_f")}
    apart["privleak"] = abs(values["privleak"]) - GOAL["privleak"]
    apart |= {name: GOAL[name] - values[name] / target[name] for name in ("verbmem_r", "knowmem_r")}
    return {name: max(0.0, value) for name, value in apart.items()}


def wanted(names: Sequence[str], seeds: Sequence[int], lines: Sequence[dict]) -> Iterator[tuple[str, int]]:
    """Yield the runs that have no line yet, all of one seed before the next."""
    known = {(line["name"], line["seed"]) for line in of_kind(lines, "run")}
    for seed in seeds:
        yield from ((name, seed) for name in (*tiny_models.MODELS, *names) if (name, seed) not in known)


def write(results: Path = RESULTS) -> None:
    """Write the report of all recorded runs."""
    found = points(recorded(results))
    report = {
        "command": "python -m benchmarks.lasting",
        "settings": dataclasses.asdict(SETTINGS),
        "common": list(COMMON),
        "goal": GOAL,
        "tuned": list(TUNED),
        "points": {name: {str(seed): by_seed[seed] for seed in sorted(by_seed)} for name, by_seed in found.items()},
    }
    write_json(results / REPORT, report)
    draw(found, results / FIGURE)


def draw(found: dict[str, dict[int, dict[str, float]]], path: Path) -> None:
    """Draw utility over depth, one point a run, in one colour a lever; a dashed line is the goal's utility."""
    figure, axes = pyplot.subplots(figsize=(7, 4.5))
    colors = iter(pyplot.get_cmap("tab20").colors)
    styles = {"target": {"marker": "*", "color": "grey"}, "retrain": {"marker": "*", "color": "black"}}
    for name, by_seed in found.items():
        style = styles.get(name) or {"marker": "o" if name.startswith("sampled") else "s", "color": next(colors)}
        depth, utility = ([values[key] for values in by_seed.values()] for key in ("nll_f", "verbmem_r"))
        axes.plot(depth, utility, linestyle="", label=name, markersize=10 if name in styles else 5, **style)
    axes.axhline(GOAL["verbmem_r"], linestyle="--", color="grey")
    axes.set(xlabel="NLL of forget documents", ylabel="VerbMem of retain documents held out")
    if found:
        axes.legend(fontsize="small")
    figure.tight_layout()
    figure.savefig(path, dpi=100, metadata={"Software": None})
    pyplot.close(figure)


def generated(results: Path = RESULTS) -> str:
    """Return the section of RESULTS.md: means over the seeds kept back and over those tuned on, and goals reached."""
    if not (results / REPORT).exists():
        return "No run is recorded yet."
    report = json.loads((results / REPORT).read_text(encoding="utf-8"))
    found, settings, tuned = report["points"], report["settings"], report["tuned"]
    seeds = sorted({int(seed) for by_seed in found.values() for seed in by_seed})
    kept = [seed for seed in seeds if seed not in tuned]
    chance = math.sqrt((settings["forget"] + settings["holdout"] + 1) / (12 * settings["forget"] * settings["holdout"]))
    text = (
        f"`{report['command']}`: models of {settings['layers']} layers and {settings['experts']} experts, trained on "
        f"{settings['forget']} forget and {settings['retain']} retain documents. Utility is measured on retain "
        "documents held out of unlearning. The goal: PrivLeak within 10 of 0, VerbMem and KnowMem of the forget "
        "documents within 0.05 of the retrained model's, those of retain documents at least 95 % of the target's. "
        f"PrivLeak is noisy at this size: of {settings['forget']} documents against {settings['holdout']} the standard "
        f"error of an AUC is near {chance:.2f} (Mann-Whitney), {100 * chance / 0.5:.0f} of PrivLeak's points. "
        "Means over seeds; the last column counts the seeds that reach all of the goal, then the misses."
    )
    parts = [text]
    if kept:
        parts += [f"Seeds {_listed(kept)}, by which no setting was chosen:", _table(found, kept), _nearest(found, kept)]
    else:
        parts.append("No seed was kept back: nothing here says how the settings do on other documents.")
    if chosen_by := [seed for seed in seeds if seed in tuned]:
        parts += [f"Seeds {_listed(chosen_by)}, by which settings were chosen:", _table(found, chosen_by)]
    return "\n\n".join([*parts, f"![VerbMem of retain documents over the NLL of forget documents](results/{FIGURE})"])


def _listed(seeds: Sequence[int]) -> str:
    return ", ".join(map(str, seeds))


def _table(found: dict[str, dict[str, dict[str, float]]], seeds: Sequence[int]) -> str:
    """Return one row for each lever that has a run of these seeds."""
    columns = {
        "nll_f": "NLL forget",
        "nll_h": "NLL held out",
        "privleak": "\\|PrivLeak\\|",
        "verbmem_f": "VerbMem forget",
        "knowmem_f": "KnowMem forget",
        "verbmem_r": "VerbMem retain",
        "knowmem_r": "KnowMem retain",
    }
    lines = [f"| run | {' | '.join(columns.values())} | reach the goal |", "|---" * (len(columns) + 2) + "|"]
    for name in sorted(found, key=lambda name: [*tiny_models.MODELS, *LEVERS].index(name)):
        runs = _runs(found, name, seeds)
        if not runs:
            continue
        means = [statistics.fmean(abs(values[key]) for values in runs.values()) for key in columns]
        cells = [
            f"{mean:.1f}" if key == "privleak" else f"{mean:.3f}" for key, mean in zip(columns, means, strict=True)
        ]
        lines.append(f"| {name} | {' | '.join(cells)} | {_reached(runs, found) if name in LEVERS else '–'} |")
    return "\n".join(lines)


def _runs(found: dict[str, dict[str, dict[str, float]]], name: str, seeds: Sequence[int]) -> dict[str, dict]:
    """Return the lever's runs of these seeds that stand beside a retrained model, by seed."""
    own = found.get(name, {})
    return {str(seed): own[str(seed)] for seed in seeds if "privleak" in own.get(str(seed), {})}


def _misses(runs: dict[str, dict[str, float]], found: dict[str, dict[str, dict[str, float]]]) -> list[dict[str, float]]:
    """Return how far each run is from each part of the goal."""
    return [missed(values, found["target"][seed], found["retrain"][seed]) for seed, values in runs.items()]


def _nearest(found: dict[str, dict[str, dict[str, float]]], seeds: Sequence[int]) -> str:
    """Say which lever misses the fewest parts of the goal over these seeds, and of several the smallest |PrivLeak|."""
    far = {}
    for name in LEVERS:
        runs = _runs(found, name, seeds)
        if len(runs) == len(seeds):
            count = sum(value > 0 for each in _misses(runs, found) for value in each.values())
            far[name] = (count, statistics.fmean(abs(values["privleak"]) for values in runs.values()))
    if not far:
        return "No lever has a run of each of these seeds."
    name = min(far, key=far.__getitem__)
    of = len(GOAL) * len(seeds)
    return f"Nearest to the goal on these seeds is `{name}`, which misses {far[name][0]} of its {of} parts."


def _reached(runs: dict[str, dict[str, float]], found: dict[str, dict[str, dict[str, float]]]) -> str:
    """Say how many runs reach the goal, and how many miss each part of it."""
    far = _misses(runs, found)
    misses = [f"{name} {count}" for name in GOAL if (count := sum(each[name] > 0 for each in far))]
    return f"{sum(not any(each.values()) for each in far)} of {len(runs)}" + "".join(f"; {text}" for text in misses)


def main(arguments: Sequence[str] | None = None) -> None:
    """Make the runs that are missing, for `--minutes` at most, and write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=list(TUNED))
    parser.add_argument("--runs", nargs="+", default=list(LEVERS), choices=LEVERS)
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no run after so long")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    journal, end = Journal(options.out / JOURNAL), time.monotonic() + 60 * options.minutes
    for name, seed in wanted(options.runs, options.seeds, recorded(options.out)):
        if time.monotonic() >= end:
            break
        start = time.process_time()
        found = measured(name, seed)
        journal.write("run", name=name, seed=seed, metrics=found, processor_seconds=time.process_time() - start)
        print(name, seed, {key: round(value, 3) for key, value in found.items()}, flush=True)
    write(options.out)


if __name__ == "__main__":
    main()
