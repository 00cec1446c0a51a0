"""expert_mlp: the expert layer as one op over rows sorted by expert.

    z[n]  = gate_up_proj[e] x[t] (+ gate_up_bias[e])                 row n = t * K + k, e its expert
    a[n]  = act(z_gate) * z_up                                       see `Gate`
    y[n]  = down_proj[e] a[n] (+ down_bias[e])
    out[t] = sum_k top_k_weights[t, k] * y[t * K + k]                terms added in the order of k

Shapes: T tokens, K experts per token, N = T * K rows, H hidden, I intermediate, E experts. `sorted_rows` and
`expert_offsets` come from `ops.route`: rows behind `expert_offsets[E]` are "not here" and contribute exactly
nothing, whatever their weight holds. Saved for the backward: hidden states and pre-activations z.

Backward: dgrad first (d hidden_states, d top_k_weights, dz and the weighted activation), then the weight
gradients through `expert_wgrad`, those that are asked for only. The routing-weight gradient is
<d out[t] W_down, a[n]>, one dot product per row. No atomics, fixed order of additions: deterministic.
Source: our specification; the maths is transformers' experts interface.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from moe_unlearn import backend
from moe_unlearn.ops.expert_wgrad import expert_wgrad

ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu", "relu2")


class Gate(NamedTuple):
    """The activation between the projections, with clamp as torch.clamp has it (its gradient too):

        gated       act(min(gate, limit)) * (clamp(up, -limit, limit) + shift)
        not gated   act(min(z, limit))

    `silu` is x * sigmoid(alpha * x); `alpha` means nothing to the others. SwiGLU is `Gate()`, gpt-oss
    `Gate("silu", 1.702, 7.0, 1.0)`.
    """

    activation: str = "silu"
    alpha: float = 1.0
    limit: float = math.inf
    shift: float = 0.0


def expert_mlp(
    hidden_states: Tensor,
    top_k_weights: Tensor,
    sorted_rows: Tensor,
    expert_offsets: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    *,
    gate: Gate = Gate(),  # noqa: B008 -- an immutable tuple
    transposed: bool = False,
    interleaved: bool = False,
    gated: bool = True,
    impl: str = "auto",
) -> Tensor:
    """The expert layer, differentiable in all floating inputs; see the module docstring.

    Args:
        hidden_states: [T, H]; top_k_weights: [T, K], its own float dtype (float32 in a bf16 model is kept).
        sorted_rows, expert_offsets: int32 [N] and [E + 1] of `ops.route`.
        gate_up_proj: [E, 2I, H], or [E, H, 2I] if `transposed`; [E, I, H] if not `gated`.
        down_proj: [E, H, I], or [E, I, H] if `transposed`; biases [E, 2I] and [E, H].
        interleaved: gate and up alternate (gate0, up0, ...) instead of standing one after the other.

    Returns [T, H] in the dtype of `hidden_states`. Raises TypeError or ValueError for bad shapes, dtypes or
    devices, and RuntimeError on double backward.
    """
    _check(hidden_states, top_k_weights, sorted_rows, expert_offsets, gate_up_proj, down_proj,
           gate_up_bias, down_bias, gate, transposed, interleaved, gated)  # fmt: skip
    return _expert_mlp(
        hidden_states, top_k_weights, sorted_rows, expert_offsets, gate_up_proj, down_proj, gate_up_bias,
        down_bias, *gate, transposed, interleaved, gated, impl,
    )[0]  # fmt: skip


def expert_mlp_ref(
    hidden_states: Tensor,
    top_k_weights: Tensor,
    sorted_rows: Tensor,
    expert_offsets: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    *,
    gate: Gate = Gate(),  # noqa: B008
    transposed: bool = False,
    interleaved: bool = False,
    gated: bool = True,
) -> Tensor:
    """`expert_mlp` in plain PyTorch, differentiable by autograd; same arguments and shapes."""
    return _forward_ref(
        hidden_states, top_k_weights, sorted_rows, expert_offsets, gate_up_proj, down_proj, gate_up_bias,
        down_bias, *gate, transposed, interleaved, gated,
    )[0]  # fmt: skip


def _forward_ref(
    x, weights, sorted_rows, expert_offsets, gate_up_proj, down_proj, gate_up_bias, down_bias,
    activation, alpha, limit, shift, transposed, interleaved, gated,
):  # fmt: skip
    """Output [T, H] and pre-activations [N, 2I] in sorted order, zero behind the last expert."""
    num_tokens, top_k = weights.shape
    gate = Gate(activation, alpha, limit, shift)
    z_parts, y_parts = [], []
    for e, rows in _segments(sorted_rows, expert_offsets):
        w1, w2 = (w[e].t() if transposed else w[e] for w in (gate_up_proj, down_proj))
        b1, b2 = (None if b is None else b[e] for b in (gate_up_bias, down_bias))
        z = torch.nn.functional.linear(x[rows // top_k], w1, b1)
        y = torch.nn.functional.linear(activate(z, gate, interleaved, gated), w2, b2)
        z_parts.append(z)
        y_parts.append(y * weights.flatten()[rows, None])
    here = _here(sorted_rows, expert_offsets)
    width = gate_up_proj.shape[2 if transposed else 1]
    z = torch.cat([*z_parts, x.new_zeros(len(sorted_rows) - len(here), width)])
    dtype = torch.promote_types(x.dtype, weights.dtype)
    slots = torch.zeros(num_tokens * top_k, x.shape[1], dtype=dtype, device=x.device)
    if y_parts:
        slots = slots.index_copy(0, here, torch.cat(y_parts).to(dtype))
    return slots.view(num_tokens, top_k, x.shape[1]).sum(1).to(x.dtype), z


def _backward_ref(
    grad_out, x, weights, sorted_rows, expert_offsets, gate_up_proj, down_proj, down_bias, z,
    activation, alpha, limit, shift, transposed, interleaved, gated,
):  # fmt: skip
    """d hidden_states [T, H], d top_k_weights [T, K], dz [N, 2I], weighted activation [N, I]."""
    num_tokens, top_k = weights.shape
    gate = Gate(activation, alpha, limit, shift)
    width = down_proj.shape[1 if transposed else 2]
    dz, scaled = torch.zeros_like(z), z.new_zeros(len(z), width)
    d_slots = torch.zeros(num_tokens * top_k, x.shape[1], dtype=x.dtype, device=x.device)
    d_weights = torch.zeros(num_tokens * top_k, dtype=weights.dtype, device=x.device)
    start = 0
    for e, rows in _segments(sorted_rows, expert_offsets):
        here = slice(start, start + len(rows))
        start += len(rows)
        w1, w2 = (w[e].t() if transposed else w[e] for w in (gate_up_proj, down_proj))
        g = grad_out[rows // top_k]
        w = weights.flatten()[rows, None]
        da = g @ w2
        a = activate(z[here], gate, interleaved, gated)
        dw = (da.to(dw_dtype(weights)) * a).sum(1)
        if down_bias is not None:
            dw = dw + (g.to(dw.dtype) * down_bias[e]).sum(1)
        d_weights[rows] = dw.to(weights.dtype)
        scaled[here] = (a * w).to(scaled.dtype)
        dz[here] = _activate_backward(z[here], da * w, gate, interleaved, gated)
        d_slots[rows] = dz[here] @ w1
    return d_slots.view(num_tokens, top_k, x.shape[1]).sum(1), d_weights.view(num_tokens, top_k), dz, scaled


def dw_dtype(weights: Tensor) -> torch.dtype:
    """The routing-weight gradient is summed over I in at least float32."""
    return torch.promote_types(weights.dtype, torch.float32)


def activate(z: Tensor, gate: Gate, interleaved: bool = False, gated: bool = True) -> Tensor:
    """Pre-activations [..., 2I] (or [..., I] if not gated) -> activations [..., I]; see `Gate`."""
    if not gated:
        return _act(z.clamp(max=gate.limit), gate)
    g, u = _split(z, interleaved)
    return _act(g.clamp(max=gate.limit), gate) * (u.clamp(-gate.limit, gate.limit) + gate.shift)


def _activate_backward(z: Tensor, grad: Tensor, gate: Gate, interleaved: bool, gated: bool) -> Tensor:
    """Gradient of `activate`, computed in at least float32, in the dtype of z."""
    wide = torch.promote_types(z.dtype, torch.float32)
    grad = grad.to(wide)
    if not gated:
        z_wide = z.to(wide)
        inner = grad * _act_derivative(z_wide.clamp(max=gate.limit), gate)
        return torch.where(z_wide <= gate.limit, inner, 0).to(z.dtype)
    g, u = (part.to(wide) for part in _split(z, interleaved))
    clamped = g.clamp(max=gate.limit)
    d_gate = grad * (u.clamp(-gate.limit, gate.limit) + gate.shift) * _act_derivative(clamped, gate)
    d_up = grad * _act(clamped, gate)
    d_gate = torch.where(g <= gate.limit, d_gate, 0)
    d_up = torch.where(u.abs() <= gate.limit, d_up, 0)
    joined = torch.stack([d_gate, d_up], -1).flatten(-2) if interleaved else torch.cat([d_gate, d_up], -1)
    return joined.to(z.dtype)


def _act(x: Tensor, gate: Gate) -> Tensor:
    if gate.activation == "silu":
        return torch.nn.functional.silu(x) if gate.alpha == 1 else x * torch.sigmoid(gate.alpha * x)
    if gate.activation == "gelu":
        return torch.nn.functional.gelu(x)
    if gate.activation == "gelu_tanh":
        return torch.nn.functional.gelu(x, approximate="tanh")
    return x.relu() if gate.activation == "relu" else x.relu().square()


def _act_derivative(x: Tensor, gate: Gate) -> Tensor:
    if gate.activation == "silu":
        s = torch.sigmoid(gate.alpha * x)
        return s + gate.alpha * x * s * (1 - s)
    if gate.activation == "gelu":
        density = torch.exp(-0.5 * x.square()) / math.sqrt(2 * math.pi)
        return 0.5 * (1 + torch.erf(x / math.sqrt(2))) + x * density
    if gate.activation == "gelu_tanh":
        scale = math.sqrt(2 / math.pi)
        t = torch.tanh(scale * (x + 0.044715 * x**3))
        return 0.5 * (1 + t) + 0.5 * x * (1 - t.square()) * scale * (1 + 3 * 0.044715 * x.square())
    return (x > 0).to(x.dtype) if gate.activation == "relu" else 2 * x.relu()


def _split(z: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    if interleaved:
        return z[..., ::2], z[..., 1::2]
    gate, up = z.chunk(2, dim=-1)
    return gate, up


def _segments(sorted_rows: Tensor, expert_offsets: Tensor):
    """(expert, its rows as int64) for every expert that has any."""
    bounds = expert_offsets.tolist()
    for e, (start, stop) in enumerate(zip(bounds[:-1], bounds[1:], strict=True)):
        if start < stop:
            yield e, sorted_rows[start:stop].long()


def _here(sorted_rows: Tensor, expert_offsets: Tensor) -> Tensor:
    return sorted_rows[: int(expert_offsets[-1])].long()


@torch.library.custom_op("moe_unlearn::expert_mlp", mutates_args=())
def _expert_mlp(
    hidden_states: Tensor, top_k_weights: Tensor, sorted_rows: Tensor, expert_offsets: Tensor,
    gate_up_proj: Tensor, down_proj: Tensor, gate_up_bias: Tensor | None, down_bias: Tensor | None,
    activation: str, alpha: float, limit: float, shift: float,
    transposed: bool, interleaved: bool, gated: bool, impl: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    kernel = backend.resolve("expert_mlp", impl, hidden_states)
    return kernel(
        hidden_states, top_k_weights, sorted_rows, expert_offsets, gate_up_proj, down_proj, gate_up_bias,
        down_bias, activation, alpha, limit, shift, transposed, interleaved, gated,
    )  # fmt: skip


@_expert_mlp.register_fake
def _(hidden_states, top_k_weights, sorted_rows, expert_offsets, gate_up_proj, *rest):
    transposed = rest[7]
    width = gate_up_proj.shape[2 if transposed else 1]
    out = hidden_states.new_empty(hidden_states.shape)
    return out, hidden_states.new_empty(sorted_rows.shape[0], width)


@torch.library.custom_op("moe_unlearn::expert_mlp_backward", mutates_args=())
def _expert_mlp_backward(
    grad_out: Tensor, hidden_states: Tensor, top_k_weights: Tensor, sorted_rows: Tensor,
    expert_offsets: Tensor, gate_up_proj: Tensor, down_proj: Tensor, down_bias: Tensor | None, z: Tensor,
    activation: str, alpha: float, limit: float, shift: float,
    transposed: bool, interleaved: bool, gated: bool, impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    kernel = backend.resolve("expert_mlp.backward", impl, hidden_states)
    return kernel(
        grad_out, hidden_states, top_k_weights, sorted_rows, expert_offsets, gate_up_proj, down_proj,
        down_bias, z, activation, alpha, limit, shift, transposed, interleaved, gated,
    )  # fmt: skip


@_expert_mlp_backward.register_fake
def _(grad_out, hidden_states, top_k_weights, sorted_rows, expert_offsets, gate_up_proj, down_proj,
      down_bias, z, activation, alpha, limit, shift, transposed, *rest):  # fmt: skip
    width = down_proj.shape[1 if transposed else 2]
    return (
        hidden_states.new_empty(hidden_states.shape),
        top_k_weights.new_empty(top_k_weights.shape),
        torch.empty_like(z),
        z.new_empty(z.shape[0], width),
    )


def _setup_context(ctx, inputs, output):
    (x, weights, rows, offsets, w1, w2, b1, b2, *ctx.options) = inputs
    ctx.save_for_backward(x, weights, rows, offsets, w1, w2, b1, b2, output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx, grad_out, _):
    if grad_out is None:
        return (None,) * 16
    x, weights, rows, offsets, w1, w2, b1, b2, z = ctx.saved_tensors
    transposed, impl = ctx.options[4], ctx.options[-1]
    dx, dw, dz, scaled = torch.ops.moe_unlearn.expert_mlp_backward(
        grad_out, x, weights, rows, offsets, w1, w2, b2, z, *ctx.options
    )
    token = rows // weights.shape[1]
    needs = ctx.needs_input_grad

    def wgrad(out_side, in_side, out_rows=None, in_rows=None, dtype=None):
        if transposed:
            out_side, in_side, out_rows, in_rows = in_side, out_side, in_rows, out_rows
        return expert_wgrad(
            out_side, in_side, offsets, grad_rows=out_rows, input_rows=in_rows, out_dtype=dtype, impl=impl
        )

    d_w1 = wgrad(dz, x, in_rows=token, dtype=w1.dtype) if needs[4] else None
    d_w2 = wgrad(grad_out, scaled, out_rows=token, dtype=w2.dtype) if needs[5] else None
    d_b1 = d_b2 = None
    if b1 is not None and needs[6]:
        ones = dz.new_ones(1, 1).expand(len(dz), 1)
        d_b1 = expert_wgrad(dz, ones, offsets, out_dtype=b1.dtype, impl=impl).squeeze(-1)
    if b2 is not None and needs[7]:
        column = weights.flatten()[rows.long(), None].to(grad_out.dtype)
        d_b2 = expert_wgrad(
            grad_out, column, offsets, grad_rows=token, out_dtype=b2.dtype, impl=impl
        ).squeeze(-1)
    return (dx if needs[0] else None, dw if needs[1] else None, None, None, d_w1, d_w2, d_b1, d_b2,
            *[None] * 8)  # fmt: skip


def _no_double_backward(ctx, *grads):
    raise RuntimeError("expert_mlp has no double backward; use impl-free expert_mlp_ref for that")


_expert_mlp.register_autograd(_backward, setup_context=_setup_context)
_expert_mlp_backward.register_autograd(_no_double_backward)
backend.register("expert_mlp", "ref", _forward_ref)
backend.register("expert_mlp.backward", "ref", _backward_ref)


def _check(x, weights, sorted_rows, expert_offsets, w1, w2, b1, b2, gate, transposed, interleaved, gated):
    if gate.activation not in ACTIVATIONS:
        raise ValueError(f"gate.activation must be one of {ACTIVATIONS}; got {gate.activation!r}")
    if x.dim() != 2 or not x.is_floating_point():
        raise ValueError(f"hidden_states must be float [T, H]; got {x.dtype} {tuple(x.shape)}")
    if weights.dim() != 2 or len(weights) != len(x) or not weights.is_floating_point():
        raise ValueError(
            f"top_k_weights must be float [T, K] with T = {len(x)}; got {weights.dtype} {tuple(weights.shape)}"
        )
    for name, ids in (("sorted_rows", sorted_rows), ("expert_offsets", expert_offsets)):
        if ids.dtype != torch.int32:
            raise TypeError(f"{name} must be int32, as ops.route returns it; got {ids.dtype}")
    if w1.dim() != 3 or w2.dim() != 3:
        raise ValueError(
            f"gate_up_proj and down_proj must have three dimensions; got {tuple(w1.shape)}, {tuple(w2.shape)}"
        )
    num_experts, hidden = len(w1), x.shape[1]
    inner = w2.shape[1 if transposed else 2]
    wide = 2 * inner if gated else inner
    expected = {
        "sorted_rows": (sorted_rows, (weights.numel(),)),
        "expert_offsets": (expert_offsets, (num_experts + 1,)),
        "gate_up_proj": (w1, (num_experts, hidden, wide) if transposed else (num_experts, wide, hidden)),
        "down_proj": (w2, (num_experts, inner, hidden) if transposed else (num_experts, hidden, inner)),
        "gate_up_bias": (b1, (num_experts, wide)),
        "down_bias": (b2, (num_experts, hidden)),
    }
    for name, (tensor, shape) in expected.items():
        if tensor is None:
            continue
        if tensor.shape != shape:
            raise ValueError(f"{name} must be {list(shape)}; got {list(tensor.shape)}")
        if tensor.device != x.device:
            raise ValueError(f"{name} must be on {x.device} like hidden_states; got {tensor.device}")
        if tensor.is_floating_point() and tensor.dtype != x.dtype:
            raise TypeError(f"{name} must be {x.dtype} like hidden_states; got {tensor.dtype}")
