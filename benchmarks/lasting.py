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
from moe_unlearn.data.corpus import runs as runs_of
from moe_unlearn.files import write_json
from moe_unlearn.runs.run import SIDES, Run
from moe_unlearn.step import UnlearnStep

JOURNAL, REPORT, FIGURE = "lasting.jsonl", "lasting.json", "lasting.png"
CORPUS = "builtin:pydoc"
TUNED = (0, 1, 2)
SETTINGS = dataclasses.replace(tiny_models.SIZES["test"], holdout=48)
COMMON = ("batch_size=16", "retain_per_forget=1", "optimizer.lr=1e-3", "steps=40")
SHARED = 8  # tokens in a row that a sampled text may not share with a forget document
#: what is to be reached: distances to the retrained model's values, and shares of the target's
GOAL = {"privleak": 10.0, "verbmem_f": 0.05, "knowmem_f": 0.05, "verbmem_r": 0.95, "knowmem_r": 0.95}
KEYS = ("nll_f", "nll_r", "nll_h", "verbmem_f", "verbmem_r", "knowmem_f", "knowmem_r", "minkauc")


@dataclass(frozen=True, kw_only=True)
class Lever:
    """One point of the frontier: a recipe with overrides, and what lies beside a recipe.

    `samples` texts that the model itself writes before unlearning join the retain rows, `rows` of them a step.
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
    "sampled, averaged": Lever(falling=True, averaged=True, samples=128, rows=24),
    "sampled, sequences": Lever(falling=True, samples=128, rows=24, overrides=("forget.unit=sequence",)),
    "sampled, WAGLE": Lever(falling=True, samples=128, rows=24, overrides=("wagle.keep=0.8",)),
    "sampled, TRACE": Lever(falling=True, samples=128, rows=24, overrides=("trace.allow_empty=true",)),
}


def unseen_of(seed: int, settings: Settings = SETTINGS) -> list[Example]:
    """Return the documents of the forget subjects that no model of the seed was trained on and no metric reads."""
    every = tiny_models.build_data(CORPUS, seed, dataclasses.replace(settings, forget=10**6))[1]
    return every[settings.forget :]


def sampled(made: Experiment, count: int) -> list[Example]:
    """Return texts that the target model writes at temperature 1, without those that repeat a forget document."""
    tokenizer, draw = made.tokenizer, torch.Generator().manual_seed(made.seed)
    forgotten = set().union(*(runs_of(example.input_ids, SHARED) for example in made.forget))
    found: list[Example] = []
    while len(found) < count:
        rows = torch.full((64, 1), tokenizer.bos_token_id)
        for _ in range(made.settings.max_length - 1):
            with torch.no_grad():
                probabilities = made.target(input_ids=rows, use_cache=False).logits[:, -1].softmax(-1)
            rows = torch.cat([rows, torch.multinomial(probabilities, 1, generator=draw)], 1)
        for row in rows.tolist():
            ids = row[: row.index(tokenizer.eos_token_id) + 1] if tokenizer.eos_token_id in row else row
            if len(ids) > 3 and forgotten.isdisjoint(runs_of(ids, SHARED)):
                found.append(Example(ids, list(ids), 0))
    return found[:count]


def unlearned(made: Experiment, lever: Lever) -> nn.Module:
    """Return the target model after a run of the lever, in evaluation mode."""
    recipe = dataclasses.replace(Recipe.load(lever.recipe, [*COMMON, *lever.overrides]), seed=made.seed)
    retain = made.retain_unlearn
    if lever.samples:
        share = max(1.0, (len(retain) + lever.rows) / len(made.forget))
        recipe = dataclasses.replace(recipe, retain_per_forget=share)
        retain = retain + sampled(made, lever.samples)
    unseen = unseen_of(made.seed, made.settings) if recipe.forget.objective == "level" else None
    run = Run(made.fresh_target(), made.tokenizer, recipe, made.forget, retain, unseen=unseen)
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
    for name, by_seed in found.items():
        marker = "k*" if name in tiny_models.MODELS else "o"
        depth, utility = ([values[key] for values in by_seed.values()] for key in ("nll_f", "verbmem_r"))
        axes.plot(depth, utility, marker, label=name, markersize=10 if marker == "k*" else 6)
    axes.axhline(GOAL["verbmem_r"], linestyle="--", color="grey")
    axes.set(xlabel="NLL of forget documents", ylabel="VerbMem of retain documents not seen")
    if found:
        axes.legend(fontsize="small")
    figure.tight_layout()
    figure.savefig(path, dpi=100, metadata={"Software": None})
    pyplot.close(figure)


def generated(results: Path = RESULTS) -> str:
    """Return the section of RESULTS.md: means over seeds, and how far each run is from the goal."""
    if not (results / REPORT).exists():
        return "No run is recorded yet."
    report = json.loads((results / REPORT).read_text(encoding="utf-8"))
    found, settings = report["points"], report["settings"]
    seeds = sorted({int(seed) for by_seed in found.values() for seed in by_seed})
    kept = [str(seed) for seed in seeds if seed not in report["tuned"]]
    told = "no seed was kept back: nothing here says how the settings do on other documents"
    if kept:
        told = f"of these no setting was chosen by {', '.join(kept)}"
    shown = ("nll_f", "nll_h", "privleak", "verbmem_f", "knowmem_f", "verbmem_r", "knowmem_r")
    lines = [f"| run | seeds | {' | '.join(shown)} | misses of the goal |", "|---" * (len(shown) + 3) + "|"]
    for name in sorted(found, key=lambda name: [*tiny_models.MODELS, *LEVERS].index(name)):
        runs = {seed: values for seed, values in found[name].items() if "privleak" in values}
        if not runs:
            continue
        cells = [f"{statistics.fmean(values[key] for values in runs.values()):.3g}" for key in shown]
        misses = [_missed(values, found, seed) for seed, values in runs.items()] if name in LEVERS else []
        lines.append(f"| {name} | {len(runs)} | {' | '.join(cells)} | {'; '.join(dict.fromkeys(misses)) or '–'} |")
    text = (
        f"`{report['command']}`: models of {settings['layers']} layers and {settings['experts']} experts, trained on "
        f"{settings['forget']} forget and {settings['retain']} retain documents; means over seeds "
        f"{', '.join(map(str, seeds))}; {told}. Utility is measured on retain documents that unlearning never saw. The "
        "goal: PrivLeak within 10 of 0, VerbMem and KnowMem of the forget documents within 0.05 of the retrained "
        "model's, those of retain documents at least 95 % of the target's."
    )
    figure = f"![VerbMem of retain documents over the NLL of forget documents](results/{FIGURE})"
    return "\n\n".join([text, "\n".join(lines), figure])


def _missed(values: dict, found: dict, seed: str) -> str:
    far = missed(values, found["target"][seed], found["retrain"][seed])
    return ", ".join(name for name, value in far.items() if value) or "none"


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
