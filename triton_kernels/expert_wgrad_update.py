"""expert_wgrad_sgd_ and expert_wgrad_adamw_: apply the rules of `masked_update` to weight gradients in registers.

There is one launch, no workspace and no atomics; every element belongs to one program. The float32 tile of dW comes
from the main loop of `grouped_outer`, and the rules from `masked_update`, bit for bit. The epilogue takes the tile in
slices of columns, since the accumulator and the whole tile's state would not fit in registers. Accesses are predicated
by whole mask words; inside a word the old bits are selected and stored again. A slice with packed moments is as wide as
a block, 64 columns, and has fewer rows: tiles begin and end between blocks (`packed_update`). A tile without a mask bit
is neither computed nor read.

Listed experts without rows take their step with a gradient of exactly zero, decay and momentum included.
"""

import torch
import triton
import triton.language as tl

from moe_unlearn.triton_kernels import configs
from moe_unlearn.triton_kernels.common import widen
from moe_unlearn.triton_kernels.grouped_outer import (
    factor_arguments,
    find_tile,
    halves,
    listed,
    load_bounds,
    load_words,
    num_tiles,
    outer_product,
    places,
    row_halves,
    stop_unless_kept,
    tile_for,
    tile_options,
    unpack_column,
)
from moe_unlearn.triton_kernels.packed_update import PACKED, load_kept, scales_of, update_packed
from moe_unlearn.triton_kernels.update_rules import (
    adamw_constants,
    adamw_rule,
    round_moment,
    round_weight,
    select,
    sgd_constants,
    sgd_rule,
    step_dtype,
)


@triton.jit
def _update_slice(
    g, weight, first, second, master, mask, weight_strides, first_strides, second_strides, master_strides, mask_strides,
    index, expert, m, p, step, seed, parameter_id, first_row, scalars,
    M: tl.constexpr, P: tl.constexpr, ADAMW: tl.constexpr, STEP_DTYPE: tl.constexpr,
    DECAY: tl.constexpr, MOMENTUM: tl.constexpr, NESTEROV: tl.constexpr, FIRST_STEP: tl.constexpr,
    STOCHASTIC: tl.constexpr,
):  # fmt: skip
    """Run one step of the weights at (m, p) with 32 columns g of the gradient, the elements of a mask word a row."""
    at_weight, live = places(weight_strides, expert, m, p, M, P, g.shape[0], g.shape[1])
    partial, kept = live, live
    if mask is not None:
        words = load_words(mask, mask_strides, index, m, p, M, P, g.shape[0], 1)
        kept = unpack_column(words)
        live &= words != 0
        partial = live & (words != -1)
    if master is None:
        old = tl.load(weight + at_weight, mask=live)
        w = widen(old)
    else:
        at_master, _ = places(master_strides, index, m, p, M, P, g.shape[0], g.shape[1])
        old = tl.load(weight + at_weight, mask=partial)
        old_master = tl.load(master + at_master, mask=live)
        w = old_master
    if first is not None:
        at_first, _ = places(first_strides, index, m, p, M, P, g.shape[0], g.shape[1])
        old_first = tl.load(first + at_first, mask=partial if FIRST_STEP else live)

    element, _ = places((M * P, P, 1), first_row + expert, m, p, M, P, g.shape[0], g.shape[1])
    if ADAMW:
        at_second, _ = places(second_strides, index, m, p, M, P, g.shape[0], g.shape[1])
        old_second = tl.load(second + at_second, mask=live)
        w, new_first, new_second = adamw_rule(w, g, widen(old_first), widen(old_second), scalars, STEP_DTYPE, DECAY)
        new_second = round_moment(
            new_second, second.dtype.element_ty, element, step, seed, parameter_id, STEP_DTYPE, True
        )
        tl.store(second + at_second, select(new_second, old_second, kept, mask), mask=live)
    else:
        b = widen(old_first) if MOMENTUM else g
        w, new_first = sgd_rule(w, g, b, scalars, STEP_DTYPE, DECAY, MOMENTUM, NESTEROV, FIRST_STEP)

    if first is not None:
        new_first = round_moment(
            new_first, first.dtype.element_ty, element, step, seed, parameter_id, STEP_DTYPE, False
        )
        tl.store(first + at_first, select(new_first, old_first, kept, mask), mask=live)
    if master is not None:
        tl.store(master + at_master, select(w, old_master, kept, mask), mask=live)
    new = round_weight(w, weight.dtype.element_ty, element, step, seed, parameter_id, STOCHASTIC)
    tl.store(weight + at_weight, select(new, old, kept, mask), mask=live)


@triton.jit
def _update_blocks(
    g, weight, first, second, first_scales, second_scales, master, mask, weight_strides, master_strides, mask_strides,
    index, expert, m, p, step, seed, parameter_id, first_row, scalars,
    M: tl.constexpr, P: tl.constexpr, ADAMW: tl.constexpr, STEP_DTYPE: tl.constexpr,
    DECAY: tl.constexpr, MOMENTUM: tl.constexpr, NESTEROV: tl.constexpr, FIRST_STEP: tl.constexpr,
    STOCHASTIC: tl.constexpr,
):  # fmt: skip
    """Run one step of the weights at (m, p) with 64 columns g of the gradient, a block of packed moments a row."""
    tl.static_assert(g.shape[1] == 64)
    row = (m + tl.arange(0, g.shape[0])).to(tl.int64)
    block = tl.zeros_like(row) + p // 64
    column = (p + tl.arange(0, 64)).to(tl.int64)[None, :]
    at_weight, exists = places(weight_strides, expert, m, p, M, P, g.shape[0], 64)
    kept = load_kept(mask, mask_strides, index, row[:, None], column, exists)
    if master is not None:
        at_master, _ = places(master_strides, index, m, p, M, P, g.shape[0], 64)
        master += at_master
    element, _ = places((M * P, P, 1), first_row + expert, m, p, M, P, g.shape[0], 64)
    update_packed(
        g, weight + at_weight, master, first, second, first_scales, second_scales, index * M + row, block, P, kept,
        element, step, seed, parameter_id, scalars,
        ADAMW, STEP_DTYPE, DECAY, MOMENTUM, NESTEROV, FIRST_STEP, STOCHASTIC,
    )  # fmt: skip


@triton.jit
def _update(
    g, weight, first, second, first_scales, second_scales, master, mask,
    weight_strides, first_strides, second_strides, master_strides, mask_strides,
    index, expert, m, p, step, seed, parameter_id, first_row, scalars,
    M: tl.constexpr, P: tl.constexpr, ADAMW: tl.constexpr, STEP_DTYPE: tl.constexpr,
    DECAY: tl.constexpr, MOMENTUM: tl.constexpr, NESTEROV: tl.constexpr, FIRST_STEP: tl.constexpr,
    STOCHASTIC: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Run one step of the weights at (m, p) with the tile g of the gradient, slice by slice of at most ROWS rows."""
    WIDTH: tl.constexpr = 32 if first_scales is None else 64
    if g.shape[1] > WIDTH or g.shape[0] > ROWS:
        if g.shape[1] > WIDTH:
            g, other = halves(g)
            next_m, next_p = m, p + g.shape[1]
        else:
            g, other = row_halves(g)
            next_m, next_p = m + g.shape[0], p
        _update(
            g, weight, first, second, first_scales, second_scales, master, mask,
            weight_strides, first_strides, second_strides, master_strides, mask_strides,
            index, expert, m, p, step, seed, parameter_id, first_row, scalars,
            M, P, ADAMW, STEP_DTYPE, DECAY, MOMENTUM, NESTEROV, FIRST_STEP, STOCHASTIC, ROWS,
        )  # fmt: skip
        _update(
            other, weight, first, second, first_scales, second_scales, master, mask,
            weight_strides, first_strides, second_strides, master_strides, mask_strides,
            index, expert, next_m, next_p, step, seed, parameter_id, first_row, scalars,
            M, P, ADAMW, STEP_DTYPE, DECAY, MOMENTUM, NESTEROV, FIRST_STEP, STOCHASTIC, ROWS,
        )  # fmt: skip
    elif first_scales is None:
        _update_slice(
            g, weight, first, second, master, mask, weight_strides, first_strides, second_strides, master_strides,
            mask_strides, index, expert, m, p, step, seed, parameter_id, first_row, scalars,
            M, P, ADAMW, STEP_DTYPE, DECAY, MOMENTUM, NESTEROV, FIRST_STEP, STOCHASTIC,
        )  # fmt: skip
    else:
        _update_blocks(
            g, weight, first, second, first_scales, second_scales, master, mask, weight_strides, master_strides,
            mask_strides, index, expert, m, p, step, seed, parameter_id, first_row, scalars,
            M, P, ADAMW, STEP_DTYPE, DECAY, MOMENTUM, NESTEROV, FIRST_STEP, STOCHASTIC,
        )  # fmt: skip


@triton.jit(do_not_specialize=["step", "seed", "parameter_id", "first_row"])
def _update_kernel(
    weight, first, second, first_scales, second_scales, master, mask,
    weight_strides, first_strides, second_strides, master_strides, mask_strides,
    grad, input, bounds, grad_rows, input_rows, strides, experts, num_listed,
    step: tl.int64, seed: tl.int64, parameter_id: tl.int64, first_row: tl.int64, scalars,
    M: tl.constexpr, P: tl.constexpr, ADAMW: tl.constexpr, STEP_DTYPE: tl.constexpr,
    DECAY: tl.constexpr, MOMENTUM: tl.constexpr, NESTEROV: tl.constexpr, FIRST_STEP: tl.constexpr,
    STOCHASTIC: tl.constexpr, ROWS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_P: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, GROUP: tl.constexpr, BY_DESCRIPTOR: tl.constexpr, BOUNDS_STRIDE: tl.constexpr,
):  # fmt: skip
    """Compute one tile of dW and update its weights.

    first, second: exp_avg and exp_avg_sq, or momentum_buffer and None; None where there is no such tensor.
    first_scales, second_scales: the same memory as float32 where they are packed, else None.
    first_row: the index of weight's first expert in the weight that it is a shard of.
    """
    index, m, p = find_tile(tl.program_id(0), M, P, BLOCK_M, BLOCK_P, GROUP)
    expert = listed(experts, index)
    start, stop = load_bounds(bounds, expert, BOUNDS_STRIDE)
    stop = stop_unless_kept(mask, mask_strides, index, m, p, start, stop, M, P, BLOCK_M, BLOCK_P)
    g = outer_product(
        grad, input, grad_rows, input_rows, strides, start, stop, m, p,
        M, P, BLOCK_M, BLOCK_P, BLOCK_ROWS, BY_DESCRIPTOR,
    )  # fmt: skip
    _update(
        g, weight, first, second, first_scales, second_scales, master, mask,
        weight_strides, first_strides, second_strides, master_strides, mask_strides,
        index, expert, m, p, step, seed, parameter_id, first_row, scalars,
        M, P, ADAMW, STEP_DTYPE, DECAY, MOMENTUM, NESTEROV, FIRST_STEP, STOCHASTIC, ROWS,
    )  # fmt: skip


def sgd_(
    weight, momentum_buffer, master, grad, input, expert_offsets, grad_rows, input_rows, experts, mask, lr, momentum,
    dampening, weight_decay, nesterov, step, rounding, seed, parameter_id, first_row,
) -> None:  # fmt: skip
    """Update weight[experts] by masked SGD with dW, in place; arguments as in `expert_wgrad_sgd_ref_` of the op."""
    scalars, flags = sgd_constants(lr, momentum, dampening, weight_decay, nesterov, step)
    flags |= {"ADAMW": False, "STEP_DTYPE": step_dtype(weight, (momentum_buffer,), rounding, master)}
    state = (momentum_buffer if flags["MOMENTUM"] else None, None, master)
    factors = (grad, input, expert_offsets, grad_rows, input_rows)
    counter = (step, seed, parameter_id, first_row)
    _launch(weight, state, mask, factors, experts, counter, rounding, scalars, flags)


def adamw_(
    weight, exp_avg, exp_avg_sq, master, grad, input, expert_offsets, grad_rows, input_rows, experts, mask, lr, beta1,
    beta2, eps, weight_decay, step, rounding, seed, parameter_id, first_row,
) -> None:  # fmt: skip
    """Update weight[experts] by masked AdamW with dW, in place; arguments as in `expert_wgrad_adamw_ref_` of the op."""
    scalars, flags = adamw_constants(lr, beta1, beta2, eps, weight_decay, step)
    flags |= {"ADAMW": True, "STEP_DTYPE": step_dtype(weight, (exp_avg, exp_avg_sq), rounding, master)}
    flags |= {"MOMENTUM": False, "NESTEROV": False, "FIRST_STEP": False}
    factors = (grad, input, expert_offsets, grad_rows, input_rows)
    state = (exp_avg, exp_avg_sq, master)
    counter = (step, seed, parameter_id, first_row)
    _launch(weight, state, mask, factors, experts, counter, rounding, scalars, flags)


def _launch(weight: torch.Tensor, state, mask, factors, experts, counter, rounding, scalars, flags) -> None:
    packed = state[0] is not None and state[0].dtype == PACKED
    if packed or state[2] is not None or rounding == "stochastic":
        epilogue = "update"
    else:
        epilogue = "weights" if all(s is None for s in state) else "state"
    shape, tile = tile_for(epilogue, factors, experts)
    if 0 in shape:
        return
    side = factor_arguments(*factors, tile)
    tensors = (weight, *state, mask)
    _update_kernel[(num_tiles(shape, tile),)](
        *tensors[:3],
        *(scales_of(*state[:2]) if packed else (None, None)),
        *tensors[3:],
        *(None if t is None else t.stride() for t in tensors),
        *side[:6],
        None if experts is None else experts.contiguous(),
        shape[0],
        *counter,
        tuple(scalars),
        STOCHASTIC=rounding == "stochastic",
        ROWS=configs.packed_rows(tile.num_warps) if packed else tile.block_m,
        BY_DESCRIPTOR=side.by_descriptor,
        BOUNDS_STRIDE=side.bounds_stride,
        enable_fp_fusion=False,
        **flags,
        **tile_options(shape, tile),
    )
