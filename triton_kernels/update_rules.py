"""The rules of `masked_update`, SGD's and AdamW's, on tiles: what every kernel that updates weights shares."""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from moe_unlearn.triton_kernels.common import random_words, round_nearest, round_stochastic

# Used like this:
#
#     host     scalars, flags = adamw_constants(lr, beta1, beta2, eps, weight_decay, step)
#              kernel[grid](..., tuple(scalars), STEP_DTYPE=..., **flags)        or sgd_constants(...)
#     device   w, m, v = adamw_rule(w, g, m, v, scalars, STEP_DTYPE, DECAY)
#              new = round_weight(w, param.dtype.element_ty, index, step, seed, parameter_id, STOCHASTIC)
#              new_m = round_moment(m, first.dtype.element_ty, index, step, seed, parameter_id, STEP_DTYPE, False)
#              tl.store(param, tl.where(bits, new, old), ...)              bits = common.unpack_words(words)
#
# w, g, m, v, b are float32 tiles of one shape: w is the master if there is one, else the widened parameter; g is the
# float32 gradient. STEP_DTYPE, `step_dtype(param, state, rounding, master)`, is the dtype to which each operation
# rounds: float32 unless all of the state has the parameter's narrow dtype. index is the int64 flat index in the *whole*
# parameter: `first_element` and that in the tensor at hand. Every product that is added is written as tl.fma and
# nothing else can be contracted, so that the bits do not depend on enable_fp_fusion.

_TL_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def step_dtype(
    param: torch.Tensor, state: tuple[torch.Tensor | None, ...], rounding: str, master: torch.Tensor | None
) -> tl.dtype:
    """Return the dtype to which a rule's operations round: the parameter's if all of the state has it, else float32."""
    narrow = master is None and all(s is None or s.dtype == param.dtype for s in state)
    return _TL_DTYPES[param.dtype] if narrow and rounding == "nearest" else tl.float32


def first_element_of(param: torch.Tensor, first_row: int) -> int:
    """Return the flat index of param's first element in the parameter that it is a shard of."""
    return first_row * math.prod(param.shape[1:])


class SGDScalars(NamedTuple):
    """The scalars of `sgd_rule`, in its order."""

    negative_lr: float
    momentum: float
    gradient_share: float
    weight_decay: float


def sgd_constants(
    lr: float, momentum: float, dampening: float, weight_decay: float, nesterov: bool, step: int
) -> tuple[SGDScalars, dict[str, bool]]:
    """Compute (scalars, flags) of one SGD step, in double precision as torch.optim does."""
    flags = {
        "DECAY": weight_decay != 0,
        "MOMENTUM": momentum != 0,
        "NESTEROV": nesterov,
        "FIRST_STEP": momentum != 0 and step == 1,
    }
    return SGDScalars(-lr, momentum, 1 - dampening, weight_decay), flags


class AdamWScalars(NamedTuple):
    """The scalars of `adamw_rule`, in its order."""

    kept: float
    gradient_share: float
    beta2: float
    square_share: float
    correction: float
    eps: float
    negative_rate: float


def adamw_constants(
    lr: float, beta1: float, beta2: float, eps: float, weight_decay: float, step: int
) -> tuple[AdamWScalars, dict[str, bool]]:
    """Compute (scalars, flags) of one AdamW step, in double precision as torch.optim does."""
    correction, negative_rate = (1 - beta2**step) ** 0.5, -(lr / (1 - beta1**step))
    scalars = AdamWScalars(1 - lr * weight_decay, 1 - beta1, beta2, 1 - beta2, correction, eps, negative_rate)
    return scalars, {"DECAY": weight_decay != 0}


@triton.jit
def _round(value, DTYPE: tl.constexpr):
    """Round `value` to DTYPE; the result is held in float32."""
    return round_nearest(value, DTYPE).to(tl.float32)


@triton.jit
def sgd_rule(
    w,
    g,
    b,
    scalars,
    STEP_DTYPE: tl.constexpr,
    DECAY: tl.constexpr,
    MOMENTUM: tl.constexpr,
    NESTEROV: tl.constexpr,
    FIRST_STEP: tl.constexpr,
):
    """Compute (new weight, new momentum buffer), float32 tiles; b is not read without MOMENTUM or at FIRST_STEP."""
    negative_lr, momentum, gradient_share, weight_decay = scalars
    g = _round(g, STEP_DTYPE)
    if DECAY:
        g = _round(tl.fma(w, weight_decay, g), STEP_DTYPE)
    if MOMENTUM:
        if FIRST_STEP:
            b = g
        else:
            b = _round(tl.fma(g, gradient_share, _round(b * momentum, STEP_DTYPE)), STEP_DTYPE)
        if NESTEROV:
            g = _round(tl.fma(b, momentum, g), STEP_DTYPE)
        else:
            g = b
    return _round(tl.fma(g, negative_lr, w), STEP_DTYPE), b


@triton.jit
def adamw_rule(w, g, m, v, scalars, STEP_DTYPE: tl.constexpr, DECAY: tl.constexpr):
    """Compute (new weight, new first moment, new second moment), float32 tiles."""
    kept, gradient_share, beta2, square_share, correction, eps, negative_rate = scalars
    g = _round(g, STEP_DTYPE)
    if DECAY:
        w = _round(w * kept, STEP_DTYPE)
    # torch.lerp starts from the nearer end; the cast is for the interpreter, which passes scalars as Python floats
    gradient_share = tl.cast(gradient_share, tl.float32)
    from_m = gradient_share < 0.5
    share = tl.where(from_m, gradient_share, gradient_share - 1)
    m = _round(tl.fma(g - m, share, tl.where(from_m, m, g)), STEP_DTYPE)
    v = _round(tl.fma(g * square_share, g, _round(v * beta2, STEP_DTYPE)), STEP_DTYPE)
    root = _round(tl.div_rn(_round(tl.sqrt_rn(v), STEP_DTYPE), correction), STEP_DTYPE)
    denominator = _round(root + _round(tl.cast(eps, tl.float32), STEP_DTYPE), STEP_DTYPE)
    return _round(w + tl.div_rn(m * negative_rate, denominator), STEP_DTYPE), m, v


@triton.jit
def round_weight(w, dtype: tl.constexpr, index, step, seed, parameter_id, STOCHASTIC: tl.constexpr):
    """Round the float32 weight to the parameter's dtype: to the nearest, or stochastically to bfloat16."""
    if STOCHASTIC and dtype == tl.bfloat16:
        random, _ = random_words(index, step, seed, parameter_id)
        rounded = round_stochastic(w, random)
    else:
        rounded = round_nearest(w, dtype)
    return rounded


@triton.jit
def round_moment(
    m, dtype: tl.constexpr, index, step, seed, parameter_id, STEP_DTYPE: tl.constexpr, SECOND: tl.constexpr
):
    """Round a float32 moment to the dtype of its tensor: to the nearest, or as `ops.moments` says to bfloat16."""
    if dtype == tl.bfloat16 and STEP_DTYPE == tl.float32:
        _, random = random_words(index, step, seed, parameter_id)
        rounded = round_stochastic(m, random if SECOND else random >> 16)
    else:
        rounded = round_nearest(m, dtype)
    return rounded


@triton.jit
def select(new, old, kept, mask):
    """Select `new` where the mask allows it, and the exact bits of `old` elsewhere."""
    if mask is None:
        selected = new
    else:
        selected = tl.where(kept, new, old)
    return selected
