"""expert_mlp: computes the expert layer as one op over rows sorted by expert.

    z[n]  = gate_up_proj[e] x[t] (+ gate_up_bias[e])                 row n = t * K + k, e its expert
    a[n]  = act(z_gate) * z_up                                       see `Gate`
    y[n]  = down_proj[e] a[n] (+ down_bias[e])
    out[t] = sum_k top_k_weights[t, k] * y[t * K + k]                terms added in the order of k

Shapes: T tokens, K experts per token, N = T * K rows, H hidden, I intermediate, E experts. `sorted_rows` and
`expert_offsets` come from `ops.route`: rows behind `expert_offsets[E]` are "not here" and contribute exactly
nothing, whatever their weight holds. Hidden states and pre-activations z are saved for the backward.

The backward computes only the gradients that are asked for. First comes dgrad,

    da[n]      = d_out[t] down_proj[e]
    d_w[t, k]  = <da[n], a[n]> (+ <d_out[t], down_bias[e]>)          one dot product per row
    dz[n]      = w[t, k] da[n] * a'(z[n])
    d_x[t]     = sum_k dz[n] gate_up_proj[e]                          terms added in the order of k

then the weight gradients through `expert_wgrad`, from dz and the weighted activation w[t, k] a[n]. They become
gradients of the weights or, with a `sink`, factors that the sink turns into whatever it needs. Where neither
d_w nor d_x is asked for, as in the lowest layer that trains, only rows of `trained_experts` are computed.

Worked example, H = I = 1, one expert of weights gate 1, up 2, down 3, activation relu, x = 2, w = 0.5:
z = (2, 4), a = 2 * 4 = 8, y = 24, out = 12.

The op is deterministic: no atomics, a fixed order of additions. Source: our specification of transformers' experts.
"""

import functools
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moe_unlearn import backend, native
from moe_unlearn.ops.checks import check_layer, check_objects, check_routing, vouch
from moe_unlearn.ops.custom import custom_op
from moe_unlearn.ops.expert_wgrad import BoundedFactors, Factors, expert_wgrad, most_rows_of
from moe_unlearn.ops.gate import ExpertLayout, ExpertWeights, activate, activate_backward
from moe_unlearn.ops.legal import legal_indices, legal_offsets
from moe_unlearn.ops.schema import fields

_PLAIN = ExpertLayout()


def expert_mlp(
    hidden_states: Tensor,
    top_k_weights: Tensor,
    sorted_rows: Tensor,
    expert_offsets: Tensor,
    weights: ExpertWeights,
    *,
    layout: ExpertLayout = _PLAIN,
    trained_experts: Tensor | None = None,
    sink: Callable[[Tensor, Factors], None] | None = None,
    bounded: bool = False,
    impl: str = "auto",
) -> Tensor:
    """Compute the expert layer, differentiable in all floating inputs; see the module docstring.

    Args:
        hidden_states: [T, H]; top_k_weights: [T, K], of its own float dtype (float32 in a bf16 model is kept).
        sorted_rows, expert_offsets: int32 [N] and [E + 1] of `ops.route`.
        weights, layout: shapes as `ExpertWeights` and `ExpertLayout` say.
        trained_experts: int32 [M_e], distinct: the experts whose weights and biases get a gradient; None for all.
            The gradient of the others is exactly zero and costs nothing. A `sink` must want the factors of
            these experts only.
        sink: called in the backward pass as sink(weight, factors) for each weight and bias that requires a
            gradient, after this layer's other gradients: it may change the weight. Such a weight gets no
            gradient of its own. `factors` are those of its dW, a bias [E, M] standing for [E, M, 1].
        bounded: give a sink `BoundedFactors`, as far as this op computes the factors itself.

    Returns [T, H] in the dtype of `hidden_states`. Under autocast the layer computes in autocast's dtype, as
    linear layers do. Raises TypeError or ValueError for bad shapes, dtypes or devices, ValueError or IndexError for
    indices that lead outside, as `ops.checks` says, and RuntimeError on double backward.
    """
    check_objects(weights=(weights, ExpertWeights), layout=(layout, ExpertLayout))
    device = hidden_states.device.type
    if device != "meta" and torch.is_autocast_enabled(device):  # asking for meta is an error
        narrow = ExpertWeights._make(None if w is None else _autocast(w) for w in weights)
        if sink is not None:
            sink = functools.partial(_through, sink, dict(zip(narrow, weights, strict=True)))
        layer = functools.partial(
            expert_mlp, layout=layout, trained_experts=trained_experts, sink=sink, bounded=bounded
        )
        routed = _autocast(hidden_states), top_k_weights, sorted_rows, expert_offsets
        with torch.autocast(device, enabled=False):
            return layer(*routed, narrow, impl=impl).to(hidden_states.dtype)
    check_layer(hidden_states, top_k_weights, sorted_rows, expert_offsets, weights, layout, trained_experts)
    expert_offsets = legal_offsets(expert_offsets, len(sorted_rows))
    trained_experts = legal_indices("trained_experts", trained_experts, len(expert_offsets) - 1)
    sorted_rows = legal_indices("sorted_rows", sorted_rows, len(sorted_rows), expert_offsets)
    operands = hidden_states, top_k_weights, sorted_rows, expert_offsets, *weights, trained_experts
    op = _expert_mlp if sink is None else functools.partial(_WithSink.apply, sink, bounded)
    out: Tensor = op(*operands, *layout.flat(), impl)[0]
    return out


def expert_mlp_ref(
    hidden_states: Tensor,
    top_k_weights: Tensor,
    sorted_rows: Tensor,
    expert_offsets: Tensor,
    weights: ExpertWeights,
    *,
    layout: ExpertLayout = _PLAIN,
) -> Tensor:
    """Compute `expert_mlp` in plain PyTorch, differentiable by autograd; same arguments and shapes."""
    return _forward_ref(hidden_states, top_k_weights, sorted_rows, expert_offsets, *weights, *layout.flat())[0]


def _forward_ref(
    x: Tensor, weights: Tensor, sorted_rows: Tensor, expert_offsets: Tensor, *operands: Any
) -> tuple[Tensor, Tensor]:
    """Compute output [T, H] and pre-activations [N, 2I] in sorted order, zero behind the last expert."""
    gate_up_proj, down_proj, gate_up_bias, down_bias = ExpertWeights(*operands[:4])
    gate, transposed, interleaved, gated = ExpertLayout.of(*operands[4:])
    num_tokens, top_k = weights.shape
    rows = sorted_rows[: int(expert_offsets[-1])].long()
    z = grouped_linear(x[rows // top_k], gate_up_proj, gate_up_bias, expert_offsets, transposed)
    a = activate(z, gate, interleaved, gated)
    y = grouped_linear(a, down_proj, down_bias, expert_offsets, transposed)
    slots = slots_of(y * weights.flatten()[rows, None], rows, weights.numel())
    return slots.view(num_tokens, top_k, x.shape[1]).sum(1).to(x.dtype), _padded(z, weights.numel())


def _backward_ref(
    grad_out: Tensor, x: Tensor, weights: Tensor, sorted_rows: Tensor, expert_offsets: Tensor, *operands: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Compute d hidden_states [T, H], d top_k_weights [T, K], dz [N, 2I], weighted activation [N, I], largest [2].

    `Needs` say which are wanted; the others have no rows. `largest` has the largest |dz| and weighted |activation|
    as stored, NaN if one is NaN, 0 for a factor that is not wanted; float32, or float64 for float64 factors.
    """
    gate_up_proj, down_proj, down_bias, z, *flat, wanted = operands
    (gate, transposed, interleaved, gated), needs = ExpertLayout.of(*flat), Needs(*wanted)
    (num_tokens, top_k), num_rows, hidden = weights.shape, weights.numel(), x.shape[1]
    wide = torch.promote_types(torch.promote_types(x.dtype, weights.dtype), torch.float32)
    rows = sorted_rows[: int(expert_offsets[-1])].long()
    z, w = z[: len(rows)], weights.flatten()[rows, None]
    a = activate(z, gate, interleaved, gated)
    d_x, d_weights = x.new_empty(0, hidden), weights.new_empty(0, top_k)
    dz, scaled = z.new_empty(0, z.shape[1]), z.new_empty(0, a.shape[1])
    if needs.scaled:
        scaled = _padded((a * w).to(z.dtype), num_rows)
    if needs.hidden_states or needs.top_k_weights or needs.dz:
        g = grad_out[rows // top_k]
        da = grouped_linear(g, down_proj, None, expert_offsets, not transposed).to(wide)
    if needs.top_k_weights:
        dw = (da * a).sum(1)
        if down_bias is not None:
            expert = torch.repeat_interleave(torch.arange(len(down_bias), device=x.device), expert_offsets.diff())
            dw = dw + (g.to(wide) * down_bias[expert]).sum(1)
        d_weights = slots_of(dw.to(weights.dtype), rows, num_rows).view(num_tokens, top_k)
    if needs.hidden_states or needs.dz:
        dz_here = activate_backward(z, da * w, gate, interleaved, gated)
    if needs.dz:
        dz = _padded(dz_here, num_rows)
    if needs.hidden_states:
        d_rows = grouped_linear(dz_here, gate_up_proj, None, expert_offsets, not transposed)
        d_x = slots_of(d_rows, rows, num_rows).view(num_tokens, top_k, hidden).sum(1)
    return d_x, d_weights, dz, scaled, largest_of(dz, scaled) if needs.largest else z.new_empty(0, dtype=_bound(z))


def largest_of(dz: Tensor, scaled: Tensor) -> Tensor:
    """Compute the largest absolute value of each factor, [2]; rows that belong to no expert are zero."""
    # many times as fast as the infinity norm
    extremes = [torch.stack(v.aminmax()) if v.numel() else v.new_zeros(2) for v in (dz, scaled)]
    return torch.stack(extremes).abs().amax(1).to(_bound(dz))


def _bound(z: Tensor) -> torch.dtype:
    return torch.promote_types(z.dtype, torch.float32)


def grouped_linear(rows: Tensor, weight: Tensor, bias: Tensor | None, offsets: Tensor, transposed: bool) -> Tensor:
    """Apply each expert's linear layer to its own slice of `rows`, which are sorted by expert."""
    bounds = offsets.tolist()
    parts = [rows.new_zeros(0, weight.shape[2 if transposed else 1])]
    for e, (start, stop) in enumerate(zip(bounds[:-1], bounds[1:], strict=True)):
        if start < stop:
            w = weight[e].t() if transposed else weight[e]
            parts.append(torch.nn.functional.linear(rows[start:stop], w, None if bias is None else bias[e]))
    return torch.cat(parts)


def slots_of(values: Tensor, rows: Tensor, num_rows: int) -> Tensor:
    """Put values[j] at place rows[j] of `num_rows`, zero elsewhere."""
    return values.new_zeros(num_rows, *values.shape[1:]).index_copy(0, rows, values)


def _padded(values: Tensor, num_rows: int) -> Tensor:
    """Append zero rows to `values`, up to `num_rows`."""
    return torch.cat([values, values.new_zeros(num_rows - len(values), values.shape[1])])


def _through(
    sink: Callable[[Tensor, Factors], None], own: dict[Tensor | None, Tensor | None], narrow: Tensor, factors: Factors
) -> None:
    """Give the factors of a weight's copy in autocast's dtype to the sink under the weight itself."""
    weight = own[narrow]
    assert weight is not None
    sink(weight, factors)


def _autocast(tensor: Tensor) -> Tensor:
    """Cast `tensor` as autocast does for a linear layer; float64 stays."""
    if tensor.dtype == torch.float64:
        return tensor
    return tensor.to(torch.get_autocast_dtype(tensor.device.type))


_ROUTED = "Tensor hidden_states, Tensor top_k_weights, Tensor sorted_rows, Tensor expert_offsets"


@custom_op(
    "moe_unlearn::expert_mlp",
    schema=f"({_ROUTED}, {fields(ExpertWeights)}, Tensor? trained_experts, {fields(ExpertLayout)}, str impl) "
    "-> (Tensor, Tensor)",
)
def _expert_mlp(x: Tensor, *operands: Any) -> tuple[Tensor, Tensor]:
    tensors, (trained, *flat, impl) = operands[:7], operands[7:]
    _, sorted_rows, expert_offsets, *_ = tensors
    check_routing(sorted_rows, expert_offsets, trained)
    out, z = backend.resolve("expert_mlp", impl, x)(x, *tensors, *flat)
    return out, z


@_expert_mlp.register_fake
def _(x: Tensor, weights: Tensor, sorted_rows: Tensor, *operands: Any) -> tuple[Tensor, Tensor]:
    _, gate_up_proj, *_, transposed, _, _, _ = operands
    width = gate_up_proj.shape[2 if transposed else 1]
    return x.new_empty(x.shape), x.new_empty(sorted_rows.shape[0], width)


class Needs(NamedTuple):
    """Which results of the backward are wanted."""

    hidden_states: bool
    top_k_weights: bool
    dz: bool
    scaled: bool
    largest: bool


@custom_op(
    "moe_unlearn::expert_mlp_backward",
    schema=f"(Tensor grad_out, {_ROUTED}, Tensor gate_up_proj, Tensor down_proj, Tensor? down_bias, Tensor z, "
    f"{fields(ExpertLayout)}, bool[] needs, str impl) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _expert_mlp_backward(grad_out: Tensor, hidden_states: Tensor, *operands: Any) -> tuple[Tensor, ...]:
    *others, impl = operands
    results: tuple[Tensor, ...] = backend.resolve("expert_mlp.backward", impl, hidden_states)(
        grad_out, hidden_states, *others
    )
    return results


@_expert_mlp_backward.register_fake
def _(grad_out: Tensor, x: Tensor, weights: Tensor, *operands: Any) -> tuple[Tensor, ...]:
    _, _, _, down_proj, _, z, *_, transposed, _, _, wanted, _ = operands
    needs = Needs(*wanted)
    (num_tokens, top_k), num_rows = weights.shape, z.shape[0]
    width = down_proj.shape[1 if transposed else 2]
    return (
        x.new_empty(num_tokens if needs.hidden_states else 0, x.shape[1]),
        weights.new_empty(num_tokens if needs.top_k_weights else 0, top_k),
        z.new_empty(num_rows if needs.dz else 0, z.shape[1]),
        z.new_empty(num_rows if needs.scaled else 0, width),
        z.new_empty(2 if needs.largest else 0, dtype=_bound(z)),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weights, rows, offsets, w1, w2, b1, b2, trained, *flat, ctx.impl = inputs
    ctx.layout = ExpertLayout.of(*flat)
    ctx.save_for_backward(x, weights, rows, offsets, w1, w2, b1, b2, trained, output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_out: Tensor | None, _: object) -> tuple[Tensor | None, ...]:
    if grad_out is None:
        return (None,) * 17
    d_x, d_weights, weights, factors, trained = _dgrad(ctx, grad_out, ctx.needs_input_grad)

    def wgrad(like: Tensor | None, own: Factors | None) -> Tensor | None:
        if like is None or own is None:
            return None
        dw = expert_wgrad(**own._asdict(), experts=trained, out_dtype=like.dtype, impl=ctx.impl)
        dw = dw.view(-1, *like.shape[1:])
        return dw if trained is None else like.new_zeros(like.shape).index_copy(0, trained.long(), dw)

    return (d_x, d_weights, None, None, *map(wgrad, weights, factors), *[None] * 9)


def _dgrad(
    ctx: Any, grad_out: Tensor, needs: Iterable[bool], bounded: bool = False
) -> tuple[Tensor | None, Tensor | None, ExpertWeights, list[Factors | None], Tensor | None]:
    """Compute d hidden_states, d top_k_weights, the four weights, the factors of their gradients and the trained
    experts; gradients and factors that are not needed are None. `bounded`: factors carry their largest values."""
    # unpacked once, since a gradient checkpoint returns saved tensors only once
    x, weights, rows, offsets, w1, w2, b1, b2, trained, z = ctx.saved_tensors
    need_x, need_weights, _, _, need_w1, need_w2, need_b1, need_b2, *_ = needs
    if trained is not None and not (need_x or need_weights):
        rows, offsets, z = _rows_of(trained, rows, offsets, z)
    wanted = Needs(need_x, need_weights, need_w1 or need_b1, need_w2, bounded)
    flat = *ctx.layout.flat(), list(wanted), ctx.impl
    d_x, d_weights, dz, scaled, largest = _expert_mlp_backward(
        grad_out, x, weights, rows, offsets, w1, w2, b2, z, *flat
    )
    token = rows // weights.shape[1]
    vouch(len(rows), offsets)
    vouch(len(x), token)
    up = BoundedFactors(dz, x, offsets, None, token)
    down = BoundedFactors(grad_out, scaled, offsets, token, None)
    if bounded:
        up.largest, down.largest = (largest[0], None), (None, largest[1])
        up.most_rows = down.most_rows = most_rows_of(offsets)
    if ctx.layout.transposed:
        up, down = _swapped(up), _swapped(down)
    factors: list[Factors | None] = [up if need_w1 else None, down if need_w2 else None, None, None]
    if need_b1:
        factors[2] = Factors(dz, dz.new_ones(1, 1).expand(len(dz), 1), offsets, None, None)
    if need_b2:
        column = weights.flatten()[rows.long(), None].to(grad_out.dtype)
        factors[3] = Factors(grad_out, column, offsets, token, None)
    d_x, d_weights = d_x if need_x else None, d_weights if need_weights else None
    return d_x, d_weights, ExpertWeights(w1, w2, b1, b2), factors, trained


def _swapped(factors: BoundedFactors) -> BoundedFactors:
    """Return the factors of the transposed gradient."""
    swapped = BoundedFactors(factors.input, factors.grad, factors.expert_offsets, factors.input_rows, factors.grad_rows)
    swapped.largest, swapped.most_rows = factors.largest[::-1], factors.most_rows
    return swapped


def _rows_of(experts: Tensor, rows: Tensor, offsets: Tensor, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Move every row that belongs to none of `experts` behind the last expert: new sorted_rows, offsets and z."""
    listed = torch.zeros_like(offsets, dtype=torch.bool).index_fill(0, experts.long(), True)
    # rows behind the last expert get the owner E
    owner = torch.searchsorted(offsets[1:], torch.arange(len(rows), device=rows.device), right=True)
    order = (~listed[owner]).argsort(stable=True)
    counts = offsets.diff() * listed[:-1]
    return rows[order], torch.nn.functional.pad(counts.cumsum(0), (1, 0)).int(), z[order]


class _WithSink(torch.autograd.Function):
    """Variant of the op whose backward hands the factors of its weight gradients to a sink."""

    @staticmethod
    def forward(ctx: Any, sink: Callable[[Tensor, Factors], None], bounded: bool, *inputs: Any) -> Any:
        output, (_, _, _, _, w1, w2, b1, b2, *_) = _expert_mlp(*inputs), inputs
        # kept here, since saved tensors come back detached from a gradient checkpoint
        ctx.sink, ctx.bounded, ctx.weights = sink, bounded, ExpertWeights(w1, w2, b1, b2)
        _setup_context(ctx, inputs, output)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor | None, _: object) -> tuple[Tensor | None, ...]:
        if grad_out is not None:
            d_x, d_weights, _, factors, _ = _dgrad(ctx, grad_out, ctx.needs_input_grad[2:], ctx.bounded)
            for weight, own in zip(ctx.weights, factors, strict=True):
                if own is not None:
                    ctx.sink(weight, own)
            return (None, None, d_x, d_weights, *[None] * 15)
        return (None,) * 19


def _no_double_backward(ctx: object, *grads: object) -> NoReturn:
    raise RuntimeError("expert_mlp has no double backward: use expert_mlp_ref, which autograd differentiates")


_expert_mlp.register_autograd(_backward, setup_context=_setup_context)
_expert_mlp_backward.register_autograd(_no_double_backward)
backend.register("expert_mlp", "ref", _forward_ref)
backend.register("expert_mlp.backward", "ref", _backward_ref)
native.register("expert_mlp", "moe_unlearn.ops.native.expert_mlp:forward")
native.register("expert_mlp.backward", "moe_unlearn.ops.native.expert_mlp:backward")
native.register("expert_mlp", "moe_unlearn.ops.native.expert_mlp:forward_cuda", "cuda")
native.register("expert_mlp.backward", "moe_unlearn.ops.native.expert_mlp:backward_cuda", "cuda")
backend.register("expert_mlp", "triton", "moe_unlearn.triton_kernels.expert_mlp:expert_mlp")
backend.register("expert_mlp.backward", "triton", "moe_unlearn.triton_kernels.expert_mlp_backward:expert_mlp_backward")
