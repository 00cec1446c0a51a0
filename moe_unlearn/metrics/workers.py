"""Share work between the ranks of torch.distributed: each does its part, and all get every result.

Without an initialised process group there is one rank. A model whose own forward pass needs all ranks (its
weights are sharded) cannot be used by one of them alone, so then every rank does all the work.
"""

from collections.abc import Callable, Sequence

from torch import distributed, nn

from moe_unlearn.ranks import gather, sharded
from moe_unlearn.sharding import initialised


def share(model: nn.Module, items: Sequence, compute: Callable[[list], list]) -> list:
    """Return `compute(items)`, one JSON value an item, in order of the items, which are dealt out to the ranks.

    Every rank must call it with the same number of items (ValueError otherwise). An exception on one rank is
    raised there, and on the others as a RuntimeError that names the rank, so that no rank waits forever.
    """
    rank, world = _ranks(model)
    if world == 1:
        return compute(list(items))
    mine, error = list(items[rank::world]), None
    try:
        part = {"items": len(items), "results": compute(mine) if mine else []}
    except Exception as raised:
        part, error = {"items": len(items), "error": f"{type(raised).__name__}: {raised}"}, raised
    parts = gather(part)
    if error is not None:
        raise error
    for number, other in enumerate(parts):
        if "error" in other:
            raise RuntimeError(f"rank {number} failed: {other['error']}")
    counts = [other["items"] for other in parts]
    if len(set(counts)) > 1:
        raise ValueError(f"expected the same items on every rank; the ranks have {counts}")
    merged = [None] * len(items)
    for number, other in enumerate(parts):
        merged[number::world] = other["results"]
    return merged


def on_first(write: Callable[[], None]) -> None:
    """Have the first rank write; an OSError there is raised on every rank, so that no rank goes on alone."""
    error = None
    if is_first():
        try:
            write()
        except OSError as raised:
            error = raised
    message = gather(None if error is None else str(error))[0]
    if error is not None:
        raise error
    if message is not None:
        raise OSError(f"rank 0 cannot write: {message}")


def is_first() -> bool:
    """Return whether this rank writes files."""
    return not initialised() or distributed.get_rank() == 0


def _ranks(model: nn.Module) -> tuple[int, int]:
    if not initialised() or sharded(model):
        return 0, 1
    return distributed.get_rank(), distributed.get_world_size()
