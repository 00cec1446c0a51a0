"""Report of a run folder: report.md and its figures, made from the folder's numbers.

A folder holds `summary.json` (run name -> flat metrics; with several seeds the mean, and `<key>_sd` the
sample standard deviation) and, where there are any, `seeds.json` (`corpus`; `results`: seed -> run name ->
metrics), `trajectory.json` (run name -> list of {"step", ...}) and `routing.json` (`forget`, `retain`
frequencies and `selected`, all [L, E]; `inactive` says why TRACE selected none).
"""

import json
import math
import statistics
from dataclasses import dataclass, field
from pathlib import Path

from moe_unlearn.runs import figures
from moe_unlearn.runs.summary import (
    BASELINE,
    CLEAR,
    KEEP,
    LEGEND,
    LEVERS,
    RUNS,
    WITHIN,
    Summary,
    ordered,
    summarise,
    table,
)


@dataclass(frozen=True)
class Content:
    """Results of the embedded experiment: metrics by seed and run; trajectories and routing of one seed."""

    corpus: str
    results: dict[int, Summary]
    trajectories: dict[str, list[dict]] = field(default_factory=dict)
    routing: dict = field(default_factory=dict)


def write_demo(folder: str | Path, content: Content) -> Summary:
    """Write the JSON files, report.md and the figures of `content` into `folder`; return the summary over seeds."""
    folder = Path(folder)
    summary = summarise(content.results)
    seeds = {"corpus": content.corpus, "results": content.results}
    routing = {key: as_list(table) for key, table in content.routing.items()}
    files = {"summary": summary, "seeds": seeds, "trajectory": content.trajectories, "routing": routing}
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in files.items():
        (folder / f"{name}.json").write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    write(folder)
    return summary


def write(folder: str | Path) -> str:
    """Write report.md and the figures of a run folder from its JSON files; return the paths written, one per line.

    Raises ValueError that names the file if `summary.json` is missing or a file has other content than expected.
    """
    folder = Path(folder)
    summary = _read(folder / "summary.json")
    if not summary or not all(isinstance(metrics, dict) for metrics in summary.values()):
        raise ValueError(f"{folder / 'summary.json'}: expected an object of run name -> metrics")
    seeds, trajectory, routing = (
        _read(folder / f"{name}.json", optional=True) for name in ("seeds", "trajectory", "routing")
    )
    made = figures.draw(folder / "figures", summary, trajectory, routing)
    path = folder / "report.md"
    path.write_text(markdown(summary, seeds, routing, made), encoding="utf-8")
    return "\n".join(str(p) for p in (path, *(folder / "figures" / name for name in made)))


def markdown(summary: Summary, seeds: dict, routing: dict, made: dict[str, str]) -> str:
    """Return the text of report.md; `made` maps figure files to captions."""
    results = {seed: s for seed, s in seeds.get("results", {}).items() if s}
    parts = [f"# Unlearning report{': ' + seeds['corpus'] if seeds.get('corpus') else ''}"]
    if len(results) > 1:
        parts.append(f"Mean ± sample standard deviation over seeds {', '.join(map(str, results))}.")
    elif results:
        parts.append(f"One seed ({next(iter(results))}): no spread is known.")
    parts += [table(summary, markdown=True), LEGEND.rstrip(), "## Verdict", *_verdict(summary, results)]
    if routing:
        parts.append(_selection(routing))
    if made:
        first = f"Trajectories and routing are those of seed {next(iter(results))}." if results else ""
        parts += ["## Figures", *([first] if first else [])]
        parts += [f"![{caption}](figures/{name})\n\n{caption}" for name, caption in made.items()]
    return "\n\n".join(parts) + "\n"


def _verdict(summary: Summary, results: dict[str, Summary]) -> list[str]:
    lines = []
    if "retrain" not in summary:
        return [
            "The reference run is missing: without a model retrained on the retain documents alone there is "
            "no PrivLeak, and nobody knows how low the forget metrics should go. Give it with `reference`."
        ]
    gold, target = summary["retrain"], summary.get("target")
    lines.append(
        f"Retrain, the reference, has forget VerbMem {gold['verbmem_f']:.3f} and retain VerbMem "
        f"{gold['verbmem_r']:.3f}. The goal: forget VerbMem at most {WITHIN:.2f} away from that, and at "
        f"least {KEEP:.0%} of the target's retain VerbMem."
    )
    goals = []
    for run in ordered(summary):
        if run in ("target", "retrain"):
            continue
        away = abs(summary[run]["verbmem_f"] - gold["verbmem_f"])
        text, reached = f"forget VerbMem {away:.3f} away from retrain's", away <= WITHIN
        if target and target["verbmem_r"]:
            kept = summary[run]["verbmem_r"] / target["verbmem_r"]
            text += f", {kept:.1%} of retain VerbMem kept"
            reached = reached and kept >= KEEP
        goals.append(f"* {RUNS.get(run, run)}: {text}: **{'reached' if reached else 'not reached'}**.")
    lines.append("\n".join(goals))
    levers = [_lever(lever, summary, results) for lever in LEVERS if lever in summary and BASELINE in summary]
    if levers:
        lines.append(
            f"Does a lever help over {RUNS[BASELINE]} here? The distance is that to retrain in the plane of "
            "forget and retain VerbMem, paired by seed.\n\n" + "\n".join(levers)
        )
    return lines


def _lever(lever: str, summary: Summary, results: dict[str, Summary]) -> str:
    complete = [s for s in results.values() if {lever, BASELINE, "retrain"} <= s.keys()] or [summary]
    gains = [_distance(s, BASELINE) - _distance(s, lever) for s in complete]
    gain = statistics.fmean(gains)
    spread = statistics.stdev(gains) if len(gains) > 1 else 0.0
    shown = f"{gain:+.3f}" + (f" ± {spread:.3f}" if len(gains) > 1 else "")
    threshold = max(CLEAR, spread)
    if gain > threshold:
        word = "helps"
    elif gain < -threshold:
        word = "hurts"
    else:
        word = "does not help on this data (no difference beyond the spread)"
    return f"* {LEVERS[lever]} **{word}**: distance shorter by {shown}."


def _distance(summary: Summary, run: str) -> float:
    gold = summary["retrain"]
    return math.hypot(*(summary[run][key] - gold[key] for key in ("verbmem_f", "verbmem_r")))


def _selection(routing: dict) -> str:
    chosen = [
        f"layer {layer} expert {expert} ({f:.3f} of forget, {r:.3f} of retain tokens)"
        for layer, (marks, forget, retain) in enumerate(
            zip(routing["selected"], routing["forget"], routing["retain"], strict=True)
        )
        for expert, (mark, f, r) in enumerate(zip(marks, forget, retain, strict=True))
        if mark
    ]
    if not chosen:
        return f"**TRACE inactive**: {routing.get('inactive', 'no forget-critical expert')}."
    return f"TRACE's forget-critical experts ({len(chosen)}): {'; '.join(chosen)}."


def as_list(table) -> object:
    """Return a tensor's values as nested lists; return anything else as it is."""
    return table.tolist() if hasattr(table, "tolist") else table


def _read(path: Path, *, optional: bool = False) -> dict:
    if not path.is_file():
        if optional:
            return {}
        raise ValueError(f"{path}: no such file; expected the metrics of a run")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: expected JSON; {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a JSON object; got {type(content).__name__}")
    return content
