"""Shrinking: to the smallest failure of the same kind, deterministically; and the script runs and fails."""

import runpy

import pytest
import torch

from moe_unlearn.regress import minimize, ours
from moe_unlearn.regress.case import Case, load
from moe_unlearn.testing import AccuracyError


def normal(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def case(wrong, **options):
    """x [rows, columns] + 1, except where `wrong(rows, columns)`: there + 2."""
    options = {"sizes": {"rows": 50, "columns": 40}, **options}

    def function(x):
        return x + (2 if wrong(*x.shape) else 1)

    return Case(
        "add", function, lambda x: x + 1, lambda seed, rows, columns: {"x": normal(seed, rows, columns)}, **options
    )


@pytest.mark.parametrize(
    "wrong, smallest",
    [
        (lambda rows, columns: True, (1, 1)),
        (lambda rows, columns: rows >= 17, (17, 1)),
        (lambda rows, columns: rows > 32 and columns > 3, (33, 4)),
        (lambda rows, columns: rows * columns >= 100, (3, 34)),
        (lambda rows, columns: (rows, columns) == (50, 40), (50, 40)),
    ],
)
def test_sizes(wrong, smallest):
    found = minimize.shrink(case(wrong), 0)
    assert tuple(found.sizes.values()) == smallest and found.kind == "less accurate"
    assert found == minimize.shrink(case(wrong), 0)


def test_smallest_sizes_and_tries_are_kept():
    always = case(lambda *shape: True, smallest={"rows": 8})
    assert minimize.shrink(always, 0).sizes == {"rows": 8, "columns": 1}
    assert minimize.shrink(always, 0, tries=1).sizes == {"rows": 8, "columns": 40}
    assert minimize.shrink(case(lambda *shape: False), 0) is None


def test_an_error_is_not_exchanged_for_another():
    def function(x):
        if len(x) < 4:
            raise KeyError("small")
        if len(x) > 9:
            raise IndexError("large")
        return x + 1

    made = Case("e", function, lambda x: x + 1, lambda seed, rows: {"x": normal(seed, rows)}, {"rows": 30})
    found = minimize.shrink(made, 0)
    assert found.kind == "IndexError" and found.sizes == {"rows": 10} and found.message == "large"


@pytest.mark.quick
def test_routing_is_made_simpler(monkeypatch):
    (right,) = [c for c in ours.cases() if c.name == "route/sentinels"]

    def wrong(**inputs):
        made = right.function(**inputs)
        return {**made, "tokens_per_expert": made["tokens_per_expert"] + 1}

    found = minimize.shrink(Case("r", wrong, right.reference, right.inputs, right.sizes, routing="sentinels"), 0)
    assert found.routing == "uniform" and found.sizes == {"tokens": 1, "experts": 1, "top_k": 1}


FILE = """
import torch
from moe_unlearn.regress.case import Case

def kernel(x):
    return x.cumsum(-1) - {dropped}

def inputs(seed, rows, columns):
    return {{"x": torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))}}

case = Case('sum "of" rows', kernel, lambda x: x.cumsum(-1), inputs, {{"rows": 20, "columns": 30}})
"""


@pytest.mark.quick
def test_the_script_stands_alone(tmp_path, capsys):
    path = tmp_path / "kernels.py"
    path.write_text(FILE.format(dropped="x * (x > 1)"), encoding="utf-8")
    (broken,) = load(path)
    found = minimize.shrink(broken, 5)
    text = minimize.script(broken, 5, found)
    assert 20 <= len(text.splitlines()) <= 40 and "make(5, rows=" in text
    script = minimize.write(tmp_path / "repros", broken, text)
    assert script.name == "repro_sum_of_rows.py"
    with pytest.raises(AccuracyError, match="output 0"):
        runpy.run_path(str(script), run_name="__main__")
    assert "float64" in capsys.readouterr().out
    path.write_text(FILE.format(dropped="0"), encoding="utf-8")
    runpy.run_path(str(script), run_name="__main__")
    assert "not wrong any more" in capsys.readouterr().out
