"""Calls csrc/*/expert_mlp.*, which have no float64: routing weights of that dtype go to `ref`.

CUDA's kernels are for Hopper and SwiGLU in bfloat16; rows and indices that they cannot take as they lie are copied,
weights never.
"""

from typing import Any

import torch
from torch import Tensor

from moe_unlearn.errors import Unfit
from moe_unlearn.ops.expert_mlp import _backward_ref, _forward_ref, largest_of

_MOST_EXPERTS = 4095  # `ProductPlan::max_segments` in csrc/cuda/product_plan.cuh, with those behind the last one


def in_pieces(rows: Tensor) -> Tensor:
    """Return `rows` [N, columns], as a copy if they do not lie at 16-byte addresses with columns of stride 1."""
    fits = rows.stride(1) == 1 and rows.stride(0) * rows.itemsize % 16 == 0 and rows.data_ptr() % 16 == 0
    return rows if fits else rows.clone(memory_format=torch.contiguous_format)


def forward(
    x: Tensor, weights: Tensor, sorted_rows: Tensor, expert_offsets: Tensor, *rest: Any
) -> tuple[Tensor, Tensor]:
    if weights.dtype == torch.float64:
        return _forward_ref(x, weights, sorted_rows, expert_offsets, *rest)
    out, z = torch.ops.moe_unlearn_native.expert_mlp(
        x, weights, sorted_rows.contiguous(), expert_offsets.contiguous(), *rest
    )
    return out, z


def forward_cuda(
    x: Tensor, weights: Tensor, sorted_rows: Tensor, expert_offsets: Tensor, *rest: Any
) -> tuple[Tensor, Tensor]:
    gate_up_proj, down_proj, *biases, activation, _, _, _, _, _, gated = rest
    check_hopper(torch.cuda.get_device_capability(x.device), weights, activation, gated, gate_up_proj, down_proj)
    biases = [None if bias is None else in_pieces(bias.contiguous()) for bias in biases]
    rest = gate_up_proj, down_proj, *biases, *rest[4:]
    return forward(in_pieces(x), weights.contiguous(), sorted_rows, expert_offsets, *rest)


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


def backward_cuda(
    grad_out: Tensor, x: Tensor, weights: Tensor, sorted_rows: Tensor, expert_offsets: Tensor, *operands: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    gate_up_proj, down_proj, down_bias, z, activation, *_, gated, _ = operands
    check_hopper(torch.cuda.get_device_capability(x.device), weights, activation, gated, gate_up_proj, down_proj)
    bias = None if down_bias is None else in_pieces(down_bias.contiguous())
    operands = gate_up_proj, down_proj, bias, in_pieces(z.contiguous()), *operands[4:]
    return backward(in_pieces(grad_out), x, weights.contiguous(), sorted_rows, expert_offsets, *operands)


def check_hopper(
    capability: tuple[int, int], weights: Tensor, activation: str, gated: bool, *projections: Tensor
) -> None:
    """Raise Unfit on any GPU but Hopper, and for a layer that CUDA's kernels do not have."""
    if capability != (9, 0):
        raise Unfit(f"CUDA's expert_mlp needs a GPU of compute capability 9.0; got {capability[0]}.{capability[1]}")
    if activation != "silu" or not gated:
        raise Unfit(f"CUDA's expert_mlp has SwiGLU alone; got {activation!r}{'' if gated else ' without a gate'}")
    if weights.dtype == torch.float64:
        raise Unfit("CUDA's expert_mlp has no float64 top_k_weights")
    for projection in projections:
        experts, stride, _ = projection.stride()
        strides = stride if len(projection) == 1 else experts | stride
        aligned = projection.data_ptr() % 16 == 0 and strides % 8 == 0 and projection.shape[2] % 8 == 0
        if projection.dtype != torch.bfloat16 or projection.stride(2) != 1 or not aligned:
            raise Unfit(
                "CUDA's expert_mlp needs bfloat16 weights, rows at 16-byte addresses and sizes that 8 divides; "
                f"got {projection.dtype} {list(projection.shape)} of strides {list(projection.stride())}"
            )
        if len(projection) > _MOST_EXPERTS:
            raise Unfit(f"CUDA's expert_mlp has at most {_MOST_EXPERTS} experts; got {len(projection)}")
