"""Compile static cases in a process of its own and give figures, for GPUs that need not be there.

    python -m moe_unlearn.regress.compile --arch sm_90 [--kernels route] [--module PATH] [--recorded LEDGER] --json FILE

It is a process of its own because whether a module's kernels are interpreted or compiled is fixed at its import.
Kernels cannot be pickled, so the workers are forked when all launches are recorded. `static` starts the process.
"""

import argparse
import datetime
import fnmatch
import importlib
import importlib.util
import json
import multiprocessing
import os
import pkgutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from moe_unlearn.regress import launches, ledger, nvcc, sass
from moe_unlearn.regress.case import execute
from moe_unlearn.regress.ledger import Entries, Ledger
from moe_unlearn.regress.static_case import CudaCase, LaunchCase, TritonCase, registered

PROCESSES = 2
COMPILERS = ("triton", "nvcc")
PACKAGE = Path(__file__).resolve().parents[2]

_launches: list = []  # inherited by the forked workers


def run(
    architectures: Sequence[str],
    kernels: Sequence[str] = (),
    modules: Sequence[str] = (),
    recorded: Path | None = None,
    *,
    compilers: Sequence[str] = COMPILERS,
    triton_folder: Path | None = None,
    cache_folder: Path | None = None,
) -> tuple[Ledger, list[str]]:
    """Run `measure` in a fresh process, by `compilers`; `triton_folder` replaces the installed Triton.

    Triton keeps what it compiled in `cache_folder` (default: its usual place). Raises ValueError for a module
    that cannot be loaded or a folder without Triton, and RuntimeError with the process's output if it dies.
    """
    if triton_folder is not None and not Path(triton_folder, "triton").is_dir():
        raise ValueError(f"expected a folder that holds another Triton; there is none in {triton_folder}")
    command = [sys.executable, "-m", "moe_unlearn.regress.compile"]
    command += [f"--arch={arch}" for arch in architectures] + [f"--module={module}" for module in modules]
    command += [f"--compiler={compiler}" for compiler in compilers]
    command += [f"--kernels={kernel}" for kernel in kernels]
    command += [] if recorded is None else [f"--recorded={recorded}"]
    dropped = {"TRITON_INTERPRET", "MOE_UNLEARN_TRITON_ARCH"}
    path = [str(triton_folder.resolve())] if triton_folder else []
    path += [str(PACKAGE), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {name: value for name, value in os.environ.items() if name not in dropped}
    environment |= {"PYTHONPATH": os.pathsep.join(path), "OMP_NUM_THREADS": "1"}
    if cache_folder:
        environment["TRITON_CACHE_DIR"] = str(cache_folder)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "figures.json")
        done = subprocess.run([*command, f"--json={file}"], env=environment, capture_output=True, text=True)
        if done.returncode == _BAD_INPUT:
            raise ValueError(done.stderr.strip())
        if done.returncode:
            raise RuntimeError(f"the compiling process failed:\n{done.stdout}\n{done.stderr}")
        result = json.loads(file.read_text(encoding="utf-8"))
    return result["measured"], result["notes"]


def measure(
    architectures: Sequence[str],
    kernels: Sequence[str],
    modules: Sequence[str],
    recorded: Ledger,
    compilers: Sequence[str] = COMPILERS,
) -> tuple[Ledger, list[str]]:
    """Return the figures, and a line for every part that could not be compiled here.

    The cases are those that `modules` register, or ours if there are no modules. `kernels` selects entries by name,
    as in `selected`. An entry that is `recorded` with the same identity is not compiled again, except for one in ten.
    """
    for module in modules:
        execute(module) if module.endswith(".py") else importlib.import_module(module)
    notes: list[str] = []
    measured: Ledger = {}
    if modules and not registered():
        notes.append(f"{', '.join(modules)}: no static case is registered there")
    for compiler, compile_all in {"triton": _triton, "nvcc": _nvcc}.items():
        if compiler in compilers:
            compile_all(architectures, kernels, bool(modules), recorded, measured, notes)
    return measured, notes


def selected(name: str, kernels: Sequence[str]) -> bool:
    """Return whether an entry is chosen: by a pattern with * and ?, by the first parts of its name, or by no choice."""
    return not kernels or any(
        fnmatch.fnmatchcase(name, kernel) or f"{name}/".startswith(f"{kernel.rstrip('/')}/") for kernel in kernels
    )


def resampled(identity: str, day: int) -> bool:
    """Return whether this launch is compiled today although nothing changed; its turn comes on one day in ten."""
    return (int(identity, 16) + day) % 10 == 0


def _triton(
    architectures: Sequence[str],
    kernels: Sequence[str],
    foreign: bool,
    recorded: dict[str, dict[str, Entries]],
    measured: dict[str, dict[str, Entries]],
    notes: list[str],
) -> None:
    if importlib.util.find_spec("triton") is None:
        notes.append("Triton kernels are left out: Triton is not installed; pip install moe-unlearn[triton]")
        return
    try:
        sass.disassembler()
    except sass.NoDisassembler as error:
        notes.append(f"Triton kernels are left out: {error}")
        return
    cases = [("", case) for case in registered().values() if not isinstance(case, CudaCase)] if foreign else _ours()
    if cases:
        from moe_unlearn.regress import triton_private

        numbers = tuple(dict.fromkeys(ledger.capability(arch) for arch in architectures))
        version = triton_private.VERSION
        measured[version] = _measure_triton(cases, numbers, kernels, recorded.get(version, {}))


def _nvcc(
    architectures: Sequence[str],
    kernels: Sequence[str],
    foreign: bool,
    recorded: dict[str, dict[str, Entries]],
    measured: dict[str, dict[str, Entries]],
    notes: list[str],
) -> None:
    cases = [c for c in registered().values() if isinstance(c, CudaCase)] if foreign else nvcc.ours()
    if not foreign and not cases:
        notes.append("our CUDA kernels are left out: their sources, csrc/cuda, come with a checkout only")
    elif cases and nvcc.compiler() is None:
        notes.append("CUDA kernels are left out: there is no nvcc")
    elif cases:
        # the architecture that setup.py builds for Hopper
        names = architectures if foreign else [f"{a}a" if a == "sm_90" else a for a in architectures]
        version = nvcc.version()
        measured[version] = _measure_cuda(cases, names, kernels, recorded.get(version, {}))


def _ours() -> list[tuple[str, TritonCase | LaunchCase]]:
    """Return (op, case) of every module of `launches`."""
    ops = sorted(module.name for module in pkgutil.iter_modules(launches.__path__))
    made = [(op, importlib.import_module(f"{launches.__name__}.{op}").CASES) for op in ops]
    return [(op, LaunchCase(name, launch)) for op, cases in made for name, launch in cases.items()]


def _measure_triton(
    cases: list[tuple[str, TritonCase | LaunchCase]],
    numbers: tuple[int, ...],
    kernels: Sequence[str],
    recorded: dict[str, Entries],
) -> dict[str, Entries]:
    """Compile the Triton cases and return their figures by architecture and entry.

    A case that launches a kernel in several specialisations numbers them; a specialisation that several cases
    launch belongs to the first. A case of another op than the kernel's file is named with its op.
    """
    from moe_unlearn.regress import triton_private

    names: list[tuple[str, str]] = []
    _launches.clear()
    for number in numbers:
        os.environ["MOE_UNLEARN_TRITON_ARCH"] = str(number)
        seen: set[str] = set()
        for op, case in cases:
            counts: dict[str, int] = {}
            for launch in triton_private.launches(case, number):
                if launch.identity in seen:
                    continue
                seen.add(launch.identity)
                count = counts[launch.name] = counts.get(launch.name, 0) + 1
                suffix = f" #{count}" if count > 1 else ""
                prefix = "" if not op or launch.name.startswith(f"{op}/") else f"{op}: "
                name = f"{launch.name}/{prefix}{case.name}{suffix}"
                if selected(name, kernels):
                    names.append((f"sm_{number}", name))
                    _launches.append(launch)
    known = [recorded.get(arch, {}).get(name, {}) for arch, name in names]
    today = datetime.date.today().toordinal()
    todo = [
        i
        for i, launch in enumerate(_launches)
        if known[i].get("identity") != launch.identity or resampled(launch.identity, today)
    ]
    with multiprocessing.get_context("fork").Pool(PROCESSES) as pool:
        compiled = dict(zip(todo, pool.map(_compile, todo, chunksize=1), strict=True))
    measured: dict[str, Entries] = {f"sm_{number}": {} for number in numbers}
    for i, (arch, name) in enumerate(names):
        measured[arch][name] = compiled.get(i, known[i])
    return measured


def _compile(index: int) -> dict:
    from moe_unlearn.regress import triton_private

    launch = _launches[index]
    try:
        figures = sass.read(*triton_private.compile_launch(launch))
    except Exception as error:
        message = str(error).strip() or repr(error)
        return {"config": launch.config, "error": f"{type(error).__name__}: {message}"}
    return {"config": launch.config, "identity": launch.identity, **figures}


def _measure_cuda(
    cases: list[CudaCase], architectures: Sequence[str], kernels: Sequence[str], recorded: dict[str, Entries]
) -> dict[str, Entries]:
    """Compile the CUDA cases and return their figures by architecture and entry.

    A file is compiled as a whole, unless its name alone rules it out.
    """
    wanted = [
        case
        for case in cases
        if not kernels or any(fnmatch.fnmatchcase(case.name, kernel.split("/")[0]) for kernel in kernels)
    ]
    tasks = [(case, arch) for arch in architectures for case in wanted]
    today = datetime.date.today().toordinal()

    def figures(task: tuple[CudaCase, str]) -> Entries:
        case, arch = task
        known = {name: e for name, e in recorded.get(arch, {}).items() if name.startswith(f"{case.name}/")}
        identity = nvcc.identity(case, arch)
        if {entry.get("identity") for entry in known.values()} == {identity} and not resampled(identity, today):
            return known
        try:
            return nvcc.measure(case, arch)
        except RuntimeError as error:
            return {f"{case.name}/": {"error": str(error)}}

    measured: dict[str, Entries] = {}
    with ThreadPoolExecutor(PROCESSES) as pool:
        for (_, arch), entries in zip(tasks, pool.map(figures, tasks), strict=True):
            chosen = {name: entry for name, entry in entries.items() if selected(name, kernels)}
            measured.setdefault(arch, {}).update(chosen)
    return measured


_BAD_INPUT = 2


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", action="append", required=True, help="sm_90; may be repeated")
    parser.add_argument("--compiler", action="append", choices=COMPILERS, help="default: all")
    parser.add_argument("--kernels", action="append", default=[], help="a pattern, or the first parts of a name")
    parser.add_argument("--module", action="append", default=[], help="a user's cases instead of ours")
    parser.add_argument("--recorded", type=Path, help="a ledger, to leave out what is there")
    parser.add_argument("--json", type=Path, required=True, help="where the figures go")
    options = parser.parse_args()
    recorded = ledger.read(options.recorded) if options.recorded else {}
    try:
        measured, notes = measure(
            options.arch, options.kernels, options.module, recorded, options.compiler or COMPILERS
        )
    except (ImportError, ValueError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return _BAD_INPUT
    options.json.write_text(json.dumps({"measured": measured, "notes": notes}), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
