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


def linear_weights(model: nn.Module) -> dict[str, tuple[Tensor, int]]:
    """Return what quantisation rounds, by name, with the dimension of the inputs: linear layers and experts.

    Output head, embeddings, norms, biases and routers are left out, as the usual quantisers leave them.
    """
    model = local(model)
    head = getattr(model, "get_output_embeddings", lambda: None)()
    found: dict[str, tuple[Tensor, int]] = {}
    routers = {name for layer in experts_modules(model) for name in router_parameters(model, layer)}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and module is not head and f"{name}.weight" not in routers:
            found[f"{name}.weight"] = module.weight, 1
    for name, module in experts_modules(model).items():
        inputs = 1 if module.is_transposed else 2
        found |= {f"{name}.{own}": (p, inputs) for own, p in module.named_parameters() if p.dim() == 3}
    return found


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
