"""Parts of parameters, and the groups of them whose gradients fit a budget of memory.

A piece is a range of a parameter's flat elements. In a group it is a run of whole rows, which have whole words of the
mask: all of a parameter, some experts, or rows of one expert. With a stride it is a sample. Where ranks score different
rows of a parameter, a piece is all rows of this rank: the groups of all ranks have the same parameters.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from moe_unlearn.ranks import Ranks
from moe_unlearn.sharding import Rows, is_sharded, part, rows_here, rows_of_work, rowwise

SIDES = 2  # forget and retain


@dataclass(frozen=True, eq=False)
class Piece:
    """Some flat elements of a parameter that this rank scores; of a sharded one, of the rows that it holds."""

    name: str
    parameter: nn.Parameter
    elements: range
    #: which rows of the parameter each rank scores, where several do; None where this process scores all of it
    rows: Rows | None = None

    @property
    def own(self) -> Tensor:
        """Return what this rank holds of the parameter."""
        return part(self.parameter.detach())

    @property
    def whole(self) -> bool:
        """Return whether the piece is all that this rank holds."""
        return self.elements == range(self.own.numel())

    @property
    def width(self) -> int:
        """Return the elements of a row: the last dimension of the parameter, 1 of a scalar."""
        own = self.own
        return own.shape[-1] if own.dim() else 1

    @property
    def shape(self) -> tuple[int, ...]:
        """Return the shape of the piece: whole slices of the parameter, rows of one, or a run of elements."""
        own, at = self.own, self.elements
        if self.whole:
            return tuple(own.shape)
        if own.dim() < 2 or at.step > 1:
            return (len(at),)
        size = own[:1].numel()
        whole_slices = size > 0 and at.start % size == 0 and len(at) % size == 0
        return (len(at) // size, *own.shape[1:]) if whole_slices else (len(at) // self.width, self.width)

    @property
    def gradient_dtype(self) -> torch.dtype:
        """Return the dtype in which gradients are added up."""
        return torch.promote_types(self.parameter.dtype, torch.float32)

    @property
    def nbytes(self) -> int:
        """Return the bytes of the gradients of both sides; a parameter that does not train has none.

        Where several ranks score the parameter, these are of the rank with most rows, the same on all. Where it is
        whole on all of them, the gradient of a batch is too, until they exchange its rows.
        """
        exchanged = self.rows is not None and not is_sharded(self.parameter) and self.parameter.requires_grad
        return self.cost(self.most) + (self.parameter.nbytes if exchanged else 0)

    @property
    def most(self) -> int:
        """Return the most elements of the parameter that one rank scores."""
        if self.rows is None:
            return len(self.elements)
        return max(map(len, self.rows.blocks), default=0) * math.prod(self.parameter.shape[1:])

    @property
    def unit(self) -> int:
        """Return the bytes of what a group has whole: a row, or all rows of a rank where several score them."""
        return self.nbytes if self.rows is not None else self.cost(self.width)

    def cost(self, elements: int) -> int:
        """Return the bytes of the gradients of both sides of so many elements."""
        return SIDES * elements * self.gradient_dtype.itemsize if self.parameter.requires_grad else 0

    def values(self) -> Tensor:
        """Return the weights of the piece, in its shape."""
        if self.whole:
            return self.own
        at = self.elements
        return self.own.reshape(-1)[at.start : at.stop : at.step].view(self.shape)

    def between(self, start: int, stop: int) -> "Piece":
        """Return the piece of some rows of the parameter, by their numbers."""
        return Piece(self.name, self.parameter, range(start * self.width, stop * self.width))

    def places(self, first: int, count: int) -> tuple[slice, slice]:
        """Return which of the parameter's `count` flat elements from `first` on belong to the piece, and where in it.

        The first slice is of the `count` elements, the second of the piece.
        """
        start, step = self.elements.start, self.elements.step
        low, high = (-(-(edge - start) // step) for edge in (max(first, start), min(first + count, self.elements.stop)))
        high = max(low, high)
        source = start + low * step - first
        return slice(source, source + (high - low) * step, step), slice(low, high)


def all_pieces(model: nn.Module, ranks: Ranks | None) -> list[Piece]:
    """Return one piece of each parameter, in `named_parameters()` order: what this rank scores of it."""
    pieces = []
    for name, p in model.named_parameters():
        rows, own = None, part(p.detach())
        elements = range(own.numel())
        if ranks is not None and is_sharded(p):
            rows = rows_here(name, p, ranks.group)
        elif ranks is not None and not ranks.sharded:
            assert ranks.group is not None  # there are several
            rows = rows_of_work(p, ranks.group)
            size = rowwise(own)[:1].numel()
            elements = range(rows.held.start * size, rows.held.stop * size)
        pieces.append(Piece(name, p, elements, rows))
    return pieces


def stride_of(pieces: Sequence[Piece], count: int) -> int:
    """Return the stride of a sample of about `count` elements; it is odd, so that it meets every column."""
    return sum(piece.most for piece in pieces) // count | 1


def sample_of(pieces: Sequence[Piece], stride: int) -> list[Piece]:
    """Return each `stride`-th element of the pieces laid end to end; all ranks have the same pieces."""
    sampled, first = [], 0
    for piece in pieces:
        at = piece.elements
        sampled.append(replace(piece, elements=range(at.start + -first % stride, at.stop, stride)))
        first += piece.most
    return [piece for piece in sampled if len(piece.elements) or piece.rows is not None]


def smallest_group(pieces: Iterable[Piece]) -> tuple[str, int]:
    """Return the name of the parameter whose `unit` takes most memory, and its bytes."""
    units = [(piece.unit, piece.name) for piece in pieces if piece.most]
    most, name = max(units, key=lambda unit: unit[0], default=(0, ""))
    return name, most


def grouped(pieces: Sequence[Piece], size: int | None) -> list[list[Piece]]:
    """Return the pieces of whole parameters, cut where need be, in groups whose gradients take at most `size` bytes.

    The order stays. Groups are filled up; where a parameter is cut, it is cut between experts (slices along its first
    dimension) if a group holds one. None stands for one group of all. A `size` below `smallest_group` is an error.
    Parameters of which ranks score different rows are not cut.
    """
    if size is None or sum(piece.nbytes for piece in pieces) <= size:
        return [list(pieces)]
    groups: list[list[Piece]] = [[]]
    free = size
    for piece in pieces:
        cut = piece.rows is None
        count, done = len(piece.elements) // max(piece.width, 1) if cut else 1, 0
        row = piece.unit
        if not row or not count:
            groups[-1].append(piece)
            continue
        slices = max(count // max(len(piece.own), 1), 1) if cut and piece.own.dim() > 2 else 1
        while done < count:
            fit = min(free // row, count - done)
            whole_slices = (done + fit) // slices * slices - done  # to the last slice that ends within them
            if done + fit < count and (whole_slices > 0 or size // row >= slices):
                fit = max(whole_slices, 0)
            if fit:
                groups[-1].append(piece if fit == count else piece.between(done, done + fit))
                done, free = done + fit, free - fit * row
            else:
                groups.append([])
                free = size
    return [group for group in groups if group]
