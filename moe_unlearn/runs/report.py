"""Report of a run: report.md and its figures, and the JSON files of which they can be made again.

A folder holds `summary.json` (run name -> flat metrics; with several seeds the mean, and `<key>_sd` the
sample standard deviation) and, where there are any, `seeds.json` (`corpus`; `results`: seed -> run name ->
metrics), `trajectory.json` (run name -> list of {"step", ...}), `routing.json` (`forget`, `retain` frequencies and
`selected`, all [L, E]; `inactive` says why TRACE selected none), `batch.json` (what one step takes: `ranks`,
`batch_size` and `accumulate`), `loaded.json` (how the model was loaded: `loading.described`) and `audit.json` (of one
run: its name `run`, `verdict`, `summary`, and `rows`: for each attack its title, what was done, the gravest sign and
the verdict), beside the audit's own report in `audit/`.
"""

import json
import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moe_unlearn.files import write_json, write_text
from moe_unlearn.runs import figures
from moe_unlearn.runs.summary import (
    BASELINE,
    CLEAR,
    FORGOTTEN,
    KEEP,
    LEGEND,
    LEVERS,
    RUNS,
    WITHIN,
    Summary,
    ordered,
    table,
)


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
    audit: dict = field(default_factory=dict)


_NUMBER = (int, float, type(None))  # null where there is no number
_METRICS = {str: {str: _NUMBER}}
_FACTORS = ("ranks", "batch_size", "accumulate")
_FORMS: dict[str, tuple[Any, str]] = {  # of each file: its form, and what a message calls that
    "summary": (_METRICS, "run name -> metrics, which are numbers"),
    "seeds": ({"corpus": str, "results": {str: _METRICS}}, "corpus, a text, and results: seed -> run name -> metrics"),
    "trajectory": ({str: [dict]}, "run name -> a list of objects"),
    "routing": (
        {"forget": [[_NUMBER]], "retain": [[_NUMBER]], "selected": [[bool]], "inactive": str},
        "an object of forget, retain and selected, each a list of rows, one a layer",
    ),
    "batch": (dict.fromkeys(_FACTORS, int), "whole numbers"),
    "loaded": ({"model": str, "dtype": str, "device": str, "trust_remote_code": bool}, "texts, and true or false"),
    "audit": ({"run": str, "verdict": str, "summary": str, "rows": [[str]]}, "texts, and rows of texts"),
}
_NEEDED = {
    "routing": ("forget", "retain", "selected"),
    "batch": _FACTORS,
    "loaded": tuple(_FORMS["loaded"][0]),
    "audit": tuple(_FORMS["audit"][0]),
}
# as in moe_unlearn.audit, whose import brings transformers, which a report does without
_AUDIT_COLUMNS = ("attack", "what was done", "gravest sign", "verdict")
_GONE, _PRESENT, _OVERSHOT = "gone", "present", "overshot"


def save(folder: Path, content: Content) -> None:
    """Write the JSON files of which `read` makes this content."""
    write_json(folder / "summary.json", content.summary)
    write_json(folder / "seeds.json", {"corpus": content.corpus, "results": content.results})
    write_json(folder / "trajectory.json", content.trajectories)
    write_json(folder / "routing.json", content.routing)
    if content.audit:
        write_json(folder / "audit.json", content.audit)


def read(folder: Path) -> Content:
    """Read the JSON files of a run folder.

    Raises ValueError that names the file if `summary.json` is missing or a file has other content than expected.
    """
    summary, seeds, *others = (_read(folder, name) for name in _FORMS)
    for run, measured in summary.items() if "retrain" in summary else ():  # with which all are compared
        if lacking := {"verbmem_f", "verbmem_r"} - {key for key, value in measured.items() if value is not None}:
            raise ValueError(f"{folder / 'summary.json'}: expected {min(lacking)} of {run}, since there is a retrain")
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
        factors = [content.batch[name] for name in _FACTORS]
        shown = "{} (ranks) x {} (`batch_size`) x {} (`accumulate`)".format(*factors)
        parts.append(f"A step takes {math.prod(factors)} forget rows with their retain rows: {shown}.")
    parts += [table(summary, markdown=True), LEGEND.rstrip(), "## Verdict", *_verdict(summary, results, content.audit)]
    if content.audit:
        parts += _audit(content.audit)
    if content.routing:
        parts.append(_selection(content.routing))
    if made:
        first = f"Trajectories and routing are those of seed {next(iter(results))}." if results else ""
        parts += ["## Figures", *([first] if first else [])]
        parts += [f"![{caption}](figures/{name})\n\n{caption}" for name, caption in made.items()]
    return "\n\n".join(parts) + "\n"


def _verdict(summary: Summary, results: dict[int | str, Summary], audit: dict) -> list[str]:
    lines = []
    if "retrain" not in summary:
        return [
            "The reference run is missing: without a model retrained on the retain documents alone there is "
            "no PrivLeak, and nobody knows how low the forget metrics should go. Give it with `reference`."
        ]
    gold, target = summary["retrain"], summary.get("target")
    lines.append(
        "The goal is the retrained model, which never saw the forget documents: VerbMem, KnowMem and extraction at "
        f"most {WITHIN:.2f} away from its own, PrivLeak at most {FORGOTTEN['privleak'][1]:g} away from 0, NLL at most "
        f"{FORGOTTEN['nll_f'][1]:.0%} of the way from it to the target, and at least {KEEP:.0%} of the target's retain "
        f"VerbMem. *{_PRESENT}* is above that, *{_OVERSHOT}* below."
    )
    goals = []
    for run in ordered(summary):
        if run in ("target", "retrain"):
            continue
        words = _words(summary[run], gold, target)
        reached = set(words.values()) == {_GONE}
        text = ", ".join(f"{FORGOTTEN[key][0]} {word}" for key, word in words.items())
        if target and target["verbmem_r"]:
            kept = summary[run]["verbmem_r"] / target["verbmem_r"]
            text += f"; {kept:.1%} of retain VerbMem kept"
            reached = reached and kept >= KEEP
        if audit.get("run") == run:
            text += f"; audit {audit['verdict']}"
            reached = reached and audit["verdict"] == _GONE
        goals.append(f"* {RUNS.get(run, run)}: {text}: **{'reached' if reached else 'not reached'}**.")
    lines.append("\n".join(goals))
    levers = [_lever(lever, summary, results) for lever in LEVERS if lever in summary and BASELINE in summary]
    if levers:
        lines.append(
            f"Does a lever help over {RUNS[BASELINE]} here? The distance is that to retrain in the plane of "
            "forget and retain VerbMem, paired by seed.\n\n" + "\n".join(levers)
        )
    return lines


def _words(metrics: dict[str, float], gold: dict[str, float], target: dict[str, float] | None) -> dict[str, str]:
    """Return for each forget metric that there is whether what was to be forgotten is gone, present or overshot."""
    words = {}
    for key, (_, margin) in FORGOTTEN.items():
        values = [each.get(key) for each in (metrics, gold, target or {})]
        own, wanted, former = (math.nan if value is None else value for value in values)
        more = own - wanted
        if key == "privleak":
            more = -own  # negative where a model knows more than retrain
        elif key == "nll_f":
            more = (wanted - own) / (wanted - former) if wanted > former else math.nan
        if not math.isnan(more):
            words[key] = _PRESENT if more > margin else _OVERSHOT if more < -margin else _GONE
    return words


def _audit(audit: dict) -> list[str]:
    """Return what the quick audit of one run found, as paragraphs and a table."""
    rows = [_AUDIT_COLUMNS, ["---"] * len(_AUDIT_COLUMNS), *audit["rows"]]
    cells = [" | ".join(cell.replace("|", "/") for cell in row) for row in rows]
    return [
        f"## Audit of {RUNS.get(audit['run'], audit['run'])}: {audit['verdict']}",
        f"{audit['summary']} [The whole report](audit/AUDIT.md) has every comparison.",
        "\n".join(f"| {row} |" for row in cells),
    ]


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


def _read(folder: Path, name: str) -> dict[str, Any]:
    """Return the content of a file, {} for one that is not there and may be missing."""
    path = folder / f"{name}.json"
    if not path.is_file():
        if name == "summary":
            raise ValueError(f"{path}: no such file; expected the metrics of a run")
        return {}
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: expected JSON; {error}") from None
    form, words = _FORMS[name]
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a JSON object; got {type(content).__name__}")
    if missing := [key for key in _NEEDED.get(name, ()) if content and key not in content]:
        raise ValueError(f"{path}: expected the keys {', '.join(_NEEDED[name])}; it lacks {missing[0]!r}")
    if not _fits(content, form) or name == "summary" and not content:
        raise ValueError(f"{path}: expected {words}; got {_short(content)}")
    rows = [[len(row) for row in content[key]] for key in _NEEDED["routing"]] if name == "routing" and content else []
    if any(own != rows[0] or len({*own}) > 1 for own in rows):
        raise ValueError(f"{path}: expected rows of one length, alike in {', '.join(_NEEDED[name])}")
    return content


def _fits(value: object, form: Any) -> bool:
    """Return whether a value of JSON has a form: a type, [form of each], {str: form of each} or {key: its form}."""
    if isinstance(form, list):
        return isinstance(value, list) and all(_fits(item, form[0]) for item in value)
    if isinstance(form, dict):
        each = form.get(str)
        return isinstance(value, dict) and all(
            _fits(item, form.get(key, object) if each is None else each) for key, item in value.items()
        )
    return isinstance(value, form) and (isinstance(value, bool) <= (form in (bool, object)))


def _short(content: object) -> str:
    shown = json.dumps(content)
    return shown if len(shown) < 200 else f"{shown[:200]}..."
