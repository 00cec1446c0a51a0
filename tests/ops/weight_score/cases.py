"""Cases of weight_score: terms, the bits of their scores, and the comparison that every implementation passes."""

from fractions import Fraction

import torch
from torch import Tensor

from moe_unlearn.ops import score_histogram, score_mask, weight_score_ref
from moe_unlearn.ops.bits import pack_bits
from moe_unlearn.ops.exact_sums import exact
from moe_unlearn.ops.weight_score import BINS, FIRST_NON_FINITE_BIN, score_between, score_magnitudes
from moe_unlearn.testing import integers, poison
from tests.support.impls import Impl

F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
SHAPES = ((), (0, 3), (3, 0), (1,), (31,), (40,), (4, 64), (2, 33), (3, 5, 7), (2, 3, 4, 95))
DTYPES = ((F32,) * 3, (BF16,) * 3, (F16,) * 3, (BF16, F32, F16), (F32, BF16, F64))

Terms = tuple[Tensor, Tensor, Tensor]


def terms(shape, dtypes=DTYPES[0], seed=0) -> Terms:
    """Return a weight and its forget and retain gradients."""
    generator = torch.Generator().manual_seed(seed)
    scales = zip(dtypes, (1.0, 0.3, 0.2), strict=True)
    return tuple((torch.randn(shape, generator=generator) * s).to(d) for d, s in scales)


def tied(shape, most=3) -> Terms:
    """Return terms that are small integers, so that many scores are equal with gamma 1."""
    return tuple(integers(*shape, seed=s, low=-most, high=most) for s in range(3))


def denormals_and_infinities() -> Terms:
    weight, grad_forget, grad_retain = terms((4, 40))
    weight[0, 0], weight[1, 1], grad_forget[2, 2], grad_retain[3, 3] = torch.nan, torch.inf, -torch.inf, 1e-42
    weight[3], grad_forget[3] = 1e-39, 1.0
    return weight, grad_forget, grad_retain


def patterns(given: Terms, gamma: float) -> Tensor:
    """Return the bit patterns of |S| in flat order, int64, from the formula; every NaN has one pattern."""
    score = weight_score_ref(*given, gamma).float().flatten()
    bits = (score.view(torch.int32) & 0x7FFFFFFF).long()
    return torch.where(score.isnan(), 0x7FC00000, bits)


def histogram(impl: Impl, given: Terms, layout: str = "contiguous", **options) -> Tensor:
    """Return `score_histogram` of terms in a layout, on the CPU; all that is not finite counts in one bin."""
    with poison():
        counts = score_histogram(*impl.moved(given, layout), **options, impl=impl.name).cpu()
    assert counts.dtype == torch.int64 and counts.shape == (BINS,)
    return finite(counts) if options["digit"] == 0 else counts


def finite(counts: Tensor) -> Tensor:
    """Return high digits' counts with those of NaN and infinity in one bin: processors write NaN with other bits."""
    return torch.cat([counts[:FIRST_NON_FINITE_BIN], counts[FIRST_NON_FINITE_BIN:].sum(0, keepdim=True)])


def mask(impl: Impl, given: Terms, layout: str = "contiguous", **options) -> tuple[Tensor, int]:
    """Return `score_mask` of terms in a layout, on the CPU."""
    with poison():
        words, taken = score_mask(*impl.moved(given, layout), **options, impl=impl.name)
    assert words.dtype == torch.int32 and taken.dtype == torch.int64 and words.is_contiguous()
    return words.cpu(), int(taken)


def check_histograms(impl: Impl, given: Terms, layout: str = "contiguous", *, gamma: float = 0.37) -> None:
    """Assert that both digits are counted as `patterns` says: under the middle and the greatest prefix, and zero."""
    bits = patterns(given, gamma)
    high = histogram(impl, given, layout, gamma=gamma, digit=0)
    assert torch.equal(high, finite(torch.bincount(bits >> 16, minlength=BINS)))
    known = bits[bits >> 16 < FIRST_NON_FINITE_BIN]
    prefixes = {int(known.median()) >> 16, int(known.max()) >> 16} if len(known) else set()
    for prefix in {0} | prefixes:
        low = histogram(impl, given, layout, gamma=gamma, digit=1, prefix=prefix)
        assert torch.equal(low, torch.bincount(bits[bits >> 16 == prefix] & 0xFFFF, minlength=BINS))


def check_mask(
    impl: Impl, given: Terms, layout: str = "contiguous", *, gamma: float, threshold: int, ties: int
) -> None:
    """Assert that the mask has what is above the threshold, and of what equals it the first in flat order."""
    bits = patterns(given, gamma)
    equal = bits == threshold
    kept = (bits > threshold) | (equal & (equal.cumsum(0) <= ties))
    words, taken = mask(impl, given, layout, gamma=gamma, threshold_bits=threshold, ties=ties)
    assert torch.equal(words, pack_bits(kept.view(given[0].shape)))
    assert taken == min(ties, int(equal.sum()))


def check(impl: Impl, given: Terms, layout: str = "contiguous", *, gamma: float = 0.37, all_ties=()) -> None:
    """Assert histograms and masks; by default with every number of ties that makes a difference."""
    check_histograms(impl, given, layout, gamma=gamma)
    bits = patterns(given, gamma)
    for threshold in {0, int(bits.median()) if len(bits) else 7}:
        equal = int((bits == threshold).sum())
        for ties in all_ties or {0, 1, equal // 2, equal, equal + 3}:
            check_mask(impl, given, layout, gamma=gamma, threshold=threshold, ties=ties)


def check_between(impl: Impl, given: Terms, layout: str = "contiguous", *, gamma: float = 0.37) -> None:
    """Assert which scores intervals around the middle have: of one pattern, below it, without an end, and none."""
    bits = patterns(given, gamma)
    middle = max(int(bits.median()), 1) if len(bits) else 5
    moved = impl.moved(given, layout)
    for low, high in ((middle, middle + 1), (1, middle), (0, 1 << 30), (middle, middle)):
        with poison():
            words, index, found, above = score_between(
                *moved, gamma=gamma, low=low, high=high, most=len(bits), impl=impl.name
            )
        inside = (bits >= low) & (bits < high)
        assert torch.equal(index.cpu().long(), inside.nonzero().squeeze(1))
        assert torch.equal(found.cpu().long(), bits[inside])
        assert torch.equal(words.cpu(), pack_bits(torch.atleast_1d((bits >= high).view(given[0].shape))))
        assert above == int((bits >= high).sum()) and index.dtype == found.dtype == torch.int32


def check_magnitudes(impl: Impl, given: Terms, layout: str = "contiguous") -> None:
    """Assert that the sums of both terms are those of exact arithmetic on their products in float32."""
    weight, grad_forget, grad_retain = given
    dtype = torch.promote_types(weight.dtype, F32)
    with poison():
        sums = score_magnitudes(*impl.moved(given, layout), impl=impl.name)
    for row, factor in zip(sums, (weight, grad_retain), strict=True):
        products = (factor.to(dtype) * grad_forget.to(dtype)).float().flatten()
        assert exact(row) == sum((Fraction(abs(value)) for value in products.tolist()), Fraction())


def numbers() -> Terms:
    """Return terms whose products have every exponent, subnormal ones among them."""
    mantissa = 1 + torch.rand(277, generator=torch.Generator().manual_seed(0))
    exponent = torch.arange(277) - 150
    weight = (mantissa.double() * 2.0 ** exponent.double()).float()  # up to 2^127
    return weight, torch.ones(277), weight.flip(0)
