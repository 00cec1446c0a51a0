"""expert_mlp: the expert layer and its gradient as grouped products with everything else in their epilogues.

Forward, 3 launches:

    _gate_up_kernel   z = x[token] gate_up_proj[e]^T + bias, a = act(z): x is gathered while it is loaded
    _linear_kernel    slots[n] = w[n] * (a down_proj[e]^T + bias), written at n = t * K + k
    _sum_kernel       out[t] = sum_k slots[t * K + k]

Backward, of which only what is needed runs, at most 4 launches:

    _activation_gradient_kernel   da = d_out[token] down_proj[e]; from z: dz, w a, and sum_i da a per column tile
    _weights_gradient_kernel      d_w[n]: the partial sums in order, and <d_out[token], down_bias[e]>
    _linear_kernel, _sum_kernel   slots[n] = dz gate_up_proj[e], d_x[t] = sum_k slots[t * K + k]

Tiles are found on the device, see `grouped_matmul`; rows behind the last expert come out as zero, so slots need no
other initialisation. Deterministic: each output has one writer and sums run in a fixed order. The activation is
computed in float32 from z as it is stored, so forward and backward see one function.

Workspace, b bytes per element: forward N * (I + H) * b (a, slots); backward N * H * b (slots), N * 2I * b (dz) where
the caller does not want it, 4 * N * ceil(I / tile) (partial sums).
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_unlearn.triton_kernels import configs
from moe_unlearn.triton_kernels.common import round_nearest
from moe_unlearn.triton_kernels.gate import activate, activate_backward
from moe_unlearn.triton_kernels.grouped_matmul import (
    column_slices,
    describable,
    find_tile,
    grid,
    product,
    product_of_halves,
    rows_argument,
    tile_ends,
    weight_argument,
)


def expert_mlp(
    x: Tensor, weights: Tensor, sorted_rows: Tensor, expert_offsets: Tensor, gate_up_proj: Tensor, down_proj: Tensor,
    gate_up_bias: Tensor | None, down_bias: Tensor | None, activation: str, alpha: float, limit: float, shift: float,
    transposed: bool, interleaved: bool, gated: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(output [T, H], z [N, 2I]) in the dtype of x; arguments as `ops.expert_mlp` has them, any strides."""
    if not transposed:
        gate_up_proj, down_proj = gate_up_proj.transpose(1, 2), down_proj.transpose(1, 2)
    (num_experts, hidden, wide), inner = gate_up_proj.shape, down_proj.shape[1]
    num_rows, top_k = weights.numel(), weights.shape[1]
    z = x.new_empty(num_rows, wide)
    if num_rows == 0:
        return x.new_empty(x.shape), z
    pairs = gated and interleaved
    tiles = _tiles(num_rows, hidden, inner, pairs, gate_up_proj, down_proj)
    rows = sorted_rows.contiguous(), expert_offsets.contiguous()
    tile = tiles.gate_up
    weight = weight_argument(gate_up_proj, 2 * tile.columns if pairs else tile.columns, tile)
    a = x.new_empty(num_rows, inner)
    _gate_up_kernel[grid(num_rows, num_experts, inner, tile, x.device)](
        x, *rows, weight.source, _contiguous(gate_up_bias), z, a, num_rows, *x.stride(), *weight.strides,
        alpha, limit, shift, HIDDEN=hidden, INNER=inner, NUM_EXPERTS=num_experts, TOP_K=top_k, GATED=gated,
        INTERLEAVED=interleaved, ACTIVATION=activation, CLAMPED=math.isfinite(limit), ACCESS=weight.access,
        SLICES=tiles.gate_up_slices, **_blocks(tile),
    )  # fmt: skip
    return _linear_to_tokens(a, rows, down_proj, down_bias, weights, top_k, tiles), z


def expert_mlp_backward(
    grad_out: Tensor, x: Tensor, weights: Tensor, sorted_rows: Tensor, expert_offsets: Tensor, gate_up_proj: Tensor,
    down_proj: Tensor, down_bias: Tensor | None, z: Tensor, activation: str, alpha: float, limit: float, shift: float,
    transposed: bool, interleaved: bool, gated: bool, needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(d_x [T, H], d_weights [T, K], dz [N, 2I], scaled [N, I]); what `needs` does not ask for has no rows."""
    need_x, need_weights, need_z, need_scaled = needs
    if transposed:
        gate_up_proj, down_proj = gate_up_proj.transpose(1, 2), down_proj.transpose(1, 2)
    (num_experts, wide, hidden), inner = gate_up_proj.shape, down_proj.shape[2]
    num_rows, top_k = weights.numel(), weights.shape[1]
    dz, scaled = z.new_empty(num_rows * (need_z or need_x), wide), z.new_empty(num_rows * need_scaled, inner)
    d_x, d_weights = x.new_empty(0, hidden), weights.new_empty(len(weights) * need_weights, top_k)
    if num_rows == 0 or not any(needs):
        return d_x, d_weights, dz, scaled
    tiles = _tiles(num_rows, hidden, inner, gated and interleaved, gate_up_proj, down_proj)
    rows = sorted_rows.contiguous(), expert_offsets.contiguous()
    tile = tiles.activation
    weight = weight_argument(down_proj, tile.columns, tile)
    parts = triton.cdiv(inner, tile.columns)
    partial = z.new_empty(parts * need_weights, num_rows, dtype=torch.float32)
    _activation_gradient_kernel[grid(num_rows, num_experts, inner, tile, x.device)](
        grad_out, *rows, weight.source, weights.contiguous(), z.contiguous(),
        dz if need_z or need_x else None, scaled if need_scaled else None, partial if need_weights else None,
        num_rows, *grad_out.stride(), *weight.strides, alpha, limit, shift,
        HIDDEN=hidden, INNER=inner, NUM_EXPERTS=num_experts, TOP_K=top_k, GATED=gated, INTERLEAVED=interleaved,
        ACTIVATION=activation, CLAMPED=math.isfinite(limit), ACCESS=weight.access, SLICES=tiles.activation_slices,
        **_blocks(tile), maxnreg=tiles.activation_registers,
    )  # fmt: skip
    if need_weights:
        row_tiles = triton.cdiv(num_rows, tiles.weights_rows) + min(num_rows, num_experts + 1)
        _weights_gradient_kernel[(row_tiles,)](
            partial, grad_out, *rows, _contiguous(down_bias), d_weights, num_rows, *grad_out.stride(),
            HIDDEN=hidden, PARTS=parts, NUM_EXPERTS=num_experts, TOP_K=top_k, BLOCK_ROWS=tiles.weights_rows,
            BLOCK_HIDDEN=tiles.weights_hidden, num_warps=4,
        )  # fmt: skip
    if need_x:
        d_x = _linear_to_tokens(dz, rows, gate_up_proj, None, None, top_k, tiles)
    return d_x, d_weights, dz if need_z else z.new_empty(0, wide), scaled


def _linear_to_tokens(
    left: Tensor, rows: tuple[Tensor, Tensor], weight: Tensor, bias: Tensor | None, weights: Tensor | None, top_k: int,
    tiles: configs.ExpertMLP,
) -> Tensor:  # fmt: skip
    """[T, columns]: over k, the sum of weights[t, k] * (left weight[e] + bias[e]), weight [E, depth, columns]."""
    (num_rows, depth), (num_experts, _, columns), tile = left.shape, weight.shape, tiles.linear
    slots = left.new_empty(num_rows, columns)
    argument = weight_argument(weight, tile.columns, tile)
    _linear_kernel[grid(num_rows, num_experts, columns, tile, left.device)](
        rows_argument(left, tile), *rows, argument.source, _contiguous(bias), _contiguous(weights), slots, num_rows,
        *argument.strides, COLUMNS=columns, DEPTH=depth, NUM_EXPERTS=num_experts, ACCESS=argument.access,
        DESCRIPTOR=tile.descriptors, **_blocks(tile),
    )  # fmt: skip
    out = left.new_empty(num_rows // top_k, columns)
    _sum_kernel[len(out), triton.cdiv(columns, tiles.sum_columns)](
        slots, out, COLUMNS=columns, TOP_K=top_k, BLOCK=tiles.sum_columns, num_warps=4
    )
    return out


def _tiles(num_rows: int, hidden: int, inner: int, pairs: bool, *weights: Tensor) -> configs.ExpertMLP:
    rows_per_expert, dtype = num_rows // len(weights[0]), weights[0].dtype
    aligned = inner * dtype.itemsize % 16 == 0 and all(describable(w) or describable(w.mT) for w in weights)
    arch = configs.architecture(weights[0].device)
    return configs.expert_mlp(rows_per_expert, hidden, pairs, dtype, arch, aligned)


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _blocks(tile: configs.MatmulTile) -> dict[str, int]:
    return {
        "BLOCK_ROWS": tile.rows, "BLOCK_COLUMNS": tile.columns, "BLOCK_DEPTH": tile.depth, "GROUP": tile.group,
        "num_warps": tile.num_warps, "num_stages": tile.num_stages,
    }  # fmt: skip


@triton.jit(do_not_specialize=["num_rows"])
def _gate_up_kernel(
    x, sorted_rows, expert_offsets, weight, bias, z, a, num_rows,
    x_row, x_depth, stride_expert, stride_column, stride_depth, alpha, limit, shift,
    HIDDEN: tl.constexpr, INNER: tl.constexpr, NUM_EXPERTS: tl.constexpr, TOP_K: tl.constexpr,
    GATED: tl.constexpr, INTERLEAVED: tl.constexpr, ACTIVATION: tl.constexpr, CLAMPED: tl.constexpr,
    ACCESS: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, BLOCK_DEPTH: tl.constexpr,
    GROUP: tl.constexpr, SLICES: tl.constexpr,
):  # fmt: skip
    """Tiles [BLOCK_ROWS, BLOCK_COLUMNS] of the activation, and of z the same columns of both halves."""
    COLUMN_TILES: tl.constexpr = (INNER + BLOCK_COLUMNS - 1) // BLOCK_COLUMNS
    BOTH: tl.constexpr = 2 if GATED and INTERLEAVED else 1
    ends = tile_ends(expert_offsets, num_rows, NUM_EXPERTS, BLOCK_ROWS)
    for tile in range(tl.program_id(0), tl.max(ends, 0) * COLUMN_TILES, tl.num_programs(0)):
        expert, first, stop, column_tile = find_tile(
            tile, ends, expert_offsets, num_rows, COLUMN_TILES, NUM_EXPERTS, BLOCK_ROWS, GROUP
        )
        row = first + tl.arange(0, BLOCK_ROWS)
        token = (tl.load(sorted_rows + row, mask=row < stop, other=0) // TOP_K).to(tl.int64)
        start = column_tile * BLOCK_COLUMNS
        if GATED and not INTERLEAVED:
            gate, up = product_of_halves(
                x, token, x_row, x_depth, weight, expert, start, stride_expert, stride_column, stride_depth,
                INNER, HIDDEN, NUM_EXPERTS, BLOCK_ROWS, BLOCK_COLUMNS, BLOCK_DEPTH, ACCESS, False,
            )  # fmt: skip
        else:
            gate = product(
                x, token, x_row, x_depth, weight, expert, BOTH * start, stride_expert, stride_column, stride_depth,
                BOTH * INNER, HIDDEN, NUM_EXPERTS, BLOCK_ROWS, BOTH * BLOCK_COLUMNS, BLOCK_DEPTH, ACCESS, False,
            )  # fmt: skip
            up = gate
        gates, ups = column_slices(gate, SLICES), column_slices(up, SLICES)
        for i in tl.static_range(SLICES):
            _store_activation(
                gates[i], ups[i], row, stop, start + i * (BLOCK_COLUMNS // SLICES), expert, bias, z, a,
                alpha, limit, shift, INNER, NUM_EXPERTS, GATED, INTERLEAVED, ACTIVATION, CLAMPED,
                BLOCK_ROWS, BLOCK_COLUMNS // SLICES,
            )  # fmt: skip


@triton.jit
def _store_activation(
    gate, up, row, stop, start, expert, bias, z, a, alpha, limit, shift,
    INNER: tl.constexpr, NUM_EXPERTS: tl.constexpr, GATED: tl.constexpr, INTERLEAVED: tl.constexpr,
    ACTIVATION: tl.constexpr, CLAMPED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Columns [start, start + COLUMNS) of a and theirs of z. Interleaved, `gate` holds gate and up, in pairs."""
    WIDE: tl.constexpr = 2 * INNER if GATED else INNER
    dtype: tl.constexpr = z.dtype.element_ty
    here = row[:, None] < stop
    column = start + tl.arange(0, COLUMNS)
    inside = here & (column[None, :] < INNER)
    z_row = z + row[:, None].to(tl.int64) * WIDE
    if GATED and INTERLEAVED:
        pair = 2 * start + tl.arange(0, 2 * COLUMNS)
        if bias is not None:
            gate += _bias(bias, expert, pair, WIDE, NUM_EXPERTS)
        pairs = round_nearest(gate, dtype)
        tl.store(z_row + pair[None, :], pairs, mask=here & (pair[None, :] < WIDE))
        gate, up = tl.split(tl.reshape(pairs, (ROWS, COLUMNS, 2)))
    else:
        if bias is not None:
            gate += _bias(bias, expert, column, WIDE, NUM_EXPERTS)
        gate = round_nearest(gate, dtype)
        tl.store(z_row + column[None, :], gate, mask=inside)
        if GATED:
            if bias is not None:
                up += _bias(bias, expert, INNER + column, WIDE, NUM_EXPERTS)
            up = round_nearest(up, dtype)
            tl.store(z_row + INNER + column[None, :], up, mask=inside)
    value = activate(gate.to(tl.float32), up.to(tl.float32), alpha, limit, shift, ACTIVATION, CLAMPED, GATED)
    tl.store(a + row[:, None].to(tl.int64) * INNER + column[None, :], round_nearest(value, dtype), mask=inside)


@triton.jit(do_not_specialize=["num_rows"])
def _linear_kernel(
    left, sorted_rows, expert_offsets, weight, bias, row_weights, slots, num_rows,
    stride_expert, stride_column, stride_depth,
    COLUMNS: tl.constexpr, DEPTH: tl.constexpr, NUM_EXPERTS: tl.constexpr, ACCESS: tl.constexpr,
    DESCRIPTOR: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, BLOCK_DEPTH: tl.constexpr,
    GROUP: tl.constexpr,
):  # fmt: skip
    """slots[sorted_rows[j]] = row_weights * (left[j] weight[e]^T + bias[e]); both factors may be absent."""
    COLUMN_TILES: tl.constexpr = (COLUMNS + BLOCK_COLUMNS - 1) // BLOCK_COLUMNS
    ends = tile_ends(expert_offsets, num_rows, NUM_EXPERTS, BLOCK_ROWS)
    for tile in range(tl.program_id(0), tl.max(ends, 0) * COLUMN_TILES, tl.num_programs(0)):
        expert, first, stop, column_tile = find_tile(
            tile, ends, expert_offsets, num_rows, COLUMN_TILES, NUM_EXPERTS, BLOCK_ROWS, GROUP
        )
        row = first + tl.arange(0, BLOCK_ROWS)
        if DESCRIPTOR:
            rows = first
        else:
            rows = tl.where(row < stop, row, first).to(tl.int64)
        start = column_tile * BLOCK_COLUMNS
        total = product(
            left, rows, DEPTH, 1, weight, expert, start, stride_expert, stride_column, stride_depth,
            COLUMNS, DEPTH, NUM_EXPERTS, BLOCK_ROWS, BLOCK_COLUMNS, BLOCK_DEPTH, ACCESS, DESCRIPTOR,
        )  # fmt: skip
        column = start + tl.arange(0, BLOCK_COLUMNS)
        if bias is not None:
            total += _bias(bias, expert, column, COLUMNS, NUM_EXPERTS)
        slot = tl.load(sorted_rows + row, mask=row < stop, other=0).to(tl.int64)
        if row_weights is not None:
            # rows behind the last expert stay zero whatever their weight holds
            counted = row < tl.where(expert < NUM_EXPERTS, stop, 0)
            total *= tl.load(row_weights + slot, mask=counted, other=0.0).to(tl.float32)[:, None]
        mask = (row[:, None] < stop) & (column[None, :] < COLUMNS)
        result = round_nearest(total, slots.dtype.element_ty)
        tl.store(slots + slot[:, None] * COLUMNS + column[None, :], result, mask=mask)


@triton.jit
def _sum_kernel(slots, out, COLUMNS: tl.constexpr, TOP_K: tl.constexpr, BLOCK: tl.constexpr):
    """out[t] = slots[t * K] + ... + slots[t * K + K - 1], added in float32 in this order."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for k in tl.static_range(TOP_K):
        row = slots + (token * TOP_K + k) * COLUMNS
        total += tl.load(row + column, mask=column < COLUMNS, other=0.0).to(tl.float32)
    tl.store(out + token * COLUMNS + column, round_nearest(total, out.dtype.element_ty), mask=column < COLUMNS)


@triton.jit(do_not_specialize=["num_rows"])
def _activation_gradient_kernel(
    grad_out, sorted_rows, expert_offsets, weight, row_weights, z, dz, scaled, partial, num_rows,
    grad_row, grad_depth, stride_expert, stride_column, stride_depth, alpha, limit, shift,
    HIDDEN: tl.constexpr, INNER: tl.constexpr, NUM_EXPERTS: tl.constexpr, TOP_K: tl.constexpr,
    GATED: tl.constexpr, INTERLEAVED: tl.constexpr, ACTIVATION: tl.constexpr, CLAMPED: tl.constexpr,
    ACCESS: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, BLOCK_DEPTH: tl.constexpr,
    GROUP: tl.constexpr, SLICES: tl.constexpr,
):  # fmt: skip
    """dz, scaled = w a and partial[column tile, j] = sum_i da[j, i] a[j, i]; each may be absent."""
    COLUMN_TILES: tl.constexpr = (INNER + BLOCK_COLUMNS - 1) // BLOCK_COLUMNS
    ends = tile_ends(expert_offsets, num_rows, NUM_EXPERTS, BLOCK_ROWS)
    for tile in range(tl.program_id(0), tl.max(ends, 0) * COLUMN_TILES, tl.num_programs(0)):
        expert, first, stop, column_tile = find_tile(
            tile, ends, expert_offsets, num_rows, COLUMN_TILES, NUM_EXPERTS, BLOCK_ROWS, GROUP
        )
        row = first + tl.arange(0, BLOCK_ROWS)
        slot = tl.load(sorted_rows + row, mask=row < stop, other=0).to(tl.int64)
        start = column_tile * BLOCK_COLUMNS
        if dz is not None or partial is not None:
            da = product(
                grad_out, slot // TOP_K, grad_row, grad_depth, weight, expert, start,
                stride_expert, stride_column, stride_depth,
                INNER, HIDDEN, NUM_EXPERTS, BLOCK_ROWS, BLOCK_COLUMNS, BLOCK_DEPTH, ACCESS, False,
            )  # fmt: skip
        else:
            da = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.float32)
        # rows behind the last expert: z and weights are read as zero, whatever they hold
        used = tl.where(expert < NUM_EXPERTS, stop, 0)
        weights = tl.load(row_weights + slot, mask=row < used, other=0.0).to(tl.float32)
        parts = column_slices(da, SLICES)
        total = tl.zeros((BLOCK_ROWS,), tl.float32)
        for i in tl.static_range(SLICES):
            total += _store_gradient(
                parts[i], weights, row, stop, used, start + i * (BLOCK_COLUMNS // SLICES), z, dz, scaled, partial,
                alpha, limit, shift, INNER, GATED, INTERLEAVED, ACTIVATION, CLAMPED,
                BLOCK_ROWS, BLOCK_COLUMNS // SLICES,
            )  # fmt: skip
        if partial is not None:
            tl.store(partial + column_tile.to(tl.int64) * num_rows + row, total, mask=row < stop)


@triton.jit
def _store_gradient(
    da, weights, row, stop, used, start, z, dz, scaled, partial, alpha, limit, shift,
    INNER: tl.constexpr, GATED: tl.constexpr, INTERLEAVED: tl.constexpr, ACTIVATION: tl.constexpr,
    CLAMPED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Columns [start, start + COLUMNS) of scaled and theirs of dz; returns sum_i da[j, i] a[j, i] over them."""
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
    total = tl.zeros((ROWS,), tl.float32)
    if scaled is not None or partial is not None:
        a = activate(gate, up, alpha, limit, shift, ACTIVATION, CLAMPED, GATED)
        if partial is not None:
            total = tl.sum(tl.where(known, da * a, 0.0), 1)
        if scaled is not None:
            narrow = round_nearest(a * weights[:, None], dtype)
            tl.store(scaled + row[:, None].to(tl.int64) * INNER + column[None, :], narrow, mask=inside)
    if dz is not None:
        weighted = da * weights[:, None]
        d_gate, d_up = activate_backward(gate, up, weighted, alpha, limit, shift, ACTIVATION, CLAMPED, GATED)
        d_gate = round_nearest(d_gate, dtype)
        if GATED:
            d_up = round_nearest(d_up, dtype)
        if GATED and INTERLEAVED:
            joined = tl.reshape(tl.join(d_gate, d_up), (ROWS, 2 * COLUMNS))
            tl.store(dz + wide_row + pair[None, :], joined, mask=(row[:, None] < stop) & (pair[None, :] < WIDE))
        else:
            tl.store(dz + wide_row + column[None, :], d_gate, mask=inside)
            if GATED:
                tl.store(dz + wide_row + INNER + column[None, :], d_up, mask=inside)
    return total


@triton.jit(do_not_specialize=["num_rows"])
def _weights_gradient_kernel(
    partial, grad_out, sorted_rows, expert_offsets, bias, d_weights, num_rows, grad_row, grad_depth,
    HIDDEN: tl.constexpr, PARTS: tl.constexpr, NUM_EXPERTS: tl.constexpr, TOP_K: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_HIDDEN: tl.constexpr,
):  # fmt: skip
    """d_weights[sorted_rows[j]] = sum over the column tiles of partial[:, j] + <grad_out[token], bias[e]>."""
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
        grad = grad_out + (slot // TOP_K)[:, None] * grad_row
        products = tl.zeros((BLOCK_ROWS, BLOCK_HIDDEN), tl.float32)
        for start in range(0, tl.where(expert < NUM_EXPERTS, HIDDEN, 0), BLOCK_HIDDEN):
            column = start + tl.arange(0, BLOCK_HIDDEN)
            mask = (row[:, None] < stop) & (column[None, :] < HIDDEN)
            g = tl.load(grad + column[None, :].to(tl.int64) * grad_depth, mask=mask, other=0.0).to(tl.float32)
            products += g * _bias(bias, expert, column, HIDDEN, NUM_EXPERTS)
        total += tl.sum(products, 1)
    tl.store(d_weights + slot, round_nearest(total, d_weights.dtype.element_ty), mask=row < stop)


@triton.jit
def _bias(bias, expert, column, COLUMNS: tl.constexpr, NUM_EXPERTS: tl.constexpr):
    """bias[expert], a row of COLUMNS, at `column`: float32 [1, columns]; zero for the segment of no expert."""
    mask = column < tl.where(expert < NUM_EXPERTS, COLUMNS, 0)
    return tl.load(bias + expert.to(tl.int64) * COLUMNS + column, mask=mask, other=0.0).to(tl.float32)[None, :]
