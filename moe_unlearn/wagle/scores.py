"""Scores of a group of pieces: their histogram, their mask and their magnitudes, on one process and on ranks."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from moe_unlearn.masks.shards import shared_words
from moe_unlearn.ops.weight_score import BINS, FIRST_NON_FINITE_BIN, score_histogram, score_mask
from moe_unlearn.sharding import complete_
from moe_unlearn.wagle.gradients import Gradients
from moe_unlearn.wagle.magnitudes import BLOCK, EXPONENTS, sums_by_exponent
from moe_unlearn.wagle.pieces import Piece

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

    def items(self) -> Iterator[tuple[Piece, Terms]]:
        """Yield each piece with the terms of its scores."""
        for piece in self.pieces:
            zero = torch.zeros((), dtype=torch.float32, device=piece.own.device).expand(piece.shape)
            if piece in self.forget:
                g_f, g_r = (side[piece].view(piece.shape) if piece in side else zero for side in self.sides)
                yield piece, Terms(piece.values(), g_f, g_r)
            else:
                yield piece, Terms(zero, zero, zero)

    def release(self) -> None:
        """Drop the gradients, whose memory the next group needs, whoever still holds these scores."""
        self.forget.clear()
        self.retain.clear()

    @property
    def sides(self) -> tuple[Gradients, Gradients]:
        """Return the gradients of both sides."""
        return self.forget, self.retain

    def histogram(self, digit: int, prefix: int = 0) -> Tensor:
        """Compute the histogram of the group's scores, int64 [65536] on the CPU.

        Raises ValueError for a score that is not finite.
        """
        total = torch.zeros(BINS, dtype=torch.int64)
        for piece, terms in self.items():
            counts = score_histogram(*terms, gamma=self.gamma, digit=digit, prefix=prefix).cpu()
            if digit == 0:
                self._check_finite(piece, int(counts[FIRST_NON_FINITE_BIN:].sum()))
            total = total + counts
        return total

    def mask(self, piece: Piece, terms: Terms, threshold: int, ties: int) -> tuple[Tensor, int]:
        """Return the packed mask of a piece, and how many of `ties` scores equal to the threshold it takes."""
        words, taken = score_mask(*terms, gamma=self.gamma, threshold_bits=threshold, ties=ties)
        return words, int(taken)

    def magnitudes(self) -> Tensor:
        """Compute the sums of |theta g_f| and of |g_r g_f|, by exponent: int64 [2, 256] on the CPU."""
        total = torch.zeros(2, EXPONENTS, dtype=torch.int64)
        for _, terms in self.items():
            total += self._magnitudes(terms)
        return total

    def _magnitudes(self, terms: Terms) -> Tensor:
        total = torch.zeros(2, EXPONENTS, dtype=torch.int64)
        for weight, g_f, g_r in zip(*(term.reshape(-1).split(BLOCK) for term in terms), strict=True):
            total += torch.stack([sums_by_exponent(weight.float() * g_f), sums_by_exponent(g_r * g_f)])
        return total

    def _check_finite(self, piece: Piece, bad: int) -> None:
        if bad:
            raise ValueError(
                f"the WAGLE score of {piece.name} is not finite in {bad} of {piece.parameter.numel()} places: its "
                "weights or gradients are not, or gamma is too small"
            )


class SharedScored(Scored):
    """The scores of this rank's rows; what is computed of them is of the whole model, the same on every rank."""

    def histogram(self, digit: int, prefix: int = 0) -> Tensor:
        counts, bad = torch.zeros(BINS, dtype=torch.int64), torch.zeros(len(self.pieces), dtype=torch.int64)
        by_place: dict[tuple, tuple[Tensor, Tensor]] = {}
        for i, (piece, terms) in enumerate(self.items()):
            own = score_histogram(*terms, gamma=self.gamma, digit=digit, prefix=prefix).cpu()
            total, own_bad = by_place.setdefault(self._place(piece), (counts.clone(), bad.clone()))
            total += own
            own_bad[i] = own[FIRST_NON_FINITE_BIN:].sum()
        for groups, (total, own_bad) in by_place.items():
            counts += complete_(total, groups)
            bad += complete_(own_bad, groups)
        if digit == 0:
            for piece, number in zip(self.pieces, bad.tolist(), strict=True):
                self._check_finite(piece, number)
        return counts

    def mask(self, piece: Piece, terms: Terms, threshold: int, ties: int) -> tuple[Tensor, int]:
        rows = piece.rows
        if rows is None:
            return super().mask(piece, terms, threshold, ties)
        # equal scores are taken in the order of the rows, those of the ranks that hold rows before these first
        equal = torch.zeros(len(rows.blocks), dtype=torch.int64)
        place = rows.blocks.index(rows.held) if rows.held else 0
        if rows.held:
            equal[place] = super().mask(piece, terms, threshold, _ALL_TIES)[1]
        complete_(equal, rows.reduced)
        words, _ = super().mask(piece, terms, threshold, max(ties - int(equal[:place].sum()), 0))
        return shared_words(words, piece.parameter, rows), min(ties, int(equal.sum()))

    def magnitudes(self) -> Tensor:
        by_place: dict[tuple, Tensor] = {}
        for piece, terms in self.items():
            found, place = self._magnitudes(terms), self._place(piece)
            by_place[place] = by_place[place] + found if place in by_place else found
        total = torch.zeros(2, EXPONENTS, dtype=torch.int64)
        for groups, found in by_place.items():
            total += complete_(found, groups)
        return total

    def _place(self, piece: Piece) -> tuple:
        """Return the groups of ranks over which sums of a piece are completed."""
        return () if piece.rows is None else piece.rows.reduced
