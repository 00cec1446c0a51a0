"""Say how sure a mean over documents is."""

from collections.abc import Sequence

import torch

from moe_unlearn.data import generator

_RESAMPLES = 1000
_CHUNK = 2**22  # draws that are in memory
_LEVEL = 0.95


def interval(values: Sequence[float | None], weights: Sequence[float] | None = None) -> tuple[float, float] | None:
    """Return the 95 % percentile bootstrap interval of sum_i w_i v_i / sum_i w_i over documents i, which are resampled.

    Without `weights` each document counts once; None among the values is left out. It never leaves the range of the
    values, and two calls agree. None for fewer than two documents. Source: Efron and Tibshirani 1993, ch. 13.
    """
    given = [1.0] * len(values) if weights is None else weights
    known = [(value, weight) for value, weight in zip(values, given, strict=True) if value is not None and weight > 0]
    if len(known) < 2:
        return None
    value, weight = torch.tensor(known, dtype=torch.float64).T
    draw, means = generator(0, 0), []
    size = max(1, _CHUNK // len(known))
    for start in range(0, _RESAMPLES, size):
        rows = torch.randint(len(known), (min(size, _RESAMPLES - start), len(known)), generator=draw)
        means.append((value * weight)[rows].sum(1) / weight[rows].sum(1))
    ends = torch.cat(means).quantile(torch.tensor([(1 - _LEVEL) / 2, (1 + _LEVEL) / 2], dtype=torch.float64))
    return float(ends[0]), float(ends[1])
