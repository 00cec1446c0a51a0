"""What `survive: int4` keeps of unlearning after rounding, from the record of `benchmarks.bench_survive`."""

import statistics

from benchmarks.journal import of_kind, read
from benchmarks.stamp import RESULTS
from benchmarks.study_reading import clear, interval, paired

FILE = RESULTS / "survive.jsonl"
KINDS = ("learned", "plain", "plain, rounded", "held", "held, rounded")
METRICS = {"forget": "forget rows", "seen": "retain rows, seen", "held_out": "retain rows, held out"}


def generated() -> str:
    """Return the section of RESULTS.md."""
    return table(of_kind(read(FILE), "seed")) if FILE.exists() else "No run is recorded yet."


def table(rows: list[dict]) -> str:
    """Return means over seeds, and paired differences with 95 % t intervals; the sentence at the end is what counts."""
    found = [row["found"] for row in rows]
    lines = [
        f"`python -m benchmarks.bench_survive`: {len(rows)} seeds, none of which the settings were chosen on. Means, "
        "and in the last column paired differences with 95 % t intervals (`benchmarks/results/survive.jsonl`):",
        "",
        "| NLL | learned | unlearned | rounded | survive | survive, rounded | with survive - without, rounded |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, words in METRICS.items():
        means = [f"{statistics.fmean(row[kind][name] for row in found):.3f}" for kind in KINDS]
        change = paired(row["held, rounded"][name] - row["plain, rounded"][name] for row in found)
        lines.append(f"| {words} | {' | '.join(means)} | {interval(change)} |")
    lines.append("")
    better = []
    for name, words in METRICS.items():
        plain, held = (
            [abs(row[kind][name] - row["plain"][name]) for row in found] for kind in ("plain, rounded", "held, rounded")
        )
        change = paired(ours - theirs for ours, theirs in zip(held, plain, strict=True))
        verdict = "no clear difference" if not clear(change) else "better" if change["mean"] < 0 else "worse"
        better += [words] if verdict == "better" else []
        lines.append(
            f"* NLL of the {words}: rounding moves it by {statistics.fmean(plain):.3f} nats a token, with `survive` by "
            f"{statistics.fmean(held):.3f}; difference {interval(change)}: {verdict}."
        )
    told = f"After int4 `survive` beats plain on: {'; '.join(better) or 'none of them'}."
    if METRICS["forget"] not in better:
        told += " On the forget rows, for which it is meant, it failed to."
    return "\n".join([*lines, "", told])
