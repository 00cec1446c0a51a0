"""Runs Triton's updates of expert weights; with packed moments, which its epilogue has not, in two kernels an expert.

Then dW of one expert at a time is stored in float32, and `masked_update` makes the update: its blocks of 64 moments are
not divided by the tiles of a gradient.
"""

from typing import Any

import torch
from torch import Tensor

from moe_unlearn.ops.expert_wgrad import expert_wgrad, update_operands
from moe_unlearn.ops.masked_update import SGD, AdamW, Rule, masked_adamw_, masked_sgd_
from moe_unlearn.ops.moments import PACKED
from moe_unlearn.triton_kernels import expert_wgrad_update as fused


def sgd_(weight: Tensor, momentum_buffer: Tensor | None, master: Tensor | None, *operands: Any) -> None:
    """Update weight[experts] by masked SGD; arguments as in `expert_wgrad_sgd_ref_`."""
    if momentum_buffer is None or momentum_buffer.dtype != PACKED:
        fused.sgd_(weight, momentum_buffer, master, *operands)
    else:
        _by_expert(SGD, weight, (momentum_buffer,), master, operands)


def adamw_(weight: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, master: Tensor | None, *operands: Any) -> None:
    """Update weight[experts] by masked AdamW; arguments as in `expert_wgrad_adamw_ref_`."""
    if exp_avg.dtype != PACKED:
        fused.adamw_(weight, exp_avg, exp_avg_sq, master, *operands)
    else:
        _by_expert(AdamW, weight, (exp_avg, exp_avg_sq), master, operands)


def _by_expert(
    kind: type[Rule], weight: Tensor, state: tuple[Tensor, ...], master: Tensor | None, operands: tuple[Any, ...]
) -> None:
    (grad, input, offsets, *rows), experts, mask, rule, update = update_operands(kind, operands)
    by_name = dict(zip(("grad_rows", "input_rows"), rows, strict=True))
    apply: Any = masked_adamw_ if kind is AdamW else masked_sgd_
    if experts is None:
        experts = torch.arange(len(weight), device=weight.device)
    for i in range(len(experts)):
        one = slice(i, i + 1)
        words, own = (None if t is None else t[one] for t in (mask, master))
        dw = expert_wgrad(
            grad, input, offsets, **by_name, experts=experts[one], mask=words, out_dtype=torch.float32, impl="triton"
        )
        moments, slices = [s[one] for s in state], experts[one].long()
        apply(weight, dw, *moments, words, rule, update, master=own, slices=slices, impl="triton")
