"""The exact threshold of the model's scores, and the mask above it, found in few rounds over the groups.

A bit pattern of |S| has 31 bits. A round over the groups counts them by one digit of 16 bits:

    1   the high digit             -> which one the threshold has
    2   the low digit, below it    -> the threshold, and how many scores equal to it are kept
    3   packs the mask

Where a round costs gradients, it also begins the mask: scores above an interval of bit patterns are kept, those below
it are not, and those inside are remembered, by place and bit pattern. Where the threshold turns out to lie inside, they
are resolved, and no further round is needed. The first round's interval is a guess from a sample of the scores, the
second one's is exact. A wrong guess, or more scores inside than there is room for, costs another round, and no bit.
"""

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from moe_unlearn.ops.weight_score import BINS, score_between
from moe_unlearn.wagle.magnitudes import EXPONENTS
from moe_unlearn.wagle.packed import Packed
from moe_unlearn.wagle.pieces import Piece
from moe_unlearn.wagle.scores import Scored

NOTHING = 0x7FFFFFFF  # a threshold that no finite score exceeds
ENTRY = 8  # bytes of a remembered score: its place and its bit pattern
_MARGIN = 4.0  # standard deviations of a sample's rank
_LIMIT = 0x7F800000  # the bit pattern of infinity


class Remembered(NamedTuple):
    """The scores of one piece that an interval leaves open."""

    piece: Piece
    places: Tensor  # flat, in the piece
    bits: Tensor  # int32


class Round:
    """Finds in one round over the groups counts by a digit and, with an interval, the mask but for what is open."""

    def __init__(self, digit: int, prefix: int, interval: range | None, room: int):
        self.digit, self.prefix, self.interval, self.room = digit, prefix, interval, room
        self.histogram = torch.zeros(BINS, dtype=torch.int64)
        self.packed = Packed()
        self.remembered: list[Remembered] = []
        self.above = self.inside = 0  # scores above the interval, and inside

    def see(self, scored: Scored) -> None:
        """Take the scores of the next group."""
        self.histogram += scored.histogram(self.digit, self.prefix)
        for piece, terms in scored.items():
            if self.interval is None:
                return
            low, high = self.interval.start, self.interval.stop
            self.packed.put(piece, scored.mask(piece, terms, high - 1, 0)[0])
            most = self.room // ENTRY - self.inside
            places, bits, above = score_between(*terms, gamma=scored.gamma, low=low, high=high, most=most)
            self.above, self.inside = self.above + above, self.inside + len(places)
            self.remembered.append(Remembered(piece, places, bits))
            if self.inside * ENTRY > self.room:
                self.interval, self.packed, self.remembered = None, Packed(), []

    def resolve(self, count: int, *, zeros_fill: bool) -> bool:
        """Finish the mask of the `count` largest scores from what is remembered; return whether that is possible."""
        open_ones = count - self.above
        if self.interval is None or open_ones < 0 or (open_ones > self.inside and self.interval.start > 1):
            return False
        zeros = max(open_ones - self.inside, 0)  # scores of exactly 0, since no other is left
        threshold, ties = self._inner_threshold(open_ones - zeros)
        for piece, places, bits in self.remembered:
            taken = bits > threshold
            equal = (bits == threshold).nonzero().squeeze(1)[:ties]
            taken[equal] = True
            ties -= len(equal)
            self.packed.set(piece, places[taken])
        if zeros_fill:
            self.packed.fill(zeros)
        return True

    def _inner_threshold(self, count: int) -> tuple[int, int]:
        """Find the bit pattern of the count-th largest remembered score, and how many equal to it are kept."""
        if count == 0:
            return NOTHING, 0
        high, above = _descend(_counts(bits >> 16 for _, _, bits in self.remembered), count)
        low_digits = (bits[bits >> 16 == high] & 0xFFFF for _, _, bits in self.remembered)
        low, above_low = _descend(_counts(low_digits), count - above)
        return (high << 16) | low, count - above - above_low


def find(
    groups: Callable[[], Iterator[Scored]], count: int, *, zeros_fill: bool, guess: range | None, room: int
) -> tuple[dict[str, Tensor], Tensor]:
    """Return the packed masks of the `count` largest scores, by name, and the sums of the scores' terms.

    `groups()` yields the scores of each group, in order; each call is a round. Equal scores are kept in their order,
    scores of exactly 0 only with `zeros_fill`. `guess` is the interval of the first round, which remembers scores in up
    to `room` bytes; 0 where rounds cost nothing.
    """
    magnitudes = torch.zeros(2, EXPONENTS, dtype=torch.int64)
    found = Round(0, 0, guess, room)
    for scored in groups():
        found.see(scored)
        magnitudes += scored.magnitudes()
    if found.resolve(count, zeros_fill=zeros_fill):
        return found.packed.words, magnitudes
    threshold, ties = NOTHING, 0
    if count > 0:
        high, above = _descend(found.histogram, count)
        fits = 0 < int(found.histogram[high]) * ENTRY <= room
        found = Round(1, high, range(max(high << 16, 1), (high + 1) << 16) if fits else None, room)
        for scored in groups():
            found.see(scored)
        if found.resolve(count, zeros_fill=zeros_fill):
            return found.packed.words, magnitudes
        low, above_low = _descend(found.histogram, count - above)
        threshold, ties = (high << 16) | low, count - above - above_low
        if threshold == 0 and not zeros_fill:
            ties = 0
    packed = Packed()
    for scored in groups():
        for piece, terms in scored.items():
            words, taken = scored.mask(piece, terms, threshold, ties)
            packed.put(piece, words)
            ties -= taken
    return packed.words, magnitudes


def guess_of(sample: Tensor, count: int, total: int) -> tuple[range, float]:
    """Guess in which interval the bit pattern of the count-th largest of `total` scores lies, and their share in it.

    `sample` has the bit patterns of some of the scores, int32 [n]. The interval is wrong for about one sample of ten
    thousand.
    """
    ordered, share = sample.sort(descending=True).values, count / total
    margin = _margin(len(sample), share)
    top, bottom = math.floor(share * len(sample) - margin), math.ceil(share * len(sample) + margin)
    high = int(ordered[top]) + 1 if top >= 0 else _LIMIT
    low = max(int(ordered[bottom]), 1) if bottom < len(sample) else 1
    high = max(high, low)
    inside = int(((sample >= low) & (sample < high)).sum())
    return range(low, high), inside / len(sample)


def open_share(sample: int, keep: float) -> float:
    """Return about which share of the scores the guess of a sample of this size leaves open."""
    return min(2 * _margin(sample, keep) / sample, 1.0)


def _margin(sample: int, share: float) -> float:
    """Return how far the rank of the threshold may be off in a sample."""
    return _MARGIN * math.sqrt(sample * share * (1 - share)) + 2


def _descend(histogram: Tensor, count: int) -> tuple[int, int]:
    """Find the bin that holds the count-th largest element, and the number of elements in higher bins."""
    from_top = histogram.flip(0).cumsum(0)
    position = int((from_top < count).sum())
    return len(histogram) - 1 - position, int(from_top[position] - histogram[len(histogram) - 1 - position])


def _counts(digits: Iterator[Tensor]) -> Tensor:
    """Count digits of 16 bits, int64 [65536] on the CPU."""
    total = torch.zeros(BINS, dtype=torch.int64)
    for some in digits:
        total += torch.bincount(some, minlength=BINS).cpu()
    return total
