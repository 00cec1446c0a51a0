"""masked_update: runs SGD and AdamW in place under a packed mask; formulas and numerics are in `ops.masked_update`.

One launch treats every element by itself: the bits are the same for any order of programs, without workspace or
atomics.

A program owns BLOCK mask words of one slice and the 32 elements of each: a tile [BLOCK, 32]. It loads every word once,
stops if all are zero, and expands the others in registers. Loads and stores are predicated by whole words, which keeps
them 16 bytes wide and leaves parameter and state of a zero word untouched and unread; inside a word the old bits are
selected and stored again. Tensors that only supply those old bits (the parameter beside a master, the momentum buffer
at step 1) are loaded for words that have a zero bit, and for no others.

Words are numbered along the rows, or, for a parameter whose rows are adjacent in memory (a transposed view), down the
columns, so that accesses coalesce either way. Strides are free; tensors of more than three dimensions whose middle ones
do not merge are copied and written back.

The bits are those of the reference: every operation of the rule rounds once and in the same order (`tl.fma` where torch
fuses, IEEE division and square root). Only the reference's float32 square root on the CPU, MKL's, may be one ulp off.
"""

import triton
import triton.language as tl

from moe_unlearn.triton_kernels import configs
from moe_unlearn.triton_kernels.common import as_slices, ceil_div, unpack_words, word_elements
from moe_unlearn.triton_kernels.packed_update import PACKED, launch_packed
from moe_unlearn.triton_kernels.update_rules import (
    adamw_constants,
    adamw_rule,
    first_element_of,
    round_moment,
    round_weight,
    select,
    sgd_constants,
    sgd_rule,
    step_dtype,
)


@triton.jit
def _position(rows, columns, BLOCK: tl.constexpr, ROWS_FIRST: tl.constexpr):
    """Return this program's slice and, for each word, its row, its number in the row and whether it exists.

    All numbers are int64.
    """
    per_row = tl.cdiv(columns, 32)
    blocks = tl.cdiv(rows * per_row, BLOCK)
    index = (tl.program_id(0) // blocks).to(tl.int64)
    word = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    if ROWS_FIRST:
        row, at = word % rows, word // rows
    else:
        row, at = word // per_row, word % per_row
    return index, row.to(tl.int64), at.to(tl.int64), word < rows * per_row


@triton.jit(do_not_specialize=["step", "seed", "parameter_id", "first_element"])
def _update_kernel(
    param, grad, first, second, master, mask, slices,
    param_strides, grad_strides, first_strides, second_strides, master_strides, mask_strides,
    rows, columns, step: tl.int64, seed: tl.int64, parameter_id: tl.int64, first_element: tl.int64, scalars,
    ADAMW: tl.constexpr, STEP_DTYPE: tl.constexpr, DECAY: tl.constexpr, MOMENTUM: tl.constexpr,
    NESTEROV: tl.constexpr, FIRST_STEP: tl.constexpr, STOCHASTIC: tl.constexpr, GATHER: tl.constexpr,
    ROWS_FIRST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Update one tile of a parameter and its state.

    first, second: exp_avg and exp_avg_sq, or momentum_buffer and None; None where there is no such tensor.
    first_element: the flat index of param's first element in the parameter that it is a shard of.
    """
    index, row, at, exists = _position(rows, columns, BLOCK, ROWS_FIRST)
    if mask is None:
        words = tl.where(exists, -1, 0)
    else:
        at_word = mask + index * mask_strides[0] + row * mask_strides[1] + at * mask_strides[2]
        words = tl.load(at_word, mask=exists, other=0)
        if tl.max((words != 0).to(tl.int32)) == 0:
            return
    column = at[:, None] * 32 + tl.arange(0, 32)[None, :]
    live = (words != 0)[:, None] & (column < columns)
    partial = live & (words != -1)[:, None]
    kept = unpack_words(words)

    slice_index = index
    if GATHER:
        flat = tl.load(slices + column, mask=live, other=0)
        param += flat * param_strides[2]
    else:
        if slices is not None:
            slice_index = tl.load(slices + index)
        flat = ((slice_index * rows + row) * columns)[:, None] + column
        param = word_elements(param, param_strides, slice_index, row, at)
    g = tl.load(word_elements(grad, grad_strides, index, row, at), mask=live).to(tl.float32)
    if master is None:
        old = tl.load(param, mask=live)
        w = old.to(tl.float32)
    else:
        master = word_elements(master, master_strides, index, row, at)
        old = tl.load(param, mask=partial)
        old_master = tl.load(master, mask=live)
        w = old_master
    if first is not None:
        first = word_elements(first, first_strides, index, row, at)
        old_first = tl.load(first, mask=partial if FIRST_STEP else live)

    if ADAMW:
        second = word_elements(second, second_strides, index, row, at)
        old_second = tl.load(second, mask=live)
        w, new_first, new_second = adamw_rule(
            w, g, old_first.to(tl.float32), old_second.to(tl.float32), scalars, STEP_DTYPE, DECAY
        )
        new_second = round_moment(
            new_second, second.dtype.element_ty, first_element + flat, step, seed, parameter_id, STEP_DTYPE, True
        )
        tl.store(second, select(new_second, old_second, kept, mask), mask=live)
    else:
        b = old_first.to(tl.float32) if MOMENTUM else g
        w, new_first = sgd_rule(w, g, b, scalars, STEP_DTYPE, DECAY, MOMENTUM, NESTEROV, FIRST_STEP)

    if first is not None:
        new_first = round_moment(
            new_first, first.dtype.element_ty, first_element + flat, step, seed, parameter_id, STEP_DTYPE, False
        )
        tl.store(first, select(new_first, old_first, kept, mask), mask=live)
    if master is not None:
        tl.store(master, select(w, old_master, kept, mask), mask=live)
    new = round_weight(w, param.dtype.element_ty, first_element + flat, step, seed, parameter_id, STOCHASTIC)
    tl.store(param, select(new, old, kept, mask), mask=live)


def masked_sgd_(
    param, grad, momentum_buffer, mask, master, slices, lr, momentum, dampening, weight_decay, nesterov, step,
    rounding, seed, parameter_id, first_row,
) -> None:  # fmt: skip
    """Run one SGD step in place; arguments as in `ops.masked_update.masked_sgd_`."""
    scalars, flags = sgd_constants(lr, momentum, dampening, weight_decay, nesterov, step)
    dtype = step_dtype(param, (momentum_buffer,), rounding, master)
    state = (momentum_buffer if flags["MOMENTUM"] else None, None)
    flags |= {"ADAMW": False, "STEP_DTYPE": dtype, "STOCHASTIC": rounding == "stochastic"}
    counter = (step, seed, parameter_id, first_element_of(param, first_row))
    _launch(param, grad, *state, master, mask, slices, counter, scalars, flags)


def masked_adamw_(
    param, grad, exp_avg, exp_avg_sq, mask, master, slices, lr, beta1, beta2, eps, weight_decay, step, rounding,
    seed, parameter_id, first_row,
) -> None:  # fmt: skip
    """Run one AdamW step in place; arguments as in `ops.masked_update.masked_adamw_`."""
    scalars, flags = adamw_constants(lr, beta1, beta2, eps, weight_decay, step)
    dtype = step_dtype(param, (exp_avg, exp_avg_sq), rounding, master)
    flags |= {"ADAMW": True, "STEP_DTYPE": dtype, "STOCHASTIC": rounding == "stochastic"}
    flags |= {"MOMENTUM": False, "NESTEROV": False, "FIRST_STEP": False}
    counter = (step, seed, parameter_id, first_element_of(param, first_row))
    _launch(param, grad, exp_avg, exp_avg_sq, master, mask, slices, counter, scalars, flags)


def _launch(param, grad, first, second, master, mask, slices, counter, scalars, flags) -> None:
    if grad.numel() == 0:
        return
    if first is not None and first.dtype == PACKED:
        launch_packed(param, grad, first, second, master, mask, slices, counter, scalars, flags)
        return
    gather = slices is not None and param.dim() == 1
    tensors = (param, grad, first, second, master, mask)
    views = [None if t is None else as_slices(t, slices is not None) for t in tensors]
    strides = [None if v is None else v.stride() for v in views]
    num_slices, rows, columns = views[1].shape
    config = configs.masked_update(tuple(views[1].shape), param.dtype, configs.architecture(param.device))
    grid = (num_slices * ceil_div(rows * ceil_div(columns, 32), config.block_words),)
    _update_kernel[grid](
        *views,
        None if slices is None else slices.contiguous(),
        *strides,
        rows,
        columns,
        *counter,
        tuple(scalars),
        GATHER=gather,
        ROWS_FIRST=strides[0][2] > strides[0][1] and rows > 1,
        BLOCK=config.block_words,
        num_warps=config.num_warps,
        enable_fp_fusion=False,
        **flags,
    )
    for i in (0, 2, 3, 4):
        if views[i] is not None and views[i].data_ptr() != tensors[i].data_ptr():
            tensors[i].copy_(views[i].view_as(tensors[i]))
