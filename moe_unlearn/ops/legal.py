"""Makes indices legal on a device that nobody waits for, and keeps there which were not until somebody looks.

    legal index     i where 0 <= i < size, else 0
    legal offsets   o_e = max(0 = o_0, ..., o_{e-1}, min(max(o_e, 0), rows)); of bounds [E, 2] each stop >= its start

Kernels then address no memory outside of their tensors. What they compute from such indices is of no use, nor is what
they update with it, so that `look` raises: a step of ours looks where it reads its losses and norms, before its update,
and others ask `check_device`. On the CPU indices are read and refused at once (`checks`), and nothing is done here.

Deterministic. Source: our specification. Ops that meet illegal indices on several streams at once may hide one of them.
"""

from typing import TypeVar

import torch
from torch import Tensor

from moe_unlearn.ops import checks
from moe_unlearn.ops.custom import custom_op

NAMES = ("expert_offsets", "trained_experts", "sorted_rows", "experts", "grad_rows", "input_rows", "slices")
_Ids = TypeVar("_Ids", Tensor, Tensor | None)
_met: dict[torch.device, Tensor] = {}  # int64 [], bit i for the i-th name


def legal_offsets(offsets: Tensor, num_rows: int) -> Tensor:
    """Return offsets [E + 1] or bounds [E, 2] of at most `num_rows` rows, made legal where they are not."""
    if _needs_no_look(offsets, num_rows):
        return offsets
    made: Tensor = _offsets(offsets, num_rows)
    return _vouched(made, num_rows)


def legal_indices(
    name: str, indices: _Ids, size: int, offsets: Tensor | None = None, experts: Tensor | None = None
) -> _Ids:
    """Return `indices` in [0, size), made legal where they are not; with `offsets`, those of `experts` alone matter."""
    if indices is None or indices.numel() == 0 or size == 0 or _needs_no_look(indices, size):
        return indices
    made: Tensor = _indices(indices, NAMES.index(name), size, offsets, experts)
    return _vouched(made, size)


def legal_slices(param: Tensor, slices: Tensor | None) -> Tensor | None:
    """Return slices of dimension 0 of a parameter, made legal where they are not."""
    return legal_indices("slices", slices, len(param) if param.dim() else 1)


def flag(device: torch.device) -> Tensor | None:
    """Return what was met on a device, int64 [], 0 if nothing; None if nothing was looked at there."""
    return _met.get(device)


def raise_if_met(device: torch.device, found: int) -> None:
    """Raise IndexError if `found`, the value of the flag, names anything; the flag is then 0 again."""
    if not found:
        return
    _met[device].zero_()
    names = ", ".join(name for i, name in enumerate(NAMES) if found >> i & 1)
    raise IndexError(
        f"an op on {device} met indices outside of what they index: {names}; it took others in their place, so that "
        "its results are wrong, and so are weights that it has updated: expected what `moe_unlearn.ops` says of each"
    )


def check_device(device: torch.device | str) -> None:
    """Raise IndexError if an op has met illegal indices on a device since the last look; this waits for the device.

    A step of ours looks by itself. On the CPU ops have refused them already.
    """
    for own, found in _met.items():
        if own.type == torch.device(device).type and torch.device(device).index in (None, own.index):
            raise_if_met(own, int(found))


def _needs_no_look(indices: Tensor, limit: int) -> bool:
    if checks._is_readable(indices) or indices.is_meta:
        return True
    return not torch.compiler.is_compiling() and checks._is_vouched(indices, limit)


def _vouched(made: Tensor, limit: int) -> Tensor:
    if not torch.compiler.is_compiling():
        checks.vouch(limit, made)
    return made


def _note(place: int, wrong: Tensor) -> None:
    met = _met.get(wrong.device)
    if met is None:
        met = _met[wrong.device] = torch.zeros((), dtype=torch.int64, device=wrong.device)
    met.bitwise_or_(wrong.long() << place)


@custom_op("moe_unlearn::legal_offsets")
def _offsets(offsets: Tensor, num_rows: int) -> Tensor:
    made = offsets.clamp(0, num_rows)
    if made.dim() == 1:
        made[:1] = 0
        made = made.cummax(0).values
    else:
        made[:, 1] = made.amax(1)
    _note(0, (made != offsets).any())
    return made


@custom_op("moe_unlearn::legal_indices")
def _indices(indices: Tensor, place: int, size: int, offsets: Tensor | None, experts: Tensor | None) -> Tensor:
    wrong = (indices < 0) | (indices >= size)
    if offsets is not None:
        wrong &= checks._rows_of(offsets, experts, len(indices))
    _note(place, wrong.any())
    return indices.masked_fill(wrong, 0)


_offsets.register_fake(lambda offsets, num_rows: torch.empty_like(offsets))
_indices.register_fake(lambda indices, *others: torch.empty_like(indices))
