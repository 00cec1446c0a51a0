"""Helpers of several kernels: the matrix product, rounding, mask words and strided views."""

import os

import torch
import triton
import triton.language as tl
from triton.language.random import philox_impl

# read once, as Triton does: it decides when a kernel is decorated whether its interpreter runs it
INTERPRET = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")


@triton.jit
def dot(a, b, accumulator):
    """Compute accumulator + a @ b in float32; float32 operands are multiplied as such, never as TF32.

    The interpreter multiplies bfloat16 operands as raw bit patterns, so that they are widened there first.
    """
    if INTERPRET:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, accumulator, input_precision="ieee")


@triton.jit
def random_words(index, step, seed, parameter_id):
    """Compute words 0 and 1 of Philox4x32-10, uint32: counter (index, step), key (seed, parameter_id).

    See `ops.bits.philox_words`. index: int64 tensor of flat element indices; step: int64 scalar; of seed and
    parameter_id the low 32 bits count.
    """
    zero = tl.zeros_like(index)
    word0, word1, _, _ = philox_impl(
        (index & 0xFFFFFFFF).to(tl.uint32),
        (index >> 32).to(tl.uint32),
        ((zero + step) & 0xFFFFFFFF).to(tl.uint32),
        ((zero + step) >> 32).to(tl.uint32),
        ((zero + seed) & 0xFFFFFFFF).to(tl.uint32),
        ((zero + parameter_id) & 0xFFFFFFFF).to(tl.uint32),
        10,
    )
    return word0, word1


@triton.jit
def round_stochastic(value, random):
    """Round float32 to bfloat16, up with probability equal to the fraction cut off; NaN and infinity are kept."""
    bits = value.to(tl.uint32, bitcast=True)
    finite = (bits & 0x7F800000) != 0x7F800000
    quiet = tl.where(value != value, 0x00400000, 0).to(tl.uint32)
    kept = tl.where(finite, bits + (random & 0xFFFF), bits | quiet)
    return (kept >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)


@triton.jit
def round_nearest(value, dtype: tl.constexpr):
    """Round float32 to `dtype`, ties to even.

    The interpreter rounds bfloat16 ties away from zero and denormals to zero, so that it rounds by bits here.
    """
    if INTERPRET and dtype == tl.bfloat16:
        bits = value.to(tl.uint32, bitcast=True)
        kept = tl.where(value != value, bits | 0x00400000, bits + 0x7FFF + ((bits >> 16) & 1))
        narrow = (kept >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        narrow = value.to(dtype)
    return narrow


@triton.jit
def widen(value):
    """Widen a float tile to float32.

    The interpreter multiplies bfloat16 denormals by powers of two, so that it widens by bits here.
    """
    if INTERPRET and value.dtype == tl.bfloat16:
        wide = (value.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    else:
        wide = value.to(tl.float32)
    return wide


@triton.jit
def unpack_words(words):
    """Unpack int32 mask words [...] into bool [..., 32]; the layout is in `ops.bits`."""
    return ((tl.expand_dims(words, -1) >> tl.arange(0, 32)) & 1) != 0


@triton.jit
def word_elements(pointer, strides, index, row, at):
    """Compute pointers [words, 32] to the elements of the mask words `at` of rows `row` of slices `index`.

    The three are int64; the strides are those of `as_slices`.
    """
    bit = tl.arange(0, 32).to(tl.int64)
    first = index * strides[0] + row * strides[1] + at * 32 * strides[2]
    return pointer + (first[:, None] + bit[None, :] * strides[2])


def as_slices(tensor: torch.Tensor, sliced: bool = False) -> torch.Tensor:
    """Reshape any tensor to [slices, rows, columns], as a view if the strides of its middle dimensions allow one.

    A tensor of one dimension becomes one row; one of two becomes one slice or, if `sliced`, slices of one row.
    """
    tensor = torch.atleast_1d(tensor)
    if tensor.dim() == 1:
        return tensor[None, None]
    if tensor.dim() == 2:
        return tensor[:, None] if sliced else tensor[None]
    return tensor.flatten(1, -2)


def ceil_div(count: int, size: int) -> int:
    """Return how many pieces of a size `count` elements take; triton.cdiv is slow where the host calls it."""
    return -(-count // size)
