"""The table of what each stage takes at a model's size, and README's row, from the record of `benchmarks.size`."""

import json
from pathlib import Path
from typing import Any

from benchmarks.stamp import RESULTS

FILE, FIGURE = "size.json", "size.png"
_MIB = 1 << 20


def read(results: Path = RESULTS) -> dict[str, Any] | None:
    """Return the record, None where there is none."""
    path = results / "cpu" / FILE
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def stages(run: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the rows of stages that were measured."""
    return [row for row in run["rows"] if "planned" in row]


def table(results: Path = RESULTS) -> str:
    """Return the table: what is planned for each stage, its limit, and what was measured."""
    run = read(results)
    if run is None:
        return "No run is recorded yet."
    where = run["stamp"]
    lines = [
        f"`make size` on {run['processor']}, torch {where['versions']['torch']}, transformers "
        f"{where['versions']['transformers']}, commit {(where['commit'] or 'unknown')[:9]}: a checkpoint of "
        f"{run['weights'] / 1e9:.2f} GB (OLMoE's geometry, {run['config']['num_hidden_layers']} layers), a budget of "
        f"{run['memory']}, libraries of {_libraries(run) / _MIB:.0f} MiB (`benchmarks/results/cpu/{FILE}`):",
        "",
        "| stage | planned | MiB planned | MiB allowed | MiB at the peak | of them anonymous | s | |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in stages(run):
        sizes = (f"{row[what] / _MIB:,.0f}" for what in ("planned", "limit", "peak", "anonymous"))
        verdict = ("hit" if row["hit"] else "**missed**") + (", not to its end" if "cut" in row else "")
        verdict += f", commit {row['commit']}" if "commit" in row else ""
        lines.append(f"| {row['stage']} | {row['plan']} | {' | '.join(sizes)} | {row['seconds']:.0f} | {verdict} |")
    lines += ["", *(f"Not measured: {r['stage']}: {r['skipped']}." for r in run["rows"] if "skipped" in r)]
    if (results / "cpu" / FIGURE).exists():
        lines += [f"![Planned and measured memory of each stage](results/cpu/{FIGURE})"]
    return "\n".join(lines).rstrip()


def headline(results: Path = RESULTS) -> tuple[str, list[str], list[str]] | None:
    """Return README's row: what it is about, the hit that comes closest to its limit, and the largest miss."""
    run = read(results)
    if run is None or not stages(run):
        return None
    ordered = sorted(stages(run), key=lambda row: row["peak"] / row["limit"])
    hits, misses = ([_said(row) for row in ordered if row["hit"] == hit] for hit in (True, False))
    what = f"memory: each verb on a checkpoint of {run['weights'] / 1e9:.1f} GB against its limit"
    return what, hits[-1:], misses[-1:]


def _said(row: dict[str, Any]) -> str:
    peak, limit = (f"{row[what] / 1e9:.2f} GB" for what in ("peak", "limit"))
    return f"`{row['stage']}`: {peak} (asked: {limit}, {row['plan']} + 15% + libraries)"


def _libraries(run: dict[str, Any]) -> int:
    return next(row["peak"] for row in run["rows"] if row["stage"] == "libraries")
