"""Cases: what may be one, where they come from, and that a file is read as it is now."""

import importlib.metadata
import sys

import pytest
import torch

from moe_unlearn.regress import case as registry
from moe_unlearn.regress import ours
from moe_unlearn.regress.case import Case, cases, load, register, source

FILE = """
import torch
from moe_unlearn.regress.case import Case, register
from helper import two

def kernel(x):
    return {body}

def inputs(seed, n):
    return {{"x": torch.arange(n).float() + seed}}

one = Case("one", kernel, kernel, inputs, {{"n": 4}}, tags=frozenset({{"a"}}))
several = [Case("two", kernel, kernel, inputs, {{"n": two}}), "no case"]
register(Case("three", kernel, kernel, inputs, {{"n": 3}}))
"""


@pytest.fixture(autouse=True)
def clean_registry(monkeypatch):
    monkeypatch.setattr(registry, "_registry", {})


@pytest.fixture
def file(tmp_path):
    (tmp_path / "helper.py").write_text("two = 2\n", encoding="utf-8")
    path = tmp_path / "kernels.py"
    path.write_text(FILE.format(body="x + 1"), encoding="utf-8")
    yield path
    sys.modules.pop("helper", None)


def simple(name="simple", **options):
    options = {"sizes": {"n": 4}, **options}
    return Case(name, lambda x: x, lambda x: x, lambda seed, n: {"x": torch.ones(n)}, **options)


@pytest.mark.quick
def test_a_file_gives_its_cases(file):
    path = list(sys.path)
    assert [case.name for case in load(file)] == ["three", "one", "two"] and sys.path == path
    assert [case.name for case in cases(["t*"])] == ["three", "two"]
    assert [case.name for case in cases(tags=["a"])] == ["one"]
    assert all(case.origin == str(file) for case in cases())


@pytest.mark.quick
def test_a_file_is_read_again(file):
    before = load(file)[0]
    file.write_text(FILE.format(body="x + 2"), encoding="utf-8")  # same size, within the clock's resolution
    after = load(file)[0]
    assert torch.equal(after.function(**after.make()), before.function(**before.make()) + 1)
    file.write_text(FILE.format(body="x + 2").replace('"three"', '"four"'), encoding="utf-8")
    load(file)
    assert [case.name for case in cases()] == ["four", "one", "two"]


@pytest.mark.parametrize("code", [0, 1, "done"])
def test_a_file_that_ends_the_program_passes_no_check(code, tmp_path):
    path = tmp_path / "cases.py"
    path.write_text(f"import sys\nsys.exit({code!r})\n", encoding="utf-8")
    with pytest.raises(ValueError, match=f"expected a file that defines cases; it ended the program, with {code}"):
        load(path)


def test_a_file_that_fails_changes_nothing(file):
    load(file)
    before = cases()
    file.write_text("raise RuntimeError('no')", encoding="utf-8")
    with pytest.raises(RuntimeError, match="no"):
        load(file)
    file.write_text("x = 1", encoding="utf-8")
    with pytest.raises(ValueError, match="expected moe_unlearn.regress.case.Case objects"):
        load(file)
    assert cases() == before
    with pytest.raises(ValueError, match="--module expects a Python file; got"):
        load(file.parent)


def test_two_files_with_one_name(file, tmp_path):
    load(file)
    (tmp_path / "other.py").write_text(file.read_text(encoding="utf-8"), encoding="utf-8")
    with pytest.raises(ValueError, match=r"two cases are named 'three': from .*kernels.py and from .*other.py"):
        load(tmp_path / "other.py")


def test_entry_points(file, monkeypatch):
    point = importlib.metadata.EntryPoint("mine", "kernels", registry.GROUP)
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: [point] if group == registry.GROUP else [])
    monkeypatch.syspath_prepend(str(file.parent))
    registry.load_entry_points()
    assert [case.origin for case in cases(["three"])] == ["kernels"]
    sys.modules.pop("kernels")


def test_registering_ours_replaces_them():
    for impl in ("auto", "ref"):
        ours.register_all(impl)
    assert len(cases()) == len(ours.cases()) and all(case.function.keywords["impl"] == "ref" for case in cases())


@pytest.mark.parametrize(
    "options, message",
    [
        ({"name": ""}, "must be printable text"),
        ({"name": "a\nb"}, "must be printable text"),
        ({"sizes": {"n": 0}}, "at least their smallest; got {'n': 0}"),
        ({"sizes": {"n": 1}, "smallest": {"n": 2}}, "at least their smallest"),
        ({"sizes": {"n": 1.5}}, "must be integers"),
        ({"tags": "a"}, "not one string"),
        ({"gradients": "x"}, "not one string"),
    ],
)
def test_what_is_no_case(options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        simple(**options)
    with pytest.raises(TypeError, match="reference must be callable; got None"):
        Case("x", len, None, len)


def test_inputs_are_made_with_changed_sizes_and_routing():
    case = Case(
        "r", len, len, lambda seed, n, routing: {"seed": seed, "n": n, "r": routing}, {"n": 4}, routing="skewed"
    )
    assert case.make(3) == {"seed": 3, "n": 4, "r": "skewed"}
    assert case.make(n=2, routing="uniform") == {"seed": 0, "n": 2, "r": "uniform"}
    with pytest.raises(TypeError, match="inputs must give a dict; got int"):
        Case("r", len, len, lambda seed: 1).make()


def test_inputs_are_moved():
    case = Case("m", len, len, lambda seed: {"x": torch.ones(2), "y": [torch.ones(1), 3]}, device="meta")
    made = case.make()
    assert made["x"].is_meta and made["y"][0].is_meta and made["y"][1] == 3


def test_source_says_where_a_kernel_comes_from(file):
    load(file)
    found = source(cases(["one"])[0])
    assert found["function"] == "kernel" and found["file"] == "kernels.py" and len(found["sha256"]) == 64
    assert source(ours.cases()[0])["file"] == "ours.py"
    assert source(Case("c", len, len, len)) == {"function": "len"}


def test_registering_twice_from_one_place_replaces():
    register(simple(tags=frozenset({"old"})))
    assert register(simple()).tags == frozenset() and len(cases()) == 1
