"""Computes token_loss's kind "logit_margin" in torch, a tile of rows x vocabulary at a time; no other code does.

The backward gets three numbers of each row: norm = (max z, mean z) and, in ref_norm[0], the column of the maximum, the
first one if several are largest. Without a softcap the backward computes no logits.
"""

import torch

from moe_unlearn.ops.token_loss import _DEFAULT_ROWS, IGNORED, _counted, _logits, _tiles, _wide


def forward(hidden, head, labels, bias, weights, ref_hidden, ref_head, kind, scale, softcap,
            drop_zero_weights, chunk_rows):  # fmt: skip
    """Compute (loss [T], l [T], norm [2, T], ref_norm [2, T]), 0 in the rows that do not count."""
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


def backward(grad, hidden, head, labels, bias, weights, ref_hidden, ref_head, value, norm, ref_norm,
             kind, scale, softcap, drop_zero_weights, chunk_rows, needs_hidden, needs_head, needs_bias):  # fmt: skip
    """Compute the gradients of hidden [T, H], head [V, H] and bias [V]; empty for one that is not needed."""
    dtype = norm.dtype
    upstream = grad.to(dtype) if weights is None else grad.to(dtype) * weights.to(dtype)
    slope = 2 * scale * upstream * (norm[0] - norm[1])
    chunks = [
        (rows, hidden[rows].to(dtype))
        for rows in _counted(labels, weights, drop_zero_weights).split(chunk_rows or _DEFAULT_ROWS)
    ]
    sums = [torch.zeros_like(h) if needs_hidden else None for _, h in chunks]
    grad_head = head.new_zeros(head.shape if needs_head else 0)
    grad_bias = head.new_zeros(0) if not needs_bias else bias.new_zeros(bias.shape)
    # the outer loop is over the vocabulary, so that each tile of the head's gradient is completed and rounded once
    for tile in _tiles(len(chunks[0][0]), len(head), dtype):
        w = head[tile].to(dtype)
        grad_w, grad_b = torch.zeros_like(w) if needs_head else None, torch.zeros_like(w[:, 0])
        for (rows, h), grad_h in zip(chunks, sums, strict=True):
            columns = torch.arange(tile.start, tile.stop, device=labels.device)
            dz = (columns == ref_norm[0, rows, None].long()).to(dtype) - 1 / len(head)
            if softcap is not None:
                z = _logits(h, w, None if bias is None else bias[tile], scale, softcap)
                dz = dz * (1 - (z / softcap).square())
            dz = dz * slope[rows, None]
            if needs_hidden:
                grad_h += dz @ w
            if needs_head:
                grad_w += dz.t() @ h
            if needs_bias:
                grad_b += dz.sum(0)
        if needs_head:
            grad_head[tile] = grad_w.to(head.dtype)
        if needs_bias:
            grad_bias[tile] = grad_b.to(bias.dtype)
    grad_hidden = hidden.new_zeros(hidden.shape if needs_hidden else 0)
    if needs_hidden:
        for (rows, _), grad_h in zip(chunks, sums, strict=True):
            grad_hidden[rows] = grad_h.to(hidden.dtype)
    return grad_hidden, grad_head, grad_bias
