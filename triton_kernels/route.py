"""route: sorts the routed rows by expert, stably, in two launches; the formulas are in `ops.route`.

The tokens are cut into at most a few hundred blocks of equal length (`configs.route`).

    _count_kernel    grid (sections, blocks): counts the rows of each expert in a block, rows_per_block
                     [sections, blocks, E]. Section 0 counts all rows, section 1 + g those of group g; without groups
                     there is only the first. Section 0 also adds the tilt to `log_weight`.
    _scatter_kernel  grid (blocks): the place of the block's first row of each expert = rows of smaller experts
                     + rows of that expert in earlier blocks, both summed anew from section 0 (a few 10 KB out of L2
                     cost less than a third launch). A row's rank among the equal ones before it comes from comparing
                     all pairs of a tile. The programs share the cells of the histogram.

Workspace: 4 * sections * blocks * E bytes (64 KB for 8192 tokens, 8 of 128 experts, no groups). The results are
deterministic: integers are exact, there are no atomics, one program writes each element, and one thread adds a token's
terms in the order of k.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_unlearn.triton_kernels import configs

_CHANGES_WITH_THE_BATCH = ["num_tokens", "tokens_per_block", "num_blocks"]


def route(
    top_k_index: Tensor,
    num_experts: int,
    group: Tensor | None = None,
    num_groups: int = 1,
    log_tilt: Tensor | None = None,
    log_weight: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute tokens_per_expert [G, E], expert_offsets [E + 1] and sorted_rows [T * K], all int32.

    top_k_index: int32 or int64 [T, K], T * K < 2^31; group: integer [T]; log_tilt: float [E]; log_weight: float32 [T],
    to which the tilt is added in place. Strides are free.
    """
    num_tokens, top_k = top_k_index.shape
    config = configs.route(num_tokens, top_k, num_experts)
    sections = 1 if group is None else 1 + num_groups

    def ints(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.int32, device=top_k_index.device)

    rows_per_block = ints(sections, config.blocks, num_experts)
    tokens_per_expert, expert_offsets = ints(num_groups, num_experts), ints(num_experts + 1)
    sorted_rows = ints(num_tokens * top_k)
    experts = max(32, triton.next_power_of_2(num_experts))
    _count_kernel[sections, config.blocks](
        top_k_index,
        group,
        log_tilt,
        log_weight,
        rows_per_block,
        num_tokens,
        config.tokens_per_block,
        config.blocks,
        num_experts,
        *top_k_index.stride(),
        0 if group is None else group.stride(0),
        0 if log_tilt is None else log_tilt.stride(0),
        0 if log_weight is None else log_weight.stride(0),
        TOP_K=top_k,
        EXPERTS=experts,
        TILE=config.count_tile,
        num_warps=config.num_warps,
    )
    _scatter_kernel[(config.blocks,)](
        top_k_index, rows_per_block, tokens_per_expert, expert_offsets, sorted_rows,
        num_tokens, config.tokens_per_block, config.blocks, num_groups, num_experts, *top_k_index.stride(),
        GROUPED=group is not None, TOP_K=top_k, EXPERTS=experts,
        TILE=config.tile, CHUNK=config.chunk, CELLS=config.cells, num_warps=config.num_warps,
    )  # fmt: skip
    return tokens_per_expert, expert_offsets, sorted_rows


@triton.jit
def _experts(index, token, k, inside, num_experts, stride_t, stride_k):
    """Load the int32 experts of the rows (token, k); num_experts for an id that is not here."""
    chosen = tl.load(index + token.to(tl.int64) * stride_t + k * stride_k, mask=inside, other=-1)
    return tl.where((chosen >= 0) & (chosen < num_experts), chosen, num_experts).to(tl.int32)


@triton.jit
def _rows(index, first_token, row, rows, num_experts, stride_t, stride_k, TOP_K: tl.constexpr):
    """Load `_experts` of the first `rows` rows of a block; num_experts for rows beyond."""
    token, k = first_token + row // TOP_K, (row % TOP_K).to(tl.int64)
    return _experts(index, token, k, row < rows, num_experts, stride_t, stride_k)


@triton.jit(do_not_specialize=_CHANGES_WITH_THE_BATCH)
def _count_kernel(
    index, group, log_tilt, log_weight, rows_per_block,
    num_tokens, tokens_per_block, num_blocks, num_experts, stride_t, stride_k, stride_group, stride_tilt, stride_weight,
    TOP_K: tl.constexpr, EXPERTS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Compute rows_per_block[section, block, :]; section 0 also adds sum_k log_tilt[index[t, k]] to log_weight[t]."""
    section, block = tl.program_id(0), tl.program_id(1)
    first_token = block * tokens_per_block
    tokens = tl.minimum(tokens_per_block, num_tokens - first_token)
    lane = tl.arange(0, TILE)
    count = tl.zeros((EXPERTS,), tl.int32)
    for start in range(0, tokens * TOP_K, TILE):
        row = start + lane
        expert = _rows(index, first_token, row, tokens * TOP_K, num_experts, stride_t, stride_k, TOP_K)
        counted = expert < num_experts
        if group is not None:
            token = (first_token + row // TOP_K).to(tl.int64)
            of_token = tl.load(group + token * stride_group, mask=counted, other=-1)
            counted = counted & ((section == 0) | (of_token == section - 1))
        count += tl.histogram(expert, EXPERTS, mask=counted)
    column = tl.arange(0, EXPERTS)
    slot = section.to(tl.int64) * num_blocks + block
    tl.store(rows_per_block + slot * num_experts + column, count, mask=column < num_experts)

    if log_tilt is not None:
        if section == 0:
            for start in range(0, tokens, TILE):
                inside = start + lane < tokens
                token = first_token + start + lane
                place = log_weight + token.to(tl.int64) * stride_weight
                weight = tl.load(place, mask=inside)
                for k in tl.static_range(TOP_K):
                    term = tl.full((TILE,), k, tl.int64)
                    expert = _experts(index, token, term, inside, num_experts, stride_t, stride_k)
                    tilt = tl.load(log_tilt + expert.to(tl.int64) * stride_tilt, mask=expert < num_experts, other=0.0)
                    weight += tilt.to(tl.float32)
                tl.store(place, weight, mask=inside)


@triton.jit
def _store_histogram(
    rows_per_block,
    tokens_per_expert,
    block,
    num_blocks,
    num_groups,
    num_experts,
    GROUPED: tl.constexpr,
    CHUNK: tl.constexpr,
    CELLS: tl.constexpr,
):
    """Store this program's share of tokens_per_expert [G, E], the sums of `counts` over the blocks."""
    lane, part = tl.arange(0, CELLS), tl.arange(0, CHUNK)
    num_cells = num_groups * num_experts
    for start in range(block * CELLS, num_cells, num_blocks * CELLS):
        cell = start + lane
        of_group = cell // num_experts
        section, known = of_group, cell < num_cells
        if GROUPED:
            section += 1
        else:
            # all tokens are in group 0, and there is no section for the others
            known = known & (of_group == 0)
        # rows_per_block is contiguous: the blocks of a section are num_experts apart, the sections num_blocks of these
        source = section.to(tl.int64) * num_blocks * num_experts + cell % num_experts
        total = tl.zeros((CHUNK, CELLS), tl.int32)
        for first in range(0, num_blocks, CHUNK):
            other = first + part
            mask = (other < num_blocks)[:, None] & known[None, :]
            total += tl.load(rows_per_block + source[None, :] + other[:, None] * num_experts, mask=mask, other=0)
        tl.store(tokens_per_expert + cell, tl.sum(total, axis=0), mask=cell < num_cells)


@triton.jit(do_not_specialize=_CHANGES_WITH_THE_BATCH)
def _scatter_kernel(
    index, rows_per_block, tokens_per_expert, expert_offsets, sorted_rows,
    num_tokens, tokens_per_block, num_blocks, num_groups, num_experts, stride_t, stride_k,
    GROUPED: tl.constexpr, TOP_K: tl.constexpr, EXPERTS: tl.constexpr,
    TILE: tl.constexpr, CHUNK: tl.constexpr, CELLS: tl.constexpr,
):  # fmt: skip
    """Store sorted_rows[position of row n] = n for the rows of one block, and parts of offsets and histogram."""
    block = tl.program_id(0)
    expert, part = tl.arange(0, EXPERTS), tl.arange(0, CHUNK)
    all_rows = tl.zeros((CHUNK, EXPERTS), tl.int32)
    earlier_rows = tl.zeros((CHUNK, EXPERTS), tl.int32)
    for first in range(0, num_blocks, CHUNK):
        other = first + part[:, None]
        mask = (other < num_blocks) & (expert < num_experts)[None, :]
        count = tl.load(rows_per_block + other * num_experts + expert[None, :], mask=mask, other=0)
        all_rows += count
        earlier_rows += tl.where(other < block, count, 0)
    total, earlier = tl.sum(all_rows, axis=0), tl.sum(earlier_rows, axis=0)
    offset = tl.cumsum(total, axis=0) - total
    num_here = tl.sum(total, axis=0)
    if block == 0:
        tl.store(expert_offsets + expert, offset, mask=expert < num_experts)
        tl.store(expert_offsets + num_experts, num_here)

    first_token = block * tokens_per_block
    rows = tl.minimum(tokens_per_block, num_tokens - first_token) * TOP_K
    # the place of the next row of each expert, and of the next row that is not here
    following = offset + earlier
    following_away = num_here + first_token * TOP_K - tl.sum(earlier, axis=0)
    lane = tl.arange(0, TILE)
    for start in range(0, rows, TILE):
        row = start + lane
        chosen = _rows(index, first_token, row, rows, num_experts, stride_t, stride_k, TOP_K)
        here = chosen < num_experts
        # the reduced dimension comes first, so that a thread holds a row's whole column and adds it up alone
        equal_before = (chosen[:, None] == chosen[None, :]) & (lane[:, None] < lane[None, :])
        rank = tl.sum(equal_before.to(tl.int32), axis=0)
        base = tl.gather(following, tl.where(here, chosen, 0), axis=0)
        position = tl.where(here, base, following_away) + rank
        tl.store(sorted_rows + position, first_token * TOP_K + row, mask=row < rows)
        following += tl.histogram(chosen, EXPERTS, mask=here)
        following_away += TILE - tl.sum(here.to(tl.int32), axis=0)

    _store_histogram(
        rows_per_block, tokens_per_expert, block, num_blocks, num_groups, num_experts, GROUPED, CHUNK, CELLS
    )
