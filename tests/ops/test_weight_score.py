"""weight_score: the same bits everywhere, and an exact threshold against a sort of the concatenated scores."""

import struct

import pytest
import torch
from torch.library import opcheck

from moe_unlearn.ops import score_histogram, score_mask, weight_score, weight_score_ref
from moe_unlearn.ops.bits import unpack_bits
from moe_unlearn.ops.weight_score import BINS, _score_histogram, _score_mask, _weight_score
from moe_unlearn.testing import LAYOUTS, in_layout, integers

pytestmark = pytest.mark.quick
SHAPES = [(3, 5, 7), (40,), (4, 64), (), (0, 3), (3, 0), (2, 33)]


def terms(shape, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return tuple((torch.randn(shape, generator=generator) * s).to(dtype) for s in (1.0, 0.3, 0.2))


def bits_of(score):
    return (score.float().view(torch.int32) & 0x7FFFFFFF).long()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_float32_in_this_order(dtype):
    """Each of the three operations rounded to float32, as a true division."""
    weight, g_f, g_r = terms((50,), dtype=dtype)
    gamma = 0.37
    got = weight_score(weight, g_f, g_r, gamma=gamma)

    def rounded(value):
        return struct.unpack("f", struct.pack("f", value))[0]

    for i in range(50):
        quotient = rounded(float(g_r[i]) / rounded(gamma))
        expected = rounded(rounded(float(weight[i]) - quotient) * float(g_f[i]))
        assert float(got[i]) == expected
    assert got.dtype == torch.float32


def test_mixed_dtypes_and_float64():
    weight, g_f, g_r = terms((9,))
    mixed = weight_score(weight.bfloat16(), g_f, g_r, gamma=2.0)
    assert torch.equal(mixed, weight_score(weight.bfloat16().float(), g_f, g_r, gamma=2.0))
    assert weight_score(weight.double(), g_f, g_r, gamma=2.0).dtype == torch.float64


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_histogram_counts_bit_patterns(shape):
    weight, g_f, g_r = terms(shape)
    bits = bits_of(weight_score_ref(weight, g_f, g_r, 0.7)).flatten()
    high = score_histogram(weight, g_f, g_r, gamma=0.7, digit=0)
    assert torch.equal(high, torch.bincount(bits >> 16, minlength=BINS)) and high.sum() == weight.numel()
    prefix = int(high.argmax())
    low = score_histogram(weight, g_f, g_r, gamma=0.7, digit=1, prefix=prefix)
    assert torch.equal(low, torch.bincount(bits[bits >> 16 == prefix] & 0xFFFF, minlength=BINS))
    assert low.sum() == high[prefix]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("ties", [0, 1, 3, 10**9])
def test_mask_takes_what_is_above_and_the_first_ties(shape, ties):
    weight, g_f, g_r = (integers(*shape, seed=s) for s in range(3))
    bits = bits_of(weight_score_ref(weight, g_f, g_r, 1.0)).flatten()
    threshold = int(bits.median()) if len(bits) else 5
    words, taken = score_mask(weight, g_f, g_r, gamma=1.0, threshold_bits=threshold, ties=ties)
    expected, left = [], ties
    for value in bits.tolist():
        expected.append(value > threshold or (value == threshold and left > 0))
        left -= value == threshold and left > 0
    kept = unpack_bits(words, shape[-1] if shape else 1).flatten()
    assert kept.tolist() == expected
    assert int(taken) == ties - left and taken.dtype == torch.int64


def test_blocks_give_the_same_bits(monkeypatch):
    import sys

    weight, g_f, g_r = (integers(30, 5, seed=s) for s in range(3))
    arguments = {"gamma": 1.0, "threshold_bits": 0x40000000, "ties": 7}
    whole, histogram = score_mask(weight, g_f, g_r, **arguments), score_histogram(weight, g_f, g_r, gamma=1.0, digit=0)
    monkeypatch.setattr(sys.modules["moe_unlearn.ops.weight_score"], "BLOCK", 11)
    blocks = score_mask(weight, g_f, g_r, **arguments)
    assert torch.equal(whole[0], blocks[0]) and int(whole[1]) == int(blocks[1]) > 0
    assert torch.equal(histogram, score_histogram(weight, g_f, g_r, gamma=1.0, digit=0))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_does_not_matter(layout):
    given = terms((6, 40))
    moved = [in_layout(t, layout) for t in given]
    assert torch.equal(weight_score(*moved, gamma=0.5), weight_score(*given, gamma=0.5))
    for digit in (0, 1):
        both = (score_histogram(*terms, gamma=0.5, digit=digit, prefix=0x3D00) for terms in (moved, given))
        assert torch.equal(*both)
    words = [score_mask(*t, gamma=0.5, threshold_bits=0x3D000000, ties=2)[0] for t in (moved, given)]
    assert torch.equal(*words)


def test_expanded_zeros_score_zero_and_fill_in_order():
    zero = torch.zeros(()).expand(3, 40)
    assert int(score_histogram(zero, zero, zero, gamma=1.0, digit=0)[0]) == 120
    words, taken = score_mask(zero, zero, zero, gamma=1.0, threshold_bits=0, ties=41)
    assert unpack_bits(words, 40).flatten().nonzero().flatten().tolist() == list(range(41)) and int(taken) == 41


def test_minus_zero_is_zero_and_what_is_not_finite_sorts_last():
    weight = torch.tensor([-0.0, 1.0, torch.nan, -torch.nan, torch.inf, -torch.inf])
    one = torch.ones(6)
    high = score_histogram(weight, one, torch.zeros(6), gamma=1.0, digit=0)
    assert int(high[0]) == 1 and int(high[0x7F80:].sum()) == 4


def test_opcheck_and_compile():
    given = terms((4, 33))
    moved = (given[0].t().contiguous().t(), *given[1:])
    opcheck(_weight_score, (*moved, 0.5, "ref"))
    opcheck(_score_histogram, (*moved, 0.5, 1, 0x3D00, "ref"))
    opcheck(_score_mask, (*moved, 0.5, 0x3D000000, 3, "ref"))

    def function(w, f, r):
        mask = score_mask(w, f, r, gamma=0.5, threshold_bits=0x3D000000, ties=3)
        return weight_score(w, f, r, gamma=0.5), score_histogram(w, f, r, gamma=0.5, digit=0), *mask

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")(*given)
    assert all(torch.equal(a, b) for a, b in zip(compiled, function(*given), strict=True))


@pytest.mark.parametrize("threads", [1, 2])
def test_bits_do_not_depend_on_the_number_of_threads(threads):
    given = terms((64, 512), seed=3)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        score = weight_score(*given, gamma=1e-3)
        histogram = score_histogram(*given, gamma=1e-3, digit=0)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(score, weight_score(*given, gamma=1e-3))
    assert torch.equal(histogram, torch.bincount(bits_of(score).flatten() >> 16, minlength=BINS))


@pytest.mark.parametrize(
    "change,error,message",
    [
        (dict(gamma=0.0), ValueError, "gamma must be in"),
        (dict(gamma=-1.0), ValueError, "gamma must be in"),
        (dict(gamma=1e-60), ValueError, "gamma must be in"),
        (dict(gamma=float("nan")), ValueError, "gamma must be in"),
        (dict(weight=torch.ones(2, 3).long()), TypeError, "weight must be floating point; got torch.int64"),
        (dict(grad_forget=torch.ones(3)), ValueError, r"grad_forget must be \[2, 3\]"),
        (dict(grad_retain=torch.ones(2, 4)), ValueError, r"grad_retain must be \[2, 3\].*\[2, 4\]"),
        (dict(ties=-1), ValueError, "ties not negative"),
        (dict(threshold_bits=1 << 31), ValueError, "threshold_bits must be in"),
    ],
)
def test_bad_input_is_named(change, error, message):
    ones = torch.ones(2, 3)
    good = {"weight": ones, "grad_forget": ones, "grad_retain": ones, "gamma": 1.0, "threshold_bits": 0, "ties": 0}
    with pytest.raises(error, match=message):
        score_mask(**{**good, **change})


def test_bad_digit():
    ones = torch.ones(3)
    with pytest.raises(ValueError, match="digit must be 0 or 1"):
        score_histogram(ones, ones, ones, gamma=1.0, digit=2)
