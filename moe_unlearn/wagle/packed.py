"""The words of a mask while it is made, piece by piece; layout as `ops.bits` says."""

import torch
from torch import Tensor

from moe_unlearn.ops.bits import WORD_BITS, num_words, pack_bits, unpack_bits
from moe_unlearn.wagle.pieces import Piece

_BLOCK = 1 << 17  # elements at a time


class Packed:
    """The packed masks of parameters by name, in the order in which their pieces came."""

    def __init__(self) -> None:
        self.words: dict[str, Tensor] = {}
        self._widths: dict[str, int] = {}

    def put(self, piece: Piece, words: Tensor) -> None:
        """Put the words of a piece into those of its parameter; where ranks share it, they are all of these."""
        self._widths[piece.name] = piece.width
        if piece.whole or piece.rows is not None:
            self.words[piece.name] = words
            return
        if piece.name not in self.words:
            shape = piece.own.shape
            self.words[piece.name] = words.new_zeros(*shape[:-1], num_words(shape[-1]))
        rows, start = words.view(-1, words.shape[-1]), piece.elements.start // piece.width
        self._rows(piece.name)[start : start + len(rows)] = rows

    def set(self, piece: Piece, index: Tensor) -> None:
        """Set bits of a piece that are not set, those of its flat elements `index`."""
        if not len(index):
            return
        width = self._widths[piece.name]
        bit = torch.tensor([*(1 << i for i in range(WORD_BITS - 1)), -(1 << (WORD_BITS - 1))], dtype=torch.int32)
        bit = bit.to(index.device)
        for some in index.split(_BLOCK):
            at = some.long() + piece.elements.start
            row, column = at // width, at % width
            place = row * num_words(width) + column // WORD_BITS
            # bits of one word add up to the word
            self._rows(piece.name).view(-1).index_add_(0, place, bit[column % WORD_BITS])

    def fill(self, count: int) -> None:
        """Set the first `count` bits that are not set."""
        for name, width in self._widths.items():
            rows = self._rows(name) if self.words[name].numel() else self.words[name]
            for block in rows.split(max(_BLOCK // max(width, 1), 1)):
                if count == 0 or not block.numel():
                    break
                kept = unpack_bits(block, width)
                rank = (~kept).flatten().cumsum(0).view_as(kept)
                filled = kept | (rank <= count)
                block.copy_(pack_bits(filled))
                count -= int((filled & ~kept).sum())

    def _rows(self, name: str) -> Tensor:
        """Return the words of a parameter that has elements, as a view [rows, words of a row]."""
        return self.words[name].view(-1, num_words(self._widths[name]))
