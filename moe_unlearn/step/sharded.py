"""The step on weights that an engine shares out over ranks: see `sharding`.

    Shards         the sharded parameters of a step: which rows this rank holds and which of them train on any rank
    ShardedStore   the gradient store on parts of gradients; inner products are those of whole gradients
    ShardedSink    adds up each expert weight's gradient over the ranks in the backward pass that made it

Where expert parallelism gives each expert to one rank alone, nothing is added up: the sinks are those of one process,
so that factors and updates in the backward pass stay, and ranks only tell one another whether one has to stop.

FSDP2 reduces what autograd leaves in `.grad`. The gradients of experts never get there: the sink computes dW of the
slices that train on any rank, in float32, sends each row to the rank that holds it, adds in the order of the ranks,
applies the mask and keeps its own rows. Nothing waits for the end of the backward pass, so that no rank ever holds
the gradients of two layers whole.

Deterministic. Source: our specification.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from moe_unlearn.errors import NonFiniteError
from moe_unlearn.experts import experts_modules
from moe_unlearn.masks import WeightMask
from moe_unlearn.masks.shards import shared_out, slices_anywhere
from moe_unlearn.ops import gram
from moe_unlearn.ops.bits import unpack_bits
from moe_unlearn.ops.expert_wgrad import Factors, expert_wgrad
from moe_unlearn.optim import MaskedAdamW, MaskedSGD
from moe_unlearn.ranks import Ranks, gather
from moe_unlearn.sharding import (
    Rows,
    add_up_gradients,
    complete_,
    is_sharded,
    like,
    part,
    reset,
    reshard,
    rows_here,
    sum_of_peers,
)
from moe_unlearn.step.checks import check_adapters
from moe_unlearn.step.gradients import GradientStore
from moe_unlearn.step.sinks import CompactSink, sink_of


class Exchange(NamedTuple):
    """The slices of one weight whose gradient the ranks add up, and how many of them each rank holds.

    slices: int32 [M], counted from the first row that this rank sees; None for all of these rows. order: int64, which
    of them are sent, rank by rank, as replicas get the same ones; None if each goes to one rank, in their order.
    """

    slices: Tensor | None
    counts: tuple[int, ...]
    order: Tensor | None


class Shards:
    """The parameters of a model that an engine shares out, on this rank.

    Until `close`, FSDP2 adds up the gradients of ranks, where it would average them. Raises ValueError for adapters on
    experts that are shared out, see `check_adapters`.
    """

    def __init__(self, model: nn.Module, ranks: Ranks):
        check_adapters(model)
        reshard(model)
        self.model, self.ranks = model, ranks
        named = dict(model.named_parameters())
        self.rows: dict[Tensor, Rows] = {
            p: rows_here(name, p, ranks.group) for name, p in named.items() if is_sharded(p)
        }
        #: by experts module its weights by their name in it
        self.owners = {
            name: {suffix: named[f"{name}.{suffix}"] for suffix, _ in module.named_parameters(recurse=False)}
            for name, module in experts_modules(model).items()
        }
        owned = {p for owners in self.owners.values() for p in owners.values()}
        ranks.peers = max((len(self.rows[p].parts) if p in self.rows else ranks.count for p in owned), default=1)
        self.exchanges = {p: exchange_of(p, rows, None) for p, rows in self.rows.items() if p in owned}
        self.close = add_up_gradients(model)

    def share_out(self, mask: WeightMask) -> WeightMask:
        """Return a mask of which this rank holds no more words than those of its rows, and of vectors."""
        own = {
            name: shared_out(mask.packed[name], p) for name, p in self.model.named_parameters() if name in mask.packed
        }
        return dataclasses.replace(mask, packed=mask.packed | own)

    def take_masks(self, masks: Mapping[str, Tensor], moving: set[str]) -> set[str]:
        """Have the sink send what any rank trains under `masks`, packed, by name, of the rows held here.

        Return the names of those of which a rank holds a set bit, from `moving`, those of which this one does.
        """
        for name, p in self.model.named_parameters():
            rows, words = self.rows.get(p), masks.get(name)
            if rows is not None and p in self.exchanges:
                self.exchanges[p] = exchange_of(p, rows, None if words is None else slices_anywhere(words, p, rows))
        counts = self.ranks.sums([name in moving for name in masks])
        return {name for name, count in zip(masks, counts, strict=True) if count}

    def sink(self, store: GradientStore, form: str) -> CompactSink:
        """Return a new sink of a step's gradients, of one `form` of `sink_of` where each rank has its own experts."""
        if self.ranks.peers > 1:
            return ShardedSink(store, self)
        sink = sink_of(store, form)
        sink.owners = self.owners
        return sink


def store_of(optimizer: MaskedSGD | MaskedAdamW, shards: Shards | None) -> GradientStore:
    """Return the store of gradients that serves an optimizer, of parts where weights are sharded."""
    return GradientStore(optimizer) if shards is None else ShardedStore(optimizer, shards)


class ShardedStore(GradientStore):
    """A gradient store in which the gradient of a sharded parameter is this rank's rows."""

    def __init__(self, optimizer: MaskedSGD | MaskedAdamW, shards: Shards):
        self.shards = shards
        super().__init__(optimizer)

    #: other ranks wait for this one in the backward pass
    alone = False

    def stopping(self, act: Callable[[], bool], updated: Sequence[str] = ()) -> bool:
        """Return whether act() is true on any rank; a NonFiniteError on one is raised on all, with `updated` of all."""
        if self.shards.ranks.peers > 1:
            return act()  # which has nothing to stop for: no sink keeps factors
        found, error = False, None
        try:
            found = act()
        except NonFiniteError as raised:
            error = raised
        held, failed = self.shards.ranks.sums([found, error is not None])
        if not failed:
            return held > 0
        names = {name for own in gather([*updated], self.shards.ranks.group) for name in own}
        reason = "a gradient on another rank is not finite: stopped before its update" if error is None else str(error)
        raise NonFiniteError(reason, tuple(sorted(names)))

    @property
    def factored(self) -> bool:
        """Return whether any gradient in the sets exists only as factors on any rank; all ranks ask together."""
        return self.shards.ranks.peers == 1 and self.shards.ranks.sums([super().factored])[0] > 0

    def of(self, p: Tensor) -> Tensor | Factors | None:
        """Return this rank's rows of the step's gradient of `p`."""
        gradient = super().of(p)
        return part(gradient) if isinstance(gradient, Tensor) else gradient

    def clear(self) -> None:
        """Drop all gradients, and what FSDP2 has left of a pass that stopped half-way."""
        reset(self.shards.model)
        super().clear()

    def close(self) -> None:
        """Drop the collected gradients, and leave FSDP2 as it was."""
        super().close()
        self.shards.close()

    def _apart(self, p: nn.Parameter) -> bool:
        return p not in self.shards.rows

    def _leave(self, p: nn.Parameter, gradient: Tensor) -> None:
        p.grad = like(p, gradient) if p in self.shards.rows else gradient

    def _rows(self, p: nn.Parameter) -> Tensor:
        layout = self.optimizer.layout(p) if p in self._compact else None
        own = part(p.detach())
        return own if layout is None or layout.trained_slices is None else own[layout.trained_slices]

    def _inner(
        self, sets: list[list[Tensor | None]], masks: list[Tensor | None], others: Mapping[Tensor, Tensor]
    ) -> Tensor:
        """Add up the inner products over the dimensions of the mesh along which each parameter is cut."""
        places: dict[tuple, list[int]] = {}
        for i, (_, p) in enumerate(self.trained):
            rows = self.shards.rows.get(p)
            places.setdefault(() if rows is None else rows.reduced, []).append(i)
        device = next((p.device for _, p in self.trained), None)
        total = torch.zeros(len(sets), len(sets), dtype=torch.float64, device=device)
        for groups, chosen in places.items():
            # a rank without rows has gradients without elements
            own = [[g if g is not None and g.numel() else None for g in (each[i] for i in chosen)] for each in sets]
            products = gram(own, masks=[masks[i] for i in chosen]).to(total.device)
            for i in chosen:
                if (more := others.get(self.trained[i][1])) is not None:
                    products += more.to(total.device)
            total += complete_(products, groups)
        # groups of ranks may have added in different orders, and all ranks have to clip alike
        self.shards.ranks.share_([total])
        return total


class ShardedSink(CompactSink):
    """Adds up the gradient of each sharded weight over the ranks that see the same rows, and keeps those held here."""

    def __init__(self, store: GradientStore, shards: Shards):
        super().__init__(store)
        self.shards, self.owners = shards, shards.owners

    def trained_slices(self, weights: Sequence[Tensor]) -> Tensor | None:
        """Return the slices that train on any rank, counted from the first row that this rank sees."""
        exchanges = [self.shards.exchanges.get(weight) for weight in weights]
        if all(exchange is None for exchange in exchanges):
            return super().trained_slices(weights)
        found = [exchange.slices for exchange in exchanges if exchange is not None and exchange.slices is not None]
        return torch.cat(found).unique() if len(found) == len(weights) else None

    def take(self, weight: Tensor, factors: Factors) -> None:
        exchange, layout = self.shards.exchanges.get(weight), self.optimizer.layout(weight)
        if exchange is None or layout is None:
            super().take(weight, factors)
            return
        slices, counts, order = exchange
        if slices is not None and not len(slices):
            return
        wide = torch.promote_types(weight.dtype, torch.float32)
        dw = expert_wgrad(**factors._asdict(), experts=slices, out_dtype=wide)
        dw = dw if weight.dim() == 3 else dw.squeeze(2)
        dw = sum_of_peers(dw, counts, order, self.shards.rows[weight].group)
        dw = dw.to(weight.dtype)
        if layout.mask is not None:
            dw = torch.where(unpack_bits(layout.mask, dw.shape[-1]), dw, 0)
        held = self.store.collected.get(weight)
        assert not isinstance(held, Factors)  # the sharded step keeps none
        self.store.collected[weight] = dw if held is None else held.add_(dw)


def exchange_of(p: Tensor, rows: Rows, slices: Tensor | None) -> Exchange:
    """Return what is exchanged of a parameter of which these `slices` train, None for all."""
    seen = list(rows.seen) if slices is None else [row for row in slices.tolist() if row in rows.seen]
    sent = [[i for i, row in enumerate(seen) if row in held] for held in rows.parts]
    flat = [i for places in sent for i in places]
    order = None if flat == [*range(len(seen))] else torch.tensor(flat, device=p.device)
    if slices is not None:
        slices = torch.tensor(seen, dtype=torch.int32, device=p.device) - rows.seen.start
    return Exchange(slices, tuple(map(len, sent)), order)
