"""Mutants of the native kernels: the bodies of the functions in `csrc/`, by rules over their tokens.

Drawn here are those of the CPU's kernels and of what both libraries share; `tests.mutants.cuda` draws CUDA's.

Each is built in a copy of `csrc/`, where only what it changes is compiled: the CPU library with the mutated op in it,
or the CUDA kernels of one op for emulated threads. Then the op's tests run on that build. A header is mutated for every
op that includes it, up to the first that notices. -O1 compiles fast; contraction is off, so that it changes no bit.
"""

import functools
import importlib
import os
import random
import re
import resource
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from tests.mutants import cplusplus
from tests.mutants.mutant import ROOT, DoesNotBuild, Mutant, in_turn

CSRC = ROOT / "csrc"
OBJECTS = ROOT / "build" / "mutants"  # of the sources as they are, by what is in them
PER_FILE = 3
GIGABYTES = 8  # that a mutant may allocate
TESTS = ROOT / "tests" / "native"
FLAGS = "-std=c++20 -O1 -g0 -w -fPIC -fvisibility=hidden -DTORCH_TARGET_VERSION=0x020a000000000000".split()
FLAGS += "-ffp-contract=off -fno-math-errno -fno-trapping-math".split()
# the tests of an op's CUDA kernels in emulated threads, all in one file
EMULATED = {
    "expert_mlp": "test_mlp",
    "expert_wgrad": "test_wgrad",
    "weight_score": "test_weight_score or test_ties_across",
}
# ops whose kernels the claims of another run too: its backward pass has their gradients
BESIDE = {"expert_mlp": ("expert_wgrad",)}
# sources of products that only some processors widen unless asked to
WIDENED = ("widened_product", "widened_tile", "widened_vectors", "matmul", "expert_mlp", "expert_wgrad")


class Stage(NamedTuple):
    library: str
    op: str
    arguments: tuple[str, ...]
    beside: tuple[str, ...] = ()  # other ops whose CUDA kernels the tests run


def sources(folder: Path) -> list[Path]:
    """Return the sources of a folder that have functions."""
    suffixes = (".cpp", ".h", ".cu", ".cuh")
    return [path for path in sorted(folder.iterdir()) if path.suffix in suffixes and path.stem != "registration"]


def files() -> list[Path]:
    """Return the sources of the CPU library."""
    return sources(CSRC) + sources(CSRC / "cpu")


@functools.cache
def has_nvcc() -> bool:
    """Return what `nvcc.compiler()` says, without the package, which `prepare` imports in its own way."""
    return bool(shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin"))


def path_of(file: str) -> Path:
    return CSRC.parent / file


def mutants_of(path: Path) -> list[Mutant]:
    return cplusplus.mutants_of(path, str(path.relative_to(CSRC.parent)))


def drawn(seed: int = 0) -> list[Mutant]:
    """Return PER_FILE mutants of each file."""
    return drawn_of(files(), PER_FILE, seed)


def drawn_of(paths: list[Path], count: int, seed: int) -> list[Mutant]:
    """Return `count` mutants of each of these files."""
    chosen = []
    for path in paths:
        generator = random.Random(f"{path.name} {seed}")
        mutants = mutants_of(path)
        generator.shuffle(mutants)  # else every file would begin with the kinds its text begins with
        chosen += in_turn(mutants, generator, count)
    return chosen


# ------------------------------------------------------------------------------------------------------ stages


@functools.cache
def included(path: Path) -> frozenset[Path]:
    """Return a source and every file of `csrc/` that it includes."""
    names = re.findall(r'^#include "(\S+)"', path.read_text(encoding="utf-8"), re.MULTILINE)
    return frozenset({path}).union(*(included(CSRC / name) for name in names))


def is_op(source: Path) -> bool:
    """Return whether a source has the kernels of an op, rather than what several share."""
    return (ROOT / "moe_unlearn" / "ops" / f"{source.stem}.py").exists()


def users(file: str, library: str) -> list[str]:
    """Return the ops of a library that a source belongs to, the shortest op first."""
    path = path_of(file)
    sources = sorted((CSRC / library).glob("*.c*"), key=lambda source: source.stat().st_size)
    # a source beside the ops' own, and what it alone includes, is used through its header
    reached, beside = {path}, [source for source in sources if not is_op(source)]
    for _ in beside:
        reached |= {source.with_suffix(".h") for source in beside if reached & included(source)}
    ops = [source for source in sources if is_op(source) and source.suffix != ".cuh"]
    return [op.stem for op in ops if reached & included(op)]


def claims(op: str) -> tuple[str, ...]:
    """Return the tests of what every implementation of an op claims, and of its reference."""
    return tuple(map(str, sorted((ROOT / "tests" / "ops").glob(f"**/test_{op}*.py"))))


def stages(file: str) -> list[Stage]:
    """Return the tests of a source: of one op after the other, first those of its kernels, then those of the op."""
    found, later = [], []
    for op in users(file, "cpu"):
        found.append(Stage("cpu", op, (str(TESTS / f"test_{op}.py"),)))
        later.append(Stage("cpu", op, (*claims(op), "--impl=ref", "--impl=cpu")))
    if found and Path(file).stem in WIDENED:
        found.insert(0, Stage("cpu", found[0].op, (str(TESTS / "test_widened_product.py"),)))
    if Path(file).stem == "common":
        choice = (str(TESTS / "test_build.py"), "-k", "instruction_sets")
        found.insert(0, Stage("cpu", found[0].op, choice))
    if has_nvcc():
        emulated, cuda = str(TESTS / "test_cuda.py"), users(file, "cuda")
        for op in cuda:
            found.append(Stage("cuda", op, (emulated, "-k", EMULATED.get(op, f"test_{op}"))))
            found.append(Stage("cuda", op, (*claims(op), "--impl=cuda"), BESIDE.get(op, ())))
        later += [Stage("cuda", op, (emulated, "-k", "test_launch_plans")) for op in cuda[:1]]
    return found + later


# ------------------------------------------------------------------------------------------------------ builds


def _nvcc():
    return importlib.import_module("moe_unlearn.regress.nvcc")


def prepare() -> None:
    """Do `import_tests`, and compile the CPU's sources as they are."""
    import_tests()
    OBJECTS.mkdir(parents=True, exist_ok=True)
    for source in _cpu_sources(CSRC):
        compiled(source, CSRC, OBJECTS)


def import_tests() -> None:
    """Import the tests, as if the CPU library were there: each run loads its own."""
    import torch

    assert "moe_unlearn" not in sys.modules, "the true library was loaded before the fork"
    load = torch.ops.load_library
    torch.ops.load_library = lambda path: None
    try:
        for name in ("cpu", "cuda"):
            importlib.import_module("moe_unlearn.native").load(name)
        importlib.import_module("tests.native.test_cuda")
    finally:
        torch.ops.load_library = load


def _cpu_sources(csrc: Path) -> list[Path]:
    return [csrc / "registration.cpp", *sorted((csrc / "cpu").glob("*.cpp"))]


def compiled(source: Path, csrc: Path, folder: Path) -> Path:
    """Return the object of a source, compiled into the folder unless one of the same text is there already."""
    nvcc = _nvcc()
    case = nvcc.CudaCase(source.stem, source, (f"-I{csrc}", *FLAGS))
    name = f"{source.stem}-{nvcc.identity(case, 'cpu')}.o"
    for there in (OBJECTS / name, folder / name):
        if there.exists():
            return there
    partial = folder / f"{name}.{os.getpid()}"
    path = f"-ffile-prefix-map={csrc}=csrc"  # of a source, which its checks name
    _compile([*case.flags, path, *nvcc.torch_includes(), "-c", str(source), "-o", str(partial)])
    return partial.rename(folder / name)


def _compile(arguments: list[str]) -> None:
    process = subprocess.run(["g++", *arguments], capture_output=True, text=True)
    if process.returncode:
        raise DoesNotBuild(process.stderr)


def copy(folder: Path, mutant: Mutant | None) -> None:
    shutil.copytree(CSRC, folder / "csrc")
    if mutant is not None:
        source = path_of(mutant.file).read_text(encoding="utf-8")
        (folder / mutant.file).write_text(mutant.apply(source), encoding="utf-8")


def build(folder: Path, stage: Stage) -> bool:
    """Build the library of a stage; return whether it differs from that of the kernels as they are, as far as known."""
    library = _library(folder, stage)
    if stage.library == "cpu":
        return _build_cpu(folder, stage.op, library)
    if not library.exists():
        _build_emulation(folder, (stage.op, *stage.beside), library)
    return True


def _library(folder: Path, stage: Stage) -> Path:
    return folder / f"{'_'.join((stage.library, stage.op, *stage.beside))}.so"


def _build_cpu(folder: Path, op: str, library: Path) -> bool:
    """Link the op and what is no op from the folder, before the other ops as they are: the first of two definitions of
    an inline function is the one that stays."""
    own, others, differs = [], [], False
    for source in _cpu_sources(CSRC):
        as_it_is = compiled(source, CSRC, OBJECTS)
        if source.stem == op or not is_op(source):
            own.append(compiled(folder / source.relative_to(CSRC.parent), folder / "csrc", folder))
            differs |= own[-1].read_bytes() != as_it_is.read_bytes()
        else:
            others.append(as_it_is)
    if not library.exists():
        _compile(["-shared", *map(str, own + others), *_torch_libraries(), "-o", str(library)])
    return differs


def _torch_libraries() -> list[str]:
    import torch

    folder = Path(torch.__file__).parent / "lib"
    return [f"-L{folder}", "-Wl,--no-as-needed", "-ltorch_cpu", "-lc10"]


def _build_emulation(folder: Path, ops: tuple[str, ...], library: Path) -> None:
    """Build the emulation of some ops: the bindings of the others are left out."""
    tool = importlib.import_module("tests.native.cuda")
    whole = (TESTS / "emulation.cpp").read_text(encoding="utf-8")
    source = library.with_suffix(".cpp")
    source.write_text(re.sub(rf'#include "cuda/(?!({"|".join(ops)})\.)\w+\.cu"\n', "", whole), encoding="utf-8")
    flags = [*FLAGS, f"-I{folder / 'csrc'}", "-DUSE_CUDA", '-DMOE_UNLEARN_EMULATION="emulation.h"', f"-I{TESTS}"]
    flags += ["-isystem", tool.cuda_include(), *_nvcc().torch_includes(), "-shared", "-Wl,-Bsymbolic"]
    flags += tool.BOUNDS
    _compile([*flags, str(source), *_torch_libraries(), "-o", str(library)])


def enter(folder: Path, stage: Stage) -> None:
    """Load the CPU library of the folder, or the true one and have the tests of CUDA use the emulation there."""
    import torch

    native, tool = importlib.import_module("moe_unlearn.native"), importlib.import_module("tests.native.cuda")
    limit = GIGABYTES * 2**30 + 1024 * int(
        re.search(r"VmSize:\s*(\d+)", Path("/proc/self/status").read_text(encoding="utf-8"))[1]
    )
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    library = _library(folder, stage)
    if stage.library == "cpu":
        torch.ops.load_library(library)
        return
    torch.ops.load_library(next(Path(native.__file__).parent.glob("_C_cpu*.so")))
    tool.build_emulation = lambda _: library
    nvcc, compile_host = _nvcc(), tool.compile_host
    nvcc.MACROS = tuple(f"-I{folder / 'csrc'}" if flag.startswith("-I") else flag for flag in nvcc.MACROS)
    tool.compile_host = lambda source, output, *flags: compile_host(source, output, "-w", *flags)
