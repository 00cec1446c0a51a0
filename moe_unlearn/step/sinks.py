"""Sinks, which receive the weight gradients of the experts in the fused step instead of `.grad`.

    CompactSink    sum of the masked dW of the trained slices, [M_e, M, P] in the parameter's dtype
    FactorSink     the factors of dW, where they are smaller than dW: dW is computed once its use is known
    UpdateSink     the optimizer's update, computed from the factors of dW, which is never stored

A sink is given to `step_inputs(weight_gradients=...)`. In the forward pass the experts announce their weights
(`enter`). In the backward pass, after a layer's dgrad, they hand over the factors of each dW (`take`). After the
backward pass `settle` is called. An UpdateSink takes the compact form for a weight that entered twice, which has two
gradients to wait for; every sink takes it for a bias, for which there is no kernel that works from factors. Gradients
of weights that the optimizer does not train are dropped.

Deterministic. Source: our specification.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from moe_unlearn.errors import NonFiniteError
from moe_unlearn.ops import gram_factors
from moe_unlearn.ops.bits import unpack_bits
from moe_unlearn.ops.expert_wgrad import BoundedFactors, Factors, expert_wgrad, expert_wgrad_inner
from moe_unlearn.optim import MaskedAdamW, MaskedSGD


class CompactSink:
    """Adds to `gradients` (parameter -> compact gradient), whose entries may be replaced between backward passes."""

    #: how many micro-batches like this one the step has, as far as is known
    micro_batches = 1.0
    #: whether the sink needs the largest absolute values of the factors
    bounded = False

    def __init__(self, optimizer: MaskedSGD | MaskedAdamW, gradients: dict[Tensor, Tensor]):
        self.optimizer, self.gradients = optimizer, gradients

    def enter(self, weight: Tensor) -> None:
        """Note that a forward pass uses `weight`."""

    def trained_slices(self, weights: Sequence[Tensor]) -> Tensor | None:
        """Return the slices that train of any of one layer's `weights`, ascending int32 [M_e]; None for all."""
        layouts = [found for found in map(self.optimizer.layout, weights) if found is not None]
        if any(slices is None for slices, _ in layouts):
            return None
        kept = [slices for slices, _ in layouts] or [torch.empty(0, dtype=torch.long, device=weights[0].device)]
        return torch.cat(kept).unique().int()

    def take(self, weight: Tensor, factors: Factors) -> None:
        """Take the factors of a gradient of `weight` from the backward pass."""
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

    def settle(self) -> None:
        """Finish the backward pass; raises NonFiniteError for checks whose results it did not wait for."""


class FactorSink(CompactSink):
    """Keeps factors in `factors` (parameter -> list), one entry for each time a backward pass met the weight.

    form: "factors" keeps the factors of every weight; "auto" keeps them only where those of all micro-batches together
    are smaller than the compact gradient. The form of a weight is chosen when a step first meets it, and recorded in
    `kept` for the rest of the step.
    """

    def __init__(
        self,
        optimizer: MaskedSGD | MaskedAdamW,
        gradients: dict[Tensor, Tensor],
        factors: dict[Tensor, list[Factors]],
        kept: dict[Tensor, bool],
        form: str,
    ):
        super().__init__(optimizer, gradients)
        self.factors, self.kept, self.form = factors, kept, form

    def take(self, weight: Tensor, factors: Factors) -> None:
        layout = self.optimizer.layout(weight)
        if weight not in self.kept and layout is not None:
            trained = len(weight) if layout[0] is None else len(layout[0])
            size = self.micro_batches * (factors.grad.numel() + factors.input.numel())
            self.kept[weight] = weight.dim() == 3 and (self.form == "factors" or size < trained * weight[0].numel())
        if self.kept.get(weight):
            # detached, so that they do not keep the graph that they were computed in
            self.factors.setdefault(weight, []).append(Factors(*(None if v is None else v.detach() for v in factors)))
        else:
            super().take(weight, factors)


class UpdateSink(CompactSink):
    """Updates every weight [E, M, P] of `names` (parameter -> name) that the forward pass used once.

    On the CPU, factors that are not finite raise NonFiniteError, which names the weights updated before; where the
    product of the factors could overflow, the gradient is stored for the caller to check.

    On a GPU the host does not wait for these checks. Factors that fail one of them, and those of every weight after
    them, update nothing, and `settle` raises the error after the backward pass, also for a product that could overflow.
    """

    bounded = True

    def __init__(self, optimizer: MaskedSGD | MaskedAdamW, gradients: dict[Tensor, Tensor], names: dict[Tensor, str]):
        super().__init__(optimizer, gradients)
        self.names = names
        self.updated: list[str] = []
        self._uses: dict[Tensor, int] = {}
        self._unseen: list[tuple[Tensor, Tensor]] = []  # weights and their bounds, which the host has not read yet
        self._sound: Tensor | None = None  # bool [] on the device: whether all of these bounds are finite in float32

    def enter(self, weight: Tensor) -> None:
        self._uses[weight] = self._uses.get(weight, 0) + 1

    def take(self, weight: Tensor, factors: Factors) -> None:
        if weight.dim() != 3 or self._uses.get(weight, 0) > 1 or self.optimizer.layout(weight) is None:
            super().take(weight, factors)
            return
        bound = largest_sum(factors)
        if self._waits(bound):
            self.settle()  # a model on both CPU and GPU: update this weight only if the earlier ones passed the check
            if may_overflow(float(bound), self.names[weight], (*self.updated,)):
                super().take(weight, factors)
                return
            self.optimizer.update_from(weight, factors)
            self.updated.append(self.names[weight])
            return
        sound = bound < _LARGEST
        if self._sound is not None:
            sound = sound & self._sound.to(sound.device, non_blocking=True)
        self._sound = sound
        self._unseen.append((weight, bound))
        self.optimizer.update_from(weight, factors, where=sound)

    def settle(self) -> None:
        unseen, self._unseen, self._sound = self._unseen, [], None
        for i, bound in enumerate(look([bound for _, bound in unseen])):
            name = self.names[unseen[i][0]]
            if not bound < _LARGEST:
                for weight, _ in unseen[i:]:
                    if "step" in self.optimizer.state.get(weight, {}):
                        self.optimizer.state[weight]["step"] -= 1  # this update was counted but wrote nothing
                may_overflow(bound, name, (*self.updated,))
                raise NonFiniteError(
                    f"the gradient of {name} could overflow: stopped before its update", (*self.updated,)
                )
            self.updated.append(name)

    def _waits(self, bound: Tensor) -> bool:
        """Return whether the bound is read before the update, which is so on the CPU, where reading costs no wait."""
        return bound.is_cpu


_LARGEST = torch.finfo(torch.float32).max


def may_overflow(bound: float, name: str, updated: tuple[str, ...] = ()) -> bool:
    """Return whether the gradient of weight `name` could be non-finite although its factors are finite.

    `bound` is `largest_sum` of the factors. Raises NonFiniteError with `updated` if a factor is not finite.
    """
    if not bound < float("inf"):
        raise NonFiniteError(f"the gradient of {name} is not finite: stopped before its update", updated)
    return not bound < _LARGEST


def largest_sum(factors: Factors) -> Tensor:
    """Return an upper bound on the absolute values of dW, float64 [] on its device; non-finite if a factor is."""
    offsets = factors.expert_offsets
    rows = offsets[-1]
    bound = offsets.diff().max().double()
    sides = (factors.grad, factors.grad_rows), (factors.input, factors.input_rows)
    known = factors.largest if isinstance(factors, BoundedFactors) else (None, None)
    for (values, index), largest in zip(sides, known, strict=True):
        if not values.numel():
            return torch.zeros_like(bound)
        if largest is None:
            # equal to the infinity norm, and many times as fast
            low, high = values.aminmax() if index is not None else _extremes(values, rows)
            largest = torch.maximum(-low, high)
        bound = bound * largest.double()
    return torch.where(rows > 0, bound, 0)


def look(values: Sequence[Tensor]) -> list[float]:
    """Read numbers [] from the device, all in one transfer; this is where a step waits for the device."""
    if not values:
        return []
    return torch.stack([value.detach().double().to(values[0].device) for value in values]).tolist()


def join(parts: Sequence[tuple[float, Factors]], experts: Tensor | None = None) -> tuple[Factors, Tensor]:
    """Join factors into those of sum_i c_i dW_i; also return for each row (sorted by expert) its part i.

    With `experts` (distinct, integer [M_e]) only the rows of these experts are kept; the offsets [E + 1] still cover
    all experts.
    """
    device, num_experts = parts[0][1].grad.device, len(parts[0][1].expert_offsets) - 1
    # the last element, False, stands for rows behind those of the last expert
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
    """Compute the Gram matrix [m, m] float64 of m gradients of one weight [E, M, P], none of them stored whole.

    For each expert the cheaper of two forms is used. With n rows in all, these are the gradients themselves, one expert
    at a time (2 n M P operations), or inner products of rows (2 n^2 (M + P)), which cannot take a mask into account.
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
