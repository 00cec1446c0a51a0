"""A table on a terminal is no wider than it: on its side, or in parts, where it has to be."""

import os
import shutil

import pytest

from moe_unlearn.page.terminal import WIDTH, fitted, wrapped
from moe_unlearn.runs.summary import COLUMNS, tabular

pytestmark = pytest.mark.quick
SUMMARY = {
    run: {key + end: 0.5 + number for key in COLUMNS for end in ("", "_low", "_high")}
    for number, run in enumerate(("target", "npo"))
}


def test_a_table_that_fits_is_as_it_is():
    assert fitted(["run", "a"], [["x", "1"], ["y", "10"]], width=20) == ["run    a", "x      1", "y     10"]


def test_a_runs_table_stands_on_its_side_in_a_hundred_columns(monkeypatch):
    monkeypatch.setattr(shutil, "get_terminal_size", os.terminal_size)
    lines = fitted(*tabular(SUMMARY))
    assert max(map(len, lines)) <= WIDTH and len(lines) == 1 + len(COLUMNS)
    assert lines[0].split("  ")[0] == "run" and "NPO" in lines[0]
    assert all(line.startswith(name) for line, (name, _) in zip(lines[1:], COLUMNS.values(), strict=True))
    assert lines[1].count("[") == 2


@pytest.mark.parametrize("width", [20, 40, 79])
@pytest.mark.parametrize("keys", [1, 2])
def test_a_larger_one_is_cut_into_parts_that_each_begin_with_the_keys(width, keys):
    head = ["key", "own", *(f"metric {i}" for i in range(9)), "failed"]
    rows = [[f"k{r}", f"o{r}", *(f"0.{r}{i}" for i in range(9)), "a long error " * 9] for r in range(12)]
    lines = fitted(head, rows, keys=keys, width=width)
    assert max(map(len, lines)) <= width
    parts = "\n".join(lines).split("\n\n")
    assert len(parts) > 1
    for part in parts:
        assert [line.split()[:keys] for line in part.splitlines()] == [row[:keys] for row in [head, *rows]]
    for i in range(9):
        assert "\n".join(lines).count(f"0.3{i}") == 1, "every value is there once"
    assert sum(line.endswith("…") for line in lines) == 12


@pytest.mark.parametrize("width", [20, 40, 79, 200])
def test_cells_go_on_in_further_lines_and_lose_no_word(width):
    rows = [["optimizer.lr", "1e-05", "default", "how far a step goes (above 0)"], ["data.model", "", "x", "a folder"]]
    lines = wrapped(rows, width=width)
    assert max(map(len, lines)) <= width
    assert sorted("".join(lines).replace(" ", "")) == sorted("".join("".join(row) for row in rows).replace(" ", ""))
    assert (len(lines) == 2) == (width > 60)
