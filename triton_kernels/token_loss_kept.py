"""token_loss, forward with the gradient of the hidden states: one matrix product of 2 T' V H more than the logits.

That makes two products in all, and three for kl.

dl/dz of nll is p - onehot(y), and so is that of uce up to a factor of the row. The gradient dl/dh of each row's nll,
`direction`, is therefore known in the forward, and the backward only multiplies it by the row's upstream gradient. With
a row's base b, a number near its largest logit,

    direction = scale ( e^(b - m) / s  sum over v != y of  e^(z_v - b) c_v W_v  +  (p_y - 1) c_y W_y )

for m and s of `token_loss`, and c_v = 1 - (z_v / softcap)^2, which is 1 without a soft cap. So exponentials can be
multiplied by the head before m and s are known. The label's term, whose two parts cancel in a confident row, is
computed from the loss in float32. The rows that count are taken `configs.token_loss(...).kept_rows` at a time:

    _offset_kernel         grid (row blocks), once: b of each row, its label's logit
    _partials_kernel       as in `token_loss`; writes the exponentials too, in the dtype that is multiplied
    _merge_kernel          as in `token_loss`
    _partials_kernel       again; a program has work only if the largest logit of one of its rows exceeds b by more than
                           HEADROOM. Such a row's b becomes its largest logit, so that nothing overflows.
    _clear_kernel          grid (row blocks): 0 for the exponential of each row's label. A mask in the tiles would do
                           the same, but a tile of 128 x 256 has no registers left for it.
    _hidden_sums_kernel    as in `token_loss_backward`, over the whole vocabulary at once
    _direction_kernel      grid (row blocks): the formula above, or zeros

Since z_y <= m <= z_y + nll, only rows whose loss exceeds HEADROOM are computed again. An exponential is rounded once,
as dl/dz is in `token_loss_backward`, and relative to its size, whatever b is: bfloat16 and float32 hold e^-87 to e^88.
float16 does not, and keeps nothing.

dl/dz of kl is p - q, which cancels, so that p and q would need more than 16 bits each. kl keeps pairs of logits
(`token_loss_pairs`), and half as many rows at a time:

    _partials_kernel       writes the pairs, and what they are relative to
    _merge_kernel          as in `token_loss`
    _subtract_kernel       makes dl/dz of the pairs, in place
    _hidden_sums_kernel    as above
    _direction_kernel      the sums times scale, or zeros

Workspace for T = 8192, H = 2048 and V = 151,936 in bfloat16: exponentials or pairs 297 MB, gathered rows 32 MB (64 for
kl), sums 32 MB, partials 4 MB (8 for kl, with the largest logits of each tile). `direction` takes 64 MB until the
backward.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_unlearn.triton_kernels import configs
from moe_unlearn.triton_kernels.common import ceil_div, widen
from moe_unlearn.triton_kernels.token_loss import (
    Kept,
    base_of,
    empty_partials,
    empty_results,
    fold,
    merge,
)
from moe_unlearn.triton_kernels.token_loss_backward import add_hidden_sums, empty_sums, strips, sum_of_splits
from moe_unlearn.triton_kernels.token_loss_logits import (
    Loss,
    Rows,
    cap_slope,
    capped,
    choose_tiles,
    expm1,
    in_turn,
    in_vocabulary,
    multiplied_dtype,
    select_rows,
)
from moe_unlearn.triton_kernels.token_loss_pairs import empty_pairs, subtract


def room(operands: Any, kind: str, keep: bool, keep_head: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Allocate what is kept of a loss of `operands`, the `Operands` of `ops.token_loss`."""
    return _room(operands.hidden)


def _room(hidden: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Allocate the direction, [T, H] float32; nothing is kept for the gradients of the head."""
    return torch.empty_like(hidden, dtype=torch.float32, memory_format=torch.contiguous_format), *(
        hidden.new_empty(0) for _ in range(3)
    )


def token_loss_kept(
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
    keep: bool,
    keep_head: bool,
) -> tuple[Tensor, ...]:
    """Compute the results of `token_loss`, then what `room` allocates; the direction is 0 in rows that do not count."""
    direction, *others = _room(hidden)
    num_rows, width = direction.shape
    dtype, results = multiplied_dtype(hidden, head, ref_hidden, ref_head), empty_results(hidden)
    if num_rows == 0:
        return *results, direction, *others
    loss = Loss(head, ref_head, labels, bias, weights, kind, scale, softcap)
    config = choose_tiles(hidden, loss, dtype, keeps=True)
    rows = select_rows(hidden, ref_hidden, labels, weights if drop_zero_weights else None, dtype)
    span = config.kept_rows
    partials, sums = empty_partials(loss, config, span), empty_sums(hidden, config, span, config.kept_splits)
    kept = empty_pairs(loss, config, dtype) if kind == "kl" else _empty_exponentials(loss, rows, config)
    gradient = kept.values[:span].view(dtype)
    for first in range(0, num_rows, span):
        fold(loss, rows, config, partials, first, kept)
        merge(loss, rows, config, partials, first, results)
        if kind == "kl":
            subtract(loss, rows, config, kept, results, gradient, first)
        else:
            fold(loss, rows, config, partials, first, kept, peaks=results.norm[0])
            _launch_clear(loss, rows, gradient, first)
        add_hidden_sums(gradient, head, rows, sums, config, config.kept_splits, 0, len(head), first)
        _direction_kernel[(ceil_div(num_rows, 16),)](
            sums,
            rows.slot,
            rows.count,
            labels,
            head,
            None if kind == "kl" else kept.offset,
            results.value,
            results.norm,
            direction,
            num_rows,
            first,
            span,
            labels.stride(0),
            *head.stride(),
            KIND=kind,
            VOCABULARY=len(head),
            HIDDEN=width,
            SCALE=scale,
            SOFTCAP=softcap,
            WIDTH_TILES=ceil_div(width, config.grad_hidden.columns),
            TILE_ROWS=config.grad_hidden.rows,
            SPLIT_TILES=config.split_tiles,
            SPLITS=config.kept_splits,
            ROWS=16,
            COLUMNS=128,
            num_warps=4,
        )
    return *results, direction, *others


def _empty_exponentials(loss: Loss, rows: Rows, config: configs.TokenLoss) -> Kept:
    """Allocate exponentials of a span of rows, whole tiles of columns wide, and compute what they are relative to."""
    width = ceil_div(len(loss.head), config.logits.columns) * config.logits.columns
    values = torch.empty(config.kept_rows, width, dtype=rows.hidden.dtype, device=loss.head.device)
    return Kept(values, _label_logits(loss, rows))


def _launch_clear(loss: Loss, rows: Rows, exponentials: Tensor, first: int) -> None:
    labels, span = loss.labels, len(exponentials)
    _clear_kernel[(ceil_div(span, 16),)](
        labels,
        rows.index,
        rows.count,
        exponentials,
        first,
        span,
        labels.stride(0),
        exponentials.stride(0),
        VOCABULARY=len(loss.head),
        ROWS=16,
        num_warps=1,
    )


def _label_logits(loss: Loss, rows: Rows) -> Tensor:
    """Compute the logit of the label of each row that counts, [T] float32; other elements have no meaning."""
    head, bias, (num_rows, width) = loss.head, loss.bias, rows.hidden.shape
    offset = torch.empty(num_rows, dtype=torch.float32, device=head.device)
    _offset_kernel[(ceil_div(num_rows, 16),)](
        rows.hidden,
        head,
        bias,
        loss.labels,
        rows.index,
        rows.count,
        offset,
        rows.hidden.stride(0),
        *head.stride(),
        0 if bias is None else bias.stride(0),
        loss.labels.stride(0),
        VOCABULARY=len(head),
        HIDDEN=width,
        SCALE=loss.scale,
        SOFTCAP=loss.softcap,
        ROWS=16,
        COLUMNS=128,
        num_warps=4,
    )
    return offset


@triton.jit
def _offset_kernel(
    hidden,
    head,
    bias,
    labels,
    index,
    count,
    offset,
    stride_hidden_row,
    stride_head_row,
    stride_head_column,
    stride_bias,
    stride_label,
    VOCABULARY: tl.constexpr,
    HIDDEN: tl.constexpr,
    SCALE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Compute the logit of the label of a block of the rows that count; a label outside the vocabulary counts as 0."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    live = row < tl.load(count)
    token = tl.load(index + row, mask=live, other=0).to(tl.int64)
    label = in_vocabulary(tl.load(labels + token * stride_label, mask=live, other=-1), VOCABULARY).to(tl.int64)
    z = tl.zeros((ROWS,), tl.float32)
    for start in range(0, HIDDEN, COLUMNS):
        column = (start + tl.arange(0, COLUMNS)).to(tl.int64)
        mask = (label >= 0)[:, None] & (column < HIDDEN)[None, :]
        h = tl.load(hidden + row.to(tl.int64)[:, None] * stride_hidden_row + column[None, :], mask=mask, other=0.0)
        at = label[:, None] * stride_head_row + column[None, :] * stride_head_column
        z += tl.sum(widen(h) * widen(tl.load(head + at, mask=mask, other=0.0)), 1)
    if bias is not None:
        z += tl.load(bias + label * stride_bias, mask=label >= 0, other=0.0).to(tl.float32)
    tl.store(offset + token, capped(z * SCALE, SOFTCAP), mask=live)


@triton.jit(do_not_specialize=["first", "span"])
def _clear_kernel(
    labels,
    index,
    count,
    exponentials,
    first,
    span,
    stride_label,
    stride_exponentials,
    VOCABULARY: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Set the exponentials [span, V] of the labels of the rows from `first` on to 0."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    live = row < tl.minimum(tl.load(count) - first, span)
    token = tl.load(index + first + row, mask=live).to(tl.int64)
    label = in_vocabulary(tl.load(labels + token * stride_label, mask=live, other=-1), VOCABULARY)
    at = row.to(tl.int64) * stride_exponentials + label
    tl.store(exponentials + at, tl.zeros((ROWS,), exponentials.dtype.element_ty), mask=label >= 0)


@triton.jit(do_not_specialize=["num_rows", "first", "span"])
def _direction_kernel(
    sums,
    slots,
    count,
    labels,
    head,
    offset,
    value,
    norm,
    direction,
    num_rows,
    first,
    span,
    stride_label,
    stride_head_row,
    stride_head_column,
    KIND: tl.constexpr,
    VOCABULARY: tl.constexpr,
    HIDDEN: tl.constexpr,
    SCALE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    WIDTH_TILES: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    SPLIT_TILES: tl.constexpr,
    SPLITS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Compute dl/dh of nll or kl for those of a block of rows that sums are of; zeros in rows that do not count."""
    counted = tl.maximum(tl.minimum(tl.load(count) - first, span), 1)
    row_tiles, splits = strips(counted, WIDTH_TILES, TILE_ROWS, SPLIT_TILES, SPLITS)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    slot = tl.load(slots + row, mask=row < num_rows, other=-1)
    inside = (row < num_rows) & in_turn(slot, first, span)
    live = inside & (slot >= 0)
    token = row.to(tl.int64)
    scale = tl.full((ROWS,), SCALE, tl.float32)
    if KIND != "kl":
        label = in_vocabulary(tl.load(labels + token * stride_label, mask=live, other=-1), VOCABULARY).to(tl.int64)
        peak = tl.load(norm + token, mask=live, other=0.0)
        total = tl.load(norm + num_rows + token, mask=live, other=1.0)
        z = tl.load(offset + token, mask=live, other=0.0)
        scale = tl.exp(base_of(z, peak) - peak) * tl.div_rn(1.0, total) * SCALE
        loss = tl.load(value + token, mask=live, other=0.0)
        if KIND == "uce":
            at_label = -1 - 2 * expm1(-loss)
        else:
            at_label = tl.where(loss > 16, -1.0, expm1(-loss))
        at_label *= SCALE
        if SOFTCAP is not None:
            at_label *= cap_slope(z, SOFTCAP)
    local = (slot - first).to(tl.int64)
    for start in range(0, HIDDEN, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        within = (column < HIDDEN)[None, :]
        mask = live[:, None] & within
        d = sum_of_splits(sums, local, column, row_tiles, splits, mask, HIDDEN, TILE_ROWS, ROWS, COLUMNS)
        d *= scale[:, None]
        if KIND != "kl":
            at = label[:, None] * stride_head_row + column.to(tl.int64)[None, :] * stride_head_column
            w = widen(tl.load(head + at, mask=(label >= 0)[:, None] & within, other=0.0))
            d += w * at_label[:, None]
        out = direction + token[:, None] * HIDDEN + column[None, :]
        tl.store(out, tl.where(live[:, None], d, 0.0), mask=inside[:, None] & within)
