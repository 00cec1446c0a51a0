"""The pytest plugin, in pytest runs of their own on a scratch folder; and what it costs runs that do not use it."""

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import pytest_moe_unlearn

from moe_unlearn.regress import plugin
from moe_unlearn.testing import AccuracyError
from tests.support.foreign_softmax import BROKEN, RIGHT, example

pytest_plugins = ["pytester"]
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def run(pytester, monkeypatch):
    """Run pytest on a scratch folder with the foreign softmax of the package's README; its outcomes and its output."""
    # without hypothesis, which is imported anew by every run
    others = "-p no:cacheprovider -p no:hypothesispytest"
    pytester.makeini(f"[pytest]\naddopts = --strict-markers -p {plugin.__name__} {others}")
    (pytester.path / "test_softmax.py").write_text(example(), encoding="utf-8")

    def call(*arguments):
        made = pytester.runpytest_inprocess(*arguments)
        outcomes = made.parseoutcomes()
        # that the plugin was imported before pytest could rewrite its assertions
        outcomes.pop("warnings", None)
        return outcomes, "\n".join(made.outlines + made.errlines)

    return call


def test_a_foreign_kernel_is_recorded_broken_and_caught(run, pytester, load_script):
    outcomes, out = run()
    assert outcomes == {"failed": 1} and "record it with pytest --kernel-record" in out
    assert run("--kernel-record")[0] == run()[0] == {"passed": 1}
    (pytester.path / "test_softmax.py").write_text(example().replace(RIGHT, BROKEN), encoding="utf-8")
    for arguments in ((), ("--kernel-record",)):
        outcomes, out = run(*arguments)
        assert outcomes == {"failed": 1}
        assert re.search(r"less accurate +softmax", out) and "test_softmax[softmax]" in out
    with pytest.raises(AccuracyError):
        load_script(pytester.path / "kernel_repros" / "repro_softmax.py")


@pytest.fixture
def load_script(monkeypatch):
    import runpy

    from moe_unlearn.regress import case as registry

    monkeypatch.setattr(registry, "_registry", {})
    return lambda path: runpy.run_path(str(path))


def test_strict_and_accept(run, pytester):
    assert run("--kernel-record")[0] == {"passed": 1}
    text = example().replace(RIGHT, "torch.softmax(x, -1)")
    (pytester.path / "test_softmax.py").write_text(text, encoding="utf-8")
    assert run()[0] == {"passed": 1}
    outcomes, out = run("--kernel-strict")
    assert outcomes == {"failed": 1} and "other bits in output 0" in out
    assert run("--kernel-accept", "torch's own")[0] == run("--kernel-strict")[0] == {"passed": 1}
    assert len(list((pytester.path / "kernel_store" / "entries").iterdir())) == 2


WAYS = """
import dataclasses
import pytest
from test_softmax import case

other = dataclasses.replace(case, name="other")

@pytest.mark.kernel_case(case, other)
def test_two(kernel_case):
    assert kernel_case.check().status in ("recorded", "unchanged", "equal")

def test_fixture_alone(kernel_case):
    kernel_case.check(case)

def test_neither(kernel_case):
    kernel_case.check()

def test_no_case(kernel_case):
    kernel_case.check(1)
"""


def test_several_cases_and_the_fixture_alone(run, pytester):
    (pytester.path / "test_ways.py").write_text(WAYS, encoding="utf-8")
    outcomes, out = run("--kernel-record", "-o", "kernel_store=deep/store", "test_ways.py", "-rA")
    assert outcomes == {"passed": 3, "failed": 2}
    assert {"PASSED test_ways.py::test_two[softmax]", "PASSED test_ways.py::test_two[other]"} <= set(out.splitlines())
    assert "expects a Case, or a mark that has one" in out and "expected a Case; got 1" in out
    assert len(list((pytester.path / "deep" / "store" / "entries").iterdir())) == 2


@pytest.mark.parametrize(
    "test, message",
    [
        ("@pytest.mark.kernel_case(1)\ndef test_a(): pass", "takes the fixture `kernel_case`"),
        ("@pytest.mark.kernel_case\ndef test_a(kernel_case): pass", r"expected the mark kernel_case\(case, ...\)"),
    ],
)
def test_wrong_marks_are_named(run, pytester, test, message):
    (pytester.path / "test_wrong.py").write_text(f"import pytest\n\n{test}\n", encoding="utf-8")
    _, out = run("test_wrong.py")
    assert re.search(message, out)


@pytest.mark.slow
def test_in_a_process_of_its_own(tmp_path):
    (tmp_path / "test_softmax.py").write_text(example(), encoding="utf-8")
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "moe_unlearn.regress.plugin",
        "--kernel-record",
        "--strict-markers",
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.quick
def test_the_plugin_imports_neither_torch_nor_the_package():
    code = "import sys, pytest_moe_unlearn; print(sorted({'torch', 'moe_unlearn', 'numpy'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.quick
def test_the_entry_point_is_the_plugin():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    # pytest takes `-p NAME` from the entry point of that name, so that it never loads both
    assert project["project"]["entry-points"]["pytest11"] == {plugin.__name__: pytest_moe_unlearn.__name__}
    hooks = {name for name in vars(pytest_moe_unlearn) if name.startswith("pytest_")} | {"kernel_case"}
    assert set(plugin.__all__) == hooks
    assert all(getattr(plugin, name) is getattr(pytest_moe_unlearn, name) for name in hooks)
