"""weight_score: WAGLE's score, its exact global threshold by radix histogram, and the packed mask.

    S = (w - g_r / gamma) * g_f                          float32, in exactly this order of operations

Division, subtraction, product: no fused multiply-add can contract it, so every backend gives the same bits.
The magnitude |S| of a float32 sorts like its bit pattern, a 31-bit integer; the k-th largest over a whole
model is found in two streaming passes, without storing a score or sorting:

    pass 0   histogram of the high 16 bits                       -> the bin where the k-th largest lies
    pass 1   histogram of the low 16 bits inside that bin        -> its exact bit pattern
    mask     bits where |S| > threshold, and the first few that equal it, in flat order, to make k

Shapes: weight, grad_forget, grad_retain [..., n] of any float dtype; histograms int64 [65536]; mask int32
words [..., ceil(n / 32)] (`ops.bits`). Integers are exact: deterministic whatever the order. Source: WAGLE
(arXiv 2410.17509) equation 7 for S, read in the paper; threshold and layout are our specification.
"""

import torch
from torch import Tensor

from moe_unlearn import backend
from moe_unlearn.ops.bits import num_words, pack_bits

BINS = 1 << 16


def weight_score(
    weight: Tensor, grad_forget: Tensor, grad_retain: Tensor, *, gamma: float, impl: str = "auto"
) -> Tensor:
    """S [..., n] float32; raises ValueError if the shapes differ or gamma is not positive."""
    _check(weight, grad_forget, grad_retain, gamma)
    return _score(weight, grad_forget, grad_retain, gamma, impl)


def weight_score_ref(weight: Tensor, grad_forget: Tensor, grad_retain: Tensor, gamma: float) -> Tensor:
    """`weight_score` in plain PyTorch; float64 inputs are scored in float64."""
    dtype = torch.promote_types(weight.dtype, torch.float32)
    return (weight.to(dtype) - grad_retain.to(dtype) / gamma) * grad_forget.to(dtype)


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
    """int64 [65536]: counts of the high 16 bits of |S| (digit 0), or of the low 16 bits where the high
    ones equal `prefix` (digit 1)."""
    _check(weight, grad_forget, grad_retain, gamma)
    if digit not in (0, 1) or not 0 <= prefix < BINS:
        raise ValueError(f"digit must be 0 or 1 and prefix in [0, {BINS}); got {digit} and {prefix}")
    return _histogram(weight, grad_forget, grad_retain, gamma, digit, prefix, impl)


def score_mask(
    weight: Tensor,
    grad_forget: Tensor,
    grad_retain: Tensor,
    *,
    gamma: float,
    threshold_bits: int,
    ties: int,
    impl: str = "auto",
) -> tuple[Tensor, int]:
    """(words, ties taken): bits where |S| > threshold, and the first `ties` elements equal to it.

    `threshold_bits` is the bit pattern of the threshold; elements are counted in flat order.
    """
    _check(weight, grad_forget, grad_retain, gamma)
    words, taken = _mask(weight, grad_forget, grad_retain, gamma, threshold_bits, ties, impl)
    return words, int(taken)


def _bits(weight, grad_forget, grad_retain, gamma) -> Tensor:
    """The bit pattern of |S| as int32 >= 0; NaN sorts above infinity."""
    score = weight_score_ref(weight, grad_forget, grad_retain, gamma).float()
    return score.abs().view(torch.int32)


def _histogram_ref(weight, grad_forget, grad_retain, gamma, digit, prefix):
    bits = _bits(weight, grad_forget, grad_retain, gamma).flatten()
    high, low = bits >> 16, bits & 0xFFFF
    chosen = high if digit == 0 else low[high == prefix]
    return torch.bincount(chosen, minlength=BINS)


def _mask_ref(weight, grad_forget, grad_retain, gamma, threshold_bits, ties):
    bits = _bits(weight, grad_forget, grad_retain, gamma)
    equal = bits == threshold_bits
    rank = equal.flatten().cumsum(0).view(bits.shape)
    taken = equal & (rank <= ties)
    return pack_bits((bits > threshold_bits) | taken), taken.sum()


@torch.library.custom_op("moe_unlearn::weight_score", mutates_args=())
def _score(weight: Tensor, grad_forget: Tensor, grad_retain: Tensor, gamma: float, impl: str) -> Tensor:
    return backend.resolve("weight_score", impl, weight)(weight, grad_forget, grad_retain, gamma)


@_score.register_fake
def _(weight, grad_forget, grad_retain, gamma, impl):
    dtype = torch.promote_types(weight.dtype, torch.float32)
    return weight.new_empty(weight.shape, dtype=dtype)


@torch.library.custom_op("moe_unlearn::score_histogram", mutates_args=())
def _histogram(
    weight: Tensor, grad_forget: Tensor, grad_retain: Tensor, gamma: float, digit: int, prefix: int, impl: str
) -> Tensor:
    kernel = backend.resolve("weight_score.histogram", impl, weight)
    return kernel(weight, grad_forget, grad_retain, gamma, digit, prefix)


@_histogram.register_fake
def _(weight, *rest):
    return weight.new_empty(BINS, dtype=torch.int64)


@torch.library.custom_op("moe_unlearn::score_mask", mutates_args=())
def _mask(
    weight: Tensor, grad_forget: Tensor, grad_retain: Tensor, gamma: float, threshold_bits: int, ties: int,
    impl: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    kernel = backend.resolve("weight_score.mask", impl, weight)
    return kernel(weight, grad_forget, grad_retain, gamma, threshold_bits, ties)


@_mask.register_fake
def _(weight, *rest):
    shape = (*weight.shape[:-1], num_words(weight.shape[-1])) if weight.dim() else (1,)
    return weight.new_empty(shape, dtype=torch.int32), weight.new_empty((), dtype=torch.int64)


backend.register("weight_score", "ref", weight_score_ref)
backend.register("weight_score.histogram", "ref", _histogram_ref)
backend.register("weight_score.mask", "ref", _mask_ref)


def _check(weight, grad_forget, grad_retain, gamma):
    if not gamma > 0:
        raise ValueError(f"gamma must be above 0; got {gamma}")
    for name, tensor in (("weight", weight), ("grad_forget", grad_forget), ("grad_retain", grad_retain)):
        if not tensor.is_floating_point():
            raise TypeError(f"{name} must be floating point; got {tensor.dtype}")
        if tensor.shape != weight.shape or tensor.device != weight.device:
            raise ValueError(
                f"{name} must be {list(weight.shape)} on {weight.device}; "
                f"got {list(tensor.shape)} on {tensor.device}"
            )
