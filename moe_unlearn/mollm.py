"""MOLLM: the common descent direction of several objectives from their Gram matrix alone.

    lambda = argmin over the simplex of | sum_i lambda_i g^_i |^2,      g^_i the normalised gradients
    d      = sum_i lambda_i g^_i = sum_i coefficients_i g_i
    either d = 0 (Pareto stationary) or <g^_i, d> >= |d|^2 > 0 for every i: a step along -d lowers all

Normalisations: none; unit, g / |g|; mean_norm, g / |g| times the mean of the norms. Rescaling to
"mean_gradient" gives d the norm of the plain mean of the gradients, since the minimum-norm point is short; the
stationarity test comes before. Masks must have been applied to every g_i before the Gram matrix.

Sources: the dual and its guarantee are the multiple-gradient descent algorithm, read in FedLF and FedMDFG by
MOLLM's first author, as are norm averaging and rescaling; which of these MOLLM uses is not known, so their
combination is our reconstruction. With AdamW the guarantee is a heuristic.
"""

from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor

NORMALIZE = ("none", "unit", "mean_norm")
RESCALE = ("none", "mean_gradient")
_SMALLEST_NORM = 1e-6  # relative to the largest: below it a gradient is noise
_STATIONARY = 1e-6  # |d| relative to the largest normalised gradient


@dataclass(frozen=True)
class CommonDescent:
    """Result of `common_descent`."""

    weights: Tensor  # lambda [m] float64, on the simplex; 0 for objectives left out
    coefficients: Tensor  # [m] float64, d = sum_i coefficients_i g_i
    stationary: bool  # no direction lowers every objective that takes part
    dropped: Tensor  # bool [m], objectives left out


def common_descent(
    gram: Tensor, *, normalize: str = "none", rescale: str = "none", active: Tensor | None = None
) -> CommonDescent:
    """Solve for the direction; see the module docstring.

    Args:
        gram: [m, m] inner products of the gradients, symmetric and finite.
        active: bool [m], objectives that take part; None is all. Beside those, an objective whose norm is
            below 1e-6 of the largest is left out.

    Exact: closed form for two, enumeration of supports for three, active sets beyond. Raises ValueError.
    """
    if normalize not in NORMALIZE or rescale not in RESCALE:
        raise ValueError(
            f"normalize must be one of {NORMALIZE} and rescale of {RESCALE}; got {normalize!r}, {rescale!r}"
        )
    gram = gram.detach().double().cpu()
    m = len(gram)
    if gram.shape != (m, m) or m == 0:
        raise ValueError(f"gram must be [m, m] with m >= 1; got {list(gram.shape)}")
    if not gram.isfinite().all():
        raise ValueError("gram must be finite")
    norms = gram.diagonal().clamp_min(0).sqrt()
    kept = norms > _SMALLEST_NORM * norms.max()
    if active is not None:
        kept &= active.cpu()
    index = kept.nonzero().flatten()
    weights, coefficients = torch.zeros(m, dtype=torch.float64), torch.zeros(m, dtype=torch.float64)
    if not len(index):
        return CommonDescent(weights, coefficients, True, ~kept)

    own, lengths = gram[index][:, index], norms[index]
    scale = torch.ones_like(lengths)
    if normalize != "none":
        scale = (1.0 if normalize == "unit" else lengths.mean()) / lengths
    normalised = own * scale[:, None] * scale
    solution = minimum_norm(normalised)
    squared = float(solution @ normalised @ solution)
    stationary = squared <= _STATIONARY**2 * float(normalised.diagonal().max())
    weights[index] = solution
    factors = solution * scale
    if rescale == "mean_gradient" and not stationary:
        mean_squared = float(own.sum()) / len(index) ** 2
        factors = factors * (max(mean_squared, 0.0) / squared) ** 0.5
    coefficients[index] = factors
    return CommonDescent(weights, coefficients, stationary, ~kept)


def minimum_norm(gram: Tensor) -> Tensor:
    """lambda [m] on the simplex minimising lambda^T G lambda, for a positive semidefinite G [m, m]."""
    m = len(gram)
    if m == 1:
        return torch.ones(1, dtype=gram.dtype)
    if m == 2:
        difference = float(gram[0, 0] + gram[1, 1] - 2 * gram[0, 1])
        first = float(gram[1, 1] - gram[0, 1]) / difference if difference > 0 else 0.5
        first = min(max(first, 0.0), 1.0)
        return torch.tensor([first, 1 - first], dtype=gram.dtype)
    if m == 3:
        supports = [s for size in (1, 2, 3) for s in combinations(range(3), size)]
        found = [x for x in (_on_support(gram, s) for s in supports) if x is not None]
        return min(found, key=lambda x: float(x @ gram @ x))
    return _active_set(gram)


def _on_support(gram: Tensor, support: tuple[int, ...]) -> Tensor | None:
    """Stationary point with exactly this support, or None if it leaves the simplex."""
    index = torch.tensor(support)
    part = gram[index][:, index]
    # equality-constrained minimum; least squares copes with a singular Gram matrix
    size = len(support)
    system = torch.zeros(size + 1, size + 1, dtype=gram.dtype)
    scale = part.diagonal().mean().clamp_min(1e-300)
    system[:size, :size], system[size, :size], system[:size, size] = part / scale, 1, 1
    right = torch.zeros(size + 1, dtype=gram.dtype)
    right[size] = 1
    x = torch.linalg.lstsq(system, right[:, None], driver="gelsd").solution[:size, 0]
    if (x < -1e-12).any() or abs(float(x.sum()) - 1) > 1e-9:
        return None
    full = torch.zeros(len(gram), dtype=gram.dtype)
    full[index] = x.clamp_min(0) / x.clamp_min(0).sum()
    return full


def _active_set(gram: Tensor) -> Tensor:
    """Wolfe's method: grow the support by the most violating vertex, shrink it to stay on the simplex."""
    m = len(gram)
    start = int(gram.diagonal().argmin())
    x = torch.zeros(m, dtype=gram.dtype)
    x[start] = 1
    support = [start]
    for _ in range(100 * m):
        gradient = gram @ x
        best = int(gradient.argmin())
        if best in support or gradient[best] >= x @ gradient - 1e-14 * gram.diagonal().max():
            return x
        support.append(best)
        while True:
            y = _affine(gram, support)
            if (y[support] > 1e-15).all():
                x = y
                break
            blocking = [i for i in support if y[i] <= 1e-15]
            step = min(float(x[i] / (x[i] - y[i])) for i in blocking if x[i] > y[i])
            x = x + step * (y - x)
            support = [i for i in support if x[i] > 1e-15]
            x = torch.zeros_like(x).index_copy(0, torch.tensor(support), x[support])
            x = x / x.sum()
    return x


def _affine(gram: Tensor, support: list[int]) -> Tensor:
    index = torch.tensor(support)
    part = gram[index][:, index]
    ridge = 1e-14 * part.diagonal().max()
    y = torch.linalg.solve(part + ridge * torch.eye(len(index), dtype=gram.dtype),
                           torch.ones(len(index), dtype=gram.dtype))  # fmt: skip
    return torch.zeros(len(gram), dtype=gram.dtype).index_copy(0, index, y / y.sum())
