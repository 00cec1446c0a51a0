"""Where the weight gradients of the experts go in the fused step, instead of `.grad`.

    CompactSink    sum of the masked dW of the trained slices, [M_e, M, P] in the parameter's dtype
    FactorSink     the factors themselves, where they are smaller than that: dW is made when its use is known
    UpdateSink     the optimizer's update straight from the factors of dW, which is never stored

A sink is given to `step_inputs(weight_gradients=...)`. The experts of the forward pass announce their weights
(`enter`), and in the backward pass, after a layer's dgrad, each hands over the factors of its dW (`take`). A
weight that entered twice has two gradients to wait for, and a bias none that a kernel could update from: such
take the compact form in every sink. What the optimizer does not train is dropped.

Deterministic. Source: our specification.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from moe_unlearn.ops import gram_factors
from moe_unlearn.ops.bits import unpack_bits
from moe_unlearn.ops.expert_wgrad import Factors, expert_wgrad, expert_wgrad_inner
from moe_unlearn.optim import MaskedAdamW, MaskedSGD


class NonFiniteError(FloatingPointError):
    """A loss or gradient is NaN or infinite; `updated` names the weights that had been updated before."""

    def __init__(self, message: str, updated: tuple[str, ...] = ()):
        super().__init__(message)
        self.updated = updated


class CompactSink:
    """Adds to `gradients`, parameter -> compact gradient, which the caller may replace between backward passes."""

    def __init__(self, optimizer: MaskedSGD | MaskedAdamW, gradients: dict[Tensor, Tensor]):
        self.optimizer, self.gradients = optimizer, gradients

    def enter(self, weight: Tensor) -> None:
        """A forward pass uses `weight`."""

    def experts(self, weights: Sequence[Tensor]) -> Tensor | None:
        """Ascending int32 [M_e]: the experts of which a gradient of any of `weights` is kept; None: of all."""
        layouts = [found for found in map(self.optimizer.layout, weights) if found is not None]
        if any(slices is None for slices, _ in layouts):
            return None
        kept = [slices for slices, _ in layouts] or [torch.empty(0, dtype=torch.long, device=weights[0].device)]
        return torch.cat(kept).unique().int()

    def take(self, weight: Tensor, factors: Factors) -> None:
        """The backward pass has the factors of a gradient of `weight`."""
        layout = self.optimizer.layout(weight)
        if layout is None:
            return
        experts, mask = layout
        held = self.gradients.get(weight)
        if weight.dim() == 3:
            dw = expert_wgrad(**factors._asdict(), experts=experts, mask=mask, out=held, out_dtype=weight.dtype)
        else:  # a bias, whose mask runs along the other dimension
            dw = expert_wgrad(**factors._asdict(), experts=experts, out_dtype=weight.dtype).squeeze(2)
            dw = dw if mask is None else torch.where(unpack_bits(mask, dw.shape[1]), dw, 0)
            dw = dw if held is None else held.add_(dw)
        self.gradients[weight] = dw


class FactorSink(CompactSink):
    """Keeps factors in `factors`, parameter -> list, one for each time a backward pass met the weight.

    form: "factors" keeps every weight's, "auto" those that are smaller than the compact gradient would be.
    """

    def __init__(
        self,
        optimizer: MaskedSGD | MaskedAdamW,
        gradients: dict[Tensor, Tensor],
        factors: dict[Tensor, list[Factors]],
        form: str,
    ):
        super().__init__(optimizer, gradients)
        self.factors, self.form = factors, form
        self._kept: dict[Tensor, bool] = {}  # one form a step for each weight, whatever the rows of a pass

    def take(self, weight: Tensor, factors: Factors) -> None:
        layout = self.optimizer.layout(weight)
        if weight not in self._kept and layout is not None:
            trained = len(weight) if layout[0] is None else len(layout[0])
            smaller = factors.grad.numel() + factors.input.numel() < trained * weight[0].numel()
            self._kept[weight] = weight.dim() == 3 and (self.form == "factors" or smaller)
        if self._kept.get(weight):
            # what they were computed from must not stay with them
            self.factors.setdefault(weight, []).append(Factors(*(None if v is None else v.detach() for v in factors)))
        else:
            super().take(weight, factors)


class UpdateSink(CompactSink):
    """Updates every weight [E, M, P] of `names` (parameter -> name) that one forward pass used once.

    Factors that are not finite raise NonFiniteError, naming what was updated before; where their product
    could overflow, the gradient is stored for the caller to check.
    """

    def __init__(self, optimizer: MaskedSGD | MaskedAdamW, gradients: dict[Tensor, Tensor], names: dict[Tensor, str]):
        super().__init__(optimizer, gradients)
        self.names = names
        self.updated: list[str] = []
        self._uses: dict[Tensor, int] = {}

    def enter(self, weight: Tensor) -> None:
        self._uses[weight] = self._uses.get(weight, 0) + 1

    def take(self, weight: Tensor, factors: Factors) -> None:
        if weight.dim() != 3 or self._uses.get(weight, 0) > 1 or self.optimizer.layout(weight) is None:
            super().take(weight, factors)
            return
        if may_overflow(factors, self.names[weight], (*self.updated,)):
            super().take(weight, factors)
            return
        self.optimizer.update_from(weight, factors)
        self.updated.append(self.names[weight])


def may_overflow(factors: Factors, name: str, updated: tuple[str, ...] = ()) -> bool:
    """Whether the gradient of weight `name`, not to be stored, might not be finite though its factors are.

    Raises NonFiniteError with `updated` if a factor is not.
    """
    largest = _largest_sum(factors)
    if not largest < float("inf"):
        raise NonFiniteError(f"the gradient of {name} is not finite: stopped before its update", updated)
    return not largest < torch.finfo(torch.float32).max


def join(parts: Sequence[tuple[float, Factors]], experts: Tensor | None = None) -> tuple[Factors, Tensor]:
    """The factors of sum_i c_i dW_i, and for each of its rows (sorted by expert) the part i it comes from.

    With `experts` (distinct, integer [M_e]) the rows are those of these experts alone, still under offsets
    [E + 1] of all of them.
    """
    device, num_experts = parts[0][1].grad.device, len(parts[0][1].expert_offsets) - 1
    # the last place is that of rows behind the last expert
    listed = torch.arange(num_experts + 1, device=device) < num_experts
    if experts is not None:
        listed = torch.zeros_like(listed).index_fill(0, experts.long(), True)
    expert_of, part_of, rows, starts = [], [], ([], []), [0, 0]
    for i, (_, f) in enumerate(parts):
        index = next((r for r in (f.grad_rows, f.input_rows) if r is not None), f.grad[:, 0])
        positions = torch.arange(len(index), device=device)
        owner = torch.searchsorted(f.expert_offsets[1:].long(), positions, right=True)
        position = listed[owner].nonzero().squeeze(1)
        expert_of.append(owner[position])
        part_of.append(torch.full_like(position, i))
        for side, (values, index) in enumerate(((f.grad, f.grad_rows), (f.input, f.input_rows))):
            rows[side].append(starts[side] + (position if index is None else index.long()[position]))
            starts[side] += len(values)
    owner = torch.cat(expert_of)
    order = owner.argsort(stable=True)
    counts = owner.new_zeros(num_experts + 1).index_add(0, owner + 1, torch.ones_like(owner))
    offsets = counts.cumsum(0)
    grad = torch.cat([f.grad if c == 1 else f.grad * c for c, f in parts])
    grad_rows, input_rows = (torch.cat(side)[order] for side in rows)
    joined = Factors(grad, torch.cat([f.input for _, f in parts]), offsets.int(), grad_rows, input_rows)
    return joined, torch.cat(part_of)[order]


def inner_products(gradients: Sequence[Factors], experts: Tensor | None, mask: Tensor | None) -> Tensor:
    """Gram matrix [m, m] float64 of m gradients of one weight [E, M, P], of which none is stored whole.

    Expert by expert the cheaper of two forms: with n rows in all, the gradients themselves, one expert's at a
    time (2 n M P operations), or the rows' own products (2 n^2 (M + P)), which know nothing of a mask.
    """
    first = gradients[0]
    rows, inputs = first.grad.shape[1], first.input.shape[1]
    if experts is None:
        experts = torch.arange(len(first.expert_offsets) - 1, device=first.grad.device)
    per_expert = sum(f.expert_offsets.diff() for f in gradients)[experts.long()]
    ghost = (per_expert * (rows + inputs) < rows * inputs) & (mask is None)
    total = torch.zeros(len(gradients), len(gradients), dtype=torch.float64, device=first.grad.device)
    if ghost.any():
        joined, part = join([(1.0, f) for f in gradients], experts[ghost])
        dy, x = joined.grad[joined.grad_rows], joined.input[joined.input_rows]
        sides = [torch.where((part == i)[:, None], dy, 0) for i in range(len(gradients))]
        total += gram_factors(sides, x, joined.expert_offsets)
    if not ghost.all():
        words = None if mask is None else mask[~ghost]
        total += expert_wgrad_inner(gradients, experts=experts[~ghost], mask=words).sum(0)
    return total


def _largest_sum(factors: Factors) -> float:
    """A bound on every |dW|, in float64; infinite or NaN if a factor is."""
    offsets = factors.expert_offsets
    rows = int(offsets[-1])
    bound = (offsets[1:] - offsets[:-1]).max().double()
    for values, index in ((factors.grad, factors.grad_rows), (factors.input, factors.input_rows)):
        # rows behind the last expert belong to nobody and may hold anything
        values = values[:rows] if index is None else values
        if not values.numel():
            return 0.0
        low, high = values.aminmax()  # the infinity norm, many times as fast
        bound = bound * torch.maximum(-low, high).double()
    return float(bound)
