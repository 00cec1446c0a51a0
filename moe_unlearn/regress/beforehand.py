"""Compiles beforehand the Triton kernels that calls of ops launch, for a GPU that need not be there.

A call is made on tensors without content, where Triton's launches are recorded in place of run, and each is compiled
into Triton's cache. The key of an entry holds the kernel's source, the specialisation, the GPU's architecture and the
version of Triton, and no path: a launch on another machine of this architecture and these versions takes it.
"""

import functools
import importlib.util
import multiprocessing
import os
import time
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils._pytree import tree_leaves, tree_map

from moe_unlearn import backend
from moe_unlearn.errors import MissingLibraryError, UnavailableError, Unfit
from moe_unlearn.ops.checks import vouch

_SMALL = 1 << 20  # elements


class Form(NamedTuple):
    """Describes a tensor."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, tensor: Tensor) -> "Form":
        """Return the form of a tensor."""
        return cls(tuple(tensor.shape), tensor.stride(), tensor.dtype)

    def empty(self) -> Tensor:
        """Return a tensor of this form: integers are zeros that need no look, all else has no content."""
        made = torch.empty_strided(self.shape, self.strides, dtype=self.dtype)
        if not self.dtype.is_floating_point:
            vouch(0, made.zero_())
        return made


class Call(NamedTuple):
    """A call of an op of ours: its overload and its operands, a `Form` in place of each tensor."""

    function: OpOverload
    operands: tuple[Any, ...]

    def key(self) -> Hashable:
        """Return what tells calls apart: the op, forms and plain values, whose types count."""
        return self.function, *((type(value), value) for value in tree_leaves(self.operands, is_leaf=_is_form))

    def make(self) -> None:
        """Make the call on tensors without content; nothing happens where no kernel of Triton's takes it."""
        operands = tree_map(lambda v: v.empty() if _is_form(v) else v, self.operands, is_leaf=_is_form)
        if any(isinstance(v, Tensor) and v.dtype == torch.float64 for v in tree_leaves(operands)):
            return  # which `ref` alone computes
        with suppress(Unfit, UnavailableError), torch.no_grad():
            self.function(*operands)


def _is_form(value: object) -> bool:
    return isinstance(value, Form)


class Compiled(NamedTuple):
    """Says what compiling one kernel took; `cached`: it was there already; `error`: why it did not compile."""

    kernel: str
    config: str
    seconds: float
    cached: bool
    error: str = ""


def target_of(gpu: str | None) -> Any:
    """Return the `configs.Target` of a GPU by its name, or of the GPU that is here.

    Raises ValueError for a name that is not known, and where there is neither a name nor a GPU; MissingLibraryError
    without Triton.
    """
    if importlib.util.find_spec("triton") is None:
        raise MissingLibraryError('kernels are compiled by Triton: pip install "moe-unlearn[triton]"')
    from moe_unlearn.triton_kernels import configs

    if os.environ.get("TRITON_INTERPRET") == "1":
        raise ValueError("expected TRITON_INTERPRET not to be set: interpreted kernels are not compiled")
    if gpu is None and not torch.cuda.is_available():
        raise ValueError(f"expected a GPU here, or the name of one, of {', '.join(configs.GPUS)}: --gpu h200")
    if gpu is None:
        device = torch.device("cuda", torch.cuda.current_device())
        return configs.Target(configs.architecture(device), configs.num_programs(device))
    if gpu not in configs.GPUS:
        raise ValueError(f"expected a GPU of {', '.join(configs.GPUS)}; got {gpu!r}")
    return configs.GPUS[gpu]


def settled_cache(folder: Path) -> int:
    """Let Triton keep kernels in `folder` from now on, and return how many that lie there were moved to it.

    Only what a launch needs is kept, without the stages on the way to it. Raises NotADirectoryError for a file.
    """
    from moe_unlearn.regress import triton_private

    folder.mkdir(parents=True, exist_ok=True)
    os.environ |= {"TRITON_CACHE_DIR": str(folder.resolve()), "TRITON_STORE_BINARY_ONLY": "1"}
    return triton_private.settle(folder.resolve())


def launches_of(calls: Iterable[Call], target: Any) -> list[Any]:
    """Return Triton's launches that the calls make on `target` (`configs.Target`), each specialisation once.

    They are `triton_private.Launch`. Nothing is launched for what runs in another implementation.
    """
    from moe_unlearn.regress import triton_private
    from moe_unlearn.triton_kernels import configs

    found: dict[str, Any] = {}
    with backend.recording(), configs.compiling_for(target), zeros():
        for call in calls:
            made = triton_private.recorded(call.make, target.architecture)
            found |= {launch.identity: launch for launch in made}
    return list(found.values())


@contextmanager
def zeros() -> Iterator[None]:
    """Let new memory hold zeros inside, so that what a kernel would have filled is a legal index."""
    places: tuple[tuple[Any, str], ...] = (torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")
    before = [getattr(owner, name) for owner, name in places]
    for (owner, name), made in zip(places, before, strict=True):
        setattr(owner, name, _zeroed(made))
    try:
        yield
    finally:
        for (owner, name), made in zip(places, before, strict=True):
            setattr(owner, name, made)


def _zeroed(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @functools.wraps(function)
    def zeroed(*arguments: Any, **options: Any) -> Tensor:
        made = function(*arguments, **options)
        # a large one comes fresh from the system, whose pages are zeros until they are touched
        return made if made.numel() > _SMALL else made.zero_()

    return zeroed


def compile_all(launches: Sequence[Any], *, processes: int | None = None) -> Iterator[Compiled]:
    """Compile the launches into Triton's cache, some at a time, and yield what each took, in their order.

    What the cache holds already is not compiled again.
    """
    _launches[:] = launches
    count = min(processes or len(os.sched_getaffinity(0)), len(launches))
    if count <= 1:
        yield from map(_compile, range(len(launches)))
        return
    # kernels cannot be pickled, so that the workers are forked
    with multiprocessing.get_context("fork").Pool(count) as pool:
        yield from pool.imap(_compile, range(len(launches)), chunksize=1)


_launches: list[Any] = []  # inherited by the forked workers


def _compile(index: int) -> Compiled:
    from moe_unlearn.regress import triton_private

    launch, start = _launches[index], time.monotonic()
    try:
        cached, error = triton_private.into_cache(launch), ""
    except Exception as failure:  # whatever a compiler raises
        cached, error = False, f"{type(failure).__name__}: {next(iter(str(failure).splitlines()), '')}"
    return Compiled(launch.name, launch.config, time.monotonic() - start, cached, error)
