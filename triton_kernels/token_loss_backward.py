"""token_loss, backward: computes the gradients from dl/dz, a chunk of the vocabulary at a time.

The gradient of hidden states that the forward kept (`token_loss_kept`) only has to be multiplied by each row's
upstream gradient:

    _scale_kernel          grid (row blocks): the products, or zeros

For all other gradients `_select_kernel` and `_gather_kernel` of `token_loss_logits` run once. Then follow, for each
chunk of `configs.token_loss(...).chunk` columns:

    _dlogits_kernel        grid (row tiles x column tiles): logits once more, dl/dz [T, chunk] from the saved normaliser
                           in the dtype that is multiplied; with a bias, the sums of its columns over each row tile
    _bias_kernel           grid (column blocks): the sum of these sums over the row tiles, in order
    _head_gradient_kernel  grid (chunk x H tiles): dl/dz^T h, complete and rounded once
    _hidden_sums_kernel    grid (row tiles x H tiles x splits): sums += dl/dz W in float32, split over the chunk where
                           few rows count

`_scatter_kernel`, grid (rows), runs once at the end. It writes the sum of the splits, in order, to where the row came
from, or zeros.

With T' rows that count there are, the forward's included, 2 matrix products of 2 T' V H with a frozen head and 4 with a
trained one; kl has 1 and 2 more for the reference. float16 keeps nothing and needs 3 and 4, kl 5 and 6. dl/dz in
bfloat16 costs the same rounding as any 16-bit backward, and written once it saves a trained head a recomputation.

Workspace for T = 8192, H = 2048 in bfloat16: dl/dz 256 MB, sums 64 MB, rows 32 MB (64 for kl), for any V. The results
are deterministic: no atomics, fixed orders; splits follow from the number of rows that count, not from the device.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_unlearn.triton_kernels import configs
from moe_unlearn.triton_kernels.common import ceil_div, dot, round_nearest
from moe_unlearn.triton_kernels.token_loss_logits import (
    Loss,
    Rows,
    cap_slope,
    choose_tiles,
    counts,
    expm1,
    in_vocabulary,
    is_label,
    load_tile,
    logits,
    multiplied_dtype,
    operand,
    place,
    select_rows,
)


def token_loss_backward(
    grad: Tensor, hidden: Tensor, head: Tensor, labels: Tensor, bias: Tensor | None, weights: Tensor | None,
    ref_hidden: Tensor | None, ref_head: Tensor | None, value: Tensor, norm: Tensor, ref_norm: Tensor,
    kind: str, scale: float, softcap: float | None, drop_zero_weights: bool, chunk_rows: int | None,
    needs_hidden: bool, needs_head: bool, needs_bias: bool, direction: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Compute the gradients of hidden [T, H], head [V, H] and bias [V] in their dtypes; empty if not needed.

    grad [T]: upstream gradient, any strides; value, norm and ref_norm: results of the forward; direction [T, H]: what
    it kept, float32, or None; the rest as there.
    """
    dtype = multiplied_dtype(hidden, head, ref_hidden, ref_head)
    (num_rows, width), vocabulary = hidden.shape, len(head)
    grad_hidden = torch.empty(hidden.shape if needs_hidden else 0, dtype=hidden.dtype, device=hidden.device)
    grad_head = torch.empty(head.shape if needs_head else 0, dtype=head.dtype, device=head.device)
    like = bias if needs_bias else head
    grad_bias = torch.empty(vocabulary if needs_bias else 0, dtype=like.dtype, device=like.device)
    if num_rows == 0:
        return grad_hidden, grad_head.zero_(), grad_bias.zero_()
    loss = Loss(head, ref_head, labels, bias, weights, kind, scale, softcap)
    if needs_hidden and direction is not None:
        _launch_scale(loss, grad, value, direction, grad_hidden, drop_zero_weights)
        needs_hidden = False
    if not (needs_hidden or needs_head or needs_bias):
        return grad_hidden, grad_head, grad_bias
    config = choose_tiles(hidden, loss, dtype)
    chunk, tile = config.chunk, config.logits
    rows = select_rows(hidden, ref_hidden, labels, weights if drop_zero_weights else None, dtype)
    dlogits = torch.empty(num_rows, chunk, dtype=dtype, device=hidden.device)
    row_tiles = ceil_div(num_rows, tile.rows)
    column_sums = norm.new_empty(row_tiles, chunk) if needs_bias else None
    described = tile.descriptors
    blocks = [tile.rows, tile.depth], [tile.columns, tile.depth]
    sources = (
        operand(rows.hidden, blocks[0], described),
        operand(rows.ref_hidden, blocks[0], described),
        operand(head, blocks[1], described),
        operand(ref_head, blocks[1], described),
    )
    sums = empty_sums(hidden, config, num_rows, config.splits) if needs_hidden else None
    for start in range(0, vocabulary, chunk):
        columns = min(chunk, vocabulary - start)
        _dlogits_kernel[(row_tiles * ceil_div(columns, tile.columns),)](
            *sources, bias, labels, weights, grad, value, norm, ref_norm, rows.index, rows.count,
            operand(dlogits, [tile.rows, tile.columns], described), column_sums,
            num_rows, start, columns, rows.hidden.stride(0), *head.stride(),
            *(head if ref_head is None else ref_head).stride(), 0 if bias is None else bias.stride(0),
            labels.stride(0), 0 if weights is None else weights.stride(0), grad.stride(0),
            KIND=kind, VOCABULARY=vocabulary, HIDDEN=width, CHUNK=chunk, SCALE=scale, SOFTCAP=softcap,
            ROWS=tile.rows, COLUMNS=tile.columns, DEPTH=tile.depth, GROUP=tile.group, DESCRIPTORS=described,
            num_warps=tile.num_warps, num_stages=tile.num_stages,
        )  # fmt: skip
        if needs_bias:
            _bias_kernel[(ceil_div(columns, 128),)](
                column_sums, rows.count, grad_bias, start, columns, CHUNK=chunk, ROWS=tile.rows, BLOCK=128, num_warps=4
            )
        if needs_head:
            _launch_head_gradient(dlogits, rows, grad_head, start, columns, config.grad_head)
        if needs_hidden:
            add_hidden_sums(dlogits, head, rows, sums, config, config.splits, start, columns)
    if needs_hidden:
        _scatter_kernel[(ceil_div(num_rows, 16),)](
            sums,
            rows.slot,
            rows.count,
            grad_hidden,
            num_rows,
            HIDDEN=width,
            WIDTH_TILES=ceil_div(width, config.grad_hidden.columns),
            TILE_ROWS=config.grad_hidden.rows,
            SPLIT_TILES=config.split_tiles,
            SPLITS=config.splits,
            ROWS=16,
            COLUMNS=128,
            num_warps=4,
        )
    return grad_hidden, grad_head, grad_bias


def _launch_scale(loss, grad, value, direction, grad_hidden, drop_zero_weights):
    labels, weights, (num_rows, width) = loss.labels, loss.weights, direction.shape
    _scale_kernel[(ceil_div(num_rows, 16),)](
        direction, grad, labels, weights, value, grad_hidden, num_rows, grad.stride(0), labels.stride(0),
        0 if weights is None else weights.stride(0),
        KIND=loss.kind, DROPS=drop_zero_weights, HIDDEN=width, ROWS=16, COLUMNS=128, num_warps=4,
    )  # fmt: skip


def _launch_head_gradient(dlogits, rows, grad_head, start, columns, tile):
    num_rows, width = rows.hidden.shape
    described = tile.descriptors
    _head_gradient_kernel[(ceil_div(columns, tile.rows) * ceil_div(width, tile.columns),)](
        operand(dlogits, [tile.depth, tile.rows], described),
        operand(rows.hidden, [tile.depth, tile.columns], described),
        rows.count, grad_head, num_rows, start, columns, dlogits.stride(0), rows.hidden.stride(0),
        HIDDEN=width, ROWS=tile.rows, COLUMNS=tile.columns, DEPTH=tile.depth, GROUP=tile.group, DESCRIPTORS=described,
        num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip


def empty_sums(hidden: Tensor, config: configs.TokenLoss, num_rows: int, splits: int) -> Tensor:
    """Allocate the sums of `num_rows` rows, float32, in as many strips as they may be split into."""
    tile, width = config.grad_hidden, hidden.shape[1]
    width_tiles = ceil_div(width, tile.columns)
    tiles = ceil_div(num_rows, tile.rows) * width_tiles
    tiles = max(tiles, min(tiles * splits, config.split_tiles))
    return torch.empty(tiles // max(width_tiles, 1) * tile.rows, width, dtype=torch.float32, device=hidden.device)


def add_hidden_sums(
    dlogits: Tensor,
    head: Tensor,
    rows: Rows,
    sums: Tensor,
    config: configs.TokenLoss,
    splits: int,
    start: int,
    columns: int,
    first: int = 0,
) -> None:
    """Add the product of `dlogits` and rows start : start + columns of the head to `sums`; start = 0 begins new ones.

    dlogits: [n, columns or more] of the n rows from `first` on.
    """
    tile, (vocabulary, width) = config.grad_hidden, head.shape
    described, num_rows = tile.descriptors, len(dlogits)
    width_tiles = ceil_div(width, tile.columns)
    tiles = ceil_div(num_rows, tile.rows) * width_tiles
    _hidden_sums_kernel[(max(tiles, min(tiles * splits, config.split_tiles)),)](
        operand(dlogits, [tile.rows, tile.depth], described), operand(head, [tile.depth, tile.columns], described),
        rows.count, sums, num_rows, first, start, columns, dlogits.stride(0), *head.stride(),
        VOCABULARY=vocabulary, HIDDEN=width, WIDTH_TILES=width_tiles,
        SPLIT_TILES=config.split_tiles, SPLITS=splits, FIRST=start == 0,
        ROWS=tile.rows, COLUMNS=tile.columns, DEPTH=tile.depth, GROUP=tile.group, DESCRIPTORS=described,
        num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip


@triton.jit(do_not_specialize=["num_rows", "columns"])
def _dlogits_kernel(
    hidden, ref_hidden, head, ref_head, bias, labels, weights, grad, value, norm, ref_norm, index, count, dlogits,
    column_sums, num_rows, start, columns, stride_hidden_row, stride_head_row, stride_head_column,
    stride_ref_head_row, stride_ref_head_column, stride_bias, stride_label, stride_weight, stride_grad,
    KIND: tl.constexpr, VOCABULARY: tl.constexpr, HIDDEN: tl.constexpr, CHUNK: tl.constexpr, SCALE: tl.constexpr,
    SOFTCAP: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, GROUP: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """Compute dlogits [T, CHUNK] of the vocabulary from `start` on; a tile's rows behind those that count are zero."""
    counted = tl.load(count)
    row_tile, column_tile = place(tl.program_id(0), tl.cdiv(counted, ROWS), tl.cdiv(columns, COLUMNS), GROUP)
    if row_tile * ROWS >= counted:
        return
    column = start + column_tile * COLUMNS
    z, z_ref = logits(
        hidden, ref_hidden, head, ref_head, bias, row_tile * ROWS, column, num_rows, stride_hidden_row,
        stride_head_row, stride_head_column, stride_ref_head_row, stride_ref_head_column, stride_bias,
        VOCABULARY, HIDDEN, SCALE, SOFTCAP, ROWS, COLUMNS, DEPTH, DESCRIPTORS,
    )  # fmt: skip
    row = row_tile * ROWS + tl.arange(0, ROWS)
    live = row < counted
    # rows that do not count read the numbers of token 0 and become zero at the end
    token = tl.load(index + row, mask=live, other=0).to(tl.int64)
    upstream = _upstream(grad, weights, value, token, stride_grad, stride_weight, KIND)
    dz = _softmax(z, norm, token, num_rows)
    if KIND == "kl":
        dz -= _softmax(z_ref, ref_norm, token, num_rows)
    else:
        label = in_vocabulary(tl.load(labels + token * stride_label), VOCABULARY)
        dz = tl.where(is_label(label, column, COLUMNS), dz - 1, dz)
    dz *= (upstream * SCALE)[:, None]
    if SOFTCAP is not None:
        dz *= cap_slope(z, SOFTCAP)
    dz = tl.where(live[:, None], dz, 0.0)
    at = column_tile * COLUMNS + tl.arange(0, COLUMNS)
    if DESCRIPTORS:
        dlogits.store([row_tile * ROWS, column_tile * COLUMNS], round_nearest(dz, dlogits.dtype))
    else:
        out = dlogits + row.to(tl.int64)[:, None] * CHUNK + at[None, :]
        tl.store(out, round_nearest(dz, dlogits.dtype.element_ty), mask=(row < num_rows)[:, None])
    if column_sums is not None:
        tl.store(column_sums + row_tile.to(tl.int64) * CHUNK + at, tl.sum(dz, 0))


@triton.jit
def _upstream(grad, weights, value, token, stride_grad, stride_weight, KIND: tl.constexpr):
    """Compute the gradient of the objective by nll or kl of the rows `token`."""
    upstream = tl.load(grad + token * stride_grad).to(tl.float32)
    if weights is not None:
        upstream *= tl.load(weights + token * stride_weight).to(tl.float32)
    if KIND == "uce":
        upstream *= -expm1(tl.load(value + token))
    return upstream


@triton.jit
def _softmax(z, norm, token, num_rows):
    peak, total = tl.load(norm + token), tl.load(norm + num_rows + token)
    return tl.exp(z - peak[:, None]) * tl.div_rn(1.0, total)[:, None]


@triton.jit(do_not_specialize=["columns"])
def _bias_kernel(
    column_sums, count, grad_bias, start, columns, CHUNK: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = column < columns
    total = tl.zeros((BLOCK,), tl.float32)
    for row_tile in range(0, tl.cdiv(tl.load(count), ROWS)):
        total += tl.load(column_sums + tl.cast(row_tile, tl.int64) * CHUNK + column, mask=inside, other=0.0)
    tl.store(grad_bias + start + column, round_nearest(total, grad_bias.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["num_rows", "columns"])
def _head_gradient_kernel(
    dlogits, hidden, count, grad_head, num_rows, start, columns, stride_dlogits_row, stride_hidden_row,
    HIDDEN: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, GROUP: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """Compute grad_head[start : start + columns] = dlogits^T hidden over the rows that count and the zeros behind."""
    row_tile, column_tile = place(tl.program_id(0), tl.cdiv(columns, ROWS), tl.cdiv(HIDDEN, COLUMNS), GROUP)
    counted = tl.load(count)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for k in range(0, counted, DEPTH):
        dz = load_tile(dlogits, k, row_tile * ROWS, counted, columns, stride_dlogits_row, 1, DEPTH, ROWS, DESCRIPTORS)
        h = load_tile(
            hidden, k, column_tile * COLUMNS, counted, HIDDEN, stride_hidden_row, 1, DEPTH, COLUMNS, DESCRIPTORS
        )
        total = dot(dz.T, h, total)
    row, column = row_tile * ROWS + tl.arange(0, ROWS), column_tile * COLUMNS + tl.arange(0, COLUMNS)
    out = grad_head + (start + row_tile * ROWS).to(tl.int64) * HIDDEN
    out += tl.arange(0, ROWS)[:, None] * HIDDEN + column[None, :]
    mask = (row < columns)[:, None] & (column < HIDDEN)[None, :]
    tl.store(out, round_nearest(total, grad_head.dtype.element_ty), mask=mask)


@triton.jit
def strips(counted, WIDTH_TILES: tl.constexpr, ROWS: tl.constexpr, SPLIT_TILES: tl.constexpr, SPLITS: tl.constexpr):
    """Compute (row tiles, splits) of the sums: split s of row tile r is strip s * row tiles + r of ROWS rows."""
    row_tiles = tl.cdiv(counted, ROWS)
    return row_tiles, tl.maximum(tl.minimum(SPLIT_TILES // (row_tiles * WIDTH_TILES), SPLITS), 1)


@triton.jit(do_not_specialize=["num_rows", "first", "columns"])
def _hidden_sums_kernel(
    dlogits, head, count, sums, num_rows, first, start, columns, stride_dlogits_row, stride_head_row,
    stride_head_column,
    VOCABULARY: tl.constexpr, HIDDEN: tl.constexpr, WIDTH_TILES: tl.constexpr, SPLIT_TILES: tl.constexpr,
    SPLITS: tl.constexpr, FIRST: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
    GROUP: tl.constexpr, DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """Add a chunk's dlogits W to a tile of sums [strips * ROWS, HIDDEN]; the first chunk starts from zero."""
    counted = tl.minimum(tl.load(count) - first, num_rows)
    if counted <= 0:
        return
    row_tiles, splits = strips(counted, WIDTH_TILES, ROWS, SPLIT_TILES, SPLITS)
    tiles = row_tiles * WIDTH_TILES
    split = tl.program_id(0) // tiles
    if split >= splits:
        return
    row_tile, column_tile = place(tl.program_id(0) % tiles, row_tiles, WIDTH_TILES, GROUP)
    left = column_tile * COLUMNS
    column = left + tl.arange(0, COLUMNS)
    at = sums + (split * row_tiles + row_tile).to(tl.int64) * ROWS * HIDDEN
    at += tl.arange(0, ROWS)[:, None] * HIDDEN + column[None, :]
    inside = (column < HIDDEN)[None, :]
    if FIRST:
        total = tl.zeros((ROWS, COLUMNS), tl.float32)
    else:
        total = tl.load(at, mask=inside, other=0.0)
    length = tl.cdiv(tl.cdiv(columns, DEPTH), splits) * DEPTH
    for k in range(split * length, tl.minimum(split * length + length, columns), DEPTH):
        dz = load_tile(dlogits, row_tile * ROWS, k, counted, columns, stride_dlogits_row, 1, ROWS, DEPTH, DESCRIPTORS)
        w = load_tile(
            head, start + k, left, VOCABULARY, HIDDEN, stride_head_row, stride_head_column, DEPTH, COLUMNS, DESCRIPTORS
        )
        total = dot(dz, w.to(dz.dtype), total)
    tl.store(at, total, mask=inside)


@triton.jit
def sum_of_splits(
    sums,
    slot,
    column,
    row_tiles,
    splits,
    mask,
    HIDDEN: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Compute the sums of rows `slot` over the splits, in order; zeros where `mask` is not set."""
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for split in range(0, splits):
        source = sums + (split * row_tiles * TILE_ROWS + slot)[:, None] * HIDDEN + column[None, :]
        total += tl.load(source, mask=mask, other=0.0)
    return total


@triton.jit(do_not_specialize=["num_rows"])
def _scatter_kernel(
    sums,
    slots,
    count,
    grad_hidden,
    num_rows,
    HIDDEN: tl.constexpr,
    WIDTH_TILES: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    SPLIT_TILES: tl.constexpr,
    SPLITS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Store the sum of the splits of row slot[t], in order, to grad_hidden[t]; zeros for a row that does not count."""
    row_tiles, splits = strips(tl.maximum(tl.load(count), 1), WIDTH_TILES, TILE_ROWS, SPLIT_TILES, SPLITS)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    slot = tl.load(slots + row, mask=row < num_rows, other=-1).to(tl.int64)
    for start in range(0, HIDDEN, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        inside = (column < HIDDEN)[None, :]
        mask = (slot >= 0)[:, None] & inside
        total = sum_of_splits(sums, slot, column, row_tiles, splits, mask, HIDDEN, TILE_ROWS, ROWS, COLUMNS)
        out = grad_hidden + row.to(tl.int64)[:, None] * HIDDEN + column[None, :]
        tl.store(out, round_nearest(total, grad_hidden.dtype.element_ty), mask=(row < num_rows)[:, None] & inside)


@triton.jit(do_not_specialize=["num_rows"])
def _scale_kernel(
    direction, grad, labels, weights, value, grad_hidden, num_rows, stride_grad, stride_label, stride_weight,
    KIND: tl.constexpr, DROPS: tl.constexpr, HIDDEN: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Store a row's direction times its upstream gradient to grad_hidden; zeros for a row that does not count."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    token = row.to(tl.int64)
    live = counts(labels, weights if DROPS else None, token, row < num_rows, stride_label, stride_weight)
    # rows that do not count read the numbers of token 0, for the mask decides what is stored
    factor = _upstream(grad, weights, value, tl.where(live, token, 0), stride_grad, stride_weight, KIND)
    for start in range(0, HIDDEN, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        at = token[:, None] * HIDDEN + column[None, :]
        inside = (column < HIDDEN)[None, :]
        scaled = tl.load(direction + at, mask=live[:, None] & inside, other=0.0) * factor[:, None]
        scaled = tl.where(live[:, None], scaled, 0.0)
        mask = (row < num_rows)[:, None] & inside
        tl.store(grad_hidden + at, round_nearest(scaled, grad_hidden.dtype.element_ty), mask=mask)
