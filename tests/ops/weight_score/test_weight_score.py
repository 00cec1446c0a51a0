"""weight_score in every implementation: histograms and masks bit for bit, and an exact threshold against a sort."""

import struct
import sys

import pytest
import torch
from torch.library import opcheck

from moe_unlearn.ops import score_histogram, score_mask, weight_score_ref
from moe_unlearn.ops import weight_score as op
from moe_unlearn.ops.bits import unpack_bits
from moe_unlearn.ops.exact_sums import exact
from moe_unlearn.ops.weight_score import (
    FIRST_NON_FINITE_BIN,
    score_between,
    score_magnitudes,
)
from moe_unlearn.testing import LAYOUTS
from tests.ops.weight_score.cases import (
    BF16,
    DTYPES,
    F16,
    F32,
    F64,
    SHAPES,
    check,
    check_between,
    check_histograms,
    check_magnitudes,
    check_mask,
    denormals_and_infinities,
    histogram,
    mask,
    numbers,
    patterns,
    terms,
    tied,
)
from tests.support.covers import cover
from tests.support.impls import impls

pytestmark = [
    pytest.mark.quick,
    # Triton's interpreter computes with numpy: NaN and infinity are meant
    pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning"),
]
IMPLS = impls("weight_score")
BESIDE = ("ref", "cpu")  # of what is computed beside the mask, for which others take the reference


@pytest.mark.parametrize("ties", [False, True])
def test_histograms_and_masks_of_every_shape(ties, impl):
    for shape in SHAPES:
        check(impl, tied(shape) if ties else terms(shape), gamma=1.0 if ties else 0.37)


@cover(full=True, indirect=["impl"], impl=IMPLS, dtypes=DTYPES)
def test_every_dtype(dtypes, impl):
    check(impl, terms((3, 70), dtypes))
    check_histograms(impl, terms((2, 64), dtypes))


@cover(indirect=["impl"], impl=IMPLS, layout=LAYOUTS, shape=((40,), (6, 40), (3, 4, 41), (2, 3, 2, 35)))
def test_every_memory_layout(shape, layout, impl):
    given = terms(shape)
    check_histograms(impl, given, layout)
    check_mask(impl, given, layout, gamma=0.5, threshold=int(patterns(given, 0.5).median()), ties=1)


def test_terms_of_three_layouts(impl):
    given, gamma = terms((6, 40)), 0.5
    moved = [impl.moved(t, layout) for t, layout in zip(given, ("transposed", "strided", "sliced"), strict=True)]
    threshold = int(patterns(given, gamma).median())
    words, taken = score_mask(*moved, gamma=gamma, threshold_bits=threshold, ties=1, impl=impl.name)
    assert torch.equal(unpack_bits(words, 40).flatten().cpu(), patterns(given, gamma) >= threshold) and int(taken) == 1


def test_worked_example(impl):
    given = torch.tensor([1.0, 2.0]), torch.tensor([-1.0, 3.0]), torch.tensor([0.0, 1.0])
    assert weight_score_ref(*given, 1.0).tolist() == [-1.0, 3.0]
    high = histogram(impl, given, gamma=1.0, digit=0)
    assert high.nonzero().flatten().tolist() == [0x3F80, 0x4040]
    low = histogram(impl, given, gamma=1.0, digit=1, prefix=0x4040)
    assert int(low[0]) == int(low.sum()) == 1
    assert mask(impl, given, gamma=1.0, threshold_bits=0x40400000, ties=1)[0].tolist() == [2]


def test_nan_infinity_and_denormals(impl):
    given = denormals_and_infinities()
    for gamma in (1e-30, 0.5):
        check_histograms(impl, given, gamma=gamma)
    for threshold in (0, 0x7F7FFFFF, 0x7F800000):
        check_mask(impl, given, gamma=0.5, threshold=threshold, ties=2)


def test_minus_zero_is_zero_and_what_is_not_finite_sorts_last(impl):
    weight = torch.tensor([-0.0, 1e-42, -1e-45, 1.0, torch.nan, -torch.nan, torch.inf, -torch.inf, 3e38])
    given = weight, torch.ones(9), torch.zeros(9)
    check_histograms(impl, given, gamma=1.0)
    high = histogram(impl, given, gamma=1.0, digit=0)
    assert int(high[0]) == 3 and int(high[FIRST_NON_FINITE_BIN]) == 4


def test_poisoned_padding_is_not_counted(impl):
    """Rows of a larger tensor whose rest is NaN: elements beyond a row belong to nobody."""
    high = histogram(impl, terms((5, 33)), "sliced", gamma=1.0, digit=0)
    assert high.sum() == 5 * 33 and not high[FIRST_NON_FINITE_BIN]


def test_expanded_zeros_score_zero_and_fill_in_order(impl):
    zero = impl.moved(torch.zeros(())).expand(3, 40)
    assert int(score_histogram(zero, zero, zero, gamma=1.0, digit=0, impl=impl.name)[0]) == 120
    words, taken = score_mask(zero, zero, zero, gamma=1.0, threshold_bits=0, ties=41, impl=impl.name)
    assert unpack_bits(words, 40).flatten().nonzero().flatten().tolist() == list(range(41)) and int(taken) == 41


@cover(indirect=["impl"], impl=IMPLS, dtype=(F32, BF16, F16), keep=(1, 77, 500))
def test_the_threshold_of_a_whole_model_is_that_of_a_sort(keep, dtype, impl):
    """The largest `keep` of three tensors, found by histograms alone; bf16 terms without g_r tie often."""
    tensors = [terms(s, (dtype,) * 3, seed=i) for i, s in enumerate(((9, 40), (500,), (33,)))]
    tensors = [(w, f.sign(), torch.zeros_like(r)) for w, f, r in tensors]

    def largest(rank, **digit):
        counts = sum(histogram(impl, t, gamma=1.0, **digit) for t in tensors)
        above = counts.flip(0).cumsum(0).flip(0)
        found = int((above >= rank).nonzero().max())
        return found, rank - int(above[found] - counts[found])

    prefix, rank = largest(keep, digit=0)
    low, ties = largest(rank, digit=1, prefix=prefix)
    masks = []
    for t in tensors:
        words, taken = mask(impl, t, gamma=1.0, threshold_bits=prefix << 16 | low, ties=ties)
        ties -= taken
        masks.append(unpack_bits(words, t[0].shape[-1]).flatten())
    scores = torch.cat([patterns(t, 1.0) for t in tensors])
    expected = torch.zeros(len(scores), dtype=torch.bool)
    expected[scores.sort(descending=True, stable=True).indices[:keep]] = True
    assert torch.equal(torch.cat(masks), expected)


@pytest.mark.slow
def test_compiles_without_a_graph_break_and_runs_agree(impl):
    given = impl.moved(terms((4, 33)))

    def function(w, f, r):
        masked = score_mask(w, f, r, gamma=0.5, threshold_bits=0x3D000000, ties=3, impl=impl.name)
        return score_histogram(w, f, r, gamma=0.5, digit=0, impl=impl.name), *masked

    runs = [function(*given), function(*given)]
    runs.append(torch.compile(function, fullgraph=True, backend="aot_eager")(*given))
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(runs[0], run, strict=True))


# ---- The op and its reference ------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
def test_the_score_is_float32_in_this_order(dtype):
    """Each of the three operations rounded to float32, as a true division."""
    weight, g_f, g_r = terms((50,), (dtype,) * 3)
    gamma = 0.37
    got = weight_score_ref(weight, g_f, g_r, gamma)

    def rounded(value):
        return struct.unpack("f", struct.pack("f", value))[0]

    for i in range(50):
        quotient = rounded(float(g_r[i]) / rounded(gamma))
        expected = rounded(rounded(float(weight[i]) - quotient) * float(g_f[i]))
        assert float(got[i]) == expected
    assert got.dtype == F32


def test_scores_of_mixed_dtypes_and_float64():
    weight, g_f, g_r = terms((9,))
    mixed = weight_score_ref(weight.bfloat16(), g_f, g_r, 2.0)
    assert torch.equal(mixed, weight_score_ref(weight.bfloat16().float(), g_f, g_r, 2.0))
    assert weight_score_ref(weight.double(), g_f, g_r, 2.0).dtype == torch.float64


def test_blocks_of_the_reference_give_the_same_bits(monkeypatch):
    given = tied((30, 5))
    arguments = {"gamma": 1.0, "threshold_bits": 0x40000000, "ties": 7, "impl": "ref"}
    whole, high = score_mask(*given, **arguments), score_histogram(*given, gamma=1.0, digit=0, impl="ref")
    monkeypatch.setattr(sys.modules["moe_unlearn.ops.weight_score"], "BLOCK", 11)
    blocks = score_mask(*given, **arguments)
    assert torch.equal(whole[0], blocks[0]) and int(whole[1]) == int(blocks[1]) > 0
    assert torch.equal(high, score_histogram(*given, gamma=1.0, digit=0, impl="ref"))


def test_opcheck():
    given = terms((4, 33))
    moved = (given[0].t().contiguous().t(), *given[1:])
    opcheck(torch.ops.moe_unlearn.weight_score_histogram.default, (*moved, 0.5, 1, 0x3D00, "ref"))
    opcheck(torch.ops.moe_unlearn.weight_score_mask.default, (*moved, 0.5, 0x3D000000, 3, "ref"))


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


@cover(full=True, indirect=["impl"], impl=BESIDE, shape=SHAPES)
def test_scores_between_two_bit_patterns(shape, impl, monkeypatch):
    monkeypatch.setattr(op, "SMALL_BLOCK", 128)
    for given in (terms(shape), tied(shape), terms(shape, (BF16, F32, F32)), terms(shape, (F64, F32, F32))):
        check_between(impl, given)


@cover(indirect=["impl"], impl=BESIDE, layout=LAYOUTS)
def test_scores_between_and_magnitudes_of_every_memory_layout(layout, impl):
    for shape in ((40,), (3, 4, 41)):
        check_between(impl, terms(shape), layout)
        check_magnitudes(impl, terms(shape), layout)


@cover(full=True, indirect=["impl"], impl=BESIDE, dtypes=DTYPES)
def test_magnitudes_of_every_dtype(dtypes, impl):
    for shape in SHAPES:
        check_magnitudes(impl, terms(shape, dtypes))
    check_magnitudes(impl, numbers())


@cover(full=True, indirect=["impl"], impl=BESIDE)
def test_magnitudes_that_are_not_finite_are_infinite(impl):
    given = impl.moved((torch.tensor([torch.inf, 1.0]), torch.ones(2), torch.tensor([1.0, torch.nan])))
    assert [exact(row) for row in score_magnitudes(*given, impl=impl.name)] == [float("inf")] * 2


def test_scores_between_refuses_what_a_mask_refuses():
    with pytest.raises(ValueError, match="grad_retain must be"):
        score_between(torch.ones(3), torch.ones(3), torch.ones(2), gamma=1.0, low=0, high=1, most=3)
    with pytest.raises(ValueError, match="gamma must be in"):
        score_between(torch.ones(3), torch.ones(3), torch.ones(3), gamma=0.0, low=0, high=1, most=3)
    with pytest.raises(ValueError, match="low and high must be in order, and high in"):
        score_between(torch.ones(3), torch.ones(3), torch.ones(3), gamma=1.0, low=2, high=1, most=3)


@cover(full=True, indirect=["impl"], impl=BESIDE)
def test_a_search_of_scores_stops_where_it_has_found_too_many(impl):
    """Three blocks of either implementation, of which the first has enough."""
    given = terms((3, 1 << 17))
    bits = patterns(given, 1.0)
    _, index, found, _ = score_between(
        *impl.moved(given), gamma=1.0, low=0, high=(1 << 31) - 1, most=60, impl=impl.name
    )
    assert torch.equal(index.cpu(), torch.arange(1 << 17, dtype=torch.int32))
    assert torch.equal(found.cpu().long(), bits[: 1 << 17])
