"""Calls csrc/cpu/token_loss.cpp, which has no float64: arguments of that dtype go to `ref`.

With one more matrix product the forward can keep dl/dh, the gradient of each row's loss before weights and upstream
gradient; without it the backward would have to compute the logits again. The gradients of head and bias need each
row's upstream gradient first. For them the forward keeps exponentials of logits, as many as fit into the memory of the
head's gradient, which later overwrites them, and into a spare tensor of at most SPARE_BYTES. The backward computes the
other logits again; it computes all of them again for kl, in a second backward and with create_graph.
The kernel chooses its own tile size: `chunk_rows` is for `ref`.
"""

from typing import Any

import torch
from torch import Tensor

from moe_unlearn import native
from moe_unlearn.ops.custom import custom_op
from moe_unlearn.ops.schema import fields
from moe_unlearn.ops.tiled import token_loss as tiled
from moe_unlearn.ops.token_loss import (
    IGNORED,
    Formula,
    Operands,
    Softmax,
    _counted,
    _wide,
    backward_operands,
    unflattened,
)

SPARE_BYTES = 2**27
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def forward(*operands: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    loss, value, norm, ref_norm, *_ = forward_kept(*operands, False, False)
    return loss, value, norm, ref_norm


def room(operands: Operands, kind: str, keep: bool, keep_head: bool) -> tuple[Tensor, ...]:
    """Allocate the tensors to keep: dl/dh, exponentials in the head gradient's memory, their maxima, the spare ones."""
    hidden, head, labels, bias, *_ = operands
    direction = hidden.new_zeros(len(hidden) if keep else 0, hidden.shape[1], dtype=_wide(hidden, head))
    if not keep_head or kind == "kl" or not _can_take(operands):
        return direction, *(head.new_empty(0) for _ in range(3))
    group = native.token_loss_tiles().entries
    groups, rows = -(-len(head) // group), -(-len(labels) // 32) * 32
    columns = min(group // 4, SPARE_BYTES // max(1, groups * rows * head.element_size()))
    peaks = head.new_empty(groups + 1, len(labels), dtype=torch.float32)
    return direction, head.new_empty(head.shape), peaks, head.new_empty(groups, columns, rows)


def forward_kept(*operands: Any) -> tuple[Tensor, ...]:
    """Compute the results of the op; tensors that are not kept are empty."""
    *flat, keep, keep_head = operands
    tensors, formula = unflattened(*flat)
    _, head, labels, _, weights, *_ = tensors
    if not _can_take(tensors):
        return *tiled.forward(*flat), *room(tensors, formula.kind, keep, keep_head)
    index = _counted(labels, weights, formula.drop_zero_weights)
    tiled.check_labels(labels[index], formula.kind, len(head))
    _, *kept = room(tensors, formula.kind, False, keep_head)
    kernel = torch.ops.moe_unlearn_native.token_loss
    places = kept if kept[0].numel() else [None] * 3
    value, norm, ref_norm, direction = kernel(*_problem(tensors, formula, index), keep, *places)
    weighted = value.clone() if weights is None else value * weights.float()
    # the product would be NaN in an ignored row whose weight is NaN
    return torch.where(labels == IGNORED, 0, weighted), value, norm, ref_norm, direction, *kept


def backward(grad: Tensor, *operands: Any, direction: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    tensors, softmax, formula, needs = backward_operands(*operands)
    hidden, head, labels, bias, weights, *_ = tensors
    if not _can_take(tensors):
        return tiled.backward(grad, *operands)
    index = _counted(labels, weights, formula.drop_zero_weights)
    problem = _problem(tensors, formula, index)
    upstream = _upstream(grad, weights, softmax.value, index, formula.kind)
    grad_hidden = hidden.new_empty(hidden.shape if needs.hidden else 0)
    if needs.hidden:
        if direction is None:
            *_, direction = torch.ops.moe_unlearn_native.token_loss(*problem, True, None, None, None)
        torch.mul(direction, upstream[:, None], out=grad_hidden)
    grad_head = head.new_empty(head.shape if needs.head else 0)
    grad_bias = head.new_empty(0) if not needs.bias or bias is None else bias.new_empty(bias.shape)
    if needs.head or needs.bias:
        grads = grad_head if needs.head else None, grad_bias if needs.bias else None
        torch.ops.moe_unlearn_native.token_loss_head(
            *grads, upstream, softmax.norm, softmax.ref_norm, *problem, None, None, None
        )
    return grad_hidden, grad_head, grad_bias


@custom_op(
    "moe_unlearn::token_loss_head_",
    schema="(Tensor grad, Tensor hidden, Tensor head, Tensor labels, Tensor? bias, Tensor? weights, "
    f"{fields(Softmax)}, Tensor(a9!) kept, Tensor peaks, Tensor spare, str kind, float scale, float? softcap, "
    "bool drop_zero_weights, bool needs_head, bool needs_bias) -> Tensor",
)
def head_gradient_(grad: Tensor, *operands: Any) -> Tensor:
    """Turn `kept` into the gradient of the head, if needed; return that of the bias, or an empty tensor."""
    own, (value, norm, ref_norm, kept, peaks, spare, *numbers, needs_head, needs_bias) = operands[:5], operands[5:]
    tensors, formula = unflattened(*own, None, None, *numbers, None)
    _, head, labels, bias, weights, *_ = tensors
    index = _counted(labels, weights, formula.drop_zero_weights)
    upstream, problem = _upstream(grad, weights, value, index, formula.kind), _problem(tensors, formula, index)
    grad_bias = head.new_empty(0) if not needs_bias or bias is None else bias.new_empty(bias.shape)
    grads = kept if needs_head else None, grad_bias if needs_bias else None
    torch.ops.moe_unlearn_native.token_loss_head(*grads, upstream, norm, ref_norm, *problem, kept, peaks, spare)
    return grad_bias


@head_gradient_.register_fake
def _(grad: Tensor, hidden: Tensor, head: Tensor, labels: Tensor, bias: Tensor | None, *operands: Any) -> Tensor:
    *_, needs_bias = operands
    return head.new_empty(0) if not needs_bias or bias is None else bias.new_empty(bias.shape)


def _upstream(grad: Tensor, weights: Tensor | None, value: Tensor, index: Tensor, kind: str) -> Tensor:
    """Compute dloss / d(nll or kl) of each row."""
    upstream = torch.zeros(value.shape)
    upstream[index] = (grad.float() if weights is None else grad.float() * weights.float())[index]
    return upstream * -torch.expm1(value) if kind == "uce" else upstream


def _can_take(operands: Operands) -> bool:
    hidden, head, _, bias, _, ref_hidden, ref_head = operands
    return all(t is None or t.dtype in _DTYPES for t in (hidden, head, bias, ref_hidden, ref_head))


def _problem(operands: Operands, formula: Formula, index: Tensor) -> tuple[Any, ...]:
    """Return the kernels' arguments, detached, since torch's threads do not inherit that gradients are off."""
    hidden, head, labels, bias, _, ref_hidden, ref_head = operands
    tensors = [hidden, head, labels.contiguous(), index, bias, ref_hidden, ref_head]
    detached = [None if t is None else t.detach() for t in tensors]
    return *detached, formula.kind, formula.scale, formula.softcap or 0.0
