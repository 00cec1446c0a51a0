"""Updates with packed moments: blocks of 64 codes of 8 bits with one scale, as `ops.moments` specifies them.

`update_packed` updates a tile [BLOCK, 64], each row of it one block: here for `masked_update`, and in the epilogue of
`expert_wgrad`. A block's scale is a maximum along its row of the tile: neither workspace nor atomics are needed. A
block without a bit keeps its bytes; within a block with one, masked moments take new codes and masked weights are not
written. The rules, the random bits and the order of all roundings are those of `masked_update`.

A program of `masked_update` owns BLOCK blocks of one slice, and stops if no bit of them is set.
"""

import torch
import triton
import triton.language as tl

from moe_unlearn.triton_kernels import configs
from moe_unlearn.triton_kernels.common import as_slices, ceil_div, random_words, widen
from moe_unlearn.triton_kernels.update_rules import adamw_rule, round_weight, sgd_rule

PACKED = torch.uint8
_SIZE = 64


@triton.jit
def _widen(codes, scale, SECOND: tl.constexpr):
    """Compute the moments that codes [BLOCK, 64], uint8, stand for."""
    if SECOND:
        number = codes.to(tl.float32) * scale[:, None]
        moment = number * number
    else:
        moment = codes.to(tl.int8, bitcast=True).to(tl.float32) * scale[:, None]
    return moment


@triton.jit
def _pack(moment, random, SECOND: tl.constexpr):
    """Compute (codes, scale) of float32 moments [BLOCK, 64] with random numbers below 2^16."""
    if SECOND:
        number, limit = tl.sqrt_rn(moment), 255.0
    else:
        number, limit = moment, 127.0
    # bits order as magnitudes do, NaN the highest
    most = tl.max(number.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=1)
    largest = tl.minimum(most, 0x7F800000).to(tl.float32, bitcast=True)
    scale = tl.div_rn(largest, tl.full(largest.shape, limit, tl.float32))
    usable = ((most < 0x7F800000) & (scale > 0))[:, None]
    place = (
        tl.div_rn(number, tl.broadcast_to(scale[:, None], number.shape)) + random.to(tl.float32) * 0.0000152587890625
    )
    place = tl.where(usable, place, 0.0)
    code = tl.floor(tl.minimum(tl.maximum(place, -limit), limit)).to(tl.int32)
    if SECOND:
        code = tl.where(usable & (code == 0) & (number > 0), 1, code)
    return (code & 0xFF).to(tl.uint8), scale


@triton.jit
def load_kept(mask, strides, index, row, column, exists):
    """Load which of the elements of matrix `index` that exist are kept, bool [rows, columns]; all indices are int64."""
    if mask is None:
        kept = exists
    else:
        at = index * strides[0] + row * strides[1] + column // 32 * strides[2]
        words = tl.load(mask + at, mask=exists, other=0)
        kept = exists & (((words >> (column % 32).to(tl.int32)) & 1) != 0)
    return kept


@triton.jit
def update_packed(
    g, param, master, first, second, first_scales, second_scales, row, block, columns, kept, element,
    step, seed, parameter_id, scalars,
    ADAMW: tl.constexpr, STEP_DTYPE: tl.constexpr, DECAY: tl.constexpr, MOMENTUM: tl.constexpr,
    NESTEROV: tl.constexpr, FIRST_STEP: tl.constexpr, STOCHASTIC: tl.constexpr,
):  # fmt: skip
    """Update a tile of weights by its float32 gradient g [BLOCK, 64], where `kept`, and the moments of its blocks.

    param, master: pointers to its elements. row, block: int64 [BLOCK], the row of the packed state and the block in it.
    columns: of a row. element: the flat indices of its elements in the whole parameter.
    """
    touched = tl.max(kept.to(tl.int32), axis=1) != 0
    column = block[:, None] * 64 + tl.arange(0, 64)[None, :]
    codes = (columns + 3) // 4 * 4
    scales = codes // 4 + tl.cdiv(columns, 64)  # a row's bytes are four times as many
    at_code = (row * scales * 4)[:, None] + column
    at_scale = row * scales + codes // 4 + block
    live = touched[:, None] & (column < columns)
    stored = touched[:, None] & (column < codes)  # zeros behind the last code too
    _, random = random_words(element, step, seed, parameter_id)
    if master is None:
        w = widen(tl.load(param, mask=kept, other=0))
    else:
        w = tl.load(master, mask=kept, other=0)
    old_first = _widen(
        tl.load(first + at_code, mask=live, other=0), tl.load(first_scales + at_scale, mask=touched, other=0), False
    )
    if ADAMW:
        old_second = _widen(
            tl.load(second + at_code, mask=live, other=0),
            tl.load(second_scales + at_scale, mask=touched, other=0),
            True,
        )
        w, new_first, new_second = adamw_rule(w, g, old_first, old_second, scalars, STEP_DTYPE, DECAY)
        new_codes, scale = _pack(tl.where(kept, new_second, old_second), random & 0xFFFF, True)
        tl.store(second + at_code, new_codes, mask=stored)
        tl.store(second_scales + at_scale, scale, mask=touched)
    else:
        w, new_first = sgd_rule(w, g, old_first, scalars, STEP_DTYPE, DECAY, MOMENTUM, NESTEROV, FIRST_STEP)
    new_codes, scale = _pack(tl.where(kept, new_first, old_first), random >> 16, False)
    tl.store(first + at_code, new_codes, mask=stored)
    tl.store(first_scales + at_scale, scale, mask=touched)
    if master is not None:
        tl.store(master, w, mask=kept)
    new = round_weight(w, param.dtype.element_ty, element, step, seed, parameter_id, STOCHASTIC)
    tl.store(param, new, mask=kept)


@triton.jit(do_not_specialize=["step", "seed", "parameter_id", "first_element"])
def _packed_kernel(
    param, grad, first, second, first_scales, second_scales, master, mask, slices,
    param_strides, grad_strides, master_strides, mask_strides,
    rows, columns, step: tl.int64, seed: tl.int64, parameter_id: tl.int64, first_element: tl.int64, scalars,
    ADAMW: tl.constexpr, STEP_DTYPE: tl.constexpr, DECAY: tl.constexpr, MOMENTUM: tl.constexpr,
    NESTEROV: tl.constexpr, FIRST_STEP: tl.constexpr, STOCHASTIC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Update one tile of a parameter and its packed state, contiguous rows of codes and scales.

    first, second: exp_avg and exp_avg_sq, or momentum_buffer and None; first_scales, second_scales: the same memory as
    float32. first_element: the flat index of param's first element in the parameter that it is a shard of.
    """
    per_row = tl.cdiv(columns, 64)
    programs = tl.cdiv(rows * per_row, BLOCK)
    index = (tl.program_id(0) // programs).to(tl.int64)
    number = tl.program_id(0) % programs * BLOCK + tl.arange(0, BLOCK)
    row, block = (number // per_row).to(tl.int64), (number % per_row).to(tl.int64)
    column = block[:, None] * 64 + tl.arange(0, 64)[None, :]
    exists = (number < rows * per_row)[:, None] & (column < columns)
    kept = load_kept(mask, mask_strides, index, row[:, None], column, exists)
    if tl.max(kept.to(tl.int32)) == 0:
        return
    slice_index = index
    if slices is not None:
        slice_index = tl.load(slices + index)
    element = first_element + ((slice_index * rows + row) * columns)[:, None] + column
    g = tl.load(
        grad + (index * grad_strides[0] + row * grad_strides[1])[:, None] + column * grad_strides[2], mask=kept, other=0
    ).to(tl.float32)
    param += (slice_index * param_strides[0] + row * param_strides[1])[:, None] + column * param_strides[2]
    if master is not None:
        master += (index * master_strides[0] + row * master_strides[1])[:, None] + column * master_strides[2]
    update_packed(
        g, param, master, first, second, first_scales, second_scales, index * rows + row, block, columns, kept, element,
        step, seed, parameter_id, scalars, ADAMW, STEP_DTYPE, DECAY, MOMENTUM, NESTEROV, FIRST_STEP, STOCHASTIC,
    )  # fmt: skip


def scales_of(*moments: torch.Tensor | None) -> list[torch.Tensor | None]:
    """Return packed moments as float32, which their scales are."""
    return [None if moment is None else moment.view(torch.float32) for moment in moments]


def launch_packed(param, grad, first, second, master, mask, slices, counter, scalars, flags) -> None:
    """Run one step with packed state in place; second is None but for AdamW."""
    tensors = (param, grad, master, mask)
    views = [None if t is None else as_slices(t, slices is not None) for t in tensors]
    num_slices, rows, columns = views[1].shape
    config = configs.masked_update(tuple(views[1].shape), param.dtype, configs.architecture(param.device))
    block = max(1, config.block_words * 32 // _SIZE)
    grid = (num_slices * ceil_div(rows * ceil_div(columns, _SIZE), block),)
    _packed_kernel[grid](
        *views[:2],
        first,
        second,
        *scales_of(first, second),
        *views[2:],
        None if slices is None else slices.contiguous(),
        *(None if v is None else v.stride() for v in views),
        rows,
        columns,
        *counter,
        tuple(scalars),
        BLOCK=block,
        num_warps=config.num_warps,
        enable_fp_fusion=False,
        **flags,
    )
    for view, tensor in zip(views[::2], tensors[::2], strict=True):
        if view is not None and view.data_ptr() != tensor.data_ptr():
            tensor.copy_(view.view_as(tensor))
