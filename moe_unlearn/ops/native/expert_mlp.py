"""Calls csrc/cpu/expert_mlp.cpp, which has no float64: routing weights of that dtype go to `ref`."""

import torch

from moe_unlearn.ops.expert_mlp import _backward_ref, _forward_ref, largest_of


def forward(x, weights, sorted_rows, expert_offsets, *rest):
    if weights.dtype == torch.float64:
        return _forward_ref(x, weights, sorted_rows, expert_offsets, *rest)
    return torch.ops.moe_unlearn_native.expert_mlp(
        x, weights, sorted_rows.contiguous(), expert_offsets.contiguous(), *rest
    )


def backward(grad_out, x, weights, sorted_rows, expert_offsets, *rest):
    *rest, needs = rest
    if weights.dtype == torch.float64:
        return _backward_ref(grad_out, x, weights, sorted_rows, expert_offsets, *rest, needs)
    *needs, need_largest = needs
    *others, dz, scaled = torch.ops.moe_unlearn_native.expert_mlp_backward(
        grad_out, x, weights, sorted_rows.contiguous(), expert_offsets.contiguous(), *rest, *needs
    )
    largest = largest_of(dz, scaled) if need_largest else dz.new_empty(0, dtype=torch.float32)
    return *others, dz, scaled, largest
