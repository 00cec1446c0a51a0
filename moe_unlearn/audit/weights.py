"""Change weights in place and put them back, bit for bit, whatever happens meanwhile."""

import contextlib
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from moe_unlearn.experts import experts_modules, total_experts
from moe_unlearn.model.scope import router_parameters
from moe_unlearn.ranks import local


@contextlib.contextmanager
def restored(tensors: Iterable[Tensor]) -> Iterator[None]:
    """Put tensors that are changed in place inside back as they were; copies are kept in the host's memory."""
    kept = [(tensor, tensor.detach().to("cpu", copy=True)) for tensor in dict.fromkeys(tensors)]
    try:
        yield
    finally:
        with torch.no_grad():
            for tensor, copy in kept:
                tensor.copy_(copy)


def router_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return the routers' parameters and buffers (correction biases) by name; empty without experts."""
    model = local(model)
    found: dict[str, Tensor] = {}
    parameters = dict(model.named_parameters())
    for layer, module in experts_modules(model).items():
        found |= {name: parameters[name] for name in sorted(router_parameters(model, layer))}
        parent = layer.rpartition(".")[0]
        found |= {
            name: buffer
            for name, buffer in model.named_buffers()
            if name.startswith(f"{parent}.") and list(buffer.shape[:1]) == [total_experts(module)]
        }
    return found
