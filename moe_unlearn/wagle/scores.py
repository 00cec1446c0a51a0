"""Scores of a group of pieces: their histogram, their mask and their magnitudes, on one process and on ranks.

On ranks these are the scores of this rank's rows. Histograms and magnitudes are of the whole model, the same on every
rank; words are of this rank's rows.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from moe_unlearn.ops.exact_sums import EXPONENTS
from moe_unlearn.ops.weight_score import BINS, FIRST_NON_FINITE_BIN, score_histogram, score_magnitudes, score_mask
from moe_unlearn.wagle.gradients import Gradients
from moe_unlearn.wagle.pieces import Piece
from moe_unlearn.wagle.totals import Totals, allotted

_ALL_TIES = (1 << 62) - 1


class Terms(NamedTuple):
    """The three tensors of a piece's scores, in its shape."""

    weight: Tensor
    grad_forget: Tensor
    grad_retain: Tensor


class Scored:
    """The scores of a group of pieces; those without a forget gradient score exactly 0."""

    def __init__(self, pieces: Sequence[Piece], forget: Gradients, retain: Gradients, gamma: float) -> None:
        self.pieces, self.forget, self.retain, self.gamma = pieces, forget, retain, gamma
        #: the weights of samples, gathered once: kernels read what lies apart far slower
        self.sampled = {piece: piece.values().contiguous() for piece in pieces if piece.elements.step > 1}

    def items(self) -> Iterator[tuple[Piece, Terms]]:
        """Yield each piece with the terms of its scores."""
        for piece in self.pieces:
            zero = torch.zeros((), dtype=torch.float32, device=piece.own.device).expand(piece.shape)
            if piece in self.forget:
                sides = self.forget, self.retain
                g_f, g_r = (side[piece].view(piece.shape) if piece in side else zero for side in sides)
                yield piece, Terms(self.sampled[piece] if piece in self.sampled else piece.values(), g_f, g_r)
            else:
                yield piece, Terms(zero, zero, zero)

    def histogram(self, digit: int, prefix: int = 0) -> Tensor:
        """Compute the histogram of the group's scores, int64 [65536] on the CPU.

        Raises ValueError for a score that is not finite.
        """
        total, bad = Totals(BINS), Totals(len(self.pieces))
        for i, (piece, terms) in enumerate(self.items()):
            counts = score_histogram(*terms, gamma=self.gamma, digit=digit, prefix=prefix)
            total.add(piece, counts)
            own_bad = torch.zeros(len(self.pieces), dtype=torch.int64)
            own_bad[i] = counts[FIRST_NON_FINITE_BIN:].sum()
            bad.add(piece, own_bad)
        if digit == 0:
            for piece, number in zip(self.pieces, bad.complete().tolist(), strict=True):
                if number:
                    raise ValueError(
                        f"the WAGLE score of {piece.name} is not finite in {number} of {piece.parameter.numel()} "
                        "places: its weights or gradients are not, or gamma is too small"
                    )
        return total.complete()

    def mask(self, piece: Piece, terms: Terms, threshold: int, ties: int) -> tuple[Tensor, int]:
        """Return the packed mask of a piece, and how many of `ties` scores equal to the threshold all ranks take.

        Equal scores are taken in the order of the rows.
        """
        mask = partial(score_mask, *terms, gamma=self.gamma, threshold_bits=threshold)
        if piece.rows is None or ties == 0:
            words, taken = mask(ties=ties)
            return words, int(taken)
        own, of_all = allotted(piece, int(mask(ties=_ALL_TIES)[1]), ties)
        return mask(ties=own)[0], of_all

    def magnitudes(self) -> Tensor:
        """Compute the sums of |theta g_f| and of |g_r g_f|, by exponent: int64 [2, 256] on the CPU."""
        total = Totals(2, EXPONENTS)
        for piece, terms in self.items():
            total.add(piece, score_magnitudes(*terms))
        return total.complete()
