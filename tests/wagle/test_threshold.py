"""The mask that rounds over groups find, against a stable sort: ties, zeros, right and wrong guesses, little room."""

import pytest
import torch
from torch import nn

from moe_unlearn.ops.bits import unpack_bits
from moe_unlearn.wagle.pieces import Piece
from moe_unlearn.wagle.scores import Scored
from moe_unlearn.wagle.threshold import find

pytestmark = pytest.mark.quick
EVERYTHING = range(1, 0x7F800000)
ONE, TWO = 0x3F800000, 0x40000000  # the bit patterns of 1.0 and 2.0


def cases():
    """Scores that are small integers, zeros among them, as pieces of two parameters and their gradients."""
    generator = torch.Generator().manual_seed(0)
    scores = [torch.randint(-3, 4, shape, generator=generator).float() for shape in ((4, 37), (45,))]
    first, second = (nn.Parameter(torch.ones_like(s)) for s in scores)
    groups = [
        [Piece("first", first, range(0, 74))],
        [Piece("first", first, range(74, 148)), Piece("second", second, range(0, 45))],
    ]
    flat = {"first": scores[0].flatten(), "second": scores[1]}
    made = [Scored(g, {p: flat[p.name][p.elements.start : p.elements.stop] for p in g}, {}, 1.0) for g in groups]
    return made, torch.cat(list(flat.values())).abs()


@pytest.mark.parametrize("zeros_fill", [False, True])
@pytest.mark.parametrize(
    ("guess", "room", "most"),
    [
        (None, 0, 3),
        (None, 10_000, 2),
        (EVERYTHING, 10_000, 1),
        (range(ONE, TWO + 1), 10_000, 2),
        (EVERYTHING, 80, 3),  # overflows
        (range(7, 8), 10_000, 2),  # wrong
    ],
)
def test_every_count_against_a_stable_sort(guess, room, most, zeros_fill):
    made, scores = cases()
    rounds = []

    def groups(look):
        rounds.append(None)
        return ((scored.pieces, look(scored)) for scored in made)

    rank = scores.argsort(descending=True, stable=True).argsort()
    for count in range(len(scores) + 1):
        rounds.clear()
        words, _ = find(groups, count, zeros_fill=zeros_fill, guess=guess, room=room)
        kept = torch.cat([unpack_bits(words["first"], 37).flatten(), unpack_bits(words["second"], 45)])
        assert torch.equal(kept, (rank < count) & ((scores > 0) | zeros_fill)), count
        assert len(rounds) <= most or (zeros_fill and count > int((scores > 0).sum()))
