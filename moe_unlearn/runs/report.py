"""Report of a run: report.md and its figures, and the JSON files of which they can be made again.

A folder holds `summary.json` (run name -> flat metrics; with several seeds the mean, and `<key>_sd` the
sample standard deviation) and, where there are any, `seeds.json` (`corpus`; `results`: seed -> run name ->
metrics), `trajectory.json` (run name -> list of {"step", ...}), `routing.json` (`forget`, `retain` frequencies and
`selected`, all [L, E]; `inactive` says why TRACE selected none), `batch.json` (what one step takes: `ranks`,
`batch_size` and `accumulate`) and `loaded.json` (how the model was loaded: `loading.described`).
"""

import json
import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from moe_unlearn.files import write_json, write_text
from moe_unlearn.runs import figures
from moe_unlearn.runs.summary import BASELINE, CLEAR, KEEP, LEGEND, LEVERS, RUNS, WITHIN, Summary, ordered, table


@dataclass(frozen=True)
class Content:
    """Content of a report: means over seeds, and what they were made of; trajectories and routing are of one seed."""

    summary: Summary
    corpus: str = ""
    results: Mapping[int, Summary] | Mapping[str, Summary] = field(default_factory=dict)  # by seed
    trajectories: dict[str, list[dict]] = field(default_factory=dict)
    routing: dict = field(default_factory=dict)
    batch: dict = field(default_factory=dict)
    loaded: dict = field(default_factory=dict)


_KEYS = {"batch": ("ranks", "batch_size", "accumulate"), "loaded": ("model", "dtype", "device", "trust_remote_code")}


def save(folder: Path, content: Content) -> None:
    """Write the JSON files of which `read` makes this content."""
    write_json(folder / "summary.json", content.summary)
    write_json(folder / "seeds.json", {"corpus": content.corpus, "results": content.results})
    write_json(folder / "trajectory.json", content.trajectories)
    write_json(folder / "routing.json", content.routing)


def read(folder: Path) -> Content:
    """Read the JSON files of a run folder.

    Raises ValueError that names the file if `summary.json` is missing or a file has other content than expected.
    """
    summary = _read(folder / "summary.json")
    if not summary or not all(isinstance(metrics, dict) for metrics in summary.values()):
        raise ValueError(f"{folder / 'summary.json'}: expected an object of run name -> metrics")
    seeds, *others = (
        _read(folder / f"{name}.json", optional=True) for name in ("seeds", "trajectory", "routing", "batch", "loaded")
    )
    for (name, keys), content in zip(_KEYS.items(), others[-2:], strict=True):
        if content and (missing := [key for key in keys if key not in content]):
            raise ValueError(f"{folder / f'{name}.json'}: expected the keys {', '.join(keys)}; it lacks {missing[0]!r}")
    if not all(isinstance(number, int) for number in others[-2].values()):
        raise ValueError(f"{folder / 'batch.json'}: expected whole numbers; got {others[-2]}")
    return Content(summary, seeds.get("corpus", ""), seeds.get("results", {}), *others)


def write(folder: Path, content: Content) -> list[Path]:
    """Write report.md and the figures for which there is data into a run folder; return the paths written."""
    made = figures.draw(folder / "figures", content.summary, content.trajectories, content.routing)
    path = folder / "report.md"
    write_text(path, markdown(content, made))
    return [path, *(folder / "figures" / name for name in made)]


def markdown(content: Content, made: dict[str, str]) -> str:
    """Return the text of report.md; `made` maps figure files to captions."""
    summary = content.summary
    results = {seed: s for seed, s in content.results.items() if s}
    parts = [f"# Unlearning report{': ' + content.corpus if content.corpus else ''}"]
    if len(results) > 1:
        parts.append(f"Mean ± sample standard deviation over seeds {', '.join(map(str, results))}.")
    elif results:
        parts.append(f"One seed ({next(iter(results))}): no spread is known.")
    if content.loaded:
        own = "; **its own code was run** (`--trust-remote-code`)" if content.loaded["trust_remote_code"] else ""
        parts.append("The model is {model}, {dtype} on {device}{own}.".format(**content.loaded, own=own))
    if content.batch:
        factors = [content.batch[name] for name in _KEYS["batch"]]
        shown = "{} (ranks) x {} (`batch_size`) x {} (`accumulate`)".format(*factors)
        parts.append(f"A step takes {math.prod(factors)} forget rows with their retain rows: {shown}.")
    parts += [table(summary, markdown=True), LEGEND.rstrip(), "## Verdict", *_verdict(summary, results)]
    if content.routing:
        parts.append(_selection(content.routing))
    if made:
        first = f"Trajectories and routing are those of seed {next(iter(results))}." if results else ""
        parts += ["## Figures", *([first] if first else [])]
        parts += [f"![{caption}](figures/{name})\n\n{caption}" for name, caption in made.items()]
    return "\n\n".join(parts) + "\n"


def _verdict(summary: Summary, results: dict[int | str, Summary]) -> list[str]:
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


def _lever(lever: str, summary: Summary, results: dict[int | str, Summary]) -> str:
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
