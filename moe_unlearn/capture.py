"""Routing capture: which experts each token visits, taken from the inputs of the experts modules.

Hooks stand before the experts modules, so they see global expert ids under any experts implementation and
under expert parallelism, and `output_router_logits`, which changes the loss, is never set. Captures run
under no_grad and without gradient checkpointing's recompute, so nothing is counted twice.
"""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from moe_unlearn.experts import experts_modules
from moe_unlearn.losses import final_hidden_states
from moe_unlearn.ops.route import route

Batch = dict[str, Tensor]


@contextlib.contextmanager
def routing_capture(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Name of the experts module -> its `top_k_index` [T, K] in the last forward pass inside.

    A layer whose hook never fired (its forward was replaced as a whole) has no entry.
    """
    seen: dict[str, Tensor] = {}

    def hook(name):
        def collect(module, args, kwargs):
            index = kwargs["top_k_index"] if "top_k_index" in kwargs else args[1]
            seen[name] = index.detach()

        return collect

    handles = [
        module.register_forward_pre_hook(hook(name), with_kwargs=True)
        for name, module in experts_modules(model).items()
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def collect_routing(model: nn.Module, batch: Batch) -> Tensor:
    """top_k_index [L, B * S, K] int64 of one forward pass in evaluation mode; the mode is restored.

    Raises ValueError for a model without experts modules or with layers of different K, RuntimeError when a
    layer's experts were bypassed.
    """
    modules = experts_modules(model)
    if not modules:
        raise ValueError(f"{type(model).__name__} has no Mixture-of-Experts layers")
    training = model.training
    model.eval()
    try:
        with routing_capture(model) as seen:
            final_hidden_states(model, batch)
    finally:
        model.train(training)
    missing = [name for name in modules if name not in seen]
    if missing:
        raise RuntimeError(
            f"no routing was seen at {missing[0]} ({len(missing)} of {len(modules)} layers): its experts module "
            "was bypassed, as a kernel that replaces the whole MLP does"
        )
    if len({index.shape for index in seen.values()}) > 1:
        raise ValueError("layers with different numbers of experts per token are not supported")
    return torch.stack([seen[name] for name in modules]).long()


def count_experts(model: nn.Module, batch: Batch, mask: Tensor) -> Tensor:
    """Top-K hits [L, E] int64 over the positions in `mask` (bool [B, S])."""
    index = collect_routing(model, batch)
    group = torch.where(mask.flatten(), 0, -1).to(torch.int32)
    sizes = [module.num_experts for module in experts_modules(model).values()]
    if len(set(sizes)) > 1:
        raise ValueError(f"layers with different numbers of experts are not supported; got {sorted(set(sizes))}")
    return torch.stack([route(i, sizes[0], group=group).tokens_per_expert[0].long() for i in index])
