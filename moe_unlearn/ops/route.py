"""route: counts and sorts the routing decision of a layer in one pass.

    tokens_per_expert[g, e] = #{(t, k) : top_k_index[t, k] = e, group[t] = g}
    expert_offsets[e]       = #{(t, k) : top_k_index[t, k] < e}                      exclusive prefix sum
    sorted_rows             = rows n = t * K + k, stably sorted by expert
    log_weight[t]          += sum_k log_tilt[top_k_index[t, k]]

There are T tokens, K experts per token, E experts, N = T * K rows and G token groups (forget, retain, ...). An id
outside [0, E) means "not here" (transformers' expert-parallel sentinel): its row is counted nowhere, adds
nothing to `log_weight` and stands last in `sorted_rows`, behind `expert_offsets[E]`.

Worked example, E = 3, K = 2, top_k_index = [[2, 0], [0, 2]], group = [0, 1]:

    rows              n = 0:e2  1:e0  2:e0  3:e2
    tokens_per_expert [[1, 0, 1], [1, 0, 1]]
    expert_offsets    [0, 2, 2, 4]                 expert 1 is empty
    sorted_rows       [1, 2, 0, 3]

The results are deterministic: integers are exact, and `log_weight` adds its K terms in the order of k. Source: our
specification; the counting sort by expert is common to every MoE library.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from moe_unlearn import backend, native
from moe_unlearn.ops.checks import vouch
from moe_unlearn.ops.custom import custom_op

_MOST_EXPERTS_CUDA = 1024
_MOST_CELLS = 1 << 20  # kernels keep hundreds of histograms while they count


class Routing(NamedTuple):
    """Result of `route`; all tensors int32 on the device of `top_k_index`."""

    tokens_per_expert: Tensor  # [G, E]
    expert_offsets: Tensor  # [E + 1]
    sorted_rows: Tensor  # [N]


def route(
    top_k_index: Tensor,
    num_experts: int,
    *,
    group: Tensor | None = None,
    num_groups: int = 1,
    log_tilt: Tensor | None = None,
    log_weight: Tensor | None = None,
    impl: str = "auto",
) -> Routing:
    """Compute histogram, offsets and stable sort of `top_k_index`; add the tilt to `log_weight` in place.

    Args:
        top_k_index: integer [T, K]; ids outside [0, num_experts) are "not here".
        num_experts: E >= 1, and E * num_groups at most 2^20.
        group: integer [T], the group of each token; a group outside [0, num_groups), by convention -1,
            leaves the token out of the histogram; None puts every token in group 0.
        log_tilt: float [E]; log_weight: float32 [T], to which the tilt is added in place. Give both or neither.

    Raises TypeError or ValueError for a wrong dtype, shape or device. No gradient flows.
    """
    _check(top_k_index, num_experts, group, num_groups, log_tilt, log_weight)
    return Routing(*_route(top_k_index, num_experts, group, num_groups, log_tilt, log_weight, impl))


def route_ref(
    top_k_index: Tensor,
    num_experts: int,
    group: Tensor | None = None,
    num_groups: int = 1,
    log_tilt: Tensor | None = None,
    log_weight: Tensor | None = None,
) -> Routing:
    """Compute `route` in plain PyTorch; same arguments and shapes."""
    num_tokens, top_k = top_k_index.shape
    here = (top_k_index >= 0) & (top_k_index < num_experts)
    expert = torch.where(here, top_k_index.long(), num_experts)
    rows_per_expert = torch.bincount(expert.flatten(), minlength=num_experts + 1)
    offsets = torch.nn.functional.pad(rows_per_expert[:num_experts].cumsum(0), (1, 0))
    sorted_rows = torch.argsort(expert.flatten(), stable=True)

    token_group = torch.zeros_like(expert[:, 0]) if group is None else group.long()
    counted = here & ((token_group >= 0) & (token_group < num_groups))[:, None]
    cell = (token_group[:, None] * num_experts + expert)[counted]
    histogram = torch.bincount(cell, minlength=num_groups * num_experts).view(num_groups, num_experts)

    if log_tilt is not None:
        assert log_weight is not None
        tilt = torch.nn.functional.pad(log_tilt.to(log_weight.dtype), (0, 1))
        for k in range(top_k):
            log_weight += tilt[expert[:, k]]
    return Routing(histogram.int(), offsets.int(), sorted_rows.int())


@custom_op("moe_unlearn::route", mutates_args={"log_weight"})
def _route(
    top_k_index: Tensor,
    num_experts: int,
    group: Tensor | None,
    num_groups: int,
    log_tilt: Tensor | None,
    log_weight: Tensor | None,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor]:
    kernel = backend.resolve("route", impl, top_k_index)
    histogram, offsets, rows = kernel(top_k_index, num_experts, group, num_groups, log_tilt, log_weight)
    vouch(len(rows), offsets, rows)
    return histogram, offsets, rows


@_route.register_fake
def _(
    top_k_index: Tensor,
    num_experts: int,
    group: Tensor | None,
    num_groups: int,
    log_tilt: Tensor | None,
    log_weight: Tensor | None,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor]:
    def ints(*shape: int) -> Tensor:
        return top_k_index.new_empty(shape, dtype=torch.int32)

    return ints(num_groups, num_experts), ints(num_experts + 1), ints(top_k_index.numel())


def _route_native(
    top_k_index: Tensor,
    num_experts: int,
    group: Tensor | None,
    num_groups: int,
    log_tilt: Tensor | None,
    log_weight: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    histogram, offsets, rows = torch.ops.moe_unlearn_native.route(
        top_k_index.contiguous(),
        num_experts,
        None if group is None else group.contiguous(),
        num_groups,
        None if log_tilt is None else log_tilt.to(torch.float32).contiguous(),
        log_weight,
    )
    return histogram, offsets, rows


def _route_cuda(top_k_index: Tensor, num_experts: int, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    # the kernel, which counts in shared memory, takes no more experts
    kernel = _route_native if num_experts <= _MOST_EXPERTS_CUDA else route_ref
    return kernel(top_k_index, num_experts, *arguments)


backend.register("route", "ref", route_ref)
native.register("route", _route_native)
native.register("route", _route_cuda, "cuda")
backend.register("route", "triton", "moe_unlearn.triton_kernels.route:route")


def _check(
    top_k_index: Tensor,
    num_experts: int,
    group: Tensor | None,
    num_groups: int,
    log_tilt: Tensor | None,
    log_weight: Tensor | None,
) -> None:
    if top_k_index.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"top_k_index must be int32 or int64; got {top_k_index.dtype}")
    if top_k_index.dim() != 2 or top_k_index.shape[1] == 0:
        raise ValueError(f"top_k_index must be [T, K] with K >= 1; got shape {tuple(top_k_index.shape)}")
    if num_experts < 1 or num_groups < 1:
        raise ValueError(f"num_experts and num_groups must be >= 1; got {num_experts} and {num_groups}")
    if num_experts * num_groups > _MOST_CELLS or top_k_index.numel() >= 1 << 31:
        raise ValueError(
            f"num_experts * num_groups must be at most {_MOST_CELLS} and T * K below 2^31; got {num_experts} * "
            f"{num_groups} and {top_k_index.numel()}"
        )
    num_tokens = top_k_index.shape[0]
    if group is not None:
        if group.dtype not in (torch.int8, torch.int32, torch.int64):
            raise TypeError(f"group must be int8, int32 or int64; got {group.dtype}")
        if group.shape != (num_tokens,):
            raise ValueError(f"group must be [T] = [{num_tokens}]; got shape {tuple(group.shape)}")
    if (log_tilt is None) != (log_weight is None):
        raise ValueError("log_tilt and log_weight go together; got only one of them")
    if log_tilt is not None and log_weight is not None:
        if log_tilt.shape != (num_experts,) or not log_tilt.is_floating_point():
            raise ValueError(
                f"log_tilt must be float [E] = [{num_experts}]; got {log_tilt.dtype} {tuple(log_tilt.shape)}"
            )
        if log_weight.shape != (num_tokens,) or log_weight.dtype != torch.float32:
            raise ValueError(
                f"log_weight must be float32 [T] = [{num_tokens}]; got {log_weight.dtype} {tuple(log_weight.shape)}"
            )
    for name, tensor in (("group", group), ("log_tilt", log_tilt), ("log_weight", log_weight)):
        if tensor is not None and tensor.device != top_k_index.device:
            raise ValueError(f"{name} must be on {top_k_index.device} like top_k_index; got {tensor.device}")
