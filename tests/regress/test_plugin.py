"""The pytest plugin, in pytest runs of their own on a scratch folder; and what it costs runs that do not use it."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.regress.test_command import BROKEN, RIGHT, example

ROOT = Path(__file__).resolve().parents[2]


def pytest_run(folder, *arguments):
    command = [sys.executable, "-m", "pytest", "-p", "moe_unlearn.regress.plugin", "-p", "no:cacheprovider", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)
    return done.returncode, done.stdout + done.stderr


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "pytest.ini").write_text("[pytest]\naddopts = --strict-markers\n")
    (tmp_path / "test_softmax.py").write_text(example())
    return tmp_path


@pytest.mark.slow
def test_a_foreign_kernel_is_recorded_broken_and_caught(folder):
    code, out = pytest_run(folder)
    assert code == 1 and "record it with pytest --kernel-record" in out
    assert pytest_run(folder, "--kernel-record")[0] == 0
    (folder / "test_softmax.py").write_text(example().replace(RIGHT, BROKEN))
    code, out = pytest_run(folder)
    assert code == 1 and re.search(r"less accurate +softmax", out) and "test_softmax[softmax]" in out
    script = folder / "kernel_repros" / "repro_softmax.py"
    done = subprocess.run(
        [sys.executable, str(script)], env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert done.returncode == 1 and "AccuracyError" in done.stderr and len(script.read_text().splitlines()) <= 40


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
"""


@pytest.mark.slow
def test_several_cases_and_the_fixture_alone(folder):
    (folder / "test_ways.py").write_text(WAYS)
    code, out = pytest_run(folder, "--kernel-record", "-o", "kernel_store=deep/store", "test_ways.py", "-rA")
    assert {"PASSED test_ways.py::test_two[softmax]", "PASSED test_ways.py::test_two[other]"} <= set(out.splitlines())
    assert "PASSED test_ways.py::test_fixture_alone" in out and "3 passed" in out and "1 failed" in out
    assert "expects a Case, or a mark that has one" in out and (folder / "deep" / "store" / "entries").is_dir()


@pytest.mark.slow
@pytest.mark.parametrize(
    "test, message",
    [
        ("@pytest.mark.kernel_case(1)\ndef test_a(): pass", "takes the fixture `kernel_case`"),
        ("@pytest.mark.kernel_case\ndef test_a(kernel_case): pass", r"expected the mark kernel_case\(case, ...\)"),
        ("@pytest.mark.kernel_case(1)\ndef test_a(kernel_case): kernel_case.check()", "expected a Case; got 1"),
    ],
)
def test_wrong_use_is_named(folder, test, message):
    (folder / "test_wrong.py").write_text(f"import pytest\n\n{test}\n")
    code, out = pytest_run(folder, "test_wrong.py")
    assert code and re.search(message, out)


@pytest.mark.quick
def test_the_plugin_imports_neither_torch_nor_the_package():
    code = "import sys, pytest_moe_unlearn; print(sorted({'torch', 'moe_unlearn', 'numpy'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.quick
def test_the_entry_point_is_the_plugin():
    import tomllib

    import pytest_moe_unlearn
    from moe_unlearn.regress import plugin

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    # pytest takes `-p NAME` from the entry point of that name, so that it never loads both
    assert project["project"]["entry-points"]["pytest11"] == {plugin.__name__: pytest_moe_unlearn.__name__}
    assert project["tool"]["setuptools"]["py-modules"] == [pytest_moe_unlearn.__name__]
    hooks = {name for name in vars(pytest_moe_unlearn) if name.startswith("pytest_")} | {"kernel_case"}
    assert set(plugin.__all__) == hooks
    assert all(getattr(plugin, name) is getattr(pytest_moe_unlearn, name) for name in hooks)
