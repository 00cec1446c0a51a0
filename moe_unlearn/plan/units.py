"""Shards and units: what one rank of a mesh holds of each parameter, and what it gathers and reduces at a time."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from moe_unlearn.experts import experts_modules
from moe_unlearn.masks.shards import own_words
from moe_unlearn.model.head import unwrapped
from moe_unlearn.model.states import decoder_layers
from moe_unlearn.optim import MaskedAdamW, MaskedSGD, Slot
from moe_unlearn.plan.dry_run import Rehearsal
from moe_unlearn.plan.mesh import Mesh
from moe_unlearn.view import StepView


@dataclass(eq=False)
class Shard:
    """One parameter on the rank: `part` and `mask` of the rows held, `whole` and `whole_mask` of the rows seen."""

    parameter: nn.Parameter
    slot: Slot | None
    whole: Tensor
    part: Tensor
    whole_mask: Tensor | None
    mask: Tensor | None
    ranks: int  # that see the same rows, and so gather and sum together
    own: int  # trained slices among the rows held
    gradient: Tensor | None = None  # of the rows held, while the parameter is whole

    @property
    def padded(self) -> int:
        """Return the elements of all ranks' parts, each as long as the longest."""
        rows = -(-len(self.whole) // self.ranks)
        return self.ranks * rows * self.whole[:1].numel()

    def show(self, *, whole: bool) -> None:
        """Let the parameter and its mask be the whole or the part."""
        p = self.parameter
        if whole:
            self.gradient, p.grad = p.grad, None
        p.data = self.whole if whole else self.part
        if not whole:
            p.grad, self.gradient = self.gradient, None
        if self.slot is not None:
            place = next(i for i, q in enumerate(self.slot.group["params"]) if q is p)
            self.slot.group["masks"][place] = self.whole_mask if whole else self.mask


@dataclass(eq=False)
class Unit:
    """Parameters that are gathered and reduced together."""

    shards: list[Shard]
    keeps: bool = False  # whether they stay whole between forward and backward pass
    whole: bool = False
    backward: bool = False  # whether its backward pass has begun
    weights: int | None = None  # keys of what the ledger holds for it
    buffer: int | None = None
    places: list[int] = field(default_factory=list)  # in the order of the forward passes

    @property
    def ranks(self) -> int:
        """Return how many ranks gather together."""
        return max((shard.ranks for shard in self.shards), default=1)

    @property
    def size(self) -> int:
        """Return the bytes of the gathered weights."""
        return sum(shard.padded * shard.whole.element_size() for shard in self.shards)


def cut(view: StepView, mesh: Mesh, kept: Mapping[str, Tensor], rehearsal: Rehearsal) -> dict[Tensor, Shard]:
    """Cut every parameter of a shadow and its mask, and let the parts of one rank stand in their place.

    It is the rank that holds most. `kept` are WAGLE's masks by name, of which a rank keeps its part too.
    """
    slots = {slot.parameter: slot for slot in view.optimizer.slots()}
    placings = mesh.placings(view.model)
    names: dict[Tensor, str] = {p: name for name, p in view.model.named_parameters()}
    trained = {p: _trained_rows(view.optimizer, p) for p in placings}
    view.optimizer.state.clear()

    def place(p: Tensor, rank: int) -> tuple[int, ...]:
        return (rank,) if placings[p].names == ("fsdp",) else divmod(rank, mesh.ep)

    def load(rank: int) -> float:
        total = 0.0
        for p, placing in placings.items():
            held = placing.held(len(p), place(p, rank))
            state = view.optimizer.state_size(p, None) / max(len(p), 1) if p in slots else 0
            total += len(held) * p[:1].nbytes + trained[p](held) * state
        return total

    rank = max(range(mesh.fsdp), key=load)
    shards = {}
    masks = cast(dict[str, Tensor], view.masks)
    for p, placing in placings.items():
        at, words = place(p, rank), masks.get(names[p])
        held, seen = placing.held(len(p), at), placing.seen(len(p), at)
        own = None if words is None else own_words(words, held, len(p))
        shards[p] = Shard(
            parameter=cast(nn.Parameter, p),
            slot=slots.get(p),
            whole=rehearsal.empty((len(seen), *p.shape[1:]), p.dtype),
            part=rehearsal.empty((len(held), *p.shape[1:]), p.dtype),
            whole_mask=None if words is None else own_words(words, seen, len(p)),
            mask=own,
            ranks=len(placing.peers(at)),
            own=trained[p](held),
        )
        rehearsal.ledger.leave_out(shards[p].whole)
        if names[p] in kept:
            rehearsal.ledger.resize(kept[names[p]], kept[names[p]].nbytes * len(held) // max(len(p), 1))
        if words is not None and own is not None and own is not words:
            rehearsal.ledger.resize(words, 0)
            masks[names[p]] = own
        shards[p].show(whole=False)
    return shards


def unit_modules(model: nn.Module, mesh: Mesh) -> list[nn.Module]:
    """Return the modules that are units, inner ones first."""
    layers = list(decoder_layers(model))
    if mesh.ep == 1:
        return layers
    causal: Any = unwrapped(model)
    embedding, head = causal.get_input_embeddings(), causal.get_output_embeddings()
    tied = head is not None and embedding.weight is head.weight
    return [*experts_modules(model).values(), *layers, *([] if tied else [embedding])]


def _trained_rows(optimizer: MaskedSGD | MaskedAdamW, p: Tensor) -> Callable[[range], int]:
    """Return a function that counts the trained slices of a parameter within some of its rows."""
    layout = optimizer.layout(p)
    if not p.requires_grad or layout is None:
        return lambda rows: 0
    slices = layout.trained_slices
    if slices is None or isinstance(slices, FakeTensor):
        return len
    return lambda rows: int(((slices >= rows.start) & (slices < rows.stop)).sum())
