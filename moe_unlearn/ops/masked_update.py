"""masked_update: runs SGD and AdamW steps in place under a packed mask.

    SGD     g <- g + weight_decay * w
            b <- momentum * b + (1 - dampening) * g         b <- g at step 1
            w <- w - lr * (b, or g + momentum * b with nesterov, or g without momentum)
    AdamW   w <- w - lr * weight_decay * w
            m <- m + (1 - beta1) * (g - m);  v <- beta2 * v + (1 - beta2) * g^2
            w <- w - lr / (1 - beta1^step) * m / (sqrt(v) / sqrt(1 - beta2^step) + eps)

Shapes: param [n0, ..., n]; `mask` int32 words [..., ceil(n / 32)] (`ops.bits`), None for all ones. A weight whose bit
is 0 keeps its bits, without weight decay too, and so does its state. `slices` [M] names the slices along dimension 0
that train at all: grad, state, master and mask are then compact, [M, ...] standing for param[slices]. Worked example,
param [64, I, H] (64 experts), slices = [3, 17]: grad and moments are [2, I, H], mask [2, I, ceil(H / 32)], and 62
experts have neither gradient nor state.

The arguments choose the numerics:

    all of the state in param's dtype   the gradient is rounded to it first and each operation of the
                                        formula rounds to it once: the bits of torch.optim.AdamW, and in
                                        float32 and float64 of SGD, with foreach=False (of float32 AdamW
                                        where torch's square root is correctly rounded)
    other state, or `master`, or        arithmetic in float32 and one rounding at the end: to the nearest,
    rounding="stochastic"               or stochastically to bfloat16
    master                              float32 weights; the parameter is their rounded copy
    bfloat16 state, float32 arithmetic  the state is rounded stochastically too
    packed state, uint8                 blocks of 8-bit codes with a scale, of parameters with at least two
                                        dimensions; zero before the first step

A float64 parameter is computed in float64. Stochastic rounding is Philox (`ops.bits`) of seed, parameter_id, step and
the flat index in the *whole* parameter, so it does not depend on slices, order or threads; it leaves float32 and
float64 parameters, which need no rounding, alone. A shard, rows [a, b) of a parameter along dimension 0, is rounded as
those rows of the whole with first_row = a. `ops.moments` specifies narrow state.

The update is deterministic, since no element depends on another. Source: the documented formulas of torch.optim.SGD
and AdamW (decoupled weight decay); the masking of the update and compact state are our specification.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from moe_unlearn import backend, native
from moe_unlearn.ops.bits import philox_words, round_stochastic, unpack_bits
from moe_unlearn.ops.checks import check_indices, check_momentum, check_objects, check_update
from moe_unlearn.ops.custom import custom_op
from moe_unlearn.ops.legal import legal_slices
from moe_unlearn.ops.moments import is_narrow, narrowed, widened
from moe_unlearn.ops.schema import fields

_BLOCK_ELEMENTS = 1 << 20


class SGD(NamedTuple):
    """The numbers of SGD, as in the formula of the module."""

    lr: float
    momentum: float = 0.0
    dampening: float = 0.0
    weight_decay: float = 0.0
    nesterov: bool = False

    def updated(self, step: int, w: Tensor, g: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Compute (new weight, new momentum buffer or, without momentum, None) from operands of one dtype."""
        if self.weight_decay != 0:
            g = _add(g, w, self.weight_decay)
        if self.momentum == 0:
            return _add(w, g, -self.lr), None
        b = g if step == 1 or b is None else _add(b * self.momentum, g, 1 - self.dampening)
        g = _add(g, b, self.momentum) if self.nesterov else b
        return _add(w, g, -self.lr), b

    def native(self, update: "Update") -> tuple[float | bool, ...]:
        """Return the numbers that the native kernels take."""
        return self.lr, self.momentum, 1 - self.dampening, self.weight_decay, self.nesterov, *update.native()


class AdamW(NamedTuple):
    """The numbers of AdamW, as in the formula of the module."""

    lr: float
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0

    def updated(self, step: int, w: Tensor, g: Tensor, m: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Compute (new weight, new first moment, new second moment) from operands of one dtype."""
        if self.weight_decay != 0:
            w = w * (1 - self.lr * self.weight_decay)
        m = torch.lerp(m, g, 1 - self.beta1)
        v = torch.addcmul(v * self.beta2, g, g, value=1 - self.beta2)
        # torch uses MKL's float32 square root, which is not correctly rounded on every CPU; by way of float64 it is
        root = v.double().sqrt().to(v.dtype) if v.dtype == torch.float32 else v.sqrt()
        denominator = root / (1 - self.beta2**step) ** 0.5 + self.eps
        return torch.addcdiv(w, m, denominator, value=-(self.lr / (1 - self.beta1**step))), m, v

    def native(self, update: "Update") -> tuple[float | bool, ...]:
        """Return the numbers that the native kernels take."""
        root_correction, step_size = (1 - self.beta2**update.step) ** 0.5, -(self.lr / (1 - self.beta1**update.step))
        decay = 1 - self.lr * self.weight_decay
        return decay, self.beta1, self.beta2, root_correction, self.eps, step_size, *update.native()


class Update(NamedTuple):
    """Which update of which parameter this is, and how its result is rounded.

    step: 1 for the first update of this parameter. rounding: "nearest" or, for bfloat16 parameters, "stochastic"; its
    random bits depend on the other numbers. first_row: the index along dimension 0 of the parameter's first row in
    the parameter that it is a shard of.
    """

    step: int
    rounding: str = "nearest"
    seed: int = 0
    parameter_id: int = 0
    first_row: int = 0

    def native(self) -> tuple[int, bool, int, int, int]:
        """Return the numbers that the native kernels take."""
        return self.step, self.rounding == "stochastic", self.seed, self.parameter_id, self.first_row


Rule = TypeVar("Rule", SGD, AdamW)


def unflattened(kind: type[Rule], numbers: Sequence[Any]) -> tuple[Rule, Update]:
    """Return the rule and the update whose numbers a kernel takes one after the other."""
    count = len(kind._fields)
    return kind(*numbers[:count]), Update(*numbers[count:])


def _add(a: Tensor, b: Tensor, alpha: float) -> Tensor:
    """Compute a + alpha * b, rounded once."""
    if a.dtype in (torch.float32, torch.float64):
        return torch.add(a, b, alpha=alpha)
    # in narrow dtypes torch.add rounds alpha too, and more often where its loop is not vectorised
    return torch.add(a.float(), b.float(), alpha=alpha).to(a.dtype)


@torch.no_grad()
def masked_sgd_(
    param: Tensor,
    grad: Tensor,
    momentum_buffer: Tensor | None,
    mask: Tensor | None,
    rule: SGD,
    update: Update,
    *,
    master: Tensor | None = None,
    slices: Tensor | None = None,
    impl: str = "auto",
) -> None:
    """Run one SGD step in place; formula, shapes and numerics are in the module docstring.

    Args:
        param: any float dtype and strides. grad: any float dtype, shaped like param or param[slices].
        momentum_buffer: shaped like grad, in param's dtype, float32, bfloat16 or packed; needed if momentum is
            not 0. Its content is not read at step 1 unless it is packed.
        master: float32, shaped like grad; with rounding "nearest" only.
        slices: int64 [M], distinct indices into dimension 0.

    Raises TypeError or ValueError for a dtype, shape, device or option that does not fit, IndexError for a bad slice.
    """
    check_objects(rule=(rule, SGD), update=(update, Update))
    check_momentum(momentum_buffer, rule)
    check_update(param, grad, {"momentum_buffer": momentum_buffer}, mask, update, master, slices)
    _masked_sgd(param, grad, momentum_buffer, mask, master, legal_slices(param, slices), *rule, *update, impl)


def masked_sgd_ref(
    param: Tensor,
    grad: Tensor,
    momentum_buffer: Tensor | None,
    mask: Tensor | None,
    rule: SGD,
    update: Update,
    *,
    master: Tensor | None = None,
    slices: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Compute the new (param, momentum_buffer, master) of `masked_sgd_`; no input changes."""
    rows, (buffer,), master = _updated_rows(rule, update, param, grad, (momentum_buffer,), mask, master, slices)
    return _with_rows(param, rows, slices), buffer, master


@torch.no_grad()
def masked_adamw_(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    mask: Tensor | None,
    rule: AdamW,
    update: Update,
    *,
    master: Tensor | None = None,
    slices: Tensor | None = None,
    impl: str = "auto",
) -> None:
    """Run one AdamW step in place; formula, shapes and numerics are in the module docstring.

    Args:
        exp_avg, exp_avg_sq: m and v, shaped like grad, both in one dtype: param's, float32, bfloat16 or packed;
            zero before the first step.
        other arguments: as in `masked_sgd_`.

    Raises TypeError or ValueError for a dtype, shape, device or option that does not fit.
    """
    check_objects(rule=(rule, AdamW), update=(update, Update))
    check_update(param, grad, {"exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}, mask, update, master, slices)
    _masked_adamw(param, grad, exp_avg, exp_avg_sq, mask, master, legal_slices(param, slices), *rule, *update, impl)


def masked_adamw_ref(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    mask: Tensor | None,
    rule: AdamW,
    update: Update,
    *,
    master: Tensor | None = None,
    slices: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Compute the new (param, exp_avg, exp_avg_sq, master) of `masked_adamw_`; no input changes."""
    rows, (m, v), master = _updated_rows(rule, update, param, grad, (exp_avg, exp_avg_sq), mask, master, slices)
    return _with_rows(param, rows, slices), m, v, master


def _updated_rows(
    rule: SGD | AdamW,
    update: Update,
    param: Tensor,
    grad: Tensor,
    state: Sequence[Tensor | None],
    mask: Tensor | None,
    master: Tensor | None,
    slices: Tensor | None,
) -> tuple[Tensor, list[Tensor | None], Tensor | None]:
    """Compute (new param[slices], new state, new master)."""
    rows = param if slices is None else param[slices]
    dtype = _arithmetic_dtype(param, state, update.rounding, master)
    weight = (rows if master is None else master).to(dtype)
    n = rows.shape[-1] if rows.dim() else 1
    operands: list[Any] = [None if s is None else widened(s, n, dtype, second=i == 1) for i, s in enumerate(state)]
    new, *new_state = rule.updated(update.step, weight, grad.to(dtype), *operands)
    kept = None if mask is None else unpack_bits(mask, n).view(rows.shape)

    def select(new: Tensor, old: Tensor) -> Tensor:
        # cast before the choice, so that a masked element keeps its exact bits, a NaN's payload too
        return new.to(old.dtype) if kept is None else torch.where(kept, new.to(old.dtype), old)

    new_master = None if master is None else select(new, master)
    stochastic, random = update.rounding == "stochastic" and dtype != rows.dtype, None
    if stochastic or dtype == torch.float32 and any(map(is_narrow, state)):
        index = _flat_index(param, slices, update.first_row)
        of_weights, random = philox_words(index, update.step, update.seed, update.parameter_id)
        new = round_stochastic(new, of_weights) if stochastic else new
    made = [
        None if old is None else old if value is None else narrowed(value, old, kept, random, second=i == 1)
        for i, (value, old) in enumerate(zip(new_state, state, strict=True))
    ]
    return select(new, rows), made, new_master


def _arithmetic_dtype(
    param: Tensor, state: Sequence[Tensor | None], rounding: str, master: Tensor | None
) -> torch.dtype:
    narrow = master is None and all(s is None or s.dtype == param.dtype for s in state)
    if param.dtype == torch.float64 or (narrow and rounding == "nearest"):
        return param.dtype
    return torch.float32


def _flat_index(param: Tensor, slices: Tensor | None, first_row: int) -> Tensor:
    """Compute the int64 index of every element of param[slices], flattened with the rows before its first one."""
    inner = math.prod(param.shape[1:])
    if slices is None:
        return first_row * inner + torch.arange(param.numel(), device=param.device).view(param.shape)
    within = torch.arange(inner, device=param.device).view(param.shape[1:])
    return (first_row + slices.view(-1, *[1] * (param.dim() - 1))) * inner + within


def _with_rows(param: Tensor, rows: Tensor, slices: Tensor | None) -> Tensor:
    return rows if slices is None else param.index_copy(0, slices, rows)


@custom_op(
    "moe_unlearn::masked_sgd",
    schema="(Tensor(a0!) param, Tensor grad, Tensor(a2!)? momentum_buffer, Tensor? mask, Tensor(a4!)? master, "
    f"Tensor? slices, {fields(SGD, Update)}, str impl) -> ()",
)
def _masked_sgd(param: Tensor, *operands: Any) -> None:
    *others, impl = operands
    check_indices("slices", others[4], param.shape[0] if param.dim() else 1)
    backend.resolve("masked_update.sgd", impl, param)(param, *others)


@custom_op(
    "moe_unlearn::masked_adamw",
    schema="(Tensor(a0!) param, Tensor grad, Tensor(a2!) exp_avg, Tensor(a3!) exp_avg_sq, Tensor? mask, "
    f"Tensor(a5!)? master, Tensor? slices, {fields(AdamW, Update)}, str impl) -> ()",
)
def _masked_adamw(param: Tensor, *operands: Any) -> None:
    *others, impl = operands
    check_indices("slices", others[5], param.shape[0] if param.dim() else 1)
    backend.resolve("masked_update.adamw", impl, param)(param, *others)


for _mutating in (_masked_sgd, _masked_adamw):
    _mutating.register_fake(lambda *operands: None)


def _sgd_in_place(param: Tensor, grad: Tensor, momentum_buffer: Tensor | None, *operands: Any) -> None:
    mask, master, slices, *numbers = operands
    _in_place(*unflattened(SGD, numbers), param, grad, (momentum_buffer,), mask, master, slices)


def _adamw_in_place(param: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, *operands: Any) -> None:
    mask, master, slices, *numbers = operands
    _in_place(*unflattened(AdamW, numbers), param, grad, (exp_avg, exp_avg_sq), mask, master, slices)


def _in_place(
    rule: SGD | AdamW,
    update: Update,
    param: Tensor,
    grad: Tensor,
    state: Sequence[Tensor | None],
    mask: Tensor | None,
    master: Tensor | None,
    slices: Tensor | None,
) -> None:
    """Apply the rule block by block of slices, so that temporaries stay small beside a large parameter."""
    param, grad = torch.atleast_1d(param), torch.atleast_1d(grad)
    mask, master, *state = (None if t is None else torch.atleast_1d(t) for t in (mask, master, *state))
    if slices is None:
        slices = torch.arange(len(param), device=param.device)
    # a 1-d parameter is one block, since its mask is packed along the dimension that blocks cut
    size = max(1, len(slices) if param.dim() == 1 else _BLOCK_ELEMENTS // max(1, param[:1].numel()))
    for start in range(0, len(slices), size):
        block = slice(start, start + size)
        rows = slices[block]
        bits, weights, *old = (None if t is None else t[block] for t in (mask, master, *state))
        new, new_state, new_weights = _updated_rows(rule, update, param, grad[block], old, bits, weights, rows)
        param.index_copy_(0, rows, new)
        for into, value in zip((weights, *old), (new_weights, *new_state), strict=True):
            if into is not None and value is not None:
                into.copy_(value)


def _sgd_native(param: Tensor, grad: Tensor, momentum_buffer: Tensor | None, *operands: Any) -> None:
    mask, master, slices, *numbers = operands
    rule, update = unflattened(SGD, numbers)
    tensors = _native_operands(param, grad, (momentum_buffer,), mask, master, slices, update.rounding)
    torch.ops.moe_unlearn_native.masked_sgd_(*tensors, *rule.native(update))


def _adamw_native(param: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, *operands: Any) -> None:
    mask, master, slices, *numbers = operands
    rule, update = unflattened(AdamW, numbers)
    tensors = _native_operands(param, grad, (exp_avg, exp_avg_sq), mask, master, slices, update.rounding)
    torch.ops.moe_unlearn_native.masked_adamw_(*tensors, *rule.native(update))


def _native_operands(
    param: Tensor,
    grad: Tensor,
    state: Sequence[Tensor | None],
    mask: Tensor | None,
    master: Tensor | None,
    slices: Tensor | None,
    rounding: str,
) -> tuple[Tensor | None, ...]:
    """Return (param, grad, *state, mask, master, slices) with at least one dimension, two with slices."""
    if grad.dtype == torch.float64:
        # rounded once, to the dtype of the arithmetic
        grad = grad.to(_arithmetic_dtype(param, state, rounding, master))
    tensors = [None if t is None else torch.atleast_1d(t) for t in (param, grad, *state, master)]
    if slices is not None:
        slices = slices.contiguous()
        if param.dim() == 1:
            tensors = [None if t is None else t.unsqueeze(1) for t in tensors]
            mask = None if mask is None else unpack_bits(mask, len(slices)).int().unsqueeze(1)
    *tensors, master = tensors
    return *tensors, mask, master, slices


backend.register("masked_update.sgd", "ref", _sgd_in_place)
backend.register("masked_update.adamw", "ref", _adamw_in_place)
for _impl in ("cpu", "cuda"):
    native.register("masked_update.sgd", _sgd_native, _impl)
    native.register("masked_update.adamw", _adamw_native, _impl)
backend.register("masked_update.sgd", "triton", "moe_unlearn.triton_kernels.masked_update:masked_sgd_")
backend.register("masked_update.adamw", "triton", "moe_unlearn.triton_kernels.masked_update:masked_adamw_")
