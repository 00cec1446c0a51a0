"""Bounds, sums and inner products of weight gradients that exist only as factors.

A gradient that is not computed cannot be checked or measured itself: `largest_sum` bounds it, `join` makes the factors
of a weighted sum, and `inner_products` makes MOLLM's Gram matrix.

Deterministic. Source: our specification.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from moe_unlearn.errors import NonFiniteError
from moe_unlearn.ops import gram_factors, legal
from moe_unlearn.ops.checks import vouch
from moe_unlearn.ops.expert_wgrad import BoundedFactors, Factors, expert_wgrad_inner, most_rows_of

LARGEST = torch.finfo(torch.float32).max


def may_overflow(bound: float, name: str, updated: tuple[str, ...] = ()) -> bool:
    """Return whether the gradient of weight `name` could be non-finite although its factors are finite.

    `bound` is `largest_sum` of the factors. Raises NonFiniteError with `updated` if a factor is not finite.
    """
    if not bound < float("inf"):
        raise NonFiniteError(f"the gradient of {name} is not finite: stopped before its update", updated)
    return not bound < LARGEST


def largest_sum(factors: Factors) -> Tensor:
    """Return an upper bound on the absolute values of dW, float64 [] on its device; non-finite if a factor is."""
    sides = (factors.grad, factors.grad_rows), (factors.input, factors.input_rows)
    own = factors if isinstance(factors, BoundedFactors) else BoundedFactors(*factors)
    bound = most_rows = most_rows_of(factors.expert_offsets) if own.most_rows is None else own.most_rows
    for (values, index), largest in zip(sides, own.largest, strict=True):
        if not values.numel():
            return torch.zeros_like(bound)
        if largest is None:
            # equal to the infinity norm, and many times as fast
            low, high = values.aminmax() if index is not None else _extremes(values, factors.expert_offsets[-1])
            largest = torch.maximum(-low, high)
        bound = bound * largest  # in float64: both have no dimension
    return torch.where(most_rows > 0, bound, most_rows)  # 0 without rows, whatever the factors hold


def look(values: Sequence[Tensor]) -> list[float]:
    """Read numbers [] from the device, all in one transfer; this is where a step waits for the device.

    Raises IndexError if an op has met illegal indices there.
    """
    if not values:
        return []
    device = values[0].device
    met = None if isinstance(values[0], FakeTensor) else legal.flag(device)  # a rehearsal meets nothing
    asked = [*values, *([] if met is None else [met])]
    found: list[float] = torch.stack([value.detach().double().to(device) for value in asked]).tolist()
    if met is not None:
        legal.raise_if_met(device, int(found.pop()))
    return found


def join(parts: Sequence[tuple[float, Factors]], trained_slices: Tensor | None = None) -> tuple[Factors, Tensor]:
    """Join factors into those of sum_i c_i dW_i; also return for each row (sorted by expert) its part i.

    With `trained_slices` (distinct, integer [M_e]) only the rows of these experts are kept; the offsets [E + 1] still
    cover all experts.
    """
    device, num_experts = parts[0][1].grad.device, len(parts[0][1].expert_offsets) - 1
    # the last element, False, stands for rows behind those of the last expert
    trains = torch.arange(num_experts + 1, device=device) < num_experts
    if trained_slices is not None:
        trains = torch.zeros_like(trains).index_fill(0, trained_slices.long(), True)
    expert_of: list[Tensor] = []
    part_of: list[Tensor] = []
    rows: tuple[list[Tensor], list[Tensor]] = ([], [])
    starts = [0, 0]
    for i, (_, f) in enumerate(parts):
        index = next((r for r in (f.grad_rows, f.input_rows) if r is not None), f.grad[:, 0])
        positions = torch.arange(len(index), device=device)
        owner = torch.searchsorted(f.expert_offsets[1:].long(), positions, right=True)
        position = trains[owner].nonzero().squeeze(1)
        expert_of.append(owner[position])
        part_of.append(torch.full_like(position, i))
        for side, (values, at) in enumerate(((f.grad, f.grad_rows), (f.input, f.input_rows))):
            rows[side].append(starts[side] + (position if at is None else at.long()[position]))
            starts[side] += len(values)
    owner = torch.cat(expert_of)
    order = owner.argsort(stable=True)
    counts = owner.new_zeros(num_experts + 1).index_add(0, owner + 1, torch.ones_like(owner))
    offsets = counts.cumsum(0)
    grad = torch.cat([f.grad if c == 1 else f.grad * c for c, f in parts])
    grad_rows, input_rows = (torch.cat(side)[order] for side in rows)
    joined = Factors(grad, torch.cat([f.input for _, f in parts]), offsets.int(), grad_rows, input_rows)
    for limit, made in (len(order), joined.expert_offsets), (len(grad), grad_rows), (len(joined.input), input_rows):
        vouch(limit, made)
    return joined, torch.cat(part_of)[order]


def inner_products(gradients: Sequence[Factors], trained_slices: Tensor | None, mask: Tensor | None) -> Tensor:
    """Compute the Gram matrix [m, m] float64 of m gradients of one weight [E, M, P], none of them stored whole.

    For each expert the cheaper of two forms is used. With n rows in all, these are the gradients themselves, one expert
    at a time (2 n M P operations), or inner products of rows (2 n^2 (M + P)), which cannot take a mask into account.
    """
    first = gradients[0]
    rows, inputs = first.grad.shape[1], first.input.shape[1]
    if trained_slices is None:
        trained_slices = torch.arange(len(first.expert_offsets) - 1, device=first.grad.device)
    in_all = sum(f.expert_offsets.diff() for f in gradients)
    assert isinstance(in_all, Tensor)  # there is at least one gradient
    per_expert = in_all[trained_slices.long()]
    ghost = (per_expert * (rows + inputs) < rows * inputs) & (mask is None)
    total = torch.zeros(len(gradients), len(gradients), dtype=torch.float64, device=first.grad.device)
    if ghost.any():
        joined, part = join([(1.0, f) for f in gradients], trained_slices[ghost])
        dy, x = joined.grad[joined.grad_rows], joined.input[joined.input_rows]
        sides = [torch.where((part == i)[:, None], dy, 0) for i in range(len(gradients))]
        total += gram_factors(sides, x, joined.expert_offsets)
    if not ghost.all():
        words = None if mask is None else mask[~ghost]
        total += expert_wgrad_inner(gradients, experts=trained_slices[~ghost], mask=words).sum(0)
    return total


def _extremes(values: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return the least and the largest value of the first `rows` rows; later rows have no expert and any content."""
    if values.is_cpu:  # reading `rows` costs no wait
        values = values[: int(rows)]
        return values.aminmax() if len(values) else (values.new_zeros(()), values.new_zeros(()))
    return _extremes_on_device(values, rows)


def _extremes_on_device(values: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    owned = torch.arange(len(values), device=values.device) < rows
    low, high = values.aminmax(dim=1)
    return torch.where(owned, low, 0).amin(), torch.where(owned, high, 0).amax()
