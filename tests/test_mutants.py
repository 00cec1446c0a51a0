"""The mutants: made as promised, judged rightly on a small kernel, and ten of the real ones must die."""

import ast
import os
import subprocess
import sys

import pytest

from tests.equivalent_mutants import EQUIVALENT
from tests.mutants import KERNELS, PER_FILE, ROOT, drawn, identity, mutants_of

KERNEL = '''"""A kernel."""
import triton
import triton.language as tl
from moe_unlearn.triton_kernels.common import dot


def launch(x):
    return x + 1 < 2


@triton.jit
def _a_kernel(x, out, size, stride_a, stride_b, BLOCK: tl.constexpr):
    """out = x; 1 + 1."""
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    keep = (row < size) & (row >= 0)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, size, BLOCK):
        total += tl.load(x + start + row * stride_a, mask=keep, other=0.0, cache_modifier=".cg")
    total = tl.where(total > 0, total, -total)
    tl.store(out + row * stride_b, tl.maximum(dot(total, total, total), 0.5), mask=keep)
'''
EXPECTED = {
    "comparison": "keep = ((row) <= size) & (row >= 0)",
    "sign": 'total += tl.load(x + start - row * stride_a, mask=keep, other=0.0, cache_modifier=".cg")',
    "term dropped": 'total += tl.load(x + start, mask=keep, other=0.0, cache_modifier=".cg")',
    "factor dropped": "tl.store(out + row, tl.maximum(dot(total, total, total), 0.5), mask=keep)",
    "mask term dropped": "keep = (row < size)",
    "negation dropped": "total = tl.where(total > 0, total, total)",
    "constant": "row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(1, BLOCK)",
    "other function": "tl.store(out + row * stride_b, tl.minimum(dot(total, total, total), 0.5), mask=keep)",
    "index off by one": "tl.store((out + row * stride_b) + 1, tl.maximum(dot(total, total, total), 0.5), mask=keep)",
    "mask dropped": "tl.store(out + row * stride_b, tl.maximum(dot(total, total, total), 0.5), mask=keep | True)",
    "other value": 'total += tl.load(x + start + row * stride_a, mask=keep, other=(0.0 + 1), cache_modifier=".cg")',
    "initial value": "total = (tl.zeros((BLOCK,), tl.float32) + 1)",
    "branches swapped": "total = tl.where(total > 0, -total, total)",
    "last round dropped": "for start in range(0, size - 1, BLOCK):",
    "first round dropped": "for start in range(0 + 1, size, BLOCK):",
    "accumulate dropped": 'total = tl.load(x + start + row * stride_a, mask=keep, other=0.0, cache_modifier=".cg")',
    "cast dropped": "row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)",
    "stride swapped": "tl.store(out + row * stride_a, tl.maximum(dot(total, total, total), 0.5), mask=keep)",
}


@pytest.fixture
def made(tmp_path):
    path = tmp_path / "a.py"
    path.write_text(KERNEL, encoding="utf-8")
    return mutants_of(path)


def plain(line):
    return line.replace("(", "").replace(")", "")


@pytest.mark.quick
def test_every_kind_of_mutant_is_made(made):
    by_kind = {}
    for mutant in made:
        by_kind.setdefault(mutant.kind, []).append(plain(mutant.diff(KERNEL)[1]))
    for kind, line in EXPECTED.items():
        assert plain(line) in by_kind.get(kind, []), kind
    assert set(by_kind) == set(EXPECTED)


@pytest.mark.quick
def test_mutants_change_the_code_of_kernels_alone(made):
    tree = ast.dump(ast.parse(KERNEL))
    for mutant in made:
        assert mutant.kernel == "_a_kernel" and mutant.line > 12
        assert ast.dump(ast.parse(mutant.apply(KERNEL))) != tree
        assert "cg" not in mutant.text or '.cg"' in mutant.text
        assert not mutant.text.startswith("tl.program_id(0 + 1)")


@pytest.mark.quick
def test_the_same_mutants_are_drawn_again_and_enough_of_them():
    mutants = drawn()
    assert mutants == drawn() != drawn(seed=1)
    assert len(mutants) >= 60
    for mutant in mutants:
        ast.parse(mutant.apply((KERNELS / mutant.file).read_text(encoding="utf-8")))
    per_file = {path.name: len(mutants_of(path)) for path in KERNELS.glob("*.py")}
    for file, made in per_file.items():
        assert sum(mutant.file == file for mutant in mutants) == min(made, PER_FILE), file


@pytest.mark.quick
def test_equivalent_mutants_exist_and_have_reasons():
    """An entry whose line has changed says nothing any more."""
    made = {identity(mutant) for path in KERNELS.glob("*.py") for mutant in mutants_of(path)}
    assert not set(EQUIVALENT) - made
    assert all(len(reason) > 10 for reason in EQUIVALENT.values())


CHECKS = {
    "gram.VALUE == 1": "killed",
    "gram.VALUE < 5": "survived",
    "os.kill(os.getpid(), 11)": "killed",
    "time.sleep(60)": "timed out",
    "__import__('missing')": "killed",
}
PROGRAM = """
import sys
from pathlib import Path

import pytest

import moe_unlearn.ops
from tests import mutants

folder = Path(sys.argv[1])
mutants.KERNELS = folder / "kernels"
for name in sys.argv[2:]:
    mutants.stages = lambda file: [[str(folder / name)]]
    mutant = mutants.Mutant("gram.py", "a_kernel", "constant", 8, 9, "2", 1)
    print(mutants.run(mutant, "gram.py", 9)[0])
"""


@pytest.mark.slow
def test_verdicts(tmp_path):
    """On a package of one file whose mutant says VALUE = 2."""
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").touch()
    (tmp_path / "kernels" / "gram.py").write_text("VALUE = 1\n", encoding="utf-8")
    names = [f"test_{i}.py" for i in range(len(CHECKS))]
    imports = "import os, time\nimport moe_unlearn.triton_kernels.gram as gram\n"
    for name, check in zip(names, CHECKS, strict=True):
        (tmp_path / name).write_text(f"{imports}def test():\n    assert {check}\n", encoding="utf-8")
    command = [sys.executable, "-c", PROGRAM, str(tmp_path), *names]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.splitlines() == list(CHECKS.values()), done.stderr
    assert (tmp_path / "kernels" / "gram.py").read_text(encoding="utf-8") == "VALUE = 1\n"


def test_no_kernel_is_imported_before_it_is_mutated():
    program = "import sys, tests.triton_kernels.memory_cases; print([m for m in sys.modules if '.triton_kernels' in m])"
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.stdout == "['tests.triton_kernels', 'tests.triton_kernels.memory_cases']\n", done.stdout + done.stderr


@pytest.mark.slow
def test_ten_mutants_die():
    """Other ones for every commit; what it prints says how to run the same again."""
    environment = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.mutants", "--sample", "10", "--jobs", "1"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
