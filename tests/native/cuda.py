"""What the CUDA kernels can show without a GPU: nvcc's figures, kept as a ledger, and a build in emulated threads.

    python -m tests.native.cuda     records cuda_ledger.json anew and says what changed

cuda_ledger.json: {"nvcc 13.0": {"sm_80": {"file/kernel": {"registers": ..., "spill_bytes": ..., ...}}}}. Registers
are a compiler's choice, so figures of another nvcc are not compared.
"""

import argparse
import ctypes
import importlib.util
import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from tests.static import ledger

ROOT = Path(__file__).resolve().parents[2]
LEDGER = Path(__file__).parent / "cuda_ledger.json"
ARCHITECTURES = ("sm_80", "sm_90a", "sm_100")
SOURCES = {path.stem: path for path in (ROOT / "csrc/cuda").glob("*.cu")}
OPS = tuple(sorted(SOURCES))
NEVER = ("stack_bytes", "spill_bytes")
GROWS = ("registers", "shared_bytes")
DTYPES = ("none", "float32", "bfloat16", "float16", "word")  # of csrc/element.h
# as in setup.py; torch's headers are not ours to warn about
COMMON = ["-std=c++20", f"-I{ROOT / 'csrc'}", "-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020a000000000000"]
NVCC_FLAGS = ["-O3", "--fmad=false", "-Werror", "all-warnings", "-Xcompiler=-Wall,-Wextra,-Werror,-fvisibility=hidden"]

Entries = dict[str, dict[str, int]]


def nvcc() -> str | None:
    """The CUDA compiler, wherever an installation puts it."""
    return shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")


def nvcc_version() -> str:
    listing = subprocess.run([nvcc(), "--version"], capture_output=True, text=True, check=True).stdout
    return "nvcc " + re.search(r"release (\S+),", listing)[1]


def cuda_include() -> str:
    """Where nvcc finds cuda_runtime.h; asked of nvcc itself, which may be a script that calls another one."""
    listing = subprocess.run([nvcc(), "--dryrun", "-x", "cu", "-E", "/dev/null"], capture_output=True, text=True).stderr
    return re.search(r"INCLUDES=.*?-I(\S+?)\"", listing)[1]


def torch_includes() -> list[str]:
    from torch.utils.cpp_extension import include_paths

    return [part for path in include_paths() for part in ("-isystem", path)]


def compile_op(op: str, arch: str, output: Path) -> Entries:
    """ptxas' figures of every kernel of an op. For sm_90a the host's half of a binding is compiled too.

    Raises RuntimeError with the compiler's words if there is an error or a warning.
    """
    whole = arch == "sm_90a"
    command = [nvcc(), *NVCC_FLAGS, *COMMON, *torch_includes(), f"-arch={arch}", "-Xptxas=-v"]
    command += ["-c", "-Xcompiler=-fPIC"] if whole else ["-cubin"]
    process = subprocess.run([*command, SOURCES[op], "-o", output], capture_output=True, text=True)
    if process.returncode:
        raise RuntimeError(f"{SOURCES[op].name} for {arch}:\n{process.stdout}{process.stderr}")
    return {f"{op}/{name}": entry for name, entry in parse(process.stdout + process.stderr).items()}


def instructions(compiled: Path) -> str | None:
    """What compiled kernels consist of; None without a disassembler (Triton brings one)."""
    bundled = [] if importlib.util.find_spec("triton") is None else [_bundled_disassembler()]
    program = next(filter(None, map(shutil.which, ["cuobjdump", *bundled])), None)
    if program is None:
        return None
    return subprocess.run([program, "-sass", compiled], capture_output=True, text=True, check=True).stdout


def _bundled_disassembler() -> str:
    import triton

    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump")


def parse(listing: str) -> Entries:
    """What `ptxas -v` says, by kernel."""
    entries = {}
    for part in listing.split("Compiling entry function ")[1:]:
        stack, stores, loads = re.search(
            r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", part
        ).groups()
        shared = re.search(r"(\d+) bytes smem", part)
        entries[kernel_name(re.match(r"'(\w+)'", part)[1])] = {
            "registers": int(re.search(r"Used (\d+) registers", part)[1]),
            "stack_bytes": int(stack),
            "spill_bytes": int(stores) + int(loads),
            "shared_bytes": int(shared[1]) if shared else 0,
        }
    return entries


def kernel_name(symbol: str) -> str:
    """`Kernel<...>` of the mangled `entry<Kernel<...>>(...)`."""
    name = subprocess.run(["c++filt", symbol], capture_output=True, text=True, check=True).stdout
    name = re.search(r"entry<(.*?)>\(", name.replace("moe_unlearn::", "").replace(" >", ">"))[1]
    return re.sub(r"\(Dtype\)(\d)", lambda number: DTYPES[int(number[1])], name)


def violations(arch: str, entries: Entries) -> list[str]:
    """What no kernel may do, whatever is recorded."""
    return [f"{arch} {name}: {e[what]} {what}" for name, e in entries.items() for what in NEVER if e[what]]


def differences(arch: str, recorded: Entries, measured: Entries) -> list[str]:
    """What grew since `recorded`, and which kernels have no counterpart."""
    found = ledger.unmatched(arch, recorded, measured)
    for name in recorded.keys() & measured.keys():
        before, now = recorded[name], measured[name]
        changes = [f"{what} {before[what]} -> {now[what]}" for what in GROWS if now[what] > before[what]]
        if changes:
            found.append(f"{arch} {name}: {', '.join(changes)}")
    return sorted(found)


def read() -> dict[str, dict[str, Entries]]:
    return json.loads(LEDGER.read_text()) if LEDGER.exists() else {}


def compile_host(source: str, output: Path, *flags: str) -> None:
    """Compile a file of this folder with g++, kernels and launchers for emulated threads."""
    here = Path(__file__).parent
    command = ["g++", *COMMON, '-DMOE_UNLEARN_EMULATION="emulation.h"', f"-I{here}", "-isystem", cuda_include()]
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
    compile_host("emulation.cpp", library, *flags, *torch_includes(), *libraries)
    return library


class EmulatedOps:
    """Stands in for `torch.ops.moe_unlearn_native`; `emulate` says which GPU and which order of threads."""

    def __init__(self, library: Path):
        torch.ops.load_library(library)
        self._emulate = ctypes.CDLL(str(library)).emulate
        self._emulate.argtypes = [ctypes.c_int, ctypes.c_int64, ctypes.c_uint32, ctypes.c_int]

    def __getattr__(self, name: str):
        return getattr(torch.ops.moe_unlearn_emulated, name)

    def emulate(
        self, multiprocessors: int = 3, shared_limit: int = 227 * 1024, seed: int = 0, capability: int = 90
    ) -> None:
        self._emulate(multiprocessors, shared_limit, seed, capability)


def main() -> int:
    argparse.ArgumentParser(description="Record tests/native/cuda_ledger.json anew and say what changed.").parse_args()
    version, broken = nvcc_version(), []
    before = read().get(version, {})
    by_arch = {arch: {} for arch in ARCHITECTURES}
    for arch, entries in by_arch.items():
        for op in OPS:
            with tempfile.TemporaryDirectory() as folder:
                entries |= compile_op(op, arch, Path(folder, "out"))
        broken += violations(arch, entries)
        print(*differences(arch, before.get(arch, {}), entries), sep="\n")
    ledger.write({version: by_arch}, LEDGER)
    if broken:
        print("\nNot allowed, recorded or not:", *broken, sep="\n  ")
    return int(bool(broken))


if __name__ == "__main__":
    sys.exit(main())
