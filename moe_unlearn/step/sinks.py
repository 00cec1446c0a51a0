"""Where the weight gradients of the experts go in the fused step, instead of `.grad`.

    CompactSink    sum of the masked dW of the trained slices, [M_e, M, P] in the parameter's dtype
    FactorSink     the factors themselves, where they are smaller than that: dW is made when its use is known
    UpdateSink     the optimizer's update straight from the factors of dW, which is never stored

A sink is given to `step_inputs(weight_gradients=...)`. The experts of the forward pass announce their weights
(`enter`), and in the backward pass, after a layer's dgrad, each hands over the factors of its dW (`take`); behind it
comes `settle`. A weight that entered twice has two gradients to wait for, and a bias none that a kernel could update
from: such take the compact form in every sink. What the optimizer does not train is dropped.

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
    """Adds to `gradients`, parameter -> compact gradient, which the caller may replace between backward passes."""

    #: how many micro-batches like this one its step has, as far as is known
    micro_batches = 1.0
    #: whether it asks how large factors are
    bounded = False

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

    def settle(self) -> None:
        """The backward pass is over; raises NonFiniteError for what it did not wait for."""


class FactorSink(CompactSink):
    """Keeps factors in `factors`, parameter -> list, one for each time a backward pass met the weight.

    form: "factors" keeps every weight's, "auto" those that in all micro-batches together are smaller than the compact
    gradient would be. Which, is chosen where a step first meets the weight, and stands in `kept` for the rest of it.
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
            # what they were computed from must not stay with them
            self.factors.setdefault(weight, []).append(Factors(*(None if v is None else v.detach() for v in factors)))
        else:
            super().take(weight, factors)


class UpdateSink(CompactSink):
    """Updates every weight [E, M, P] of `names` (parameter -> name) that one forward pass used once.

    Factors that are not finite raise NonFiniteError, naming what was updated before; where their product
    could overflow, the gradient is stored for the caller to check.

    On a GPU nobody waits for either answer: there such factors, and those of every weight after them, update nothing,
    and `settle` raises the error once the backward pass is over. Of a product that could overflow it says so.
    """

    bounded = True

    def __init__(self, optimizer: MaskedSGD | MaskedAdamW, gradients: dict[Tensor, Tensor], names: dict[Tensor, str]):
        super().__init__(optimizer, gradients)
        self.names = names
        self.updated: list[str] = []
        self._uses: dict[Tensor, int] = {}
        self._unseen: list[tuple[Tensor, Tensor]] = []  # weights and their bounds, which are still on the device
        self._sound: Tensor | None = None  # whether all of these bounds are fine

    def enter(self, weight: Tensor) -> None:
        self._uses[weight] = self._uses.get(weight, 0) + 1

    def take(self, weight: Tensor, factors: Factors) -> None:
        if weight.dim() != 3 or self._uses.get(weight, 0) > 1 or self.optimizer.layout(weight) is None:
            super().take(weight, factors)
            return
        bound = largest_sum(factors)
        if self._waits(bound):
            self.settle()  # of weights on a GPU beside some on the CPU: this one is updated only where those are sound
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
                        self.optimizer.state[weight]["step"] -= 1  # a step that wrote nothing
                may_overflow(bound, name, (*self.updated,))
                raise NonFiniteError(
                    f"the gradient of {name} could overflow: stopped before its update", (*self.updated,)
                )
            self.updated.append(name)

    def _waits(self, bound: Tensor) -> bool:
        """Whether a bound is looked at before its update: where nothing has to be waited for."""
        return bound.is_cpu


_LARGEST = torch.finfo(torch.float32).max


def may_overflow(bound: float, name: str, updated: tuple[str, ...] = ()) -> bool:
    """Whether the gradient of weight `name`, not to be stored, might not be finite though its factors are.

    `bound` is `largest_sum` of these. Raises NonFiniteError with `updated` if a factor is not finite.
    """
    if not bound < float("inf"):
        raise NonFiniteError(f"the gradient of {name} is not finite: stopped before its update", updated)
    return not bound < _LARGEST


def largest_sum(factors: Factors) -> Tensor:
    """A bound [] on every |dW|, float64 on their device; infinite or NaN if a factor is."""
    offsets = factors.expert_offsets
    rows = offsets[-1]
    bound = offsets.diff().max().double()
    sides = (factors.grad, factors.grad_rows), (factors.input, factors.input_rows)
    known = factors.largest if isinstance(factors, BoundedFactors) else (None, None)
    for (values, index), largest in zip(sides, known, strict=True):
        if not values.numel():
            return torch.zeros_like(bound)
        if largest is None:
            # the infinity norm, many times as fast
            low, high = values.aminmax() if index is not None else _extremes(values, rows)
            largest = torch.maximum(-low, high)
        bound = bound * largest.double()
    return torch.where(rows > 0, bound, 0)


def look(values: Sequence[Tensor]) -> list[float]:
    """Numbers [] of the device, all in one read: what a step waits for, it waits for here."""
    if not values:
        return []
    return torch.stack([value.detach().double().to(values[0].device) for value in values]).tolist()


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


def _extremes(values: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """The least and the largest of the first `rows` rows; those behind belong to nobody and may hold anything."""
    if values.is_cpu:  # the number is here
        values = values[: int(rows)]
        return values.aminmax() if len(values) else (values.new_zeros(()), values.new_zeros(()))
    return _extremes_on_device(values, rows)


def _extremes_on_device(values: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    owned = torch.arange(len(values), device=values.device) < rows
    low, high = values.aminmax(dim=1)
    return torch.where(owned, low, 0).amin(), torch.where(owned, high, 0).amax()
