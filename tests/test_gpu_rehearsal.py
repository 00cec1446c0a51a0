"""The rehearsal of a GPU machine: what it copies, finds, refuses and says, without the gigabytes it installs."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from moe_unlearn import backend, native
from tests import gpu_load, gpu_rehearsal
from tests.gpu_rehearsal import Failure, NotToBeHad, Place
from tests.support.sources import ROOT


@pytest.fixture
def place(tmp_path):
    """One with sources of its own, and nothing installed."""
    made = Place(tmp_path / "rehearsal", tmp_path / "source")
    made.tree.mkdir(parents=True)
    made.source.mkdir()
    return made


@pytest.mark.quick
@pytest.mark.skipif(shutil.which("git") is None, reason="there is no git")
def test_the_copy_is_what_git_takes_along_and_keeps_what_was_built_in_it(place):
    files = {
        "kept.py": "1",
        "changed.py": "1",
        "gone.py": "1",
        "new folder/new.py": "1",
        ".gitignore": "*.so\n",
        "x.so": "",
    }
    for name, text in files.items():
        (place.source / name).parent.mkdir(exist_ok=True)
        (place.source / name).write_text(text, encoding="utf-8")
    subprocess.run(["git", "init", "-q", place.source], check=True)
    gpu_rehearsal.copy_sources(place)
    assert (place.tree / "new folder/new.py").is_file() and not (place.tree / "x.so").exists()
    (place.tree / "built.so").touch()
    before = (place.tree / "kept.py").stat().st_mtime_ns
    (place.source / "gone.py").unlink()
    (place.source / "changed.py").write_text("2", encoding="utf-8")
    gpu_rehearsal.copy_sources(place)
    assert {p.name for p in place.tree.iterdir()} == {"kept.py", "changed.py", "new folder", ".gitignore", "built.so"}
    assert (place.tree / "changed.py").read_text(encoding="utf-8") == "2"
    assert (place.tree / "kept.py").stat().st_mtime_ns == before


@pytest.mark.quick
@pytest.mark.parametrize(
    "error,status,said",
    [
        (Failure("the log\nits end"), 1, "gpu-rehearsal: build FAILED\nthe log\nits end\n"),
        (NotToBeHad("an nvcc"), 3, "gpu-rehearsal: not run, this machine has not: an nvcc\n"),
        (None, 0, "load"),
    ],
)
def test_a_part_that_fails_ends_it_and_what_is_not_to_be_had_is_one_line(
    place, monkeypatch, capsys, error, status, said
):
    def build(place):
        if error:
            raise error
        return "built"

    monkeypatch.setattr(gpu_rehearsal, "copy_sources", lambda place: None)
    monkeypatch.setattr(gpu_rehearsal, "PARTS", {"build": build, "load": lambda place: "loaded"})
    assert gpu_rehearsal.rehearse(place, ["build", "load"]) == status
    output = capsys.readouterr().out
    assert said in output and ("loaded" in output) == (error is None)


@pytest.mark.quick
def test_a_command_that_fails_is_shown_with_its_end(place):
    text = place.run("good", sys.executable, "-c", "import os; print(os.getcwd(), os.environ.get('TRITON_INTERPRET'))")
    assert text == f"{place.tree} None\n"
    with pytest.raises(Failure, match=r"bad\.log: exit status 7\nthe end"):
        place.run("bad", sys.executable, "-c", "print('the end'); raise SystemExit(7)")


@pytest.fixture
def scripted(monkeypatch):
    """Place.run answers with {log: output or error}."""
    answers = {}

    def run(self, log, *command, **variables):
        answer = answers.get(log, "")
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(Place, "run", run)
    monkeypatch.setattr(gpu_rehearsal, "python312", lambda: "python3.12")
    monkeypatch.setattr(gpu_rehearsal.shutil, "which", lambda name: name)
    return answers


@pytest.mark.quick
def test_a_torch_that_cannot_be_had_is_told_from_a_build_that_breaks(place, scripted):
    scripted |= {"cuda": "13.0\n"}
    assert gpu_rehearsal.install(place).startswith("torch==2.11.0, triton==3.6.0")
    scripted |= {"cuda": "None\n"}
    with pytest.raises(NotToBeHad, match="torch==2.11.0 is here without CUDA"):
        gpu_rehearsal.install(place)
    (place.folder / "installed.json").write_text("[]", encoding="utf-8")
    scripted |= {"install": Failure("install.log: exit status 1\nERROR: No matching distribution found")}
    with pytest.raises(NotToBeHad, match="torch==2.11.0: ERROR: No matching distribution found"):
        gpu_rehearsal.install(place)
    assert not (place.folder / "installed.json").exists()
    scripted |= {"install": Failure("install.log: exit status 1\nERROR: ResolutionImpossible")}
    with pytest.raises(Failure, match="ResolutionImpossible"):
        gpu_rehearsal.install(place)
    scripted |= {"build": Failure("nvcc fatal")}
    with pytest.raises(Failure, match="nvcc fatal"):
        gpu_rehearsal.build(place)
    (place.tree / "moe_unlearn").mkdir()
    (place.tree / "moe_unlearn" / "_C_cpu.abi3.so").touch()
    scripted |= {"build": "done"}
    with pytest.raises(Failure, match=r"left \['_C_cpu'\]"):
        gpu_rehearsal.build(place)


@pytest.mark.quick
def test_libraries_and_cache_are_packed_where_the_gpu_machine_looks(place, monkeypatch):
    for folder in (place.tree / "moe_unlearn", place.source / "moe_unlearn", place.cache / "HASH"):
        folder.mkdir(parents=True)
    (place.tree / "moe_unlearn" / "_C_cuda.abi3.so").write_text("new", encoding="utf-8")
    (place.tree / "moe_unlearn" / "_C_sources.txt").write_text("hash", encoding="utf-8")
    (place.source / "moe_unlearn" / "_C_cuda.abi3.so").write_text("old", encoding="utf-8")
    for name in ("kernel.cubin", "kernel.json", "kernel.ptx", "kernel.ttir", "__grp__kernel.json"):
        (place.cache / "HASH" / name).write_text("{}", encoding="utf-8")
    packed = place.source / gpu_rehearsal.PACKED
    (packed / "STALE").mkdir(parents=True)
    gpu_rehearsal.pack(place)
    assert (place.source / "moe_unlearn" / "_C_cuda.abi3.so").read_text(encoding="utf-8") == "new"
    assert {p.name for p in (place.source / "moe_unlearn").iterdir()} == {"_C_cuda.abi3.so", "_C_sources.txt"}
    found = {str(path.relative_to(packed)) for path in packed.rglob("*.*")}
    assert found == {f"HASH/{name}" for name in ("kernel.cubin", "kernel.json", "__grp__kernel.json")}
    group = json.loads((packed / "HASH" / "__grp__kernel.json").read_text(encoding="utf-8"))
    monkeypatch.chdir(place.source)  # as the stages do on another machine
    assert group["child_paths"].keys() == {"kernel.cubin", "kernel.json"}
    assert all(Path(path).is_file() and not Path(path).is_absolute() for path in group["child_paths"].values())


# ---- What would be skipped on a GPU --------------------------------------------------------------------------

COLLECTED = """
import pytest
import torch

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")

@pytest.fixture
def free():
    pytest.skip("the GPU is busy")

@pytest.mark.skipif(torch.cuda.get_device_capability()[0] == 9, reason="not for Hopper")
def test_marked(): ...

@pytest.mark.parametrize("arch", [80, 90])
def test_called(arch, free):
    if arch == 90:
        pytest.skip(f"tiles for sm_{arch} do not fit")
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "allowed,refused",
    [
        ("busy|Hopper|tiles for sm_\\d+ do", []),
        ("busy|tiles", ["'not for Hopper' in test_x.py::test_marked"]),
        ("hopper|BUSY", ["'tiles for sm_0 do not fit' in "]),
        ("Hopper|tiles", ["'the GPU is busy' in "]),
    ],
)
def test_a_reason_to_skip_that_is_not_allowed_on_a_gpu_is_found(tmp_path, allowed, refused):
    (tmp_path / "test_x.py").write_text(COLLECTED, encoding="utf-8")
    options = ["--collect-only", "-q", f"--rootdir={tmp_path}", "-c", os.devnull, "-p", "no:cacheprovider"]
    command = [sys.executable, "-m", "pytest", *options, "-p", "tests.gpu_pretend", f"--skips-allowed={allowed}"]
    done = subprocess.run([*command, tmp_path / "test_x.py"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == bool(refused), done.stdout + done.stderr
    assert "3 tests, 3 reasons to skip one" in done.stdout
    found = re.findall("not allowed on a GPU: (.*)", done.stdout)
    assert len(found) == len(refused) and all(
        line.startswith(start) for line, start in zip(found, refused, strict=True)
    )


# ---- What registers ------------------------------------------------------------------------------------------


@pytest.fixture
def ops_table():
    """The table of the README of the ops."""
    return gpu_load.ops_table((ROOT / gpu_load.PAGE).read_text(encoding="utf-8"))


@pytest.mark.quick
def test_the_table_and_the_sources_are_read(ops_table):
    assert set(ops_table) == {name.partition(".")[0] for name in backend.registered()}
    assert ops_table["gram"]["cuda"] == "–" and ops_table["route"]["cuda"].startswith("emulated")
    names = gpu_load.implemented(ROOT)
    assert {"route", "masked_adamw_", "expert_wgrad_adamw_"} <= set(names) and len(names) == len(set(names))


@pytest.mark.quick
def test_a_kernel_that_is_not_there_is_a_fault(ops_table, monkeypatch):
    """Both libraries seem to be there, with all that the table promises."""
    pytest.importorskip("triton")
    monkeypatch.setattr(native, "load", lambda name: "")
    monkeypatch.setattr(native, "report", lambda: ["cpu: built, avx512", "cuda: built"])
    monkeypatch.setattr(backend, "_kernels", dict(backend._kernels))
    for op, cells in ops_table.items():
        if cells["cuda"] != "–":
            backend.register(op, "cuda", print)
    monkeypatch.setattr(gpu_load, "registered_for_cuda", lambda name: name != "weight_score_mask")
    assert gpu_load.faults(ops_table, ["route"]) == []
    assert gpu_load.faults(ops_table, ["weight_score_mask"]) == ["weight_score_mask is not registered for CUDA"]
    changed = ops_table | {
        "route": ops_table["route"] | {"cuda": "–"},
        "gram": ops_table["gram"] | {"cuda": "compiled"},
    }
    assert gpu_load.faults(changed, []) == [
        "route has a cuda kernel; the table of ops says –",
        "gram has no cuda kernel; the table of ops says compiled",
    ]
    del changed["token_loss"]
    assert "token_loss stands in the table of ops or is registered, not both" in gpu_load.faults(changed, [])
    backend.register("route", "triton", "no_such_module:route")
    (line,) = (line for line in gpu_load.faults(ops_table, []) if "not usable" in line)
    assert line.startswith("triton is not usable for route: ModuleNotFoundError")
    monkeypatch.setattr(native, "report", lambda: ["cpu: built", "cuda: not loaded: no libcudart"])
    assert "native library cuda: not loaded: no libcudart" in gpu_load.faults(ops_table, [])


# ---- How it is started ---------------------------------------------------------------------------------------


@pytest.mark.quick
@pytest.mark.parametrize("target", ["gpu", "bench-gpu"])
@pytest.mark.parametrize("built", [(), ("_C_cpu",), ("_C_cpu", "_C_cuda")], ids=str)
def test_the_targets_for_a_gpu_install_the_checkout_first(tmp_path, target, built):
    """Without it there is no moe_unlearn.triton_kernels; what was built of these sources is not built again."""
    shutil.copy(ROOT / "Makefile", tmp_path)
    (tmp_path / "moe_unlearn").mkdir()
    for name in built:
        (tmp_path / "moe_unlearn" / f"{name}.abi3.so").touch()
    (tmp_path / "python").write_text('#!/bin/sh\necho "$MOE_UNLEARN_BUILD:" "$@"\n', encoding="utf-8")
    (tmp_path / "python").chmod(0o755)
    environment = {name: value for name, value in os.environ.items() if name != "MOE_UNLEARN_BUILD"}
    command = ["make", "--silent", target, f"PYTHON={tmp_path}/python"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    asked, install, kept, then, *_ = done.stdout.splitlines()
    build = "0" if len(built) == 2 else ""
    assert (asked, kept) == (": -m tests.gpu_stages", ": -m tests.gpu_stages --built")
    assert install == f"{build}: -m pip install --no-index --no-deps --no-build-isolation --editable ."
    assert " -m " in then
    forced = subprocess.run(
        command,
        cwd=tmp_path,
        env=environment | {"MOE_UNLEARN_BUILD": "cuda"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "\ncuda: -m pip" in forced.stdout
    (tmp_path / "python").write_text(
        '#!/bin/sh\necho "$MOE_UNLEARN_BUILD:" "$@"\n[ "$*" != "-m tests.gpu_stages" ]\n', encoding="utf-8"
    )
    stale = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    assert "\n: -m pip install" in stale.stdout and not list(tmp_path.rglob("*.so"))


def test_without_git_there_is_no_rehearsal(tmp_path, capsys):
    place = Place(tmp_path / "folder", tmp_path / "source")
    place.source.mkdir()
    assert gpu_rehearsal.rehearse(place, ["install"]) == 3
    assert "this machine has not: a git checkout" in capsys.readouterr().out


@pytest.mark.quick
@pytest.mark.parametrize("status,goes_on", [(0, True), (3, True), (1, False), (2, False)])
def test_a_break_of_the_gpu_build_fails_ci_and_a_machine_without_its_torch_does_not(tmp_path, status, goes_on):
    (tmp_path / ".ci").mkdir()
    shutil.copy(ROOT / ".ci" / "run", tmp_path / ".ci")
    (tmp_path / "bin").mkdir()
    for name, text in {"make": "echo make $1", "python3": f'echo "$@"; exit {status}'}.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/sh\n{text}\n", encoding="utf-8")
        (tmp_path / "bin" / name).chmod(0o755)
    environment = os.environ | {"PATH": os.pathsep.join([str(tmp_path / "bin"), os.environ["PATH"]])}
    done = subprocess.run(["bash", ".ci/run"], cwd=tmp_path, env=environment, capture_output=True, text=True)
    said = ["make lint", "-m tests.gpu_rehearsal --parts install,build,load,compile"]
    said += ["make extremes", "make test"] * goes_on
    assert (done.stdout.splitlines(), bool(done.returncode)) == (said, not goes_on)
