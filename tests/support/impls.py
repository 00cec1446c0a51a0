"""The implementations of an op that its tests run: the reference, C++, Triton and CUDA, on whatever can run them."""

from dataclasses import dataclass
from pathlib import Path

import torch

from moe_unlearn.testing import in_layout

ROOT = Path(__file__).resolve().parents[2]
SOURCES = {"cpu": "csrc/cpu/{}.cpp", "triton": "triton_kernels/{}.py", "cuda": "csrc/cuda/{}.cu"}


@dataclass(frozen=True)
class Impl:
    """One implementation: `name` is what an op takes as `impl`, on tensors of `device`.

    Without a GPU the CUDA kernels are emulated, in the place of the C++ ones: the fixture `gpu` sees to it.
    """

    kind: str
    name: str
    device: torch.device

    def moved(self, value, layout: str = "contiguous"):
        """Return `value` with a copy, on the device and in the layout, of every tensor in it."""
        if isinstance(value, dict):
            return {k: self.moved(v, layout) for k, v in value.items()}
        if isinstance(value, tuple | list):
            parts = [self.moved(v, layout) for v in value]
            return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
        return in_layout(value.clone().to(self.device), layout) if isinstance(value, torch.Tensor) else value


def impls(op: str) -> tuple[str, ...]:
    """Return the kinds of implementations that the sources hold of an op, the reference first."""
    return ("ref", *(kind for kind, source in SOURCES.items() if (ROOT / source.format(op)).exists()))


def impl_of(kind: str) -> Impl:
    """Return an implementation as this machine runs it."""
    gpu = torch.cuda.is_available()
    name = "cpu" if kind == "cuda" and not gpu else kind
    return Impl(kind, name, torch.device("cuda" if gpu and kind in ("triton", "cuda") else "cpu"))


REF = impl_of("ref")
CPU = impl_of("cpu")
TRITON = impl_of("triton")
