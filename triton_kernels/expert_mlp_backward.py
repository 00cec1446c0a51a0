"""expert_mlp, backward: computes dgrad and the factors of the weight gradients.

It takes at most 4 launches; only those that are needed run:

    _activation_gradient_kernel   da = d_out[token] down_proj[e]; from z: dz, w a, sum_i da a per column tile, and
                                  the largest |dz| and |w a| of each tile
    _weights_gradient_kernel      d_w[n]: the partial sums in order, and <d_out[token], down_bias[e]>
    _linear_kernel, _sum_kernel   slots[n] = dz gate_up_proj[e], d_x[t] = sum_k slots[t * K + k]

Tiles, slots and rounding are those of the forward pass, see `expert_mlp`; the results are deterministic too.

Workspace, b bytes per element: N * H * b (slots), N * 2I * b (dz, if the caller does not want it),
4 * N * ceil(I / tile) (partial sums), 8 bytes per tile (largest values).
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_unlearn.triton_kernels.common import ceil_div, round_nearest, widen
from moe_unlearn.triton_kernels.expert_mlp import bias_of, blocks, contiguous, linear_to_tokens, tiles_of
from moe_unlearn.triton_kernels.gate import activate, activate_backward
from moe_unlearn.triton_kernels.grouped_matmul import (
    column_slices,
    find_tile,
    grid,
    most_row_tiles,
    product,
    tile_ends,
    weight_argument,
)


def expert_mlp_backward(
    grad_out: Tensor, x: Tensor, weights: Tensor, sorted_rows: Tensor, expert_offsets: Tensor, gate_up_proj: Tensor,
    down_proj: Tensor, down_bias: Tensor | None, z: Tensor, activation: str, alpha: float, limit: float, shift: float,
    transposed: bool, interleaved: bool, gated: bool, needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Compute (d_x [T, H], d_weights [T, K], dz [N, 2I], scaled [N, I], largest [2]), as in `ops.expert_mlp`.

    Results that `needs` does not ask for have no rows.
    """
    need_x, need_weights, need_z, need_scaled, need_largest = needs
    if transposed:
        gate_up_proj, down_proj = gate_up_proj.transpose(1, 2), down_proj.transpose(1, 2)
    (num_experts, wide, hidden), inner = gate_up_proj.shape, down_proj.shape[2]
    num_rows, top_k = weights.numel(), weights.shape[1]
    dz, scaled = z.new_empty(num_rows * (need_z or need_x), wide), z.new_empty(num_rows * need_scaled, inner)
    d_x, d_weights = x.new_empty(0, hidden), weights.new_empty(len(weights) * need_weights, top_k)
    if num_rows == 0 or not any(needs):
        return d_x, d_weights, dz, scaled, x.new_zeros(2 * need_largest, dtype=torch.float32)
    tiles = tiles_of(num_rows, hidden, inner, gated and interleaved, gate_up_proj, down_proj)
    rows = sorted_rows.contiguous(), expert_offsets.contiguous()
    tile = tiles.activation
    weight = weight_argument(down_proj, tile.columns, tile)
    parts = ceil_div(inner, tile.columns)
    partial = z.new_empty(parts * need_weights, num_rows, dtype=torch.float32)
    most_tiles = most_row_tiles(num_rows, num_experts, tile.rows) * parts
    # bits of float32; zeros, since a tile of this upper bound may not exist; both rows begin at a multiple of 16 bytes,
    # since a kernel is compiled anew for an address that does not
    largest = z.new_zeros(2, ceil_div(most_tiles, 4) * 4 * need_largest, dtype=torch.int32)
    _activation_gradient_kernel[grid(num_rows, num_experts, inner, tile, x.device)](
        grad_out, *rows, weight.source, weights.contiguous(), z.contiguous(),
        dz if need_z or need_x else None, scaled if need_scaled else None, partial if need_weights else None,
        largest[0] if need_largest and need_z else None, largest[1] if need_largest and need_scaled else None, num_rows,
        *grad_out.stride(), *weight.strides, alpha, limit, shift,
        HIDDEN=hidden, INNER=inner, NUM_EXPERTS=num_experts, TOP_K=top_k, GATED=gated, INTERLEAVED=interleaved,
        ACTIVATION=activation, CLAMPED=math.isfinite(limit), ACCESS=weight.access, SLICES=tiles.activation_slices,
        **blocks(tile), maxnreg=tiles.activation_registers,
    )  # fmt: skip
    if need_weights:
        _weights_gradient_kernel[(most_row_tiles(num_rows, num_experts, tiles.weights_rows),)](
            partial,
            grad_out,
            *rows,
            contiguous(down_bias),
            d_weights,
            num_rows,
            *grad_out.stride(),
            HIDDEN=hidden,
            PARTS=parts,
            NUM_EXPERTS=num_experts,
            TOP_K=top_k,
            BLOCK_ROWS=tiles.weights_rows,
            BLOCK_HIDDEN=tiles.weights_hidden,
            num_warps=4,
        )
    if need_x:
        d_x = linear_to_tokens(dz, rows, gate_up_proj, None, None, top_k, tiles)
    largest = largest.amax(1).view(torch.float32) if need_largest else x.new_empty(0, dtype=torch.float32)
    return d_x, d_weights, dz if need_z else z.new_empty(0, wide), scaled, largest


@triton.jit(do_not_specialize=["num_rows"])
def _activation_gradient_kernel(
    grad_out, sorted_rows, expert_offsets, weight, row_weights, z, dz, scaled, partial, dz_largest,
    scaled_largest, num_rows, stride_grad_row, stride_grad_depth, stride_expert, stride_column, stride_depth,
    alpha, limit, shift,
    HIDDEN: tl.constexpr, INNER: tl.constexpr, NUM_EXPERTS: tl.constexpr, TOP_K: tl.constexpr,
    GATED: tl.constexpr, INTERLEAVED: tl.constexpr, ACTIVATION: tl.constexpr, CLAMPED: tl.constexpr,
    ACCESS: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, BLOCK_DEPTH: tl.constexpr,
    GROUP: tl.constexpr, SLICES: tl.constexpr,
):  # fmt: skip
    """Compute dz, scaled = w a, partial[column tile, j] = sum_i da[j, i] a[j, i] and the largest values of each tile.

    The largest |dz| and |scaled| are stored as bits. Each output may be absent.
    """
    COLUMN_TILES: tl.constexpr = (INNER + BLOCK_COLUMNS - 1) // BLOCK_COLUMNS
    ends = tile_ends(expert_offsets, num_rows, NUM_EXPERTS, BLOCK_ROWS)
    for tile in range(tl.program_id(0), tl.max(ends, 0) * COLUMN_TILES, tl.num_programs(0)):
        expert, first, stop, column_tile = find_tile(
            tile, ends, expert_offsets, num_rows, COLUMN_TILES, NUM_EXPERTS, BLOCK_ROWS, GROUP
        )
        row = first + tl.arange(0, BLOCK_ROWS)
        slot = tl.load(sorted_rows + row, mask=row < stop, other=0)
        # z and weights of rows behind the last expert are read as zero, whatever they hold
        used = tl.where(expert < NUM_EXPERTS, stop, 0)
        # asked for before the product, which takes longer
        weights = tl.load(row_weights + slot, mask=row < used, other=0.0).to(tl.float32)
        start = column_tile * BLOCK_COLUMNS
        if dz is not None or partial is not None:
            da = product(
                grad_out, (slot // TOP_K).to(tl.int64), stride_grad_row, stride_grad_depth, weight, expert, start,
                stride_expert, stride_column, stride_depth,
                INNER, HIDDEN, NUM_EXPERTS, BLOCK_ROWS, BLOCK_COLUMNS, BLOCK_DEPTH, ACCESS, False,
            )  # fmt: skip
        else:
            da = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.float32)
        parts = column_slices(da, SLICES)
        total = tl.zeros((BLOCK_ROWS,), tl.float32)
        of_dz = tl.zeros((BLOCK_ROWS,), tl.int32)
        of_scaled = tl.zeros((BLOCK_ROWS,), tl.int32)
        for i in tl.static_range(SLICES):
            total, of_dz, of_scaled = _store_gradient(
                parts[i], weights, row, stop, used, start + i * (BLOCK_COLUMNS // SLICES), z, dz, scaled, partial,
                dz_largest, scaled_largest, total, of_dz, of_scaled, alpha, limit, shift,
                INNER, GATED, INTERLEAVED, ACTIVATION, CLAMPED, BLOCK_ROWS, BLOCK_COLUMNS // SLICES,
            )  # fmt: skip
        if dz_largest is not None:
            tl.store(dz_largest + tile, tl.max(of_dz, 0))
        if scaled_largest is not None:
            tl.store(scaled_largest + tile, tl.max(of_scaled, 0))
        if partial is not None:
            tl.store(partial + column_tile.to(tl.int64) * num_rows + row, total, mask=row < stop)


@triton.jit
def _store_gradient(
    da, weights, row, stop, used, start, z, dz, scaled, partial, dz_largest, scaled_largest, total, of_dz, of_scaled,
    alpha, limit, shift, INNER: tl.constexpr, GATED: tl.constexpr, INTERLEAVED: tl.constexpr, ACTIVATION: tl.constexpr,
    CLAMPED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Store columns [start, start + COLUMNS) of scaled and those of dz, and update the totals of each row.

    The totals are the sum of da a and the bits of the largest |dz| and |scaled|.
    """
    WIDE: tl.constexpr = 2 * INNER if GATED else INNER
    dtype: tl.constexpr = z.dtype.element_ty
    column = start + tl.arange(0, COLUMNS)
    pair = 2 * start + tl.arange(0, 2 * COLUMNS)
    inside = (row[:, None] < stop) & (column[None, :] < INNER)
    known = (row[:, None] < used) & (column[None, :] < INNER)
    wide_row = row[:, None].to(tl.int64) * WIDE
    if GATED and INTERLEAVED:
        known_pairs = (row[:, None] < used) & (pair[None, :] < WIDE)
        pairs = tl.load(z + wide_row + pair[None, :], mask=known_pairs, other=0.0)
        gate, up = tl.split(tl.reshape(pairs, (ROWS, COLUMNS, 2)))
    else:
        gate = tl.load(z + wide_row + column[None, :], mask=known, other=0.0)
        up = gate
        if GATED:
            up = tl.load(z + wide_row + INNER + column[None, :], mask=known, other=0.0)
    gate, up = gate.to(tl.float32), up.to(tl.float32)
    if scaled is not None or partial is not None:
        a = activate(gate, up, alpha, limit, shift, ACTIVATION, CLAMPED, GATED)
        if partial is not None:
            total += tl.sum(tl.where(known, da * a, 0.0), 1)
        if scaled is not None:
            narrow = round_nearest(a * weights[:, None], dtype)
            tl.store(scaled + row[:, None].to(tl.int64) * INNER + column[None, :], narrow, mask=inside)
            if scaled_largest is not None:
                of_scaled = _larger(of_scaled, narrow, known)
    if dz is not None:
        weighted = da * weights[:, None]
        d_gate, d_up = activate_backward(gate, up, weighted, alpha, limit, shift, ACTIVATION, CLAMPED, GATED)
        d_gate = round_nearest(d_gate, dtype)
        if GATED:
            d_up = round_nearest(d_up, dtype)
        if dz_largest is not None:
            of_dz = _larger(of_dz, d_gate, known)
            if GATED:
                of_dz = _larger(of_dz, d_up, known)
        if GATED and INTERLEAVED:
            joined = tl.reshape(tl.join(d_gate, d_up), (ROWS, 2 * COLUMNS))
            tl.store(dz + wide_row + pair[None, :], joined, mask=(row[:, None] < stop) & (pair[None, :] < WIDE))
        else:
            tl.store(dz + wide_row + column[None, :], d_gate, mask=inside)
            if GATED:
                tl.store(dz + wide_row + INNER + column[None, :], d_up, mask=inside)
    return total, of_dz, of_scaled


@triton.jit
def _larger(bits, values, known):
    """Return the larger, for each row, of `bits` and those of the largest |value|; as integers NaN is the largest."""
    own = widen(values).to(tl.int32, bitcast=True) & 0x7FFFFFFF
    return tl.maximum(bits, tl.max(tl.where(known, own, 0), 1))


@triton.jit(do_not_specialize=["num_rows"])
def _weights_gradient_kernel(
    partial,
    grad_out,
    sorted_rows,
    expert_offsets,
    bias,
    d_weights,
    num_rows,
    stride_grad_row,
    stride_grad_depth,
    HIDDEN: tl.constexpr,
    PARTS: tl.constexpr,
    NUM_EXPERTS: tl.constexpr,
    TOP_K: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_HIDDEN: tl.constexpr,
):
    """Compute d_weights[sorted_rows[j]] = sum over the column tiles of partial[:, j] + <grad_out[token], bias[e]>."""
    ends = tile_ends(expert_offsets, num_rows, NUM_EXPERTS, BLOCK_ROWS)
    tile = tl.program_id(0)
    if tile >= tl.max(ends, 0):
        return
    expert, first, stop, _ = find_tile(tile, ends, expert_offsets, num_rows, 1, NUM_EXPERTS, BLOCK_ROWS, 1)
    row = first + tl.arange(0, BLOCK_ROWS)
    slot = tl.load(sorted_rows + row, mask=row < stop, other=0).to(tl.int64)
    total = tl.zeros((BLOCK_ROWS,), tl.float32)
    for part in range(PARTS):
        total += tl.load(partial + tl.cast(part, tl.int64) * num_rows + row, mask=row < stop, other=0.0)
    if bias is not None:
        grad = grad_out + (slot // TOP_K)[:, None] * stride_grad_row
        products = tl.zeros((BLOCK_ROWS, BLOCK_HIDDEN), tl.float32)
        for start in range(0, tl.where(expert < NUM_EXPERTS, HIDDEN, 0), BLOCK_HIDDEN):
            column = start + tl.arange(0, BLOCK_HIDDEN)
            mask = (row[:, None] < stop) & (column[None, :] < HIDDEN)
            g = tl.load(grad + column[None, :].to(tl.int64) * stride_grad_depth, mask=mask, other=0.0).to(tl.float32)
            products += g * bias_of(bias, expert, column, HIDDEN, NUM_EXPERTS)
        total += tl.sum(products, 1)
    tl.store(d_weights + slot, round_nearest(total, d_weights.dtype.element_ty), mask=row < stop)
