"""retain_weights: computes token weights and their moments from packed membership bits.

The formulas are in `ops.retain_weights`:

    w_t = min(cap, exp(bias + tilt . a_t))      all arithmetic in float64

retain_weights takes one launch, in which a program weighs a block of tokens.

moments takes two launches. In the kernels a~ holds the 1 behind its S members, so that a tile of 32 elements is a word.

    _moments_kernel  grid (pairs of tiles i <= j, chunks of tokens): weighs its tokens block by block and adds
                     the tile sum_t free_t a~_i a~_j in registers; the pairs (0, j) also add sum_t w_t a~_j. One
                     pass over the words: the weights never reach memory. partial [chunks, n + 1, n], n = S + 1, the
                     last row for the first moments; tiles below the diagonal stay unwritten and unread.
    _sum_kernel      grid (blocks of elements): adds chunks in a fixed order, mirrors the triangle, puts the 1 first.

Workspace: 8 (n + 1) n bytes per chunk, at most 528 / pairs chunks (`configs.moments`): at most 8.1 MB for S up to 512.
The results are deterministic: the chunks depend on the shape alone, every sum runs in a fixed order, no atomics.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_unlearn.triton_kernels import configs
from moe_unlearn.triton_kernels.common import ceil_div

WORD_BITS = tl.constexpr(32)


def retain_weights(words: Tensor, tilt: Tensor, bias: float, cap: float) -> Tensor:
    """Compute the weights, float32 [T]; words: int32 [T, ceil(S / 32)]; tilt: float64 [S]; any strides.

    `cap` may be infinite.
    """
    num_tokens, config = len(words), configs.retain_weights()
    weights = torch.empty(num_tokens, dtype=torch.float32, device=words.device)
    if num_tokens:
        _weights_kernel[(ceil_div(num_tokens, config.block),)](
            words,
            tilt.contiguous(),
            weights,
            bias,
            cap,
            num_tokens,
            len(tilt),
            *words.stride(),
            BLOCK=config.block,
            num_warps=config.num_warps,
        )
    return weights


def moments(words: Tensor, tilt: Tensor, bias: float, cap: float) -> tuple[Tensor, Tensor]:
    """Compute (first [S + 1], second [S + 1, S + 1]) float64; arguments as for `retain_weights`."""
    num_tokens, size = len(words), len(tilt) + 1
    config = configs.moments(num_tokens, size)

    def doubles(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float64, device=words.device)

    partial, first, second = doubles(config.chunks, size + 1, size), doubles(size), doubles(size, size)
    tiles = ceil_div(size, WORD_BITS.value)
    _moments_kernel[tiles * (tiles + 1) // 2, config.chunks](
        words,
        tilt.contiguous(),
        partial,
        bias,
        cap,
        num_tokens,
        config.tokens_per_chunk,
        size - 1,
        *words.stride(),
        BLOCK=config.block,
        num_warps=config.num_warps,
    )
    _sum_kernel[(ceil_div((size + 1) * size, config.sum_block),)](
        partial, first, second, config.chunks, size, BLOCK=config.sum_block, CHUNKS=config.sum_chunks, num_warps=4
    )
    return first, second


@triton.jit
def _weigh(words, tilt, bias, cap, token, inside, num_members, stride_t, stride_word, BLOCK: tl.constexpr):
    """Compute exp(bias + tilt . a_t) of a block of tokens, and the same but at most cap, in float64."""
    bit = tl.arange(0, WORD_BITS)
    place = words + token * stride_t
    exponent = tl.zeros((BLOCK,), tl.float64)
    for start in range(0, num_members, WORD_BITS):
        word = tl.load(place, mask=inside, other=0)
        # the summed dimension comes first, so that a thread adds up its own tokens
        member = ((word[None, :] >> bit[:, None]) & 1).to(tl.float64)
        member_tilt = tl.load(tilt + start + bit, mask=start + bit < num_members, other=0.0)
        exponent += tl.sum(member * member_tilt[:, None], axis=0)
        place += stride_word
    raw = tl.exp(exponent + bias)
    # written so that NaN, which only an overflow of the exponent gives, stays NaN
    return raw, tl.where(raw > cap, cap, raw)


@triton.jit(do_not_specialize=["num_tokens", "num_members"])
def _weights_kernel(
    words,
    tilt,
    weights,
    bias: tl.float64,
    cap: tl.float64,
    num_tokens,
    num_members,
    stride_t,
    stride_word,
    BLOCK: tl.constexpr,
):
    """Compute weights[t] = min(cap, exp(bias + tilt . a_t))."""
    token = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = token < num_tokens
    _, weight = _weigh(words, tilt, bias, cap, token, inside, num_members, stride_t, stride_word, BLOCK)
    tl.store(weights + token, weight.to(tl.float32), mask=inside)


@triton.jit
def _extended(words, token, inside, tile, num_members, stride_t, stride_word):
    """Unpack 32 elements of a~ from number 32 tile on, float64 [tokens, 32]; 0 outside.

    They are the members, then a 1, then elements that are never stored.
    """
    bit = tl.arange(0, WORD_BITS)
    element = tile * WORD_BITS + bit
    # if S is a multiple of 32, the 1 stands in a tile of its own, which has no word
    mask = inside & (tl.zeros_like(token) + tile * WORD_BITS < num_members)
    word = tl.load(words + token * stride_t + tile.to(tl.int64) * stride_word, mask=mask, other=0)
    member = (word[:, None] >> bit[None, :]) & 1
    return (member | (inside[:, None] & (element == num_members)[None, :])).to(tl.float64)


@triton.jit(do_not_specialize=["num_tokens", "tokens_per_chunk", "num_members"])
def _moments_kernel(
    words,
    tilt,
    partial,
    bias: tl.float64,
    cap: tl.float64,
    num_tokens,
    tokens_per_chunk,
    num_members,
    stride_t,
    stride_word,
    BLOCK: tl.constexpr,
):
    """Compute one tile i <= j of partial[chunk, :n] = sum_t free_t a~ a~^T; with i = 0 also row n = sum_t w_t a~."""
    pair, chunk = tl.program_id(0), tl.program_id(1)
    # pairs are numbered (0, 0), (0, 1), (1, 1), (0, 2), ...
    i, j = pair, pair * 0
    while i > j:
        j += 1
        i -= j
    size = num_members + 1
    second = tl.zeros((WORD_BITS, WORD_BITS), tl.float64)
    first = tl.zeros((WORD_BITS,), tl.float64)
    start = chunk.to(tl.int64) * tokens_per_chunk
    end = tl.minimum(start + tokens_per_chunk, num_tokens)
    for block in range(start, end, BLOCK):
        token = block + tl.arange(0, BLOCK).to(tl.int64)
        inside = token < end
        raw, weight = _weigh(words, tilt, bias, cap, token, inside, num_members, stride_t, stride_word, BLOCK)
        left = _extended(words, token, inside, i, num_members, stride_t, stride_word)
        right = _extended(words, token, inside, j, num_members, stride_t, stride_word)
        # a token at its cap has no curvature
        free = tl.where(inside & (raw < cap), raw, 0.0)
        # tl.dot, since float64 needs no care in the interpreter and common.dot would round it there
        second = tl.dot(tl.trans(left * free[:, None]), right, second, out_dtype=tl.float64)
        first += tl.sum(tl.where(inside, weight, 0.0)[:, None] * right, axis=0)
    row, column = i * WORD_BITS + tl.arange(0, WORD_BITS), j * WORD_BITS + tl.arange(0, WORD_BITS)
    into = partial + chunk.to(tl.int64) * (size + 1) * size
    known = (row < size)[:, None] & (column < size)[None, :]
    tl.store(into + row[:, None] * size + column[None, :], second, mask=known)
    if i == 0:
        tl.store(into + size * size + column, first, mask=column < size)


@triton.jit(do_not_specialize=["num_chunks", "size"])
def _sum_kernel(partial, first, second, num_chunks, size, BLOCK: tl.constexpr, CHUNKS: tl.constexpr):
    """Add up the chunks: rows 0 .. n - 1 of `partial` to second, row n to first."""
    element = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row, column = element // size, element % size
    inside, of_first = row <= size, row == size
    source = tl.where(of_first, element, tl.minimum(row, column) * size + tl.maximum(row, column))
    total = tl.zeros((CHUNKS, BLOCK), tl.float64)
    for start in range(0, num_chunks, CHUNKS):
        chunk = start + tl.arange(0, CHUNKS)
        place = partial + (chunk.to(tl.int64) * (size + 1) * size)[:, None] + source[None, :]
        total += tl.load(place, mask=(chunk < num_chunks)[:, None] & inside[None, :], other=0.0)
    total = tl.sum(total, axis=0)
    # the last element of a~ is the first of the result
    row, column = (row + 1) % size, (column + 1) % size
    tl.store(second + row * size + column, total, mask=element < size * size)
    tl.store(first + column, total, mask=of_first)
