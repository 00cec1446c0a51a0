"""Sums of outer products over rows sorted by expert: finds a program's tile and computes it.

    dW[i] = sum_j grad[grad_rows[j]]^T input[input_rows[j]]     j over the rows of expert experts[i], in order

A tile [BLOCK_M, BLOCK_P] of one listed expert is a matrix product whose inner dimension is the expert's rows: blocks
[BLOCK_ROWS, BLOCK_M] of grad, transposed in shared memory, times [BLOCK_ROWS, BLOCK_P] of input, added up in float32.
Each M x P matrix has the same number of tiles, so that the host knows the grid whatever the routing. Consecutive tiles
walk down GROUP tiles of M before they go on along P, so that the data that a wave of programs reads stay in L2.

Kernels read a factor by pointers, with any strides and gathering its rows while loading. Where its rows stand in order
and their layout allows it, they read it by a ragged TMA descriptor, which reads zeros from an expert's end on. Pointers
load zeros there too: the rows behind an expert are never multiplied, not even by zero.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from triton.tools.ragged_tma import create_ragged_descriptor, load_ragged
from triton.tools.tensor_descriptor import TensorDescriptor

from moe_unlearn.triton_kernels import configs
from moe_unlearn.triton_kernels.common import ceil_div, dot
from moe_unlearn.triton_kernels.configs import OuterTile
from moe_unlearn.triton_kernels.grouped_matmul import describable

_RAGGED_ROWS = 1 << 30


class FactorArguments(NamedTuple):
    """Factors of one gradient as kernels take them, in this order."""

    grad: torch.Tensor | TensorDescriptor
    input: torch.Tensor | TensorDescriptor
    bounds: torch.Tensor
    grad_rows: torch.Tensor | None
    input_rows: torch.Tensor | None
    strides: tuple[int, int, int, int]
    by_descriptor: tuple[bool, bool]
    bounds_stride: int


def tile_for(epilogue: str, factors, experts: torch.Tensor | None) -> tuple[tuple[int, int, int], OuterTile]:
    """Return the shape [M_e, M, P] of a gradient and the tile that computes it; factors as in `ops.expert_wgrad`."""
    grad, input, expert_offsets, grad_rows, input_rows = factors
    if grad.dtype == torch.float64:
        raise TypeError("float64 factors are multiplied by impl='ref' only")
    num_experts = len(expert_offsets) - (expert_offsets.dim() == 1)
    shape = (num_experts if experts is None else len(experts), grad.shape[1], input.shape[1])
    rows = [len(r) for r in (grad_rows, input_rows) if r is not None]
    mean = (rows[0] if rows else len(grad)) // num_experts
    arch, programs = configs.architecture(grad.device), configs.num_programs(grad.device)
    return shape, configs.expert_wgrad(epilogue, shape, mean, bool(rows), grad.dtype, arch, programs)


def factor_arguments(grad, input, expert_offsets, grad_rows, input_rows, tile: OuterTile) -> FactorArguments:
    """Prepare the factors for a kernel: as descriptors where `tile` wants them and rows and layout allow them.

    `bounds_stride` is the distance from one expert's start to the next one's.
    """
    sources, by_descriptor = [], []
    for factor, rows, width in ((grad, grad_rows, tile.block_m), (input, input_rows, tile.block_p)):
        direct = tile.descriptors and rows is None and describable(factor) and factor.shape[0] <= _RAGGED_ROWS
        sources.append(create_ragged_descriptor(factor, [tile.block_rows, width]) if direct else factor)
        by_descriptor.append(direct)
    rows = (None if r is None else r.contiguous() for r in (grad_rows, input_rows))
    bounds, strides = expert_offsets.contiguous(), (*grad.stride(), *input.stride())
    return FactorArguments(*sources, bounds, *rows, strides, tuple(by_descriptor), bounds.dim())


def num_tiles(shape: tuple[int, int, int], tile: OuterTile) -> int:
    """Return the number of tiles of the matrices [M_e, M, P]."""
    return shape[0] * ceil_div(shape[1], tile.block_m) * ceil_div(shape[2], tile.block_p)


def tile_options(shape: tuple[int, int, int], tile: OuterTile) -> dict[str, int | None]:
    """Return the keyword arguments of a launch that all kernels share."""
    return {
        "M": shape[1],
        "P": shape[2],
        "BLOCK_M": tile.block_m,
        "BLOCK_P": tile.block_p,
        "BLOCK_ROWS": tile.block_rows,
        "GROUP": tile.group,
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
        "maxnreg": tile.max_registers,
    }


@triton.jit
def find_tile(
    tile, M: tl.constexpr, P: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_P: tl.constexpr, GROUP: tl.constexpr
):
    """Return (matrix, first row, first column) of tile number `tile`; matrix is int64."""
    TILES_M: tl.constexpr = (M + BLOCK_M - 1) // BLOCK_M
    TILES_P: tl.constexpr = (P + BLOCK_P - 1) // BLOCK_P
    within = tile % (TILES_M * TILES_P)
    group = within // (GROUP * TILES_P) * GROUP
    height = tl.minimum(TILES_M - group, GROUP)
    within = within % (GROUP * TILES_P)
    matrix = tl.cast(tile // (TILES_M * TILES_P), tl.int64)
    return matrix, (group + within % height) * BLOCK_M, within // height * BLOCK_P


@triton.jit
def listed(experts, index):
    """Return the id, int64, of the listed expert number `index`."""
    if experts is None:
        expert = index
    else:
        expert = tl.load(experts + index).to(tl.int64)
    return expert


@triton.jit
def load_bounds(bounds, expert, BOUNDS_STRIDE: tl.constexpr):
    """Load (start, stop) of the rows of an expert."""
    return tl.load(bounds + expert * BOUNDS_STRIDE), tl.load(bounds + expert * BOUNDS_STRIDE + 1)


@triton.jit
def _load_factor(
    factor,
    rows,
    stride_row,
    stride_column,
    position,
    start,
    stop,
    column,
    WIDTH: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    BY_DESCRIPTOR: tl.constexpr,
):
    """Load [BLOCK_ROWS, BLOCK] from `position` and `column`; zero from `stop` and from WIDTH on."""
    if BY_DESCRIPTOR:
        block = load_ragged(factor, start, stop - start, [position - start, column])
    else:
        at = position + tl.arange(0, BLOCK_ROWS)
        if rows is None:
            row = at.to(tl.int64)
        else:
            row = tl.load(rows + at, mask=at < stop, other=0).to(tl.int64)
        c = column + tl.arange(0, BLOCK)
        exists = (at < stop)[:, None]
        if WIDTH % BLOCK != 0:
            exists &= (c < WIDTH)[None, :]
        pointers = factor + row[:, None] * stride_row + c[None, :].to(tl.int64) * stride_column
        block = tl.load(pointers, mask=exists, other=0.0)
    return block


@triton.jit
def outer_product(
    grad,
    input,
    grad_rows,
    input_rows,
    strides,
    start,
    stop,
    m,
    p,
    M: tl.constexpr,
    P: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BY_DESCRIPTOR: tl.constexpr,
):
    """Compute the tile [BLOCK_M, BLOCK_P] at (m, p) of the sum over positions [start, stop), float32."""
    total = tl.zeros((BLOCK_M, BLOCK_P), tl.float32)
    for position in range(start, stop, BLOCK_ROWS):
        g = _load_factor(
            grad,
            grad_rows,
            strides[0],
            strides[1],
            position,
            start,
            stop,
            m,
            M,
            BLOCK_ROWS,
            BLOCK_M,
            BY_DESCRIPTOR[0],
        )
        x = _load_factor(
            input,
            input_rows,
            strides[2],
            strides[3],
            position,
            start,
            stop,
            p,
            P,
            BLOCK_ROWS,
            BLOCK_P,
            BY_DESCRIPTOR[1],
        )
        total = dot(tl.trans(g), x, total)
    return total


@triton.jit
def load_words(mask, strides, index, m, p, M: tl.constexpr, P: tl.constexpr, ROWS: tl.constexpr, WORDS: tl.constexpr):
    """Load the mask words [ROWS, WORDS] of matrix `index` from (m, p) on; zero outside."""
    row = m + tl.arange(0, ROWS)[:, None]
    word = p // 32 + tl.arange(0, WORDS)[None, :]
    pointers = mask + index * strides[0] + row.to(tl.int64) * strides[1] + word.to(tl.int64) * strides[2]
    return tl.load(pointers, mask=(row < M) & (word * 32 < P), other=0)


@triton.jit
def stop_unless_kept(
    mask,
    strides,
    index,
    m,
    p,
    start,
    stop,
    M: tl.constexpr,
    P: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """Return the end of the rows that the tile at (m, p) needs: `start` where the mask keeps no element."""
    if mask is not None:
        words = load_words(mask, strides, index, m, p, M, P, BLOCK_M, BLOCK_P // 32)
        stop = tl.where(tl.max(tl.max((words != 0).to(tl.int32), 1), 0) > 0, stop, start)
    return stop


@triton.jit
def unpack_column(words):
    """Unpack one mask word a row, [rows, 1], into bool [rows, 32]."""
    return ((words >> tl.arange(0, 32)[None, :]) & 1) != 0


@triton.jit
def halves(tile):
    """Return the left and the right half of the columns of a tile."""
    half: tl.constexpr = tile.shape[1] // 2
    return tl.split(tl.permute(tl.reshape(tile, (tile.shape[0], 2, half)), (0, 2, 1)))


@triton.jit
def row_halves(tile):
    """Return the upper and the lower half of the rows of a tile."""
    half: tl.constexpr = tile.shape[0] // 2
    return tl.split(tl.permute(tl.reshape(tile, (2, half, tile.shape[1])), (1, 2, 0)))


@triton.jit
def places(strides, index, m, p, M: tl.constexpr, P: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_P: tl.constexpr):
    """Compute the offsets (int64) of the tile at (m, p) of matrix `index`, and which of its elements exist."""
    row = m + tl.arange(0, BLOCK_M)[:, None]
    column = p + tl.arange(0, BLOCK_P)[None, :]
    offsets = index * strides[0] + row.to(tl.int64) * strides[1] + column.to(tl.int64) * strides[2]
    return offsets, (row < M) & (column < P)
