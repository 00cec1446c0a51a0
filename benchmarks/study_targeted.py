"""Plan and read the targeted study of TRACE: the setting it argues for, registered in `benchmarks/NOTES.md`.

    python -m benchmarks.study --targeted             the registered runs, in their order; if killed, it resumes
    python -m benchmarks.study --targeted --report    how many are done, and the analysis once all of a K are

Effects are relative differences in percent of the value at one level of forgetting, a variant's over another's on the
same models. A seed's effect is the mean over the baselines of which both runs reached the level. No effect is computed
before every registered run of that K is there.
"""

import json
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from scipy import stats

from benchmarks.study import BASELINES, SIZE, TRACE, Entry, load, record
from benchmarks.study_domains import ANOTHER
from benchmarks.study_reading import paired
from benchmarks.study_run import Spec
from benchmarks.targeted_table import PRIMARY, SECONDARY, section
from moe_unlearn.audit.verdict import holm

CORPUS = "builtin:pydoc"
SEEDS = range(101, 121)
STUDIED = ("NPO", "SimNPO", "GradDiff")
SELDOM = (*TRACE[:-2], "trace.min_ratio=3.0", TRACE[-1])
#: variant -> its settings and control
VARIANTS: dict[str, tuple[tuple[str, ...], str]] = {
    "plain": ((), ""),
    "TRACE": (SELDOM, ""),
    "TRACE online": ((*SELDOM, "trace.refresh=online"), ""),
    "sequence weights": (SELDOM, "sequence-weights"),
}
STUDIED_AT = {2: tuple(VARIANTS), 1: ("plain", "TRACE")}
LEVEL = "near"
CONTRASTS = (
    ("TRACE", "plain"),
    ("TRACE online", "plain"),
    ("sequence weights", "plain"),
    ("TRACE", "sequence weights"),
)


def entries() -> list[Entry]:
    """Return the registered runs in their order: all seeds of one K, then those of the next."""
    return list(_entries())


def _entries() -> Iterator[Entry]:
    for top_k in STUDIED_AT:  # the primary analysis is that of the first
        for seed in SEEDS:
            for baseline in STUDIED:
                recipe, *own = BASELINES[baseline]
                for variant in STUDIED_AT[top_k]:
                    overrides, control = VARIANTS[variant]
                    spec = Spec(
                        settings=replace(SIZE, top_k=top_k),
                        corpus=CORPUS,
                        seed=seed,
                        retain=ANOTHER,
                        recipe=recipe,
                        overrides=(*own, *overrides),
                        control=control,
                        max_steps=60,
                        check_every=3,
                    )
                    yield Entry("targeted", f"K {top_k}", baseline, variant, spec)


class Effects:
    """Values of the runs of one K, by baseline, variant and seed."""

    def __init__(self, entries: Sequence[Entry], parts: Path):
        self.results = {(e.baseline, e.variant, e.spec.seed): load(parts, e.spec) for e in entries}
        self.done = sum(result is not None for result in self.results.values())
        self.complete = self.done == len(self.results)

    def qualifies(self, seed: int) -> bool:
        """Say whether TRACE found an expert at the registered ratio; it does so before any step."""
        return any(
            result["trace"] is not None
            for (_, variant, own), result in self.results.items()
            if own == seed and variant == "TRACE" and result is not None
        )

    def of_seed(
        self, contrast: tuple[str, str], metric: str, seed: int, baselines: Sequence[str] = STUDIED, level: str = LEVEL
    ) -> float | None:
        """Return a seed's effect in percent, None where no baseline reached the level twice."""
        found = []
        for baseline in baselines:
            pair = [self.results.get((baseline, variant, seed)) for variant in contrast]
            values = [(result or {}).get("matched", {}).get(level) for result in pair]
            if all(value is not None and metric in value for value in values):
                ours, theirs = (value[metric] for value in values)
                found.append(100 * (ours / theirs - 1))
        return statistics.fmean(found) if found else None

    def over_seeds(self, contrast: tuple[str, str], metric: str, **how) -> list[float]:
        """Return the effects of the seeds that qualify and have one."""
        seeds = sorted({seed for _, _, seed in self.results})
        effects = [self.of_seed(contrast, metric, seed, **how) for seed in seeds if self.qualifies(seed)]
        return [effect for effect in effects if effect is not None]


def write(out: Path, planned: Sequence[Entry], parts: Path, name: str) -> str:
    """Write `study.md`, `study.json` and `runs.jsonl` into `out` and return the text.

    A K of which a run is missing has its count alone.
    """
    known = {spec.key: load(parts, spec) for spec in {e.spec for e in planned} | {e.spec.models for e in planned}}
    there = {key: result for key, result in known.items() if result is not None}
    lines = [
        "# TRACE in the setting it argues for",
        "",
        f"Made by `python -m benchmarks.study --{name}` and the same with `--report`; "
        f"{sum(result['seconds'] for result in there.values()) / 60:.0f} minutes of one thread. "
        "Hypothesis, setting, stop rule and analysis were registered in `benchmarks/NOTES.md` before the first run.",
        "",
    ]
    record(out, there)
    groups: dict[str, list[Entry]] = {}
    for entry in planned:
        groups.setdefault(entry.case, []).append(entry)
    data: dict[str, dict] = {}
    for case, own in groups.items():
        effects = Effects(own, parts)
        data[case] = {"runs": effects.done, "of": len(own)} | (_analysis(effects) if effects.complete else {})
        lines += [f"## {case}", "", *section(data[case])]
    text = "\n".join(lines)
    (out / "study.md").write_text(text, encoding="utf-8")
    (out / "study.json").write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    return text


def _analysis(effects: Effects) -> dict:
    """Return the registered analysis of one K."""
    primary = {metric: effects.over_seeds(CONTRASTS[0], metric) for metric in PRIMARY}
    p = [_p_value(values) for values in primary.values()]
    seeds = sorted({seed for _, _, seed in effects.results})
    return {
        "qualified": sum(map(effects.qualifies, seeds)),
        "reached": {
            f"{baseline}, {variant}": sum(
                result["matched"][LEVEL] is not None
                for (own, other, _), result in effects.results.items()
                if (own, other) == (baseline, variant)
            )
            for baseline, variant in dict.fromkeys(key[:2] for key in effects.results)
        },
        "primary": {
            metric: paired(values) | {"p": own, "rejected": rejected}
            for (metric, values), own, rejected in zip(primary.items(), p, holm(p), strict=True)
        },
        "contrasts": {
            " - ".join(contrast): {
                metric: paired(effects.over_seeds(contrast, metric)) for metric in PRIMARY | SECONDARY
            }
            for contrast in CONTRASTS
        },
        "baselines": {
            baseline: {
                metric: paired(effects.over_seeds(CONTRASTS[0], metric, baselines=(baseline,)))
                for metric in PRIMARY | SECONDARY
            }
            for baseline in STUDIED
        },
        "at the retrained model's level": {
            metric: paired(effects.over_seeds(CONTRASTS[0], metric, level="retrain")) for metric in PRIMARY | SECONDARY
        },
    }


def _p_value(values: Sequence[float]) -> float:
    return float(stats.ttest_1samp(values, 0.0).pvalue) if len(values) > 1 else 1.0
