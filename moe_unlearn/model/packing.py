"""Lets rows of a batch share the rows of a model's call, where the batch says that they may (its key `packing`).

Only the call has other rows: those of the batch end to end, each with positions that begin at 0, and no attention mask.
From this transformers keeps attention within each of them; `data.check_packing` finds out whether a model does. What
the call returns is put back in the places of the batch [B, S]. Everything else works on the rows of the batch: losses,
sums over sequences, token weights, caches. Its numbers are those of calls with these rows, up to the rounding of sums.

The rows of a call are chosen from the lengths alone: the narrowest of which at most 1/32 is padding, or else those with
the least padding. Attention costs time by the width of a row, all else by the number of tokens, padding included.

Deterministic. Source: our specification; the form of a packed call is that of transformers'
`DataCollatorWithFlattening`.
"""

import contextlib
import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moe_unlearn.model.batches import Batch, attended_mask, inputs

_FEW = 1 / 32  # share of padding for which rows need not be wider
_ATTRIBUTE = "_moe_unlearn_call"


@dataclass(frozen=True)
class Call:
    """Where the tokens of a batch [B, S] stand in a model's call [R, W].

    `place` [B, S] is each attended token's place among the R * W of the call, and `source` [R * W] is the place in the
    batch of what stands there, -1 for padding; both are int64, and None where the call has the rows of the batch.
    """

    attended: Tensor  # bool [B, S]
    shape: torch.Size  # [R, W]
    place: Tensor | None = None
    source: Tensor | None = None

    def tokens(self, values: Tensor, padding: int) -> Tensor:
        """Return the values [B, S] of a batch's tokens as the call has them, [R * W], with `padding` for its own."""
        flat = values.flatten()
        return flat if self.source is None else torch.where(self.source < 0, padding, flat[self.source.clamp_min(0)])

    def rows(self, values: Tensor) -> Tensor:
        """Return what the call gave for its tokens, [R * W, ...], for those of the batch, [B, S, ...].

        Where the call has other rows than the batch, padding gets 0, without a gradient.
        """
        shape, rest = self.attended.shape, values.shape[1:]
        if self.place is None:
            return values.view(*shape, *rest)
        away = ~self.attended.view(*shape, *[1] * len(rest))
        return values[self.place.flatten()].view(*shape, *rest).masked_fill(away, 0)

    def order(self) -> Tensor:
        """Return the places in the call of the attended tokens, in the order of the batch: int64 [n]."""
        return self.attended.flatten().nonzero().flatten() if self.place is None else self.place[self.attended]

    def arguments(self, batch: Batch) -> Batch:
        """Return the arguments with which the model is called for the batch."""
        if self.source is None:
            return inputs(batch)
        _, columns = _columns(self.attended)
        positions = self.tokens(columns, -1).view(self.shape)
        # padding, at the end of a row, is an example by itself
        behind = torch.arange(self.shape[1], device=positions.device) - (positions >= 0).sum(1, keepdim=True)
        return {
            "input_ids": self.tokens(batch["input_ids"], 0).view(self.shape),
            "position_ids": torch.where(positions < 0, behind, positions),
        }

    @contextlib.contextmanager
    def shown(self, decoder: nn.Module) -> Iterator[None]:
        """Let the hooks of a decoder that is called inside find this call (`call_in`)."""
        decoder.__dict__[_ATTRIBUTE] = self
        try:
            yield
        finally:
            del decoder.__dict__[_ATTRIBUTE]


def call_in(decoder: nn.Module) -> Call:
    """Return the call that a decoder is in."""
    shown: Any = decoder.__dict__[_ATTRIBUTE]
    call: Call = shown
    return call


def call_of(batch: Batch) -> Call:
    """Return the call of a padded batch, in which its rows share rows if it says that they may.

    A batch with positions of its own, with a gap in the attention mask, or with a row without tokens, has a call of its
    own rows. A batch on a GPU is read once.
    """
    attended = attended_mask(batch)
    own = Call(attended, attended.shape)
    if "packing" not in batch or "position_ids" in batch:
        return own
    counts, columns = _columns(attended)
    spans = torch.where(attended, columns, -1).amax(1) + 1
    lengths, reached, limits = torch.stack([counts, spans, batch["packing"].long()]).tolist()
    if lengths != reached or not all(lengths):
        return own
    shared = share_rows(lengths, min(limits))
    width = max(sum(lengths[i] for i in row) for row in shared)
    begins = [0] * len(lengths)
    for number, row in enumerate(shared):
        begin = number * width
        for i in row:
            begins[i] = begin
            begin += lengths[i]
    place = torch.where(attended, torch.tensor(begins, device=attended.device)[:, None] + columns, 0)
    size = len(shared) * width
    source = torch.full((size + 1,), -1, device=attended.device)  # what stands nowhere goes behind the end
    stands = torch.where(attended, place, size).flatten()
    source.scatter_(0, stands, torch.arange(attended.numel(), device=attended.device))
    return Call(attended, torch.Size((len(shared), width)), place, source[:size])


def share_rows(lengths: Sequence[int], limit: int) -> list[list[int]]:
    """Choose which rows of these lengths share a row; return each as positions in `lengths`, in rising order.

    No shared row is longer than `limit` or, where that is more, than the longest row. See the module docstring.
    """
    limit, total = max(limit, *lengths), sum(lengths)
    longest_first = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    best, least = [[i] for i in range(len(lengths))], len(lengths) * max(lengths)
    for count in range(len(lengths), 0, -1):
        shared: list[list[int]] = [[] for _ in range(count)]
        filled = [(0, row) for row in range(count)]
        for i in longest_first:  # into the row with the fewest tokens, so that all are about as long
            tokens, row = filled[0]
            heapq.heapreplace(filled, (tokens + lengths[i], row))
            shared[row].append(i)
        width = max(filled)[0]
        if width > limit:
            break
        if count * width < least:
            best, least = shared, count * width
        if least - total <= _FEW * least:
            break
    return [sorted(row) for row in best]


def _columns(attended: Tensor) -> tuple[Tensor, Tensor]:
    """Return how many tokens each row attends to, [B], and each token's place counted from the first, [B, S]."""
    columns = torch.arange(attended.shape[1], device=attended.device) - attended.int().argmax(1)[:, None]
    return attended.sum(1), columns
