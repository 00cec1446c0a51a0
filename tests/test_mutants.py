"""The mutants: made as promised, judged rightly on a small kernel, and two of the real ones must die."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.mutants import cplusplus, cuda, native, runs, triton
from tests.mutants.breakages import BREAKAGES, Breakage
from tests.mutants.equivalent import EQUIVALENT
from tests.mutants.mutant import ROOT

FAMILIES = pytest.mark.parametrize("family", [triton, native, cuda], ids=["triton", "native", "cuda"])

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
    return triton.mutants_of(path)


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


SOURCE = """// A kernel; 1 + 1.
#include "cpu/common.h"
namespace moe_unlearn {
struct Rows {
  static constexpr int64_t most = 2 + 3;
  int64_t width = 1, count = 0;
  int64_t bytes(int64_t size) const { return -width * size; }
};

#if defined(__CUDACC__)
void unseen(int64_t count) { work(count + 1); }
#else
void run(const Rows& rows, float* const out, const char* from, int64_t begin, int64_t end, int64_t row_stride,
         int64_t stride) {
  STD_TORCH_CHECK(begin <= end, "no more than ", end + 1);
  double sums[4] = {};
  for (int64_t row = begin; row < end && row < rows.count; ++row) {
    sums[row % 4] += static_cast<double>(load<float, 2>(from + row * row_stride));
    if (row == 3) barrier();
  }
  out[0] = rows.width > 0 ? std::max(sums[0], sums[1]) : 0.5f;
  out[stride] = out[0];
}
#endif
}  // namespace moe_unlearn
STABLE_TORCH_LIBRARY_IMPL(moe_unlearn_native, CPU, m) {
  m.impl("run", TORCH_BOX(&moe_unlearn::run));
}
"""
LOOP = "for (int64_t row = begin; row < end && row < rows.count; ++row) {"
ADDED = "sums[row % 4] += static_cast<double>(load<float, 2>(from + row * row_stride));"
CHOICE = "out[0] = rows.width > 0 ? std::max(sums[0], sums[1]) : 0.5f;"
EXPECTED_OF_SOURCE = {
    "comparison": LOOP.replace("row < rows", "row <= rows"),
    "sign": ADDED.replace("+ row", "- row"),
    "term dropped": ADDED.replace("+ row * row_stride", ""),
    "factor dropped": ADDED.replace("* row_stride", ""),
    "other operator": LOOP.replace("&&", "||"),
    "condition term dropped": LOOP.replace("row < end &&", ""),
    "accumulate dropped": ADDED.replace("+=", "="),
    "branches swapped": "out[0] = rows.width > 0 ? 0.5f : std::max(sums[0], sums[1]);",
    "negation dropped": "int64_t bytes(int64_t size) const { return width * size; }",
    "condition negated": "if (!(row == 3)) barrier();",
    "constant": CHOICE.replace("0.5f", "(0.5f + 1)"),
    "other function": CHOICE.replace("max", "min"),
    "other name": LOOP.replace("row < end", "row < begin"),
    "cast dropped": ADDED.replace("static_cast<double>", ""),
    "float for double": "float sums[4] = {};",
    "index off by one": "out[(stride) + 1] = out[0];",
    "first round dropped": LOOP.replace("= begin", "= (begin) + 1"),
    "last round dropped": LOOP.replace("row < end", "row < (end) - 1"),
    "call dropped": "if (row == 3) ;",
    "stride swapped": ADDED.replace("row_stride", "stride"),
}


@pytest.fixture
def made_of_source(tmp_path):
    path = tmp_path / "a.cpp"
    path.write_text(SOURCE, encoding="utf-8")
    return cplusplus.mutants_of(path, "csrc/cpu/a.cpp")


@pytest.mark.quick
def test_every_kind_of_native_mutant_is_made(made_of_source):
    by_kind = {}
    for mutant in made_of_source:
        by_kind.setdefault(mutant.kind, []).append(mutant.diff(SOURCE)[1])
    for kind, line in EXPECTED_OF_SOURCE.items():
        assert " ".join(line.split()) in by_kind.get(kind, []), kind
    assert set(by_kind) == set(EXPECTED_OF_SOURCE)


@pytest.mark.quick
def test_native_mutants_change_what_the_tests_build_and_run(made_of_source):
    """Neither declarations, nor what is for a GPU's compiler, nor checks, nor the types in angle brackets."""
    for mutant in made_of_source:
        before, after = mutant.diff(SOURCE)
        assert mutant.kernel == ("bytes" if "bytes" in before else "run") and before != after
        assert not any(
            word in before for word in ("most", "unseen", "work", "CHECK", "impl", "namespace", "const Rows&")
        )
        assert "<float, 2>" in after or "<float, (2 + 1)>" in after or "load" not in after


@pytest.mark.quick
@FAMILIES
@pytest.mark.slow
def test_the_same_mutants_are_drawn_again_and_enough_of_them(family):
    mutants = family.drawn()
    if family is cuda:
        if not cuda.files():
            pytest.skip("there is no nvcc")
        named = cuda.breakages()
        assert mutants[-len(named) :] == named and len(named) >= 80
        mutants = mutants[: -len(named)]
        assert mutants == cuda.drawn()[: -len(named)] != cuda.drawn(seed=1)[: -len(named)]
    else:
        assert mutants == family.drawn() != family.drawn(seed=1)
    assert len(mutants) >= (40 if family is cuda else 60)
    for path in family.files():
        made = len(family.mutants_of(path))
        assert sum(family.path_of(mutant.file) == path for mutant in mutants) == min(made, family.PER_FILE), path
    if family is triton:
        for mutant in mutants:
            ast.parse(mutant.apply(family.path_of(mutant.file).read_text(encoding="utf-8")))


@pytest.mark.quick
def test_native_mutants_are_of_every_source_and_run_the_tests_of_every_op():
    files = {mutant.file for mutant in native.drawn()}
    assert files >= {str(p.relative_to(ROOT)) for p in (ROOT / "csrc" / "cpu").iterdir() if p.stem != "pair_product"}
    ops = {stage.op for file in files for stage in native.stages(file) if stage.library == "cpu"}
    assert ops == {path.stem for path in (ROOT / "csrc" / "cpu").glob("*.cpp") if native.is_op(path)}
    assert native.users("csrc/cpu/common.cpp", "cpu") == native.users("csrc/element.h", "cpu")
    assert native.users("csrc/cpu/pair_product.cpp", "cpu") == ["token_loss"]
    assert set(native.users("csrc/element.h", "cuda")) == {p.stem for p in (ROOT / "csrc" / "cuda").glob("*.cu")}
    for file in files:
        assert native.stages(file)
        for stage in native.stages(file):
            assert all(Path(path).exists() for path in stage.arguments if path.endswith(".py")), stage


@pytest.mark.quick
def test_named_breakages_change_their_text_and_are_named_once(monkeypatch):
    if not cuda.files():
        pytest.skip("there is no nvcc")
    assert set(BREAKAGES) <= {path.name for path in cuda.files()}
    made = cuda.breakages()
    assert len({(mutant.file, mutant.kind) for mutant in made}) == len(made)
    for mutant in made:
        before, after = mutant.diff(cuda.path_of(mutant.file).read_text(encoding="utf-8"))
        assert before != after and mutant.kernel
    for text, times in (("no such text", 0), ("MOE_UNLEARN_DEVICE", "[0-9]+")):
        monkeypatch.setitem(BREAKAGES, "exchange.cuh", (Breakage("a kind", text, ""),))
        with pytest.raises(ValueError, match=f"exchange.cuh, a kind: its text stands there {times} times"):
            cuda.breakages()


@pytest.mark.quick
@pytest.mark.slow
def test_equivalent_mutants_exist_and_have_reasons():
    """An entry whose line has changed says nothing any more."""
    made = {
        runs.identity(family, mutant)
        for family in (triton, native, cuda)
        for path in family.files()
        for mutant in family.mutants_of(path)
    } | {runs.identity(cuda, mutant) for mutant in cuda.breakages()}
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
from tests.mutants import runs, triton
from tests.mutants.mutant import Mutant

folder = Path(sys.argv[1])
triton.KERNELS = folder / "kernels"
mutant = Mutant("gram.py", "a_kernel", "constant", 8, 9, "2", 1)
for name in sys.argv[2:]:
    print(runs.run(triton, mutant, [triton.Stage((str(folder / name),))], 20)[0])
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
def test_two_mutants_die():
    """Other ones for every commit; what it prints says how to run the same again. `make nightly` runs them all."""
    environment = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.mutants", "--family", "triton", "--sample", "2", "--jobs", "1"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
