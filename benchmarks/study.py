"""Measure what each lever buys: baselines with and without TRACE, WAGLE and MOLLM at matched forgetting.

    python -m benchmarks.study --small              half an hour on two cores
    python -m benchmarks.study                      the whole study, hours; if killed, it resumes where it stopped
    python -m benchmarks.study --report [--small]   table, figures and JSON from the parts that are there
    python -m benchmarks.study --list [--small]     every run and whether it is done
    python -m benchmarks.study --targeted           TRACE in the setting it argues for: `benchmarks.study_targeted`

Every result is a small JSON file, named by a digest of its specification (`study_run.Spec`). So runs that two parts
of the study share are made once, and those of --small also serve the whole study. They are kept in the folder
`study` beside the trained models, see `moe_unlearn.benchmark.trained_cache.cache_folder`.
"""

import argparse
import itertools
import json
import re
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path

from benchmarks.pool import Pool
from benchmarks.study_run import Spec, run
from moe_unlearn.benchmark.tiny_models import Settings
from moe_unlearn.benchmark.trained_cache import cache_folder
from moe_unlearn.files import write_text

RESULTS = Path(__file__).parent / "results" / "study"
RUNS = "runs.jsonl"

#: recipe, learning rate and other settings for tiny models; chosen on seed 0, which is not reported
BASELINES = {
    "GradDiff": ("graddiff", "optimizer.lr=1e-4", "retain.alpha=3.0"),
    "NPO": ("npo", "optimizer.lr=1e-4", "forget.beta=0.02", "retain.alpha=20.0"),
    "SimNPO": ("simnpo", "optimizer.lr=1e-4", "forget.beta=1.0", "forget.gamma=1.0"),
    "KL-min": ("kl_min", "optimizer.lr=1e-4", "retain.alpha=3.0"),
    "RMU": (
        "rmu",
        "optimizer.lr=1e-3",
        "retain.alpha=5.0",
        "forget.layer=1",
        "forget.steering=20.0",
        r"scope.parameters=['layers\.[01]\..*experts\.down_proj']",
    ),
    "SEUF": ("seuf", "optimizer.lr=1e-3"),
    "UCE": ("graddiff", "optimizer.lr=1e-4", "forget.objective=uce"),
}
TRACE = ("trace.eta=0.5", "trace.cap=10.0", "trace.per_layer=2", "trace.min_ratio=1.5", "trace.allow_empty=true")
WAGLE = ("wagle.keep=0.8",)
#: MOLLM's weights sum to 1 and weaken forgetting, so most baselines do not reach the level in `max_steps` without this
DOUBLE_RATE = {"optimizer.lr=1e-4": "optimizer.lr=2e-4", "optimizer.lr=1e-3": "optimizer.lr=2e-3"}


@dataclass(frozen=True)
class Entry:
    """One cell of a table; `group` is the table, `case` is what is held fixed within a comparison."""

    group: str
    case: str
    baseline: str
    variant: str
    spec: Spec


@dataclass(frozen=True)
class Scale:
    """Extent of the study: sizes and counts."""

    settings: Settings
    corpora: tuple[str, ...]
    seeds: tuple[int, ...]
    axis: dict[str, tuple[str, Settings]]  # case of the mismatch axis -> corpus and settings
    axis_seeds: tuple[int, ...]
    axis_baselines: tuple[str, ...]
    ablations: tuple[str, ...]  # corpora
    max_steps: int
    check_every: int


# one size for both scales, so that the whole study reuses what --small has made
SIZE = Settings(forget=24, retain=160, holdout=40, max_length=48, top_k=2)
SCALES = {
    "small": Scale(
        settings=SIZE,
        corpora=("builtin:devil",),
        seeds=(1, 2),
        axis={
            "K 2": ("builtin:devil", SIZE),
            "far apart": ("builtin:devil+pydoc", SIZE),
        },
        axis_seeds=(1, 2),
        axis_baselines=("SimNPO",),
        ablations=("builtin:devil",),
        max_steps=90,
        check_every=3,
    ),
    "whole": Scale(
        settings=SIZE,
        corpora=("builtin:devil", "builtin:pydoc"),
        seeds=(1, 2, 3, 4, 5),
        axis={
            "K 1": ("builtin:devil", replace(SIZE, top_k=1)),
            "K 2": ("builtin:devil", SIZE),
            "64 experts": ("builtin:devil", replace(SIZE, experts=64)),
            "twice as long": ("builtin:devil", replace(SIZE, epochs=80)),
            "far apart": ("builtin:devil+pydoc", SIZE),
            "one manual": ("builtin:pydoc", SIZE),
            "half seen": ("builtin:devil", replace(SIZE, unlearn_share=0.5)),
        },
        axis_seeds=(1, 2, 3, 4, 5),
        axis_baselines=("SimNPO",),
        ablations=("builtin:devil",),
        max_steps=90,
        check_every=3,
    ),
}
#: settings of TRACE that are tried where it should help most
TRACE_SETTINGS = {
    "eta 0.25": "trace.eta=0.25",
    "eta 1": "trace.eta=1.0",
    "cap 2": "trace.cap=2.0",
    "no cap": "trace.cap=null",
    "4 experts": "trace.per_layer=4",
    "ratio 1.2": "trace.min_ratio=1.2",
    "online": "trace.refresh=online",
}


def levers(baseline: str) -> dict[str, tuple[str, ...]]:
    """Return the levers that can be put on a baseline, alone and together, as overrides of its recipe."""
    # KL-min's retain loss is KL already; RMU's forward pass never gets to the head
    kl = "false" if baseline in ("KL-min", "RMU") else "true"
    mollm = (f"mollm.kl={kl}", DOUBLE_RATE[BASELINES[baseline][1]])
    found = {"TRACE": TRACE, "WAGLE": WAGLE, "MOLLM": mollm, "all three": (*TRACE, *WAGLE, *mollm)}
    if baseline == "RMU":  # it compares hidden states, so there are no token losses to weigh
        del found["TRACE"], found["all three"]
    return {"plain": (), **found}


def entries(scale: Scale) -> list[Entry]:
    """Return the whole study at a scale, ordered by seed, so that a partial study is balanced."""
    found = [*_main(scale), *_axis(scale), *_ablations(scale)]
    return sorted(found, key=lambda e: (e.spec.seed, e.spec.corpus, str(e.spec.settings), e.spec.retain))


def _spec(scale: Scale, corpus: str, seed: int, baseline: str, overrides: tuple[str, ...] = (), **options) -> Spec:
    recipe, *own = BASELINES[baseline]
    options = {"settings": scale.settings, "max_steps": scale.max_steps, "check_every": scale.check_every, **options}
    return Spec(corpus=corpus, seed=seed, recipe=recipe, overrides=(*own, *overrides), **options)


def _main(scale: Scale) -> Iterator[Entry]:
    for corpus, seed, baseline in itertools.product(scale.corpora, scale.seeds, BASELINES):
        for variant, overrides in levers(baseline).items():
            yield Entry("main", corpus, baseline, variant, _spec(scale, corpus, seed, baseline, overrides))


def _axis(scale: Scale) -> Iterator[Entry]:
    cases = itertools.product(scale.axis.items(), ("random", "seldom"), scale.axis_seeds, scale.axis_baselines)
    for (name, (corpus, settings)), retain, seed, baseline in cases:
        for variant in ("plain", "TRACE"):
            spec = _spec(scale, corpus, seed, baseline, levers(baseline)[variant], settings=settings, retain=retain)
            yield Entry("mismatch", f"{name}, {retain}", baseline, variant, spec)


def _ablations(scale: Scale) -> Iterator[Entry]:
    for corpus, seed in itertools.product(scale.ablations, scale.axis_seeds):

        def entry(baseline, variant, overrides=(), corpus=corpus, seed=seed, **options):
            # TRACE is tried where it should help most: with retain documents that seldom use critical experts
            retain = "random" if {"wagle", "mollm"} & {o.split(".")[0] for o in overrides} else options.pop("retain")
            spec = _spec(scale, corpus, seed, baseline, overrides, retain=retain, **options)
            return Entry("ablation", corpus, baseline, variant, spec)

        for baseline in scale.axis_baselines:
            yield entry(baseline, "plain, seldom", retain="seldom")
            yield entry(baseline, "TRACE, seldom", TRACE, retain="seldom")
            for name in ("random-experts", "shuffled-tokens", "sequence-weights"):
                yield entry(baseline, f"TRACE, {name}", TRACE, retain="seldom", control=name)
            for name, override in TRACE_SETTINGS.items():
                yield entry(baseline, f"TRACE, {name}", (*TRACE, override), retain="seldom")
            for name in ("random-mask", "magnitude-mask"):
                yield entry(baseline, f"WAGLE, {name}", WAGLE, control=name)
        yield entry("UCE", "MOLLM, equal-lambda", levers("UCE")["MOLLM"], control="equal-lambda")


def part(folder: Path, spec: Spec) -> Path:
    """Return the path where the result of `spec` is kept."""
    words = [spec.corpus.removeprefix("builtin:"), f"seed{spec.seed}", spec.recipe or "models", spec.key]
    return folder / ("-".join(re.sub(r"\W+", "_", word) for word in words) + ".json")


def load(folder: Path, spec: Spec) -> dict | None:
    """Return the result of `spec`, or None where it is missing or not whole."""
    try:
        return json.loads(part(folder, spec).read_text("utf-8"))
    except (OSError, ValueError):
        return None


def restore(out: Path, folder: Path, specs: list[Spec]) -> None:
    """Make missing parts from the results that an earlier report wrote into `out`."""
    path = out / RUNS
    lines = path.read_text("utf-8").splitlines() if path.exists() else []
    known = {result.pop("key"): result for result in map(json.loads, lines)}
    for spec in {*specs, *(spec.models for spec in specs)}:
        if spec.key in known and load(folder, spec) is None:
            write_text(part(folder, spec), json.dumps(known[spec.key]))


def record(out: Path, runs: dict[str, dict]) -> None:
    """Write results by their keys into `out`, from where `restore` brings them back."""
    lines = (json.dumps({"key": key, **_rounded(result)}) for key, result in sorted(runs.items()))
    out.mkdir(parents=True, exist_ok=True)
    write_text(out / RUNS, "\n".join(lines) + "\n")


def _rounded(value: object) -> object:
    """Return plain values with 6 significant digits, which take half the size and are finer than seeds differ."""
    if isinstance(value, dict):
        return {key: _rounded(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(entry) for entry in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


def execute(folder: Path, spec: Spec) -> float:
    """Make one part and return its processor seconds; a run needs its models' part first."""
    result = run(spec, None if spec.recipe is None else load(folder, spec.models))
    write_text(part(folder, spec), json.dumps(result))
    return result["seconds"]


def make(folder: Path, specs: list[Spec], jobs: int, log: Callable[[str], None] = print) -> list[str]:
    """Make the missing parts of `specs`, seed by seed, each in one thread; return a line for each failure."""
    stages = []
    for seed in dict.fromkeys(spec.seed for spec in specs):
        runs = list(dict.fromkeys(spec for spec in specs if spec.seed == seed))
        stages += [list(dict.fromkeys(spec.models for spec in runs)), runs]
    stages = [[spec for spec in stage if load(folder, spec) is None] for stage in stages]
    total, done, failed, start = sum(map(len, stages)), 0, [], time.perf_counter()
    with Pool(jobs) as pool:
        for stage in stages:
            for (_, spec), outcome in pool.outcomes(execute, [(folder, spec) for spec in stage]):
                done += 1
                stopped = isinstance(outcome, Exception)
                line = f"{part(folder, spec).stem} {' '.join(spec.overrides)} {spec.control}: "
                line += str(outcome) if stopped else f"{outcome:.0f} s"
                if stopped:
                    failed.append(f"FAILED {line}")
                log(f"[{done}/{total}, {(time.perf_counter() - start) / 60:.1f} min] {line}")
    return failed


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.study", description=__doc__.partition("\n")[0])
    plans = parser.add_mutually_exclusive_group()
    plans.add_argument("--small", action="store_true", help="one corpus and fewer seeds")
    plans.add_argument("--targeted", action="store_true", help="TRACE alone, where it should help most")
    parser.add_argument("--jobs", type=int, default=2, help="processes of one thread each")
    parser.add_argument("--parts", type=Path, help="folder of the results of single runs (default: in the cache)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the report")
    parser.add_argument("--only", default="", help="regular expression over 'group case baseline variant seed'")
    parser.add_argument("--list", action="store_true", help="print the runs and stop")
    parser.add_argument("--report", action="store_true", help="make the report from the parts that are there")
    given = parser.parse_args(arguments)
    name = "small" if given.small else "targeted" if given.targeted else "whole"
    out = given.out / name
    parts = given.parts or cache_folder() / "study"
    # imported where it is asked for, because it builds on what is above
    planned = import_module("benchmarks.study_targeted").entries() if given.targeted else entries(SCALES[name])
    chosen = [e for e in planned if re.search(given.only, f"{e.group} {e.case} {e.baseline} {e.variant} {e.spec.seed}")]
    specs = list(dict.fromkeys(e.spec for e in chosen))
    restore(out, parts, specs)
    if given.report:
        report = import_module("benchmarks.study_targeted" if given.targeted else "benchmarks.study_report")
        print(report.write(out, chosen, parts, name))
        return 0
    if given.list:
        for e in chosen:
            state = "todo" if load(parts, e.spec) is None else "done"
            print(f"{state} {e.group}: {e.case}: {e.baseline}, {e.variant}, seed {e.spec.seed}")
        models = {e.spec.models for e in chosen}
        done = sum(load(parts, spec) is not None for spec in specs)
        print(f"{done} of {len(specs)} runs done, on {len(models)} pairs of models")
        return 0
    failed = make(parts, specs, given.jobs, lambda line: print(line, flush=True))
    print(*failed, sep="\n", end="" if not failed else "\n")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
