"""Compile every launch of the static cases for a GPU that need not be there, and read what it costs.

    python -m tests.static.compile                        all ops, sm_80 sm_90 sm_100
    python -m tests.static.compile --op route --arch 90
    python -m tests.static.compile --triton DIR           with the Triton installed in DIR
    python -m tests.static.compile --json FILE            the figures, for the ledger
    python -m tests.static.compile --recorded             only what the ledger has not seen, and a rotating tenth

`tests/static/launches_<op>.py` holds CASES: name -> function that calls the op's launchers on empty CPU tensors
of production shapes. Launches are recorded, not run.
"""

import argparse
import dataclasses
import datetime
import importlib
import json
import multiprocessing
import os
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
LEDGER = HERE / "ledger.json"
ARCHITECTURES = (80, 90, 100)
PROCESSES = 2
COLUMNS = {
    "registers": "regs", "stack_bytes": "stack", "spills": "spill", "shared_bytes": "shared", "tensor_memory": "tmem",
    "hgmma": "HGMMA", "hmma": "HMMA", "utcmma": "UTCMMA", "tma": "TMA", "cp_async": "cp.async",
    "atomics": "atom", "float_atomics": "fp atom",
}  # fmt: skip

_launches: list = []  # inherited by the forked workers: kernels cannot be pickled


def operations() -> list[str]:
    """The ops that have static cases."""
    return sorted(path.stem.removeprefix("launches_") for path in HERE.glob("launches_*.py"))


def measure(
    modules: dict[str, str], architectures: tuple[int, ...], recorded: dict[str, dict[str, dict]] | None = None
) -> dict[str, dict[str, dict]]:
    """{"sm_90": {"file/kernel/case": {"config": ..., <figures>}}}; a compiler error stands under "error".

    modules: op -> module with CASES. A case that launches a kernel in several specialisations numbers them; a
    specialisation that several cases launch belongs to the first. A case of another op than the kernel's file
    is named with its op. What is `recorded` with the same identity is not compiled again, but for a tenth of it.
    """
    from tests.static import triton_private

    names: list[tuple[str, str]] = []
    _launches.clear()
    today = datetime.date.today().toordinal()
    for arch in architectures:
        os.environ["MOE_UNLEARN_TRITON_ARCH"] = str(arch)
        seen: set[str] = set()
        for op, module in modules.items():
            for case, function in importlib.import_module(module).CASES.items():
                counts: dict[str, int] = {}
                launches = triton_private.record(function, arch)
                if not launches:
                    raise ValueError(f"the static case {op}/{case} launches no kernel on sm_{arch}")
                for launch in launches:
                    if launch.identity in seen:
                        continue
                    seen.add(launch.identity)
                    number = counts[launch.name] = counts.get(launch.name, 0) + 1
                    suffix = f" #{number}" if number > 1 else ""
                    prefix = "" if launch.name.startswith(f"{op}/") else f"{op}: "
                    names.append((f"sm_{arch}", f"{launch.name}/{prefix}{case}{suffix}"))
                    _launches.append(launch)
    known = [(recorded or {}).get(arch, {}).get(name, {}) for arch, name in names]
    todo = [i for i, launch in enumerate(_launches)
            if known[i].get("identity") != launch.identity or resampled(launch.identity, today)]  # fmt: skip
    with multiprocessing.get_context("fork").Pool(PROCESSES) as pool:
        compiled = dict(zip(todo, pool.map(_compile, todo, chunksize=1), strict=True))
    measured: dict[str, dict[str, dict]] = {f"sm_{arch}": {} for arch in architectures}
    for i, (arch, name) in enumerate(names):
        measured[arch][name] = compiled.get(i, known[i])
    return measured


def resampled(identity: str, day: int) -> bool:
    """Whether it is this launch's day, one in ten, to be compiled although nothing changed."""
    return (int(identity, 16) + day) % 10 == 0


def _compile(index: int) -> dict:
    from tests.static import sass, triton_private

    launch = _launches[index]
    start = time.perf_counter()
    try:
        figures = sass.read(*triton_private.compile_launch(launch), triton_private.TOOLS)
    except Exception as error:
        message = str(error).strip() or repr(error)
        return {"config": launch.config, "error": f"{type(error).__name__}: {message}"}
    seconds = time.perf_counter() - start
    return {"config": launch.config, "identity": launch.identity, "seconds": seconds, **dataclasses.asdict(figures)}


def table(measured: dict[str, dict[str, dict]]) -> str:
    lines = []
    for arch, entries in measured.items():
        width = max(map(len, entries), default=0)
        lines += ["", f"{arch:<{width}}" + "".join(f"{c:>9}" for c in COLUMNS.values()) + "  seconds  config"]
        for name, entry in entries.items():
            if "error" in entry:
                lines.append(f"{name:<{width}}  {entry['config']}\n    {entry['error']}")
                continue
            cells = "".join(f"{entry[column] or '·':>9}" for column in COLUMNS)
            seconds = f"{entry['seconds']:.1f}" if "seconds" in entry else "-"
            lines.append(f"{name:<{width}}{cells}{seconds:>9}  {entry['config']}")
    return "\n".join(lines)


def environment(triton_folder: Path | None = None) -> dict[str, str]:
    """For a process that compiles: no interpreter, a cache of its own (Triton keys it by source and version)."""
    dropped = {"TRITON_INTERPRET", "MOE_UNLEARN_TRITON_ARCH"}
    path = [str(triton_folder.resolve())] if triton_folder else []
    path += [p for p in [os.environ.get("PYTHONPATH")] if p]
    return {k: v for k, v in os.environ.items() if k not in dropped} | {
        "TRITON_CACHE_DIR": str(ROOT / "build" / "triton-cache"),
        "PYTHONPATH": os.pathsep.join(path),
        "OMP_NUM_THREADS": "1",
    }


def run(*arguments: str, triton_folder: Path | None = None, **options) -> subprocess.CompletedProcess:
    """This tool in a fresh process."""
    command = [sys.executable, "-m", "tests.static.compile", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment(triton_folder) | {_PREPARED: "1"}, **options)


_PREPARED = "MOE_UNLEARN_STATIC_PREPARED"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--op", action="append", help="an op with static cases; may be repeated (default: all)")
    parser.add_argument("--module", action="append", default=[], help="further modules with CASES")
    parser.add_argument("--arch", action="append", type=int, choices=ARCHITECTURES, help="default: all")
    parser.add_argument("--triton", type=Path, help="folder of another Triton")
    parser.add_argument("--json", type=Path, help="write the figures there")
    parser.add_argument("--recorded", type=Path, nargs="?", const=LEDGER, help="a ledger, to leave out what is there")
    arguments = parser.parse_args()
    if _PREPARED not in os.environ:
        return run(*sys.argv[1:], triton_folder=arguments.triton).returncode

    import triton

    if arguments.triton and not Path(triton.__file__).resolve().is_relative_to(arguments.triton.resolve()):
        parser.error(f"no Triton in {arguments.triton}; found {triton.__file__}")
    ops = arguments.op if arguments.op or arguments.module else operations()
    modules = {op: f"tests.static.launches_{op}" for op in ops or ()}
    modules |= {module.rpartition(".")[2]: module for module in arguments.module}
    recorded = json.loads(arguments.recorded.read_text()) if arguments.recorded else {}
    known = recorded.get(f"triton {triton.__version__}", {})
    measured = measure(modules, tuple(arguments.arch or ARCHITECTURES), known)
    if arguments.json:
        arguments.json.write_text(json.dumps({"triton": triton.__version__, "measured": measured}))
    print(f"Triton {triton.__version__}", table(measured), sep="\n")
    entries = [entry for of_arch in measured.values() for entry in of_arch.values()]
    return int(any("error" in e or e["spills"] or e["stack_bytes"] or e["float_atomics"] for e in entries))


if __name__ == "__main__":
    sys.exit(main())
