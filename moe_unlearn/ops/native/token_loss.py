"""Calls csrc/cpu/token_loss.cpp, which has no float64: arguments of that dtype go to `ref`.

With one more matrix product the forward can keep dl/dh, the gradient of each row's loss before weights and upstream
gradient; without it the backward would have to compute the logits again. The gradients of head and bias need each
row's upstream gradient first. For them the forward keeps exponentials of logits, as many as fit into the memory of the
head's gradient, which later overwrites them, and into a spare tensor of at most SPARE_BYTES. The backward computes the
other logits again; it computes all of them again for kl, in a second backward and with create_graph.
The kernel chooses its own tile size: `chunk_rows` is for `ref`.
"""

import torch
from torch import Tensor

from moe_unlearn import native
from moe_unlearn.ops.tiled import token_loss as tiled
from moe_unlearn.ops.token_loss import IGNORED, _check_labels, _counted, _wide

SPARE_BYTES = 2**27
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def forward(*arguments):
    return forward_kept(*arguments, False, False)[:4]


def room(hidden, head, labels, bias, ref_hidden, ref_head, kind, keep, keep_head):
    """Allocate the tensors to keep: dl/dh, exponentials in the head gradient's memory, their maxima, the spare ones."""
    direction = hidden.new_zeros(len(hidden) if keep else 0, hidden.shape[1], dtype=_wide(hidden, head))
    if not keep_head or kind == "kl" or not _can_take(hidden, head, bias):
        return direction, *(head.new_empty(0) for _ in range(3))
    group = native.token_loss_tiles().entries
    groups, rows = -(-len(head) // group), -(-len(labels) // 32) * 32
    columns = min(group // 4, SPARE_BYTES // max(1, groups * rows * head.element_size()))
    peaks = head.new_empty(groups + 1, len(labels), dtype=torch.float32)
    return direction, head.new_empty(head.shape), peaks, head.new_empty(groups, columns, rows)


def forward_kept(hidden, head, labels, bias, weights, ref_hidden, ref_head, kind, scale, softcap, drop_zero_weights,
                 chunk_rows, keep, keep_head):  # fmt: skip
    """Compute the results of the op; tensors that are not kept are empty."""
    arguments = hidden, head, labels, bias, weights, ref_hidden, ref_head, kind, scale, softcap
    if not _can_take(hidden, head, bias, ref_hidden, ref_head):
        outputs = tiled.forward(*arguments, drop_zero_weights, chunk_rows)
        return *outputs, *room(hidden, head, labels, bias, ref_hidden, ref_head, kind, keep, keep_head)
    index = _counted(labels, weights, drop_zero_weights)
    _check_labels(labels[index], kind, len(head))
    problem = _problem(hidden, head, labels, index, bias, ref_hidden, ref_head, kind, scale, softcap)
    kept = room(hidden, head, labels, bias, ref_hidden, ref_head, kind, False, keep_head)[1:]
    kernel = torch.ops.moe_unlearn_native.token_loss
    value, norm, ref_norm, direction = kernel(*problem, keep, *(kept if kept[0].numel() else [None] * 3))
    weighted = value.clone() if weights is None else value * weights.float()
    # the product would be NaN in an ignored row whose weight is NaN
    return torch.where(labels == IGNORED, 0, weighted), value, norm, ref_norm, direction, *kept


def backward(grad, hidden, head, labels, bias, weights, ref_hidden, ref_head, value, norm, ref_norm, kind, scale,
             softcap, drop_zero_weights, chunk_rows, needs_hidden, needs_head, needs_bias, direction=None):  # fmt: skip
    if not _can_take(hidden, head, bias, ref_hidden, ref_head):
        return tiled.backward(grad, hidden, head, labels, bias, weights, ref_hidden, ref_head, value, norm, ref_norm,
                              kind, scale, softcap, drop_zero_weights, chunk_rows, needs_hidden, needs_head,
                              needs_bias)  # fmt: skip
    index = _counted(labels, weights, drop_zero_weights)
    problem = _problem(hidden, head, labels, index, bias, ref_hidden, ref_head, kind, scale, softcap)
    upstream = _upstream(grad, weights, value, index, kind)
    grad_hidden = hidden.new_empty(hidden.shape if needs_hidden else 0)
    if needs_hidden:
        if direction is None:
            direction = torch.ops.moe_unlearn_native.token_loss(*problem, True, None, None, None)[3]
        torch.mul(direction, upstream[:, None], out=grad_hidden)
    grad_head = head.new_empty(head.shape if needs_head else 0)
    grad_bias = head.new_empty(0) if not needs_bias else bias.new_empty(bias.shape)
    if needs_head or needs_bias:
        torch.ops.moe_unlearn_native.token_loss_head(
            grad_head if needs_head else None, grad_bias if needs_bias else None, upstream, norm, ref_norm, *problem,
            None, None, None,
        )  # fmt: skip
    return grad_hidden, grad_head, grad_bias


@torch.library.custom_op("moe_unlearn::token_loss_head_", mutates_args=("kept",))
def head_gradient_(
    grad: Tensor, hidden: Tensor, head: Tensor, labels: Tensor, bias: Tensor | None, weights: Tensor | None,
    value: Tensor, norm: Tensor, ref_norm: Tensor, kept: Tensor, peaks: Tensor, spare: Tensor, kind: str, scale: float,
    softcap: float | None, drop_zero_weights: bool, needs_head: bool, needs_bias: bool,
) -> Tensor:  # fmt: skip
    """Turn `kept` into the gradient of the head, if needed; return that of the bias, or an empty tensor."""
    index = _counted(labels, weights, drop_zero_weights)
    problem = _problem(hidden, head, labels, index, bias, None, None, kind, scale, softcap)
    upstream = _upstream(grad, weights, value, index, kind)
    grad_bias = bias.new_empty(bias.shape) if needs_bias else head.new_empty(0)
    grads = kept if needs_head else None, grad_bias if needs_bias else None
    torch.ops.moe_unlearn_native.token_loss_head(*grads, upstream, norm, ref_norm, *problem, kept, peaks, spare)
    return grad_bias


@head_gradient_.register_fake
def _(grad, hidden, head, labels, bias, *rest):
    return bias.new_empty(bias.shape) if rest[-1] else head.new_empty(0)


def _upstream(grad, weights, value, index, kind):
    """Compute dloss / d(nll or kl) of each row."""
    upstream = torch.zeros(value.shape)
    upstream[index] = (grad.float() if weights is None else grad.float() * weights.float())[index]
    return upstream * -torch.expm1(value) if kind == "uce" else upstream


def _can_take(*tensors: Tensor | None) -> bool:
    return all(t is None or t.dtype in _DTYPES for t in tensors)


def _problem(hidden, head, labels, index, bias, ref_hidden, ref_head, kind, scale, softcap):
    """Return the kernels' arguments, detached, since torch's threads do not inherit that gradients are off."""
    tensors = [None if t is None else t.detach() for t in (hidden, head, labels, index, bias, ref_hidden, ref_head)]
    tensors[2] = tensors[2].contiguous()
    return *tensors, kind, scale, softcap or 0.0
