"""weight_score in Triton: tiles, spans and programs that count for themselves change no bit."""

import pytest
import torch

from moe_unlearn.triton_kernels import configs
from moe_unlearn.triton_kernels import weight_score as weight_score_kernels
from tests.ops.weight_score.cases import check, check_histograms, check_mask, histogram, terms, tied
from tests.support.impls import TRITON

pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")  # NaN and infinity are meant


@pytest.fixture
def small_spans(monkeypatch):
    """Two words a tile, five spans and three programs: a few dozen words cross every boundary there is."""
    monkeypatch.setattr(configs, "weight_score", lambda *_: configs.WeightScore(2, 4, 5))
    monkeypatch.setattr(configs, "score_bins", lambda device: configs.ScoreBins(2, 4, 3))


@pytest.mark.parametrize(
    "shape", [pytest.param((5, 70), marks=pytest.mark.quick), (2, 2, 100), (500,), (21, 3), (3, 7, 96)], ids=str
)
@pytest.mark.slow
def test_tiles_and_spans_change_no_bit(shape, small_spans):
    """Integers: many ties; the count cuts inside words, at tile and at span boundaries."""
    check(TRITON, tied(shape), gamma=1.0, all_ties=(0, 1, 33, 127, 10**12))


@pytest.mark.quick
@pytest.mark.parametrize("ties", [1, 31, 32, 33, 63, 64, 65, 127, 128, 129, 383, 384, 385, 899, 900, 901])
@pytest.mark.slow(but=3)
def test_ties_are_taken_in_flat_order(ties, small_spans):
    given = torch.ones(9, 100), torch.ones(9, 100), torch.zeros(9, 100)
    check_mask(TRITON, given, gamma=1.0, threshold=0x3F800000, ties=ties)


@pytest.mark.parametrize("value", [pytest.param(0.0, marks=pytest.mark.quick), -0.0, 1.5, 2.0**-140])
@pytest.mark.slow
def test_one_value_everywhere(value, small_spans):
    """All of the counts in one bin; zeros are summed before they are added."""
    given = torch.full((7, 90), value), torch.ones(7, 90), torch.zeros(7, 90)
    check(TRITON, given, gamma=1.0)
    high = histogram(TRITON, given, gamma=1.0, digit=0)
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
def test_where_a_program_counts_for_itself(shape, layout, arch, bins, monkeypatch):
    """Whole words side by side, where a block has 128 KB; the counts are the same either way."""
    monkeypatch.setenv("MOE_UNLEARN_TRITON_ARCH", str(arch))
    monkeypatch.setattr(weight_score_kernels, "_SHARED_BINS", True)
    chosen = configs.score_bins
    small = configs.ScoreBins(2, 4, 3)
    monkeypatch.setattr(configs, "score_bins", lambda device: chosen(device) and small)
    launches = Launches(weight_score_kernels._bins_kernel)
    monkeypatch.setattr(weight_score_kernels, "_bins_kernel", launches)
    given = terms(shape)
    # the low digit is counted without bins
    check_histograms(TRITON, given, layout, gamma=0.7)
    assert launches.count == bins
    monkeypatch.setattr(weight_score_kernels, "_SHARED_BINS", False)
    check_histograms(TRITON, given, layout, gamma=0.7)
    assert launches.count == bins
