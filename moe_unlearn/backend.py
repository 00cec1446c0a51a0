"""Chooses the implementation of an op that runs: `impl = "auto" | "triton" | "cuda" | "cpu" | "ref"`.

Kernels register themselves under the name of their op, or `op.part` where an op has several parts
(`expert_mlp.backward`). `"auto"` takes the fastest kernel registered for the device. A forced name that is
missing is an error, never a silent fallback. `ref` always computes float64. A kernel that cannot take its operands
raises `Unfit` before it writes anything; the next kernel then runs, if there is a choice. A kernel whose import
fails is never chosen where there is a choice, and is an error where it is forced; `unusable` returns the reasons.
A CUDA kernel runs with its tensor's device as the current one, since there may be several devices.

Triton kernels run on CUDA devices. If TRITON_INTERPRET=1 was set before they are first used, they also run on the
CPU in Triton's interpreter, but only when forced, since the interpreter is there to test them.

The environment variable `MOE_UNLEARN_IMPL` replaces `"auto"`:

    MOE_UNLEARN_IMPL=ref                      one name forces every op
    MOE_UNLEARN_IMPL=cuda,triton,ref          a preference list: the first available name runs
    MOE_UNLEARN_IMPL=route=ref,gram=triton    pairs force single ops, the others stay "auto"
"""

import contextlib
import functools
import importlib
import importlib.util
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch

from moe_unlearn import choices as measured
from moe_unlearn.errors import UnavailableError, Unfit

IMPLS = ("triton", "cuda", "cpu", "ref")
ENVIRONMENT_VARIABLE = "MOE_UNLEARN_IMPL"
_FASTEST_FIRST = {"cuda": ("cuda", "triton", "ref"), "cpu": ("cpu", "ref", "triton")}

_kernels: dict[tuple[str, str], Callable | str] = {}
_broken: dict[tuple[str, str], str] = {}  # why the import of a kernel failed
_made: dict[tuple, tuple[str, ...]] = {}  # the choices made so far, by all that they depend on but the kernels
_recording = False  # whether the CPU stands for a GPU whose launches are recorded


def register(name: str, impl: str, kernel: Callable | str) -> None:
    """Make `kernel` the implementation `impl` of the op (or `op.part`) `name`.

    A kernel given as "module:function" is imported when it first runs.
    """
    if impl not in IMPLS:
        raise ValueError(f"impl must be one of {IMPLS}; got {impl!r}")
    _kernels[name, impl] = kernel
    _broken.pop((name, impl), None)
    _made.clear()


@contextlib.contextmanager
def recording() -> Iterator[None]:
    """Let the CPU stand for a GPU inside, where Triton's launches are recorded and none runs.

    What runs in another implementation there raises `Unfit`.
    """
    global _recording
    before, _recording = _recording, True
    try:
        yield
    finally:
        _recording = before


def is_recording() -> bool:
    """Return whether the CPU stands for a GPU at this moment."""
    return _recording


def is_on_cpu(tensor: torch.Tensor) -> bool:
    """Return whether a tensor lies on the CPU, and not on a GPU that it stands for."""
    return tensor.is_cpu and not _recording


def available(name: str, device_type: str) -> tuple[str, ...]:
    """Return the implementations of `name` that can run on `device_type`, fastest first; each is imported."""
    return tuple(impl for impl in _candidates(name, device_type, _first(name, device_type)) if not _why_not(name, impl))


def has(name: str, impl: str, device_type: str) -> bool:
    """Return whether `impl` of `name` can run on `device_type`; no other implementation is imported."""
    return impl in _candidates(name, device_type, None) and not _why_not(name, impl)


def unusable(device_type: str) -> dict[tuple[str, str], list[str]]:
    """Return the kernels for `device_type` whose import fails, as {(impl, reason of the failure): names}."""
    found: dict[tuple[str, str], list[str]] = {}
    for name in registered():
        for impl in _candidates(name, device_type, None):
            if why := _why_not(name, impl):
                found.setdefault((impl, why), []).append(name)
    return found


def registered() -> tuple[str, ...]:
    """Return the names of all ops and parts, sorted."""
    return tuple(sorted({name for name, _ in _kernels}))


def resolve(name: str, impl: str, tensor: torch.Tensor) -> Callable:
    """Return the kernel that computes `name` on the device and in the dtype of `tensor`.

    Raises ValueError for an unknown `impl` and UnavailableError for a forced one that is not available.
    """
    choices = _choices(name, impl, tensor.device.type, tensor.dtype, tensor.numel())
    if _recording:
        if choices[0] != "triton":
            raise Unfit(f"{name!r} runs in {choices[0]}, which launches nothing of Triton's")
        return _kernel(name, "triton")
    kernel = _kernel(name, choices[0]) if len(choices) == 1 else _first_that_fits(name, choices)
    return functools.partial(_run_on, tensor.device, kernel) if tensor.device.type == "cuda" else kernel


def choose(name: str, impl: str, device_type: str, dtype: torch.dtype | None = None) -> str:
    """Return the implementation that runs for `impl` unless its kernel raises `Unfit`; errors as `resolve`."""
    return _choices(name, impl, device_type, dtype)[0]


def _run_on(device: torch.device, kernel: Callable, *arguments: Any, **options: Any) -> Any:
    """Run the kernel with `device` as the current one: a launch goes to the current device and its stream."""
    with torch.cuda.device(device):
        return kernel(*arguments, **options)


def _first_that_fits(name: str, choices: tuple[str, ...]) -> Callable:
    def first_that_fits(*arguments: Any, **options: Any) -> Any:
        for choice in choices:
            try:
                return _kernel(name, choice)(*arguments, **options)
            except Unfit as error:
                unfit = error
        raise unfit

    return first_that_fits


def _kernel(name: str, impl: str) -> Callable:
    """Import and return the kernel; UnavailableError, with the cause, if the import fails."""
    registered = _kernels[name, impl]
    if not isinstance(registered, str):
        return registered
    module, _, function = registered.partition(":")
    try:
        kernel: Callable = getattr(importlib.import_module(module), function)
    except Exception as error:  # whatever a damaged installation raises
        why = f"{type(error).__name__}: {error}"
        if isinstance(error, ModuleNotFoundError) and (error.name or "").startswith("moe_unlearn."):
            why += "; `pip install --no-deps --no-build-isolation -e .` installs it"
        _broken[name, impl] = why
        _made.clear()
        raise UnavailableError(f"{name!r} has no usable implementation {impl}: {why}") from error
    _kernels[name, impl] = kernel
    return kernel


def _why_not(name: str, impl: str) -> str:
    """Return why the import of a kernel fails, "" if it succeeds."""
    if (name, impl) not in _broken:
        with contextlib.suppress(UnavailableError):
            _kernel(name, impl)
    return _broken.get((name, impl), "")


def _first(name: str, device_type: str, elements: int | None = None) -> str | None:
    """Return the implementation that measurements put first for a number of elements, None if there are none."""
    return measured.first(name, "cuda" if _recording else device_type, elements)


def _candidates(name: str, device_type: str, first: str | None) -> tuple[str, ...]:
    """List the implementations registered for the device, fastest first, whether or not they can be imported."""
    device_type = "cuda" if _recording else device_type
    order: tuple[str, ...] = _FASTEST_FIRST.get(device_type, ("ref",))
    if first is not None and first in order:
        order = (first, *(impl for impl in order if impl != first))
    return tuple(impl for impl in order if (name, impl) in _kernels and _can_run(impl, device_type))


def _choices(
    name: str, impl: str, device_type: str, dtype: torch.dtype | None, elements: int | None = None
) -> tuple[str, ...]:
    """Return the implementations that `impl` allows and the device has, in the order of preference."""
    first = _first(name, device_type, elements)
    environment = os.environ.get(ENVIRONMENT_VARIABLE), os.environ.get("TRITON_INTERPRET"), _recording
    key = name, impl, device_type, dtype == torch.float64, first, environment, id(_kernels)
    found = _made.get(key)
    if found is None:
        found = _made[key] = _new_choices(name, impl, device_type, dtype, first)
    return found


def _new_choices(
    name: str, impl: str, device_type: str, dtype: torch.dtype | None, first: str | None
) -> tuple[str, ...]:
    candidates = _candidates(name, device_type, first)
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
        preference = candidates
    choices = tuple(choice for choice in preference if choice in candidates)
    if not choices:
        raise UnavailableError(
            f"{name!r} has no implementation {' or '.join(preference)} for device {device_type!r}; "
            f"available: {', '.join(available(name, device_type)) or 'none'}"
        )
    if "ref" in choices:
        choices = choices[: choices.index("ref") + 1]  # `ref` takes all operands: later ones need no import
    importable = choices[1:] and tuple(choice for choice in choices if not _why_not(name, choice))
    return importable or choices


def _can_run(impl: str, device_type: str) -> bool:
    if impl != "triton":
        return True
    return _has_triton() and (device_type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1")


@functools.cache
def _has_triton() -> bool:
    try:
        return importlib.util.find_spec("triton") is not None
    except ImportError:  # an import finder may refuse by raising
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
