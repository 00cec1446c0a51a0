"""Exact sums of float32 numbers, which are the same in every order and grouping, and so over ranks.

A finite float32 is an integer below 2^24 times 2^(max(e, 1) - 150), e its biased exponent. The integers of each
exponent are added up apart, in int64, and these sums are exact for fewer than 2^39 numbers.
"""

from fractions import Fraction

import torch
from torch import Tensor

EXPONENTS = 256
BLOCK = 1 << 17  # elements at a time
_MANTISSA = 23  # bits


def sums_by_exponent(values: Tensor) -> Tensor:
    """Sum the integers of |values|, rounded to float32, by exponent: int64 [256] on the CPU."""
    total = torch.zeros(EXPONENTS, dtype=torch.int64, device=values.device)
    for block in values.reshape(-1).split(BLOCK):
        bits = block.float().view(torch.int32) & 0x7FFFFFFF
        exponent = bits >> _MANTISSA
        integer = (bits & ((1 << _MANTISSA) - 1)) | ((exponent > 0).int() << _MANTISSA)
        total.scatter_add_(0, exponent.long(), integer.long())
    return total.cpu()


def exact(sums: Tensor) -> Fraction | float:
    """Return the sum of the numbers of which `sums_by_exponent` was made; infinity if one was not finite."""
    *finite, infinite = sums.tolist()
    if infinite:
        return float("inf")
    return Fraction(sum(count << (max(e, 1) - 1) for e, count in enumerate(finite)), 1 << 149)
