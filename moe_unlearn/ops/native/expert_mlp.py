"""Calls csrc/cpu/expert_mlp.cpp, which has no float64: routing weights of that dtype go to `ref`."""

from typing import Any

import torch
from torch import Tensor

from moe_unlearn.ops.expert_mlp import _backward_ref, _forward_ref, largest_of


def forward(
    x: Tensor, weights: Tensor, sorted_rows: Tensor, expert_offsets: Tensor, *rest: Any
) -> tuple[Tensor, Tensor]:
    if weights.dtype == torch.float64:
        return _forward_ref(x, weights, sorted_rows, expert_offsets, *rest)
    out, z = torch.ops.moe_unlearn_native.expert_mlp(
        x, weights, sorted_rows.contiguous(), expert_offsets.contiguous(), *rest
    )
    return out, z


def backward(
    grad_out: Tensor, x: Tensor, weights: Tensor, sorted_rows: Tensor, expert_offsets: Tensor, *operands: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    *rest, needs = operands
    if weights.dtype == torch.float64:
        return _backward_ref(grad_out, x, weights, sorted_rows, expert_offsets, *rest, needs)
    *needs, need_largest = needs
    d_x, d_weights, dz, scaled = torch.ops.moe_unlearn_native.expert_mlp_backward(
        grad_out, x, weights, sorted_rows.contiguous(), expert_offsets.contiguous(), *rest, *needs
    )
    largest = largest_of(dz, scaled) if need_largest else dz.new_empty(0, dtype=torch.float32)
    return d_x, d_weights, dz, scaled, largest
