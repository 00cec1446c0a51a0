"""Calls csrc/*/expert_wgrad.*, with dense int64 indices and the row bounds of the listed experts.

The kernels have no float64: factors, buffers and results of that dtype go to `ref`. CUDA's kernel is for Hopper and
bfloat16 factors.
"""

from typing import Any

import torch
from torch import Tensor

from moe_unlearn.errors import Unfit
from moe_unlearn.ops.expert_wgrad import (
    Factors,
    _accumulate_ref,
    expert_wgrad_adamw_ref_,
    expert_wgrad_ref,
    expert_wgrad_sgd_ref_,
    update_operands,
)
from moe_unlearn.ops.masked_update import SGD, AdamW


def store(grad: Tensor, input: Tensor, *operands: Any) -> Tensor:
    *others, experts, mask, out_dtype = operands
    factors = Factors(grad, input, *others)
    if torch.float64 in (grad.dtype, out_dtype):
        return expert_wgrad_ref(*factors, experts, mask, out_dtype)
    tensors = _operands(factors, experts)
    out = grad.new_empty(len(tensors[2]), grad.shape[1], input.shape[1], dtype=out_dtype)
    torch.ops.moe_unlearn_native.expert_wgrad_(out, *tensors, mask, False)
    return out


def accumulate(out: Tensor, grad: Tensor, input: Tensor, *operands: Any) -> None:
    *others, experts, mask = operands
    factors = Factors(grad, input, *others)
    if torch.float64 in (grad.dtype, out.dtype):
        return _accumulate_ref(out, *factors, experts, mask)
    torch.ops.moe_unlearn_native.expert_wgrad_(out, *_operands(factors, experts), mask, True)


def sgd(weight: Tensor, momentum_buffer: Tensor | None, master: Tensor | None, *operands: Any) -> None:
    factors, experts, mask, rule, update = update_operands(SGD, operands)
    if factors.grad.dtype == torch.float64:
        return expert_wgrad_sgd_ref_(weight, momentum_buffer, master, *operands)
    tensors = *_operands(factors, experts), _listed(weight, experts), mask
    torch.ops.moe_unlearn_native.expert_wgrad_sgd_(weight, momentum_buffer, master, *tensors, *rule.native(update))


def adamw(weight: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, master: Tensor | None, *operands: Any) -> None:
    factors, experts, mask, rule, update = update_operands(AdamW, operands)
    if factors.grad.dtype == torch.float64:
        return expert_wgrad_adamw_ref_(weight, exp_avg, exp_avg_sq, master, *operands)
    tensors = *_operands(factors, experts), _listed(weight, experts), mask
    torch.ops.moe_unlearn_native.expert_wgrad_adamw_(
        weight, exp_avg, exp_avg_sq, master, *tensors, *rule.native(update)
    )


def inner(grads: list[Tensor], *operands: Any) -> Tensor:
    *others, experts, mask = operands
    gradients = [_operands(Factors(*one), experts) for one in zip(grads, *others, strict=True)]
    out = grads[0].new_empty(len(gradients[0][2]), len(gradients), len(gradients), dtype=torch.float64)
    none = out.new_empty(0, dtype=torch.int64)  # stands for absent rows in a list
    sides = [(*made[:3], *(none if rows is None else rows for rows in made[3:])) for made in gradients]
    torch.ops.moe_unlearn_native.expert_wgrad_inner_(out, *map(list, zip(*sides, strict=True)), mask)
    return out


def _operands(factors: Factors, experts: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Return the operands (grad, input, bounds [M_e, 2], grad_rows, input_rows)."""
    grad, input, offsets, grad_rows, input_rows = factors
    bounds = offsets if offsets.dim() == 2 else torch.stack([offsets[:-1], offsets[1:]], 1)
    if experts is not None:
        bounds = bounds[experts.long()]
    grad_at, input_at = (None if ids is None else ids.long().contiguous() for ids in (grad_rows, input_rows))
    return grad, input, bounds.long().contiguous(), grad_at, input_at


def _listed(weight: Tensor, experts: Tensor | None) -> Tensor:
    return torch.arange(len(weight), device=weight.device) if experts is None else experts.long().contiguous()


def _check_hopper(capability: tuple[int, int], *factors: Tensor) -> None:
    """Raise Unfit on any GPU but Hopper, and for factors that the wgmma kernel cannot copy 16 bytes at a time."""
    if capability != (9, 0):
        raise Unfit(f"CUDA's expert_wgrad needs a GPU of compute capability 9.0; got {capability[0]}.{capability[1]}")
    for factor in factors:
        aligned = factor.data_ptr() % 16 == 0 and factor.stride(0) % 8 == 0 and factor.shape[1] % 8 == 0
        if factor.dtype != torch.bfloat16 or factor.stride(1) != 1 or not aligned:
            raise Unfit(
                "CUDA's expert_wgrad needs bfloat16 factors, rows at 16-byte addresses and a multiple of 8 columns of "
                f"stride 1; got {factor.dtype} {list(factor.shape)} of strides {list(factor.stride())}"
            )


def _check_gpu(*factors: Tensor) -> None:
    _check_hopper(torch.cuda.get_device_capability(factors[0].device), *factors)


def _check_update(weight: Tensor, *factors: Tensor) -> None:
    _check_gpu(*factors)
    if weight.dtype == torch.float16:
        raise Unfit("CUDA's expert_wgrad has no update of float16 weights")


def store_cuda(grad: Tensor, input: Tensor, *operands: Any) -> Tensor:
    _check_gpu(grad, input)
    return store(grad, input, *operands)


def accumulate_cuda(out: Tensor, grad: Tensor, input: Tensor, *operands: Any) -> None:
    _check_gpu(grad, input)
    accumulate(out, grad, input, *operands)


def sgd_cuda(weight: Tensor, *operands: Any) -> None:
    _, _, grad, input, *_ = operands
    _check_update(weight, grad, input)
    sgd(weight, *operands)


def adamw_cuda(weight: Tensor, *operands: Any) -> None:
    _, _, _, grad, input, *_ = operands
    _check_update(weight, grad, input)
    adamw(weight, *operands)


def inner_cuda(grads: list[Tensor], inputs: list[Tensor], *operands: Any) -> Tensor:
    _check_gpu(*grads, *inputs)
    return inner(grads, inputs, *operands)
