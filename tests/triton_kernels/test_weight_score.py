"""The Triton scores, histograms and masks are the reference's bit for bit, ties across tiles and spans included.

The reference runs on the CPU. Every comparison is exact, which leaves nothing for an accuracy criterion to say.
"""

import pytest
import torch

from moe_unlearn.ops import score_histogram, score_mask, weight_score, weight_score_ref
from moe_unlearn.ops.bits import unpack_bits
from moe_unlearn.ops.weight_score import BINS
from moe_unlearn.testing import LAYOUTS, in_layout, integers, poison
from moe_unlearn.triton_kernels import configs
from moe_unlearn.triton_kernels import weight_score as weight_score_kernels
from tests.ops.test_weight_score import SHAPES, bits_of, terms

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
FIRST_NON_FINITE_BIN = 0x7F80
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")  # NaN and infinity are meant


@pytest.fixture
def small_spans(monkeypatch):
    """Two words a tile, five spans and three programs: a few dozen words cross every boundary there is."""
    monkeypatch.setattr(configs, "weight_score", lambda *_: configs.WeightScore(2, 4, 5))
    monkeypatch.setattr(configs, "score_bins", lambda device: configs.ScoreBins(2, 4, 3))


def both(function, given, device, **options):
    """(reference, kernel) results as tuples on the CPU."""
    results = []
    for impl, where in (("ref", "cpu"), ("triton", device)):
        out = function(*(t.to(where) for t in given), **options, impl=impl)
        results.append([t.cpu() for t in (out if isinstance(out, tuple) else (out,))])
    return results


def assert_same(pair):
    for expected, actual in zip(*pair, strict=True):
        assert actual.dtype == expected.dtype and actual.shape == expected.shape and actual.is_contiguous()
        if expected.is_floating_point():
            expected, actual = expected.view(torch.int32), actual.view(torch.int32)
        assert torch.equal(actual, expected)


def check_everything(given, device, *, gamma=0.7, all_ties=(0, 1, 3, 10**12)):
    assert_same(both(weight_score, given, device, gamma=gamma))
    high = both(score_histogram, given, device, gamma=gamma, digit=0)
    assert_same(high)
    prefix = int(high[0][0].argmax())
    for value in (prefix, 0, 0x7FFF):
        assert_same(both(score_histogram, given, device, gamma=gamma, digit=1, prefix=value))
    bits = bits_of(weight_score_ref(*given, gamma)).flatten()
    for threshold in {int(bits.median()) if len(bits) else 5, 0}:
        for ties in all_ties:
            assert_same(both(score_mask, given, device, gamma=gamma, threshold_bits=threshold, ties=ties))


@pytest.mark.quick
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [*SHAPES, (2, 2, 3, 37), (1, 1), (3, 1)], ids=str)
@pytest.mark.slow(but=3)
def test_every_shape_and_dtype(shape, dtype, device):
    with poison():
        check_everything(terms(shape, dtype=dtype), device)


@pytest.mark.quick
def test_mixed_dtypes(device):
    w, f, r = terms((5, 40))
    check_everything((w.bfloat16(), f, r.half()), device)


@pytest.mark.quick
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(6, 40), (3, 4, 33), (2, 3, 2, 35), (40,)], ids=str)
@pytest.mark.slow(but=6)
def test_every_layout(shape, layout, device):
    others = iter(("transposed", "strided", "sliced"))
    given = terms(shape)
    moved = [in_layout(given[0], layout), in_layout(given[1], next(others)), in_layout(given[2], next(others))]
    for function, options in (
        (weight_score, {}),
        (score_histogram, {"digit": 0}),
        (score_histogram, {"digit": 1, "prefix": 0x3D00}),
        (score_mask, {"threshold_bits": 0x3D000000, "ties": 2}),
    ):
        expected = both(function, given, device, gamma=0.5, **options)[0]
        out = function(*(t.to(device) for t in moved), gamma=0.5, impl="triton", **options)
        assert_same((expected, [t.cpu() for t in (out if isinstance(out, tuple) else (out,))]))


@pytest.mark.parametrize(
    "shape", [pytest.param((5, 70), marks=pytest.mark.quick), (2, 2, 100), (500,), (21, 3), (3, 7, 96)], ids=str
)
@pytest.mark.slow
def test_tiles_and_spans_change_no_bit(shape, small_spans, device):
    """Integers: many ties; the count cuts inside words, at tile and at span boundaries."""
    given = tuple(integers(*shape, seed=s) for s in range(3))
    check_everything(given, device, gamma=1.0, all_ties=(0, 1, 33, 127, 10**12))


@pytest.mark.quick
@pytest.mark.parametrize("ties", [1, 31, 32, 33, 63, 64, 65, 127, 128, 129, 383, 384, 385, 899, 900, 901])
@pytest.mark.slow(but=3)
def test_ties_are_taken_in_flat_order(ties, small_spans, device):
    given = [torch.ones(9, 100, device=device)] * 2 + [torch.zeros((), device=device).expand(9, 100)]
    words, taken = score_mask(*given, gamma=1.0, threshold_bits=0x3F800000, ties=ties, impl="triton")
    kept = unpack_bits(words, 100).flatten().cpu()
    assert kept.nonzero().flatten().tolist() == list(range(min(ties, 900)))
    assert int(taken) == min(ties, 900)


@pytest.mark.parametrize("value", [pytest.param(0.0, marks=pytest.mark.quick), -0.0, 1.5, 2.0**-140])
@pytest.mark.slow
def test_one_value_everywhere(value, small_spans, device):
    """All of the counts in one bin; zeros are summed before they are added."""
    given = [torch.full((7, 90), value), torch.ones(7, 90), torch.zeros(7, 90)]
    check_everything(given, device, gamma=1.0)
    high = score_histogram(*(t.to(device) for t in given), gamma=1.0, digit=0, impl="triton")
    assert int(high.max()) == 630 and int(high.sum()) == 630


class Launches:
    """A kernel that counts its launches."""

    def __init__(self, kernel):
        self.kernel, self.count = kernel, 0

    def __getitem__(self, grid):
        self.count += 1
        return self.kernel[grid]


@pytest.mark.quick
@pytest.mark.parametrize(
    "shape,layout,arch,bins",
    [
        ((3, 5, 64), "contiguous", 90, True),
        ((1, 32), "sliced", 80, True),
        ((7, 96), "contiguous", 87, True),
        ((3, 5, 64), "contiguous", 120, False),
        ((5, 64), "contiguous", 89, False),
        ((5, 64), "strided", 90, False),
        ((5, 40), "contiguous", 90, False),
    ],
)
def test_where_a_program_counts_for_itself(shape, layout, arch, bins, device, monkeypatch):
    """Whole words side by side, where a block has 128 KB; the counts are the same either way."""
    monkeypatch.setenv("MOE_UNLEARN_TRITON_ARCH", str(arch))
    monkeypatch.setattr(weight_score_kernels, "_SHARED_BINS", True)
    chosen = configs.score_bins
    small = configs.ScoreBins(2, 4, 3)
    monkeypatch.setattr(configs, "score_bins", lambda device: chosen(device) and small)
    launches = Launches(weight_score_kernels._bins_kernel)
    monkeypatch.setattr(weight_score_kernels, "_bins_kernel", launches)
    given = [in_layout(t, layout) for t in terms(shape)]
    assert_same(both(score_histogram, given, device, gamma=0.7, digit=0))
    assert launches.count == bins
    assert_same(both(score_histogram, given, device, gamma=0.7, digit=1, prefix=0x3E00))
    assert launches.count == bins
    monkeypatch.setattr(weight_score_kernels, "_SHARED_BINS", False)
    assert_same(both(score_histogram, given, device, gamma=0.7, digit=0))
    assert launches.count == bins


@pytest.mark.quick
def test_denormals_and_what_is_not_finite(device):
    weight = torch.tensor([-0.0, 1e-42, -1e-45, torch.nan, -torch.nan, torch.inf, -torch.inf, 3e38, 1.0]).repeat(5)
    given = (weight, torch.full((45,), 0.5), torch.full((45,), 1e-44))
    expected, (high,) = both(score_histogram, given, device, gamma=0.7, digit=0)
    # a GPU writes NaN with other bits; the bins from the first one that is not finite count as one
    assert torch.equal(high[:FIRST_NON_FINITE_BIN], expected[0][:FIRST_NON_FINITE_BIN])
    assert int(high[FIRST_NON_FINITE_BIN:].sum()) == 20 and high.shape == (BINS,)
    scores, (actual,) = both(weight_score, given, device, gamma=0.7)
    assert torch.equal(actual.nan_to_num(nan=7.0), scores[0].nan_to_num(nan=7.0))
    assert_same(both(score_mask, given, device, gamma=0.7, threshold_bits=0x3F000000, ties=2))


@pytest.mark.quick
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("keep", [1, 77, 500])
def test_the_threshold_of_a_whole_model_is_that_of_a_sort(keep, dtype, device):
    """The largest `keep` of three tensors, found by histograms alone; bf16 terms without g_r tie often."""
    tensors = [
        tuple(t.to(device) for t in terms(s, seed=i, dtype=dtype)) for i, s in enumerate(((9, 40), (500,), (33,)))
    ]
    tensors = [(w, f.sign(), torch.zeros_like(r)) for w, f, r in tensors]

    def largest(counts, rank):
        above = counts.flip(0).cumsum(0).flip(0)
        digit = int((above >= rank).nonzero().max())
        return digit, rank - int(above[digit] - counts[digit])

    def histogram(**digit):
        return sum(score_histogram(*t, gamma=1.0, impl="triton", **digit) for t in tensors).cpu()

    prefix, rank = largest(histogram(digit=0), keep)
    low, ties = largest(histogram(digit=1, prefix=prefix), rank)
    masks = []
    for t in tensors:
        words, taken = score_mask(*t, gamma=1.0, threshold_bits=prefix << 16 | low, ties=ties, impl="triton")
        ties -= int(taken)
        masks.append(unpack_bits(words, t[0].shape[-1]).flatten().cpu())
    scores = torch.cat([bits_of(weight_score_ref(*(x.cpu() for x in t), 1.0)).flatten() for t in tensors])
    expected = torch.zeros(len(scores), dtype=torch.bool)
    expected[scores.sort(descending=True, stable=True).indices[:keep]] = True
    assert torch.equal(torch.cat(masks), expected)


@pytest.mark.quick
@pytest.mark.slow
def test_two_runs_give_the_same_bits(small_spans, device):
    given = [t.to(device) for t in terms((30, 70))]
    for function, options in ((score_histogram, {"digit": 0}), (score_mask, {"threshold_bits": 0x3D000000, "ties": 9})):
        first, second = (function(*given, gamma=0.3, impl="triton", **options) for _ in range(2))
        assert all(torch.equal(a, b) for a, b in zip(_tuple(first), _tuple(second), strict=True))


def _tuple(value):
    return value if isinstance(value, tuple) else (value,)


@pytest.mark.quick
def test_compiles_as_one_graph(device):
    given = [t.to(device) for t in terms((4, 33))]

    def function(w, f, r):
        mask = score_mask(w, f, r, gamma=0.5, threshold_bits=0x3D000000, ties=3, impl="triton")
        score = weight_score(w, f, r, gamma=0.5, impl="triton")
        return score, score_histogram(w, f, r, gamma=0.5, digit=0, impl="triton"), *mask

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")(*given)
    assert all(torch.equal(a, b) for a, b in zip(compiled, function(*given), strict=True))
