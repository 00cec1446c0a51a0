"""What several kernels share: the matrix product, the bits of stochastic rounding, the running device."""

import os

import torch
import triton
import triton.language as tl
from triton.language.random import philox_impl

# Triton decides when a kernel is decorated whether its interpreter runs it, and so does `dot`.
INTERPRET = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")


@triton.jit
def dot(a, b, accumulator):
    """accumulator + a @ b, accumulated in float32; float32 operands are multiplied as such, never as TF32.

    The interpreter multiplies bfloat16 operands as raw bit patterns, so they are widened there first.
    """
    if INTERPRET:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, accumulator, input_precision="ieee")


@triton.jit
def random_bits(index, step, seed, parameter_id):
    """Word 0 of Philox4x32-10, uint32: counter (index, step), key (seed, parameter_id); see `ops.bits.philox`.

    index: int64 tensor of flat element indices; step: int64 scalar; seed, parameter_id: their low 32 bits count.
    """
    zero = tl.zeros_like(index)
    word0, _, _, _ = philox_impl(
        (index & 0xFFFFFFFF).to(tl.uint32),
        (index >> 32).to(tl.uint32),
        ((zero + step) & 0xFFFFFFFF).to(tl.uint32),
        ((zero + step) >> 32).to(tl.uint32),
        ((zero + seed) & 0xFFFFFFFF).to(tl.uint32),
        ((zero + parameter_id) & 0xFFFFFFFF).to(tl.uint32),
        10,
    )
    return word0


@triton.jit
def round_stochastic(value, random):
    """float32 -> bfloat16, up with probability equal to the fraction cut off; NaN and infinity are kept."""
    bits = value.to(tl.uint32, bitcast=True)
    finite = (bits & 0x7F800000) != 0x7F800000
    quiet = tl.where(value != value, 0x00400000, 0).to(tl.uint32)
    kept = tl.where(finite, bits + (random & 0xFFFF), bits | quiet)
    return (kept >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)


@triton.jit
def round_nearest(value, dtype: tl.constexpr):
    """float32 -> `dtype`, ties to even. By bits in the interpreter, which rounds bfloat16 ties away from zero
    and its denormals to zero."""
    if INTERPRET and dtype == tl.bfloat16:
        bits = value.to(tl.uint32, bitcast=True)
        kept = tl.where(value != value, bits | 0x00400000, bits + 0x7FFF + ((bits >> 16) & 1))
        narrow = (kept >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        narrow = value.to(dtype)
    return narrow


@triton.jit
def widen(value):
    """float32 of a float tile. By bits in the interpreter, which multiplies bfloat16 denormals by powers of two."""
    if INTERPRET and value.dtype == tl.bfloat16:
        wide = (value.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    else:
        wide = value.to(tl.float32)
    return wide


@triton.jit
def unpack_words(words):
    """int32 mask words [...] -> their bits as bool [..., 32]; layout in `ops.bits`."""
    return ((tl.expand_dims(words, -1) >> tl.arange(0, 32)) & 1) != 0


@triton.jit
def word_elements(pointer, strides, index, row, at):
    """Pointers [words, 32] to the elements behind the mask words `at` of rows `row` of slices `index`, all int64;
    strides are those of `as_slices`."""
    bit = tl.arange(0, 32).to(tl.int64)
    first = index * strides[0] + row * strides[1] + at * 32 * strides[2]
    return pointer + (first[:, None] + bit[None, :] * strides[2])


def as_slices(tensor: torch.Tensor, sliced: bool = False) -> torch.Tensor:
    """[slices, rows, columns] of any tensor, a view where the strides of its middle dimensions allow one.

    One dimension is one row; two are one slice, or, if `sliced`, slices of one row.
    """
    tensor = torch.atleast_1d(tensor)
    if tensor.dim() == 1:
        return tensor[None, None]
    if tensor.dim() == 2:
        return tensor[:, None] if sliced else tensor[None]
    return tensor.flatten(1, -2)
