"""token_loss, kl with the gradient of the hidden states in the forward: pairs of logits become dl/dz in place.

dl/dz = p - q needs the normalisers of both softmaxes, which are known only behind all logits, z of the model and r of
the reference. Until then each element of a span of rows is kept as a pair. With M and N, the largest z and r of its row
in its tile of columns,

    top = max(z - M, r - N)        difference = (z - M) - (r - N)

in float16, or in float32 where that is multiplied. So (z - M) = top + min(difference, 0), (r - N) = top -
max(difference, 0), and once (m, s) of `token_loss` are known for both,

    d = log p - log q = difference + (M - m) - (N - n) - log(s / t)
    p - q = p (1 - e^-d) if d >= 0, else -q (1 - e^d)

A row that equals its reference has difference 0 and d = 0 exactly, and with them its gradient. In p and q themselves 16
bits would be too few, for they cancel where model and reference are close. The difference is no larger than what z - r
varies by in the tile, and its rounding error is at most 2^-11 of it, or 3e-8, which is less than float32's in logits of
1. That of `top` is 2^-11 of itself, so that p and q have an error above bfloat16's only where they are e^-8 of the
largest of their tile. dl/dz, rounded to the dtype that is multiplied, is therefore as exact as from float32 logits;
benchmarks/NOTES.md has figures. A difference of -infinity says that z is -infinity, one of infinity that r is.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_unlearn.triton_kernels import configs
from moe_unlearn.triton_kernels.common import ceil_div, round_nearest, widen
from moe_unlearn.triton_kernels.token_loss import Kept, Results
from moe_unlearn.triton_kernels.token_loss_logits import Loss, Rows, cap_slope


def empty_pairs(loss: Loss, config: configs.TokenLoss, dtype: torch.dtype) -> Kept:
    """Allocate the pairs of a span of rows, whole tiles of columns wide: `top` of all rows, then `difference`."""
    tiles, device = ceil_div(len(loss.head), config.logits.columns), loss.head.device
    kept_dtype = torch.float32 if dtype == torch.float32 else torch.float16
    values = torch.empty(2 * config.kept_rows, tiles * config.logits.columns, dtype=kept_dtype, device=device)
    return Kept(values, torch.empty(2, tiles, config.kept_rows, dtype=torch.float32, device=device))


def subtract(
    loss: Loss, rows: Rows, config: configs.TokenLoss, kept: Kept, results: Results, gradient: Tensor, first: int
) -> None:
    """Overwrite the first of each pair by dl/dz before the scale; `gradient` is the same memory in its dtype."""
    (_, tiles, span), num_rows = kept.offset.shape, len(rows.index)
    _subtract_kernel[(ceil_div(span, 16), ceil_div(tiles, config.pair_tiles))](
        kept.values,
        gradient,
        kept.offset,
        results.norm,
        results.ref_norm,
        rows.index,
        rows.count,
        num_rows,
        first,
        span,
        tiles,
        kept.values.stride(0),
        SOFTCAP=loss.softcap,
        ROWS=16,
        COLUMNS=config.logits.columns,
        TILES=config.pair_tiles,
        num_warps=4,
    )


@triton.jit(do_not_specialize=["num_rows", "first", "span", "tiles"])
def _subtract_kernel(
    pairs,
    gradient,
    offsets,
    norm,
    ref_norm,
    index,
    count,
    num_rows,
    first,
    span,
    tiles,
    stride_pairs,
    SOFTCAP: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    TILES: tl.constexpr,
):
    """Compute gradient [span, V] from pairs [2 span, V] of a block of rows and TILES tiles of columns."""
    counted = tl.minimum(tl.load(count) - first, span)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    live = row < counted
    token = tl.load(index + first + row, mask=live, other=0)
    peak, total = _normaliser(norm, token, num_rows, live)
    ref_peak, ref_total = _normaliser(ref_norm, token, num_rows, live)
    ratio, log_total = tl.log(tl.div_rn(total, ref_total)), tl.log(total)
    begin = tl.program_id(1) * TILES
    for tile in range(begin, tl.minimum(begin + TILES, tiles)):
        source = offsets + tile * span.to(tl.int64) + row
        tile_peak = tl.load(source, mask=live, other=0.0)
        ref_tile_peak = tl.load(source + tiles * span.to(tl.int64), mask=live, other=0.0)
        above = tile_peak - peak
        apart = (above - (ref_tile_peak - ref_peak)) - ratio
        at = row.to(tl.int64)[:, None] * stride_pairs + (tile * COLUMNS + tl.arange(0, COLUMNS))[None, :]
        top = widen(tl.load(pairs + at, mask=live[:, None], other=0.0))
        difference = widen(tl.load(pairs + span.to(tl.int64) * stride_pairs + at, mask=live[:, None], other=0.0))
        z = top + tl.minimum(difference, 0.0)
        d = difference + apart[:, None]
        log_p = z + (above - log_total)[:, None]
        # log q where it is the larger of both: log p - d would be NaN at z = -infinity
        log_q = top - tl.maximum(difference, 0.0) + (above - log_total - apart)[:, None]
        dz = tl.exp(tl.where(d >= 0, log_p, log_q)) * (1 - tl.exp(-tl.abs(d)))
        dz = tl.where(d >= 0, dz, -dz)
        if SOFTCAP is not None:
            dz *= cap_slope(z + tile_peak[:, None], SOFTCAP)
        tl.store(gradient + at, round_nearest(dz, gradient.dtype.element_ty), mask=live[:, None])


@triton.jit
def _normaliser(norm, token, num_rows, live):
    """Load (max z, sum exp(z - max z)) of rows; (0, 1) where they are not live."""
    peak = tl.load(norm + token, mask=live, other=0.0)
    return peak, tl.load(norm + num_rows + token, mask=live, other=1.0)
