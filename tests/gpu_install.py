"""The first stage on a GPU machine: the package installed offline, its libraries loaded, the device described.

    python -m tests.gpu_install --journal FILE

Lines: the stamp first, then one for each of what follows, so that a run that fails here says at what. Libraries that
lie beside the package are taken as they are, else they are built with all cores. Nothing is fetched.
"""

import argparse
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks import stamp
from benchmarks.journal import Journal
from tests.gpu_stages import ROOT, WHEELS, built

OFFLINE = (sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps")
CLOCKS = "name,driver_version,clocks.sm,clocks.max.sm,clocks.mem,power.limit,temperature.gpu,memory.total"


def wheels() -> list[str]:
    """The wheels that travelled here and whose package is not installed."""
    return [str(path) for path in sorted(WHEELS.glob("*.whl")) if importlib.util.find_spec(module_of(path)) is None]


def module_of(wheel: Path) -> str:
    """Name the module of a wheel: as the wheel is named, but for those whose module has another name."""
    name = wheel.name.partition("-")[0]
    return {"pytest_xdist": "xdist"}.get(name, name)


def installation() -> list[str]:
    """The command that installs this checkout: make's, which takes two libraries that are there as they are."""
    return ["make", "--silent", "gpu-install", f"PYTHON={sys.executable}"]


def loaded(device: str) -> dict:
    """{"libraries": a line for each, "implementations": those of each kernel that can be imported, "faults": lines}"""
    import moe_unlearn.triton_kernels  # noqa: F401 -- not there: the package is not installed
    from moe_unlearn import backend, native, ops  # noqa: F401 -- registers the kernels
    from tests import gpu_load

    found = {name: list(backend.available(name, device)) for name in backend.registered()}
    faults = gpu_load.faults(*gpu_load.promised()) if device == "cuda" else []
    return {"libraries": native.report(), "implementations": found, "faults": faults}


def installed() -> bool:
    """Whether the package is there with its Triton kernels, as it is not in a bare checkout."""
    try:
        return importlib.util.find_spec("moe_unlearn.triton_kernels") is not None
    except ImportError:
        return False


def step(journal: Journal, what: str, command: Sequence[str]) -> str | None:
    """Run a command and write what it was and how it ended; returns its output, None where it failed."""
    start, output, status = time.monotonic(), [], None
    try:
        # in the session of this stage, so that a compiler ends with it
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
        )
        for line in process.stdout:
            print(line, end="", flush=True)
            output.append(line)
        status = process.wait()
    except OSError as error:
        output.append(str(error))
    outcome, why = ("passed", "") if status == 0 else ("failed", "".join(output[-15:]).strip())
    journal.write("test", name=what, outcome=outcome, seconds=round(time.monotonic() - start, 1), why=why)
    return "".join(output) if status == 0 else None


def conduct(journal: Journal, device: str) -> int:
    """Install, load, describe; returns 1 where something that the other stages need is not there."""
    journal.write("stamp", stamp=stamp.stamp())
    ready = True
    if found := wheels():
        ready &= step(journal, "wheels", [*OFFLINE, *found]) is not None
    if built() and installed():
        journal.write("note", installed="already")
    else:
        ready &= step(journal, "install", installation()) is not None
    # a process of its own sees the package as it was installed a moment ago
    report = step(journal, "load", [sys.executable, "-m", "tests.gpu_install", "--load", "--device", device])
    if report is None:
        return 1
    known = json.loads([line for line in report.splitlines() if line.startswith('{"libraries"')][-1])
    journal.write("note", **known)
    for what in known["faults"]:
        journal.write("test", name=f"load: {what}", outcome="failed", seconds=0.0, why=what)
        ready = False
    journal.write("note", triton_cache=cached(), processors=os.cpu_count(), **tools())
    return int(not ready)


def tools() -> dict[str, object]:
    """Ask the machine for its tools and clocks, as far as it tells."""
    found: dict[str, object] = {name: shutil.which(name) for name in ("nvcc", "ninja", "compute-sanitizer")}
    if shutil.which("nvidia-smi"):
        command = ["nvidia-smi", f"--query-gpu={CLOCKS}", "--format=csv,noheader"]
        done = subprocess.run(command, capture_output=True, text=True)
        found["clocks"] = dict(zip(CLOCKS.split(","), map(str.strip, done.stdout.split(",")), strict=False))
    return found


def cached() -> int:
    """How many kernels Triton's cache holds."""
    folder = Path(os.environ.get("TRITON_CACHE_DIR") or Path.home() / ".triton" / "cache")
    return sum(1 for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--journal")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--load", action="store_true", help="print what is loaded, and no more")
    options = parser.parse_args()
    if options.load:
        print(json.dumps(loaded(options.device)))
        return 0
    if not options.journal:
        parser.error("--journal: expected the file of the run; got none")
    return conduct(Journal(options.journal, "install"), options.device)


if __name__ == "__main__":
    sys.exit(main())
