"""Defines the narrow moments that every backend shares: bfloat16, and blocks of 8-bit codes with one scale.

`narrowed` stores a float32 moment m after an update and `widened` reads it before the next one. The update itself is
in float32 and its weights move by the moments before they are narrowed.

**Blocks.** A row of n moments is cut into blocks of 64, the last of which may be shorter. A row is uint8
[4 * (ceil(n / 4) + ceil(n / 64))]: a code for each moment, zeros up to a multiple of 4, then each block's scale as
float32. So packed moments [..., row_bytes(n)] slice and shard with their parameter [..., n]. Worked example, n = 70:
70 codes, 2 zeros, 2 scales, 80 bytes. With x = m for momentum and a first moment, x = sqrt(v) for a second one:

    scale = max |x| / limit       over the block; limit = 127, or 255 for a second moment
    code  = floor(x / scale + u)  kept within [-limit, limit]; 1 instead of 0 where a second moment is not 0
    x     = code * scale          and v = x * x

A code is a signed byte, that of a second moment an unsigned one. Each operation is one of IEEE float32, rounded once.
The scale of a block that holds an infinity or a NaN is infinity and its codes are 0, so that all of it reads as NaN.
Codes are also 0 where the scale is 0. Masked moments of a block take new codes with the others, by the new scale; a
block without a set bit keeps its bytes.

**Random bits.** u = r / 2^16, and bfloat16 is rounded by `bits.round_stochastic` with r: the high half of word 1 of
the Philox block whose word 0 rounds the weight (`ops.bits`) for momentum and a first moment, its low half for a second
one. So no two roundings share a bit, and the results depend neither on slices nor on ranks.

Why so: v has twice the decades of m, and code 0 for a v that is not 0 would make its weight jump by m / eps. The square
root gives both moments the same range, and the floor of 1 keeps |m| / sqrt(v) within what the scales allow. A step
changes v by a factor beta2 = 0.999, less than a code: rounding to the nearest would never move it, on average u does.
The square of a rounded root is too large on average, in the long run by at most scale^2 / (4 * (1 - beta2)), which is
0.4 % of the largest v of the block: weights of small v take shorter steps for it, never longer ones.
Source: our specification; bitsandbytes and torchao use tables of codes and round to the nearest.
"""

import math

import torch
from torch import Tensor

from moe_unlearn.ops.bits import round_stochastic

BLOCK = 64
PACKED = torch.uint8


def is_narrow(stored: Tensor | None) -> bool:
    """Return whether stored moments are rounded stochastically where the arithmetic is float32."""
    return stored is not None and stored.dtype in (torch.bfloat16, PACKED)


def row_bytes(n: int) -> int:
    """Return the bytes of a packed row of n moments."""
    return 4 * (math.ceil(n / 4) + math.ceil(n / BLOCK))


def packed_zeros(shape: tuple[int, ...], device: torch.device) -> Tensor:
    """Make packed moments of weights [..., n] that are all 0."""
    return torch.zeros(*shape[:-1], row_bytes(shape[-1]), dtype=PACKED, device=device)


def widened(stored: Tensor, n: int, dtype: torch.dtype, *, second: bool) -> Tensor:
    """Return stored moments of rows of n weights in `dtype`; second: whether they are second moments."""
    if stored.dtype != PACKED:
        return stored.to(dtype)
    if stored.numel() == 0:
        return stored.new_zeros(*stored.shape[:-1], n, dtype=dtype)
    codes, scales = _parts(stored, n)
    x = (codes if second else codes.view(torch.int8)).float() * _each(scales, n)
    return (x * x if second else x).to(dtype)


def narrowed(new: Tensor, old: Tensor, kept: Tensor | None, random: Tensor | None, *, second: bool) -> Tensor:
    """Return what becomes of the `old` stored moments if those that `kept`, bool [..., n], names become `new`.

    random: word 1 of Philox for each moment, as int64; None rounds to the nearest, and cannot pack.
    """
    if random is not None:
        random = random & 0xFFFF if second else random >> 16
    if old.dtype == PACKED:
        assert random is not None
        if kept is None:
            return _packed(new, random, second=second)
        n = new.shape[-1]
        made = _packed(torch.where(kept, new, widened(old, n, new.dtype, second=second)), random, second=second)
        return torch.where(_bytes(_blocks(kept).any(-1), n), made, old)
    rounded = new.to(old.dtype) if random is None or old.dtype != torch.bfloat16 else round_stochastic(new, random)
    # rounded before the choice, so that a masked moment keeps its exact bits, a NaN's payload too
    return rounded if kept is None else torch.where(kept, rounded, old)


def _packed(m: Tensor, random: Tensor, *, second: bool) -> Tensor:
    """Pack float32 moments [..., n], rounded up with probability random / 2^16 of what is cut off."""
    n, limit = m.shape[-1], 255.0 if second else 127.0
    # by way of float64, as in `AdamW.updated`
    x = m.double().sqrt().float() if second else m
    most = _blocks(x.view(torch.int32) & 0x7FFFFFFF).amax(-1)  # bits order as magnitudes do, NaN the highest
    finite = most < 0x7F800000
    scales = torch.where(finite, most.view(torch.float32) / limit, torch.inf)
    scale = _each(scales, n)
    codes = (x / scale + random.float() * 2.0**-16).floor().clamp(-limit, limit)
    if second:
        codes = torch.where((codes == 0) & (x > 0), 1.0, codes)
    codes = torch.where(_each(finite, n) & (scale > 0), codes, 0.0)
    codes = torch.nn.functional.pad(codes, (0, -n % 4)).to(torch.int16).to(PACKED)  # by its low byte
    return torch.cat([codes, scales.view(PACKED)], -1)


def _parts(packed: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """Return the codes [..., n] and the scales [..., ceil(n / 64)] of packed rows."""
    scales = packed[..., 4 * math.ceil(n / 4) :].contiguous()
    return packed[..., :n], scales.view(torch.float32)


def _blocks(rows: Tensor) -> Tensor:
    """Cut rows [..., n] into blocks [..., ceil(n / 64), 64], padded by zeros."""
    n = rows.shape[-1]
    padded = torch.nn.functional.pad(rows, (0, -n % BLOCK))
    return padded.view(*rows.shape[:-1], math.ceil(n / BLOCK), BLOCK)


def _each(of_blocks: Tensor, n: int) -> Tensor:
    """Repeat what blocks [..., ceil(n / 64)] have for each of their elements [..., n]."""
    return of_blocks.repeat_interleave(BLOCK, -1)[..., :n]


def _bytes(of_blocks: Tensor, n: int) -> Tensor:
    """Repeat what blocks have for each of their bytes [..., row_bytes(n)]."""
    return torch.cat([_each(of_blocks, 4 * math.ceil(n / 4)), of_blocks.repeat_interleave(4, -1)], -1)
