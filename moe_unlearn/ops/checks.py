"""Checks the operands of the ops on experts and of `masked_update`, whose updates `expert_wgrad` takes too.

Dtypes, shapes, devices and options are checked where a public function is called. The numbers in index tensors are
checked inside the custom op, before its kernel, so that compiled code is checked too: kernels address memory by them.

On the CPU they are read, one pass for each tensor. On another device reading would wait, so that public functions make
them legal there first (`legal`), in 4 to 14 small launches for each tensor. What calls a custom op by its own name has
`torch._assert_async`, as torch's own indexing: a wrong index ends the use of the device before a kernel reads it.

What an op of ours made (`vouch`) is legal and gets no look, until it is changed in place. A change that autograd would
not notice either, through `.data` or an array that shares the memory, goes unseen.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from moe_unlearn.ops.bits import words_shape
from moe_unlearn.ops.gate import ACTIVATIONS, ExpertLayout, ExpertWeights
from moe_unlearn.ops.moments import PACKED, row_bytes

if TYPE_CHECKING:
    from moe_unlearn.ops.expert_wgrad import Factors
    from moe_unlearn.ops.masked_update import SGD, Update

ROUNDINGS = ("nearest", "stochastic")


def check_layer(
    x: Tensor,
    top_k_weights: Tensor,
    sorted_rows: Tensor,
    expert_offsets: Tensor,
    weights: ExpertWeights,
    layout: ExpertLayout,
    trained: Tensor | None,
) -> None:
    """Raise TypeError or ValueError for operands of `expert_mlp` that do not fit."""
    (gate, transposed, _, gated), (w1, w2, b1, b2) = layout, weights
    if gate.activation not in ACTIVATIONS:
        raise ValueError(f"gate.activation must be one of {ACTIVATIONS}; got {gate.activation!r}")
    if x.dim() != 2 or not x.is_floating_point():
        raise ValueError(f"hidden_states must be float [T, H]; got {x.dtype} {tuple(x.shape)}")
    if top_k_weights.dim() != 2 or not top_k_weights.is_floating_point() or top_k_weights.shape[1] == 0:
        got = f"{top_k_weights.dtype} {tuple(top_k_weights.shape)}"
        raise ValueError(f"top_k_weights must be float [T, K] with K >= 1; got {got}")
    integers = {"sorted_rows": sorted_rows, "expert_offsets": expert_offsets, "trained_experts": trained}
    for name, ids in integers.items():
        if ids is not None and (ids.dtype != torch.int32 or ids.dim() != 1):
            raise TypeError(f"{name} must be int32 with one dimension; got {ids.dtype} {tuple(ids.shape)}")
    if w1.dim() != 3 or w2.dim() != 3:
        shapes = f"{tuple(w1.shape)}, {tuple(w2.shape)}"
        raise ValueError(f"gate_up_proj and down_proj must have three dimensions; got {shapes}")
    num_experts, hidden = len(w1), x.shape[1]
    _check_distinct("trained_experts", trained)
    inner = w2.shape[1 if transposed else 2]
    wide = 2 * inner if gated else inner
    expected = {
        "top_k_weights": (top_k_weights, (len(x), top_k_weights.shape[1])),
        "sorted_rows": (sorted_rows, (top_k_weights.numel(),)),
        "expert_offsets": (expert_offsets, (num_experts + 1,)),
        "gate_up_proj": (w1, (num_experts, hidden, wide) if transposed else (num_experts, wide, hidden)),
        "down_proj": (w2, (num_experts, inner, hidden) if transposed else (num_experts, hidden, inner)),
        "gate_up_bias": (b1, (num_experts, wide)),
        "down_bias": (b2, (num_experts, hidden)),
        "trained_experts": (trained, (0 if trained is None else len(trained),)),
    }
    for name, (tensor, shape) in expected.items():
        if tensor is None:
            continue
        if tensor.shape != shape:
            raise ValueError(f"{name} must be {list(shape)}; got {list(tensor.shape)}")
        if tensor.device != x.device:
            raise ValueError(f"{name} must be on {x.device} like hidden_states; got {tensor.device}")
        if name not in ("top_k_weights", *integers) and tensor.dtype != x.dtype:
            raise TypeError(f"{name} must be {x.dtype} like hidden_states; got {tensor.dtype}")


def num_listed(expert_offsets: Tensor, experts: Tensor | None) -> int:
    """Return M_e, the number of listed experts."""
    if experts is not None:
        return experts.shape[0]
    return expert_offsets.shape[0] - (1 if expert_offsets.dim() == 1 else 0)


def num_positions(grad: Tensor, input: Tensor, grad_rows: Tensor | None, input_rows: Tensor | None) -> int:
    """Return how many sorted positions have a row in both factors."""
    sides = grad if grad_rows is None else grad_rows, input if input_rows is None else input_rows
    return min(sides[0].shape[0], sides[1].shape[0])


def check_factors(
    factors: "Factors",
    experts: Tensor | None,
    mask: Tensor | None,
    buffers: Mapping[str, Tensor | None],
    weight: Tensor | None = None,
) -> None:
    """Raise TypeError or ValueError for operands of `expert_wgrad` that do not fit."""
    grad, input, offsets, grad_rows, input_rows = factors
    for name, rows in (("grad", grad), ("input", input)):
        if rows.dim() != 2 or not rows.is_floating_point():
            raise ValueError(f"{name} must be float with two dimensions; got {rows.dtype} {tuple(rows.shape)}")
    if grad.dtype != input.dtype:
        raise TypeError(f"grad and input must have one dtype; got {grad.dtype} and {input.dtype}")
    bounds = offsets.dim() == 2 and offsets.shape[1] == 2 or offsets.dim() == 1 and len(offsets) > 1
    if offsets.dtype != torch.int32 or not bounds:
        raise ValueError(f"expert_offsets must be int32 [E + 1] or [E, 2]; got {offsets.dtype} {tuple(offsets.shape)}")
    for name, ids in (("grad_rows", grad_rows), ("input_rows", input_rows), ("experts", experts)):
        if ids is not None and (ids.dtype not in (torch.int32, torch.int64) or ids.dim() != 1):
            raise ValueError(f"{name} must be int32 or int64 [n]; got {ids.dtype} {tuple(ids.shape)}")
    if weight is not None and buffers:  # an update; a gradient may be computed twice
        _check_distinct("experts", experts)
    slice_shape = [grad.shape[1], input.shape[1]]
    shape = [num_listed(offsets, experts), *slice_shape]
    for name, tensor in {"weight": weight, **buffers}.items():
        if tensor is None:
            continue
        packed = name not in ("weight", "master") and tensor.dtype == PACKED
        expected = [num_listed(offsets, None), *slice_shape] if name == "weight" else shape
        expected = _stored(tensor, expected) if packed else expected
        if list(tensor.shape) != expected or not (packed or tensor.is_floating_point()):
            raise ValueError(f"{name} must be float {expected}; got {tensor.dtype} {list(tensor.shape)}")
    words = words_shape(shape)
    if mask is not None and (mask.dtype != torch.int32 or mask.shape != words):
        raise ValueError(f"mask must be int32 words {list(words)}; got {mask.dtype} {list(mask.shape)}")
    device = grad.device
    others = {"input": input, "expert_offsets": offsets, "grad_rows": grad_rows, "input_rows": input_rows}
    for name, tensor in {**others, "experts": experts, "mask": mask, "weight": weight, **buffers}.items():
        if tensor is not None and tensor.device != device:
            raise ValueError(f"{name} must be on {device} like grad; got {tensor.device}")


def check_objects(**given: tuple[object, type]) -> None:
    """Raise TypeError for an operand that is no object of its kind; the numbers of two rules look alike."""
    for name, (value, kind) in given.items():
        if not isinstance(value, kind):
            raise TypeError(f"{name} must be {kind.__name__}; got {type(value).__name__}")


def check_update(
    param: Tensor,
    grad: Tensor,
    state: Mapping[str, Tensor | None],
    mask: Tensor | None,
    update: "Update",
    master: Tensor | None,
    slices: Tensor | None,
) -> None:
    """Raise TypeError or ValueError for operands of an update that do not fit."""
    if not param.is_floating_point():
        raise TypeError(f"param must be a floating-point tensor; got {param.dtype}")
    if not grad.is_floating_point():
        raise TypeError(f"grad must be a floating-point tensor; got {grad.dtype}")
    check_numerics(param, state, update, master)
    shape = list(param.shape)
    if slices is not None:
        if slices.dtype != torch.int64:
            raise TypeError(f"slices must be int64; got {slices.dtype}")
        if slices.dim() != 1 or param.dim() == 0:
            raise ValueError(
                f"slices must be [M] into dimension 0 of param; got shape {list(slices.shape)} "
                f"for a param of shape {shape}"
            )
        _check_distinct("slices", slices)
        shape[0] = len(slices)
    for name, tensor in {"grad": grad, "master": master, **state}.items():
        expected = shape if tensor is None or name not in state else _stored(tensor, shape)
        if tensor is not None and list(tensor.shape) != expected:
            raise ValueError(f"{name} must have shape {expected}; got {list(tensor.shape)}")
    if mask is not None:
        words = [*words_shape(shape)]
        if mask.dtype != torch.int32:
            raise TypeError(f"mask must be packed int32 words (ops.bits.pack_bits); got {mask.dtype}")
        if list(mask.shape) != words:
            raise ValueError(f"mask must have shape {words} for weights {shape}; got {list(mask.shape)}")
    for name, tensor in {"grad": grad, "mask": mask, "master": master, "slices": slices, **state}.items():
        if tensor is not None and tensor.device != param.device:
            raise ValueError(f"{name} must be on {param.device} like param; got {tensor.device}")


def check_numerics(param: Tensor, state: Mapping[str, Tensor | None], update: "Update", master: Tensor | None) -> None:
    """Raise TypeError or ValueError for numbers, a rounding or dtypes of an update that do not fit."""
    if update.step < 1:
        raise ValueError(f"step counts from 1; got {update.step}")
    if update.first_row < 0:
        raise ValueError(f"first_row counts from 0; got {update.first_row}")
    rounding = update.rounding
    if rounding not in ROUNDINGS:
        raise ValueError(f"rounding must be one of {ROUNDINGS}; got {rounding!r}")
    if rounding == "stochastic" and param.dtype == torch.float16:
        raise TypeError("stochastic rounding is to bfloat16; got a float16 param")
    if master is not None:
        if master.dtype != torch.float32:
            raise TypeError(f"master must be float32; got {master.dtype}")
        if rounding != "nearest":
            raise ValueError(f"master needs rounding 'nearest'; got {rounding!r}")
    wide = param.dtype == torch.float64
    dtypes = (param.dtype, torch.float32) if wide else (param.dtype, torch.float32, torch.bfloat16, PACKED)
    for name, tensor in state.items():
        if tensor is not None and tensor.dtype not in dtypes:
            others = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes[1:])
            raise TypeError(f"{name} must be {param.dtype}, as param, or one of {others}; got {tensor.dtype}")
        if tensor is not None and tensor.dtype == PACKED and (param.dim() < 2 or not tensor.is_contiguous()):
            raise ValueError(
                f"packed {name} must be contiguous and of a param of at least 2 dimensions; got strides "
                f"{list(tensor.stride())} and a param of shape {list(param.shape)}"
            )
    if len({tensor.dtype for tensor in state.values() if tensor is not None}) > 1:
        raise TypeError(
            f"{' and '.join(state)} must have one dtype; got {[s.dtype for s in state.values() if s is not None]}"
        )


def _stored(moments: Tensor, shape: Sequence[int]) -> list[int]:
    """Return the shape that moments of this dtype have for weights of a shape."""
    packed = moments.dtype == PACKED and len(shape) > 0
    return [*shape[:-1], row_bytes(shape[-1])] if packed else list(shape)


def check_momentum(momentum_buffer: Tensor | None, rule: "SGD") -> None:
    """Raise ValueError for a rule whose momentum does not fit its other numbers or has no buffer."""
    if rule.momentum != 0 and momentum_buffer is None:
        raise ValueError(f"momentum {rule.momentum} needs a momentum_buffer; got None")
    if rule.nesterov and (rule.momentum <= 0 or rule.dampening != 0):
        raise ValueError(f"nesterov needs momentum > 0 and dampening 0; got {rule.momentum} and {rule.dampening}")


def _check_distinct(name: str, ids: Tensor | None) -> None:
    """Raise ValueError for indices [M] of what is updated that come twice; only those on a CPU are read."""
    if ids is None or not ids.is_cpu or torch.compiler.is_compiling():
        return
    numbers = ids.numpy()
    if (numbers[1:] > numbers[:-1]).all():
        return
    found, times = np.unique(numbers, return_counts=True)
    if len(found) < len(numbers):
        raise ValueError(f"{name} must be distinct; got {found[times > 1].tolist()} more than once")


def vouch(limit: int, *made: Tensor) -> None:
    """Note that an op made these indices, below `limit`, or offsets up to it; changing them in place ends that."""
    for indices in made:
        if not indices.is_inference():  # such a tensor does not know whether it was changed
            indices._moe_unlearn_limit = indices._version, limit  # type: ignore[attr-defined]  # ours alone


def check_offsets(offsets: Tensor, num_rows: int) -> None:
    """Raise ValueError unless the offsets [E + 1] rise from 0 to at most `num_rows`, and bounds [E, 2] lie in these."""
    if _is_vouched(offsets, num_rows):
        return
    flat = offsets.dim() == 1
    expected = f"expert_offsets must rise from 0 to at most {num_rows} rows"
    if not _is_readable(offsets):
        starts, stops = (offsets[:-1], offsets[1:]) if flat else offsets.unbind(1)
        ends = torch.cat([starts, stops - starts, num_rows - stops, -starts[: int(flat)]])
        torch._assert_async((ends >= 0).all(), expected)
        return
    read = offsets.tolist()
    bounds = list(zip(read, read[1:] or read, strict=False)) if flat else read
    wrong = [e for e, (start, stop) in enumerate(bounds) if not 0 <= start <= stop <= num_rows]
    if flat and read[0] != 0:
        wrong = [0]
    if wrong:
        start, stop = bounds[wrong[0]]
        raise ValueError(f"{expected}; got {start} to {stop} for expert {wrong[0]}")


def check_indices(
    name: str, indices: Tensor | None, size: int, offsets: Tensor | None = None, experts: Tensor | None = None
) -> None:
    """Raise IndexError unless all `indices` are in [0, size); with legal `offsets`, unless those of `experts` are."""
    if indices is None or indices.numel() == 0 or _is_vouched(indices, size):
        return
    readable = _is_readable(indices)
    if readable:
        numbers = indices.numpy()
        if numbers.view(f"u{numbers.itemsize}").max() < size:  # a negative number is a large one without its sign
            return
    wrong = (indices < 0) | (indices >= size)
    if offsets is not None:
        wrong &= _rows_of(offsets, experts, len(indices))
    if not readable:
        torch._assert_async(~wrong.any(), f"{name} must be in [0, {size})")
        return
    places = wrong.numpy().nonzero()[0]
    if len(places):
        raise IndexError(f"{name} must be in [0, {size}); got {numbers[places[0]]} at position {places[0]}")


def _rows_of(offsets: Tensor, experts: Tensor | None, num_rows: int) -> Tensor:
    """Return which of the rows belong to the listed experts, bool [num_rows]; offsets and experts are legal."""
    bounds = (offsets if offsets.dim() == 2 else torch.stack([offsets[:-1], offsets[1:]], 1)).long()
    starts, stops = (bounds if experts is None else bounds[experts.long()]).unbind(1)
    steps = torch.zeros(num_rows + 1, dtype=torch.long, device=offsets.device)
    steps = steps.index_add(0, starts, torch.ones_like(starts)).index_add(0, stops, -torch.ones_like(stops))
    return steps.cumsum(0)[:-1] > 0


def check_routing(sorted_rows: Tensor, offsets: Tensor, trained_experts: Tensor | None) -> None:
    """Raise ValueError or IndexError for illegal offsets or trained experts, and unless experts have each row once."""
    check_offsets(offsets, len(sorted_rows))
    check_indices("trained_experts", trained_experts, len(offsets) - 1)
    check_indices("sorted_rows", sorted_rows, len(sorted_rows), offsets)
    if _is_readable(sorted_rows) and not _is_vouched(sorted_rows, len(sorted_rows)):
        _check_distinct("sorted_rows", sorted_rows[: int(offsets.numpy()[-1])])


def check_rows(experts: Tensor | None, *gradients: Sequence[Any]) -> None:
    """Raise ValueError or IndexError unless the experts exist, and their rows too in the `Factors` of each gradient."""
    for grad, input, offsets, grad_rows, input_rows in gradients:
        check_offsets(offsets, num_positions(grad, input, grad_rows, input_rows))
        check_indices("experts", experts, num_listed(offsets, None))
        check_indices("grad_rows", grad_rows, grad.shape[0], offsets, experts)
        check_indices("input_rows", input_rows, input.shape[0], offsets, experts)


def _is_vouched(indices: Tensor, limit: int) -> bool:
    """Return whether an op of ours made these indices, of at most this limit, and nothing has changed them since."""
    version, known = getattr(indices, "_moe_unlearn_limit", (None, 0))
    return version is not None and known <= limit and version == indices._version


def _is_readable(indices: Tensor) -> bool:
    """Return whether reading does not wait for a device."""
    return indices.is_cpu


def check_mask(p: Tensor, mask: Tensor | None, parameter_id: int) -> None:
    """Raise TypeError or ValueError, naming the parameter, for a mask that does not fit it."""
    if mask is None:
        return
    words = [*words_shape(p.shape)]
    where = f"parameter {parameter_id} of shape {list(p.shape)}"
    if mask.dtype != torch.int32:
        raise TypeError(f"{where}: mask must be int32 words (ops.bits.pack_bits); got {mask.dtype}")
    if list(mask.shape) != words:
        raise ValueError(f"{where}: mask must have shape {words}; got {list(mask.shape)}")
    if mask.device != p.device:
        raise ValueError(f"{where}: mask must be on {p.device}; got {mask.device}")
