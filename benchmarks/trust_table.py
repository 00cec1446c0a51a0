"""The scorecard of trust: what became of faults and of damage, from the record of `tests.trust.scorecard`."""

import json
from pathlib import Path

from benchmarks.stamp import RESULTS

FILE = "trust.json"


def table(results: Path = RESULTS) -> str:
    """Return the table: how many trials of each kind there were, what became of them, and how many failed."""
    path = results / FILE
    if not path.exists():
        return "No run is recorded yet."
    run = json.loads(path.read_text(encoding="utf-8"))
    where, tried = run["stamp"], run["tried"]
    possible = run["possible"]
    lines = [
        f"`make scorecard` on {run['processor']}, torch {where['versions']['torch']}, commit "
        f"{(where['commit'] or 'unknown')[:9]}, {run['processor_minutes']:.0f} minutes of processor time. Of "
        f"{possible['faults']:,} faults and {possible['damage']:,} damages of files those that were drawn, crashes "
        f"first (`benchmarks/results/{FILE}`):",
        "",
        "| trial | trials | ended well, or killed and went on | refused, and said so | lost, silent or a traceback |",
        "|---|---|---|---|---|",
    ]
    for name, found in tried.items():
        well = sum(count for what, count in found.items() if what in ("killed", "whole", "harmless", "same"))
        cells = (sum(found.values()), well, found.get("refused", 0), found.get("failed", 0))
        lines.append(f"| {name} | {' | '.join(f'{cell:,}' for cell in cells)} |")
    crashes = _total(tried, ("fault: killed", "fault: torn"))
    damages = _total(tried, [name for name in tried if not name.startswith("fault")])
    lines += ["", f"In all {crashes:,} crashes and {damages:,} damaged files."]
    return "\n".join(lines)


def _total(tried: dict[str, dict[str, int]], names: tuple[str, ...] | list[str]) -> int:
    return sum(sum(tried[name].values()) for name in names if name in tried)
