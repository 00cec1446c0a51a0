"""What a GPU machine would do, as far as it can be done without one: `make gpu-rehearsal`.

    python -m tests.gpu_rehearsal                                all parts
    python -m tests.gpu_rehearsal --parts install,build,load     some of them, in the order below

In an environment of its own, with the versions below and Python 3.12, and on a copy of what git would take along:

    install   the environment, several gigabytes; kept until the versions change
    build     the package by `make gpu-install`, with both libraries
    load      the libraries, and a kernel for CUDA of every op that the table of ops gives one
    compile   the layer under torch.compile
    collect   exactly the tests that `make gpu` runs; fails on a reason to skip one that is not on its list
    tests     tests/ops, the CPU kernels, and some Triton kernels in this Triton's interpreter
    kernels   for sm_90, into a cache, every Triton kernel that smoke, matrix and ops of both commands launch
    pack      libraries and cache to where `make gpu` finds them
    plan      what `make gpu` and `make bench-gpu` would do

All is below build/gpu-rehearsal, a log for each part too. Exit status: 0 all passed, 1 a part failed, 3 not to be had
here: no Python 3.12, no such torch, no CUDA toolkit. Only the standard library is needed to start it.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.gpu_stages import ROOT, TRITON_CACHE, libraries

VERSIONS = {"torch": "2.11.0", "triton": "3.6.0", "transformers": "5.17.*", "numpy": "2.5.*"}
# of the build, and of the tests
TOOLS = ("setuptools>=77", "ninja", "pytest", "hypothesis", "scipy")
PYTHON = (3, 12)
PACKED = TRITON_CACHE.relative_to(ROOT)
SECONDS = 3600.0  # that no command takes
# pip's words where an index lacks a package or cannot be reached; any other failure is one
UNREACHABLE = (
    "No matching distribution",
    "Could not find a version",
    "Max retries exceeded",
    "Connection",
    "timed out",
)
WITHOUT_GPU = ("--impl=ref", "--impl=cpu")
CPU_TESTS = ("tests/ops", *WITHOUT_GPU, "tests/native", "--deselect=tests/native/test_cuda.py")
INTERPRETER = "numpy==2.3.*"
# the smallest kernels, and those with products
INTERPRETED = (
    *(f"tests/triton_kernels/test_{name}.py" for name in ("common", "route", "gram")),
    *(f"tests/ops/{op}" for op in ("route", "gram")),
    "--impl=triton",
)
COMPILED_LAYER = ("tests/ops", *WITHOUT_GPU, "tests/test_experts.py", "-k", "compil")


class Failure(Exception):
    """Why a part failed."""


class NotToBeHad(Exception):
    """A rehearsal needs something that this machine lacks; the message names it."""


@dataclass(frozen=True)
class Place:
    """Where a rehearsal happens."""

    folder: Path
    source: Path = ROOT

    @property
    def python(self) -> Path:
        """The environment's own."""
        return self.folder / "venv" / "bin" / "python"

    @property
    def tree(self) -> Path:
        """The copy of the sources."""
        return self.folder / "tree"

    @property
    def cache(self) -> Path:
        """Triton's."""
        return self.folder / "triton-cache"

    def run(self, log: str, *command: str | Path, **variables: str) -> str:
        """The output of a command in the copy, which also goes to a log. Raises Failure if it fails."""
        dropped = {"TRITON_INTERPRET", "PYTHONPATH", "VIRTUAL_ENV", "MAKEFLAGS", "MAKELEVEL"}
        environment = {name: value for name, value in os.environ.items() if name not in dropped}
        environment |= {"PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1", **variables}
        path = self.folder / f"{log}.log"
        with path.open("a", encoding="utf-8") as output:
            done = subprocess.run(
                list(map(str, command)),
                cwd=self.tree,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                timeout=SECONDS,
            )
        text = path.read_text(encoding="utf-8", errors="replace")
        if done.returncode:
            last = "\n".join(text.splitlines()[-40:])
            raise Failure(f"{path}: exit status {done.returncode}\n{last}")
        return text

    def pytest(self, log: str, *arguments: str, **variables: str) -> str:
        """The last line of a run of pytest that passes."""
        text = self.run(log, self.python, "-m", "pytest", "-p", "no:cacheprovider", *arguments, **variables)
        return text.splitlines()[-1]


def install(place: Place) -> str:
    """An environment like that of the GPU machine."""
    wanted = [f"{name}=={version}" for name, version in VERSIONS.items()] + list(TOOLS)
    stamp = place.folder / "installed.json"
    if not (stamp.exists() and json.loads(stamp.read_text(encoding="utf-8")) == wanted):
        shutil.rmtree(place.python.parents[1], ignore_errors=True)
        stamp.unlink(missing_ok=True)
        place.run("venv", python312(), "-m", "venv", place.python.parents[1])
        try:
            place.run("install", place.python, "-m", "pip", "install", "--quiet", "--no-compile", *wanted)
        except Failure as error:
            if not any(text in str(error) for text in UNREACHABLE):
                raise
            raise NotToBeHad(f"{wanted[0]}: {str(error).splitlines()[-1]}") from error
        stamp.write_text(json.dumps(wanted), encoding="utf-8")
    if place.run("cuda", place.python, "-c", "import torch; print(torch.version.cuda)").split()[-1] == "None":
        raise NotToBeHad(f"{wanted[0]} is here without CUDA")
    return ", ".join(wanted[: len(VERSIONS)])


def python312() -> str:
    """A Python of the version that the GPU machine has."""
    installed = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv") / "versions"
    names = [sys.executable, "python3.12", *sorted(map(str, installed.glob("3.12.*/bin/python")), reverse=True)]
    for name in names:
        asked = [name, "-c", "import sys; print(*sys.version_info[:2])"]
        # a shim of pyenv is there for every version, and fails
        if shutil.which(name) and subprocess.run(asked, capture_output=True, text=True).stdout.split() == ["3", "12"]:
            return name
    raise NotToBeHad("a Python 3.12")


def build(place: Place) -> str:
    """Both libraries, as `make gpu` builds them."""
    # where setup.py looks
    if not (os.environ.get("CUDA_HOME") or shutil.which("nvcc") or Path("/usr/local/cuda").exists()):
        raise NotToBeHad("CUDA: no CUDA_HOME, no nvcc on the PATH, no /usr/local/cuda")
    text = place.run("build", "make", "gpu-install", f"PYTHON={place.python}", MOE_UNLEARN_BUILD="cuda")
    names = {path.name.split(".")[0] for path in libraries(place.tree)}
    if names != {"_C_cpu", "_C_cuda"}:
        raise Failure(f"the build left {sorted(names) or 'no library'}\n{text}")
    return ", ".join(f"{path.name} {path.stat().st_size / 1e6:.1f} MB" for path in libraries(place.tree))


def load(place: Place) -> str:
    """Everything registers."""
    return ", ".join(place.run("load", place.python, "-m", "tests.gpu_load").splitlines()[-3:])


def compile_layer(place: Place) -> str:
    """The layer under torch.compile, whose rules differ from version to version."""
    return place.pytest("compile", *COMPILED_LAYER)


def collect(place: Place) -> str:
    """The tests of the device matrix, with the marks of a GPU machine."""
    for name in ("arguments", "allowed", "collect"):
        (place.folder / f"{name}.log").unlink(missing_ok=True)
    arguments = place.run("arguments", place.python, "-m", "tests.gpu_run", "--list-tests").splitlines()
    ask = "from tests.gpu_run import SKIPS_ALLOWED; print(SKIPS_ALLOWED.pattern)"
    allowed = place.run("allowed", place.python, "-c", ask).splitlines()[-1]
    return place.pytest(
        "collect", "--collect-only", "-p", "tests.gpu_pretend", f"--skips-allowed={allowed}", *arguments
    )


def tests(place: Place) -> str:
    """Run the tests that need no GPU, on this torch and Triton."""
    # Triton 3.6's interpreter makes numbers of arrays with one dimension, which numpy refuses from 2.4 on
    older = place.folder / "numpy"
    if not older.is_dir():
        place.run("numpy", place.python, "-m", "pip", "install", "--quiet", "--no-deps", "--target", older, INTERPRETER)
    outcome = place.pytest("tests", *CPU_TESTS)
    return f"{outcome}; {place.pytest('interpreter', *INTERPRETED, PYTHONPATH=str(older))}"


def kernels(place: Place) -> str:
    """Compile for Hopper, with this Triton, what a GPU would be asked to launch."""
    figures = place.folder / "kernels.json"
    figures.unlink(missing_ok=True)
    compiling = ("-O", "-m", "moe_unlearn.regress.compile", "--arch=sm_90", "--compiler=triton")
    cache = {"TRITON_CACHE_DIR": str(place.cache)}
    place.run("kernels", place.python, *compiling, "--module=tests.gpu_launches", f"--json={figures}", **cache)
    found = json.loads(figures.read_text(encoding="utf-8"))
    ((version, by_arch),) = found["measured"].items()
    entries = by_arch["sm_90"]
    if broken := [f"{name}: {entry['error']}" for name, entry in entries.items() if "error" in entry]:
        raise Failure("\n".join(broken))
    return f"{len(entries)} for sm_90 by {version}"


def pack(place: Place) -> str:
    """Libraries and cache to where the stages look for them."""
    for library in libraries(place.tree):
        new = place.source / "moe_unlearn" / f"{library.name}.new"
        shutil.copy2(library, new)
        new.replace(place.source / "moe_unlearn" / library.name)  # a process may have the old one open
    shutil.copy2(place.tree / "moe_unlearn" / "_C_sources.txt", place.source / "moe_unlearn")
    target = place.source / PACKED
    shutil.rmtree(target, ignore_errors=True)
    # a kernel needs no more: the stages on the way to it are four fifths of the bytes
    shutil.copytree(
        place.cache, target, ignore=shutil.ignore_patterns("*.ttir", "*.ttgir", "*.llir", "*.ptx", "*.source")
    )
    for group in target.glob("*/__grp__*.json"):
        # Triton writes down where they lay; from the root of a checkout these paths hold anywhere
        children = {path.name: str(path.relative_to(place.source)) for path in group.parent.iterdir() if path != group}
        group.write_text(json.dumps({"child_paths": children}), encoding="utf-8")
    size = sum(path.stat().st_size for path in (*libraries(place.source), *target.rglob("*")) if path.is_file())
    return f"moe_unlearn/_C_* and {PACKED}, {size / 1e6:.0f} MB"


def plan(place: Place) -> str:
    """The stages of both commands, with their times."""
    return "\n" + place.run("plan", place.python, "-m", "tests.gpu_run", "--dry-run")


PARTS: dict[str, Callable[[Place], str]] = {
    "install": install,
    "build": build,
    "load": load,
    "compile": compile_layer,
    "collect": collect,
    "tests": tests,
    "kernels": kernels,
    "pack": pack,
    "plan": plan,
}


def copy_sources(place: Place) -> None:
    """Make the copy what git would take along, and leave alone what is built in it and what did not change."""
    try:
        listing = subprocess.run(
            ["git", "-C", place.source, "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
            check=True,
            capture_output=True,
        )
    except (OSError, subprocess.CalledProcessError) as error:
        raise NotToBeHad(f"a git checkout: {error}") from error
    names = {name for name in os.fsdecode(listing.stdout).split("\0") if name and (place.source / name).is_file()}
    kept = place.folder / "copied.json"
    former = set(json.loads(kept.read_text(encoding="utf-8"))) if kept.exists() else set()
    for name in former - names:
        (place.tree / name).unlink(missing_ok=True)
    for name in sorted(names):
        old, new = place.source / name, place.tree / name
        if not new.exists() or new.read_bytes() != old.read_bytes():
            new.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(old, new)
    kept.write_text(json.dumps(sorted(names)), encoding="utf-8")


def rehearse(place: Place, parts: Sequence[str]) -> int:
    """Run the parts until one fails, a line for each; returns the exit status."""
    place.tree.mkdir(parents=True, exist_ok=True)
    try:
        copy_sources(place)
    except NotToBeHad as error:
        return lacking(error)
    for part in parts:
        start = time.monotonic()
        (place.folder / f"{part}.log").unlink(missing_ok=True)
        try:
            said = PARTS[part](place)
        except NotToBeHad as error:
            return lacking(error)
        except (Failure, subprocess.TimeoutExpired) as error:
            print(f"gpu-rehearsal: {part} FAILED\n{error}", flush=True)
            return 1
        print(f"gpu-rehearsal: {part} {time.monotonic() - start:.0f} s: {said}", flush=True)
    return 0


def lacking(error: NotToBeHad) -> int:
    """Say what this machine has not; returns the exit status for it."""
    print(f"gpu-rehearsal: not run, this machine has not: {error}", flush=True)
    return 3


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", default=",".join(PARTS), help=f"with commas: {','.join(PARTS)}")
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "gpu-rehearsal")
    options = parser.parse_args(arguments)
    wanted = options.parts.split(",")
    if unknown := set(wanted) - PARTS.keys():
        parser.error(f"--parts: expected some of {','.join(PARTS)}; got {','.join(sorted(unknown))}")
    return rehearse(Place(options.folder.resolve()), [part for part in PARTS if part in wanted])


if __name__ == "__main__":
    sys.exit(main())
