"""Checks the batches of a side, in memory or made one at a time, and finds in them a row that carries a loss."""

from collections.abc import Iterable, Mapping, Sequence

from moe_unlearn.lazy import Lazy, each
from moe_unlearn.model.batches import Batch, checked, take, target_mask


def all_checked(batches: Iterable[Batch], side: str) -> Sequence[Batch]:
    """Check each batch and return it as `checked` does; TypeError also for a single batch, which is no list of them.

    They are in a list, or `Lazy` if the batches are, and then checked again each time.
    """
    if isinstance(batches, Mapping) or not isinstance(batches, Iterable):
        got = f"one batch: give [{side}_batch]" if isinstance(batches, Mapping) else type(batches).__name__
        raise TypeError(f"expected the {side} batches, in a list or any other iterable; got {got}")
    made = each(batches, lambda batch: checked(batch, side))
    for _ in made if isinstance(made, Lazy) else ():
        pass  # what is wrong is said before the work
    return made


def check_batches(batches: Iterable[Batch], side: str) -> Sequence[Batch]:
    """Check batches and return them as `all_checked` does; ValueError also if none of them carries a loss."""
    rows = all_checked(batches, side)
    if not any(target_mask(batch).any() for batch in rows):
        raise ValueError(f"the {side} set carries no loss: it is empty or all labels are -100")
    return rows


def counted_row(batches: Iterable[Batch]) -> Batch:
    """Return the first row [1, S] that carries a loss, of the first batch that has one; ValueError if none does."""
    for batch in batches:
        counted = target_mask(batch).any(1).nonzero().flatten()
        if len(counted):
            return take(batch, counted[:1])
    raise ValueError("expected a row that carries a loss; got only labels of -100 or unattended positions")
