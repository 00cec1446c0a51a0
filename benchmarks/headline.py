"""README's rows of figures, and the table of the embedded experiment, from what is recorded.

`benchmarks.readme` puts both where they belong.
"""

import json
from collections.abc import Callable
from pathlib import Path

from benchmarks import record, size_table
from benchmarks.stamp import RESULTS
from moe_unlearn.runs.summary import KEEP, RUNS, WITHIN, ordered

_HEADER = "| | the best result | the largest miss |\n|---|---|---|"
_RUN = "combined"
_COLUMNS = {  # of the table, and how many digits each has
    "verbmem_f": ("VerbMem forget ↓", 3),
    "verbmem_r": ("VerbMem retain ↑", 3),
    "knowmem_f": ("KnowMem forget ↓", 3),
    "nll_f": ("NLL forget", 2),
    "nll_r": ("NLL retain", 2),
}


def table(results: Path = RESULTS) -> str:
    """Return the table of the embedded experiment on its first corpus: means over its seeds."""
    found = _experiments(results)
    if not found:
        return "No run of the embedded experiment is recorded yet."
    _, seeds, summary = found[0]
    head = f"| run (mean of seeds {', '.join(seeds)}) | {' | '.join(name for name, _ in _COLUMNS.values())} |"
    lines = [head, "|---" * (len(_COLUMNS) + 1) + "|"]
    for run in ordered(summary):
        cells = (f"{summary[run][key]:.{digits}f}" for key, (_, digits) in _COLUMNS.items())
        lines.append(f"| {RUNS.get(run, run)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def rows(results: Path, named: Callable[[str], tuple[str, str]], where: Callable[[dict], str]) -> str:
    """Return a row for quality, one for each device's speed and one for memory: the best result, the largest miss.

    `named` splits what a verdict says into the result and its rival; `where` says where a run was measured.
    """
    lines = [_HEADER]
    experiments = _experiments(results)
    if experiments:
        cells = {reached: [_quality(e) for e in experiments if _reached(e[2]) == reached] for reached in (True, False)}
        lines.append(_row("quality: forget and keep documents, three levers", cells[True][:1], cells[False][:1]))
    for device in sorted(record.runs(results)):
        _, run = record.latest(device, results)
        of_step = [row for row in run["rows"] if row["op"] == "step"] or run["rows"]
        asked = [(row, v) for row in of_step for v in row.get("verdicts", ()) if v["target"] is not None]
        # of an amount that must be small, as memory, more is no better
        asked = [(row, v) for row, v in asked if v["hit"] == (v["value"] >= v["target"])]
        asked.sort(key=lambda pair: pair[1]["value"] / pair[1]["target"])
        cells = {hit: [_speed(row, v, named) for row, v in asked if v["hit"] == hit] for hit in (True, False)}
        lines.append(_row(f"speed: {where(run)}", cells[True][-1:], cells[False][:1]))
    if (size := size_table.headline(results)) is not None:
        lines.append(_row(*size))
    return "\n".join(lines) if len(lines) > 1 else "Nothing is recorded yet."


def _experiments(results: Path) -> list[tuple[str, list[str], dict]]:
    """Return the corpus, the seeds and the summary of each recorded run of the embedded experiment."""
    found = []
    for folder in sorted(results.glob("cpu-demo*")):
        seeds, summary = (
            json.loads((folder / name).read_text(encoding="utf-8")) for name in ("seeds.json", "summary.json")
        )
        found.append((seeds["corpus"], list(seeds["results"]), summary))
    return found


def _kept(summary: dict) -> float:
    return summary[_RUN]["verbmem_r"] / summary["target"]["verbmem_r"]


def _reached(summary: dict) -> bool:
    """Return whether the three levers reach the goal of the embedded experiment's report."""
    away = abs(summary[_RUN]["verbmem_f"] - summary["retrain"]["verbmem_f"])
    return away <= WITHIN and _kept(summary) >= KEEP


def _quality(experiment: tuple[str, list[str], dict]) -> str:
    corpus, seeds, summary = experiment
    own, gold = (summary[run]["verbmem_f"] for run in (_RUN, "retrain"))
    return (
        f"`{corpus}`, seeds {', '.join(seeds)}: forget VerbMem {own:.3f} where a retrained model has {gold:.3f} "
        f"(asked: within {WITHIN:.2f}), {_kept(summary):.1%} of retain VerbMem kept (asked: {KEEP:.0%})"
    )


def _speed(row: dict, verdict: dict, named: Callable[[str], tuple[str, str]]) -> str:
    what, rival = named(verdict["what"])
    return f"{row['name']}: {verdict['value']:.2f} {what} (against: {rival}; asked: {verdict['target']:.3g})"


def _row(what: str, best: list[str], miss: list[str]) -> str:
    return f"| {what} | {''.join(best) or 'none'} | {''.join(miss) or 'none'} |"
