"""expert_wgrad: computes the grouped weight gradient of a list of trained experts, with several epilogues.

    dW[m] = sum_j grad[grad_rows[j]] (x) input[input_rows[j]]     j over the sorted rows of expert experts[m]

    store, masked store   dW, exactly zero where the mask bit is 0           expert_wgrad
    accumulate            out += dW, into a compact buffer                   expert_wgrad(out=...)
    sgd, adamw            the masked update of `masked_update`, straight     expert_wgrad_sgd_, _adamw_
                          from the float32 dW, which is never stored
    inner products        <g_i, g_j> of m gradients, none of them stored     expert_wgrad_inner

Shapes: grad [R, M], input [R', P], N sorted rows, dW [M_e, M, P] in the layout of the weight (swap grad and
input for a transposed weight). `expert_offsets` is int32 [E + 1] and bounds the rows of each expert, or [E, 2] and
gives start and stop for a part of each expert's rows (those of one token group). Without `grad_rows` or `input_rows`,
position j reads row j. Only rows inside the bounds are read. An expert without rows has dW exactly zero.

Worked example, two experts, M = P = 1, grad (1, 2, 3), input (1, 1, 2), offsets (0, 3, 3): dW = (1 + 2 + 6, 0).

Sums run over j in order, in float32 for narrower inputs (one library product per expert), so that the result is
deterministic. Source: our specification.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moe_unlearn import backend, native
from moe_unlearn.ops.bits import unpack_bits
from moe_unlearn.ops.checks import (
    check_factors,
    check_momentum,
    check_numerics,
    check_objects,
    check_rows,
    num_listed,
    num_positions,
)
from moe_unlearn.ops.custom import custom_op
from moe_unlearn.ops.legal import legal_indices, legal_offsets
from moe_unlearn.ops.masked_update import SGD, AdamW, Rule, Update, masked_adamw_, masked_sgd_, unflattened
from moe_unlearn.ops.schema import fields


class Factors(NamedTuple):
    """The factors of one gradient, which are the first arguments of `expert_wgrad`."""

    grad: Tensor
    input: Tensor
    expert_offsets: Tensor
    grad_rows: Tensor | None = None
    input_rows: Tensor | None = None


class BoundedFactors(Factors):
    """Factors of which more is known, each [] on their device; a changed copy (`_replace`) loses it."""

    # the largest absolute value of grad and of input, NaN if one is NaN; None if not known
    largest: tuple[Tensor | None, Tensor | None] = (None, None)
    # `most_rows_of` the offsets; None if not known
    most_rows: Tensor | None = None


def most_rows_of(expert_offsets: Tensor) -> Tensor:
    """Return the most rows that one expert has, float64 [], by its offsets [E + 1]."""
    return expert_offsets.diff().max().double()


def expert_wgrad(
    grad: Tensor,
    input: Tensor,
    expert_offsets: Tensor,
    *,
    grad_rows: Tensor | None = None,
    input_rows: Tensor | None = None,
    experts: Tensor | None = None,
    mask: Tensor | None = None,
    out: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    impl: str = "auto",
) -> Tensor:
    """Compute dW [M_e, M, P] of the listed experts; see the module docstring.

    Args:
        grad, input: [R, M] and [R', P] of one float dtype; expert_offsets: int32 [E + 1] or [E, 2].
        grad_rows, input_rows: integer [N], the row of grad and of input at each sorted position.
        experts: integer [M_e], the trained experts in the order of the result; None for all of them.
        mask: int32 words [M_e, M, ceil(P / 32)]; None keeps everything.
        out: float buffer [M_e, M, P] to which dW is added in place, rounded once; it is returned.
        out_dtype: dtype of a new result, default that of grad.

    No gradient flows. Raises TypeError, ValueError or IndexError for arguments that do not fit.
    """
    factors = Factors(grad, input, expert_offsets, grad_rows, input_rows)
    check_factors(factors, experts, mask, {} if out is None else {"out": out})
    factors, experts = _legal(factors, experts)
    if out is not None:
        _accumulate(out, *factors, experts, mask, impl)
        return out
    dw: Tensor = _expert_wgrad(*factors, experts, mask, grad.dtype if out_dtype is None else out_dtype, impl)
    return dw


def _legal(factors: Factors, experts: Tensor | None) -> tuple[Factors, Tensor | None]:
    """Return factors and experts that lead nowhere outside, on a device that is not read."""
    grad, input, offsets, grad_rows, input_rows = factors
    offsets = legal_offsets(offsets, num_positions(grad, input, grad_rows, input_rows))
    experts = legal_indices("experts", experts, num_listed(offsets, None))
    grad_rows = legal_indices("grad_rows", grad_rows, grad.shape[0], offsets, experts)
    input_rows = legal_indices("input_rows", input_rows, input.shape[0], offsets, experts)
    return factors._replace(expert_offsets=offsets, grad_rows=grad_rows, input_rows=input_rows), experts


def expert_wgrad_ref(
    grad: Tensor,
    input: Tensor,
    expert_offsets: Tensor,
    grad_rows: Tensor | None = None,
    input_rows: Tensor | None = None,
    experts: Tensor | None = None,
    mask: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """Compute `expert_wgrad` in plain PyTorch, one matrix product per expert; same arguments and shapes."""
    dtype = grad.dtype if out_dtype is None else out_dtype
    factors = Factors(grad, input, expert_offsets, grad_rows, input_rows)
    products = list(_products(factors, experts, torch.promote_types(grad.dtype, dtype)))
    dw = torch.stack(products) if products else grad.new_zeros(0, grad.shape[1], input.shape[1])
    if mask is not None:
        dw = torch.where(unpack_bits(mask, dw.shape[-1]), dw, 0)
    return dw.to(dtype)


def _products(factors: Factors, experts: Tensor | None, dtype: torch.dtype) -> Iterator[Tensor]:
    """Yield dW[m] [M, P] in `dtype`, one expert after the other."""
    grad, input, offsets, grad_rows, input_rows = factors
    bounds = (offsets if offsets.dim() == 2 else torch.stack([offsets[:-1], offsets[1:]], 1)).tolist()
    for e in range(len(bounds)) if experts is None else experts.tolist():
        rows = slice(*bounds[e])
        g = grad[rows] if grad_rows is None else grad[grad_rows[rows].long()]
        x = input[rows] if input_rows is None else input[input_rows[rows].long()]
        # a product over no rows is exactly zero
        yield g.to(dtype).t() @ x.to(dtype)


def expert_wgrad_sgd_(
    weight: Tensor,
    momentum_buffer: Tensor | None,
    factors: Factors,
    rule: SGD,
    update: Update,
    *,
    experts: Tensor | None = None,
    mask: Tensor | None = None,
    master: Tensor | None = None,
    impl: str = "auto",
) -> None:
    """Update weight[experts] in place by masked SGD with the dW of `factors`; see `masked_sgd_`.

    `experts` are distinct. momentum_buffer and master are compact, [M_e, M, P]. dW is float32 up to the
    update, which rounds it only where `masked_update` says. Weights whose bit is 0 and experts that are not
    listed stay bitwise untouched. Raises TypeError, ValueError or IndexError for arguments that do not fit.
    """
    check_objects(factors=(factors, Factors), rule=(rule, SGD), update=(update, Update))
    check_factors(factors, experts, mask, {"momentum_buffer": momentum_buffer, "master": master}, weight)
    check_momentum(momentum_buffer, rule)
    check_numerics(weight, {"momentum_buffer": momentum_buffer}, update, master)
    factors, experts = _legal(factors, experts)
    _sgd(weight, momentum_buffer, master, *factors, experts, mask, *rule, *update, impl)


def expert_wgrad_sgd_ref_(
    weight: Tensor, momentum_buffer: Tensor | None, master: Tensor | None, *operands: Any
) -> None:
    """Compute `expert_wgrad_sgd_` one expert after the other, in place, from the op's operands."""
    factors, experts, mask, rule, update = update_operands(SGD, operands)
    for dw, one, words, (buffer, own) in _by_expert(weight, factors, experts, mask, (momentum_buffer, master)):
        masked_sgd_(weight, dw, buffer, words, rule, update, master=own, slices=one, impl="ref")


def expert_wgrad_adamw_(
    weight: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    factors: Factors,
    rule: AdamW,
    update: Update,
    *,
    experts: Tensor | None = None,
    mask: Tensor | None = None,
    master: Tensor | None = None,
    impl: str = "auto",
) -> None:
    """Update weight[experts] in place by masked AdamW with the dW of `factors`; see `masked_adamw_`.

    exp_avg, exp_avg_sq and master are compact, [M_e, M, P]; all else is as in `expert_wgrad_sgd_`.
    """
    check_objects(factors=(factors, Factors), rule=(rule, AdamW), update=(update, Update))
    moments = {"exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}
    check_factors(factors, experts, mask, {**moments, "master": master}, weight)
    check_numerics(weight, moments, update, master)
    factors, experts = _legal(factors, experts)
    _adamw(weight, exp_avg, exp_avg_sq, master, *factors, experts, mask, *rule, *update, impl)


def expert_wgrad_adamw_ref_(
    weight: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, master: Tensor | None, *operands: Any
) -> None:
    """Compute `expert_wgrad_adamw_` one expert after the other, in place, from the op's operands."""
    factors, experts, mask, rule, update = update_operands(AdamW, operands)
    for dw, one, words, (m, v, own) in _by_expert(weight, factors, experts, mask, (exp_avg, exp_avg_sq, master)):
        assert m is not None and v is not None
        masked_adamw_(weight, dw, m, v, words, rule, update, master=own, slices=one, impl="ref")


def update_operands(
    kind: type[Rule], operands: Sequence[Any]
) -> tuple[Factors, Tensor | None, Tensor | None, Rule, Update]:
    """Return (factors, experts, mask, rule, update) from what follows the state in an update's operands."""
    grad, input, expert_offsets, grad_rows, input_rows, experts, mask, *numbers = operands
    rule, update = unflattened(kind, numbers)
    return Factors(grad, input, expert_offsets, grad_rows, input_rows), experts, mask, rule, update


def _by_expert(
    weight: Tensor, factors: Factors, experts: Tensor | None, mask: Tensor | None, state: Sequence[Tensor | None]
) -> Iterator[tuple[Tensor, Tensor, Tensor | None, list[Tensor | None]]]:
    """Yield each listed expert's gradient [1, M, P], index [1], mask and compact state."""
    if experts is None:
        experts = torch.arange(len(weight), device=weight.device)
    for i, dw in enumerate(_products(factors, experts, _wide(weight.dtype))):
        one = slice(i, i + 1)
        words = None if mask is None else mask[one]
        yield dw[None], experts[one].long(), words, [None if s is None else s[one] for s in state]


def expert_wgrad_inner(
    gradients: Sequence[Factors], *, experts: Tensor | None = None, mask: Tensor | None = None, impl: str = "auto"
) -> Tensor:
    """Compute the Gram matrices [M_e, m, m] float64 of m masked gradients of each expert, exactly symmetric.

    Gradients exist for one expert at a time only. The sum over dimension 0 is that of the whole weight. Raises
    TypeError or ValueError for arguments that do not fit.
    """
    if not gradients:
        raise ValueError("expected the factors of at least one gradient; got none")
    for factors in gradients:
        check_factors(factors, experts, mask, {})
    shapes = [(f.grad.shape[1], f.input.shape[1], f.grad.dtype) for f in gradients]
    if len(set(shapes)) > 1:
        raise ValueError(f"the gradients must have one M, P and dtype; got {shapes}")
    made = [_legal(factors, experts) for factors in gradients]
    gradients, experts = [factors for factors, _ in made], made[0][1]
    grams: Tensor = _inner(*map(list, zip(*gradients, strict=True)), experts, mask, impl)
    return grams


def expert_wgrad_inner_ref(grads: list[Tensor], *operands: Any) -> Tensor:
    """Compute `expert_wgrad_inner` in plain PyTorch, from the op's operands."""
    *others, experts, mask = operands
    gradients = [Factors(*one) for one in zip(grads, *others, strict=True)]
    sides = [_products(factors, experts, _wide(factors.grad.dtype)) for factors in gradients]
    grams = []
    for i, dws in enumerate(zip(*sides, strict=True)):
        g = torch.stack(dws)
        if mask is not None:
            g = torch.where(unpack_bits(mask[i], g.shape[-1]), g, 0)
        g = g.double().flatten(1)
        product = g @ g.t()
        grams.append(product.tril() + product.tril(-1).t())
    return torch.stack(grams) if grams else grads[0].new_zeros(0, len(sides), len(sides), dtype=torch.float64)


def _accumulate_ref(out: Tensor, grad: Tensor, *operands: Any) -> None:
    input, expert_offsets, grad_rows, input_rows, experts, mask = operands
    dtype = torch.promote_types(out.dtype, _wide(grad.dtype))
    out += expert_wgrad_ref(grad, input, expert_offsets, grad_rows, input_rows, experts, mask, dtype)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _run(name: str, tensor: Tensor, factors_at: int, operands: Sequence[Any]) -> Any:
    """Run the kernel of `name` that `tensor` chooses, on operands whose factors and experts stand at `factors_at`."""
    *others, impl = operands
    check_rows(others[factors_at + 5], others[factors_at : factors_at + 5])
    return backend.resolve(name, impl, tensor)(*others)


_ROWS = f"{fields(Factors)}, Tensor? experts, Tensor? mask"


@custom_op("moe_unlearn::expert_wgrad", schema=f"({_ROWS}, ScalarType out_dtype, str impl) -> Tensor")
def _expert_wgrad(grad: Tensor, *operands: Any) -> Tensor:
    dw: Tensor = _run("expert_wgrad", grad, 0, (grad, *operands))
    return dw


@_expert_wgrad.register_fake
def _(grad: Tensor, input: Tensor, expert_offsets: Tensor, *operands: Any) -> Tensor:
    _, _, experts, _, out_dtype, _ = operands
    return grad.new_empty(num_listed(expert_offsets, experts), grad.shape[1], input.shape[1], dtype=out_dtype)


@custom_op("moe_unlearn::expert_wgrad_accumulate", schema=f"(Tensor(a0!) out, {_ROWS}, str impl) -> ()")
def _accumulate(out: Tensor, grad: Tensor, *operands: Any) -> None:
    _run("expert_wgrad.accumulate", grad, 1, (out, grad, *operands))


@custom_op(
    "moe_unlearn::expert_wgrad_sgd",
    schema=f"(Tensor(a0!) weight, Tensor(a1!)? momentum_buffer, Tensor(a2!)? master, {_ROWS}, "
    f"{fields(SGD, Update)}, str impl) -> ()",
)
def _sgd(weight: Tensor, *operands: Any) -> None:
    _run("expert_wgrad.sgd", weight, 3, (weight, *operands))


@custom_op(
    "moe_unlearn::expert_wgrad_adamw",
    schema=f"(Tensor(a0!) weight, Tensor(a1!) exp_avg, Tensor(a2!) exp_avg_sq, Tensor(a3!)? master, {_ROWS}, "
    f"{fields(AdamW, Update)}, str impl) -> ()",
)
def _adamw(weight: Tensor, *operands: Any) -> None:
    _run("expert_wgrad.adamw", weight, 4, (weight, *operands))


for _mutating in (_accumulate, _sgd, _adamw):
    _mutating.register_fake(lambda *operands: None)


@custom_op(
    "moe_unlearn::expert_wgrad_inner",
    schema="(Tensor[] grads, Tensor[] inputs, Tensor[] expert_offsets, Tensor?[] grad_rows, Tensor?[] input_rows, "
    "Tensor? experts, Tensor? mask, str impl) -> Tensor",
)
def _inner(grads: list[Tensor], *operands: Any) -> Tensor:
    *factors, experts, mask, impl = operands
    check_rows(experts, *zip(grads, *factors, strict=True))
    grams: Tensor = backend.resolve("expert_wgrad.inner", impl, grads[0])(grads, *factors, experts, mask)
    return grams


@_inner.register_fake
def _(grads: list[Tensor], *operands: Any) -> Tensor:
    _, expert_offsets, _, _, experts, _, _ = operands
    count = num_listed(expert_offsets[0], experts)
    return grads[0].new_empty(count, len(grads), len(grads), dtype=torch.float64)


for _name, _reference, _kernel, _launcher in (
    ("expert_wgrad", expert_wgrad_ref, "store", "expert_wgrad"),
    ("expert_wgrad.accumulate", _accumulate_ref, "accumulate", "accumulate_"),
    ("expert_wgrad.sgd", expert_wgrad_sgd_ref_, "sgd", "sgd_"),
    ("expert_wgrad.adamw", expert_wgrad_adamw_ref_, "adamw", "adamw_"),
    ("expert_wgrad.inner", expert_wgrad_inner_ref, "inner", "inner"),
):
    backend.register(_name, "ref", _reference)
    native.register(_name, f"moe_unlearn.ops.native.expert_wgrad:{_kernel}")
    native.register(_name, f"moe_unlearn.ops.native.expert_wgrad:{_kernel}_cuda", "cuda")
    backend.register(_name, "triton", f"moe_unlearn.triton_kernels.expert_wgrad:{_launcher}")
