"""MOLLM: the direction that lowers several objectives together, from their Gram matrix alone.

    lambda = argmin over the simplex of | sum_i lambda_i g^_i |^2          g^_i the normalised gradients
    d      = sum_i lambda_i g^_i = sum_i coefficients_i g_i
    either d = 0 (Pareto stationary) or < g^_i, d > >= |d|^2 > 0 for every i: a small step along -d lowers all

Normalisations: `none`; `unit`, g / |g|; `mean_norm`, g / |g| times the mean of the norms. Rescaling to
`mean_gradient` gives d the norm of the plain mean of the gradients (the minimum-norm point is short); the
stationarity test comes before it. Masks must have been applied to every g_i before the Gram matrix.

Worked example: g_1 = (1, 0), g_2 = (0, 2), Gram [[1, 0], [0, 4]]. `none`: lambda = (0.8, 0.2), d =
(0.8, 0.4), <g_1, d> = <g_2, d> = |d|^2 = 0.8. `unit`: lambda = (0.5, 0.5), coefficients (0.5, 0.25).

With SGD the guarantee holds to first order in the step; an adaptive optimizer such as AdamW rescales d per
coordinate and makes it a heuristic. Inner products carry the squares of lengths: in float64, directions
shorter than about 1e-8 of the gradients drown in rounding.

Sources: MOLLM (arXiv 2412.20412) was not readable beyond its abstract. The dual problem and its guarantee,
averaging the norms and rescaling d were read in FedLF and FedMDFG of its first author; which of them MOLLM
uses is unknown, so their combination here is our reconstruction.
"""

from itertools import combinations
from typing import NamedTuple

import torch
from torch import Tensor

NORMALIZE = ("none", "unit", "mean_norm")
RESCALE = ("none", "mean_gradient")
_EPSILON, _TINY = torch.finfo(torch.float64).eps, torch.finfo(torch.float64).tiny ** 0.5


class CommonDescent(NamedTuple):
    """Result of `common_descent`; tensors on the CPU."""

    weights: Tensor  # lambda [m] float64, on the simplex; 0 where dropped
    coefficients: Tensor  # [m] float64, d = sum_i coefficients_i g_i, normalisation and rescaling included
    stationary: bool  # no direction lowers every objective that takes part
    dropped: Tensor  # bool [m], objectives left out


def common_descent(
    gram: Tensor,
    *,
    normalize: str = "none",
    rescale: str = "none",
    active: Tensor | None = None,
    drop_below: float = 1e-6,
    stationary_below: float = 1e-6,
) -> CommonDescent:
    """Solve for the direction; see the module docstring.

    Args:
        gram: [m, m] inner products of the gradients, symmetric and finite, m >= 1.
        normalize: "none", "unit" or "mean_norm"; rescale: "none" or "mean_gradient".
        active: bool [m], the objectives that may take part; None is all.
        drop_below: an objective whose norm is at most this fraction of the largest is left out.
        stationary_below: d counts as 0 up to this fraction of the longest normalised gradient.

    With nothing left to take part, weights and coefficients are 0 and the point is stationary. Exact: closed
    form for two objectives, all supports for three, an active set beyond. Deterministic. Raises ValueError.
    """
    gram = _checked(gram, normalize, rescale, active)
    norms = gram.diagonal().sqrt()
    if active is not None:
        norms = torch.where(active.cpu(), norms, 0.0)
    kept = norms > drop_below * norms.max()
    weights, coefficients = torch.zeros_like(norms), torch.zeros_like(norms)
    if not kept.any():
        return CommonDescent(weights, coefficients, True, ~kept)

    own, lengths = gram[kept][:, kept], norms[kept]
    scale = {"none": torch.ones_like, "unit": torch.reciprocal, "mean_norm": lambda n: n.mean() / n}[normalize](lengths)
    normalised = own * scale[:, None] * scale
    solution = minimum_norm(normalised)
    squared = float(solution @ normalised @ solution)
    stationary = squared <= stationary_below**2 * float(normalised.diagonal().max())
    stretch = 1.0
    if rescale == "mean_gradient" and not stationary:
        stretch = (max(float(own.mean()), 0.0) / squared) ** 0.5
    weights[kept] = solution
    coefficients[kept] = stretch * solution * scale
    return CommonDescent(weights, coefficients, stationary, ~kept)


def kl_active(value: float, floor: float, *, factor: float = 10.0) -> bool:
    """Whether KL may take part in the direction: its value exceeds `factor` times its `floor`.

    The floor is the value measured at the unchanged model, where KL is rounding noise of the cached
    reference and not zero: there the minimum-norm point would follow the noise.
    """
    return value > factor * floor


def minimum_norm(gram: Tensor) -> Tensor:
    """lambda [m] on the simplex that minimises lambda^T G lambda, for a positive semidefinite float64 G."""
    m = len(gram)
    if m == 1:
        return torch.ones_like(gram[0])
    if m == 2:
        between = gram[0, 0] - 2 * gram[0, 1] + gram[1, 1]
        first = ((gram[1, 1] - gram[0, 1]) / between).clamp(0, 1) if between > 0 else gram.new_tensor(0.5)
        return torch.stack([first, 1 - first])
    if m == 3:
        supports = [list(s) for size in (1, 2, 3) for s in combinations(range(3), size)]
        # a minimum outside the simplex is clamped onto it: a point like any other, so the smallest value wins
        points = [_on_simplex(_affine_minimum(gram, support)) for support in supports]
        return min(points, key=lambda x: float(x @ gram @ x))
    return _active_set(gram)


def _affine_minimum(gram: Tensor, support: list[int]) -> Tensor:
    """x [m], 0 outside `support`, sum 1, minimising x^T G x whatever the signs; of least norm if many do."""
    size = len(support)
    # in units of each vector's own length, so that lengths of any ratio leave the system well conditioned
    lengths = gram.diagonal()[support].sqrt().clamp_min(_TINY)
    shortest_over = lengths.min() / lengths
    system = torch.zeros(size + 1, size + 1, dtype=gram.dtype)
    system[:size, :size] = gram[support][:, support] / lengths[:, None] / lengths
    system[:size, size] = system[size, :size] = shortest_over
    right = torch.zeros(size + 1, 1, dtype=gram.dtype)
    right[size] = 1
    solution = torch.linalg.lstsq(system, right, driver="gelsd").solution[:size, 0] * shortest_over
    return torch.zeros_like(gram[0]).index_copy(0, torch.tensor(support), solution)


def _on_simplex(x: Tensor) -> Tensor:
    positive = x.clamp_min(0)
    return positive / positive.sum()


def _active_set(gram: Tensor) -> Tensor:
    """Wolfe's minimum-norm-point method (1976): add the vertex that violates optimality most, then walk to
    the minimum on the support's affine hull, dropping vertices that the simplex stops at."""
    norms = gram.diagonal().sqrt()
    support = [int(norms.argmin())]
    x = torch.zeros_like(norms).index_fill(0, torch.tensor(support), 1.0)
    best, best_value = x, float(x @ gram @ x)
    while True:
        slope = gram @ x
        rounding = 4 * len(gram) * _EPSILON * norms * float(x @ norms)
        violation = float(x @ slope) - rounding - slope
        entering = int(violation.argmax())
        if violation[entering] <= 0 or entering in support:
            return best
        support.append(entering)
        while (target := _affine_minimum(gram, support))[support].min() <= 0:
            blocking = [i for i in support if target[i] <= 0]
            steps = x[blocking] / (x[blocking] - target[blocking]).clamp_min(_TINY)
            leaving = blocking[int(steps.argmin())]
            x = x + float(steps.min().clamp(0, 1)) * (target - x)
            support.remove(leaving)
            x = _on_simplex(torch.zeros_like(x).index_copy(0, torch.tensor(support), x[support]))
        x = _on_simplex(target)
        value = float(x @ gram @ x)
        # each round lowers the value, but for rounding: then the best point stands
        if value >= best_value:
            return best
        best, best_value = x, value


def _checked(gram, normalize, rescale, active) -> Tensor:
    if normalize not in NORMALIZE:
        raise ValueError(f"normalize must be one of {NORMALIZE}; got {normalize!r}")
    if rescale not in RESCALE:
        raise ValueError(f"rescale must be one of {RESCALE}; got {rescale!r}")
    gram = gram.detach().to("cpu", torch.float64)
    if gram.dim() != 2 or gram.shape[0] != gram.shape[1] or len(gram) == 0:
        raise ValueError(f"gram must be [m, m] with m >= 1; got {list(gram.shape)}")
    if not gram.isfinite().all():
        raise ValueError(f"gram must be finite; got {gram.tolist()}")
    if not torch.allclose(gram, gram.t()) or (gram.diagonal() < 0).any():
        raise ValueError(f"gram must be symmetric with a diagonal of squares; got {gram.tolist()}")
    if active is not None and (active.dtype != torch.bool or active.shape != gram.shape[:1]):
        raise ValueError(f"active must be bool [m] = [{len(gram)}]; got {active.dtype} {list(active.shape)}")
    return (gram + gram.t()) / 2
