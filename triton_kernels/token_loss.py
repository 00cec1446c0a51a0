"""token_loss: computes per-token losses from hidden states and a head, never storing T x V logits.

The formulas are in `ops.token_loss`. The forward takes 4 launches (5 for kl) and one matrix product T' V H for the T'
rows that count (two for kl):

    _select_kernel, _gather_kernel     the rows that count, side by side; see `token_loss_logits`
    _partials_kernel                   grid (row tiles x splits): a program walks a run of vocabulary tiles for one tile
                                       of rows and folds each tile of logits into a few numbers per row. nll and uce:
                                       maximum m, sum s of exp(z - m), logit of the label. kl: (m, s) of both softmaxes
                                       and c = sum exp(r - m_r) ((r - m_r) - (z - m)), z and r the two logits.
    _merge_kernel                      grid (row blocks): folds the splits in ascending order and writes every output.

The backward is in `token_loss_backward`. Splits fill the device where row tiles alone do not. They follow from shapes
alone, so that bits do not depend on the device. Workspace: the gathered rows [T, H] (two of them for kl) and
12 * splits * T bytes (20 for kl), at most 20 MB for 8192 rows and 151,936 columns.

An error for labels outside [0, V) would have to wait for the device; the loss of such a row is NaN instead.
`chunk_rows` is for the reference; tiles come from `configs`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_unlearn.triton_kernels.token_loss_backward import token_loss_backward
from moe_unlearn.triton_kernels.token_loss_logits import (
    IGNORED,
    LOWEST,
    choose_tiles,
    log1p,
    logits,
    multiplied_dtype,
    operand,
    place,
    select_rows,
)

__all__ = ["token_loss", "token_loss_backward"]


def token_loss(
    hidden: Tensor,
    head: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    weights: Tensor | None,
    ref_hidden: Tensor | None,
    ref_head: Tensor | None,
    kind: str,
    scale: float,
    softcap: float | None,
    drop_zero_weights: bool,
    chunk_rows: int | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute (loss [T], l [T], max z and sum exp(z - max z) [2, T], those of the reference [2, T]), all float32.

    hidden, ref_hidden [T, H]; head, ref_head [V, H]; bias [V]; labels int64 [T]; weights [T]; floats of any dtype but
    float64, any strides.
    """
    dtype = multiplied_dtype(hidden, head, ref_hidden, ref_head)
    (num_rows, width), vocabulary = hidden.shape, len(head)
    value = torch.empty(num_rows, dtype=torch.float32, device=hidden.device)
    loss, norm, ref_norm = torch.empty_like(value), value.new_empty(2, num_rows), value.new_empty(2, num_rows)
    if num_rows == 0:
        return loss, value, norm, ref_norm
    config = choose_tiles(hidden, head, ref_head, bias, dtype, kind, softcap)
    tile = config.logits
    rows = select_rows(hidden, ref_hidden, labels, weights if drop_zero_weights else None, dtype)
    described = tile.descriptors
    splits = triton.cdiv(triton.cdiv(vocabulary, tile.columns), config.tiles_per_split)
    partials = value.new_empty(5 if kind == "kl" else 3, splits, num_rows)
    blocks = [tile.rows, tile.depth], [tile.columns, tile.depth]
    _partials_kernel[(triton.cdiv(num_rows, tile.rows) * splits,)](
        operand(rows.hidden, blocks[0], described), operand(rows.ref_hidden, blocks[0], described),
        operand(head, blocks[1], described), operand(ref_head, blocks[1], described),
        bias, labels, rows.index, rows.count, partials, num_rows, splits, config.tiles_per_split,
        rows.hidden.stride(0), *head.stride(), *(head if ref_head is None else ref_head).stride(),
        0 if bias is None else bias.stride(0), labels.stride(0),
        VOCABULARY=vocabulary, HIDDEN=width, SCALE=scale, SOFTCAP=softcap,
        ROWS=tile.rows, COLUMNS=tile.columns, DEPTH=tile.depth, GROUP=tile.group, DESCRIPTORS=described,
        num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
    _merge_kernel[(triton.cdiv(num_rows, config.merge_rows),)](
        partials, rows.slot, labels, weights, loss, value, norm, ref_norm, num_rows, splits, labels.stride(0),
        0 if weights is None else weights.stride(0),
        KIND=kind, VOCABULARY=vocabulary, ROWS=config.merge_rows, SPLITS=config.merge_splits, num_warps=4,
    )  # fmt: skip
    return loss, value, norm, ref_norm


@triton.jit
def _fold(m, s, tile_m, tile_s):
    """Fold (m, s) of two sets of logits into (m, s) of both; also return the first m minus the common one."""
    peak = tl.maximum(m, tile_m)
    return peak, s * tl.exp(m - peak) + tile_s * tl.exp(tile_m - peak), m - peak


@triton.jit
def _peak_and_sum(z, AXIS: tl.constexpr):
    # m is kept finite, so that a tile of logits that are all -infinity sums to 0 and not to NaN
    m = tl.maximum(tl.max(z, AXIS), LOWEST)
    return m, tl.sum(tl.exp(z - tl.expand_dims(m, AXIS)), AXIS)


@triton.jit(do_not_specialize=["num_rows", "splits", "tiles_per_split"])
def _partials_kernel(
    hidden, ref_hidden, head, ref_head, bias, labels, index, count, partials, num_rows, splits, tiles_per_split,
    stride_hidden_row, stride_head_row, stride_head_column, stride_ref_head_row, stride_ref_head_column, stride_bias,
    stride_label,
    VOCABULARY: tl.constexpr, HIDDEN: tl.constexpr, SCALE: tl.constexpr, SOFTCAP: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, GROUP: tl.constexpr, DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """Compute partials [3 or 5, splits, T] of one tile of rows and one split."""
    counted = tl.load(count)
    row_tile, split = place(tl.program_id(0), tl.cdiv(counted, ROWS), splits, GROUP)
    if row_tile * ROWS >= counted:
        return
    row = row_tile * ROWS + tl.arange(0, ROWS)
    live = row < counted
    token = tl.load(index + row, mask=live, other=0).to(tl.int64)
    label = tl.load(labels + token * stride_label)
    m = tl.full((ROWS,), LOWEST, tl.float32)
    s = tl.zeros((ROWS,), tl.float32)
    picked, ref_m, ref_s, cross = s, m, s, s
    first = split * tiles_per_split
    for tile in range(first, tl.minimum(first + tiles_per_split, tl.cdiv(VOCABULARY, COLUMNS))):
        column = tile * COLUMNS
        z, z_ref = logits(
            hidden, ref_hidden, head, ref_head, bias, row_tile * ROWS, column, num_rows, stride_hidden_row,
            stride_head_row, stride_head_column, stride_ref_head_row, stride_ref_head_column, stride_bias,
            VOCABULARY, HIDDEN, SCALE, SOFTCAP, ROWS, COLUMNS, DEPTH, DESCRIPTORS,
        )  # fmt: skip
        tile_m, tile_s = _peak_and_sum(z, 1)
        if ref_hidden is None:
            v = column + tl.arange(0, COLUMNS)
            picked += tl.sum(tl.where(v[None, :] == label[:, None], z, 0.0), 1)
            m, s, _ = _fold(m, s, tile_m, tile_s)
        else:
            tile_ref_m = tl.maximum(tl.max(z_ref, 1), LOWEST)
            z, z_ref = z - tile_m[:, None], z_ref - tile_ref_m[:, None]
            q = tl.exp(z_ref)
            tile_ref_s = tl.sum(q, 1)
            tile_cross = tl.sum(tl.where(q == 0, 0.0, q * (z_ref - z)), 1)
            old_ref_s = ref_s
            m, s, old = _fold(m, s, tile_m, tile_s)
            ref_m, ref_s, ref_old = _fold(ref_m, ref_s, tile_ref_m, tile_ref_s)
            # both terms are moved to the common maxima
            cross = tl.exp(ref_old) * (cross + old_ref_s * (ref_old - old))
            shift, ref_shift = tile_m - m, tile_ref_m - ref_m
            cross += tl.exp(ref_shift) * (tile_cross + tile_ref_s * (ref_shift - shift))
    out = partials + split.to(tl.int64) * num_rows + row
    part = splits.to(tl.int64) * num_rows
    tl.store(out, m, mask=live)
    tl.store(out + part, s, mask=live)
    if ref_hidden is None:
        tl.store(out + 2 * part, picked, mask=live)
    else:
        tl.store(out + 2 * part, ref_m, mask=live)
        tl.store(out + 3 * part, ref_s, mask=live)
        tl.store(out + 4 * part, cross, mask=live)


@triton.jit(do_not_specialize=["num_rows", "splits"])
def _merge_kernel(
    partials, slots, labels, weights, loss, value, norm, ref_norm, num_rows, splits, stride_label, stride_weight,
    KIND: tl.constexpr, VOCABULARY: tl.constexpr, ROWS: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """Compute loss, l and the normalisers of a block of rows; zeros in rows that do not count."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = row < num_rows
    wide = row.to(tl.int64)
    slot = tl.load(slots + row, mask=inside, other=-1)
    counted = slot >= 0
    label = tl.load(labels + wide * stride_label, mask=inside, other=IGNORED)
    part = splits.to(tl.int64) * num_rows
    m = tl.full((ROWS,), LOWEST, tl.float32)
    s = tl.zeros((ROWS,), tl.float32)
    picked, ref_m, ref_s, cross = s, m, s, s
    for first in range(0, splits, SPLITS):
        split = first + tl.arange(0, SPLITS)
        mask = (split < splits)[:, None] & counted[None, :]
        source = partials + split.to(tl.int64)[:, None] * num_rows + slot[None, :]
        part_m = tl.load(source, mask=mask, other=LOWEST)
        part_s = tl.load(source + part, mask=mask, other=0.0)
        peak = tl.maximum(m, tl.max(part_m, 0))
        old, shift = m - peak, part_m - peak[None, :]
        m, s = peak, s * tl.exp(old) + tl.sum(part_s * tl.exp(shift), 0)
        if KIND != "kl":
            picked += tl.sum(tl.load(source + 2 * part, mask=mask, other=0.0), 0)
        else:
            part_m = tl.load(source + 2 * part, mask=mask, other=LOWEST)
            part_s = tl.load(source + 3 * part, mask=mask, other=0.0)
            part_cross = tl.load(source + 4 * part, mask=mask, other=0.0)
            peak = tl.maximum(ref_m, tl.max(part_m, 0))
            ref_old, ref_shift = ref_m - peak, part_m - peak[None, :]
            cross = tl.exp(ref_old) * (cross + ref_s * (ref_old - old))
            cross += tl.sum(tl.exp(ref_shift) * (part_cross + part_s * (ref_shift - shift)), 0)
            ref_m, ref_s = peak, ref_s * tl.exp(ref_old) + tl.sum(part_s * tl.exp(ref_shift), 0)
    if KIND == "kl":
        total, ref_total = tl.where(counted, s, 1.0), tl.where(counted, ref_s, 1.0)
        result = tl.div_rn(cross, ref_total) + tl.log(tl.div_rn(total, ref_total))
    else:
        s = tl.where((label < 0) | (label >= VOCABULARY), float("nan"), s)
        result = (m - picked) + tl.log(tl.where(counted, s, 1.0))
        if KIND == "uce":
            result = -log1p(-0.5 * tl.exp(-result))
    result = tl.where(counted, result, 0.0)
    weighted = result
    if weights is not None:
        weighted = result * tl.load(weights + wide * stride_weight, mask=inside, other=0.0).to(tl.float32)
    tl.store(loss + row, tl.where(label == IGNORED, 0.0, weighted), mask=inside)
    tl.store(value + row, result, mask=inside)
    tl.store(norm + row, tl.where(counted, m, 0.0), mask=inside)
    tl.store(norm + num_rows + wide, tl.where(counted, s, 0.0), mask=inside)
    if KIND != "kl":
        ref_m, ref_s = tl.zeros((ROWS,), tl.float32), tl.zeros((ROWS,), tl.float32)
    tl.store(ref_norm + row, tl.where(counted, ref_m, 0.0), mask=inside)
    tl.store(ref_norm + num_rows + wide, tl.where(counted, ref_s, 0.0), mask=inside)
