"""Report of a run: report.md with its figures, report.html, which is one file, and report.json.

A folder holds `summary.json` (run name -> flat metrics; with several seeds the mean, and `<key>_sd` the
sample standard deviation) and, where there are any, the JSON files of which the report can be made again:

    seeds.json        `corpus`; `results`: seed -> run name -> metrics
    trajectory.json   run name -> list of {"step", ...}
    routing.json      `forget`, `retain` frequencies and `selected`, all [L, E]; `inactive` says why TRACE selected
                      none
    routes.json       of some rows: frequencies of `forget` and `retain` tokens before, of forget tokens `after` [L, E]
    batch.json        what one step takes: `ranks`, `batch_size` and `accumulate`
    loaded.json       how the model was loaded: `loading.described`
    audit.json        of one run: its name `run`, `verdict`, `summary`, and `rows`: for each attack its title, what was
                      done, the gravest sign and the verdict; beside the audit's own report in `audit/`
    about.json        how the run was made: `runs.about`
    data.json         what became of the data, by side: `data.DataReport`
    cost.json         `seconds` by phase; bytes of memory `planned` for a step, and `measured`, where `how` says how
    samples.json      by side: {"prompt", "truth", "before", "after"}, the texts of a few rows
    recipe.yaml       the recipe
"""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moe_unlearn.files import finite, write_json, write_text
from moe_unlearn.runs import pages
from moe_unlearn.runs.names import PAGES
from moe_unlearn.runs.summary import Summary


@dataclass(frozen=True)
class Content:
    """Content of a report: means over seeds, and what they were made of; trajectories and routing are of one seed."""

    summary: Summary
    corpus: str = ""
    results: Mapping[int, Summary] | Mapping[str, Summary] = field(default_factory=dict)  # by seed
    trajectories: dict[str, list[dict]] = field(default_factory=dict)
    routing: dict = field(default_factory=dict)
    routes: dict = field(default_factory=dict)
    batch: dict = field(default_factory=dict)
    loaded: dict = field(default_factory=dict)
    audit: dict = field(default_factory=dict)
    about: dict = field(default_factory=dict)
    data: dict = field(default_factory=dict)
    cost: dict = field(default_factory=dict)
    samples: dict = field(default_factory=dict)
    recipe: str = ""


_NUMBER = (int, float, type(None))  # null where there is no number
_METRICS = {str: {str: _NUMBER}}
_FACTORS = ("ranks", "batch_size", "accumulate")
_ROUTES = ("forget", "retain", "after")
_SAMPLE = dict.fromkeys(("prompt", "truth", "before", "after"), str)
_FORMS: dict[str, tuple[Any, str]] = {  # of each file: its form, and what a message calls that
    "summary": (_METRICS, "run name -> metrics, which are numbers"),
    "seeds": ({"corpus": str, "results": {str: _METRICS}}, "corpus, a text, and results: seed -> run name -> metrics"),
    "trajectory": ({str: [dict]}, "run name -> a list of objects"),
    "routing": (
        {
            "forget": [[_NUMBER]],
            "retain": [[_NUMBER]],
            "selected": [[bool]],
            "inactive": str,
        },
        "an object of forget, retain and selected, each a list of rows, one a layer",
    ),
    "routes": (
        dict.fromkeys(_ROUTES, [[_NUMBER]]),
        "an object of forget, retain and after, each a list of rows, one a layer",
    ),
    "batch": (dict.fromkeys(_FACTORS, int), "whole numbers"),
    "loaded": ({"model": str, "dtype": str, "device": str, "trust_remote_code": bool}, "texts, and true or false"),
    "audit": ({"run": str, "verdict": str, "summary": str, "rows": [[str]]}, "texts, and rows of texts"),
    "about": (
        {"command": str, "started": str, "seed": int, "machine": str, "versions": {str: str}},
        "texts, a seed, which is a whole number, and versions by package",
    ),
    "data": (
        {str: {"source": str, "read": int, "kept": int, "rows": int, "truncated": int, "dropped": {str: int}}},
        "for each side its source, and how many documents were read, kept, cut and dropped",
    ),
    "cost": (
        {"seconds": {str: _NUMBER}, "planned": (int, type(None)), "measured": (int, type(None)), "how": str},
        "seconds by phase, bytes planned and measured, and a text",
    ),
    "samples": ({str: [_SAMPLE]}, "for each side a list of texts: prompt, truth, before and after"),
}
_NEEDED = {
    "routing": ("forget", "retain", "selected"),
    **{name: tuple(_FORMS[name][0]) for name in ("routes", "batch", "loaded", "audit", "about", "cost")},
}
_FIELDS = {"seeds": "", "trajectory": "trajectories"}  # of `Content`, where a file is called something else


def save(folder: Path, content: Content) -> None:
    """Write the JSON files of which `read` makes this content, as far as a demo has them."""
    write_json(folder / "summary.json", content.summary)
    write_json(folder / "seeds.json", {"corpus": content.corpus, "results": content.results})
    write_json(folder / "trajectory.json", content.trajectories)
    write_json(folder / "routing.json", content.routing)
    for name in ("routes", "audit", "about", "cost", "samples"):
        if own := getattr(content, name):
            write_json(folder / f"{name}.json", own)


def read(folder: Path) -> Content:
    """Read the JSON files of a run folder.

    Raises ValueError that names the file if `summary.json` is missing or a file has other content than expected.
    """
    found = {name: _read(folder, name) for name in _FORMS}
    summary, seeds = found.pop("summary"), found.pop("seeds")
    for run, measured in summary.items() if "retrain" in summary else ():  # with which all are compared
        if lacking := {"verbmem_f", "verbmem_r"} - {key for key, value in measured.items() if value is not None}:
            raise ValueError(f"{folder / 'summary.json'}: expected {min(lacking)} of {run}, since there is a retrain")
    path = folder / "recipe.yaml"
    recipe = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    others = {_FIELDS.get(name, name): own for name, own in found.items()}
    return Content(summary, seeds.get("corpus", ""), seeds.get("results", {}), **others, recipe=recipe)


def write(folder: Path, content: Content) -> list[Path]:
    """Write `PAGES` and the figures of the first into a run folder; return the paths written."""
    page = pages.of(content)
    plain = {"format": "moe-unlearn report 1"} | finite(dataclasses.asdict(content))
    contents = (page.markdown(), page.html(), json.dumps(plain, indent=1) + "\n")
    texts = dict(zip(PAGES, contents, strict=True))
    texts |= {f"figures/{name}": text for name, text in page.figures().items()}
    for name, text in texts.items():
        write_text(folder / name, text)
    return [folder / name for name in texts]


def _read(folder: Path, name: str) -> dict[str, Any]:
    """Return the content of a file, {} for one that is not there and may be missing."""
    path = folder / f"{name}.json"
    if not path.is_file():
        if name == "summary":
            raise ValueError(f"{path}: no such file; expected the metrics of a run: name the --out of a finished one")
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
    tables = _NEEDED[name] if content and name in ("routing", "routes") else ()
    rows = [[len(row) for row in content[key]] for key in tables]
    if any(own != rows[0] or len({*own}) > 1 for own in rows):
        raise ValueError(f"{path}: expected rows of one length, alike in {', '.join(tables)}")
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
