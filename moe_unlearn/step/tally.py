"""Losses and weights of the micro-batches of one step, over all ranks.

    L = sum_m n_m L_m / N          L_m is a mean over the n_m units of micro-batch m, N = sum_m n_m

A unit is what a loss is a mean over, a position or a sequence (`Objectives.units`). `sizes` are the N of the global
batch: with them a step is the same however its rows are cut into micro-batches and shared among ranks. Without them
the size of the micro-batches still to come is unknown, so all micro-batches must have the same size. The load-balancing
loss alone is no mean over units: each micro-batch balances its own rows (`router_aux`), so that a step with it depends
on how its rows are cut.

Source: our specification, after transformers' Trainer, which divides by the tokens of the global batch.
"""

from collections.abc import Iterable, Mapping
from threading import get_ident
from typing import NamedTuple

from torch import Tensor

from moe_unlearn.model.batches import Sizes
from moe_unlearn.ranks import Ranks
from moe_unlearn.step.factors import look


class Part(NamedTuple):
    """One micro-batch: its losses over all ranks, its units on this rank and on all; empty units if not counted."""

    losses: dict[str, float]
    own: Sizes
    units: Sizes


class Tally:
    """Record of the micro-batches that a step has seen of its global batch."""

    def __init__(self, ranks: Ranks):
        self.ranks = ranks
        self.clear()

    def clear(self) -> None:
        """Drop all micro-batches, to begin a step."""
        self.parts: list[Part] = []
        self.sizes: Sizes | None = None
        #: whether a micro-batch was said to be the last
        self.closed = False
        self._owner: dict[str, int] = {}

    def own(self) -> None:
        """Give the step to this thread until it is cleared; RuntimeError if it is another's."""
        if self._owner.setdefault("thread", get_ident()) != get_ident():  # atomic, so that one thread alone gets it
            raise RuntimeError(
                "another thread is in the middle of this step, whose gradients would mix: expected calls one after the "
                "other, each from its first micro-batch to its update() or discard()"
            )

    def expect(self, sizes: Sizes | None) -> None:
        """Check that a micro-batch with these `sizes` may follow.

        Raises RuntimeError after the last micro-batch of a step, ValueError for other `sizes` than before.
        """
        if self.closed:
            raise RuntimeError("the micro-batch before was to be the last of its step: update() or discard() first")
        if self.parts and self.sizes != sizes:
            raise ValueError(f"all micro-batches of a step must have the same `sizes`; got {self.sizes}, then {sizes}")

    def count(self, units: Iterable[Mapping[str, Tensor]]) -> dict[str, int]:
        """Return the `sizes` of a step whose micro-batches have these units on this rank, [] each.

        Raises ValueError if there are none; an error of one rank in counting ends all.
        """

        def counted() -> tuple[list[Mapping[str, Tensor]], bool]:
            if found := list(units):
                return found, True
            raise ValueError("expected the (forget, retain) batches of at least one micro-batch; got none")

        parts, _ = self.ranks.together(counted)
        read = look([count for units in parts for count in units.values()])
        own = [sum(read[i :: len(parts[0])]) for i in range(len(parts[0]))]
        return {unit: int(total) for unit, total in zip(parts[0], self.ranks.sums(own), strict=True)}

    def measure(self, values: Mapping[str, Tensor], counted: Mapping[str, Tensor] | None = None) -> Part:
        """Return the `Part` with these losses over these units of this rank, [] each; reads the device once."""
        read = look([*values.values(), *(counted or {}).values()])
        losses = {f"{name}_loss": value for name, value in zip(values, read, strict=False)}
        own = dict(zip(counted or {}, read[len(values) :], strict=True))
        if self.ranks.count == 1:
            return Part(losses, own, own)
        weighed = [value * own[_unit(name, own)] for name, value in losses.items()]
        sums = self.ranks.sums([*weighed, *own.values()])
        units = dict(zip(own, sums[len(losses) :], strict=True))
        pairs = zip(losses, sums, strict=False)
        return Part({name: value / max(units[_unit(name, own)], 1) for name, value in pairs}, own, units)

    def shares(self, part: Part, sizes: Sizes | None, last: bool) -> dict[str, float]:
        """Return the factor, by loss, that multiplies this rank's mean over the micro-batch.

        The sum over micro-batches is then divided by `divisor`. Raises ValueError if units and `sizes` do not agree,
        and without `sizes` if micro-batches differ in units.
        """
        if not part.units:
            return dict.fromkeys(part.losses, 1.0)
        before = [earlier.units for earlier in self.parts]
        if sizes is None:
            if before and before[0] != part.units:
                raise ValueError(
                    f"micro-batches of {_counts(before[0])} and of {_counts(part.units)} do not weigh the same in "
                    "one step: give each of them sizes=step.sizes(pairs), with all pairs of batches of the step"
                )
            total = part.units
        else:
            total = _checked(sizes, [*before, part.units], last)
        return {name: part.own[u] / max(total[u], 1) for name in part.losses for u in [_unit(name, part.own)]}

    def add(self, part: Part, sizes: Sizes | None, last: bool) -> None:
        """Record a micro-batch whose gradients have been accumulated."""
        self.parts.append(part)
        self.sizes, self.closed = sizes, last

    @property
    def divisor(self) -> int:
        """Return the number by which the sum of the micro-batches' gradients is divided."""
        return len(self.parts) if self.sizes is None else 1

    def losses(self) -> dict[str, float]:
        """Return the losses of the step: means over the units of all its micro-batches."""
        return dict(self.parts[0].losses) if len(self.parts) == 1 else _means(self.parts)

    def counted(self) -> Sizes:
        """Return the `sizes` of a step that has seen all its micro-batches, where they were counted."""
        return _total(self.parts)

    def join(self, count: int) -> None:
        """Make one micro-batch of the last `count`, which are those of as many ranks."""
        if count > 1:
            units = _total(self.parts[-count:])
            self.parts[-count:] = [Part(_means(self.parts[-count:]), units, units)]


def _total(parts: list[Part]) -> dict[str, float]:
    return {unit: sum(part.units[unit] for part in parts) for unit in parts[0].units}


def _means(parts: list[Part]) -> dict[str, float]:
    """Return the losses over the units of several micro-batches."""
    units = _total(parts)
    out = {}
    for name in parts[0].losses:
        unit = _unit(name, units)
        out[name] = sum(part.units[unit] * part.losses[name] for part in parts) / max(units[unit], 1)
    return out


def _unit(loss: str, units: Sizes) -> str:
    """Return the name of a loss's unit: its own where it has one, else that of the retain rows."""
    name = loss.removesuffix("_loss")
    return name if name in units else "retain"


def _checked(sizes: Sizes, parts: list[Sizes], last: bool) -> Sizes:
    """Return `sizes`; raise ValueError if the micro-batches so far exceed them, or all of them fall short."""
    if sizes.keys() != parts[0].keys():
        raise ValueError(f"`sizes` must say {', '.join(parts[0])}, as step.sizes(pairs) does; got {', '.join(sizes)}")
    seen = {unit: sum(part[unit] for part in parts) for unit in sizes}
    if any(seen[u] > sizes[u] or (last and seen[u] < sizes[u]) for u in sizes):
        raise ValueError(
            f"`sizes` must count all micro-batches of the step on all ranks, as step.sizes(pairs) does; got "
            f"{_counts(sizes)} for {len(parts)} micro-batches with {_counts(seen)}"
        )
    return sizes


def _counts(units: Sizes) -> str:
    return ", ".join(f"{int(count)} {unit}" for unit, count in units.items())
