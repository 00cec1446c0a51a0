"""expert_wgrad: computes grouped weight gradients and their epilogues; formulas and layouts are in `ops.expert_wgrad`.

    expert_wgrad, accumulate_   1 launch; 2 where an expert's rows are split
    sgd_, adamw_                1 launch (`expert_wgrad_update`)
    inner                       1 launch per pair of gradients, and 1 that adds up

All share one main loop (`grouped_outer`): a program computes a tile of dW of one listed expert in float32 registers,
and the epilogue uses it there. Experts without rows run the loop zero times, so that their tiles are exact zeros. A
tile whose mask bits are all zero multiplies nothing. Each tile is a program of its own and not a turn of a persistent
one: the time of a tile depends on the routing, so that the device starts programs as it becomes free, and nothing
hoisted out of a loop over tiles takes registers from the accumulator.

Each element belongs to one program and its sum runs over the rows in order, without atomics: the bits are the same for
any order of programs. Where there are few tiles and many rows, each expert's rows are cut into `splits` parts, whose
float32 tiles go to a workspace of splits x 4 bytes an element; a second launch adds them in order. For `inner` a
program holds the tiles of two gradients. It writes the three float64 products of each pair of tiles, 24 bytes a tile,
and a last launch adds those of each expert in a fixed order; no gradient reaches memory.
"""

import torch
import triton
import triton.language as tl

from moe_unlearn.triton_kernels import configs
from moe_unlearn.triton_kernels.common import ceil_div, round_nearest, widen
from moe_unlearn.triton_kernels.configs import OuterTile
from moe_unlearn.triton_kernels.expert_wgrad_update import adamw_, sgd_
from moe_unlearn.triton_kernels.grouped_outer import (
    factor_arguments,
    find_tile,
    halves,
    listed,
    load_bounds,
    load_words,
    num_tiles,
    outer_product,
    places,
    stop_unless_kept,
    tile_for,
    tile_options,
    unpack_column,
)

__all__ = ["accumulate_", "adamw_", "expert_wgrad", "inner", "sgd_"]

_SUM_BLOCK = 256


@triton.jit
def _write(
    out,
    out_strides,
    mask,
    mask_strides,
    tile,
    index,
    m,
    p,
    M: tl.constexpr,
    P: tl.constexpr,
    ACCUMULATE: tl.constexpr,
):
    """Store the tile to out[index] at (m, p), zero where the mask bit is 0, or add it to what stands there."""
    # a plain store needs few registers and no halves
    if tile.shape[1] > 32 and (ACCUMULATE or mask is not None):
        tile, right = halves(tile)
        _write(out, out_strides, mask, mask_strides, tile, index, m, p, M, P, ACCUMULATE)
        p += tile.shape[1]
        _write(out, out_strides, mask, mask_strides, right, index, m, p, M, P, ACCUMULATE)
    else:
        if mask is not None:
            words = load_words(mask, mask_strides, index, m, p, M, P, tile.shape[0], 1)
            tile = tl.where(unpack_column(words), tile, 0.0)
        offsets, exists = places(out_strides, index, m, p, M, P, tile.shape[0], tile.shape[1])
        if ACCUMULATE:
            tile += widen(tl.load(out + offsets, mask=exists))
        tl.store(out + offsets, round_nearest(tile, out.dtype.element_ty), mask=exists)


@triton.jit
def _store_kernel(
    out, out_strides, grad, input, bounds, grad_rows, input_rows, strides, experts, mask, mask_strides, num_listed,
    M: tl.constexpr, P: tl.constexpr, ACCUMULATE: tl.constexpr, SPLITS: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_ROWS: tl.constexpr, GROUP: tl.constexpr, BY_DESCRIPTOR: tl.constexpr,
    BOUNDS_STRIDE: tl.constexpr,
):  # fmt: skip
    """Store one tile of dW; with SPLITS > 1 part s of matrix i goes to out[s * num_listed + i], the workspace."""
    matrix, m, p = find_tile(tl.program_id(0), M, P, BLOCK_M, BLOCK_P, GROUP)
    index = matrix // SPLITS
    start, stop = load_bounds(bounds, listed(experts, index), BOUNDS_STRIDE)
    if SPLITS > 1:
        part = tl.cdiv(tl.cdiv(stop - start, SPLITS), BLOCK_ROWS) * BLOCK_ROWS
        start += (matrix % SPLITS).to(tl.int32) * part
        stop = tl.minimum(start + part, stop)
    stop = stop_unless_kept(mask, mask_strides, index, m, p, start, stop, M, P, BLOCK_M, BLOCK_P)
    total = outer_product(
        grad, input, grad_rows, input_rows, strides, start, stop, m, p,
        M, P, BLOCK_M, BLOCK_P, BLOCK_ROWS, BY_DESCRIPTOR,
    )  # fmt: skip
    if SPLITS > 1:
        slot = matrix % SPLITS * num_listed + index
        _write(out, out_strides, None, None, total, slot, m, p, M, P, False)
    else:
        _write(out, out_strides, mask, mask_strides, total, index, m, p, M, P, ACCUMULATE)


@triton.jit
def _sum_parts_kernel(
    out,
    out_strides,
    parts,
    parts_strides,
    mask,
    mask_strides,
    num_listed,
    M: tl.constexpr,
    P: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    index, m, p = find_tile(tl.program_id(0), M, P, BLOCK_M, BLOCK_P, 1)
    total = tl.zeros((BLOCK_M, BLOCK_P), tl.float32)
    for part in range(SPLITS):
        offsets, exists = places(parts_strides, index + part * num_listed, m, p, M, P, BLOCK_M, BLOCK_P)
        total += tl.load(parts + offsets, mask=exists, other=0.0)
    _write(out, out_strides, mask, mask_strides, total, index, m, p, M, P, ACCUMULATE)


@triton.jit
def _products(mask, mask_strides, a, b, index, m, p, M: tl.constexpr, P: tl.constexpr):
    """Add up a * a, a * b and b * b over the kept elements, float64."""
    if a.shape[1] > 32:
        left_a, right_a = halves(a)
        left_b, right_b = halves(b)
        aa, ab, bb = _products(mask, mask_strides, left_a, left_b, index, m, p, M, P)
        p += left_a.shape[1]
        more_aa, more_ab, more_bb = _products(mask, mask_strides, right_a, right_b, index, m, p, M, P)
        return aa + more_aa, ab + more_ab, bb + more_bb
    else:
        # elements outside of the matrix are zero already, since the factors were loaded as zeros there
        if mask is not None:
            bits = unpack_column(load_words(mask, mask_strides, index, m, p, M, P, a.shape[0], 1))
            a, b = tl.where(bits, a, 0.0), tl.where(bits, b, 0.0)
        a, b = a.to(tl.float64), b.to(tl.float64)
        return tl.sum(tl.sum(a * a, 1), 0), tl.sum(tl.sum(a * b, 1), 0), tl.sum(tl.sum(b * b, 1), 0)


@triton.jit
def _inner_kernel(
    partials, mask, mask_strides,
    grad_a, input_a, bounds_a, grad_rows_a, input_rows_a, strides_a,
    grad_b, input_b, bounds_b, grad_rows_b, input_rows_b, strides_b,
    experts, num_listed,
    M: tl.constexpr, P: tl.constexpr, SINGLE: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_ROWS: tl.constexpr, GROUP: tl.constexpr, BY_DESCRIPTOR_A: tl.constexpr,
    BOUNDS_STRIDE_A: tl.constexpr, BY_DESCRIPTOR_B: tl.constexpr, BOUNDS_STRIDE_B: tl.constexpr,
):  # fmt: skip
    """Compute partials [num_listed * tiles, 3], <a, a>, <a, b>, <b, b> of each tile; SINGLE: there is only a."""
    index, m, p = find_tile(tl.program_id(0), M, P, BLOCK_M, BLOCK_P, GROUP)
    expert = listed(experts, index)
    start_a, stop_a = load_bounds(bounds_a, expert, BOUNDS_STRIDE_A)
    start_b, stop_b = load_bounds(bounds_b, expert, BOUNDS_STRIDE_B)
    stop_a = stop_unless_kept(mask, mask_strides, index, m, p, start_a, stop_a, M, P, BLOCK_M, BLOCK_P)
    stop_b = stop_unless_kept(mask, mask_strides, index, m, p, start_b, stop_b, M, P, BLOCK_M, BLOCK_P)
    a = outer_product(
        grad_a, input_a, grad_rows_a, input_rows_a, strides_a, start_a, stop_a, m, p,
        M, P, BLOCK_M, BLOCK_P, BLOCK_ROWS, BY_DESCRIPTOR_A,
    )  # fmt: skip
    b = a
    if not SINGLE:
        b = outer_product(
            grad_b, input_b, grad_rows_b, input_rows_b, strides_b, start_b, stop_b, m, p,
            M, P, BLOCK_M, BLOCK_P, BLOCK_ROWS, BY_DESCRIPTOR_B,
        )  # fmt: skip
    aa, ab, bb = _products(mask, mask_strides, a, b, index, m, p, M, P)
    at = partials + tl.program_id(0).to(tl.int64) * 3
    tl.store(at, aa)
    tl.store(at + 1, ab)
    tl.store(at + 2, bb)


@triton.jit
def _sum_products_kernel(out, partials, num_listed, tiles, COUNT: tl.constexpr, BLOCK: tl.constexpr):
    """Add up partials [pairs, num_listed, tiles, 3] over the tiles, to out [num_listed, COUNT, COUNT].

    Each element has one program; the pairs are (0, 0) for a single gradient, else (i, j) with i < j in order.
    """
    index = tl.program_id(0) // (COUNT * COUNT)
    row, column = tl.program_id(0) // COUNT % COUNT, tl.program_id(0) % COUNT
    i, j = tl.minimum(row, column), tl.maximum(row, column)
    which, pair = (i != j).to(tl.int32), i
    if COUNT > 1:
        # <i, i> is the first number of pair (i, i + 1); the last gradient's is the third of the last pair
        last = (i == j) & (i == COUNT - 1)
        which += 2 * last.to(tl.int32)
        i -= last.to(tl.int32)
        pair = i * COUNT - i * (i + 1) // 2 + tl.maximum(j, i + 1) - i - 1
    first = partials + (pair.to(tl.int64) * num_listed + index) * tiles * 3 + which
    total = tl.zeros((BLOCK,), tl.float64)
    for start in range(0, tiles, BLOCK):
        tile = start + tl.arange(0, BLOCK)
        total += tl.load(first + tile * 3, mask=tile < tiles, other=0.0)
    tl.store(out + tl.program_id(0), tl.sum(total, 0))


def expert_wgrad(
    grad, input, expert_offsets, grad_rows=None, input_rows=None, experts=None, mask=None, out_dtype=None
) -> torch.Tensor:
    """Compute dW [M_e, M, P] of the listed experts; arguments as in `ops.expert_wgrad.expert_wgrad_ref`."""
    factors = (grad, input, expert_offsets, grad_rows, input_rows)
    shape, tile = tile_for("store", factors, experts)
    out = torch.empty(shape, dtype=grad.dtype if out_dtype is None else out_dtype, device=grad.device)
    _store(out, factors, experts, mask, tile, False)
    return out


def accumulate_(out, grad, input, expert_offsets, grad_rows, input_rows, experts, mask) -> None:
    """Add dW to out [M_e, M, P], in place and rounded once."""
    factors = (grad, input, expert_offsets, grad_rows, input_rows)
    _, tile = tile_for("store", factors, experts)
    _store(out, factors, experts, mask, tile, True)


def _store(out: torch.Tensor, factors, experts, mask, tile: OuterTile, accumulate: bool) -> None:
    if out.numel() == 0:
        return
    shape, target, strides = tuple(out.shape), out, out.stride()
    if tile.splits > 1:
        target = torch.empty(tile.splits * shape[0], *shape[1:], dtype=torch.float32, device=out.device)
    side = factor_arguments(*factors, tile)
    words = (mask, None if mask is None else mask.stride())
    experts = None if experts is None else experts.contiguous()
    _store_kernel[(num_tiles(shape, tile) * tile.splits,)](
        target,
        target.stride(),
        *side[:6],
        experts,
        *words,
        shape[0],
        ACCUMULATE=accumulate,
        SPLITS=tile.splits,
        BY_DESCRIPTOR=side.by_descriptor,
        BOUNDS_STRIDE=side.bounds_stride,
        **tile_options(shape, tile),
    )
    if tile.splits > 1:
        # tiles of one mask word a row
        rows, num_warps = configs.expert_wgrad_sum()
        _sum_parts_kernel[(shape[0] * ceil_div(shape[1], rows) * ceil_div(shape[2], 32),)](
            out,
            strides,
            target,
            target.stride(),
            *words,
            shape[0],
            shape[1],
            shape[2],
            ACCUMULATE=accumulate,
            SPLITS=tile.splits,
            BLOCK_M=rows,
            BLOCK_P=32,
            num_warps=num_warps,
        )


def inner(grads, inputs, expert_offsets, grad_rows, input_rows, experts, mask) -> torch.Tensor:
    """Compute the Gram matrices [M_e, m, m] float64 of m masked gradients; no gradient is stored."""
    gradients = list(zip(grads, inputs, expert_offsets, grad_rows, input_rows, strict=True))
    count = len(gradients)
    shape, tile = tile_for("pair", gradients[0], experts)
    out = torch.empty(shape[0], count, count, dtype=torch.float64, device=grads[0].device)
    if out.numel() == 0:
        return out
    tiles = num_tiles((1, *shape[1:]), tile)
    pairs = [(i, j) for i in range(count) for j in range(i + 1, count)] or [(0, 0)]
    partials = torch.empty(len(pairs), shape[0] * tiles, 3, dtype=torch.float64, device=out.device)
    sides = [factor_arguments(*factors, tile) for factors in gradients]
    experts = None if experts is None else experts.contiguous()
    if partials.numel() > 0:
        for partial, (i, j) in zip(partials, pairs, strict=True):
            a, b = sides[i], sides[j]
            _inner_kernel[(num_tiles(shape, tile),)](
                partial,
                mask,
                None if mask is None else mask.stride(),
                *a[:6],
                *b[:6],
                experts,
                shape[0],
                SINGLE=i == j,
                BY_DESCRIPTOR_A=a.by_descriptor,
                BOUNDS_STRIDE_A=a.bounds_stride,
                BY_DESCRIPTOR_B=b.by_descriptor,
                BOUNDS_STRIDE_B=b.bounds_stride,
                **tile_options(shape, tile),
            )
    _sum_products_kernel[(out.numel(),)](out, partials, shape[0], tiles, COUNT=count, BLOCK=_SUM_BLOCK, num_warps=4)
    return out
