"""Define what is examined without a GPU: a Triton kernel in one specialisation, a launcher's launches, a CUDA file.

A module of yours that calls `register` is found by `moe-unlearn kernels check --static sm_90 --module PATH`:

    static.register(static.TritonCase("bf16", softmax_kernel, {"x": "*bf16:16", "columns": "i32"}, {"BLOCK": 1024}))
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_TYPE = re.compile(r"\*?(?:i(?:1|8|16|32|64)|u(?:1|8|16|32|64)|fp(?:16|32|64)|bf16|fp8\w+)(?::16)?")


@dataclass(frozen=True)
class TritonCase:
    """One specialisation of a Triton kernel, written as for Triton's own ahead-of-time compiler.

    `signature` maps an argument to its type: "*bf16" a pointer, "i32", "fp32" ..., with ":16" where 16 divides the
    value or address (torch allocates tensors that way, and wide and asynchronous loads need it). `constexprs` has the
    rest: the arguments that are `tl.constexpr`, None for an optional pointer that is not given, and integers equal to
    1, which Triton builds in.
    """

    name: str
    kernel: Any
    signature: Mapping[str, str]
    constexprs: Mapping[str, Any] = field(default_factory=dict)
    num_warps: int = 4
    num_stages: int = 3

    def __post_init__(self) -> None:
        _check_name(self)
        for argument, kind in self.signature.items():
            if not isinstance(kind, str) or not _TYPE.fullmatch(kind):
                raise ValueError(
                    f"static case {self.name!r}: expected {argument} to have a type like '*bf16', '*fp32:16' or "
                    f"'i32'; got {kind!r}"
                )
        twice = sorted(self.signature.keys() & self.constexprs.keys())
        if twice:
            raise ValueError(f"static case {self.name!r}: {', '.join(twice)} in both signature and constexprs")
        if self.num_warps not in (1, 2, 4, 8, 16, 32):
            raise ValueError(f"static case {self.name!r}: expected num_warps a power of 2 to 32; got {self.num_warps}")
        if self.num_stages < 1:
            raise ValueError(f"static case {self.name!r}: expected num_stages at least 1; got {self.num_stages}")


@dataclass(frozen=True)
class LaunchCase:
    """All Triton kernels that `launch()` launches, on CPU tensors without content: they are recorded, and none runs."""

    name: str
    launch: Callable[[], object]

    def __post_init__(self) -> None:
        _check_name(self)


@dataclass(frozen=True)
class CudaCase:
    """All `__global__` functions of the file `source`, compiled by nvcc with `flags` (include paths, macros ...)."""

    name: str
    source: Path
    flags: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        _check_name(self)


StaticCase = TritonCase | LaunchCase | CudaCase
_registered: dict[str, StaticCase] = {}


def register(case: StaticCase) -> StaticCase:
    """Register `case` for examination; raise ValueError if another one has its name."""
    if not isinstance(case, StaticCase):
        raise TypeError(f"expected a TritonCase, LaunchCase or CudaCase; got {type(case).__name__}")
    if _registered.setdefault(case.name, case) != case:
        raise ValueError(f"there is a static case {case.name!r} already")
    return case


def registered() -> dict[str, StaticCase]:
    """Return the cases registered so far, by name."""
    return dict(_registered)


def _check_name(case: "StaticCase") -> None:
    if not isinstance(case.name, str) or not case.name.strip() or "/" in case.name or "\n" in case.name:
        raise ValueError(f"expected the name of a static case, a line without '/'; got {case.name!r}")
