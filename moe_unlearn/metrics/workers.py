"""Share work between the ranks of torch.distributed: each does its part, and all get every result.

Without an initialised process group there is one rank. Ranks that hold whole weights are dealt rows. A forward pass of
sharded weights needs all ranks, each with a batch of its own: they are dealt the batches of one process, which have its
bits, and all take as many, within a batch too (`everywhere`).
"""

from collections.abc import Callable, Sequence
from functools import partial

from torch import Tensor, distributed, nn

from moe_unlearn.progress import watched
from moe_unlearn.ranks import gather, gathered, sharded
from moe_unlearn.sharding import exchange_, initialised


def share(
    model: nn.Module,
    items: Sequence,
    compute: Callable[[list], list],
    *,
    batch_size: int = 1,
    key: Callable | None = None,
    what: str = "evaluation",
) -> list:
    """Return the value of every item, in their order: JSON values that `compute` makes of batches of them, one each.

    A batch has up to `batch_size` items, next to each other in the order of `key(item)`, by default their own; `what`
    names the work where its progress is shown. Every rank must call this with the same number of items; ValueError
    otherwise, and for a `batch_size` below 1. An exception on one rank ends all, as in `ranks.gathered`, but where
    weights are sharded and others wait for its pass.
    """
    if batch_size < 1:
        raise ValueError(f"expected a batch_size of at least 1; got {batch_size}")
    parts = sharded(model)
    rank, ranks = (distributed.get_rank(), distributed.get_world_size()) if initialised() else (0, 1)
    counts = gather(len(items))
    if len(set(counts)) > 1:
        raise ValueError(f"expected the same items on every rank; the ranks have {counts}")
    own = range(len(items)) if parts else range(rank, len(items), ranks)
    order = sorted(own, key=None if key is None else lambda i: key(items[i]))
    batches = [order[at : at + batch_size] for at in range(0, len(order), batch_size)]
    turns = range(rank, -(-len(batches) // ranks) * ranks, ranks) if parts else range(len(batches))

    def values() -> list[tuple[int, object]]:
        found: list[tuple[int, object]] = []
        for turn in watched(turns, what):
            batch = batches[min(turn, len(batches) - 1)]
            computed = compute([items[i] for i in batch])
            if turn < len(batches):  # else the rank only takes part in the others' passes
                found += zip(batch, computed, strict=True)
        return found

    _, told = gathered(values, lambda found: found)
    by_number = dict(pair for part in told for pair in part)
    return [by_number[i] for i in range(len(items))]


def everywhere(model: nn.Module) -> Callable[[Tensor], bool]:
    """Return a function that says whether a bool tensor is all True: on all ranks, where they share weights out."""
    if not sharded(model):
        return lambda holds: bool(holds.all())

    def on_all(holds: Tensor) -> bool:
        least = holds.all().int()
        exchange_(least, None, partial(distributed.all_reduce, op=distributed.ReduceOp.MIN))
        return bool(least)

    return on_all


def check_whole(model: nn.Module, what: str) -> None:
    """Raise ValueError if the model's weights are sharded, which `what` cannot take."""
    if sharded(model):
        raise ValueError(f"{what} needs whole weights on every rank; got a model whose weights ranks share out")
