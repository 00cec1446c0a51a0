"""The expert layer under low-rank adapters (LoRA), computed without the dense product of an adapter's two factors.

    z[n]  = W_up[e] x[t]   + s B_up[e] (A_up[e] x[t])     (+ gate_up_bias[e])          row n = t * K + k, e its expert
    a[n]  = act(z[n])                                                                 see `Gate`
    y[n]  = W_down[e] a[n] + s B_down[e] (A_down[e] a[n]) (+ down_bias[e])
    out[t] = sum_k top_k_weights[t, k] * y[t * K + k]

Shapes as in `expert_mlp`; A [E, r, in], B [E, out, r]. The sum W + s B A that PEFT computes with takes as much memory
as the weights, and so does its gradient; here a row meets r numbers in place of it. The weights are frozen, and the
gradients are those of x, the routing weights, A and B:

    dB[e] = s sum_n dz[n] (A x[t])^T       dA[e] = s sum_n (B^T dz[n]) x[t]^T       d_x += s A^T B^T dz[n]

Products over rows are torch's `grouped_mm`, which reads no device; those of adapters' gradients are `expert_wgrad`'s.
A fused kernel would add the two thin products to the tile of the wide one: the r numbers of a row would stay in
registers, and x, z and y, which three passes read and write here, would be read and written once.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import grouped_mm, pad

from moe_unlearn.ops.expert_mlp import grouped_linear, slots_of
from moe_unlearn.ops.expert_wgrad import expert_wgrad
from moe_unlearn.ops.gate import ExpertLayout, ExpertWeights, activate

_ALIGNED = 16  # bytes by which grouped_mm wants rows to begin


class LowRank(NamedTuple):
    """A change scale * left @ right of the weights [E, n, m] of a layer: left [E, n, r], right [E, r, m]."""

    left: Tensor
    right: Tensor
    scale: float

    def aligned(self) -> "LowRank":
        """Return the same change with strides and a rank that `grouped_mm` takes: zeros add nothing to a product."""
        missing = -self.left.shape[-1] % (_ALIGNED // self.left.element_size())
        if missing:
            return LowRank(pad(self.left, (0, missing)), pad(self.right, (0, 0, 0, missing)), self.scale)
        return LowRank(self.left.contiguous(), self.right.contiguous(), self.scale)


def is_grouped(weight: Tensor) -> bool:
    """Return whether `grouped_mm` takes rows for weights [E, n, m] of this dtype and these sizes."""
    narrow = weight.dtype in (torch.float32, torch.bfloat16, torch.float16)
    return narrow and all(size * weight.element_size() % _ALIGNED == 0 for size in weight.shape[1:])


def low_rank_mlp(
    hidden_states: Tensor,
    top_k_weights: Tensor,
    sorted_rows: Tensor,
    expert_offsets: Tensor,
    weights: ExpertWeights,
    up: LowRank | None,
    down: LowRank | None,
    *,
    layout: ExpertLayout,
) -> Tensor:
    """Compute the expert layer with changes of its two weights, None for none; see the module docstring.

    Args:
        hidden_states: [T, H]; top_k_weights: [T, K]; sorted_rows, expert_offsets: int32 [N] and [E + 1] of `ops.route`.
        weights, layout: as in `expert_mlp`; the weights get no gradient.
        up, down: in the layout of the weights, in their dtype.

    Returns [T, H] in the dtype of `hidden_states`, differentiable in hidden states, routing weights, left and right.
    Rows behind the last expert contribute nothing. Under autocast the layer computes in autocast's dtype.
    """
    device = hidden_states.device.type
    if device != "meta" and torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        narrow = ExpertWeights._make(None if w is None else w.to(dtype) for w in weights)
        changes = [None if c is None else LowRank(c.left.to(dtype), c.right.to(dtype), c.scale) for c in (up, down)]
        with torch.autocast(device, enabled=False):
            x = hidden_states.to(dtype)
            out = low_rank_mlp(x, top_k_weights, sorted_rows, expert_offsets, narrow, *changes, layout=layout)
            return out.to(hidden_states.dtype)
    num_tokens, top_k = top_k_weights.shape
    rows = sorted_rows.long()
    # a row of its own for each of a token's experts: gathered once each, and added up in the order of k
    x = hidden_states[:, None].expand(-1, top_k, -1).flatten(0, 1).index_select(0, rows)
    z = _linear(x, weights.gate_up_proj, weights.gate_up_bias, up, expert_offsets, layout.transposed)
    a = activate(z, layout.gate, layout.interleaved, layout.gated)
    y = _linear(a, weights.down_proj, weights.down_bias, down, expert_offsets, layout.transposed)
    y = y * top_k_weights.flatten().index_select(0, rows)[:, None]
    return slots_of(y, rows, len(rows)).view(num_tokens, top_k, -1).sum(1).to(hidden_states.dtype)


def _linear(
    rows: Tensor, weight: Tensor, bias: Tensor | None, change: LowRank | None, offsets: Tensor, transposed: bool
) -> Tensor:
    """Apply each expert's changed linear layer to its own slice of `rows`; the others become zero."""
    out: Tensor = _Grouped.apply(rows, weight, offsets, transposed)
    if change is not None:
        change = change.aligned()
        first, second = (change.left, change.right) if transposed else (change.right, change.left)
        thin: Tensor = _Grouped.apply(rows, first, offsets, transposed)
        out = out + change.scale * _Grouped.apply(thin, second, offsets, transposed)
    if bias is not None:
        position = torch.arange(len(rows), device=rows.device)
        expert = torch.searchsorted(offsets[1:], position, right=True).clamp(max=len(bias) - 1)
        out = out + torch.where((position < offsets[-1])[:, None], bias[expert], 0)
    return out


class _Grouped(torch.autograd.Function):
    """The product of each expert's rows [N, in] with its weight, [E, out, in] or, transposed, [E, in, out]."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, offsets: Tensor, transposed: bool) -> Tensor:
        ctx.save_for_backward(rows if ctx.needs_input_grad[1] else None, weight, offsets)
        ctx.transposed = transposed
        return _product(rows, weight, offsets, transposed)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        rows, weight, offsets = ctx.saved_tensors
        grad = grad.contiguous()
        d_rows = _product(grad, weight, offsets, not ctx.transposed) if ctx.needs_input_grad[0] else None
        d_weight = None
        if ctx.needs_input_grad[1]:
            left, right = (rows, grad) if ctx.transposed else (grad, rows)
            d_weight = expert_wgrad(left, right, offsets, out_dtype=weight.dtype)
        return d_rows, d_weight, None, None


def _product(rows: Tensor, weight: Tensor, offsets: Tensor, transposed: bool) -> Tensor:
    """Multiply rows, which are sorted by expert, with their experts' weights; rows behind the last expert are zero."""
    if not is_grouped(weight):
        done = grouped_linear(rows[: int(offsets[-1])], weight, None, offsets, transposed)
        return pad(done, (0, 0, 0, len(rows) - len(done)))
    out = grouped_mm(rows, weight if transposed else weight.mT, offs=offsets[1:])
    # what it leaves behind the last expert is not defined
    return torch.where((torch.arange(len(rows), device=rows.device) < offsets[-1])[:, None], out, 0)
