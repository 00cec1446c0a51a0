"""Matrix products over rows sorted by expert: finds a program's tile and computes its product.

Rows [expert_offsets[e], expert_offsets[e + 1]) are multiplied by weight [e]; the rows behind the last expert form
segment E, whose tiles multiply nothing and come out as zero. Each segment has ceil(rows / BLOCK_ROWS) row tiles. The
host does not know how many, so that grids are upper bounds, or persistent programs share the tiles; each program finds
its own in the running sum of tile counts. Consecutive tiles walk down GROUP row tiles before they go on to the next
columns, so that the data that a wave of programs reads stay in L2.

Kernels read operands by pointers, with any strides, or by TMA descriptors that the host builds: the weight as
[E, columns, depth] or [E, depth, columns], whichever is contiguous, and left rows that stand in order as [N, depth].
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from moe_unlearn.triton_kernels import configs
from moe_unlearn.triton_kernels.common import ceil_div, dot

POINTERS, BY_DEPTH, BY_COLUMN = range(3)  # the ways to read a weight
_POINTERS, _BY_DEPTH = tl.constexpr(POINTERS), tl.constexpr(BY_DEPTH)


class Weight(NamedTuple):
    """Weights of all experts as a kernel takes them: tensor or descriptor, strides in elements, the way to read."""

    source: torch.Tensor | TensorDescriptor
    strides: tuple[int, int, int]
    access: int


def describable(tensor: torch.Tensor) -> bool:
    """Return whether a TMA descriptor can name `tensor`: last dimension contiguous, all else 16-byte aligned."""
    *outer, last = tensor.stride()
    aligned = all(stride > 0 and stride * tensor.element_size() % 16 == 0 for stride in outer)
    return last == 1 and aligned and tensor.numel() > 0 and tensor.data_ptr() % 16 == 0


def weight_argument(weight: torch.Tensor, block_columns: int, tile: configs.MatmulTile) -> Weight:
    """Return `weight` [E, depth, columns] as a kernel argument: by pointers, with any strides, or by descriptor.

    If the tile wants a descriptor, the weight is `describable` as it stands or with depth and columns exchanged.
    """
    stride_expert, stride_depth, stride_column = weight.stride()
    strides = stride_expert, stride_column, stride_depth
    if not tile.descriptors:
        return Weight(weight, strides, POINTERS)
    if describable(weight):
        return Weight(TensorDescriptor.from_tensor(weight, [1, tile.depth, block_columns]), strides, BY_COLUMN)
    return Weight(TensorDescriptor.from_tensor(weight.mT, [1, block_columns, tile.depth]), strides, BY_DEPTH)


def rows_argument(rows: torch.Tensor, tile: configs.MatmulTile) -> torch.Tensor | TensorDescriptor:
    """Return contiguous `rows` [N, depth] as a kernel argument, by descriptor if the tile wants one."""
    return TensorDescriptor.from_tensor(rows, [tile.rows, tile.depth]) if tile.descriptors else rows


def grid(
    num_rows: int, num_experts: int, num_columns: int, tile: configs.MatmulTile, device: torch.device
) -> tuple[int]:
    """Return the grid: one program per tile that may exist, or as many as run at once if the tile is persistent."""
    tiles = most_row_tiles(num_rows, num_experts, tile.rows) * ceil_div(num_columns, tile.columns)
    return (min(tiles, configs.num_programs(device)) if tile.persistent else tiles,)


def most_row_tiles(num_rows: int, num_experts: int, rows: int) -> int:
    """Return the largest possible number of tiles of `rows` rows, whatever the segments."""
    return ceil_div(num_rows, rows) + min(num_rows, num_experts + 1)


@triton.jit
def tile_ends(expert_offsets, num_rows, NUM_EXPERTS: tl.constexpr, BLOCK_ROWS: tl.constexpr):
    """Compute the running sum of row tiles over the segments, int32 [next power of two of E + 1]."""
    segment = tl.arange(0, triton.next_power_of_2(NUM_EXPERTS + 1))
    start = tl.load(expert_offsets + segment, mask=segment <= NUM_EXPERTS, other=num_rows)
    stop = tl.load(expert_offsets + segment + 1, mask=segment < NUM_EXPERTS, other=num_rows)
    return tl.cumsum(tl.cdiv(stop - start, BLOCK_ROWS), 0)


@triton.jit
def find_tile(
    tile,
    ends,
    expert_offsets,
    num_rows,
    COLUMN_TILES: tl.constexpr,
    NUM_EXPERTS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Return (segment, first row, end of the segment, column tile) of tile number `tile`."""
    group = tile // (GROUP * COLUMN_TILES) * GROUP
    height = tl.minimum(tl.max(ends, 0) - group, GROUP)
    within = tile % (GROUP * COLUMN_TILES)
    row_tile = group + within % height
    expert = tl.sum((ends <= row_tile).to(tl.int32), 0)
    before = tl.max(tl.where(ends <= row_tile, ends, 0), 0)
    first = tl.load(expert_offsets + expert) + (row_tile - before) * BLOCK_ROWS
    stop = tl.load(expert_offsets + expert + 1, mask=expert < NUM_EXPERTS, other=num_rows)
    return expert, first, stop, within // height


@triton.jit
def load_left(
    left,
    rows,
    stride_row,
    stride_depth,
    start,
    DEPTH: tl.constexpr,
    BLOCK_DEPTH: tl.constexpr,
    DESCRIPTOR: tl.constexpr,
):
    """Load [BLOCK_ROWS, BLOCK_DEPTH] from depth `start`; rows: int64 row numbers, for a descriptor the first row."""
    if DESCRIPTOR:
        tile = left.load([rows, start])
    else:
        k = start + tl.arange(0, BLOCK_DEPTH)
        pointers = left + rows[:, None] * stride_row + k[None, :].to(tl.int64) * stride_depth
        if DEPTH % BLOCK_DEPTH == 0:
            tile = tl.load(pointers)
        else:
            tile = tl.load(pointers, mask=k[None, :] < DEPTH, other=0.0)
    return tile


@triton.jit
def load_weight(
    weight,
    expert,
    column,
    stride_expert,
    stride_column,
    stride_depth,
    start,
    OFFSET: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_DEPTH: tl.constexpr,
    ACCESS: tl.constexpr,
):
    """Load [BLOCK_DEPTH, WIDTH] of one expert from depth `start` and `column` of the COLUMNS that begin at OFFSET.

    Columns of the result behind these COLUMNS hold arbitrary numbers.
    """
    if ACCESS == _POINTERS:
        k = start + tl.arange(0, BLOCK_DEPTH)
        n = column + tl.arange(0, WIDTH)
        pointers = weight + expert.to(tl.int64) * stride_expert + (OFFSET + n[None, :]).to(tl.int64) * stride_column
        pointers += k[:, None].to(tl.int64) * stride_depth
        if DEPTH % BLOCK_DEPTH == 0 and COLUMNS % WIDTH == 0:
            block = tl.load(pointers)
        else:
            block = tl.load(pointers, mask=(k[:, None] < DEPTH) & (n[None, :] < COLUMNS), other=0.0)
    elif ACCESS == _BY_DEPTH:
        block = tl.reshape(weight.load([expert, OFFSET + column, start]), (WIDTH, BLOCK_DEPTH)).T
    else:
        block = tl.reshape(weight.load([expert, start, OFFSET + column]), (BLOCK_DEPTH, WIDTH))
    return block


@triton.jit
def product(
    left, rows, stride_left_row, stride_left_depth, weight, expert, column, stride_expert, stride_column, stride_depth,
    COLUMNS: tl.constexpr, DEPTH: tl.constexpr, NUM_EXPERTS: tl.constexpr, BLOCK_ROWS: tl.constexpr,
    WIDTH: tl.constexpr, BLOCK_DEPTH: tl.constexpr, ACCESS: tl.constexpr, DESCRIPTOR: tl.constexpr,
):  # fmt: skip
    """Multiply left rows by weight[expert] columns [column, column + WIDTH), in float32; zero for segment E."""
    total = tl.zeros((BLOCK_ROWS, WIDTH), tl.float32)
    for start in range(0, tl.where(expert < NUM_EXPERTS, DEPTH, 0), BLOCK_DEPTH):
        tile = load_left(left, rows, stride_left_row, stride_left_depth, start, DEPTH, BLOCK_DEPTH, DESCRIPTOR)
        block = load_weight(
            weight,
            expert,
            column,
            stride_expert,
            stride_column,
            stride_depth,
            start,
            0,
            COLUMNS,
            DEPTH,
            WIDTH,
            BLOCK_DEPTH,
            ACCESS,
        )
        total = dot(tile, block, total)
    return total


@triton.jit
def product_of_halves(
    left, rows, stride_left_row, stride_left_depth, weight, expert, column, stride_expert, stride_column, stride_depth,
    HALF: tl.constexpr, DEPTH: tl.constexpr, NUM_EXPERTS: tl.constexpr, BLOCK_ROWS: tl.constexpr,
    WIDTH: tl.constexpr, BLOCK_DEPTH: tl.constexpr, ACCESS: tl.constexpr, DESCRIPTOR: tl.constexpr,
):  # fmt: skip
    """Compute `product` with columns [column, column + WIDTH) of the first HALF columns and of the second."""
    first = tl.zeros((BLOCK_ROWS, WIDTH), tl.float32)
    second = tl.zeros((BLOCK_ROWS, WIDTH), tl.float32)
    for start in range(0, tl.where(expert < NUM_EXPERTS, DEPTH, 0), BLOCK_DEPTH):
        tile = load_left(left, rows, stride_left_row, stride_left_depth, start, DEPTH, BLOCK_DEPTH, DESCRIPTOR)
        block = load_weight(
            weight,
            expert,
            column,
            stride_expert,
            stride_column,
            stride_depth,
            start,
            0,
            HALF,
            DEPTH,
            WIDTH,
            BLOCK_DEPTH,
            ACCESS,
        )
        first = dot(tile, block, first)
        block = load_weight(
            weight,
            expert,
            column,
            stride_expert,
            stride_column,
            stride_depth,
            start,
            HALF,
            HALF,
            DEPTH,
            WIDTH,
            BLOCK_DEPTH,
            ACCESS,
        )
        second = dot(tile, block, second)
    return first, second


@triton.jit
def column_slices(x, COUNT: tl.constexpr):
    """Cut [rows, columns] into COUNT slices of columns, left to right.

    An epilogue that takes one slice after the other needs fewer registers.
    """
    if COUNT == 1:
        return (x,)
    else:
        left, right = tl.split(tl.permute(tl.reshape(x, (x.shape[0], 2, x.shape[1] // 2)), (0, 2, 1)))
        return column_slices(left, COUNT // 2) + column_slices(right, COUNT // 2)
