"""Computes token_loss in torch, a tile of rows x vocabulary at a time: `ref`, and the only code for the kind "ce".

The backward gets two numbers of each row, norm = (max z, sum exp(z - max z)), and with targets q also ref_norm, the
same numbers of their logits.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from moe_unlearn.ops.token_loss import (
    _DEFAULT_ROWS,
    IGNORED,
    Formula,
    Needs,
    Operands,
    _counted,
    _logits,
    _tiles,
    _wide,
    backward_operands,
    unflattened,
)

Slope = Callable[[int, Tensor, Tensor, Tensor | None, slice], Tensor]
_WITH_TARGETS = ("kl", "ce")


def forward(*operands: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute (loss [T], l [T], norm [2, T], ref_norm [2, T]), 0 in the rows that do not count."""
    tensors, formula = unflattened(*operands)
    hidden, head, labels, bias, weights, ref_hidden, _ = tensors
    kind, scale, softcap, drop_zero_weights, chunk_rows, _ = formula
    dtype = _wide(hidden, head)
    value = torch.zeros(labels.shape, dtype=dtype, device=labels.device)
    norm, ref_norm = value.new_zeros(2, *labels.shape), value.new_zeros(2, *labels.shape)
    counted = _counted(labels, weights, drop_zero_weights)
    check_labels(labels[counted], kind, len(head))
    for rows in counted.split(chunk_rows or _DEFAULT_ROWS):
        h, y = hidden[rows].to(dtype), labels[rows]
        h_ref = None if ref_hidden is None else ref_hidden[rows].to(dtype)
        picked = torch.zeros_like(value[rows])
        parts, ref_parts, crosses = [], [], []
        for tile in _tiles(len(rows), len(head), dtype):
            b = None if bias is None else bias[tile]
            z = _logits(h, head[tile], b, scale, softcap)
            parts.append(_peak_and_sum(z))
            if kind in _WITH_TARGETS:
                z_ref = _targets(z, h_ref, y, tile, tensors, formula)
                ref_parts.append(_peak_and_sum(z_ref))
                z, z_ref = z - parts[-1][0][:, None], z_ref - ref_parts[-1][0][:, None]
                q = z_ref.exp()
                crosses.append(torch.where(q == 0, 0, q * (z_ref - z if kind == "kl" else -z)).sum(1))
            else:
                column, inside = _column(y, tile)
                picked = torch.where(inside, z.gather(1, column).squeeze(1), picked)
        shifts, norm[:, rows] = _merge(parts)
        if kind in _WITH_TARGETS:
            ref_shifts, ref_norm[:, rows] = _merge(ref_parts)
            q_sums = torch.stack([total for _, total in ref_parts])
            # a tile's unnormalised sum of q (log q - log p), or q (-log p), moves from the tile's maxima to the row's
            moved = q_sums * (ref_shifts - shifts if kind == "kl" else -shifts)
            cross = (torch.stack(crosses) + moved) * ref_shifts.exp()
            p_sum, q_sum = norm[1, rows], ref_norm[1, rows]
            value[rows] = cross.sum(0) / q_sum + (p_sum / q_sum if kind == "kl" else p_sum).log()
        else:
            nll = (norm[0, rows] - picked) + norm[1, rows].log()
            value[rows] = nll if kind == "nll" else -torch.log1p(-torch.exp(-nll) / 2)
    # the product would be NaN in an ignored row whose weight is NaN
    weighted = value.clone() if weights is None else value * weights.to(dtype)
    return torch.where(labels == IGNORED, 0, weighted), value, norm, ref_norm


def backward(grad: Tensor, *operands: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the gradients of hidden [T, H], head [V, H] and bias [V]; empty for one that is not needed."""
    tensors, (value, norm, ref_norm), formula, needs = backward_operands(*operands)
    hidden, head, labels, bias, weights, ref_hidden, _ = tensors
    kind, scale, softcap, drop_zero_weights, chunk_rows, _ = formula
    dtype = norm.dtype
    upstream = grad.to(dtype) if weights is None else grad.to(dtype) * weights.to(dtype)
    if kind == "uce":
        upstream = -upstream * torch.expm1(value)
    chunks = _counted(labels, weights, drop_zero_weights).split(chunk_rows or _DEFAULT_ROWS)
    references = [None if ref_hidden is None else ref_hidden[rows].to(dtype) for rows in chunks]

    def slope(i: int, h: Tensor, w: Tensor, b: Tensor | None, tile: slice) -> Tensor:
        rows = chunks[i]
        z, y = _logits(h, w, b, scale, softcap), labels[rows]
        dz = (z - norm[0, rows, None]).exp() / norm[1, rows, None]
        if kind in _WITH_TARGETS:
            z_ref = _targets(z, references[i], y, tile, tensors, formula)
            dz = dz - (z_ref - ref_norm[0, rows, None]).exp() / ref_norm[1, rows, None]
        else:
            column, inside = _column(y, tile)
            dz = dz.scatter_add(1, column, -inside.to(dtype)[:, None])
        dz = dz * (upstream[rows] * scale)[:, None]
        return dz if softcap is None else dz * (1 - (z / softcap).square())

    return gradients(slope, chunks, hidden, head, bias, dtype, needs)


def check_labels(labels: Tensor, kind: str, vocabulary: int) -> None:
    """Raise ValueError for a label outside of the vocabulary."""
    if kind == "kl" or labels.numel() == 0:
        return
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= vocabulary:
        raise ValueError(f"labels must be in [0, {vocabulary}) or {IGNORED}; got {low if low < 0 else high}")


def gradients(
    slope: Slope,
    chunks: Sequence[Tensor],
    hidden: Tensor,
    head: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    needs: Needs,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the gradients of hidden, head and bias; empty for one that is not needed.

    slope(i, h, w, b, tile) gives the gradient of the logits of rows `chunks[i]` at the columns of a tile, from hidden
    states h and weights w in `dtype` and the bias b.
    """
    states = [hidden[rows].to(dtype) for rows in chunks]
    sums = [h.new_zeros(h.shape if needs.hidden else 0) for h in states]
    grad_head = head.new_zeros(head.shape if needs.head else 0)
    grad_bias = head.new_zeros(0) if not needs.bias or bias is None else bias.new_zeros(bias.shape)
    # the outer loop is over the vocabulary, so that each tile of the head's gradient is completed and rounded once
    for tile in _tiles(len(chunks[0]), len(head), dtype):
        w, b = head[tile].to(dtype), None if bias is None else bias[tile]
        grad_w, grad_b = w.new_zeros(w.shape if needs.head else 0), torch.zeros_like(w[:, 0])
        for i, (h, grad_h) in enumerate(zip(states, sums, strict=True)):
            dz = slope(i, h, w, b, tile)
            if needs.hidden:
                grad_h += dz @ w
            if needs.head:
                grad_w += dz.t() @ h
            if needs.bias:
                grad_b += dz.sum(0)
        if needs.head:
            grad_head[tile] = grad_w.to(head.dtype)
        if needs.bias:
            grad_bias[tile] = grad_b.to(grad_bias.dtype)
    grad_hidden = hidden.new_zeros(hidden.shape if needs.hidden else 0)
    if needs.hidden:
        for rows, grad_h in zip(chunks, sums, strict=True):
            grad_hidden[rows] = grad_h.to(hidden.dtype)
    return grad_hidden, grad_head, grad_bias


def _targets(
    z: Tensor, h_ref: Tensor | None, labels: Tensor, tile: slice, tensors: Operands, formula: Formula
) -> Tensor:
    """Compute a tile of the targets' logits: those of the reference, or `z` without one, lowered at the label."""
    z_ref = z
    if h_ref is not None:
        head = tensors.head if tensors.ref_head is None else tensors.ref_head
        bias = None if tensors.bias is None else tensors.bias[tile]
        z_ref = _logits(h_ref, head[tile], bias, formula.scale, formula.softcap)
    if formula.label_penalty:
        column, inside = _column(labels, tile)
        penalty = torch.where(inside, -formula.label_penalty, 0.0).to(z_ref.dtype)
        z_ref = z_ref.scatter_add(1, column, penalty[:, None])
    return z_ref


def _peak_and_sum(z: Tensor) -> tuple[Tensor, Tensor]:
    """Compute (m, sum exp(z - m)) over the columns of a tile, m its maximum."""
    # m is kept finite, so that a tile of logits that are all -infinity sums to 0 and not to NaN
    m = z.amax(1).clamp_min(torch.finfo(z.dtype).min)
    return m, (z - m[:, None]).exp().sum(1)


def _merge(parts: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Compute each tile's maximum minus the row's, [tiles, n], and the maximum and sum of each row, [2, n]."""
    peaks, sums = (torch.stack(values) for values in zip(*parts, strict=True))
    m = peaks.amax(0)
    return peaks - m, torch.stack([m, (sums * (peaks - m).exp()).sum(0)])


def _column(labels: Tensor, tile: slice) -> tuple[Tensor, Tensor]:
    """Return each label's column within the tile, clamped into it, [n, 1], and whether it lies inside, [n]."""
    inside = (labels >= tile.start) & (labels < tile.stop)
    return (labels - tile.start).clamp(0, tile.stop - tile.start - 1)[:, None], inside
