"""Compile CUDA kernels without a GPU and read what ptxas says of each, and its instructions."""

import hashlib
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

from moe_unlearn.regress import sass
from moe_unlearn.regress.ledger import Entries
from moe_unlearn.regress.static_case import CudaCase

ROOT = Path(__file__).resolve().parents[2]
SOURCES = {path.stem: path for path in sorted((ROOT / "csrc" / "cuda").glob("*.cu"))}  # empty without a checkout
# the same as in setup.py
MACROS = ("-std=c++20", f"-I{ROOT / 'csrc'}", "-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020a000000000000")
FLAGS = (*MACROS, "--fmad=false", "-Werror", "all-warnings", "-Xcompiler=-Wall,-Wextra,-Werror,-fvisibility=hidden")
_DTYPES = ("none", "float32", "bfloat16", "float16", "word")  # as in csrc/element.h


def compiler() -> str | None:
    """Return nvcc, wherever an installation puts it, or None where there is none."""
    return shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")


def version() -> str:
    """Return the compiler's version, such as "nvcc 13.0"."""
    listing = subprocess.run([str(compiler()), "--version"], capture_output=True, text=True, check=True).stdout
    return "nvcc " + _found(r"release (\S+),", listing)[1]


def ours() -> list[CudaCase]:
    """Return the bindings of `csrc/cuda` as cases; an installed package has no sources, and so no cases."""
    return [CudaCase(op, source, (*FLAGS, *torch_includes())) for op, source in SOURCES.items()]


def torch_includes() -> list[str]:
    """Return nvcc's and g++'s options for torch's headers, as system headers, since they are not ours to warn about."""
    from torch.utils.cpp_extension import include_paths

    return [part for path in include_paths() for part in ("-isystem", path)]


def identity(case: CudaCase, arch: str) -> str:
    """Return a digest that is equal for two cases that one version of nvcc compiles to the same kernels on any machine.

    It covers the source and every header it includes from its own folder and the `-I` folders. System headers
    (`-isystem`) count as part of the compiler.
    """
    folders = [Path(flag.removeprefix("-I")) for flag in case.flags if flag.startswith("-I")]
    kept = [flag for flag in case.flags if not flag.startswith("-I") and not Path(flag).is_absolute()]
    digest, todo, seen = hashlib.sha256(repr((arch, kept)).encode()), [Path(case.source)], set()
    while todo:
        file = todo.pop()
        text = file.read_bytes()
        digest.update(text)
        for header in re.findall(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', text.decode(errors="replace"), re.MULTILINE):
            found = next((path for folder in (file.parent, *folders) if (path := folder / header).is_file()), None)
            if found is not None and found.resolve() not in seen:
                seen.add(found.resolve())
                todo.append(found)
    return digest.hexdigest()[:16]


def measure(case: CudaCase, arch: str, output: Path | None = None) -> Entries:
    """Return {"case/kernel": figures} for every kernel of `case`, for "sm_80", "sm_90a" ...

    `output` keeps an object file, for which the host's code is compiled too. Raises RuntimeError with the compiler's
    output if there is an error.
    """
    with tempfile.TemporaryDirectory() as folder:
        binary = output or Path(folder, "kernels.cubin")
        what = ["-c", "-Xcompiler=-fPIC"] if output else ["-cubin"]
        command: list[str | Path] = [
            str(compiler()),
            "-O3",
            *case.flags,
            f"-arch={arch}",
            "-Xptxas=-v",
            *what,
            case.source,
            "-o",
            binary,
        ]
        process = subprocess.run(command, capture_output=True, text=True)
        if process.returncode:
            raise RuntimeError(f"{case.source.name} for {arch}:\n{process.stdout}{process.stderr}")
        entries = parse(process.stdout + process.stderr)
        try:
            code = sass.functions(binary)
        except sass.NoDisassembler:
            code = {}
    for symbol, listing in code.items():
        mix = sass.mix(listing)
        mix.pop("spills")  # ptxas gives bytes
        entries[symbol] |= mix
    made = identity(case, arch)
    return {f"{case.name}/{kernel_name(symbol)}": {"identity": made, **entry} for symbol, entry in entries.items()}


def parse(listing: str) -> Entries:
    """Return what `ptxas -v` says, by symbol; `spill_bytes` counts stores and loads of registers that had no place."""
    entries: Entries = {}
    for part in listing.split("Compiling entry function ")[1:]:
        stack, stores, loads = _found(
            r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", part
        ).groups()
        shared = re.search(r"(\d+) bytes smem", part)
        entries[_found(r"^'(\w+)'", part)[1]] = {
            "registers": int(_found(r"Used (\d+) registers", part)[1]),
            "stack_bytes": int(stack),
            "spill_bytes": int(stores) + int(loads),
            "shared_bytes": int(shared[1]) if shared else 0,
        }
    return entries


def _found(pattern: str, text: str) -> re.Match[str]:
    found = re.search(pattern, text)
    if found is None:
        raise ValueError(f"expected {pattern} in the compiler's listing; got {text[:200]!r}")
    return found


def kernel_name(symbol: str) -> str:
    """Return the kernel's name in C++, with its parameters.

    Of our own `entry<Kernel<...>>(...)`, only the `Kernel<...>` is returned.
    """
    demangler = shutil.which("c++filt") or shutil.which("cu++filt")
    if demangler is None:
        return symbol
    name = subprocess.run([demangler, symbol], capture_output=True, text=True, check=True).stdout.strip()
    name = name.replace("moe_unlearn::", "").replace(" >", ">").removeprefix("void ")
    own = re.search(r"^entry<(.*?)>\(", name)
    return re.sub(r"\(Dtype\)(\d)", lambda number: _DTYPES[int(number[1])], own[1]) if own else name
