"""weight_score in C++: score, histograms and mask have the bits of the reference, whatever runs them."""

import pytest
import torch

from moe_unlearn.ops import score_histogram, score_mask, weight_score, weight_score_ref
from moe_unlearn.testing import LAYOUTS, in_layout, integers, poison

pytestmark = pytest.mark.quick
F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
SHAPES = [(), (0, 3), (3, 0), (1,), (31,), (40,), (4, 64), (2, 33), (3, 5, 7), (2, 3, 4, 95)]


def terms(shape, dtypes=(F32, F32, F32), seed=0):
    generator = torch.Generator().manual_seed(seed)
    scales = zip(dtypes, (1.0, 0.3, 0.2), strict=True)
    return tuple((torch.randn(shape, generator=generator) * s).to(d) for d, s in scales)


def magnitudes(arguments, gamma):
    return weight_score_ref(*arguments, gamma).float().view(torch.int32).flatten() & 0x7FFFFFFF


def check(arguments, gamma=0.37, thresholds=None):
    """All three parts, with every number of ties that makes a difference."""
    with poison():
        score = weight_score(*arguments, gamma=gamma, impl="cpu")
    expected = weight_score_ref(*arguments, gamma)
    assert score.dtype == F32 and score.shape == expected.shape
    assert torch.equal(score.view(torch.int32), expected.view(torch.int32))

    bits = magnitudes(arguments, gamma)
    middle = int(bits.median()) if len(bits) else 7
    for digit, prefix in ((0, 0), (1, middle >> 16), (1, 0)):
        histograms = [
            score_histogram(*arguments, gamma=gamma, digit=digit, prefix=prefix, impl=i) for i in ("cpu", "ref")
        ]
        assert torch.equal(*histograms)

    for threshold in thresholds or (0, middle, 0x7F800000):
        equal = int((bits == threshold).sum())
        for ties in {0, 1, equal // 2, equal, equal + 3}:
            options = {"gamma": gamma, "threshold_bits": threshold, "ties": ties}
            with poison():
                words, taken = score_mask(*arguments, **options, impl="cpu")
            expected_words, expected_taken = score_mask(*arguments, **options, impl="ref")
            assert torch.equal(words, expected_words) and torch.equal(taken, expected_taken)
            assert words.dtype == torch.int32 and taken.dtype == torch.int64


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_same_bits_as_ref(shape, instruction_set):
    check(terms(shape))
    check(tuple(integers(*shape, seed=s) for s in range(3)), gamma=1.0)


@pytest.mark.parametrize("dtypes", [(BF16,) * 3, (F16,) * 3, (BF16, F32, F16), (F32, BF16, F64)], ids=str)
def test_every_dtype(dtypes, instruction_set):
    check(terms((3, 70), dtypes))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_memory_layout(layout):
    check(tuple(in_layout(t, layout) for t in terms((3, 4, 41))))


def test_nan_infinity_and_denormals():
    weight, grad_forget, grad_retain = terms((4, 40))
    weight[0, 0], weight[1, 1], grad_forget[2, 2], grad_retain[3, 3] = torch.nan, torch.inf, -torch.inf, 1e-42
    weight[3], grad_forget[3] = 1e-39, 1.0
    arguments = weight, grad_forget, grad_retain
    assert torch.equal(*(score_histogram(*arguments, gamma=1e-30, digit=0, impl=impl) for impl in ("cpu", "ref")))
    for threshold in (0, 0x7F7FFFFF, 0x7F800000):
        options = {"gamma": 0.5, "threshold_bits": threshold, "ties": 2}
        assert torch.equal(*(score_mask(*arguments, **options, impl=impl)[0] for impl in ("cpu", "ref")))


def test_same_bits_for_any_number_of_threads_with_ties_in_every_block(threads):
    """More than two of the blocks between which ties are counted, of 4096 words each."""
    arguments = tuple(integers(300, 1000, seed=s, low=-2, high=2) for s in range(3))
    bits = magnitudes(arguments, 1.0)
    threshold = int(bits.median())
    equal = int((bits == threshold).sum())
    assert equal > 3 * 4096
    for ties in (5, equal // 2, equal - 1):
        options = {"gamma": 1.0, "threshold_bits": threshold, "ties": ties}
        results = [score_mask(*arguments, **options, impl=impl) for impl in ("cpu", "ref")]
        assert torch.equal(results[0][0], results[1][0]) and int(results[0][1]) == int(results[1][1]) == ties
    histograms = [score_histogram(*arguments, gamma=1.0, digit=0, impl=impl) for impl in ("cpu", "ref")]
    assert torch.equal(*histograms)


def test_poisoned_padding_is_not_counted():
    """Rows of a larger tensor whose rest is NaN: elements beyond a row belong to nobody."""
    arguments = tuple(in_layout(t, "sliced") for t in terms((5, 33)))
    histogram = score_histogram(*arguments, gamma=1.0, digit=0, impl="cpu")
    assert histogram.sum() == 5 * 33 and not histogram[0x7F80:].any()
