"""retain_weights: finds TRACE's token weights, the smallest change that moves expert frequencies to their targets.

    w_t = min(cap, exp(b + theta . a_t))        mean_t w_t = 1        mean_t w_t a_t = target

a_t in {0, 1}^S says which of S selected experts token t uses. If a router may name an expert twice for one token, a_t
counts how often, as `route` does. Among all weights that meet the two equations and the cap, these have the smallest
KL divergence from uniform weights. (b, theta) minimise the convex dual

    D(b, theta) = mean_t phi(b + theta . a_t) - b - theta . target + ridge / 2 |theta|^2
    phi'(x)     = min(cap, exp(x))

by damped Newton in float64. A capped token has zero curvature, so that the cap is part of the problem: nothing is
clipped and renormalised afterwards. The ridge shrinks from 0.1 to 1e-7, and each solution starts the next. The last
step is proximal (the ridge pulls towards the tilt found, not to 0), so that a reachable target is met up to rounding.
An unreachable target (exclusive experts with targets that add up to more than all tokens, or a target above what the
cap allows) is replaced by the L2-nearest reachable frequencies, the end of the ridge path; `achieved` returns them.

The tokens enter in one pass of sums over packed membership words (layout: `ops.bits`), with a~ = (1, a):

    first [S + 1]         = sum_t w_t a~_t                                gradient of the dual, times T
    second [S + 1, S + 1] = sum_{t: w_t < cap} w_t a~_t a~_t^T            its Hessian, times T

Worked example: one expert used by 1 of 4 tokens, target 1/2. Then w = 2 where it is used and 2/3 where it is not; in
general f^F / f^R and (1 - f^F) / (1 - f^R).

The result is deterministic: sums run over fixed blocks of tokens in order. Source: our specification of TRACE's stated
idea (arXiv 2606.10338; abstract read, its formulas are not public). Exponential tilting itself is the classical
"raking" of survey statistics.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from moe_unlearn import backend, native
from moe_unlearn.ops.bits import num_words, pack_bits, unpack_bits
from moe_unlearn.ops.custom import custom_op

RIDGES = tuple(10.0**-k for k in range(1, 8))
REACHED = 1e-5  # a target missed by more is unreachable, since the last ridge accounts for only 1e-7 |theta|
BLOCK = 4096
_MAX_STEPS = 100
_MAX_HALVINGS = 60


class RetainWeights(NamedTuple):
    """Result of `retain_weights`; the small tensors are float64 on the CPU."""

    weights: Tensor  # [T] float32, mean 1, on the device of the members
    tilt: Tensor  # theta [S], 0 for an expert that cannot be moved
    bias: float  # b
    achieved: Tensor  # [S] weighted frequency of each expert
    ess: float  # effective sample size (sum w)^2 / sum w^2, in tokens


def retain_weights(members: Tensor, target: Tensor, *, cap: float | None = None, impl: str = "auto") -> RetainWeights:
    """Find the weights of T tokens under which each of S experts is used with its target frequency.

    Args:
        members: bool [T, S], whether token t uses expert s, or integers, how often it does; T >= 1.
        target: float [S], frequencies in [0, 1], or up to the largest of `members`. Unreachable ones are replaced by
            the nearest reachable values.
        cap: largest weight allowed, >= 1; at 1 all weights are 1. None for no cap.
        impl: as everywhere; numbers above 1 cannot be packed and go to the reference passes.

    An expert that all tokens use equally often, or not at all, cannot be moved: it is left out and keeps its frequency.
    Raises TypeError or ValueError for a wrong dtype, shape or value, RuntimeError without convergence.
    """
    _check(members, target, cap)
    limit = math.inf if cap is None else float(cap)
    if members.dtype != torch.bool and bool((members <= 1).all()):
        members = members.bool()
    achieved = members.double().mean(0).cpu()
    movable = (members != members[0]).any(0)
    members, movable = members[:, movable], movable.cpu()
    words, impl = (pack_bits(members), impl) if members.dtype == torch.bool else (members.double(), "ref")
    goal = target.detach().double().cpu()[movable]

    bias, tilt = 0.0, torch.zeros_like(goal)
    if limit > 1 and len(goal):
        bias, tilt, achieved[movable] = _solve(words, goal, limit, impl)
    weights = _tilted_weights(words, tilt.to(words.device), bias, limit, impl)
    total, squares = weights.double().sum(), weights.double().square().sum()
    whole = torch.zeros_like(achieved).masked_scatter(movable, tilt)
    return RetainWeights(weights, whole, bias, achieved, float(total.square() / squares))


def retain_weights_ref(members: Tensor, target: Tensor, *, cap: float | None = None) -> RetainWeights:
    """Compute `retain_weights` with the reference passes below."""
    return retain_weights(members, target, cap=cap, impl="ref")


def tilted_weights(words: Tensor, tilt: Tensor, bias: float, *, cap: float | None = None, impl: str = "auto") -> Tensor:
    """Compute w_t = min(cap, exp(bias + tilt . a_t)) in float64; returns float32 [T].

    Args:
        words: int32 [T, ceil(S / 32)], the packed members; tilt: float64 [S].
    """
    _check_words(words, tilt)
    weights: Tensor = _tilted_weights(words, tilt.to(words.device), bias, math.inf if cap is None else float(cap), impl)
    return weights


def tilted_weights_ref(words: Tensor, tilt: Tensor, bias: float, cap: float) -> Tensor:
    """Compute `tilted_weights` in plain PyTorch; `cap` may be infinite."""
    blocks = [(bias + _unpacked(part, tilt) @ tilt).exp().clamp_max(cap) for part in words.split(BLOCK)]
    return torch.cat(blocks).to(torch.float32)


def moments(
    words: Tensor, tilt: Tensor, bias: float, *, cap: float | None = None, impl: str = "auto"
) -> tuple[Tensor, Tensor]:
    """Compute first [S + 1] and second [S + 1, S + 1], float64, the sums of the module docstring.

    Args:
        words: int32 [T, ceil(S / 32)], the packed members; tilt: float64 [S].
    """
    _check_words(words, tilt)
    first, second = _moments(words, tilt.to(words.device), bias, math.inf if cap is None else float(cap), impl)
    return first, second


def moments_ref(words: Tensor, tilt: Tensor, bias: float, cap: float) -> tuple[Tensor, Tensor]:
    """Compute `moments` in plain PyTorch; `cap` may be infinite."""
    size = len(tilt) + 1
    first, second = tilt.new_zeros(size), tilt.new_zeros(size, size)
    for part in words.split(BLOCK):
        members = _unpacked(part, tilt)
        raw = (bias + members @ tilt).exp()
        free = torch.where(raw < cap, raw, 0.0)
        extended = torch.nn.functional.pad(members, (1, 0), value=1.0)
        first = first + extended.t() @ raw.clamp_max(cap)
        second = second + (extended * free[:, None]).t() @ extended
    return first, second


def _unpacked(words: Tensor, tilt: Tensor) -> Tensor:
    """Return a_t [T, S] in the dtype of `tilt`: unpacked words, or counts as they are."""
    return words if words.is_floating_point() else unpack_bits(words, len(tilt)).to(tilt.dtype)


def _solve(words: Tensor, target: Tensor, cap: float, impl: str) -> tuple[float, Tensor, Tensor]:
    """Find (bias, tilt [S], weighted frequency [S]) for the reachable target nearest to `target`."""
    origin = torch.zeros(len(target) + 1, dtype=torch.float64)

    def follow_ridge(goal: Tensor) -> tuple[Tensor, Tensor]:
        point = origin
        for ridge in RIDGES:
            point, mean = _newton(words, goal, cap, ridge, origin, point, impl)
        return point, mean

    goal = torch.cat([target.new_ones(1), target])
    point, mean = follow_ridge(goal)
    if float((mean - goal).abs().max()) > REACHED:
        # the tilt towards an unreachable target grows like 1 / ridge; towards the point reached it is moderate
        goal = torch.cat([goal[:1], mean[1:]])
        point, mean = follow_ridge(goal)
    point, mean = _newton(words, goal, cap, RIDGES[-1], point, point, impl)
    if not float((mean - goal).abs().max()) <= REACHED:
        raise RuntimeError(
            f"no convergence for {len(target)} experts and {len(words)} tokens: mean weight "
            f"{float(mean[0])}, frequencies off by {float((mean - goal)[1:].abs().max()):.3g}"
        )
    return float(point[0]), point[1:], mean[1:] / mean[0]


def _newton(
    words: Tensor, goal: Tensor, cap: float, ridge: float, center: Tensor, point: Tensor, impl: str
) -> tuple[Tensor, Tensor]:
    """Minimise D + ridge / 2 |theta - center|^2 from `point` = (b, theta); return the minimum and mean_t w_t a~_t."""
    # b has no ridge, so that the mean weight is 1 for every tilt
    penalty = torch.full_like(goal, ridge).index_fill(0, torch.tensor([0]), 0.0)
    rounding = 8 * torch.finfo(goal.dtype).eps

    def derivatives(point: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        first, second = _moments(words, point[1:].to(words.device), float(point[0]), cap, impl)
        mean = first.cpu() / len(words)
        hessian = second.cpu() / len(words) + torch.diag(penalty)
        return mean, mean - goal + penalty * (point - center), hessian

    mean, gradient, hessian = derivatives(point)
    for _ in range(_MAX_STEPS):
        # the exponents grow with the point, and their rounding limits how small the gradient can become
        if float(gradient.abs().max()) <= 1e-13 + rounding * (1 + float(point.abs().sum())):
            break
        # a state in which every token is capped has no curvature along b
        hessian[0, 0] += torch.finfo(goal.dtype).eps
        step = -torch.linalg.solve(hessian, gradient)
        slope = float(gradient @ step)
        length = 1.0
        for _ in range(_MAX_HALVINGS):
            # the dual is convex, so that its derivative along the step only grows: if it is small or negative, the
            # step has not passed the minimum; an overflow gives NaN and is refused
            mean, ahead, hessian = derivatives(point + length * step)
            if float(ahead @ step) <= 0.1 * abs(slope):
                break
            length /= 2
        point, gradient = point + length * step, ahead
    return point, mean


@custom_op("moe_unlearn::retain_weights")
def _tilted_weights(words: Tensor, tilt: Tensor, bias: float, cap: float, impl: str) -> Tensor:
    weights: Tensor = backend.resolve("retain_weights", impl, words)(words, tilt, bias, cap)
    return weights


@_tilted_weights.register_fake
def _(words: Tensor, tilt: Tensor, bias: float, cap: float, impl: str) -> Tensor:
    return words.new_empty(words.shape[0], dtype=torch.float32)


@custom_op("moe_unlearn::retain_weights_moments")
def _moments(words: Tensor, tilt: Tensor, bias: float, cap: float, impl: str) -> tuple[Tensor, Tensor]:
    first, second = backend.resolve("retain_weights.moments", impl, words)(words, tilt, bias, cap)
    return first, second


@_moments.register_fake
def _(words: Tensor, tilt: Tensor, bias: float, cap: float, impl: str) -> tuple[Tensor, Tensor]:
    size = tilt.shape[0] + 1
    return tilt.new_empty(size), tilt.new_empty(size, size)


def _weights_native(words: Tensor, tilt: Tensor, bias: float, cap: float) -> Tensor:
    kernel = torch.ops.moe_unlearn_native.retain_weights
    weights: Tensor = kernel(words.contiguous(), tilt.contiguous(), bias, cap)
    return weights


def _moments_native(words: Tensor, tilt: Tensor, bias: float, cap: float) -> tuple[Tensor, Tensor]:
    kernel = torch.ops.moe_unlearn_native.retain_weights_moments
    first, second = kernel(words.contiguous(), tilt.contiguous(), bias, cap)
    return first, second


backend.register("retain_weights", "ref", tilted_weights_ref)
backend.register("retain_weights.moments", "ref", moments_ref)
for _impl in ("cpu", "cuda"):
    native.register("retain_weights", _weights_native, _impl)
    native.register("retain_weights.moments", _moments_native, _impl)
backend.register("retain_weights", "triton", "moe_unlearn.triton_kernels.retain_weights:retain_weights")
backend.register("retain_weights.moments", "triton", "moe_unlearn.triton_kernels.retain_weights:moments")


def _check(members: Tensor, target: Tensor, cap: float | None) -> None:
    if members.is_floating_point() or members.is_complex():
        raise TypeError(f"members must be bool, or integers that count; got {members.dtype}")
    if members.dim() != 2 or members.shape[0] == 0:
        raise ValueError(f"members must be [T, S] with T >= 1; got shape {tuple(members.shape)}")
    if not target.is_floating_point():
        raise TypeError(f"target must be floating point; got {target.dtype}")
    if target.shape != (members.shape[1],):
        raise ValueError(f"target must be [S] = [{members.shape[1]}]; got shape {tuple(target.shape)}")
    most = 1
    if members.dtype != torch.bool and members.numel():
        if int(members.min()) < 0:
            raise ValueError(f"members must count from 0; got {int(members.min())}")
        most = max(most, int(members.max()))
    if not bool(((target >= 0) & (target <= most)).all()):
        raise ValueError(f"target frequencies must lie in [0, {most}]; got {target.tolist()}")
    if cap is not None and not cap >= 1:
        raise ValueError(f"cap must be at least 1, for the mean weight is 1; got {cap}")


def _check_words(words: Tensor, tilt: Tensor) -> None:
    if tilt.dim() != 1 or tilt.dtype != torch.float64:
        raise ValueError(f"tilt must be float64 [S]; got {tilt.dtype} {tuple(tilt.shape)}")
    width = num_words(len(tilt))
    if words.dtype != torch.int32 or words.dim() != 2 or words.shape[1] != width:
        raise ValueError(
            f"words must be int32 [T, ceil({len(tilt)} / 32)] = [T, {width}]; got {words.dtype} {tuple(words.shape)}"
        )
