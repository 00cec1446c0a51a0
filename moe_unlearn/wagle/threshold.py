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
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from moe_unlearn.ops.exact_sums import EXPONENTS
from moe_unlearn.ops.weight_score import BINS, score_between
from moe_unlearn.wagle.mapped import MappedWords
from moe_unlearn.wagle.packed import Packed
from moe_unlearn.wagle.pieces import Piece
from moe_unlearn.wagle.scores import Scored
from moe_unlearn.wagle.totals import Totals, allotted, by_block

NOTHING = 0x7FFFFFFF  # a threshold that no finite score exceeds
ENTRY = 8  # bytes of a remembered score: its place and its bit pattern
_MARGIN = 4.0  # standard deviations of a sample's rank
_LIMIT = 0x7F800000  # the bit pattern of infinity

#: what a round finds in a group, by name, so that it can be kept in a file
Found = dict[str, Tensor]
#: goes with `look` over the scores of all groups, and yields the pieces of each with what was found
Rounds = Callable[[Callable[[Scored], Found]], Iterable[tuple[Sequence[Piece], Found]]]
#: makes memory for the words of a mask; None for that of the tensors that come
Storage = Callable[[], MappedWords] | None


class Remembered(NamedTuple):
    """The scores of one piece that an interval leaves open."""

    piece: Piece
    places: Tensor  # flat, in the piece
    bits: Tensor  # int32


class Counting:
    """Finds in one round over the groups counts by a digit and, with an interval, the mask but for what is open.

    Counts are of all ranks, places and words of this rank's rows. `room` is what each rank has.
    """

    def __init__(self, digit: int, prefix: int, interval: range | None, room: int, storage: Storage = None):
        self.digit, self.prefix, self.interval, self.room = digit, prefix, interval, room
        self.histogram = torch.zeros(BINS, dtype=torch.int64)
        self.magnitudes = torch.zeros(2, EXPONENTS, dtype=torch.int64)  # of the first digit's round alone
        self.packed = Packed(storage)
        self.remembered: list[Remembered] = []
        self.above = self.inside = 0  # scores above the interval, and inside
        self.used = 0  # the most scores inside that one rank may have

    def look(self, scored: Scored) -> Found:
        """Return what this round finds in the next group; without counts if what is open exceeds the room."""
        found = {"histogram": scored.histogram(self.digit, self.prefix)}
        if self.digit == 0:
            found["magnitudes"] = scored.magnitudes()
        if self.interval is None:
            return found
        low, high = self.interval.start, self.interval.stop
        open_ones: Found = {}
        above, inside, used = self.above, self.inside, self.used
        for i, (piece, terms) in enumerate(scored.items()):
            most = self.room // ENTRY - used
            words, places, bits, own_above = score_between(*terms, gamma=scored.gamma, low=low, high=high, most=most)
            all_above, all_inside = by_block(piece, own_above, len(places)).tolist()
            above, inside, used = above + sum(all_above), inside + sum(all_inside), used + max(all_inside, default=0)
            if used * ENTRY > self.room:
                return found
            open_ones |= {f"words {i}": words, f"places {i}": places, f"bits {i}": bits}
        return found | open_ones | {"counts": torch.tensor([above, inside, used])}

    def add(self, pieces: Sequence[Piece], found: Found) -> None:
        """Take what `look` found in the next group."""
        self.histogram += found.pop("histogram")  # not held while the next group is computed
        self.magnitudes += found.get("magnitudes", 0)
        if "counts" not in found:
            self.interval, self.packed, self.remembered = None, Packed(), []
            return
        self.above, self.inside, self.used = found["counts"].tolist()
        for i, piece in enumerate(pieces):
            self.packed.put(piece, found[f"words {i}"])
            self.remembered.append(Remembered(piece, found[f"places {i}"], found[f"bits {i}"]))

    def resolve(self, count: int, *, zeros_fill: bool) -> bool:
        """Finish the mask of the `count` largest scores from what is remembered; return whether that is possible."""
        open_ones = count - self.above
        if self.interval is None or open_ones < 0 or (open_ones > self.inside and self.interval.start > 1):
            return False
        zeros = max(open_ones - self.inside, 0)  # scores of exactly 0, since no other is left
        threshold, ties = self._inner_threshold(open_ones - zeros)
        for piece, places, bits in self.remembered:
            taken, equal = bits > threshold, (bits == threshold).nonzero().squeeze(1)
            own, of_all = allotted(piece, len(equal), ties)
            taken[equal[:own]] = True
            ties -= of_all
            self.packed.set(piece, places[taken])
        if zeros_fill:
            self.packed.fill(zeros)
        return True

    def _inner_threshold(self, count: int) -> tuple[int, int]:
        """Find the bit pattern of the count-th largest remembered score, and how many equal to it are kept."""
        if count == 0:
            return NOTHING, 0
        high, above = _descend(_counts((piece, bits >> 16) for piece, _, bits in self.remembered), count)
        low_digits = ((piece, bits[bits >> 16 == high] & 0xFFFF) for piece, _, bits in self.remembered)
        low, above_low = _descend(_counts(low_digits), count - above)
        return (high << 16) | low, count - above - above_low


class Packing:
    """Packs in one round over the groups the mask above a threshold, and the first `ties` scores equal to it."""

    def __init__(self, threshold: int, ties: int, storage: Storage = None):
        self.threshold, self.ties, self.packed = threshold, ties, Packed(storage)

    def look(self, scored: Scored) -> Found:
        """Return the words of the next group, and how many ties are left after it."""
        found, ties = {}, self.ties
        for i, (piece, terms) in enumerate(scored.items()):
            found[f"words {i}"], taken = scored.mask(piece, terms, self.threshold, ties)
            ties -= taken
        return found | {"ties": torch.tensor(ties)}

    def add(self, pieces: Sequence[Piece], found: Found) -> None:
        """Take what `look` found in the next group."""
        for i, piece in enumerate(pieces):
            self.packed.put(piece, found[f"words {i}"])
        self.ties = int(found["ties"])


def find(
    rounds: Rounds, count: int, *, zeros_fill: bool, guess: range | None, room: int, storage: Storage = None
) -> tuple[dict[str, Tensor], Tensor]:
    """Return the packed masks of the `count` largest scores, by name, and the sums of the scores' terms.

    Each call of `rounds` is a round, and calls `look` for one group after the other, in their order. Equal scores are
    kept in their order, scores of exactly 0 only with `zeros_fill`. `guess` is the interval of the first round, which
    remembers scores in up to `room` bytes; 0 where rounds cost nothing. `storage` makes the memory of a mask.
    """
    first = _gone_through(rounds, Counting(0, 0, guess, room, storage))
    if first.resolve(count, zeros_fill=zeros_fill):
        return first.packed.words(), first.magnitudes
    threshold, ties = NOTHING, 0
    if count > 0:
        high, above = _descend(first.histogram, count)
        fits = 0 < int(first.histogram[high]) * ENTRY <= room
        interval = range(max(high << 16, 1), (high + 1) << 16) if fits else None
        second = _gone_through(rounds, Counting(1, high, interval, room, storage))
        if second.resolve(count, zeros_fill=zeros_fill):
            return second.packed.words(), first.magnitudes
        low, above_low = _descend(second.histogram, count - above)
        threshold, ties = (high << 16) | low, count - above - above_low
        if threshold == 0 and not zeros_fill:
            ties = 0
    return _gone_through(rounds, Packing(threshold, ties, storage)).packed.words(), first.magnitudes


_Round = TypeVar("_Round", Counting, Packing)


def _gone_through(rounds: Rounds, one: _Round) -> _Round:
    for pieces, found in rounds(one.look):
        one.add(pieces, found)
    return one


def guess_of(histogram: Callable[[int, int], Tensor], share: float) -> tuple[range, float]:
    """Guess in which interval the bit pattern lies above which a `share` of all scores is, and their share in it.

    `histogram(digit, prefix)` is that of a sample of the scores. The interval is wrong for about one sample of ten
    thousand.
    """
    first = histogram(0, 0)
    sample = int(first.sum())
    margin = _margin(sample, share)
    kept: dict[int, Tensor] = {}

    def below(high: int) -> Tensor:
        """Return the histogram below a high digit; the last one is kept, since the next one asked for is often it."""
        if high not in kept:
            kept.clear()  # before there is another one
            kept[high] = histogram(1, high)
        return kept[high]

    def ranked(number: int) -> int:
        """Return the bit pattern of the score that so many are before, the largest first."""
        high, above = _descend(first, number + 1)
        return (high << 16) | _descend(below(high), number + 1 - above)[0]

    def from_on(bits: int) -> int:
        high, low = bits >> 16, bits & 0xFFFF
        return int(first[high + 1 :].sum() + below(high)[low:].sum())

    top, bottom = math.floor(share * sample - margin), math.ceil(share * sample + margin)
    high = ranked(top) + 1 if top >= 0 else _LIMIT
    beyond = from_on(high)
    low = max(ranked(bottom), 1) if bottom < sample else 1
    return range(low, high), (from_on(low) - beyond) / sample


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


def _counts(digits: Iterator[tuple[Piece, Tensor]]) -> Tensor:
    """Count digits of 16 bits over all ranks, int64 [65536] on the CPU."""
    total = Totals(BINS)
    for piece, some in digits:
        total.add(piece, torch.bincount(some, minlength=BINS))
    return total.complete()
