"""Cuts packed masks into the parts that ranks hold, and puts them together; see `sharding` and `ops.bits`.

The words of a matrix are shared out as the matrix is, in a DTensor. Those of a vector run along the dimension that is
cut, so that all ranks have them whole.
"""

import torch
from torch import Tensor

from moe_unlearn.ops.bits import pack_bits, unpack_bits
from moe_unlearn.sharding import Rows, complete_, first_row, is_sharded, like, part


def held_words(words: Tensor, parameter: Tensor) -> Tensor:
    """Return what this rank holds of the packed mask of a parameter, whole or shared out, on the parameter's device."""
    if is_sharded(words) or not is_sharded(parameter):
        return part(words).to(parameter.device)
    start = first_row(parameter)
    return own_words(words, range(start, start + len(part(parameter))), len(parameter)).to(parameter.device)


def shared_out(words: Tensor, parameter: Tensor) -> Tensor:
    """Return the packed mask of a parameter shared out as that is; words of a vector stay as they are."""
    if words.dim() < 2 or is_sharded(words) or not is_sharded(parameter):
        return words
    return like(parameter, held_words(words, parameter))


def own_words(words: Tensor, held: range, count: int) -> Tensor:
    """Return the packed mask of the rows `held` of a parameter with `count` rows; fewer are in memory of their own."""
    if len(held) == count:
        return words
    rows = slice(held.start, held.stop)
    # a view would keep the words of all rows alive
    return words[rows].clone() if words.dim() > 1 else pack_bits(unpack_bits(words, count)[rows])


def shared_words(own: Tensor, parameter: Tensor, rows: Rows) -> Tensor:
    """Return the packed mask of a parameter from that of the rows that each rank has; every rank has to call this.

    It is shared out as the parameter is, whole if that is whole.
    """
    if own.dim() > 1 and is_sharded(parameter):
        return like(parameter, own)
    if not parameter.numel():
        return own
    held = slice(rows.held.start, rows.held.stop)
    if own.dim() > 1:
        words = own.new_zeros(len(parameter), *own.shape[1:])
        words[held] = own
        return complete_(words, rows.reduced)
    bits = torch.zeros(parameter.numel(), dtype=torch.uint8, device=own.device)
    bits[held] = unpack_bits(own, len(rows.held)).to(torch.uint8)
    return pack_bits(complete_(bits, rows.reduced).bool())


def slices_anywhere(own: Tensor, parameter: Tensor, rows: Rows) -> Tensor | None:
    """Return the slices of a sharded parameter with a set bit on any rank, ascending int64, from each rank's words.

    None are all slices, and those of a vector. Every rank has to call this.
    """
    if own.dim() < 2:
        return None
    trained = torch.zeros(len(parameter), dtype=torch.uint8, device=own.device)
    trained[rows.held.start : rows.held.stop] = own.flatten(1).ne(0).any(1)
    found = complete_(trained, rows.reduced).bool()
    return None if found.all() else found.nonzero().squeeze(1)
