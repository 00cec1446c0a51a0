"""The calls of csrc/cpu/token_loss.cpp. It has no float64: arguments of that dtype go to `ref`.

The forward can keep dl/dh, the gradient of each row's loss before weights and upstream, for one matrix product
more; a backward without it would have to make the logits again. The gradients of head and bias need each row's
upstream first, so there they are made again. Tiles have a size of their own: `chunk_rows` is for `ref`.
"""

import torch
from torch import Tensor

from moe_unlearn.ops.token_loss import IGNORED, _backward_tiled, _check_labels, _counted, _forward_tiled

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def forward(*arguments):
    return _forward(*arguments, keep=False)[:4]


def forward_kept(*arguments):
    return _forward(*arguments, keep=True)


def _forward(hidden, head, labels, bias, weights, ref_hidden, ref_head, kind, scale, softcap, drop_zero_weights,
             chunk_rows, *, keep):  # fmt: skip
    """What the op returns; dl/dh is empty without `keep`."""
    arguments = hidden, head, labels, bias, weights, ref_hidden, ref_head, kind, scale, softcap
    if not _can_take(hidden, head, bias, ref_hidden, ref_head):
        outputs = _forward_tiled(*arguments, drop_zero_weights, chunk_rows)
        return *outputs, outputs[0].new_zeros(hidden.shape)
    index = _counted(labels, weights, drop_zero_weights)
    _check_labels(labels[index], kind, len(head))
    problem = _problem(hidden, head, labels, index, bias, ref_hidden, ref_head, kind, scale, softcap)
    value, norm, ref_norm, direction = torch.ops.moe_unlearn_native.token_loss(*problem, keep)
    weighted = value.clone() if weights is None else value * weights.float()
    # an ignored row is 0 under a weight of NaN too
    return torch.where(labels == IGNORED, 0, weighted), value, norm, ref_norm, direction


def backward(grad, hidden, head, labels, bias, weights, ref_hidden, ref_head, value, norm, ref_norm, kind, scale,
             softcap, drop_zero_weights, chunk_rows, needs_hidden, needs_head, needs_bias, direction=None):  # fmt: skip
    if not _can_take(hidden, head, bias, ref_hidden, ref_head):
        return _backward_tiled(grad, hidden, head, labels, bias, weights, ref_hidden, ref_head, value, norm, ref_norm,
                               kind, scale, softcap, drop_zero_weights, chunk_rows, needs_hidden, needs_head,
                               needs_bias)  # fmt: skip
    index = _counted(labels, weights, drop_zero_weights)
    problem = _problem(hidden, head, labels, index, bias, ref_hidden, ref_head, kind, scale, softcap)
    upstream = torch.zeros(labels.shape)
    upstream[index] = (grad.float() if weights is None else grad.float() * weights.float())[index]
    if kind == "uce":
        upstream *= -torch.expm1(value)
    grad_hidden = hidden.new_empty(hidden.shape if needs_hidden else 0)
    if needs_hidden:
        if direction is None:
            direction = torch.ops.moe_unlearn_native.token_loss(*problem, True)[3]
        torch.mul(direction, upstream[:, None], out=grad_hidden)
    grad_head = head.new_empty(head.shape if needs_head else 0)
    grad_bias = head.new_empty(0) if not needs_bias else bias.new_empty(bias.shape)
    if needs_head or needs_bias:
        torch.ops.moe_unlearn_native.token_loss_head(
            grad_head if needs_head else None, grad_bias if needs_bias else None, upstream, norm, ref_norm, *problem
        )
    return grad_hidden, grad_head, grad_bias


def _can_take(*tensors: Tensor | None) -> bool:
    return all(t is None or t.dtype in _DTYPES for t in tensors)


def _problem(hidden, head, labels, index, bias, ref_hidden, ref_head, kind, scale, softcap):
    """The kernels' own arguments: detached, for torch's threads do not inherit that gradients are off."""
    tensors = [None if t is None else t.detach() for t in (hidden, head, labels, index, bias, ref_hidden, ref_head)]
    tensors[2] = tensors[2].contiguous()
    return *tensors, kind, scale, softcap or 0.0
