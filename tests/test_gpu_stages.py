"""The stages of a GPU run, each as far as a CPU goes: what is collected, how tests report, what smoke notices."""

import ast
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import stamp
from benchmarks.gpu_summary import SKIPS_ALLOWED
from benchmarks.journal import Journal, of_kind, read
from moe_unlearn import backend, native, ops
from tests import gpu_install, gpu_sanitizer, gpu_smoke, gpu_stages
from tests.gpu_plugin import covering, sampled
from tests.gpu_stages import CUDA_TESTS, MATRIX, ROOT, SANITIZED, TRITON_TESTS, WAIT_TESTS, parallel

_COLLECT = """
import json, pytest, sys

class Count:
    def __init__(self):
        self.files, self.left_out = {}, 0

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, config, items):
        for item in items:
            name = item.nodeid.partition("::")[0]
            self.files[name] = self.files.get(name, 0) + 1

    def pytest_deselected(self, items):
        self.left_out += len(items)

for arguments in json.loads(sys.argv[1]):
    count = Count()
    status = pytest.main(["--collect-only", "-qq", *arguments], plugins=[count])
    print(json.dumps([int(status), count.files, count.left_out]), file=sys.stderr)
"""


@pytest.fixture(scope="module")
def collections():
    """For the matrix and for memcheck: how many tests of each file pytest would run, how many it leaves out."""
    done = subprocess.run(
        [sys.executable, "-c", _COLLECT, json.dumps([MATRIX, SANITIZED])], cwd=ROOT, capture_output=True, text=True
    )
    lines = [json.loads(line) for line in done.stderr.splitlines() if line.startswith("[0, ")]
    assert len(lines) == 2, done.stdout + done.stderr
    return [(files, left_out) for _, files, left_out in lines]


# what all implementations of an op claim
CLAIMS = [str(path.relative_to(ROOT)) for path in sorted((ROOT / "tests" / "ops").glob("*/test_*.py"))]


# ---- the device matrix -------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_matrix_has_every_cuda_test_a_sample_of_the_triton_ones_and_nothing_for_the_cpu(collections):
    found, left_out = collections[0]
    file, _, name = WAIT_TESTS.partition("::")
    assert {CUDA_TESTS, file, *TRITON_TESTS} <= found.keys() <= {CUDA_TESTS, file, *TRITON_TESTS, *CLAIMS}
    kernels = {path.stem for path in (ROOT / "triton_kernels").glob("*.py")} | {
        p.stem for p in ROOT.glob("csrc/cuda/*.cu")
    }
    homes = {Path(name).parent.name for name in CLAIMS} & kernels
    assert homes <= {Path(name).parent.name for name in found}
    assert sum(found.get(name, 0) for name in (CUDA_TESTS, *CLAIMS)) > 400
    assert f"def {name}(" in Path(ROOT, file).read_text(encoding="utf-8")
    # twelve workers have 140 seconds, compilation included, which the half that is of CUDA does not need
    assert left_out > 400 and sum(found.values()) < 1350


@pytest.mark.slow
def test_memcheck_has_some_fifty_cuda_tests(collections):
    found, _ = collections[1]
    assert found.keys() <= {CUDA_TESTS, *CLAIMS} and 25 <= sum(found.values()) <= 65


@pytest.mark.quick
def test_every_value_of_every_parameter_occurs_in_the_sample():
    rows = [{"a": a, "b": b, "c": (a + b) % 2} for a in range(5) for b in range(3)]
    chosen = [rows[i] for i in covering(rows)]
    assert {(k, v) for row in chosen for k, v in row.items()} == {(k, v) for row in rows for k, v in row.items()}
    assert len(chosen) == 5 and covering(rows) == sorted(covering(rows))
    assert covering([{}, {}]) == [0] and covering([]) == []


def reasons(path: Path) -> list[str]:
    """The texts of pytest.skip and pytest.mark.skipif in a file; "?" where they are made elsewhere."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("pytest.skip", "pytest.mark.skipif"):
            keywords = {keyword.arg: keyword.value for keyword in node.keywords}
            value = keywords.get("reason", node.args[0] if node.args else None)
            if isinstance(value, ast.JoinedStr):
                found.append("".join(part.value if isinstance(part, ast.Constant) else "90" for part in value.values))
            else:
                found.append(value.value if isinstance(value, ast.Constant) else "?")
    return found


@pytest.mark.quick
@pytest.mark.parametrize("name", [CUDA_TESTS, *TRITON_TESTS, *CLAIMS])
def test_every_skip_that_may_occur_on_a_gpu_is_allowed(name):
    """A new reason is either about what a GPU cannot do, and allowed, or nobody would see those tests missing."""
    found = reasons(ROOT / name)
    if name == CUDA_TESTS:
        found.remove("?")  # no GPU, or no library: both are failures there
    assert [why for why in found if not SKIPS_ALLOWED.search(why)] == []


@pytest.mark.quick
def test_a_lacking_library_is_no_reason_that_holds_on_a_gpu():
    for why in ("_C_cuda not built: no nvcc", "there is no GPU", "_C_cpu not loaded: x", "slow", "needs a GPU"):
        assert not SKIPS_ALLOWED.search(why), why


# ---- the plugin -----------------------------------------------------------------------------------------------

TESTS = """
import os, pytest

@pytest.mark.parametrize("n", range(4))
def test_passes(n):
    pass

def test_fails():
    assert 1 == 2, "told so"

def test_is_skipped():
    pytest.skip("needs Hopper")

def test_kills_its_process():
    os._exit(3)

def test_breaks_the_device(monkeypatch):
    from tests import gpu_plugin
    gpu_plugin.device_usable = lambda: False
    raise RuntimeError("CUDA error: an illegal memory access was encountered")

@pytest.fixture
def broken():
    raise ValueError("no fixture")

def test_has_no_fixture(broken):
    pass
"""


def with_plugin(tmp_path, *options, tests=TESTS, deselected=()):
    (tmp_path / "test_it.py").write_text(tests, encoding="utf-8")
    path = tmp_path / "gpu-1-x.jsonl"
    command = [sys.executable, "-m", "pytest", "-c", os.devnull, "--rootdir", str(tmp_path), "-p", "no:cacheprovider",
               "-p", "tests.gpu_plugin", "--journal", str(path), "--stage", "matrix", *options,
               str(tmp_path / "test_it.py"), *(f"--deselect=test_it.py::{name}" for name in deselected)]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    return {line["name"].partition("::")[2]: line for line in of_kind(read(path), "test")}, read(path), done


@pytest.mark.slow
def test_workers_write_a_line_a_test_and_one_that_breaks_takes_no_other_with_it(tmp_path):
    options = ("-n", "2", "--dist", "worksteal", "--max-worker-restart", "9")
    lines, everything, done = with_plugin(tmp_path, *options)
    assert len(lines) == 9 and of_kind(everything, "collected")[0]["tests"] == 9, done.stdout + done.stderr
    assert {name for name, line in lines.items() if line["outcome"] == "passed"} == {
        f"test_passes[{i}]" for i in range(4)
    }
    assert lines["test_is_skipped"]["outcome"] == "skipped" and lines["test_is_skipped"]["why"] == "needs Hopper"
    assert "told so" in lines["test_fails"]["why"] and "no fixture" in lines["test_has_no_fixture"]["why"]
    for name in ("test_kills_its_process", "test_breaks_the_device"):
        assert lines[name]["outcome"] == "failed" and "crashed" in lines[name]["why"]
    (note,) = of_kind(everything, "note")
    assert note["test"].endswith("test_breaks_the_device") and "illegal memory access" in note["device_lost"]


def test_one_process_writes_the_same(tmp_path):
    lines, everything, _ = with_plugin(tmp_path, deselected=("test_kills_its_process", "test_breaks_the_device"))
    assert {name: line["outcome"] for name, line in lines.items()} == {
        **{f"test_passes[{i}]": "passed" for i in range(4)},
        "test_fails": "failed",
        "test_is_skipped": "skipped",
        "test_has_no_fixture": "failed",
    }
    assert of_kind(everything, "collected")[0]["tests"] == 7


def test_what_passed_in_an_earlier_run_of_these_kernels_is_left_out(tmp_path):
    for name, sources in (("gpu-1-a", stamp.kernel_sources_hash()), ("gpu-1-b", "other")):
        earlier = Journal(tmp_path / "earlier" / f"{name}.jsonl", "matrix")
        earlier.write("stamp", stamp={"kernel_sources": sources})
        for n, kind in ((0, "passed"), (1, "failed")) if sources != "other" else ((2, "passed"),):
            earlier.write("test", name=f"test_it.py::test_passes[{n}]", outcome=kind, seconds=0.1, why="")
    tests = TESTS.partition("def test_fails")[0]
    lines, everything, _ = with_plugin(tmp_path, "--left", str(tmp_path / "earlier"), tests=tests)
    assert set(lines) == {f"test_passes[{n}]" for n in (1, 2, 3)}
    assert of_kind(everything, "collected")[0]["tests"] == 3


def test_a_file_that_cannot_be_imported_is_a_failure(tmp_path):
    lines, _, done = with_plugin(tmp_path, tests="import no_such_module")
    (line,) = lines.values() if lines else [{"outcome": done.stdout}]
    assert line["outcome"] == "failed" and "no_such_module" in line["why"]


@pytest.mark.quick
def test_one_case_of_each_function_and_a_covering_sample(tmp_path):
    def item(name, folder="thin", **parameters):
        return SimpleNamespace(
            name=name, path=tmp_path / folder / "t.py", originalname=name, callspec=SimpleNamespace(params=parameters)
        )

    items = [item("a", x=x, y=y) for x in ([1], [2], [3]) for y in (1, True)]
    items += [item("b"), *(item("c", "whole", x=x) for x in range(3))]
    assert sampled(items, tmp_path, [], one_each=False) == items
    assert sampled(items, tmp_path, [], one_each=True) == [items[0], items[6], items[7]]
    thin = sampled(items, tmp_path, ["thin"], one_each=False)
    assert thin[-4:] == items[6:] and len(thin) == 3 + 4
    # 1 and True are two values
    assert {type(i.callspec.params["y"]) for i in thin[:3]} == {int, bool}


def test_many_processes_only_where_they_are_there(monkeypatch):
    assert parallel()[:2] == ("-n", "12")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert parallel() == ()


# ---- smoke ----------------------------------------------------------------------------------------------------


@pytest.fixture
def on_cpu(monkeypatch):
    """Without the interpreter, which takes minutes for the same."""
    monkeypatch.setitem(gpu_smoke.IMPLEMENTATIONS, "cpu", ("cpu",))
    if "cpu" not in backend.available("route", "cpu"):
        pytest.skip("the C++ kernels are not built")


def smoked(path):
    status = gpu_smoke.conduct(Journal(path, "smoke"), "cpu", toy=True)
    lines = read(path)
    assert of_kind(lines, "collected")[0]["tests"] == len(of_kind(lines, "test"))
    return status, {line["name"]: line for line in of_kind(lines, "test")}


def test_smoke_passes_with_the_kernels_of_this_cpu(tmp_path, on_cpu):
    status, lines = smoked(tmp_path / "gpu-1-x.jsonl")
    assert status == 0 and {line["outcome"] for line in lines.values()} == {"passed"}, lines
    assert {"layer of Qwen3-30B-A3B auto", "layer of OLMoE-1B-7B cpu"} <= lines.keys()


def test_smoke_notices_a_wrong_bit_a_wrong_sum_and_a_kernel_that_raises(tmp_path, on_cpu, monkeypatch):
    right = [backend.resolve(name, "cpu", torch.zeros(1)) for name in ("route", "token_loss.kept")]

    def route(*arguments):
        made = right[0](*arguments)
        made[0][-1] += 1
        return made

    def loss(*arguments):
        made = right[1](*arguments)
        made[0].mul_(1.01)
        return made

    def score(*arguments):
        raise RuntimeError("no such device")

    monkeypatch.setattr(backend, "_kernels", dict(backend._kernels))
    for name, kernel in (("route", route), ("token_loss.kept", loss), ("weight_score.mask", score)):
        backend.register(name, "cpu", kernel)
    monkeypatch.setattr(gpu_smoke, "layers", lambda device, toy: iter(()))
    status, lines = smoked(tmp_path / "gpu-1-x.jsonl")
    failed = {name.partition(" ")[0]: line["why"] for name, line in lines.items() if line["outcome"] == "failed"}
    assert status == 1 and failed.keys() == {"route", "token_loss", "weight_score.histogram"}
    assert "8 of 24 elements have other bits" in failed["route"] and "exceeds" in failed["token_loss"]
    assert failed["weight_score.histogram"] == "RuntimeError: no such device"


@pytest.mark.quick
def test_smoke_runs_every_kernel_that_is_registered():
    assert ops.route and {name for check in gpu_smoke.checks() for name in check.covers} == set(backend.registered())


# ---- install and memcheck -------------------------------------------------------------------------------------


@pytest.mark.quick
def test_the_checkout_is_installed_by_make_s_own_command_and_nothing_is_fetched():
    if shutil.which("make") is None:
        pytest.skip("there is no make")
    done = subprocess.run([*gpu_install.installation(), "--dry-run"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and f"{sys.executable} -m pip install --no-index --no-deps" in done.stdout, done.stderr


@pytest.mark.quick
def test_wheels_of_packages_that_are_there_stay_where_they_are(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_install, "WHEELS", tmp_path)
    for name in ("pytest_xdist-3.8.0-py3-none-any.whl", "no_such_peer-1.0-py3-none-any.whl"):
        (tmp_path / name).touch()
    assert gpu_install.wheels() == [str(tmp_path / "no_such_peer-1.0-py3-none-any.whl")]


def test_each_step_of_the_installation_is_a_line(tmp_path):
    journal = Journal(tmp_path / "gpu-1-x.jsonl", "install")
    code = "import sys; print(7, flush=True); print('why', file=sys.stderr); sys.exit({})"
    assert gpu_install.step(journal, "good", [sys.executable, "-c", code.format(0)]) == "7\nwhy\n"
    assert gpu_install.step(journal, "bad", [sys.executable, "-c", code.format(2)]) is None
    assert gpu_install.step(journal, "absent", [str(tmp_path / "nothing")]) is None
    lines = of_kind(read(journal.path), "test")
    assert [(line["name"], line["outcome"]) for line in lines] == [
        ("good", "passed"),
        ("bad", "failed"),
        ("absent", "failed"),
    ]
    assert lines[0]["why"] == "" and set(lines[1]["why"].split()) == {"7", "why"}


def test_what_is_loaded_is_told():
    found = gpu_install.loaded("cpu")
    assert len(found["libraries"]) == 2 and found["implementations"].keys() == set(backend.registered())
    assert "ref" in found["implementations"]["route"] and found["faults"] == []


def test_what_a_gpu_would_lack_is_told(monkeypatch):
    """A part that only the CPU has is no fault; a library that was not built is one."""
    report = ["cpu: built", "cuda: not built: no nvcc"]
    monkeypatch.setattr(native, "report", lambda: report)
    faults = gpu_install.loaded("cuda")["faults"]
    assert "native library cuda: not built: no nvcc" in faults
    assert not any("token_loss.head" in line for line in faults)


def test_libraries_of_other_sources_are_not_taken(monkeypatch, tmp_path):
    """A kernel that was mended must not be tested by the library from before it was."""
    (tmp_path / "moe_unlearn").mkdir()
    (tmp_path / "csrc" / "cuda").mkdir(parents=True)
    source = tmp_path / "csrc" / "cuda" / "route.cu"
    source.write_text("one", encoding="utf-8")
    monkeypatch.setattr(gpu_stages, "ROOT", tmp_path)
    monkeypatch.setattr(gpu_stages, "BUILT", tmp_path / "moe_unlearn" / "_C_sources.txt")
    for name in ("cpu", "cuda"):
        assert not gpu_stages.built()
        (tmp_path / "moe_unlearn" / f"_C_{name}.abi3.so").touch()
    assert not gpu_stages.built()
    gpu_stages.BUILT.write_text(gpu_stages.sources_hash() + "\n", encoding="utf-8")
    assert gpu_stages.built()
    source.write_text("two", encoding="utf-8")
    assert not gpu_stages.built()


def test_a_bare_checkout_is_not_taken_for_installed(monkeypatch):
    assert gpu_install.installed()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert not gpu_install.installed()


@pytest.mark.quick
@pytest.mark.parametrize(
    "output,status,expected",
    [
        ("========= COMPUTE-SANITIZER\n========= ERROR SUMMARY: 0 errors\n", 0, {"errors": 0, "complete": True}),
        ("========= COMPUTE-SANITIZER\n========= Invalid __global__ read\n", None, {"errors": 1, "complete": False}),
        ("========= COMPUTE-SANITIZER\n5 passed\n", None, {"errors": 0, "complete": False}),
        ("========= Error: Device not supported\n", 1, {"unavailable": "compute-sanitizer refuses this device"}),
        ("Segmentation fault\n", -11, {"unavailable": "it did not attach: Segmentation fault"}),
    ],
)
def test_the_sanitizer_s_verdict(output, status, expected):
    found = gpu_sanitizer.verdict(output, status)
    assert {key: found[key] for key in expected} == expected


@pytest.mark.slow
@pytest.mark.parametrize("output,failed", [("ERROR SUMMARY: 0 errors", 0), ("ERROR SUMMARY: 2 errors", 1)])
def test_what_memcheck_finds_is_a_failure_whatever_the_tests_say(output, failed, tmp_path):
    journal = Journal(tmp_path / "gpu-1-x.jsonl", "sanitizer")
    call = f"s.conduct(Journal({str(journal.path)!r}, 'sanitizer'), ['echo', '========= {output}'])"
    program = (
        f"import sys; from tests import gpu_sanitizer as s; from benchmarks.journal import Journal; sys.exit({call})"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == failed and output in done.stdout
    lines = read(journal.path)
    assert of_kind(lines, "note")[0]["sanitizer"]["tool"] == "memcheck" and len(of_kind(lines, "test")) == failed
