"""Cuts packed masks into the parts that ranks hold, and puts them together; see `sharding` and `ops.bits`."""

import torch
from torch import Tensor

from moe_unlearn.ops.bits import pack_bits, unpack_bits
from moe_unlearn.sharding import Rows, complete_


def own_words(words: Tensor, rows: Rows, count: int) -> Tensor:
    """Return what this rank holds of the packed mask of a parameter with `count` rows."""
    held = slice(rows.held.start, rows.held.stop)
    # the words of a vector run along the dimension that is cut
    return words[held].contiguous() if words.dim() > 1 else pack_bits(unpack_bits(words, count)[held])


def joined_words(own: Tensor, rows: Rows, count: int) -> Tensor:
    """Return the packed mask of a parameter with `count` rows from what the ranks hold; every rank has to call this."""
    held = slice(rows.held.start, rows.held.stop)
    if own.dim() > 1:
        words = own.new_zeros(count, *own.shape[1:])
        words[held] = own
        return complete_(words, rows.reduced)
    bits = torch.zeros(count, dtype=torch.uint8, device=own.device)
    bits[held] = unpack_bits(own, len(rows.held)).to(torch.uint8)
    return pack_bits(complete_(bits, rows.reduced).bool())
