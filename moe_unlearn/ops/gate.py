"""Describes the weights of experts and their layout, and computes the activation between the projections."""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu", "relu2")


class Gate(NamedTuple):
    """The activation between the projections, clamped by torch.clamp (also in the gradient):

        gated       act(min(gate, limit)) * (clamp(up, -limit, limit) + shift)
        not gated   act(min(z, limit))

    `silu` is x * sigmoid(alpha * x); other activations ignore `alpha`. SwiGLU is `Gate()`, gpt-oss
    `Gate("silu", 1.702, 7.0, 1.0)`.
    """

    activation: str = "silu"
    alpha: float = 1.0
    limit: float = math.inf
    shift: float = 0.0


class ExpertWeights(NamedTuple):
    """The weights of all experts of a layer; the layer's `ExpertLayout` says what they are.

    gate_up_proj: [E, 2I, H], or [E, H, 2I] if transposed; [E, I, H] if not gated. down_proj: [E, H, I], or [E, I, H] if
    transposed. The biases are [E, 2I] and [E, H].
    """

    gate_up_proj: Tensor
    down_proj: Tensor
    gate_up_bias: Tensor | None = None
    down_bias: Tensor | None = None


class ExpertLayout(NamedTuple):
    """The activation of an experts layer and how its weights lie in memory; see `ExpertWeights`.

    transposed: weights are [inputs, outputs]. interleaved: gate and up alternate (gate0, up0, ...) instead of standing
    one after the other. gated: there are both gate and up.
    """

    gate: Gate = Gate()
    transposed: bool = False
    interleaved: bool = False
    gated: bool = True

    def flat(self) -> tuple:
        """Return the fields, those of the gate first, as kernels take them."""
        return *self.gate, self.transposed, self.interleaved, self.gated

    @classmethod
    def of(cls, activation: str, alpha: float, limit: float, shift: float, *flags: bool) -> "ExpertLayout":
        """Return the layout whose `flat` fields these are."""
        return cls(Gate(activation, alpha, limit, shift), *flags)


def activate(z: Tensor, gate: Gate, interleaved: bool = False, gated: bool = True) -> Tensor:
    """Compute activations [..., I] from pre-activations [..., 2I] ([..., I] if not gated); see `Gate`."""
    if not gated:
        return _act(_clamp_above(z, gate.limit), gate)
    g, u = _split(z, interleaved)
    if math.isfinite(gate.limit):
        u = u.clamp(-gate.limit, gate.limit)
    return _act(_clamp_above(g, gate.limit), gate) * (u + gate.shift if gate.shift else u)


def recognise(
    function: Callable[[Tensor], Tensor],
    layouts: Sequence[bool],
    numbers: set[float],
    device: torch.device,
    *,
    gated: bool,
) -> tuple[Gate, bool] | str:
    """Find the gate that `function` computes, and its layout, the first of `layouts` (interleaved or not) that fits.

    The function is called once for each layout, on a fixed probe, and compared with the known formulas with these
    `numbers` for their parameters. If none fits, the result says why.
    """
    # both signs of every size, so that a clamp shows at whatever value it cuts
    sizes = torch.cat([torch.linspace(0, 8, 33), torch.logspace(1, 5, 25)])
    values = torch.cat([-sizes, sizes]).to(device)
    pairs = torch.cartesian_prod(values, values) if gated else values[:, None]
    # a large factor magnifies the rounding of an activation that has almost vanished
    tolerance = 1e-6 * pairs.abs().clamp_min(1).prod(1)
    for interleaved in layouts:
        probe = (pairs if interleaved else pairs.t()).reshape(1, -1)
        try:
            with torch.enable_grad(), torch.autocast(device.type, enabled=False):
                expected = function(probe.clone())
        except Exception as error:  # a foreign function may fail in any way on the probe
            return f"its activation fails on a probe ({error})"
        if expected.requires_grad:
            return "its activation has parameters of its own"
        for gate in _candidates(numbers):
            ours = activate(probe, gate, interleaved, gated)
            if ours.shape != expected.shape:
                break
            if ((ours - expected).abs() <= 1e-5 * expected.abs() + tolerance).all():
                return gate, interleaved
    return "its activation is none of the known formulas"


def _candidates(numbers: set[float]) -> Iterator[Gate]:
    """Yield the gates to compare with, plain ones first."""
    for limit in (math.inf, *sorted(numbers - {math.inf})):
        for shift in (0.0, 1.0):
            for activation in ACTIVATIONS:
                yield Gate(activation, 1.0, limit, shift)
            for alpha in sorted(numbers | {1.702}):
                yield Gate("silu", alpha, limit, shift)


def _clamp_above(x: Tensor, limit: float) -> Tensor:
    # a clamp at infinity changes no value but drops the gradient of a NaN
    return x.clamp(max=limit) if math.isfinite(limit) else x


def activate_backward(z: Tensor, grad: Tensor, gate: Gate, interleaved: bool, gated: bool) -> Tensor:
    """Compute the gradient of `activate` in the dtype of `grad`; the result has the dtype of z."""
    clamped = math.isfinite(gate.limit)
    if not gated:
        x = z.to(grad.dtype)
        dz = grad * _act_derivative(_clamp_above(x, gate.limit), gate)
        return (torch.where(x <= gate.limit, dz, 0) if clamped else dz).to(z.dtype)
    g, u = (part.to(grad.dtype) for part in _split(z, interleaved))
    below = _clamp_above(g, gate.limit)
    up = (u.clamp(-gate.limit, gate.limit) if clamped else u) + gate.shift
    d_gate, d_up = grad * up * _act_derivative(below, gate), grad * _act(below, gate)
    if clamped:
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
