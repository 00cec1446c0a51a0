"""Loads the native libraries once and registers their kernels with `backend` where the libraries are usable.

`_C_cpu` and `_C_cuda` lie beside this file; setup.py builds them from `csrc/` on libtorch's stable ABI. They hold no
Python module, only the ops `torch.ops.moe_unlearn_native.*`. The package works without them, on `ref`.
"""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from moe_unlearn import backend

LIBRARIES = ("cpu", "cuda")
INSTRUCTION_SETS = ("baseline", "avx2", "avx512")
NARROW_PRODUCTS = ("torch", "widened")
_FOLDER = Path(__file__).parent
_HOW_TO_BUILD = "not built: `pip install --no-build-isolation .` with torch and a C++ compiler there builds it"


@functools.cache
def load(name: str) -> str:
    """Load the library `_C_<name>`; return "" if it is usable, else one line that says why not."""
    paths = sorted(_FOLDER.glob(f"_C_{name}*.so"))
    if not paths:
        return _build_report().get(name, _HOW_TO_BUILD)
    if name == "cuda" and (torch.version.cuda is None or load("cpu")):
        return "not loaded: " + ("this torch has no CUDA" if torch.version.cuda is None else "it needs _C_cpu")
    try:
        torch.ops.load_library(paths[0])
    except OSError as error:
        return f"not loaded: {error}"
    return ""


def register(name: str, kernel: Callable | str, impl: str = "cpu") -> None:
    """Call `backend.register(name, impl, kernel)` if the library of `impl` is usable; otherwise do nothing."""
    if not load(impl):
        backend.register(name, impl, kernel)


def instruction_set(limit: str | None = None) -> str:
    """Return the instruction set of the CPU kernels; a name of INSTRUCTION_SETS lowers it, "" resets it to the best.

    The instruction set changes speed only: all of them give the same bits.
    """
    name: str = torch.ops.moe_unlearn_native.instruction_set(limit)
    return name


def narrow_products(way: str | None = None) -> str:
    """Return how the CPU kernels multiply bfloat16 matrices; a name of NARROW_PRODUCTS asks for it, "" for the CPU's.

    "torch" leaves them to torch's mm, where the CPU has an instruction for bfloat16 that is faster than float32's
    multiply-add (AMX, or AVX512-BF16 of AMD). "widened" multiplies in float32, where a product of two bfloat16 numbers
    is exact: each sum has one order, whatever the number of threads. Below AVX2 it is always "torch". No kernel may run
    while another way is asked for.
    """
    name: str = torch.ops.moe_unlearn_native.narrow_products(way)
    return name


class TokenLossTiles(NamedTuple):
    """Sizes of the tiles of csrc/cpu/token_loss.cpp, forward and backward, in tokens and entries of the vocabulary."""

    tokens: int
    entries: int
    backward_tokens: int
    backward_entries: int


@functools.cache
def token_loss_tiles() -> TokenLossTiles:
    """Return the sizes that the CPU kernels of token_loss were built with; raise RuntimeError without the library.

    Whoever asks does so for the implementation `cpu`, which is not there without the library either.
    """
    if why := load("cpu"):
        raise RuntimeError(f"the tiles of token_loss are those of the native library cpu, which is {why}")
    return TokenLossTiles(*torch.ops.moe_unlearn_native.token_loss_tiles())


def has_pair_products() -> bool:
    """Return whether the CPU kernels multiply bfloat16 in pairs: AVX512-BF16 is there, in use, and the faster way."""
    return not load("cpu") and torch.ops.moe_unlearn_native.has_pair_products()


def report() -> list[str]:
    """Describe each library in one line: what it uses, or why it is not used."""
    usable = {
        "cpu": lambda: f"built, {instruction_set()}, {narrow_products()} bfloat16 products",
        "cuda": lambda: "built",
    }
    return [f"{name}: {load(name) or usable[name]()}" for name in LIBRARIES]


def _build_report() -> dict[str, str]:
    """Read what setup.py wrote about each library."""
    path = _FOLDER / "_C_build.txt"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    entries = dict(line.split(": ", 1) for line in lines)
    # a library that was built but is missing has been removed since: `_HOW_TO_BUILD` applies
    return {name: why for name, why in entries.items() if why != "built"}
