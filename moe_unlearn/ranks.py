"""Ranks of torch.distributed that train one model together: each has all weights and its own rows.

    g = sum_r n_r g_r / sum_r n_r          g_r the gradient of a mean over the n_r positions or sequences of rank r

The ranks add up the step's own gradients, which are compact, so that only gradients of weights that train are sent. A
model need not be in torch's DistributedDataParallel, which takes memory for a gradient of every weight; if it is, the
wrapper's forward pass is not used and its hooks do nothing.

Weights that an engine shares out (`sharding`) are in parts on the ranks; then the engine and the step's sink add up
their gradients during the backward pass.

Every rank makes the same calls. Sums have the same bits on all ranks, and so have the weights after a step. What
one rank finds wrong in its own arguments is raised on all ranks, a RankError on the others, which are told before any
of them waits for that rank.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor, distributed, nn

from moe_unlearn.errors import RankError
from moe_unlearn.sharding import check_engine, device_of, exchange_, initialised, is_sharded, reshard

_Found = TypeVar("_Found")


class Ranks:
    """The `count` ranks that share a model: those of `group`, else of its DistributedDataParallel, else one.

    A model with sharded weights has those of torch's default group. All take the first rank's parameters and buffers,
    but for parameters that are sharded. Raises ValueError, which says why, where their sharding is not supported.
    """

    def __init__(self, model: nn.Module, group: "distributed.ProcessGroup | None" = None):
        self.sharded = sharded(model)
        if self.sharded:
            check_engine(model)
            reshard(model)
            group = distributed.group.WORLD if group is None else group
        if group is None and isinstance(model, nn.parallel.DistributedDataParallel):
            group = model.process_group
        self.group = group
        self.count = 1 if self.group is None else distributed.get_world_size(self.group)
        #: how many of them, at most, add up the gradient of one expert weight
        self.peers = self.count
        whole = (tensor for tensor in (*model.parameters(), *model.buffers()) if not is_sharded(tensor))
        self.share_(tensor.detach() for tensor in whole)

    def __deepcopy__(self, memo: dict) -> "Ranks":
        """Return an object with the same count that does not communicate, for a rehearsal."""
        copied = object.__new__(Ranks)
        copied.group, copied.count, copied.peers, copied.sharded = None, self.count, self.peers, self.sharded
        return copied

    @property
    def first(self) -> bool:
        """Return whether this is the first rank, which writes files."""
        return self.rank == 0

    @property
    def rank(self) -> int:
        """Return the number of this rank, from 0."""
        return 0 if self.group is None else distributed.get_rank(self.group)

    def sums(self, values: Sequence[float]) -> list[float]:
        """Return the elementwise sums of all ranks' values; a sum is not finite where a value is not."""
        if self.group is None:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64)
        self._in_place(total, distributed.all_reduce)
        return total.tolist()

    def add_(self, gradients: Mapping[str, Tensor | None]) -> None:
        """Add up all ranks' gradients in place, by the name of their parameter.

        Raises RuntimeError on all ranks if only some of them have a gradient.
        """
        if self.group is None:
            return
        present = torch.tensor([g is not None for g in gradients.values()], dtype=torch.int32)
        self._in_place(present, distributed.all_reduce)
        for (name, gradient), holders in zip(gradients.items(), present.tolist(), strict=True):
            if holders not in (0, self.count):
                raise RuntimeError(f"the gradient of {name}: expected it on all {self.count} ranks; {holders} have one")
            if gradient is not None:
                self._in_place(gradient, distributed.all_reduce)

    def share_(self, tensors: Iterable[Tensor], rank: int = 0) -> None:
        """Copy the tensors of one rank, by default the first, into those of all ranks, which have the same shapes."""
        if self.group is not None:
            for tensor in tensors:
                self._in_place(tensor, lambda t, group: distributed.broadcast(t, group=group, group_src=rank))

    def total_(self, tensor: Tensor) -> Tensor:
        """Add up a tensor over all ranks in place, and return it."""
        if self.group is not None:
            self._in_place(tensor, distributed.all_reduce)
        return tensor

    def together(
        self, act: Callable[[], tuple[_Found, bool]], same: Callable[[], Mapping[str, object]] = dict
    ) -> tuple[_Found, bool]:
        """Return act(): its first value of this rank, and whether the second is True on all ranks.

        An error of one rank ends all, as in `gathered`. `same()` is called after `act`: JSON values by what they are
        called in the ValueError that all ranks raise if they differ.
        """
        if self.group is None:
            return act()
        (found, _), said = gathered(act, lambda pair: [pair[1], same()], self.group)
        self._compare([values for _, values in said])
        return found, all(holds for holds, _ in said)

    def said_by_first(self, act: Callable[[], _Found]) -> _Found:
        """Return the JSON value act() of the first rank, which alone calls it; an error there ends all."""
        if self.group is None:
            return act()
        found: _Found = gathered(lambda: act() if self.first else None, lambda value: value, self.group)[1][0]
        return found

    def _compare(self, values: Sequence[Mapping[str, object]]) -> None:
        """Raise ValueError, naming it, for a value that is not the same on all ranks."""
        for name, first in values[0].items():
            if any(other[name] != first for other in values):
                raise ValueError(f"expected {name} to be the same on all {self.count} ranks; they differ")

    def _in_place(self, tensor: Tensor, collective: Callable) -> None:
        exchange_(tensor, self.group, collective)


def turns(batches: Iterable[_Found], ranks: Ranks | None) -> Iterator[tuple[_Found, bool]]:
    """Yield the batches that this rank computes, and whether each counts; no more than one a rank is held.

    The ranks take one batch each in turn. All take as many, since a forward pass of sharded weights needs all of them;
    what a rank computes when there is no batch left for it does not count. Without `ranks` these are all batches.
    """
    count, rank = (1, 0) if ranks is None else (ranks.count, ranks.rank)
    turn: list[_Found] = []
    for batch in batches:
        turn.append(batch)
        if len(turn) == count:
            yield turn[rank], True
            turn = []
    if turn:
        yield turn[min(rank, len(turn) - 1)], rank < len(turn)


def shared_work(
    compute: Callable[[int], Tensor], lengths: Sequence[int], ranks: Ranks | None
) -> Iterator[tuple[int, Tensor]]:
    """Yield the number and the result of each batch, of which the ranks compute one each at a time.

    `compute(i)` is [lengths[i], ...] with one dtype, device and rest of the shape for all batches. An error of one rank
    ends all where weights are whole.
    """
    for i, _ in turns(range(len(lengths)), ranks):
        own = by_itself(partial(compute, i), ranks)
        if ranks is None:
            yield i, own
            continue
        first = i - i % ranks.count
        for rank, k in enumerate(range(first, min(first + ranks.count, len(lengths)))):
            values = own if rank == ranks.rank else own.new_empty(lengths[k], *own.shape[1:])
            ranks.share_([values], rank)
            yield k, values


def local(model: nn.Module) -> nn.Module:
    """Return the model inside data-parallel wrappers, whose forward pass would wait for the other ranks."""
    while isinstance(model, nn.parallel.DistributedDataParallel):
        model = model.module
    return model


def sharded(model: nn.Module) -> bool:
    """Return whether weights are split over ranks, so that every rank must take part in every forward pass."""
    if not initialised():
        return False
    # imported here because a single process never needs them and they are slow to import
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.tensor import DTensor

    return any(isinstance(m, FullyShardedDataParallel) for m in model.modules()) or any(
        isinstance(p, DTensor) for p in model.parameters()
    )


def on_first(write: Callable[[], None]) -> None:
    """Have the first rank write; an error there ends all ranks, as in `together`."""
    together(lambda: write() if is_first() else None)


def together(
    act: Callable[[], _Found],
    group: "distributed.ProcessGroup | None" = None,
    *,
    error: Callable[[str], Exception] = RankError,
) -> _Found:
    """Return act() of this rank, which has ended well on all ranks of `group`, by default all; see `gathered`."""
    return gathered(act, lambda _: None, group, error=error)[0]


def by_itself(act: Callable[[], _Found], ranks: Ranks | None) -> _Found:
    """Return act(), a computation with the model, which ends well on all of `ranks` if they have whole weights.

    Sharded weights need all ranks in every forward pass, in which an error of one cannot be told to the others.
    """
    return act() if ranks is None or ranks.sharded else together(act, ranks.group)


def gathered(
    act: Callable[[], _Found],
    tell: Callable[[_Found], object],
    group: "distributed.ProcessGroup | None" = None,
    *,
    error: Callable[[str], Exception] = RankError,
) -> tuple[_Found, list]:
    """Return act() of this rank, and the JSON values that `tell` makes of it on all ranks, in their order.

    If `act` or `tell` raises on some ranks, all raise, so that none goes on alone and waits for ever: those ranks what
    was raised there, the others `error` of a message that names the first of them. Every rank of `group` calls this;
    without torch.distributed that is this process. Inside `act` no rank waits for another.
    """
    raised: Exception | None = None
    said: object = None
    try:
        found = act()
        said = json.loads(json.dumps(tell(found)))  # here, where what is no JSON is an error of all
    except Exception as caught:  # whatever it is, the other ranks must not go on
        raised = caught
    all_said = gather([None if raised is None else f"{type(raised).__name__}: {raised}", said], group)
    if raised is not None:
        raise raised
    for rank, (message, _) in enumerate(all_said):
        if message is not None:
            raise error(f"rank {rank} stopped: {message}")
    return found, [value for _, value in all_said]


def is_first() -> bool:
    """Return whether this rank writes files."""
    return not initialised() or distributed.get_rank() == 0


def everyone() -> "distributed.ProcessGroup | None":
    """Return the group of all ranks, None if this process is alone."""
    return distributed.group.WORLD if initialised() and distributed.get_world_size() > 1 else None


def gather(value: object, group: "distributed.ProcessGroup | None" = None) -> list:
    """Return the JSON values of all ranks, in their order; floats keep every bit."""
    if not initialised():
        return [value]
    device = device_of(group, torch.device("cpu"))
    data = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8).to(device)
    length = torch.tensor([len(data)], device=device)
    lengths = [torch.empty_like(length) for _ in range(distributed.get_world_size(group))]
    distributed.all_gather(lengths, length, group=group)
    longest = int(max(lengths))
    padded = torch.zeros(longest, dtype=torch.uint8, device=device)
    padded[: len(data)] = data
    bodies = [torch.empty_like(padded) for _ in lengths]
    distributed.all_gather(bodies, padded, group=group)
    return [json.loads(bytes(b[: int(n)].cpu().numpy())) for b, n in zip(bodies, lengths, strict=True)]
