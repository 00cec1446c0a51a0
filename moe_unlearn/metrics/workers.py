"""Share work between the ranks of torch.distributed: each does its part, and all get every result.

Without an initialised process group there is one rank. A model whose own forward pass needs all ranks (its
weights are sharded) cannot be used by one of them alone, so then every rank does all the work: the passes of one
process, with its batches. What the ranks choose between two passes is the first one's choice (`first_choice`), so that
all take as many, however their sums are rounded.
"""

from collections.abc import Callable, Sequence
from functools import partial

from torch import Tensor, distributed, nn

from moe_unlearn.ranks import gathered, sharded
from moe_unlearn.sharding import exchange_, initialised


def share(model: nn.Module, items: Sequence, compute: Callable[[list], list]) -> list:
    """Return `compute(items)`, one JSON value an item, in order of the items, which are dealt out to the ranks.

    Every rank must call it with the same number of items (ValueError otherwise). An exception on one rank ends all, as
    in `ranks.gathered`.
    """
    if not initialised():
        return compute(list(items))
    rank, world = (0, 1) if sharded(model) else (distributed.get_rank(), distributed.get_world_size())
    if world == 1:
        _check_counts(gathered(lambda: len(items), int)[1])
        return compute(list(items))
    mine = list(items[rank::world])
    _, parts = gathered(lambda: compute(mine) if mine else [], lambda results: [len(items), results])
    _check_counts([count for count, _ in parts])
    merged = [None] * len(items)
    for number, (_, results) in enumerate(parts):
        merged[number::world] = results
    return merged


def first_choice(model: nn.Module) -> Callable[[Tensor], Tensor]:
    """Return a function that gives all ranks of sharded weights the first one's tensor, in place; else the same."""
    if not sharded(model):
        return lambda tensor: tensor

    def shared(tensor: Tensor) -> Tensor:
        exchange_(tensor, None, partial(distributed.broadcast, src=0))
        return tensor

    return shared


def check_whole(model: nn.Module, what: str) -> None:
    """Raise ValueError if the model's weights are sharded, which `what` cannot take."""
    if sharded(model):
        raise ValueError(f"{what} needs whole weights on every rank; got a model whose weights ranks share out")


def _check_counts(counts: list[int]) -> None:
    if len(set(counts)) > 1:
        raise ValueError(f"expected the same items on every rank; the ranks have {counts}")
