"""Results of operations on fakes by the shapes of their operands, so that each is derived once and not in every layer.

torch has such a cache too, but takes longer to look a call up than our kernels' shapes take to derive. Here are calls
whose result is new memory and follows from shapes, strides, dtypes and plain values alone. What an implementation keeps
for its backward differs, so that calls are alike only under one value of MOE_UNLEARN_IMPL, and on the CPU only where it
stands for a GPU each time or never.
"""

import os
from collections.abc import Hashable, Iterable
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from moe_unlearn.backend import ENVIRONMENT_VARIABLE, is_recording

_PLAIN = (int, float, bool, str, type(None), torch.dtype, torch.layout, torch.device, torch.memory_format)


class _Form(NamedTuple):
    """Describes all of a fake that has its storage to itself."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


_KNOWN: dict[Hashable, tuple[bool, tuple[object, ...]]] = {}  # call -> whether there are several results, their forms


def call(function: OpOverload, args: tuple, kwargs: dict) -> Hashable | None:
    """Return what stands for a call and all that are like it; None for a call whose result is derived each time."""
    if not _makes_new_memory(function):
        return None
    try:
        chosen = os.environ.get(ENVIRONMENT_VARIABLE), is_recording()
        return function, chosen, torch.get_default_dtype(), _operand(args), _operand(tuple(kwargs.items()))
    except TypeError:
        return None


def made(call: Hashable, mode: FakeTensorMode) -> Any:
    """Return new fakes like those that a call had as results; None for a call that is not known."""
    known = _KNOWN.get(call)
    if known is None:
        return None
    several, forms = known
    out = tuple(_fake(form, mode) if isinstance(form, _Form) else form for form in forms)
    return out if several else out[0]


def remember(call: Hashable, operands: Iterable[object], out: object) -> None:
    """Keep the form of a call's results, unless one of them shares its memory, with an operand or in part."""
    several = isinstance(out, tuple | list)
    values = out if isinstance(out, tuple | list) else (out,)
    taken = {value.untyped_storage()._cdata for value in operands if isinstance(value, Tensor)}
    # of _unsafe_view the schema does not say so
    shared = any(isinstance(value, Tensor) and value.untyped_storage()._cdata in taken for value in values)
    forms = tuple(map(_form, values))
    if not shared and None not in forms:
        _KNOWN[call] = several, forms


@cache
def _makes_new_memory(function: OpOverload) -> bool:
    """Return whether neither an argument nor a result of an operation is written or shared, by its schema."""
    values = (*function._schema.arguments, *function._schema.returns)
    shapes_differ = {torch.Tag.dynamic_output_shape, torch.Tag.data_dependent_output} & set(function.tags)
    return not shapes_differ and all(value.alias_info is None for value in values)


def _operand(value: object) -> Hashable:
    """Return what a result may depend on of an operand; TypeError for one of which that is not known."""
    if isinstance(value, Tensor):
        if not value.dim():
            raise TypeError("whether a scalar is a Python number, which decides dtypes, cannot be seen")
        device = value.fake_device if isinstance(value, FakeTensor) else value.device
        return _Form(tuple(value.shape), value.stride(), value.dtype, device), type(value)
    if isinstance(value, tuple | list):
        return tuple(map(_operand, value))
    if isinstance(value, _PLAIN):
        return type(value), value
    raise TypeError(f"an operand of type {type(value)}")


def _form(value: object) -> object:
    """Return the form of a fake, or a plain value itself; None for all else."""
    if not isinstance(value, FakeTensor):
        return value if isinstance(value, int) else None
    form = _Form(tuple(value.shape), value.stride(), value.dtype, value.fake_device)
    whole = torch.empty_strided(*form[:2], dtype=form.dtype, device="meta").untyped_storage().nbytes()
    alone = value.storage_offset() == 0 and value.untyped_storage().nbytes() == whole
    return form if alone else None


def _fake(form: _Form, mode: FakeTensorMode) -> Tensor:
    return FakeTensor(mode, torch.empty_strided(*form[:2], dtype=form.dtype, device="meta"), form.device)
