"""Defines the two bit layouts that every backend shares: packed masks and the bits of stochastic rounding.

**Mask.** int32 words; bit `i % 32` of word `i // 32` is element `i` along the *last* dimension, and each
row is padded with zero bits to a whole word, so that a mask `[..., ceil(n / 32)]` slices and shards with
its parameter `[..., n]`. Worked example, n = 34, only elements 0, 33 set: words `[1, 2]`.

**Stochastic rounding.** Philox4x32-10 (Salmon et al., SC 2011) with counter (index, step), key (seed,
parameter id), each a pair of 32-bit words, low word first; output word 0 belongs to the weight with that
flat index and word 1 to its moments (`ops.moments`). The bits do not depend on the backend, the device or the number
of threads.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

WORD_BITS = 32
_LOW_32 = 0xFFFFFFFF


def num_words(n: int) -> int:
    """Return the number of int32 words per row of n mask bits, ceil(n / 32)."""
    return (n + WORD_BITS - 1) // WORD_BITS


def words_shape(shape: Sequence[int]) -> tuple[int, ...]:
    """Return the shape of the words of a tensor of this shape; a tensor without dimensions has one word."""
    return (*shape[:-1], num_words(shape[-1])) if shape else (1,)


def pack_bits(mask: Tensor) -> Tensor:
    """Pack bool [..., n] into int32 words [..., ceil(n / 32)]; a 0-d mask packs as [1]."""
    if mask.dtype != torch.bool:
        raise TypeError(f"mask must be bool; got {mask.dtype}")
    if mask.dim() == 0:
        mask = mask.reshape(1)
    n = mask.shape[-1]
    padded = torch.nn.functional.pad(mask, (0, num_words(n) * WORD_BITS - n))
    bits = padded.unflatten(-1, (num_words(n), WORD_BITS)).to(torch.int64)
    words = (bits << torch.arange(WORD_BITS, device=mask.device)).sum(-1)
    return _as_int32(words)


def unpack_bits(words: Tensor, n: int) -> Tensor:
    """Unpack int32 words [..., ceil(n / 32)] into bool [..., n]."""
    if words.dtype != torch.int32 or words.dim() == 0 or words.shape[-1] != num_words(n):
        raise ValueError(
            f"expected int32 words with last dimension ceil({n} / 32) = {num_words(n)}; "
            f"got {words.dtype} {tuple(words.shape)}"
        )
    bits = (words.unsqueeze(-1) >> torch.arange(WORD_BITS, device=words.device, dtype=torch.int32)) & 1
    return bits.flatten(-2)[..., :n].to(torch.bool)


def keep_where(condition: Tensor, mask: Tensor | None, shape: Sequence[int]) -> Tensor:
    """Return the mask of weights [..., n] if `condition` [] holds, else an all-zero one; no `mask` means all ones.

    The condition is not read by the CPU. Without a mask all rows of the result share one row in memory.
    """
    if mask is not None:
        return torch.where(condition, mask, 0)
    whole = shape[-1] % WORD_BITS == 0
    row = -condition.int().view(1) if whole else pack_bits(condition.expand(shape[-1]))
    return row.expand(*shape[:-1], num_words(shape[-1]))


def slices_with_a_bit(p: Tensor, mask: Tensor) -> Tensor | None:
    """Return the int64 indices along dimension 0 with a set bit, None for all; a vector or scalar is one slice."""
    trained = mask.flatten(1).ne(0).any(1) if mask.dim() > 1 else mask.ne(0).any().expand(p.shape[:1] or 1)
    return None if trained.all() else trained.nonzero().squeeze(1)


def philox(index: Tensor, step: int, seed: int, parameter_id: int) -> Tensor:
    """Compute word 0 of Philox4x32-10 for each flat element index; int64 tensor of values in [0, 2^32)."""
    return philox_words(index, step, seed, parameter_id)[0]


def philox_words(index: Tensor, step: int, seed: int, parameter_id: int) -> tuple[Tensor, Tensor]:
    """Compute words 0 and 1 of Philox4x32-10, as `philox`."""
    index = index.to(torch.int64)
    c0, c1 = index & _LOW_32, (index >> 32) & _LOW_32
    c2 = torch.full_like(index, step & _LOW_32)
    c3 = torch.full_like(index, (step >> 32) & _LOW_32)
    k0, k1 = seed & _LOW_32, parameter_id & _LOW_32
    for _ in range(10):
        high0, low0 = _multiply_32(c0, 0xD2511F53)
        high1, low1 = _multiply_32(c2, 0xCD9E8D57)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) & _LOW_32, (k1 + 0xBB67AE85) & _LOW_32
    return c0, c1


def round_stochastic(value: Tensor, random: Tensor) -> Tensor:
    """Round float32 to bfloat16, up with probability equal to the fraction cut off.

    The low 16 bits of `random` are added below bfloat16's last bit and the sum is truncated; NaN and infinity
    stay as they are.
    """
    if value.dtype != torch.float32:
        raise TypeError(f"stochastic rounding starts from float32; got {value.dtype}")
    bits = value.view(torch.int32).to(torch.int64) & _LOW_32
    cut = (bits + (random & 0xFFFF)) & 0xFFFF0000
    rounded = _as_int32(cut).view(torch.float32).to(torch.bfloat16)
    return torch.where(value.isfinite(), rounded, value.to(torch.bfloat16))


def _multiply_32(a: Tensor, b: int) -> tuple[Tensor, Tensor]:
    """Compute the high and low 32-bit halves of a * b, split so that no partial product overflows int64."""
    low = (a & 0xFFFF) * b
    high = (a >> 16) * b + (low >> 16)
    return (high >> 16) & _LOW_32, ((high & 0xFFFF) << 16) | (low & 0xFFFF)


def _as_int32(values: Tensor) -> Tensor:
    """Reinterpret int64 values in [0, 2^32) as int32 of the same bits."""
    return torch.where(values > 0x7FFFFFFF, values - (1 << 32), values).to(torch.int32)
