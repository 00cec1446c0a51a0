"""What the step asks of FSDP2: whole weights inside a forward pass, sums of gradients, and parts that are put together.

FSDP2 puts whole weights in place of a module's parameters while its `forward` runs. Objectives call the decoder and the
head, not the model itself; `as_forward` makes them a forward pass of the model. The tensors that a forward pass
sees are not the parameters that the optimizer has, and after it has run without gradients some of them stay in place
until `reshard`.
"""

import importlib.metadata
from collections.abc import Callable, Iterable, Sequence
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor, distributed, nn

from moe_unlearn.sharding.rows import is_sharded, placing_of

#: the versions from which on sharded weights are supported
NEEDS = {"torch": (2, 13), "transformers": (5, 19)}
_METHOD, _INSIDE = "_moe_unlearn_forward", "_moe_unlearn_inside"

_Given = ParamSpec("_Given")
_Result = TypeVar("_Result")


def check_versions() -> None:
    """Raise ValueError, which names it, for a library that is too old for sharded weights."""
    for library, least in NEEDS.items():
        found = importlib.metadata.version(library)
        if tuple(int(digits) for digits in found.split("+")[0].split(".")[:2]) < least:
            raise ValueError(f"sharded weights need {library} >= {least[0]}.{least[1]}; this is {library} {found}")


def check_engine(model: nn.Module) -> None:
    """Raise ValueError, which says why, if the sharding of a model's weights is not supported."""
    from torch.distributed.fsdp import FullyShardedDataParallel

    check_versions()
    if any(isinstance(module, FullyShardedDataParallel) for module in model.modules()):
        raise ValueError(
            "the model is in FullyShardedDataParallel (FSDP1), which flattens weights; expected FSDP2 (fully_shard)"
        )
    for name, parameter in model.named_parameters():
        if is_sharded(parameter):
            placing_of(name, parameter)


def as_forward(model: nn.Module, function: Callable[_Given, _Result]) -> Callable[_Given, _Result]:
    """Return `function`, made a forward pass of a model that FSDP2 shards; for other models, the function itself.

    Called inside another one it runs plainly. Without gradients the weights are parts again afterwards.
    """
    root = _root(model)
    if root is None or root.__dict__.get(_INSIDE):
        return function

    def run(*args: _Given.args, **options: _Given.kwargs) -> _Result:
        if _METHOD not in root.__dict__:
            from torch.distributed.fsdp import register_fsdp_forward_method

            root.__dict__[_METHOD] = lambda inner: inner()
            register_fsdp_forward_method(root, _METHOD)
        root.__dict__[_INSIDE] = True
        try:
            result: _Result = getattr(root, _METHOD)(lambda: function(*args, **options))
        finally:
            root.__dict__[_INSIDE] = False
        if not torch.is_grad_enabled():
            reshard(root)
        return result

    return run


def reshard(model: nn.Module) -> None:
    """Put the parts of FSDP2's weights back in place of whole ones that a forward pass has left."""
    for module in _fsdp_modules(model):
        module.reshard()


def reset(model: nn.Module) -> None:
    """Have FSDP2 forget a pass that stopped half-way, and put the parts of its weights back in place."""
    inner: set[nn.Module] = set()
    for module in _fsdp_modules(model):
        # before its first forward pass FSDP2 has nothing that it could forget, and fails to
        if module not in inner and module._get_fsdp_state()._is_root is not None:
            module.reset_iter_state()
            inner |= set(module.modules())


def add_up_gradients(model: nn.Module) -> Callable[[], None]:
    """Have FSDP2 add up the gradients of ranks instead of averaging them; return what undoes that.

    The step weighs each rank's losses by its units, so that the sum is the gradient. A sum also avoids that torch
    divides twice where one rank alone holds an expert and the gradients are float64.
    """
    groups = [group for module in _fsdp_modules(model) for group in module._get_fsdp_state()._fsdp_param_groups]
    before = [(group.gradient_divide_factor, group.force_sum_reduction_for_comms) for group in groups]
    for module in _fsdp_modules(model):
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)

    def undo() -> None:
        for group, (factor, summed) in zip(groups, before, strict=True):
            group.gradient_divide_factor, group.force_sum_reduction_for_comms = factor, summed

    return undo


def narrows(model: nn.Module) -> bool:
    """Return whether FSDP2 computes, or adds gradients up, with fewer bits than the weights have."""
    policies = [module._get_fsdp_state()._mp_policy for module in _fsdp_modules(model)]
    used = {dtype for policy in policies for dtype in (policy.param_dtype, policy.reduce_dtype) if dtype is not None}
    return any(dtype.itemsize < p.element_size() for dtype in used for p in model.parameters())


def sum_of_peers(
    rows: Tensor, counts: Sequence[int], order: Tensor | None, group: "distributed.ProcessGroup | None"
) -> Tensor:
    """Return the sum over the ranks of `group` of those of `rows` [M, ...] that this rank holds.

    `counts` says how many of them each rank holds, in the order of the group; `order` lists these rows, rank by rank,
    None if they are all rows as they stand. They are added in the order of the ranks: the bits of one process that
    meets the ranks' batches in this order.
    """
    total, *others = of_peers(rows if order is None or group is None else rows[order], counts, group).unbind(0)
    for other in others:
        total = total + other
    return total


def of_peers(rows: Tensor, counts: Sequence[int], group: "distributed.ProcessGroup | None") -> Tensor:
    """Return [ranks, counts[rank], ...]: from each rank of `group` those of its `rows` that this rank holds.

    `counts` says how many of `rows` [sum(counts), ...] each rank holds, in the order of the group.
    """
    if group is None:
        return rows[None]
    own, ranks = counts[distributed.get_rank(group)], len(counts)
    received = rows.new_empty(ranks * own, *rows.shape[1:])
    distributed.all_to_all_single(received, rows.contiguous(), [own] * ranks, list(counts), group=group)
    return received.view(ranks, own, *rows.shape[1:])


def complete_(tensor: Tensor, groups: "Iterable[distributed.ProcessGroup]") -> Tensor:
    """Add up a tensor in place over groups of ranks, one after the other, and return it."""
    for group in groups:
        exchange_(tensor, group, distributed.all_reduce)
    return tensor


def exchange_(tensor: Tensor, group: "distributed.ProcessGroup | None", collective: Callable) -> None:
    """Run `collective(tensor, group=group)` in place, in memory that the backend of `group` takes."""
    # collectives need contiguous memory, and those of NCCL need it on the GPU
    sent = tensor.to(device_of(group, tensor.device)).contiguous()
    collective(sent, group=group)
    if sent is not tensor:
        tensor.copy_(sent)


def device_of(group: "distributed.ProcessGroup | None", preferred: torch.device) -> torch.device:
    """Return the device on which the backend of `group` takes tensors: `preferred` if it can be used."""
    if distributed.get_backend(group) == "nccl" and preferred.type != "cuda":
        return torch.device("cuda", torch.cuda.current_device())
    return preferred


def initialised() -> bool:
    """Return whether this process is a rank of torch.distributed."""
    return distributed.is_available() and distributed.is_initialized()


def _root(model: Any) -> Any:
    """Return the module under which FSDP2 has all weights of a model, the model or what PEFT wraps; None without."""
    if not initialised():
        return None
    from torch.distributed.fsdp import FSDPModule

    if isinstance(model, FSDPModule) or not hasattr(model, "get_base_model"):
        return model if isinstance(model, FSDPModule) else None
    base = model.get_base_model()
    return base if isinstance(base, FSDPModule) else None


def _fsdp_modules(model: nn.Module) -> list[Any]:
    if not initialised():
        return []
    from torch.distributed.fsdp import FSDPModule

    return [module for module in model.modules() if isinstance(module, FSDPModule)]
