"""Checks the operands of the ops on experts and of `masked_update`, whose updates `expert_wgrad` takes too."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from moe_unlearn.ops.bits import num_words
from moe_unlearn.ops.gate import ACTIVATIONS, ExpertLayout, ExpertWeights

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
        if name != "top_k_weights" and tensor.is_floating_point() and tensor.dtype != x.dtype:
            raise TypeError(f"{name} must be {x.dtype} like hidden_states; got {tensor.dtype}")


def num_listed(expert_offsets: Tensor, experts: Tensor | None) -> int:
    """Return M_e, the number of listed experts."""
    if experts is not None:
        return experts.shape[0]
    return expert_offsets.shape[0] - (1 if expert_offsets.dim() == 1 else 0)


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
    whole, shape = ((num_listed(offsets, e), grad.shape[1], input.shape[1]) for e in (None, experts))
    floats = {"weight": (weight, whole)} | {name: (buffer, shape) for name, buffer in buffers.items()}
    for name, (tensor, expected) in floats.items():
        if tensor is not None and (tensor.shape != expected or not tensor.is_floating_point()):
            raise ValueError(f"{name} must be float {list(expected)}; got {tensor.dtype} {list(tensor.shape)}")
    words = (*shape[:-1], num_words(shape[-1]))
    if mask is not None and (mask.dtype != torch.int32 or mask.shape != words):
        raise ValueError(f"mask must be int32 words {list(words)}; got {mask.dtype} {list(mask.shape)}")
    tensors = {"input": input, "expert_offsets": offsets, "grad_rows": grad_rows, "input_rows": input_rows}
    tensors |= {"experts": experts, "mask": mask, "weight": weight, **buffers}
    for name, tensor in tensors.items():
        if tensor is not None and tensor.device != grad.device:
            raise ValueError(f"{name} must be on {grad.device} like grad; got {tensor.device}")


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
        if tensor is not None and list(tensor.shape) != shape:
            raise ValueError(f"{name} must have shape {shape}; got {list(tensor.shape)}")
    if mask is not None:
        words = [*shape[:-1], num_words(shape[-1])] if shape else [1]
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
    for name, tensor in state.items():
        if tensor is not None and tensor.dtype not in (param.dtype, torch.float32):
            raise TypeError(f"{name} must be {param.dtype}, as param, or float32; got {tensor.dtype}")
    if len({tensor.dtype for tensor in state.values() if tensor is not None}) > 1:
        raise TypeError(
            f"{' and '.join(state)} must have one dtype; got {[s.dtype for s in state.values() if s is not None]}"
        )


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


def check_mask(p: Tensor, mask: Tensor | None, parameter_id: int) -> None:
    """Raise TypeError or ValueError, naming the parameter, for a mask that does not fit it."""
    if mask is None:
        return
    words = [*p.shape[:-1], num_words(p.shape[-1])] if p.dim() else [1]
    where = f"parameter {parameter_id} of shape {list(p.shape)}"
    if mask.dtype != torch.int32:
        raise TypeError(f"{where}: mask must be int32 words (ops.bits.pack_bits); got {mask.dtype}")
    if list(mask.shape) != words:
        raise ValueError(f"{where}: mask must have shape {words}; got {list(mask.shape)}")
    if mask.device != p.device:
        raise ValueError(f"{where}: mask must be on {p.device}; got {mask.device}")
