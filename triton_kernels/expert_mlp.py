"""expert_mlp: computes the expert layer as grouped products, with everything else in their epilogues.

Forward, 3 launches:

    _gate_up_kernel   z = x[token] gate_up_proj[e]^T + bias, a = act(z): x is gathered while it is loaded
    _linear_kernel    slots[n] = w[n] * (a down_proj[e]^T + bias), written at n = t * K + k
    _sum_kernel       out[t] = sum_k slots[t * K + k]

The backward pass is in `expert_mlp_backward`.

Programs find their tiles on the device, see `grouped_matmul`; rows behind the last expert come out as zero, so that
slots need no other initialisation. The results are deterministic: each output has one writer and sums run in a fixed
order. The activation is computed in float32 from the stored z, so that forward and backward use one function.

Workspace, b bytes per element: N * (I + H) * b (a, slots).
"""

import math

import triton
import triton.language as tl
from torch import Tensor

from moe_unlearn.triton_kernels import configs
from moe_unlearn.triton_kernels.common import ceil_div, round_nearest
from moe_unlearn.triton_kernels.gate import activate
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
    x: Tensor,
    weights: Tensor,
    sorted_rows: Tensor,
    expert_offsets: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    activation: str,
    alpha: float,
    limit: float,
    shift: float,
    transposed: bool,
    interleaved: bool,
    gated: bool,
) -> tuple[Tensor, Tensor]:
    """Compute (output [T, H], z [N, 2I]) in the dtype of x; arguments as in `ops.expert_mlp`, any strides."""
    if not transposed:
        gate_up_proj, down_proj = gate_up_proj.transpose(1, 2), down_proj.transpose(1, 2)
    (num_experts, hidden, wide), inner = gate_up_proj.shape, down_proj.shape[1]
    num_rows, top_k = weights.numel(), weights.shape[1]
    z = x.new_empty(num_rows, wide)
    if num_rows == 0:
        return x.new_empty(x.shape), z
    pairs = gated and interleaved
    tiles = tiles_of(num_rows, hidden, inner, pairs, gate_up_proj, down_proj)
    rows = sorted_rows.contiguous(), expert_offsets.contiguous()
    tile = tiles.gate_up
    weight = weight_argument(gate_up_proj, 2 * tile.columns if pairs else tile.columns, tile)
    a = x.new_empty(num_rows, inner)
    _gate_up_kernel[grid(num_rows, num_experts, inner, tile, x.device)](
        x, *rows, weight.source, contiguous(gate_up_bias), z, a, num_rows, *x.stride(), *weight.strides,
        alpha, limit, shift, HIDDEN=hidden, INNER=inner, NUM_EXPERTS=num_experts, TOP_K=top_k, GATED=gated,
        INTERLEAVED=interleaved, ACTIVATION=activation, CLAMPED=math.isfinite(limit), ACCESS=weight.access,
        SLICES=tiles.gate_up_slices, **blocks(tile),
    )  # fmt: skip
    return linear_to_tokens(a, rows, down_proj, down_bias, weights, top_k, tiles), z


def linear_to_tokens(
    left: Tensor,
    rows: tuple[Tensor, Tensor],
    weight: Tensor,
    bias: Tensor | None,
    weights: Tensor | None,
    top_k: int,
    tiles: configs.ExpertMLP,
) -> Tensor:
    """Compute the sum over k of weights[t, k] * (left weight[e] + bias[e]), [T, columns].

    weight is [E, depth, columns].
    """
    (num_rows, depth), (num_experts, _, columns), tile = left.shape, weight.shape, tiles.linear
    slots = left.new_empty(num_rows, columns)
    argument = weight_argument(weight, tile.columns, tile)
    _linear_kernel[grid(num_rows, num_experts, columns, tile, left.device)](
        rows_argument(left, tile),
        *rows,
        argument.source,
        contiguous(bias),
        contiguous(weights),
        slots,
        num_rows,
        *argument.strides,
        COLUMNS=columns,
        DEPTH=depth,
        NUM_EXPERTS=num_experts,
        ACCESS=argument.access,
        DESCRIPTOR=tile.descriptors,
        **blocks(tile),
    )
    out = left.new_empty(num_rows // top_k, columns)
    _sum_kernel[len(out), ceil_div(columns, tiles.sum_columns)](
        slots, out, COLUMNS=columns, TOP_K=top_k, BLOCK=tiles.sum_columns, num_warps=4
    )
    return out


def tiles_of(num_rows: int, hidden: int, inner: int, pairs: bool, *weights: Tensor) -> configs.ExpertMLP:
    rows_per_expert, dtype = num_rows // len(weights[0]), weights[0].dtype
    aligned = inner * dtype.itemsize % 16 == 0 and all(describable(w) or describable(w.mT) for w in weights)
    arch = configs.architecture(weights[0].device)
    return configs.expert_mlp(rows_per_expert, hidden, pairs, dtype, arch, aligned)


def contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def blocks(tile: configs.MatmulTile) -> dict[str, int]:
    return {
        "BLOCK_ROWS": tile.rows,
        "BLOCK_COLUMNS": tile.columns,
        "BLOCK_DEPTH": tile.depth,
        "GROUP": tile.group,
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
    }


@triton.jit(do_not_specialize=["num_rows"])
def _gate_up_kernel(
    x, sorted_rows, expert_offsets, weight, bias, z, a, num_rows,
    stride_x_row, stride_x_depth, stride_expert, stride_column, stride_depth, alpha, limit, shift,
    HIDDEN: tl.constexpr, INNER: tl.constexpr, NUM_EXPERTS: tl.constexpr, TOP_K: tl.constexpr,
    GATED: tl.constexpr, INTERLEAVED: tl.constexpr, ACTIVATION: tl.constexpr, CLAMPED: tl.constexpr,
    ACCESS: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, BLOCK_DEPTH: tl.constexpr,
    GROUP: tl.constexpr, SLICES: tl.constexpr,
):  # fmt: skip
    """Compute tiles [BLOCK_ROWS, BLOCK_COLUMNS] of the activation, and the same columns of both halves of z."""
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
                x, token, stride_x_row, stride_x_depth, weight, expert, start,
                stride_expert, stride_column, stride_depth,
                INNER, HIDDEN, NUM_EXPERTS, BLOCK_ROWS, BLOCK_COLUMNS, BLOCK_DEPTH, ACCESS, False,
            )  # fmt: skip
        else:
            gate = product(
                x, token, stride_x_row, stride_x_depth, weight, expert, BOTH * start,
                stride_expert, stride_column, stride_depth,
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
    """Store columns [start, start + COLUMNS) of a and those of z; if INTERLEAVED, `gate` holds gate and up in pairs."""
    WIDE: tl.constexpr = 2 * INNER if GATED else INNER
    dtype: tl.constexpr = z.dtype.element_ty
    here = row[:, None] < stop
    column = start + tl.arange(0, COLUMNS)
    inside = here & (column[None, :] < INNER)
    z_row = z + row[:, None].to(tl.int64) * WIDE
    if GATED and INTERLEAVED:
        pair = 2 * start + tl.arange(0, 2 * COLUMNS)
        if bias is not None:
            gate += bias_of(bias, expert, pair, WIDE, NUM_EXPERTS)
        pairs = round_nearest(gate, dtype)
        tl.store(z_row + pair[None, :], pairs, mask=here & (pair[None, :] < WIDE))
        gate, up = tl.split(tl.reshape(pairs, (ROWS, COLUMNS, 2)))
    else:
        if bias is not None:
            gate += bias_of(bias, expert, column, WIDE, NUM_EXPERTS)
        gate = round_nearest(gate, dtype)
        tl.store(z_row + column[None, :], gate, mask=inside)
        if GATED:
            if bias is not None:
                up += bias_of(bias, expert, INNER + column, WIDE, NUM_EXPERTS)
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
    """Compute slots[sorted_rows[j]] = row_weights * (left[j] weight[e]^T + bias[e]).

    row_weights and bias may be absent.
    """
    COLUMN_TILES: tl.constexpr = (COLUMNS + BLOCK_COLUMNS - 1) // BLOCK_COLUMNS
    ends = tile_ends(expert_offsets, num_rows, NUM_EXPERTS, BLOCK_ROWS)
    for tile in range(tl.program_id(0), tl.max(ends, 0) * COLUMN_TILES, tl.num_programs(0)):
        expert, first, stop, column_tile = find_tile(
            tile, ends, expert_offsets, num_rows, COLUMN_TILES, NUM_EXPERTS, BLOCK_ROWS, GROUP
        )
        row = first + tl.arange(0, BLOCK_ROWS)
        # asked for before the product, which takes longer than these two dependent loads
        slot = tl.load(sorted_rows + row, mask=row < stop, other=0)
        if row_weights is not None:
            # rows behind the last expert must stay zero whatever their weight holds
            counted = row < tl.where(expert < NUM_EXPERTS, stop, 0)
            factor = tl.load(row_weights + slot, mask=counted, other=0.0).to(tl.float32)
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
            total += bias_of(bias, expert, column, COLUMNS, NUM_EXPERTS)
        if row_weights is not None:
            total *= factor[:, None]
        mask = (row[:, None] < stop) & (column[None, :] < COLUMNS)
        result = round_nearest(total, slots.dtype.element_ty)
        tl.store(slots + slot[:, None].to(tl.int64) * COLUMNS + column[None, :], result, mask=mask)


@triton.jit
def _sum_kernel(slots, out, COLUMNS: tl.constexpr, TOP_K: tl.constexpr, BLOCK: tl.constexpr):
    """Compute out[t] = slots[t * K] + ... + slots[t * K + K - 1], added in float32 in this order."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for k in tl.static_range(TOP_K):
        row = slots + (token * TOP_K + k) * COLUMNS
        total += tl.load(row + column, mask=column < COLUMNS, other=0.0).to(tl.float32)
    tl.store(out + token * COLUMNS + column, round_nearest(total, out.dtype.element_ty), mask=column < COLUMNS)


@triton.jit
def bias_of(bias, expert, column, COLUMNS: tl.constexpr, NUM_EXPERTS: tl.constexpr):
    """Load bias[expert], a row of COLUMNS, at `column`: float32 [1, columns]; zero for the segment of no expert."""
    mask = column < tl.where(expert < NUM_EXPERTS, COLUMNS, 0)
    return tl.load(bias + expert.to(tl.int64) * COLUMNS + column, mask=mask, other=0.0).to(tl.float32)[None, :]
