"""weight_score: computes the radix histogram of scores and the mask; formula and layouts are in `ops.weight_score`.

    score_histogram   1 launch (and the clearing of 512 KB of counts)
    score_mask        2 launches: one counts each span's elements equal to the threshold, one makes the words. 1 without
                      ties

Scores live in registers only: a tile [BLOCK, 32] stands for BLOCK mask words. Every operation is IEEE and
none can be contracted, so that the bits are those of the reference.

The histogram adds integers, which gives the same counts in any order. For digit 0 each program counts in shared memory,
with 2^15 bins since there is no sign, and adds each bin to global memory once. `tl.histogram` does that from Triton 3.9
on; 3.6 votes on every bit of every element, some 4000 instructions an element for so many bins. With 3.6, where 128 KB
are too much, for rows that are not whole words side by side, and for digit 1, which few elements have, each element is
added to global memory instead. Zeros are then summed tile by tile first: experts that no forget row reached score
exactly zero, and their elements would queue for one address.

The mask needs the number of equal elements before each element in flat order. At most `configs.MAX_SPANS` programs
each own a contiguous span of words. The first launch counts the equal elements of every span (workspace: 8 bytes a
span); in the second a program adds up the counts of the spans before its own and walks its span in order. Inside a tile
ranks are integer prefix sums, computed only where an element equals the threshold. There are no atomics.

Strides are free (tensors of more than three dimensions whose middle ones do not merge are copied), offsets are int64,
and up to 2^36 elements are possible.
"""

import torch
import triton
import triton.language as tl

from moe_unlearn.triton_kernels import configs
from moe_unlearn.triton_kernels.common import as_slices, ceil_div, word_elements

_BINS = 1 << 16
# 3.9 is the first version that is known to count in shared memory
_SHARED_BINS = tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 9)


@triton.jit
def _place(block, rows, columns, num_words, BLOCK: tl.constexpr):
    """Return slice, row and number in the row (int64) of a tile's words, and which elements [BLOCK, 32] exist."""
    per_row = tl.cdiv(columns, 32)
    word = block * BLOCK + tl.arange(0, BLOCK)
    line, at = word // per_row, word % per_row
    column = at[:, None] * 32 + tl.arange(0, 32)[None, :]
    exists = (word < num_words)[:, None] & (column < columns)
    return (line // rows).to(tl.int64), (line % rows).to(tl.int64), at.to(tl.int64), exists


@triton.jit
def _score(weight, forget, retain, weight_strides, forget_strides, retain_strides, gamma, index, row, at, exists):
    """Compute float32 scores [BLOCK, 32]."""
    w = tl.load(word_elements(weight, weight_strides, index, row, at), mask=exists, other=0.0).to(tl.float32)
    f = tl.load(word_elements(forget, forget_strides, index, row, at), mask=exists, other=0.0).to(tl.float32)
    r = tl.load(word_elements(retain, retain_strides, index, row, at), mask=exists, other=0.0).to(tl.float32)
    return (w - tl.div_rn(r, gamma)) * f


@triton.jit
def _magnitude(score):
    """Return the bit pattern of |score|, int32."""
    return score.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit(do_not_specialize=["prefix"])
def _histogram_kernel(
    counts,
    weight,
    forget,
    retain,
    weight_strides,
    forget_strides,
    retain_strides,
    gamma,
    prefix,
    rows,
    columns,
    num_words,
    DIGIT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    index, row, at, exists = _place(tl.program_id(0), rows, columns, num_words, BLOCK)
    score = _score(
        weight, forget, retain, weight_strides, forget_strides, retain_strides, gamma, index, row, at, exists
    )
    bits = _magnitude(score)
    if DIGIT == 0:
        digit = bits >> 16
    else:
        digit = bits & 0xFFFF
        exists &= (bits >> 16) == prefix
    zeros = tl.sum(tl.sum((exists & (digit == 0)).to(tl.int32), axis=1))
    tl.atomic_add(counts, zeros.to(tl.int64), mask=zeros > 0, sem="relaxed")
    one = tl.full(digit.shape, 1, tl.int64)
    tl.atomic_add(counts + digit, one, mask=exists & (digit != 0), sem="relaxed")


@triton.jit
def _bins_kernel(
    counts,
    weight,
    forget,
    retain,
    weight_strides,
    forget_strides,
    retain_strides,
    gamma,
    rows,
    columns,
    num_words,
    BINS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Count digit 0 of every num_programs-th tile, and add the counts to `counts` at the end."""
    count = tl.zeros((BINS,), tl.int32)
    for block in range(tl.program_id(0), tl.cdiv(num_words, BLOCK), tl.num_programs(0)):
        index, row, at, exists = _place(block, rows, columns, num_words, BLOCK)
        score = _score(
            weight, forget, retain, weight_strides, forget_strides, retain_strides, gamma, index, row, at, exists
        )
        digit = tl.reshape(_magnitude(score) >> 16, (BLOCK * 32,))
        count += tl.histogram(digit, BINS, mask=tl.reshape(exists, (BLOCK * 32,)))
    bin = tl.arange(0, BINS)
    tl.atomic_add(counts + bin, count.to(tl.int64), mask=count > 0, sem="relaxed")


@triton.jit(do_not_specialize=["threshold"])
def _count_ties_kernel(
    ties_in_span,
    weight,
    forget,
    retain,
    weight_strides,
    forget_strides,
    retain_strides,
    gamma,
    threshold,
    rows,
    columns,
    num_words,
    blocks_per_span,
    BLOCK: tl.constexpr,
):
    first = tl.program_id(0) * blocks_per_span
    last = tl.minimum(first + blocks_per_span, tl.cdiv(num_words, BLOCK))
    equal = tl.zeros((BLOCK, 32), tl.int32)
    for block in range(first, last):
        index, row, at, exists = _place(block, rows, columns, num_words, BLOCK)
        score = _score(
            weight, forget, retain, weight_strides, forget_strides, retain_strides, gamma, index, row, at, exists
        )
        equal += (exists & (_magnitude(score) == threshold)).to(tl.int32)
    tl.store(ties_in_span + tl.program_id(0), tl.sum(tl.sum(equal.to(tl.int64), axis=1)))


@triton.jit(do_not_specialize=["threshold", "ties"])
def _mask_kernel(
    words, ties_taken, ties_in_span, weight, forget, retain, weight_strides, forget_strides, retain_strides, gamma,
    threshold, ties: tl.int64, rows, columns, num_words, blocks_per_span, BLOCK: tl.constexpr, SPANS: tl.constexpr,
):  # fmt: skip
    """Compute the mask words, contiguous, of one span.

    With ties_in_span None no element that equals the threshold is taken.
    """
    program = tl.program_id(0)
    if ties_in_span is not None:
        span = tl.arange(0, SPANS)
        counts = tl.load(ties_in_span + span, mask=span < tl.num_programs(0), other=0)
        left = ties - tl.sum(tl.where(span < program, counts, 0))
        if program == 0:
            tl.store(ties_taken, tl.minimum(tl.sum(counts), ties))
    bit = tl.arange(0, 32)[None, :]
    first = program * blocks_per_span
    last = tl.minimum(first + blocks_per_span, tl.cdiv(num_words, BLOCK))
    for block in range(first, last):
        index, row, at, exists = _place(block, rows, columns, num_words, BLOCK)
        score = _score(
            weight, forget, retain, weight_strides, forget_strides, retain_strides, gamma, index, row, at, exists
        )
        bits = _magnitude(score)
        packed = tl.sum((exists & (bits > threshold)).to(tl.int32) << bit, axis=1)
        if ties_in_span is not None:
            equal = (exists & (bits == threshold)).to(tl.int32)
            per_word = tl.sum(equal, axis=1)
            total = tl.sum(per_word)
            if (total > 0) & (left > 0):
                before = tl.cumsum(per_word, axis=0) - per_word
                rank = before[:, None] + tl.cumsum(equal, axis=1)
                packed |= tl.sum(tl.where(rank <= left, equal, 0) << bit, axis=1)
            left -= total
        word = block * BLOCK + tl.arange(0, BLOCK)
        tl.store(words + word, packed, mask=word < num_words)


def score_histogram(
    weight: torch.Tensor, grad_forget: torch.Tensor, grad_retain: torch.Tensor, gamma: float, digit: int, prefix: int
) -> torch.Tensor:
    """Count |S| by its high 16 bits (digit 0) or, where these equal `prefix`, by its low ones (digit 1).

    Returns int64 [65536].
    """
    counts = torch.zeros(_BINS, dtype=torch.int64, device=weight.device)
    if not weight.numel():
        return counts
    tensors, strides, sizes = _sliced(weight, grad_forget, grad_retain)
    # only whole words side by side, since other addresses take the registers that hold the sums
    plain = sizes[1] % 32 == 0 and all(stride[2] == 1 for stride in strides)
    bins = configs.score_bins(weight.device) if _SHARED_BINS and digit == 0 and plain else None
    if bins is not None:
        grid = (min(bins.programs, ceil_div(sizes[-1], bins.block_words)),)
        _bins_kernel[grid](
            counts,
            *tensors,
            *strides,
            gamma,
            *sizes,
            BINS=_BINS // 2,
            BLOCK=bins.block_words,
            num_warps=bins.num_warps,
        )
    else:
        config = configs.weight_score(tuple(weight.shape), weight.dtype, weight.device)
        grid = (ceil_div(sizes[-1], config.block_words),)
        _histogram_kernel[grid](
            counts,
            *tensors,
            *strides,
            gamma,
            prefix,
            *sizes,
            DIGIT=digit,
            BLOCK=config.block_words,
            num_warps=config.num_warps,
        )
    return counts


def score_mask(
    weight: torch.Tensor,
    grad_forget: torch.Tensor,
    grad_retain: torch.Tensor,
    gamma: float,
    threshold_bits: int,
    ties: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute (int32 words [..., ceil(n / 32)], int64 [] ties taken)."""
    tensors, strides, sizes = _sliced(weight, grad_forget, grad_retain)
    shape = (*weight.shape[:-1], ceil_div(weight.shape[-1], 32)) if weight.dim() else (1,)
    words = torch.empty(shape, dtype=torch.int32, device=weight.device)
    taken = torch.zeros((), dtype=torch.int64, device=weight.device)
    if weight.numel():
        config = configs.weight_score(tuple(weight.shape), weight.dtype, weight.device)
        blocks = ceil_div(sizes[-1], config.block_words)
        blocks_per_span = ceil_div(blocks, config.num_spans)
        grid = (ceil_div(blocks, blocks_per_span),)
        sizes = (*sizes, blocks_per_span)
        launch = {"BLOCK": config.block_words, "num_warps": config.num_warps}
        ties_in_span = None
        if ties:
            ties_in_span = torch.empty(grid, dtype=torch.int64, device=weight.device)
            _count_ties_kernel[grid](ties_in_span, *tensors, *strides, gamma, threshold_bits, *sizes, **launch)
        _mask_kernel[grid](
            words,
            taken,
            ties_in_span,
            *tensors,
            *strides,
            gamma,
            threshold_bits,
            ties,
            *sizes,
            SPANS=configs.MAX_SPANS,
            **launch,
        )
    return words, taken


def _sliced(*tensors: torch.Tensor) -> tuple[list[torch.Tensor], list[tuple[int, ...]], tuple[int, int, int]]:
    """Return the tensors as [slices, rows, columns], their strides, and (rows, columns, number of mask words)."""
    views = [as_slices(t) for t in tensors]
    num_slices, rows, columns = views[0].shape
    return views, [v.stride() for v in views], (rows, columns, num_slices * rows * ceil_div(columns, 32))
