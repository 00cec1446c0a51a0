"""Captures which experts each token visits, from the inputs of the experts modules.

A hook before each experts module sees the global expert ids under every experts implementation, under PEFT
and under expert parallelism. The capture never sets `output_router_logits`, which would change the loss.

Every forward pass inside the context counts once. A gradient checkpoint runs its part of the forward again
during the backward pass; the hooks recognise a backward pass and count nothing in it.
"""

import contextlib
from collections.abc import Callable, Container, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from moe_unlearn.experts import experts_modules, total_experts
from moe_unlearn.model.batches import Batch
from moe_unlearn.model.head import final_hidden_states
from moe_unlearn.model.modes import evaluation_mode
from moe_unlearn.model.packing import call_of
from moe_unlearn.ops.route import route


class RoutingCapture:
    """The routing that `routing_capture` collects, layers in the order of `experts_modules`."""

    def __init__(self, model_name: str, layers: dict[str, nn.Module], num_groups: int, keep_index: bool):
        self.layers = list(layers)
        self.num_groups = num_groups
        self.keep_index = keep_index
        self.group: Tensor | None = None
        first: Any = next(iter(layers.values()))
        self._num_experts = total_experts(first)
        self._model_name = model_name
        self._counts: dict[str, Tensor] = {}
        self._index: dict[str, list[Tensor]] = {name: [] for name in layers}

    @property
    def counts(self) -> Tensor:
        """Return the top-K hits [L, E] int64 of the counted tokens; [L, G, E] with `num_groups` > 1."""
        self._require_all(self._counts)
        counts = torch.stack([self._counts[name].to(self._device) for name in self.layers])
        return counts if self.num_groups > 1 else counts[:, 0]

    @property
    def top_k_index(self) -> Tensor:
        """Return the expert ids [L, T, K] int64 of all tokens, forward passes one after the other."""
        if not self.keep_index:
            raise RuntimeError("ids were not kept: pass keep_index=True to routing_capture")
        self._require_all({name for name, parts in self._index.items() if parts})
        layers = [torch.cat(self._index[name]).to(self._device) for name in self.layers]
        if len({tuple(index.shape) for index in layers}) > 1:
            shapes = {name: list(index.shape) for name, index in zip(self.layers, layers, strict=True)}
            raise ValueError(f"layers must route the same tokens to the same number of experts; got {shapes}")
        return torch.stack(layers)

    def collect(self, name: str, top_k_index: Tensor) -> None:
        """Take the routing of one layer in one forward pass."""
        if self.group is not None and len(self.group) != len(top_k_index):
            raise ValueError(
                f"{name} routes {len(top_k_index)} tokens but group has {len(self.group)}: it must name the "
                "group of each position of the forward pass"
            )
        group = None if self.group is None else self.group.to(top_k_index.device)
        hits = route(top_k_index, self._num_experts, group=group, num_groups=self.num_groups).tokens_per_expert
        self._counts[name] = self._counts[name] + hits if name in self._counts else hits.long()
        if self.keep_index:
            self._index[name].append(top_k_index.detach().long())

    @property
    def _device(self) -> torch.device:
        return self._counts[self.layers[0]].device

    def _require_all(self, seen: Container[str]) -> None:
        missing = [name for name in self.layers if name not in seen]
        if missing:
            raise RuntimeError(
                f"no routing was seen at {missing[0]} ({len(missing)} of {len(self.layers)} MoE layers of "
                f"{self._model_name}): no forward pass ran inside the context, or a kernel that replaces the "
                "whole MLP bypassed the experts module, so that its hooks never fire"
            )


@contextlib.contextmanager
def routing_capture(
    model: nn.Module, *, group: Tensor | None = None, num_groups: int = 1, keep_index: bool = False
) -> Iterator[RoutingCapture]:
    """Collect the routing of the forward passes inside.

    Args:
        group: int [B * S], the group of each position of the next forward passes. A position whose group lies
            outside [0, num_groups), by convention -1, is not counted. None counts every position in group 0.
            `.group` of the yielded object may be set before each forward pass.
        keep_index: keep every id too, for `.top_k_index`.

    Read `.counts` and `.top_k_index` inside the context or after it: RuntimeError if a layer was never
    reached. Raises ValueError for a model without MoE layers or with layers of different sizes.
    """
    modules = experts_modules(model)
    if not modules:
        raise ValueError(f"{type(model).__name__} has no Mixture-of-Experts layers that transformers decorates")
    sizes = {name: total_experts(module) for name, module in modules.items()}
    if len(set(sizes.values())) > 1:
        raise ValueError(f"layers with different numbers of experts are not supported; got {sizes}")
    capture = RoutingCapture(type(model).__name__, modules, num_groups, keep_index)
    capture.group = group

    def hook(name: str) -> Callable[[nn.Module, tuple, dict], None]:
        def collect(module: nn.Module, args: tuple, kwargs: dict) -> None:
            # the id is -1 outside backward passes; inside one, only a checkpoint's recompute calls a forward
            if torch._C._current_graph_task_id() == -1:
                capture.collect(name, kwargs["top_k_index"] if "top_k_index" in kwargs else args[1])

        return collect

    handles = [m.register_forward_pre_hook(hook(n), with_kwargs=True) for n, m in modules.items()]
    try:
        yield capture
    finally:
        for handle in handles:
            handle.remove()


def collect_routing(model: nn.Module, batch: Batch) -> Tensor:
    """Return top_k_index [L, B * S, K] int64 of one forward pass in evaluation mode; that of padding means nothing."""
    call = call_of(batch)
    with torch.no_grad(), evaluation_mode(model), routing_capture(model, keep_index=True) as capture:
        final_hidden_states(model, batch, call)
    return call.rows(capture.top_k_index.transpose(0, 1)).flatten(0, 1).transpose(0, 1)
