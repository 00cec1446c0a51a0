"""Computes the activation between the projections and its derivative on float32 tiles; formulas in `ops.gate.Gate`."""

import triton
import triton.language as tl


@triton.jit
def activate(gate, up, alpha, limit, shift, ACTIVATION: tl.constexpr, CLAMPED: tl.constexpr, GATED: tl.constexpr):
    """Compute act(gate) * (up + shift), both clamped; without GATED act(gate), and `up` is not used."""
    value, _, factor = _parts(gate, up, alpha, limit, shift, ACTIVATION, CLAMPED, GATED)
    if GATED:
        value *= factor
    return value


@triton.jit
def activate_backward(
    gate, up, grad, alpha, limit, shift, ACTIVATION: tl.constexpr, CLAMPED: tl.constexpr, GATED: tl.constexpr
):
    """Compute the gradients of gate and up from that of `activate`; without GATED the second has no meaning."""
    value, slope, factor = _parts(gate, up, alpha, limit, shift, ACTIVATION, CLAMPED, GATED)
    d_gate, d_up = grad * slope, grad * value
    if GATED:
        d_gate *= factor
    if CLAMPED:
        d_gate = tl.where(gate <= limit, d_gate, 0.0)
        d_up = tl.where(tl.abs(up) <= limit, d_up, 0.0)
    return d_gate, d_up


@triton.jit
def _parts(gate, up, alpha, limit, shift, ACTIVATION: tl.constexpr, CLAMPED: tl.constexpr, GATED: tl.constexpr):
    """Compute (act(gate), act'(gate), up + shift) of the clamped operands; NaN stays NaN."""
    if CLAMPED:
        gate = tl.where(gate > limit, limit, gate)
        up = tl.where(up > limit, limit, tl.where(up < -limit, -limit, up))
    value, slope = _act(gate, alpha, ACTIVATION)
    return value, slope, up + shift


@triton.jit
def _act(x, alpha, ACTIVATION: tl.constexpr):
    """Compute (value, derivative) of the activation; the compiler removes one that is not used."""
    if ACTIVATION == "silu":
        s = tl.sigmoid(alpha * x)
        value, slope = x * s, s + alpha * x * s * (1 - s)
    elif ACTIVATION == "gelu":
        below = 0.5 * (1 + tl.erf(x * 0.7071067811865476))
        value, slope = x * below, below + x * tl.exp(-0.5 * x * x) * 0.3989422804014327
    elif ACTIVATION == "gelu_tanh":
        # (1 + tanh(u)) / 2 = sigmoid(2u), u = sqrt(2 / pi) * (x + 0.044715 x^3)
        s = tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
        value, slope = x * s, s + x * s * (1 - s) * 1.5957691216057308 * (1 + 0.134145 * x * x)
    elif ACTIVATION == "relu":
        value, slope = tl.where(x <= 0, 0.0, x), tl.where(x > 0, 1.0, 0.0)
    else:
        value = tl.where(x <= 0, 0.0, x)
        value, slope = value * value, 2 * value
    return value, slope
