"""The CUDA kernels show what they can without a GPU: nvcc's figures against the ledger, emulated threads."""

import ctypes
import re
import subprocess
from pathlib import Path

import torch

from moe_unlearn.regress import nvcc

ARCHITECTURES = ("sm_80", "sm_90a", "sm_100")
CASES = {case.name: case for case in nvcc.ours()}
# an index beyond an array, which a GPU would not notice either, ends the process
BOUNDS = ("-fsanitize=bounds", "-fsanitize-undefined-trap-on-error")


def cuda_include() -> str:
    """Where nvcc finds cuda_runtime.h; asked of nvcc itself, which may be a script that calls another one."""
    command = [nvcc.compiler(), "--dryrun", "-x", "cu", "-E", "/dev/null"]
    listing = subprocess.run(command, capture_output=True, text=True).stderr
    return re.search(r"INCLUDES=.*?-I(\S+?)\"", listing)[1]


def compile_host(source: str, output: Path, *flags: str) -> None:
    """Compile a file of this folder with g++, kernels and launchers for emulated threads."""
    here = Path(__file__).parent
    command = ["g++", *nvcc.MACROS, '-DMOE_UNLEARN_EMULATION="emulation.h"', f"-I{here}", "-isystem", cuda_include()]
    command += ["-Wall", "-Wextra", "-Werror", *flags, str(here / source), "-o", str(output)]
    process = subprocess.run(command, capture_output=True, text=True)
    if process.returncode:
        raise RuntimeError(process.stderr)


def build_emulation(folder: Path) -> Path:
    """The library of emulation.cpp: the bindings, launchers and kernels of every op, on the CPU."""
    flags = "-O1 -g0 -shared -fPIC -fvisibility=hidden -ffp-contract=off -Wl,-Bsymbolic".split()
    # kept though they stand before the source
    libraries = [f"-L{Path(torch.__file__).parent / 'lib'}", "-Wl,--no-as-needed", "-ltorch_cpu", "-lc10"]
    library = folder / "libemulation.so"
    compile_host("emulation.cpp", library, *flags, *BOUNDS, *nvcc.torch_includes(), *libraries)
    return library


class EmulatedOps:
    """Stands in for `torch.ops.moe_unlearn_native`; `emulate` says which GPU and which order of threads."""

    def __init__(self, library: Path):
        torch.ops.load_library(library)
        loaded = ctypes.CDLL(str(library))
        self._emulate, self._prefetched = loaded.emulate, loaded.prefetched
        self._emulate.argtypes = [ctypes.c_int, ctypes.c_int64, ctypes.c_uint32, ctypes.c_int]
        self._prefetched.restype = ctypes.POINTER(ctypes.c_int64)

    def __getattr__(self, name: str):
        return getattr(torch.ops.moe_unlearn_emulated, name)

    def emulate(
        self, multiprocessors: int = 3, shared_limit: int = 227 * 1024, seed: int = 0, capability: int = 90
    ) -> None:
        self._emulate(multiprocessors, shared_limit, seed, capability)

    def prefetched(self) -> list[tuple[int, int]]:
        """Return the address and bytes of each prefetch since `emulate`."""
        count = ctypes.c_int64()
        numbers = self._prefetched(ctypes.byref(count))[: count.value]
        return list(zip(numbers[::2], numbers[1::2], strict=True))
