"""Runs beside each other: one table and one frontier of several folders, and the keys in which their recipes differ."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from moe_unlearn.files import finite, write_text
from moe_unlearn.page import Block, Document, Heading, Table
from moe_unlearn.page.blocks import NOTHING
from moe_unlearn.page.exports import comma_separated, latex
from moe_unlearn.runs import figures, pages, report
from moe_unlearn.runs.summary import COLUMNS, RUNS, Summary, cell, columns, heading, ordered

FORMATS = ("markdown", "html", "json", "csv", "latex")
_BOTH = ("target", "retrain")  # which runs have in common where their numbers are the same


class Comparison:
    """The runs of several folders: `summary`, run name -> metrics, and `recipes`, run name -> key -> value.

    A run is called as its folder is, as the path was given where two are called the same, with the name of its recipe;
    `target` and `retrain` are one row where all folders have the same numbers. Raises ValueError, as `report.read`,
    for a folder without a report.
    """

    def __init__(self, folders: Sequence[Path]):
        contents = [report.read(folder) for folder in folders]
        short = [folder.resolve().name for folder in folders]
        names = short if len({*short}) == len(short) else [str(folder) for folder in folders]
        shared = {run for run in _BOTH if _alike([content.summary.get(run) for content in contents])}
        self.summary: Summary = {}
        self.recipes: dict[str, dict[str, Any]] = {}
        for name, content in zip(names, contents, strict=True):
            for run in ordered(content.summary):
                own = run if run in shared else f"{name} ({RUNS.get(run, run)})"
                self.summary[own] = content.summary[run]
                if run not in _BOTH:
                    self.recipes[own] = flat(_recipe(content.recipe))

    def table(self) -> tuple[list[str], list[list[str]]]:
        """Return head and rows: a run a row, the usual metrics."""
        keys = columns(self.summary)
        rows = [[RUNS.get(run, run), *(cell(self.summary[run], key) for key in keys)] for run in ordered(self.summary)]
        return ["run", *map(heading, keys)], rows

    def differences(self) -> Table | None:
        """Return the keys of the recipes that differ, with the value of each run; None if none does."""
        keys = dict.fromkeys(key for recipe in self.recipes.values() for key in recipe)
        told = {key: [_told(recipe.get(key)) for recipe in self.recipes.values()] for key in keys}
        rows = [[key, *values] for key, values in told.items() if len({*values}) > 1]
        return Table(["key", *self.recipes], rows) if rows else None

    def page(self) -> Document:
        """Return the page: metrics, frontier and differences."""
        blocks: list[Block] = pages.metrics(self.summary, below=True)
        blocks += figures.frontier(self.summary)
        if table := self.differences():
            blocks += [Heading("Where the recipes differ"), table]
        return Document(f"{len(self.recipes)} runs", blocks)

    def write(self, kind: str, path: Path) -> None:
        """Write a file in one of `FORMATS`; the figure of the Markdown goes into the folder `figures` beside it."""
        page = self.page()
        texts = {
            "markdown": page.markdown,
            "html": page.html,
            "json": lambda: json.dumps(finite({"summary": self.summary, "recipes": self.recipes}), indent=1) + "\n",
            "csv": self._values,
            "latex": lambda: latex(*self.table()),
        }
        write_text(path, texts[kind]())
        for name, text in page.figures().items() if kind == "markdown" else ():
            write_text(path.parent / "figures" / name, text)

    def _values(self) -> str:
        keys = [key + end for key in COLUMNS for end in ("", "_sd", "_low", "_high")]
        keys = [key for key in keys if any(own.get(key) is not None for own in self.summary.values())]
        rows = [[run, *(own.get(key, "") for key in keys)] for run, own in self.summary.items()]
        return comma_separated(["run", *keys], rows)


def _alike(rows: Sequence[Mapping[str, float] | None]) -> bool:
    """Return whether rows have the same numbers, but for the time they took."""
    plain = [{key: value for key, value in (row or {}).items() if key != "seconds"} for row in rows]
    return all(row == plain[0] for row in plain)


def _recipe(text: str) -> dict[str, Any]:
    try:
        found = yaml.safe_load(text)
    except yaml.YAMLError:
        return {}
    return found if isinstance(found, dict) else {}


def flat(values: Mapping[str, Any], path: str = "") -> dict[str, Any]:
    """Return the values of nested mappings by their full names, such as `forget.beta`."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        found |= flat(value, f"{path}{key}.") if isinstance(value, dict) else {f"{path}{key}": value}
    return found


def _told(value: Any) -> str:
    return NOTHING if value is None else value if isinstance(value, str) else json.dumps(value, default=str)
