"""Computes token_loss's kind "logit_margin" in torch, a tile of rows x vocabulary at a time; no other code does.

The backward gets three numbers of each row: norm = (max z, mean z) and, in ref_norm[0], the column of the maximum, the
first one if several are largest. Without a softcap the backward computes no logits.
"""

from typing import Any

import torch
from torch import Tensor

from moe_unlearn.ops.tiled.token_loss import gradients
from moe_unlearn.ops.token_loss import (
    _DEFAULT_ROWS,
    IGNORED,
    _counted,
    _logits,
    _tiles,
    _wide,
    backward_operands,
    unflattened,
)


def forward(*operands: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute (loss [T], l [T], norm [2, T], ref_norm [2, T]), 0 in the rows that do not count."""
    (hidden, head, labels, bias, weights, _, _), formula = unflattened(*operands)
    _, scale, softcap, drop_zero_weights, chunk_rows, _ = formula
    dtype = _wide(hidden, head)
    value = torch.zeros(labels.shape, dtype=dtype, device=labels.device)
    norm, ref_norm = value.new_zeros(2, *labels.shape), value.new_zeros(2, *labels.shape)
    for rows in _counted(labels, weights, drop_zero_weights).split(chunk_rows or _DEFAULT_ROWS):
        h, peaks, columns, sums = hidden[rows].to(dtype), [], [], []
        for tile in _tiles(len(rows), len(head), dtype):
            z = _logits(h, head[tile], None if bias is None else bias[tile], scale, softcap)
            peak, column = z.max(1)
            peaks.append(peak)
            columns.append(column + tile.start)
            sums.append(z.sum(1))
        largest, of = torch.stack(peaks).max(0)
        norm[0, rows], norm[1, rows] = largest, torch.stack(sums).sum(0) / len(head)
        ref_norm[0, rows] = torch.stack(columns).gather(0, of[None])[0].to(dtype)  # exact in float32 up to 2^24
        value[rows] = (norm[0, rows] - norm[1, rows]).square()
    # the product would be NaN in an ignored row whose weight is NaN
    weighted = value.clone() if weights is None else value * weights.to(dtype)
    return torch.where(labels == IGNORED, 0, weighted), value, norm, ref_norm


def backward(grad: Tensor, *operands: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the gradients of hidden [T, H], head [V, H] and bias [V]; empty for one that is not needed."""
    (hidden, head, labels, bias, weights, _, _), (_, norm, ref_norm), formula, needs = backward_operands(*operands)
    _, scale, softcap, drop_zero_weights, chunk_rows, _ = formula
    dtype = norm.dtype
    upstream = grad.to(dtype) if weights is None else grad.to(dtype) * weights.to(dtype)
    outer = 2 * scale * upstream * (norm[0] - norm[1])
    chunks = _counted(labels, weights, drop_zero_weights).split(chunk_rows or _DEFAULT_ROWS)

    def slope(i: int, h: Tensor, w: Tensor, b: Tensor | None, tile: slice) -> Tensor:
        rows, columns = chunks[i], torch.arange(tile.start, tile.stop, device=labels.device)
        dz = (columns == ref_norm[0, rows, None].long()).to(dtype) - 1 / len(head)
        if softcap is not None:
            dz = dz * (1 - (_logits(h, w, b, scale, softcap) / softcap).square())
        return dz * outer[rows, None]

    return gradients(slope, chunks, hidden, head, bias, dtype, needs)
