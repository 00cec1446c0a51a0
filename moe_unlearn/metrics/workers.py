"""Share work between the ranks of torch.distributed: each does its part, and all get every result.

Without an initialised process group there is one rank. A model whose own forward pass needs all ranks (its
weights are sharded) cannot be used by one of them alone, so then every rank does all the work.
"""

from collections.abc import Callable, Sequence

from torch import distributed, nn

from moe_unlearn.ranks import gathered, sharded
from moe_unlearn.sharding import initialised


def share(model: nn.Module, items: Sequence, compute: Callable[[list], list]) -> list:
    """Return `compute(items)`, one JSON value an item, in order of the items, which are dealt out to the ranks.

    Every rank must call it with the same number of items (ValueError otherwise). An exception on one rank ends all, as
    in `ranks.gathered`.
    """
    rank, world = _ranks(model)
    if world == 1:
        return compute(list(items))
    mine = list(items[rank::world])
    _, parts = gathered(lambda: compute(mine) if mine else [], lambda results: [len(items), results])
    counts = [count for count, _ in parts]
    if len(set(counts)) > 1:
        raise ValueError(f"expected the same items on every rank; the ranks have {counts}")
    merged = [None] * len(items)
    for number, (_, results) in enumerate(parts):
        merged[number::world] = results
    return merged


def _ranks(model: nn.Module) -> tuple[int, int]:
    if not initialised() or sharded(model):
        return 0, 1
    return distributed.get_rank(), distributed.get_world_size()
