"""Extension of a rehearsal to a model with more layers of the same kind, from the rehearsals of two shallow ones.

Layers of one kind allocate and release the same. So the timeline of a model that is a period of layers deeper has the
events of the shallower one, with a block more wherever the code goes through all layers; what is held at an event
grows by the same number of bytes with every further period, and the peak of any depth follows to the byte. Events that
are not repeated in this way are an error, and the whole model is rehearsed then.
"""

import gc
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
from torch import nn

from moe_unlearn.config import Recipe
from moe_unlearn.model.states import decoder_layers
from moe_unlearn.plan.memory import Ledger
from moe_unlearn.plan.mesh import Mesh

_SMALL = 4096  # bytes below which sizes may differ, such as those of a number for each layer
_MOST_KINDS = 4  # of layers in turn
_MOST_BLOCKS = 1024  # that are inserted in a timeline; two steps of eight micro-batches with MOLLM have some 216


class NotRepeated(ValueError):
    """Two timelines do not differ by whole blocks, so nothing is known of a third."""


class Rehearsed(NamedTuple):
    """Holds what a rehearsal has counted."""

    memory: dict[str, int]
    largest: dict[str, int]
    flops: dict[str, int]
    bytes: dict[str, int]
    traffic: dict[str, int]
    products: float  # of hidden states and head, of a loss on average


class Counted(NamedTuple):
    """Holds what a rehearsal has counted, with its ledger, from which the memory of other depths follows."""

    ledger: Ledger
    flops: Mapping[str, int]
    bytes: Mapping[str, int]
    traffic: Mapping[str, int]
    products: float

    def rehearsed(self) -> Rehearsed:
        """Return the counts of this depth itself."""
        return Rehearsed(
            self.ledger.peak(),
            self.ledger.largest(),
            _some(self.flops),
            dict(self.bytes),
            _some(self.traffic),
            self.products,
        )


@contextmanager
def collected_later() -> Iterator[None]:
    """Put garbage collection off; in the midst of a rehearsal it would release tensors at a moment of its own."""
    on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if on:
            gc.enable()


def depths(model: nn.Module, recipe: Recipe, mesh: Mesh | None = None) -> tuple[int, int] | None:
    """Return how many layers two shallow models have, from whose rehearsals that of a step on `model` follows.

    What trains has been chosen by the step already. None where the layers are too few, or of too many kinds.
    """
    layers = list(decoder_layers(model))
    types = getattr(getattr(model, "config", None), "layer_types", None) or [""] * len(layers)
    above = recipe.forget.layer if recipe.forget.objective == "rmu" else -1  # nothing above RMU's layer runs
    kinds: list[Any] = [
        (types[i], i <= above, [(name, p.shape, p.dtype, p.requires_grad) for name, p in layer.named_parameters()])
        for i, layer in enumerate(layers)
    ]
    for period in range(1, _MOST_KINDS + 1):
        head = next((i for i in range(len(kinds) - period, 0, -1) if kinds[i - 1] != kinds[i - 1 + period]), 0)
        # the buffers of three neighbours overlap where ranks gather and reduce them; where all that is scored is in
        # layers, a mask is bounded with the first and the last of them, and neither is as those between
        ends = recipe.wagle is not None and recipe.scope.kind != "all"
        short = head + (2 if mesh is None and not ends else 3) * period
        short += (len(layers) - short) % period
        if short + period < len(layers):
            return short, short + period
    return None


def extended(short: Counted, long: Counted, periods: int) -> Rehearsed:
    """Return the counts of the model that is `periods` times as much deeper than `short` as `long` is.

    Raises NotRepeated unless the timeline of `long` is that of `short` with blocks inserted.
    """
    memory, largest = peaks(short.ledger.timeline(), long.ledger.timeline(), periods)

    def line(low: Mapping[str, int], high: Mapping[str, int]) -> dict[str, int]:
        return {name: low.get(name, 0) + (high[name] - low.get(name, 0)) * periods for name in high}

    return Rehearsed(
        memory,
        largest,
        _some(line(short.flops, long.flops)),
        line(short.bytes, long.bytes),
        _some(line(short.traffic, long.traffic)),
        long.products,
    )


def peaks(
    short: Sequence[tuple[str, int]], long: Sequence[tuple[str, int]], periods: int
) -> tuple[dict[str, int], dict[str, int]]:
    """Return the bytes by component at the peak, and the most of each, from two timelines of (component, bytes).

    Raises NotRepeated as `extended` does.
    """
    names = list(dict.fromkeys(name for name, _ in (*short, *long)))
    low, high = _held(short, names), _held(long, names)
    own, other = _codes(short, long)
    # an event of the middle is met from both ends: with the layers before it and with those behind it
    ahead = _matched(own, other)
    behind = len(other) - 1 - _matched(own[::-1], other[::-1])[::-1]
    held = np.concatenate([low + (high[at] - low) * periods for at in (ahead, behind)])
    most = held[held.sum(1).argmax()] if len(held) else np.zeros(len(names), np.int64)
    by_name = {name: int(size) for name, size in zip(names, most, strict=True) if size}
    return by_name, {name: int(size) for name, size in zip(names, held.max(0, initial=0), strict=True)}


def _some(counts: Mapping[str, int]) -> dict[str, int]:
    return {name: count for name, count in counts.items() if count}


def _held(events: Sequence[tuple[str, int]], names: list[str]) -> np.ndarray:
    """Return the bytes [events, names] that are held after each event."""
    changes = np.zeros((len(events), len(names)), np.int64)
    place = {name: i for i, name in enumerate(names)}
    for i, (name, size) in enumerate(events):
        changes[i, place[name]] = size
    return changes.cumsum(0)


def _codes(*timelines: Sequence[tuple[str, int]]) -> list[np.ndarray]:
    """Return one number for each event; events that may stand for each other have the same."""
    codes: dict[tuple[str, int], int] = {}

    def code(name: str, size: int) -> int:
        kind = size if abs(size) >= _SMALL else (size > 0) - (size < 0)
        return codes.setdefault((name, kind), len(codes))

    return [np.array([code(*event) for event in events], np.int64) for events in timelines]


def _matched(short: np.ndarray, long: np.ndarray) -> np.ndarray:
    """Return for each event of `short` its place in `long`, with as few blocks inserted between them as can be.

    Each block is inserted as late as it can be.
    """
    count, extra = len(short), len(long) - len(short)
    if extra < 0:
        raise NotRepeated("a deeper model has fewer events")
    runs, offsets = _runs(np.concatenate([short, [-1], long])), np.arange(extra + 1)
    reach, source = [np.full(extra + 1, -1)], [np.full(extra + 1, -1)]
    reach[0][0] = _differ(runs, np.array([0]), np.array([count + 1]))[0]
    while reach[-1][extra] < count:
        if len(reach) > _MOST_BLOCKS:
            raise NotRepeated("the events of a deeper model are others")
        before = np.maximum.accumulate(reach[-1])  # the farthest event reached at this or a smaller offset
        came = np.maximum.accumulate(np.where(reach[-1] == before, offsets, 0))
        reach.append(_differ(runs, before, count + 1 + offsets + before))
        source.append(came)
    at, stop = np.empty(count, np.int64), count
    d = extra
    for step in range(len(reach) - 1, -1, -1):
        start = int(reach[step - 1][source[step][d]]) if step else 0
        at[start:stop] = np.arange(start, stop) + d
        stop, d = start, int(source[step][d]) if step else 0
    return at


def _runs(events: np.ndarray) -> list[np.ndarray]:
    """Return for each k one number for the 2^k events from each place on; where these are the same, so is the number.

    Memory and time are n log n of n events (prefix doubling: Karp, Miller and Rosenberg, STOC 1972).
    """
    runs = [np.unique(events, return_inverse=True)[1]]
    while len(runs[-1]) > 1 << (len(runs) - 1):
        last, half = runs[-1], 1 << (len(runs) - 1)
        runs.append(np.unique(last[:-half] * len(events) + last[half:], return_inverse=True)[1])
    return runs


def _differ(runs: Sequence[np.ndarray], one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Return for each pair of places in the events the first from `one` on that differs from its partner."""
    one, other = one.copy(), other.copy()
    for k in reversed(range(len(runs))):
        numbers = runs[k]
        inside = np.maximum(one, other) < len(numbers)
        same = inside & (numbers[np.where(inside, one, 0)] == numbers[np.where(inside, other, 0)])
        one, other = one + (same << k), other + (same << k)
    return one
