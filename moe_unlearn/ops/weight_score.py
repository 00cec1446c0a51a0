"""weight_score: finds the exact global threshold of WAGLE's score by radix histogram, and packs the mask above it.

    S = (theta - g_r / gamma) * g_f

in float32 and in exactly this order: a true (IEEE) division, a subtraction, a product. No fused multiply-add
can contract them, so that every backend gives the same bits. |S| sorts like its bit pattern, a 31-bit integer. Two
streaming passes find the k-th largest of a whole model, without a score tensor and without sorting:

    digit 0   histogram of the high 16 bits of |S|                     -> the bin that holds the k-th largest
    digit 1   histogram of the low 16 bits where the high ones agree   -> its exact bit pattern
    mask      bits where |S| > threshold, and the first few equal to it in flat order, to make k

What else a mask needs of scores streams too: those of an interval of bit patterns, by place, with the mask above it
(`score_between`), and the exact sums of |theta g_f| and |g_r g_f| (`score_magnitudes`). C++ computes both on the CPU,
where it makes the mask; plain PyTorch does everywhere else.

NaN and infinity land in the bins from 0x7F80 on, so that the histogram also shows whether all scores are finite.

Worked example, gamma = 1, theta = (1, 2), g_r = (0, 1), g_f = (-1, 3): S = (-1, 3), bit patterns of |S|
0x3F800000 and 0x40400000; the largest is in bin 0x4040, its low bits are 0x0000.

Shapes: weight, grad_forget, grad_retain [..., n] of any float dtype, widened to float32; histograms int64
[65536]; masks int32 words [..., ceil(n / 32)] (layout: `ops.bits`; a 0-d weight counts as [1]). The bits are the same
for any number of threads, since all work is on integers or element-wise. No gradient flows.

Source: S is equation 7 of WAGLE (NeurIPS 2024, arXiv 2410.17509; paper and code read) up to the order of
operations; threshold and layout are our specification.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from moe_unlearn import backend, native
from moe_unlearn.ops.bits import pack_bits, words_shape
from moe_unlearn.ops.custom import custom_op
from moe_unlearn.ops.exact_sums import EXPONENTS, sums_by_exponent

BINS = 1 << 16
FIRST_NON_FINITE_BIN = 0x7F80
BLOCK = 1 << 20  # elements scored at a time
SMALL_BLOCK = 1 << 17  # the same where memory matters more
_SMALLEST_GAMMA, _LARGEST_GAMMA = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max


def weight_score_ref(weight: Tensor, grad_forget: Tensor, grad_retain: Tensor, gamma: float) -> Tensor:
    """Compute S [..., n], float32 (float64 for a float64 weight), in plain PyTorch."""
    dtype = torch.promote_types(weight.dtype, torch.float32)
    # the divisor is a tensor, since CUDA turns a division by a Python number into a product with its reciprocal
    divisor = torch.full((), gamma, dtype=dtype, device=weight.device)
    return (weight.to(dtype) - grad_retain.to(dtype) / divisor) * grad_forget.to(dtype)


def score_histogram(
    weight: Tensor,
    grad_forget: Tensor,
    grad_retain: Tensor,
    *,
    gamma: float,
    digit: int,
    prefix: int = 0,
    impl: str = "auto",
) -> Tensor:
    """Count |S| by its high 16 bits (digit 0) or, where these equal `prefix`, by its low ones (digit 1).

    Returns int64 [65536]. Raises TypeError or ValueError as `score_mask`.
    """
    _check(weight, grad_forget, grad_retain, gamma)
    if digit not in (0, 1) or not 0 <= prefix < BINS:
        raise ValueError(f"digit must be 0 or 1 and prefix in [0, {BINS}); got {digit} and {prefix}")
    counts: Tensor = _score_histogram(weight, grad_forget, grad_retain, gamma, digit, prefix, impl)
    return counts


def score_histogram_ref(
    weight: Tensor, grad_forget: Tensor, grad_retain: Tensor, gamma: float, digit: int, prefix: int
) -> Tensor:
    """Compute `score_histogram` in plain PyTorch."""
    counts = torch.zeros(BINS, dtype=torch.int64, device=weight.device)
    for bits in _bit_rows(weight, grad_forget, grad_retain, gamma):
        high, low = bits >> 16, bits & 0xFFFF
        counts = counts + torch.bincount(high.flatten() if digit == 0 else low[high == prefix], minlength=BINS)
    return counts


def score_mask(
    weight: Tensor,
    grad_forget: Tensor,
    grad_retain: Tensor,
    *,
    gamma: float,
    threshold_bits: int,
    ties: int,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Compute (words, ties_taken): bits where |S| > threshold, and for the first `ties` elements equal to it.

    Args:
        weight, grad_forget, grad_retain: float [..., n], one shape and device.
        gamma: a positive normal float32 number.
        threshold_bits: the bit pattern of the float32 threshold, in [0, 2^31).
        ties: how many equal elements may be taken, in flat order; ties_taken (int64 []) says how many were.

    Raises TypeError or ValueError for a wrong dtype, shape, device or value.
    """
    _check(weight, grad_forget, grad_retain, gamma)
    if not 0 <= threshold_bits < 1 << 31 or ties < 0:
        raise ValueError(f"threshold_bits must be in [0, 2^31) and ties not negative; got {threshold_bits} and {ties}")
    words, taken = _score_mask(weight, grad_forget, grad_retain, gamma, threshold_bits, ties, impl)
    return words, taken


def score_between(
    weight: Tensor,
    grad_forget: Tensor,
    grad_retain: Tensor,
    *,
    gamma: float,
    low: int,
    high: int,
    most: int,
    impl: str = "auto",
) -> tuple[Tensor, Tensor, Tensor, int]:
    """Find the elements whose bit pattern of |S| is in [low, high): (words, flat indices, bit patterns, number above).

    The words are those of `score_mask` from `high` on, and the number is of these elements. It may stop where it has
    found more than `most`, after some of the elements: then indices, bit patterns and number are of these. Indices are
    ascending int64 or, where these can hold them, int32; bit patterns are int32. Raises TypeError or ValueError as
    `score_mask`, and ValueError for an interval that is none.
    """
    _check(weight, grad_forget, grad_retain, gamma)
    if not 0 <= low <= high < 1 << 31 or high == 0:
        raise ValueError(f"low and high must be in order, and high in [1, 2^31); got {low} and {high}")
    kernel = _beside_the_mask("weight_score.between", impl, weight)
    words, places, bits, above = kernel(weight, grad_forget, grad_retain, gamma, low, high, most, impl)
    return words, places, bits, above


def score_between_ref(
    weight: Tensor, grad_forget: Tensor, grad_retain: Tensor, gamma: float, low: int, high: int, most: int, impl: str
) -> tuple[Tensor, Tensor, Tensor, int]:
    """Compute `score_between` in plain PyTorch, some rows at a time, but for the words."""
    words, _ = score_mask(weight, grad_forget, grad_retain, gamma=gamma, threshold_bits=high - 1, ties=0, impl=impl)
    dtype = torch.int32 if weight.numel() < 1 << 31 else torch.int64
    indices, patterns = [weight.new_empty(0, dtype=dtype)], [weight.new_empty(0, dtype=torch.int32)]
    above = torch.zeros((), dtype=torch.int64, device=weight.device)
    first = 0
    for bits in _bit_rows(weight, grad_forget, grad_retain, gamma, SMALL_BLOCK):
        flat = bits.flatten()
        above += (flat >= high).sum()
        found = ((flat >= low) & (flat < high)).nonzero().squeeze(1)
        indices.append((found + first).to(dtype))
        patterns.append(flat[found])
        first += len(flat)
        most -= len(found)
        if most < 0:
            break
    return words, torch.cat(indices), torch.cat(patterns), int(above)


def score_magnitudes(weight: Tensor, grad_forget: Tensor, grad_retain: Tensor, *, impl: str = "auto") -> Tensor:
    """Sum |weight grad_forget| and |grad_retain grad_forget|, products rounded to float32, exactly.

    Returns the sums by exponent, int64 [2, 256] on the CPU, which `exact_sums.exact` makes numbers of; they are the
    same in every order. Raises TypeError or ValueError as `score_mask`.
    """
    _check(weight, grad_forget, grad_retain, 1.0)
    sums: Tensor = _beside_the_mask("weight_score.magnitudes", impl, weight)(weight, grad_forget, grad_retain)
    return sums


def score_magnitudes_ref(weight: Tensor, grad_forget: Tensor, grad_retain: Tensor) -> Tensor:
    """Compute `score_magnitudes` in plain PyTorch, some elements at a time."""
    dtype = torch.promote_types(weight.dtype, torch.float32)
    sums = torch.zeros(2, EXPONENTS, dtype=torch.int64)
    terms = (term.reshape(-1).split(SMALL_BLOCK) for term in (weight, grad_forget, grad_retain))
    for blocks in zip(*terms, strict=True):
        w, g_f, g_r = (block.to(dtype) for block in blocks)
        sums += torch.stack([sums_by_exponent(w * g_f), sums_by_exponent(g_r * g_f)])
    return sums


def _beside_the_mask(name: str, impl: str, weight: Tensor) -> Callable:
    """Return the kernel of the implementation that makes the mask, or the reference where that one has none."""
    chosen = backend.choose("weight_score.mask", impl, weight.device.type, weight.dtype)
    return backend.resolve(name, chosen if backend.has(name, chosen, weight.device.type) else "ref", weight)


def score_mask_ref(
    weight: Tensor, grad_forget: Tensor, grad_retain: Tensor, gamma: float, threshold_bits: int, ties: int
) -> tuple[Tensor, Tensor]:
    """Compute `score_mask` in plain PyTorch."""
    blocks = []
    seen = torch.zeros((), dtype=torch.int64, device=weight.device)
    for bits in _bit_rows(weight, grad_forget, grad_retain, gamma):
        equal = bits == threshold_bits
        rank = seen + equal.flatten().cumsum(0).view_as(equal)
        blocks.append(pack_bits((bits > threshold_bits) | (equal & (rank <= ties))))
        seen = seen + equal.sum()
    shape = words_shape(weight.shape)
    words = torch.cat(blocks) if blocks else torch.zeros(0, dtype=torch.int32, device=weight.device)
    return words.view(shape), seen.clamp_max(ties)


def _bit_rows(
    weight: Tensor, grad_forget: Tensor, grad_retain: Tensor, gamma: float, most: int | None = None
) -> Iterator[Tensor]:
    """Yield bit patterns of |S|, int32 [rows, n], whole rows of about `most` elements at a time, by default BLOCK."""
    width = weight.shape[-1] if weight.dim() else 1
    if weight.numel() == 0:
        return
    flat = [t.reshape(-1, width) for t in (weight, grad_forget, grad_retain)]
    height = max((most or BLOCK) // width, 1)
    for start in range(0, len(flat[0]), height):
        w, g_f, g_r = (t[start : start + height] for t in flat)
        block = weight_score_ref(w, g_f, g_r, gamma)
        yield block.to(torch.float32).view(torch.int32) & 0x7FFFFFFF


@custom_op("moe_unlearn::weight_score_histogram")
def _score_histogram(
    weight: Tensor, grad_forget: Tensor, grad_retain: Tensor, gamma: float, digit: int, prefix: int, impl: str
) -> Tensor:
    kernel = backend.resolve("weight_score.histogram", impl, weight)
    counts: Tensor = kernel(weight, grad_forget, grad_retain, gamma, digit, prefix)
    return counts


@_score_histogram.register_fake
def _(
    weight: Tensor, grad_forget: Tensor, grad_retain: Tensor, gamma: float, digit: int, prefix: int, impl: str
) -> Tensor:
    return weight.new_empty(BINS, dtype=torch.int64)


@custom_op("moe_unlearn::weight_score_mask")
def _score_mask(
    weight: Tensor,
    grad_forget: Tensor,
    grad_retain: Tensor,
    gamma: float,
    threshold_bits: int,
    ties: int,
    impl: str,
) -> tuple[Tensor, Tensor]:
    kernel = backend.resolve("weight_score.mask", impl, weight)
    words, taken = kernel(weight, grad_forget, grad_retain, gamma, threshold_bits, ties)
    return words, taken


@_score_mask.register_fake
def _(
    weight: Tensor, grad_forget: Tensor, grad_retain: Tensor, gamma: float, threshold_bits: int, ties: int, impl: str
) -> tuple[Tensor, Tensor]:
    words = weight.new_empty(words_shape(weight.shape), dtype=torch.int32)
    return words, weight.new_empty((), dtype=torch.int64)


def _histogram_native(
    weight: Tensor, grad_forget: Tensor, grad_retain: Tensor, gamma: float, digit: int, prefix: int
) -> Tensor:
    terms = _native_terms(weight, grad_forget, grad_retain, flat=True)
    counts: Tensor = torch.ops.moe_unlearn_native.weight_score_histogram(*terms, gamma, digit, prefix)
    return counts


def _mask_native(
    weight: Tensor, grad_forget: Tensor, grad_retain: Tensor, gamma: float, threshold_bits: int, ties: int
) -> tuple[Tensor, Tensor]:
    terms = _native_terms(weight, grad_forget, grad_retain, flat=False)
    words, taken = torch.ops.moe_unlearn_native.weight_score_mask(*terms, gamma, threshold_bits, ties)
    return words, taken


def _between_native(
    weight: Tensor, grad_forget: Tensor, grad_retain: Tensor, gamma: float, low: int, high: int, most: int, impl: str
) -> tuple[Tensor, Tensor, Tensor, int]:
    terms = _native_terms(weight, grad_forget, grad_retain, flat=False)
    words, *found = torch.ops.moe_unlearn_native.weight_score_between(*terms, gamma, low, high, most)
    return words, *found


def _magnitudes_native(weight: Tensor, grad_forget: Tensor, grad_retain: Tensor) -> Tensor:
    terms = _native_terms(weight, grad_forget, grad_retain, flat=True)
    sums: Tensor = torch.ops.moe_unlearn_native.weight_score_magnitudes(*terms)
    return sums


def _native_terms(weight: Tensor, *grads: Tensor, flat: bool) -> Sequence[Tensor]:
    """Return the terms with at least one dimension and a dtype of the kernels; as one row if that needs no copy."""
    terms = [torch.atleast_1d(t.float() if t.dtype == torch.float64 else t) for t in (weight, *grads)]
    return [t.view(-1) for t in terms] if flat and all(t.is_contiguous() for t in terms) else terms


backend.register("weight_score.histogram", "ref", score_histogram_ref)
backend.register("weight_score.mask", "ref", score_mask_ref)
backend.register("weight_score.between", "ref", score_between_ref)
backend.register("weight_score.magnitudes", "ref", score_magnitudes_ref)
native.register("weight_score.between", _between_native)
native.register("weight_score.magnitudes", _magnitudes_native)
for _impl in ("cpu", "cuda"):
    native.register("weight_score.histogram", _histogram_native, _impl)
    native.register("weight_score.mask", _mask_native, _impl)
backend.register("weight_score.histogram", "triton", "moe_unlearn.triton_kernels.weight_score:score_histogram")
backend.register("weight_score.mask", "triton", "moe_unlearn.triton_kernels.weight_score:score_mask")


def _check(weight: Tensor, grad_forget: Tensor, grad_retain: Tensor, gamma: float) -> None:
    if not _SMALLEST_GAMMA <= gamma <= _LARGEST_GAMMA:
        raise ValueError(f"gamma must be in [{_SMALLEST_GAMMA:g}, {_LARGEST_GAMMA:g}]; got {gamma}")
    for name, tensor in (("weight", weight), ("grad_forget", grad_forget), ("grad_retain", grad_retain)):
        if not tensor.is_floating_point():
            raise TypeError(f"{name} must be floating point; got {tensor.dtype}")
        if tensor.shape != weight.shape or tensor.device != weight.device:
            raise ValueError(
                f"{name} must be {list(weight.shape)} on {weight.device} like weight; "
                f"got {list(tensor.shape)} on {tensor.device}"
            )
