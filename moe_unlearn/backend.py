"""Which implementation of an op runs: `impl = "auto" | "triton" | "cuda" | "cpu" | "ref"`.

Kernels register themselves under the name of their op, or `op.part` where an op has several parts
(`expert_mlp.backward`). `"auto"` takes the fastest one registered for the device; a forced name that is
missing is an error, never a silent fallback. float64 is always computed by `ref`. A kernel that does not take
every operand raises `Unfit` before it writes anything: then comes the next one, if there is a choice.

Triton kernels run on CUDA devices, and on the CPU in Triton's interpreter where TRITON_INTERPRET=1 was set
before they are first used: only when forced, since the interpreter is there to test them.

The environment variable `MOE_UNLEARN_IMPL` replaces `"auto"`:

    MOE_UNLEARN_IMPL=ref                      one name forces every op
    MOE_UNLEARN_IMPL=cuda,triton,ref          a preference list: the first one that is there
    MOE_UNLEARN_IMPL=route=ref,gram=triton    pairs force single ops, the others stay "auto"
"""

import functools
import importlib
import importlib.util
import os
from collections.abc import Callable

import torch

IMPLS = ("triton", "cuda", "cpu", "ref")
ENVIRONMENT_VARIABLE = "MOE_UNLEARN_IMPL"
_FASTEST_FIRST = {"cuda": ("cuda", "triton", "ref"), "cpu": ("cpu", "ref", "triton")}

# ops whose CUDA kernel nobody has measured against Triton's on a GPU yet: Triton's goes first
_UNMEASURED = ("expert_wgrad",)

_kernels: dict[tuple[str, str], Callable | str] = {}


class Unfit(RuntimeError):
    """What a kernel needs and its operands lack."""


def register(name: str, impl: str, kernel: Callable | str) -> None:
    """Make `kernel` the implementation `impl` of the op (or `op.part`) `name`.

    A kernel given as "module:function" is imported when it first runs.
    """
    if impl not in IMPLS:
        raise ValueError(f"impl must be one of {IMPLS}; got {impl!r}")
    _kernels[name, impl] = kernel


def available(name: str, device_type: str) -> tuple[str, ...]:
    """The implementations of `name` that can run on `device_type`, fastest first."""
    order = _FASTEST_FIRST.get(device_type, ("ref",))
    if device_type == "cuda" and name.partition(".")[0] in _UNMEASURED:
        order = ("triton", "cuda", "ref")
    return tuple(impl for impl in order if (name, impl) in _kernels and _can_run(impl, device_type))


def registered() -> tuple[str, ...]:
    """The names of all ops and parts, sorted."""
    return tuple(sorted({name for name, _ in _kernels}))


def resolve(name: str, impl: str, tensor: torch.Tensor) -> Callable:
    """The kernel that computes `name` on the device and dtype of `tensor`.

    Raises ValueError for an unknown `impl` and RuntimeError for a forced one that is not available.
    """
    choices = _choices(name, impl, tensor.device.type, tensor.dtype)
    if len(choices) == 1:
        return _kernel(name, choices[0])

    def first_that_fits(*arguments, **options):
        for choice in choices:
            try:
                return _kernel(name, choice)(*arguments, **options)
            except Unfit as error:
                unfit = error
        raise unfit

    return first_that_fits


def choose(name: str, impl: str, device_type: str, dtype: torch.dtype | None = None) -> str:
    """The concrete implementation name behind `impl`, if it takes the operands; `resolve` says which errors."""
    return _choices(name, impl, device_type, dtype)[0]


def _kernel(name: str, impl: str) -> Callable:
    key = name, impl
    if isinstance(_kernels[key], str):
        module, _, function = _kernels[key].partition(":")
        _kernels[key] = getattr(importlib.import_module(module), function)
    return _kernels[key]


def _choices(name: str, impl: str, device_type: str, dtype: torch.dtype | None) -> tuple[str, ...]:
    """The implementations that `impl` allows and the device has, in the order of preference."""
    usable = available(name, device_type)
    if impl == "auto":
        impl, preference = _from_environment(name.partition(".")[0])
    else:
        preference = (impl,)
    for choice in preference:
        if choice not in IMPLS:
            raise ValueError(f"impl must be 'auto' or one of {IMPLS}; got {choice!r} for {name!r}")
    if dtype == torch.float64:
        return ("ref",)
    if impl == "auto":
        preference = usable
    choices = tuple(choice for choice in preference if choice in usable)
    if not choices:
        raise RuntimeError(
            f"{name!r} has no implementation {' or '.join(preference)} for device {device_type!r}; "
            f"available: {', '.join(usable) or 'none'}"
        )
    return choices


def _can_run(impl: str, device_type: str) -> bool:
    if impl != "triton":
        return True
    return _has_triton() and (device_type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1")


@functools.cache
def _has_triton() -> bool:
    try:
        return importlib.util.find_spec("triton") is not None
    except ImportError:  # of a finder that refuses by raising
        return False


def _from_environment(op: str) -> tuple[str, tuple[str, ...]]:
    value = os.environ.get(ENVIRONMENT_VARIABLE, "").strip()
    if not value or value == "auto":
        return "auto", ()
    entries = [entry.strip() for entry in value.split(",") if entry.strip()]
    pairs = dict(entry.split("=", 1) for entry in entries if "=" in entry)
    names = tuple(entry for entry in entries if "=" not in entry)
    if op in pairs:
        return pairs[op], (pairs[op],)
    return ("forced", names) if names else ("auto", ())
