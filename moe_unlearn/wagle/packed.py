"""The words of a mask while it is made, piece by piece; layout as `ops.bits` says."""

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from moe_unlearn.masks.shards import shared_words
from moe_unlearn.ops.bits import WORD_BITS, num_words, pack_bits, unpack_bits, words_shape
from moe_unlearn.wagle.mapped import MappedWords
from moe_unlearn.wagle.pieces import Piece
from moe_unlearn.wagle.totals import allotted

_BLOCK = 1 << 17  # elements at a time


def count_words(pieces: Sequence[Piece]) -> int:
    """Return how many words the masks of whole parameters have, of this rank's rows."""
    return sum(math.prod(words_shape(piece.shape)) for piece in pieces)


class Packed:
    """The packed masks of parameters by name, in the order in which their pieces came; of this rank's rows.

    With `storage`, what is on the CPU lies in the memory that it makes when the first words come.
    """

    def __init__(self, storage: Callable[[], MappedWords] | None = None) -> None:
        self._words: dict[str, Tensor] = {}
        self._pieces: dict[str, Piece] = {}  # one of each parameter
        self._storage = storage
        self._mapped: MappedWords | None = None

    def put(self, piece: Piece, words: Tensor) -> None:
        """Put the words of a piece into those of its parameter; where ranks score it, they are all of this rank's."""
        self._pieces.setdefault(piece.name, piece)
        complete = piece.whole or piece.rows is not None
        mapped = self._storage is not None and words.device.type == "cpu"
        if complete and not mapped:
            self._words[piece.name] = words
            return
        if piece.name not in self._words:
            shape = words.shape if complete else words_shape(piece.own.shape)
            self._words[piece.name] = self._zeros(shape) if mapped else words.new_zeros(shape)
        if words.numel():
            rows, start = words.view(-1, words.shape[-1]), 0 if complete else piece.elements.start // piece.width
            self._rows(piece.name)[start : start + len(rows)] = rows
        self._release()

    def set(self, piece: Piece, index: Tensor) -> None:
        """Set bits of a piece that are not set, those of its flat elements `index`."""
        if not len(index):
            return
        width, first = self._width(piece.name), 0 if piece.rows is not None else piece.elements.start
        bit = torch.tensor([*(1 << i for i in range(WORD_BITS - 1)), -(1 << (WORD_BITS - 1))], dtype=torch.int32)
        bit = bit.to(index.device)
        for some in index.split(_BLOCK):
            at = some.long() + first
            row, column = at // width, at % width
            place = row * num_words(width) + column // WORD_BITS
            # bits of one word add up to the word
            self._rows(piece.name).view(-1).index_add_(0, place, bit[column % WORD_BITS])
        self._release()

    def fill(self, count: int) -> None:
        """Set the first `count` bits of all ranks that are not set."""
        for name, piece in self._pieces.items():
            if count == 0:
                break
            unset = sum(int((~kept).sum()) for _, kept in self._blocks(name))
            own, taken = allotted(piece, unset, count)
            count -= taken
            for words, kept in self._blocks(name):
                rank = (~kept).flatten().cumsum(0).view_as(kept)
                filled = kept | (rank <= own)
                words.copy_(pack_bits(filled))
                own -= int((filled & ~kept).sum())
            self._release()

    def words(self) -> dict[str, Tensor]:
        """Return the words by parameter: of all its rows, or shared out as it is."""
        return {
            name: words if piece.rows is None else shared_words(words, piece.parameter, piece.rows)
            for (name, words), piece in zip(self._words.items(), self._pieces.values(), strict=True)
        }

    def _zeros(self, shape: Sequence[int]) -> Tensor:
        if self._mapped is None:
            assert self._storage is not None
            self._mapped = self._storage()
        return self._mapped.zeros(shape)

    def _release(self) -> None:
        if self._mapped is not None:
            self._mapped.release()

    def _blocks(self, name: str) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield some rows of words at a time, as a view, and their bits."""
        width = self._width(name)
        if self._words[name].numel():
            for words in self._rows(name).split(max(_BLOCK // max(width, 1), 1)):
                yield words, unpack_bits(words, width)

    def _width(self, name: str) -> int:
        """Return the elements of a row of the words."""
        shape = self._pieces[name].shape
        return shape[-1] if shape else 1

    def _rows(self, name: str) -> Tensor:
        """Return the words of a parameter that has elements, as a view [rows, words of a row]."""
        return self._words[name].view(-1, num_words(self._width(name)))
