"""Sums over all ranks of what each counts in the rows that it scores; of one process they are its own."""

import torch
from torch import Tensor

from moe_unlearn.sharding import complete_
from moe_unlearn.wagle.pieces import Piece


class Totals:
    """Adds up int64 tensors of one shape, each counted in a piece; all ranks add the same pieces in the same order."""

    def __init__(self, *shape: int) -> None:
        self._shape = shape
        self._by_place: dict[tuple, Tensor] = {}  # by the groups of ranks over which sums of a piece are completed

    def add(self, piece: Piece, counts: Tensor) -> None:
        """Add what this rank has counted in a piece."""
        place = () if piece.rows is None else piece.rows.reduced
        if place not in self._by_place:
            self._by_place[place] = torch.zeros(self._shape, dtype=torch.int64)
        self._by_place[place] += counts.cpu()

    def complete(self) -> Tensor:
        """Return the sum, on the CPU; every rank has to call this once."""
        total = torch.zeros(self._shape, dtype=torch.int64)
        for groups, own in self._by_place.items():
            total += complete_(own, groups)
        return total


def by_block(piece: Piece, *own: int) -> Tensor:
    """Return what each rank has counted in a piece, int64 [len(own), blocks], in the order of their rows."""
    rows = piece.rows
    if rows is None:
        return torch.tensor(own)[:, None]
    counts = torch.zeros(len(own), len(rows.blocks), dtype=torch.int64)
    if rows.held:
        counts[:, rows.blocks.index(rows.held)] = torch.tensor(own)
    return complete_(counts, rows.reduced)


def allotted(piece: Piece, own: int, count: int) -> tuple[int, int]:
    """Return how many of `count` elements this rank takes of its `own`, and how many all ranks take.

    They are taken in the order of the rows, those of the ranks that hold rows before this one's first.
    """
    [counts] = by_block(piece, own)
    rows = piece.rows
    before = int(counts[: rows.blocks.index(rows.held)].sum()) if rows is not None and rows.held else 0
    return min(own, max(count - before, 0)), min(int(counts.sum()), count)
