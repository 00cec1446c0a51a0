"""MOLLM: computes the direction that lowers several objectives together, from their Gram matrix alone.

    lambda = argmin over the simplex of | sum_i lambda_i g^_i |^2          g^_i the normalised gradients
    d      = sum_i lambda_i g^_i = sum_i coefficients_i g_i
    either d = 0 (Pareto stationary) or < g^_i, d > >= |d|^2 > 0 for every i: a small step along -d lowers all

Normalisations: `none`; `unit`, g / |g|; `mean_norm`, g / |g| times the mean of the norms. Rescaling to
`mean_gradient` gives d the norm of the plain mean of the gradients (the minimum-norm point is short); the
stationarity test uses the unit gradients and comes before the rescaling. The Gram matrix must be that of gradients
to which masks have been applied.

Worked example: g_1 = (1, 0), g_2 = (0, 2), Gram [[1, 0], [0, 4]]. `none`: lambda = (0.8, 0.2), d =
(0.8, 0.4), <g_1, d> = <g_2, d> = |d|^2 = 0.8. `unit`: lambda = (0.5, 0.5), coefficients (0.5, 0.25).

With SGD the guarantee holds to first order in the step; an adaptive optimizer such as AdamW rescales d per
coordinate and makes it a heuristic. The solver works in float64, in cosines and ratios of lengths, so that the
guarantee holds for gradients of any lengths, such as 1e12 beside 1e-12, up to a rounding of |g^_i| |d|. Inner products
are of the size of squared lengths: a minimum-norm point below about 1e-8 of the unit gradients drowns in rounding.

Sources: only the abstract of MOLLM (arXiv 2412.20412) could be read. The dual problem, its guarantee, the averaging of
norms and the rescaling of d were read in FedLF and FedMDFG by the same first author. Which of them MOLLM uses is
unknown, so that their combination here is our reconstruction.
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
        active: bool [m], the objectives that may take part; None stands for all.
        drop_below: an objective whose norm is at most this fraction of the largest is left out.
        stationary_below: the point is stationary if the minimum-norm point of the unit gradients is at most this long,
            whatever `normalize` says: a direction that lowers all objectives does so for gradients of any lengths.

    If no objective takes part, weights and coefficients are 0 and the point is stationary. The solution is exact: a
    closed form for two objectives, all supports for three, an active set for more. It is deterministic. Raises
    ValueError for a malformed argument.
    """
    gram = _checked(gram, normalize, rescale, active)
    norms = gram.diagonal().sqrt()
    if active is not None:
        norms = torch.where(active.cpu(), norms, 0.0)
    kept = norms > drop_below * norms.max()
    weights, coefficients = torch.zeros_like(norms), torch.zeros_like(norms)
    if not kept.any():
        return CommonDescent(weights, coefficients, True, ~kept)

    own, norms = gram[kept][:, kept], norms[kept]
    cosines, equal = _cosines(own), torch.ones_like(norms)
    lengths = {"none": norms, "unit": equal, "mean_norm": norms.mean() * equal}[normalize]
    solution = _minimum(cosines, lengths)
    of_units = solution if normalize != "none" else _minimum(cosines, equal)
    stationary = float(of_units @ cosines @ of_units) <= stationary_below**2
    stretch = 1.0
    if rescale == "mean_gradient" and not stationary:
        d = solution * lengths
        stretch = (max(float(own.mean()), 0.0) / float(d @ cosines @ d)) ** 0.5
    weights[kept] = solution
    coefficients[kept] = stretch * solution * lengths / norms
    return CommonDescent(weights, coefficients, stationary, ~kept)


def kl_active(value: float, floor: float, *, factor: float = 10.0) -> bool:
    """Return whether KL may take part in the direction: its value must exceed `factor` times its `floor`.

    The floor is the value measured at the unchanged model. There KL is not zero but rounding noise of the cached
    reference, and the minimum-norm point would follow the noise.
    """
    return value > factor * floor


def minimum_norm(gram: Tensor) -> Tensor:
    """Find lambda [m] on the simplex that minimises lambda^T G lambda, for a positive semidefinite float64 G."""
    norms = gram.diagonal().sqrt()
    shortest = int(norms.argmin())
    if norms[shortest] == 0:
        return torch.zeros_like(norms).index_fill(0, torch.tensor([shortest]), 1.0)
    return _minimum(_cosines(gram), norms)


def _cosines(gram: Tensor) -> Tensor:
    """Compute the inner products of the unit vectors, which are of one size whatever the ratio of the lengths."""
    norms = gram.diagonal().sqrt()
    return (gram / norms / norms[:, None]).clamp(-1, 1).fill_diagonal_(1)


def _minimum(cosines: Tensor, lengths: Tensor) -> Tensor:
    """Find lambda [m] of the shortest d = sum_i lambda_i lengths_i u_i, u_i the unit vectors with these `cosines`.

    The problem is solved for y_i = lambda_i lengths_i / (shortest length), on { y >= 0, w . y = 1 } with
    w_i = shortest / lengths_i.
    """
    m, w = len(lengths), lengths.min() / lengths
    if m > 3:
        y = _active_set(cosines, w)
    elif m == 2:
        y = _of_two(float(cosines[0, 1]), w)
    else:
        supports = [list(s) for size in range(1, m + 1) for s in combinations(range(m), size)]
        # a minimum outside the simplex is clamped onto it and is one more candidate: the smallest value wins
        points = [_on_simplex(_affine_minimum(cosines, w, support), w) for support in supports]
        y = min(points, key=lambda y: float(y @ cosines @ y))
    return w * y / float(w @ y)


def _of_two(cosine: float, w: Tensor) -> Tensor:
    """Compute y of two vectors in closed form."""
    y = (w - cosine * w.flip(0)).clamp_min(0)
    return y if y.any() else torch.ones_like(w)  # the two vectors are the same


def _affine_minimum(cosines: Tensor, w: Tensor, support: list[int]) -> Tensor:
    """Find y [m] that minimises y^T C y with w . y = 1, 0 outside `support`, of any signs; of least norm if many do."""
    size = len(support)
    system = torch.zeros(size + 1, size + 1, dtype=cosines.dtype)
    system[:size, :size] = cosines[support][:, support]
    largest = w[support].max()
    system[:size, size] = system[size, :size] = w[support] / largest
    right = torch.zeros(size + 1, 1, dtype=cosines.dtype)
    right[size] = 1
    solution = torch.linalg.lstsq(system, right, driver="gelsd").solution[:size, 0] / largest
    return torch.zeros_like(w).index_copy(0, torch.tensor(support), solution)


def _on_simplex(y: Tensor, w: Tensor) -> Tensor:
    positive = y.clamp_min(0)
    return positive / (w @ positive)


def _active_set(cosines: Tensor, w: Tensor) -> Tensor:
    """Find y [m] by Wolfe's minimum-norm-point method (1976).

    Each round adds the vertex that violates optimality most, then walks to the minimum on the affine hull of the
    support; where the walk would leave the simplex, the vertices that stop it are dropped.
    """
    support = [int(w.argmax())]
    y = torch.zeros_like(w).index_fill(0, torch.tensor(support), 1.0)
    best, best_value = y, 1.0
    while True:
        slope = cosines @ y
        violation = float(y @ slope) * w - 4 * len(w) * _EPSILON * float(y.sum()) - slope
        entering = int(violation.argmax())
        if violation[entering] <= 0 or entering in support:
            return best
        support.append(entering)
        while (target := _affine_minimum(cosines, w, support))[support].min() <= 0:
            blocking = [i for i in support if target[i] <= 0]
            steps = y[blocking] / (y[blocking] - target[blocking]).clamp_min(_TINY)
            leaving = blocking[int(steps.argmin())]
            y = y + float(steps.min().clamp(0, 1)) * (target - y)
            support.remove(leaving)
            y = _on_simplex(torch.zeros_like(y).index_copy(0, torch.tensor(support), y[support]), w)
        y = _on_simplex(target, w)
        value = float(y @ cosines @ y)
        # each round lowers the value unless rounding prevents it; then the best point so far is the result
        if value >= best_value:
            return best
        best, best_value = y, value


def _checked(gram: Tensor, normalize: str, rescale: str, active: Tensor | None) -> Tensor:
    if normalize not in NORMALIZE:
        raise ValueError(f"normalize must be one of {NORMALIZE}; got {normalize!r}")
    if rescale not in RESCALE:
        raise ValueError(f"rescale must be one of {RESCALE}; got {rescale!r}")
    gram = gram.detach().to("cpu", torch.float64)
    if gram.dim() != 2 or gram.shape[0] != gram.shape[1] or len(gram) == 0:
        raise ValueError(f"gram must be [m, m] with m >= 1; got {list(gram.shape)}")
    if not gram.isfinite().all():
        raise ValueError(f"gram must be finite; got {gram.tolist()}")
    squares = gram.diagonal()
    # each entry is compared with the product of its two lengths, since those of short gradients are small
    unequal = (gram - gram.t()).abs() > 1e-5 * (squares.clamp_min(0) * squares.clamp_min(0)[:, None]).sqrt()
    if unequal.any() or (squares < 0).any():
        raise ValueError(f"gram must be symmetric with a diagonal of squares; got {gram.tolist()}")
    if active is not None and (active.dtype != torch.bool or active.shape != gram.shape[:1]):
        raise ValueError(f"active must be bool [m] = [{len(gram)}]; got {active.dtype} {list(active.shape)}")
    return (gram + gram.t()) / 2
