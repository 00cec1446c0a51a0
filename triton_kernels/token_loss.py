"""token_loss: computes per-token losses from hidden states and a head, never storing T x V logits.

The formulas are in `ops.token_loss`. The forward takes 4 launches (5 for kl) and one matrix product T' V H for the T'
rows that count (two for kl):

    _select_kernel, _gather_kernel     the rows that count, side by side; see `token_loss_logits`
    _partials_kernel                   grid (row tiles x splits): a program walks a run of vocabulary tiles for one tile
                                       of rows and folds each tile of logits into a few numbers per row. nll and uce:
                                       maximum m, sum s of exp(z - m), logit of the label. kl: (m, s) of both softmaxes
                                       and c = sum exp(r - m_r) ((r - m_r) - (z - m)), z and r the two logits.
    _merge_kernel                      grid (row blocks): folds the splits in ascending order and writes every output.

`token_loss_kept` has the forward that computes the gradient of the hidden states too; the backward is in
`token_loss_backward`. Splits fill the device where row tiles alone do not. They follow from shapes alone, so that bits
do not depend on the device. Workspace: the gathered rows [T, H] (two of them for kl) and 12 * splits * T bytes (20 for
kl), at most 47 MB for 8192 rows and 151,936 columns. Tiles come from `configs`; `chunk_rows` is for the reference.

An error for labels outside [0, V) would have to wait for the device; the loss of such a row is NaN instead.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_unlearn.triton_kernels import configs
from moe_unlearn.triton_kernels.common import ceil_div
from moe_unlearn.triton_kernels.grouped_matmul import column_slices
from moe_unlearn.triton_kernels.token_loss_logits import (
    IGNORED,
    LOWEST,
    Loss,
    Rows,
    cap_slope,
    choose_tiles,
    in_turn,
    in_vocabulary,
    is_label,
    log1p,
    logits,
    multiplied_dtype,
    operand,
    place,
    select_rows,
    store_tile,
)

HEADROOM = tl.constexpr(60.0)  # e^60 in 151,936 places, times a weight, is far from the end of float32 and bfloat16


class Results(NamedTuple):
    """What a forward returns, float32: loss [T], l [T], max z and sum exp(z - max z) [2, T], the reference's [2, T]."""

    loss: Tensor
    value: Tensor
    norm: Tensor
    ref_norm: Tensor


class Kept(NamedTuple):
    """What a forward keeps of the logits of a span of rows, and the logits that it is relative to.

    nll and uce: exponentials [span, V or more], offset [T]. kl: the pairs of `token_loss_pairs`, [2 span, V or more];
    offset [2, tiles, span], the largest logits of each tile of columns and those of the reference, is computed too.
    """

    values: Tensor
    offset: Tensor


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
) -> Results:
    """Compute the losses, and the numbers of each row that the backward needs.

    hidden, ref_hidden [T, H]; head, ref_head [V, H]; bias [V]; labels int64 [T]; weights [T]; floats of any dtype but
    float64, any strides.
    """
    dtype, results = multiplied_dtype(hidden, head, ref_hidden, ref_head), empty_results(hidden)
    if len(hidden) == 0:
        return results
    loss = Loss(head, ref_head, labels, bias, weights, kind, scale, softcap)
    # as where something is kept, so that the losses have the same bits
    config = choose_tiles(hidden, loss, dtype, keeps=True)
    rows = select_rows(hidden, ref_hidden, labels, weights if drop_zero_weights else None, dtype)
    partials = empty_partials(loss, config, len(hidden))
    fold(loss, rows, config, partials, 0)
    merge(loss, rows, config, partials, 0, results)
    return results


def empty_results(hidden: Tensor) -> Results:
    value = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
    return Results(value, torch.empty_like(value), value.new_empty(2, len(value)), value.new_empty(2, len(value)))


def empty_partials(loss: Loss, config: configs.TokenLoss, num_rows: int) -> Tensor:
    """Allocate the numbers of each split: 5 for kl, else 3; [numbers, splits, rows]."""
    splits = ceil_div(ceil_div(len(loss.head), config.logits.columns), config.tiles_per_split)
    numbers = 5 if loss.kind == "kl" else 3
    return torch.empty(numbers, splits, num_rows, dtype=torch.float32, device=loss.head.device)


def fold(
    loss: Loss,
    rows: Rows,
    config: configs.TokenLoss,
    partials: Tensor,
    first: int,
    kept: Kept | None = None,
    peaks: Tensor | None = None,
) -> None:
    """Compute `partials` of as many rows as they have from `first` on, and what is kept of the same rows.

    `peaks` [T], the rows' largest logits, makes it a repair: only tiles with a row whose largest logit exceeds its
    offset by more than HEADROOM are computed, and such a row's exponentials are then relative to its largest logit.
    """
    tile, (head, ref_head, labels, bias, _, _, scale, softcap) = config.logits, loss
    (vocabulary, width), (_, splits, num_rows), described = head.shape, partials.shape, tile.descriptors
    blocks = [tile.rows, tile.depth], [tile.columns, tile.depth]
    values, offset = (None, None) if kept is None else kept
    block = [tile.rows, tile.columns // config.slices]
    _partials_kernel[(ceil_div(num_rows, tile.rows) * splits,)](
        operand(rows.hidden, blocks[0], described), operand(rows.ref_hidden, blocks[0], described),
        operand(head, blocks[1], described), operand(ref_head, blocks[1], described),
        bias, labels, rows.index, rows.count, partials,
        operand(values, block, described), offset, offset if peaks is None else peaks,
        len(rows.index), first, num_rows, splits, config.tiles_per_split, 0 if peaks is None else 1,
        rows.hidden.stride(0), *head.stride(), *(head if ref_head is None else ref_head).stride(),
        0 if bias is None else bias.stride(0), labels.stride(0), 0 if values is None else values.stride(0),
        VOCABULARY=vocabulary, HIDDEN=width, SCALE=scale, SOFTCAP=softcap, ROWS=tile.rows, COLUMNS=tile.columns,
        DEPTH=tile.depth, GROUP=tile.group, SLICES=config.slices, DESCRIPTORS=described,
        num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip


def merge(loss: Loss, rows: Rows, config: configs.TokenLoss, partials: Tensor, first: int, results: Results) -> None:
    """Fold `partials` into the results of their rows, from `first` on; rows that do not count come with the first."""
    (_, splits, span), (labels, weights), num_rows = partials.shape, (loss.labels, loss.weights), len(rows.slot)
    _merge_kernel[(ceil_div(num_rows, config.merge_rows),)](
        partials,
        rows.slot,
        labels,
        weights,
        *results,
        num_rows,
        first,
        span,
        splits,
        labels.stride(0),
        0 if weights is None else weights.stride(0),
        KIND=loss.kind,
        VOCABULARY=len(loss.head),
        ROWS=config.merge_rows,
        SPLITS=config.merge_splits,
        num_warps=4,
    )


@triton.jit
def _fold(m, s, tile_m, tile_s):
    """Fold (m, s) of two sets of logits into (m, s) of both; also return the first m minus the common one."""
    peak = tl.maximum(m, tile_m)
    return peak, s * tl.exp(m - peak) + tile_s * tl.exp(tile_m - peak), m - peak


@triton.jit
def base_of(offset, peak):
    """Return what a row's exponentials are relative to: its offset, or its peak where that is too far above."""
    return tl.where(peak - offset > HEADROOM, peak, offset)


@triton.jit
def _fold_tile(
    z,
    label,
    base,
    kept,
    row,
    column,
    stride_kept,
    SOFTCAP: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    SLICES: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):
    """Compute (m, sums of exp(z - m), logits of labels) of a tile, m its maxima; keep its exponentials, if asked to."""
    # m is kept finite, so that a tile of logits that are all -infinity sums to 0 and not to NaN
    m = tl.maximum(tl.max(z, 1), LOWEST)
    s = tl.zeros((ROWS,), tl.float32)
    picked = s
    slices = column_slices(z, SLICES)
    for i in tl.static_range(SLICES):
        start = column + i * (COLUMNS // SLICES)
        picked += tl.sum(tl.where(is_label(label, start, COLUMNS // SLICES), slices[i], 0.0), 1)
        e = tl.exp(slices[i] - m[:, None])
        s += tl.sum(e, 1)
        if kept is not None:
            e *= tl.exp(m - base)[:, None]  # overflows only where the repair computes the tile again
            if SOFTCAP is not None:
                e *= cap_slope(slices[i], SOFTCAP)
            store_tile(kept, e, row, start, stride_kept, DESCRIPTORS)
    return m, s, picked


@triton.jit
def _fold_pairs(
    z, z_ref, m, ref_m, kept, row, column, span, stride_kept, SLICES: tl.constexpr, DESCRIPTORS: tl.constexpr
):
    """Compute (s, s_ref, c) of a tile with maxima m and ref_m, as the docstring has them; store its pairs, if kept."""
    s = tl.zeros((z.shape[0],), tl.float32)
    ref_s, cross = s, s
    slices, ref_slices = column_slices(z, SLICES), column_slices(z_ref, SLICES)
    for i in tl.static_range(SLICES):
        below, ref_below = slices[i] - m[:, None], ref_slices[i] - ref_m[:, None]
        s += tl.sum(tl.exp(below), 1)
        q = tl.exp(ref_below)
        ref_s += tl.sum(q, 1)
        difference = below - ref_below
        if kept is not None:  # also where both are -infinity, whose exponentials add nothing in any case
            difference = tl.where(below == ref_below, 0.0, difference)
        cross -= tl.sum(tl.where(q == 0, 0.0, q * difference), 1)
        if kept is not None:
            start = column + i * (z.shape[1] // SLICES)
            store_tile(kept, difference, span + row, start, stride_kept, DESCRIPTORS)
            store_tile(kept, tl.maximum(below, ref_below), row, start, stride_kept, DESCRIPTORS)
    return s, ref_s, cross


@triton.jit(do_not_specialize=["num_rows", "first", "span", "splits", "tiles_per_split", "repairs"])
def _partials_kernel(
    hidden, ref_hidden, head, ref_head, bias, labels, index, count, partials, kept, offsets, peaks,
    num_rows, first, span, splits, tiles_per_split, repairs,
    stride_hidden_row, stride_head_row, stride_head_column, stride_ref_head_row, stride_ref_head_column, stride_bias,
    stride_label, stride_kept,
    VOCABULARY: tl.constexpr, HIDDEN: tl.constexpr, SCALE: tl.constexpr, SOFTCAP: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, GROUP: tl.constexpr, SLICES: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """Compute partials [3 or 5, splits, span] of one tile of rows and one split, and what `Kept` says.

    Exponentials are exp(z - base) times dz / d(z before its soft cap), at labels too, until `_clear_kernel` has run.
    """
    counted = tl.minimum(tl.load(count) - first, span)
    row_tile, split = place(tl.program_id(0), tl.cdiv(counted, ROWS), splits, GROUP)
    if row_tile * ROWS >= counted:
        return
    row = row_tile * ROWS + tl.arange(0, ROWS)
    live = row < counted
    token = tl.load(index + first + row, mask=live, other=0).to(tl.int64)
    label = in_vocabulary(tl.load(labels + token * stride_label), VOCABULARY)
    base = tl.zeros((ROWS,), tl.float32)
    if kept is not None and ref_hidden is None:
        offset = tl.load(offsets + token, mask=live, other=0.0)
        base = base_of(offset, tl.load(peaks + token, mask=live, other=0.0))
        if (repairs != 0) & (tl.max((base > offset).to(tl.int32), 0) == 0):
            return
    m = tl.full((ROWS,), LOWEST, tl.float32)
    s = tl.zeros((ROWS,), tl.float32)
    picked, ref_m, ref_s, cross = s, m, s, s
    first_tile = split * tiles_per_split
    for tile in range(first_tile, tl.minimum(first_tile + tiles_per_split, tl.cdiv(VOCABULARY, COLUMNS))):
        column = tile * COLUMNS
        z, z_ref = logits(
            hidden, ref_hidden, head, ref_head, bias, first + row_tile * ROWS, column, num_rows, stride_hidden_row,
            stride_head_row, stride_head_column, stride_ref_head_row, stride_ref_head_column, stride_bias,
            VOCABULARY, HIDDEN, SCALE, SOFTCAP, ROWS, COLUMNS, DEPTH, DESCRIPTORS,
        )  # fmt: skip
        if ref_hidden is None:
            tile_m, tile_s, tile_picked = _fold_tile(
                z, label, base, kept, row_tile * ROWS, column, stride_kept, SOFTCAP, ROWS, COLUMNS, SLICES, DESCRIPTORS
            )
            picked += tile_picked
            m, s, _ = _fold(m, s, tile_m, tile_s)
        else:
            tile_m, tile_ref_m = tl.maximum(tl.max(z, 1), LOWEST), tl.maximum(tl.max(z_ref, 1), LOWEST)
            if kept is not None:
                largest = offsets + tile * span.to(tl.int64) + row
                tl.store(largest, tile_m, mask=live)
                tl.store(largest + tl.cdiv(VOCABULARY, COLUMNS) * span.to(tl.int64), tile_ref_m, mask=live)
            tile_s, tile_ref_s, tile_cross = _fold_pairs(
                z, z_ref, tile_m, tile_ref_m, kept, row_tile * ROWS, column, span, stride_kept, SLICES, DESCRIPTORS
            )
            old_ref_s = ref_s
            m, s, old = _fold(m, s, tile_m, tile_s)
            ref_m, ref_s, ref_old = _fold(ref_m, ref_s, tile_ref_m, tile_ref_s)
            # both terms are moved to the common maxima
            cross = tl.exp(ref_old) * (cross + old_ref_s * (ref_old - old))
            shift, ref_shift = tile_m - m, tile_ref_m - ref_m
            cross += tl.exp(ref_shift) * (tile_cross + tile_ref_s * (ref_shift - shift))
    out = partials + split.to(tl.int64) * span + row
    part = splits.to(tl.int64) * span
    tl.store(out, m, mask=live)
    tl.store(out + part, s, mask=live)
    if ref_hidden is None:
        tl.store(out + 2 * part, picked, mask=live)
    else:
        tl.store(out + 2 * part, ref_m, mask=live)
        tl.store(out + 3 * part, ref_s, mask=live)
        tl.store(out + 4 * part, cross, mask=live)


@triton.jit(do_not_specialize=["num_rows", "first", "span", "splits"])
def _merge_kernel(
    partials,
    slots,
    labels,
    weights,
    loss,
    value,
    norm,
    ref_norm,
    num_rows,
    first,
    span,
    splits,
    stride_label,
    stride_weight,
    KIND: tl.constexpr,
    VOCABULARY: tl.constexpr,
    ROWS: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """Compute loss, l and the normalisers of those of a block of rows that partials are of.

    Those of the first slots also write zeros in rows that do not count.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    wide = row.to(tl.int64)
    slot = tl.load(slots + row, mask=row < num_rows, other=-1)
    inside = (row < num_rows) & in_turn(slot, first, span)
    counted = inside & (slot >= 0)
    slot -= first
    label = tl.load(labels + wide * stride_label, mask=inside, other=IGNORED)
    part = splits.to(tl.int64) * span
    m = tl.full((ROWS,), LOWEST, tl.float32)
    s = tl.zeros((ROWS,), tl.float32)
    picked, ref_m, ref_s, cross = s, m, s, s
    for start in range(0, splits, SPLITS):
        split = start + tl.arange(0, SPLITS)
        mask = (split < splits)[:, None] & counted[None, :]
        source = partials + split.to(tl.int64)[:, None] * span + slot[None, :]
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
