"""The build of the native extension: what setup.py builds, what it says otherwise, and life without it."""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch

from moe_unlearn import backend, native
from moe_unlearn.ops import route
from tests.support.sources import ROOT, copy_sources

INDEX = torch.tensor([[1, 0]])


@pytest.fixture
def copy(tmp_path):
    """The sources without anything built."""
    return copy_sources(tmp_path)


def build(folder, *arguments, command=("build_ext", "--inplace"), **environment):
    process = subprocess.run(
        [sys.executable, *arguments, "setup.py", *command],
        cwd=folder,
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )
    return process.returncode, process.stdout + process.stderr


def said(output):
    return [line for line in output.splitlines() if line.startswith("moe-unlearn: native library")]


@pytest.mark.quick
def test_the_library_needs_no_python_and_one_torch_library():
    """The stable ABI: no symbol of libtorch_python, none of C++ torch that may change."""
    if native.load("cpu"):
        pytest.skip(native.load("cpu"))
    (path,) = Path(native.__file__).parent.glob("_C_cpu*.so")
    if shutil.which("nm") is None:
        pytest.skip("no nm")
    listing = subprocess.run(["nm", "-D", "--undefined-only", path], capture_output=True, text=True, check=True).stdout
    symbols = [line.split()[-1] for line in listing.splitlines()]
    assert not [s for s in symbols if s.startswith(("Py", "_Py"))]
    # mangled names of namespaces c10, at and torch
    assert not [s for s in symbols if s.startswith(("_ZN3c10", "_ZNK3c10", "_ZN2at", "_ZNK2at", "_ZN5torch"))]
    assert "torch_parallel_for" in symbols
    assert path.name == "_C_cpu.abi3.so"


@pytest.mark.quick
def test_report_and_instruction_sets():
    lines = native.report()
    assert [line.split(":")[0] for line in lines] == list(native.LIBRARIES)
    if native.load("cpu"):
        pytest.skip(native.load("cpu"))
    best = native.instruction_set("")
    try:
        assert native.instruction_set("baseline") == "baseline" == native.instruction_set()
        with pytest.raises(RuntimeError, match="no instruction set is called mmx"):
            native.instruction_set("mmx")
    finally:
        assert native.instruction_set("") == best
    assert lines[0] == f"cpu: built, {best}, {native.narrow_products()} bfloat16 products"


@pytest.mark.quick
def test_narrow_products_suit_the_cpu_and_its_instruction_sets():
    """AMX, and AMD's pairs, are faster than float32's multiply-add; what is asked for comes before what suits."""
    if native.load("cpu"):
        pytest.skip(native.load("cpu"))
    about = Path("/proc/cpuinfo").read_text(encoding="utf-8") if Path("/proc/cpuinfo").exists() else ""
    flags = set(next((line for line in about.splitlines() if line.startswith("flags")), "").split())
    amd_pairs = "AuthenticAMD" in about and "avx512_bf16" in flags
    try:
        if native.instruction_set("avx2") != "avx2" or not flags:
            pytest.skip("a CPU that this test does not know")
        assert native.narrow_products("") == ("torch" if amd_pairs or "amx_bf16" in flags else "widened")
        for way in native.NARROW_PRODUCTS:
            assert native.narrow_products(way) == way == native.narrow_products()
        assert native.instruction_set("baseline") == "baseline" and native.narrow_products() == "torch"
        with pytest.raises(RuntimeError, match="no way of products is called fast"):
            native.narrow_products("fast")
        native.instruction_set("")
        pairs = "avx512_bf16" in flags and native.instruction_set() == "avx512"
        native.narrow_products("torch")
        assert native.has_pair_products() == pairs
        native.narrow_products("")
        assert native.has_pair_products() == (pairs and amd_pairs)
    finally:
        native.instruction_set("")
        native.narrow_products("")


@pytest.mark.quick
def test_every_native_schema_is_defined_in_one_file():
    for path in (ROOT / "csrc").rglob("*.cpp"):
        if path.name != "registration.cpp":
            assert "m.def(" not in path.read_text(encoding="utf-8"), f"{path} defines a schema"


@pytest.mark.quick
def test_source_files_are_short():
    sources = [p for p in (ROOT / "csrc").rglob("*") if p.suffix in (".cpp", ".h", ".cu", ".cuh")]
    assert sources and all(len(p.read_text(encoding="utf-8").splitlines()) <= 400 for p in sources)
    assert all(len(line) <= 120 for p in sources for line in p.read_text(encoding="utf-8").splitlines())


WITHOUT = """
import torch
from moe_unlearn import backend, native
from moe_unlearn.ops import route
index = torch.tensor([[1, 0]])
assert route(index, 2).expert_offsets.tolist() == [0, 1, 2]
assert backend.choose("route", "auto", "cpu") == "ref"
try:
    route(index, 2, impl="cpu")
except RuntimeError as error:
    print(error)
print(native.report()[0])
"""


@pytest.mark.slow
def test_without_the_library_auto_is_ref_and_cpu_is_an_error(copy):
    process = subprocess.run(
        [sys.executable, "-c", WITHOUT],
        cwd=copy,
        env=os.environ | {"PYTHONPATH": str(copy)},
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr
    error, report = process.stdout.splitlines()
    assert error.startswith("'route' has no implementation cpu for device 'cpu'; available:")
    assert report.startswith("cpu: not built: `pip install --no-build-isolation .`")


@pytest.mark.slow
def test_nothing_is_built_on_request_and_an_unknown_request_is_named(copy):
    code, output = build(copy, MOE_UNLEARN_BUILD="0")
    told = [f"moe-unlearn: native library {name}: not built: MOE_UNLEARN_BUILD=0" for name in ("cpu", "cuda")]
    assert code == 0 and said(output) == told
    assert not list(copy.rglob("_C_*.so"))
    code, output = build(copy, MOE_UNLEARN_BUILD="gpu")
    assert code == 1 and "MOE_UNLEARN_BUILD must be 0, cpu or cuda; got 'gpu'" in output


AS_WITH_CUDA = """
import os, runpy, sys
import torch
from torch.utils import cpp_extension

def cuda_extension(name, sources, extra_compile_args, **options):
    assert sources and extra_compile_args["nvcc"], "a build of kernels"
    flags = extra_compile_args["cxx"]
    return cpp_extension.CppExtension(name, ["csrc/registration.cpp"], extra_compile_args=flags, **options)

torch.version.cuda = "13.0"
cpp_extension.CUDAExtension = cuda_extension
sys.argv = ["setup.py", "build_ext", "--inplace"]
runpy.run_path("setup.py", run_name="__main__")
print("CUDA_HOME", os.environ["CUDA_HOME"])
"""


def build_as_with_cuda(folder, **environment):
    """Run setup.py as a torch with CUDA would, with C++ in the kernels' place and one empty source of it."""
    (folder / "csrc" / "registration.cpp").write_text("int nothing;\n", encoding="utf-8")
    for path in (folder / "csrc" / "cpu").glob("*.cpp"):
        path.unlink()
    environment = os.environ | {"MOE_UNLEARN_BUILD": "cuda", "CUDA_HOME": "", "CUDA_PATH": ""} | environment
    done = subprocess.run(
        [sys.executable, "-c", AS_WITH_CUDA], cwd=folder, env=environment, capture_output=True, text=True
    )
    return done.returncode, done.stdout + done.stderr


@pytest.fixture
def toolkit(tmp_path):
    """A folder of CUDA, and on the PATH a script that calls the nvcc in it."""
    home = tmp_path / "toolkit"
    (home / "include").mkdir(parents=True)
    (home / "include" / "cuda_runtime.h").touch()
    script = tmp_path / "bin" / "nvcc"
    script.parent.mkdir()
    script.write_text(f"#!/bin/sh\necho '#$ _HERE_=there' >&2\necho '#$ TOP={home}/bin/..' >&2\n", encoding="utf-8")
    script.chmod(0o755)
    (home / "bin").mkdir()
    return home, os.pathsep.join([str(script.parent), os.environ["PATH"]])


@pytest.mark.slow
def test_both_libraries_are_built_with_the_toolkit_that_nvcc_names(copy, toolkit):
    home, path = toolkit
    code, output = build_as_with_cuda(copy, PATH=path)
    assert code == 0, output
    assert [line.rpartition(" library ")[2] for line in said(output)] == ["cpu: built", "cuda: built"]
    assert f"CUDA_HOME {home}" in output
    assert {p.name for p in (copy / "moe_unlearn").glob("*.so")} == {"_C_cpu.abi3.so", "_C_cuda.abi3.so"}


@pytest.mark.slow
def test_a_folder_without_the_headers_of_cuda_is_named_before_anything_is_compiled(copy, toolkit):
    _, path = toolkit
    code, output = build_as_with_cuda(copy, PATH=path, CUDA_HOME=str(copy))
    assert code != 0 and "cuda not built: no include/cuda_runtime.h where CUDA_HOME or nvcc points" in output
    assert not list(copy.rglob("_C_*.so"))


@pytest.mark.quick
def test_no_source_needs_headers_newer_than_the_oldest_torch():
    """The macro came after torch 2.11; `make gpu-rehearsal` compiles against an older torch."""
    for path in (ROOT / "csrc").rglob("*.*"):
        assert "STABLE_TORCH_ERROR_CODE_CHECK" not in path.read_text(encoding="utf-8"), path


@pytest.mark.slow
def test_an_isolated_build_says_how_to_build(copy):
    """An isolated build has setuptools but no torch: -S leaves out site-packages."""
    import setuptools

    path = copy / "without_torch"
    path.mkdir()
    (path / "setuptools").symlink_to(Path(setuptools.__file__).parent)
    for name in ("_distutils_hack", "pkg_resources"):
        source = Path(sysconfig.get_paths()["purelib"], name)
        if source.exists():
            (path / name).symlink_to(source)
    code, output = build(copy, "-S", PYTHONPATH=str(path), MOE_UNLEARN_BUILD="")
    assert code == 0, output
    for line in said(output):
        assert "no torch at build time" in line and "--no-build-isolation" in line
    assert (copy / "moe_unlearn" / "_C_build.txt").read_text(encoding="utf-8").count("no torch at build time") == 2


@pytest.mark.slow
@pytest.mark.parametrize("reason", ["no compiler", pytest.param("broken source", marks=pytest.mark.nightly)])
def test_a_failing_build_says_one_line_and_leaves_the_package_usable(copy, reason):
    # without CUDA, also where torch has it: kernels take a minute
    environment = {"MOE_UNLEARN_BUILD": "", "CUDA_HOME": str(copy)}
    expected = "cpu: not built: no C++ compiler"
    if reason == "no compiler":
        environment["CXX"] = "there-is-no-such-compiler"
    else:
        (copy / "csrc" / "cpu" / "common.cpp").write_text("this is not C++\n", encoding="utf-8")
        for path in (copy / "csrc" / "cpu").glob("*.cpp"):
            if path.name != "common.cpp":
                path.unlink()
        expected = "cpu: not built: "
    code, output = build(copy, **environment)
    assert code == 0, output
    report = (copy / "moe_unlearn" / "_C_build.txt").read_text(encoding="utf-8")
    assert report.startswith(expected) and "cuda: not built: " in report
    assert any(expected.removeprefix("cpu: ") in line for line in said(output))
    process = subprocess.run(
        [sys.executable, "-c", WITHOUT],
        cwd=copy,
        env=os.environ | {"PYTHONPATH": str(copy)},
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr
    code, output = build(copy, **environment | {"MOE_UNLEARN_BUILD": "cpu"})
    assert code != 0 and "MOE_UNLEARN_BUILD=cpu: cpu not built: " in output


@pytest.mark.quick
def test_forcing_cpu_runs_the_library():
    if native.load("cpu"):
        with pytest.raises(RuntimeError, match="no implementation cpu"):
            route(INDEX, 2, impl="cpu")
    else:
        assert route(INDEX, 2, impl="cpu").expert_offsets.tolist() == [0, 1, 2]
        assert backend.choose("route", "auto", "cpu") == "cpu"
