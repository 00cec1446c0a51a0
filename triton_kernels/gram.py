"""gram: computes inner products of gradient sets in float64, in two launches; formulas are in `ops.gram`.

`gram` takes the sets of one parameter:

    _products_kernel   grid (at most `configs.gram().programs`): a program walks blocks of mask words, reads each
                       element of the sets once and keeps the products of all pairs (i, j >= i) element by element
    _sum_kernel        grid (m, m): adds a pair's partial sums in order and stores them at (i, j) and (j, i)

Up to four sets take one pass; more go in groups of two and two, so that m sets are read m / 2 - 1 times. The speed is
that of reading.

`gram_factors` takes sets that are given by their factors:

    _factors_kernel    grid (most row blocks that may exist): the program of block a of an expert's rows adds up
                       (x_a . x_b) (dy_i,a . dy_j,b) over the rows of a and of each block b >= a of the same expert.
                       Swapping the blocks swaps i and j: with half of the product of a block with itself, and every
                       other pair of blocks once, the sum is P with G = P + P^T
    _sum_kernel        as above, P + P^T

Products of float32 and narrower numbers are exact in float64, and so are float64 sums of integers; a matrix product
takes float64 tensor cores. Workspace: 8 m^2 bytes per program. The results are deterministic: no atomics, a fixed
number of programs on every device, every sum in a fixed order, one sum for both halves of the result.
"""

from itertools import combinations, product

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_unlearn.triton_kernels import configs
from moe_unlearn.triton_kernels.common import as_slices, ceil_div, unpack_words, word_elements

_AT_ONCE = 4  # sets in one launch of `_products_kernel`
_SIDE = 3  # sets on each side of `_factors_kernel`: registers hold nine products


def gram(gradients: list[Tensor], mask: Tensor | None = None) -> Tensor:
    """Compute G [m, m] float64 of m >= 1 float tensors of one shape and dtype; mask: int32 words [..., ceil(n / 32)].

    Strides are free; tensors of more than three dimensions whose middle ones do not merge are copied.
    """
    m, first = len(gradients), gradients[0]
    out = torch.empty(m, m, dtype=torch.float64, device=first.device)
    if first.numel() == 0:
        return out.zero_()
    flat = all(g.is_contiguous() for g in gradients)
    if mask is not None:
        flat = flat and first.dim() > 0 and first.shape[-1] % 32 == 0
        mask = as_slices(mask.contiguous().flatten() if flat else mask)
    slices = [as_slices(g.view(-1) if flat else g) for g in gradients]
    count, rows, columns = slices[0].shape
    num_words = count * rows * ceil_div(columns, 32)
    config = configs.gram()
    programs = min(config.programs, ceil_div(num_words, config.block_words))
    partials = out.new_empty(m, m, programs)
    for numbers in _launches(m):
        chosen = [slices[i] for i in numbers]
        _products_kernel[(programs,)](
            tuple(chosen),
            tuple(s.stride() for s in chosen),
            mask,
            None if mask is None else mask.stride(),
            partials,
            tuple(numbers),
            m,
            rows,
            columns,
            num_words,
            FLAT=flat,
            BLOCK=config.block_words,
            num_warps=config.num_warps,
        )
    _sum_kernel[(m, m)](partials, out, m, programs, TRANSPOSED_TOO=False, BLOCK=config.sum_block, num_warps=4)
    return out


def _launches(m: int) -> list[tuple[int, ...]]:
    """Return tuples of at most _AT_ONCE ascending numbers below m that together contain every pair."""
    if m <= _AT_ONCE:
        return [tuple(range(m))]
    half = _AT_ONCE // 2
    groups = [tuple(range(start, min(start + half, m))) for start in range(0, m, half)]
    return [a + b for a, b in combinations(groups, 2)]


def gram_factors(row_gradients: list[Tensor], inputs: Tensor, expert_offsets: Tensor) -> Tensor:
    """Compute G [m, m] float64 of grouped weight gradients from row gradients m x [R, M] and inputs [R, P].

    Strides are free; expert_offsets: int32 or int64 [E + 1].
    """
    m, num_experts = len(row_gradients), len(expert_offsets) - 1
    (num_rows, depth), width = inputs.shape, row_gradients[0].shape[1]
    out = torch.empty(m, m, dtype=torch.float64, device=inputs.device)
    if num_rows == 0 or num_experts < 1:
        return out.zero_()
    config = configs.gram_factors(m)
    programs = ceil_div(num_rows, config.rows) + min(num_rows, num_experts)
    partials = out.new_empty(m, m, programs)
    numbers = [tuple(range(start, min(start + _SIDE, m))) for start in range(0, m, _SIDE)]
    for left, right in product(numbers, repeat=2):
        _factors_kernel[(programs,)](
            *(tuple(row_gradients[i] for i in side) for side in (left, right)),
            *(tuple(row_gradients[i].stride() for i in side) for side in (left, right)),
            inputs,
            inputs.stride(),
            expert_offsets.contiguous(),
            partials,
            left[0],
            right[0],
            m,
            programs,
            NUM_EXPERTS=num_experts,
            WIDTH=width,
            DEPTH=depth,
            ROWS=config.rows,
            BLOCK=config.depth,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )
    _sum_kernel[(m, m)](partials, out, m, programs, TRANSPOSED_TOO=True, BLOCK=config.sum_block, num_warps=4)
    return out


@triton.jit
def _products_kernel(
    gradients,
    strides,
    mask,
    mask_strides,
    partials,
    numbers,
    m,
    rows,
    columns,
    num_words,
    FLAT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Compute this program's part of partials [m, m, programs]: its sum of every pair (numbers[i], numbers[j >= i])."""
    SETS: tl.constexpr = len(gradients)
    sums = ()
    for _ in tl.static_range(SETS * (SETS + 1) // 2):
        sums += (tl.zeros((BLOCK, 32), tl.float64),)
    for block in range(tl.program_id(0), tl.cdiv(num_words, BLOCK), tl.num_programs(0)):
        word = (block * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
        if FLAT:
            index, row, at = tl.zeros_like(word), tl.zeros_like(word), word
        else:
            per_row = tl.cdiv(columns, 32)
            line, at = word // per_row, word % per_row
            index, row = line // rows, line % rows
        exists = (word < num_words)[:, None] & (at[:, None] * 32 + tl.arange(0, 32)[None, :] < columns)
        if mask is not None:
            place = mask + index * mask_strides[0] + row * mask_strides[1] + at * mask_strides[2]
            exists &= unpack_words(tl.load(place, mask=word < num_words, other=0))
        values = ()
        for i in tl.static_range(SETS):
            value = tl.load(word_elements(gradients[i], strides[i], index, row, at), mask=exists, other=0.0)
            values += (value.to(tl.float32).to(tl.float64),)
        added = ()
        for i in tl.static_range(SETS):
            for j in tl.static_range(i, SETS):
                added += (sums[len(added)] + values[i] * values[j],)
        sums = added
    stored = ()
    for i in tl.static_range(SETS):
        for j in tl.static_range(i, SETS):
            pair = numbers[i] * m + numbers[j]
            total = tl.sum(tl.sum(sums[len(stored)], 1), 0)
            tl.store(partials + pair * tl.num_programs(0) + tl.program_id(0), total)
            stored += (total,)


@triton.jit(do_not_specialize=["programs"])
def _sum_kernel(partials, out, m, programs, TRANSPOSED_TOO: tl.constexpr, BLOCK: tl.constexpr):
    """Add up the partial sums of (i, j), i <= j, to out[i, j] = out[j, i]; TRANSPOSED_TOO adds those of (j, i)."""
    i, j = tl.program_id(0), tl.program_id(1)
    if i > j:
        return
    totals = tl.zeros((BLOCK,), tl.float64)
    for start in range(0, programs, BLOCK):
        program = start + tl.arange(0, BLOCK)
        inside = program < programs
        totals += tl.load(partials + (i * m + j).to(tl.int64) * programs + program, mask=inside, other=0.0)
        if TRANSPOSED_TOO:
            totals += tl.load(partials + (j * m + i).to(tl.int64) * programs + program, mask=inside, other=0.0)
    total = tl.sum(totals, 0)
    tl.store(out + i * m + j, total)
    if i < j:
        tl.store(out + j * m + i, total)


@triton.jit(do_not_specialize=["first_left", "first_right", "programs"])
def _factors_kernel(
    left, right, left_strides, right_strides, inputs, input_strides, expert_offsets, partials, first_left, first_right,
    m, programs, NUM_EXPERTS: tl.constexpr, WIDTH: tl.constexpr, DEPTH: tl.constexpr, ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Compute this program's part of partials [m, m, programs]: its share of P for every i of `left`, j of `right`."""
    LEFT: tl.constexpr = len(left)
    RIGHT: tl.constexpr = len(right)
    program = tl.program_id(0)
    segment = tl.arange(0, triton.next_power_of_2(NUM_EXPERTS))
    begins = tl.load(expert_offsets + segment, mask=segment < NUM_EXPERTS, other=0)
    ends = tl.load(expert_offsets + segment + 1, mask=segment < NUM_EXPERTS, other=0)
    blocks = tl.cumsum(tl.cdiv(ends - begins, ROWS), 0)
    # a program behind the last block gets stop = 0, so that its loops are empty
    expert = tl.sum((blocks <= program).to(tl.int32), 0)
    before = tl.max(tl.where(blocks <= program, blocks, 0), 0)
    here = expert < NUM_EXPERTS
    begin = tl.load(expert_offsets + expert, mask=here, other=0) + (program - before) * ROWS
    stop = tl.load(expert_offsets + expert + 1, mask=here, other=0)
    row = (begin + tl.arange(0, ROWS)).to(tl.int64)
    sums = ()
    for _ in tl.static_range(LEFT * RIGHT):
        sums += (tl.full((), 0, tl.float64),)
    for first in range(begin, stop, ROWS):
        other = (first + tl.arange(0, ROWS)).to(tl.int64)
        share = tl.where(first == begin, 0.5, 1.0).to(tl.float64)
        near = share * _inner(inputs, input_strides, row, inputs, input_strides, other, stop, DEPTH, ROWS, BLOCK)
        added = ()
        for i in tl.static_range(LEFT):
            for j in tl.static_range(RIGHT):
                inner = _inner(
                    left[i], left_strides[i], row, right[j], right_strides[j], other, stop, WIDTH, ROWS, BLOCK
                )
                added += (sums[len(added)] + tl.sum(tl.sum(near * inner, 1), 0),)
        sums = added
    for i in tl.static_range(LEFT):
        for j in tl.static_range(RIGHT):
            pair = (first_left + i) * m + first_right + j
            tl.store(partials + pair.to(tl.int64) * programs + program, sums[i * RIGHT + j])


@triton.jit
def _inner(
    a, a_strides, a_rows, b, b_strides, b_rows, stop, WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    """Compute the inner products, float64 [ROWS, ROWS], of the rows below `stop`; zero for others."""
    total = tl.zeros((ROWS, ROWS), tl.float64)
    # factors are loaded one step ahead by hand: Triton 3.6 cannot multiply float64 operands that it knows to come from
    # 16-bit loads; it sees through a loop of one turn, so that the loop has at least two
    STOP: tl.constexpr = WIDTH if WIDTH > BLOCK else BLOCK + 1
    x = _factor(a, a_strides, a_rows, stop, 0, WIDTH, BLOCK)
    y = _factor(b, b_strides, b_rows, stop, 0, WIDTH, BLOCK)
    for start in range(0, STOP, BLOCK):
        next_x = _factor(a, a_strides, a_rows, stop, start + BLOCK, WIDTH, BLOCK)
        next_y = _factor(b, b_strides, b_rows, stop, start + BLOCK, WIDTH, BLOCK)
        total = tl.dot(x.to(tl.float64), y.to(tl.float64).T, total, input_precision="ieee", out_dtype=tl.float64)
        x, y = next_x, next_y
    return total


@triton.jit
def _factor(source, strides, rows, stop, start, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Load float32 [rows, BLOCK] from column `start` on, zero outside."""
    column = (start + tl.arange(0, BLOCK)).to(tl.int64)
    place = source + rows[:, None] * strides[0] + column[None, :] * strides[1]
    return tl.load(place, mask=(rows < stop)[:, None] & (column < WIDTH)[None, :], other=0.0).to(tl.float32)
