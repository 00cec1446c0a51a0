"""Costs of `expert_wgrad`: one product of factors for each trained expert, whatever becomes of it."""

from collections.abc import Sequence

from torch import Tensor

from moe_unlearn.ops.costs.cost import Cost
from moe_unlearn.ops.expert_wgrad import Factors


def flops(rows: int, m: int, p: int, share: float = 1.0) -> float:
    """Count the operations of gradients [m, p] of the fraction `share` of the experts, from `rows` rows of all."""
    return 2 * rows * m * p * share


def bytes_moved(rows: int, m: int, p: int, share: float = 1.0, element: int = 2) -> float:
    """Return the least bytes of the factors, read once; what is made of the product comes on top."""
    return element * share * rows * (m + p)


def _product(factors: Factors, experts: Tensor | None) -> float:
    rows = len(factors.grad if factors.grad_rows is None else factors.grad_rows)
    offsets = factors.expert_offsets
    share = 1.0 if experts is None else len(experts) / max(len(offsets) - (offsets.dim() == 1), 1)
    return flops(rows, factors.grad.shape[1], factors.input.shape[1], share)


def _one(
    *,
    grad: Tensor,
    input: Tensor,
    expert_offsets: Tensor,
    grad_rows: Tensor | None,
    experts: Tensor | None,
    **_: object,
) -> float:
    return _product(Factors(grad, input, expert_offsets, grad_rows), experts)


def _inner(
    *,
    grads: Sequence[Tensor],
    inputs: Sequence[Tensor],
    expert_offsets: Sequence[Tensor],
    grad_rows: Sequence[Tensor | None],
    experts: Tensor | None,
    **_: object,
) -> float:
    sides = [Factors(*side) for side in zip(grads, inputs, expert_offsets, grad_rows, strict=True)]
    count = len(expert_offsets[0]) if experts is None else len(experts)
    products = sum(_product(factors, experts) for factors in sides)
    return products + len(sides) * (len(sides) + 1) * count * grads[0].shape[1] * inputs[0].shape[1]


COSTS = {
    "expert_wgrad": Cost(_one),
    "expert_wgrad_accumulate": Cost(_one),
    "expert_wgrad_sgd": Cost(_one),
    "expert_wgrad_adamw": Cost(_one),
    "expert_wgrad_inner": Cost(_inner),
}
