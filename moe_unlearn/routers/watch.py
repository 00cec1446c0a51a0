"""Finds the routers of a model, and shows what goes into them and which experts they choose."""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from moe_unlearn.experts import experts_modules
from moe_unlearn.model.batches import Batch
from moe_unlearn.model.head import final_hidden_states
from moe_unlearn.model.packing import call_of
from moe_unlearn.model.scope import router_parameters, wrapped_name

Seen = Callable[["Router", Tensor, Tensor], None]


class Router(NamedTuple):
    """The router of one MoE layer: its logits are x W^T + b for inputs x [T, H], W [E, H] and perhaps b [E]."""

    name: str  # of its weight
    experts: str  # the name of the experts module
    weight: nn.Parameter
    bias: nn.Parameter | None

    def logits(self, inputs: Tensor) -> Tensor:
        """Compute the logits [T, E] of inputs [T, H] in their dtype."""
        bias = None if self.bias is None else self.bias.detach().to(inputs)
        return nn.functional.linear(inputs, self.weight.detach().to(inputs), bias)


def routers_of(model: nn.Module, *, trained: bool = True) -> list[Router]:
    """Return the routers in the order of the layers, by default only those of which a parameter trains.

    Raises ValueError, which names it, for a router that is more than one weight [E, H] and a bias [E].
    """
    named, found = dict(model.named_parameters()), []
    for layer in experts_modules(model):
        own = {name: named[name] for name in sorted(router_parameters(model, layer))}
        if trained and not any(p.requires_grad for p in own.values()):
            continue
        weights = [name for name, p in own.items() if p.dim() == 2]
        biases = [p for p in own.values() if p.dim() == 1]
        if len(weights) != 1 or len(biases) > 1:
            raise ValueError(
                "router.mode invariant and router.correct need a router of one weight [experts, hidden] and perhaps a "
                f"bias; the one of {wrapped_name(layer)} has {', '.join(own) or 'none'}: router: frozen, or no "
                "adapters on routers"
            )
        found.append(Router(weights[0], layer, named[weights[0]], biases[0] if biases else None))
    return found


def watch(model: nn.Module, routers: Sequence[Router], batches: Iterable[Batch], see: Seen) -> None:
    """Call see(router, inputs [T, H], top_k_index [T, K]) for each router and batch; T are the batch's attended tokens.

    They stand in the order of the rows, packed or not. Each batch is one forward pass. Raises RuntimeError where a
    router's own forward pass does not run.
    """
    for batch in batches if routers else ():
        call = call_of(batch)
        order = call.order()

        def see_attended(router: Router, inputs: Tensor, top_k_index: Tensor, order: Tensor = order) -> None:
            at = order.to(inputs.device)
            see(router, inputs[at], top_k_index[at])

        with _watched(model, routers, see_attended):
            final_hidden_states(model, batch, call)


@contextlib.contextmanager
def _watched(model: nn.Module, routers: Sequence[Router], see: Seen) -> Iterator[None]:
    """Call `see` for each router in each forward pass inside; T are the tokens of the model's call."""
    waiting: dict[str, Tensor] = {}

    def enters(router: Router) -> Callable[[nn.Module, tuple], None]:
        def note(module: nn.Module, args: tuple) -> None:
            waiting[router.name] = args[0].detach().flatten(0, -2)

        return note

    def chosen(router: Router) -> Callable[[nn.Module, tuple, dict], None]:
        def take(module: nn.Module, args: tuple, kwargs: dict) -> None:
            index: Any = kwargs["top_k_index"] if "top_k_index" in kwargs else args[1]
            if router.name not in waiting:
                raise RuntimeError(f"the module of {router.name} does not run, so that its inputs are not known")
            see(router, waiting.pop(router.name), index)

        return take

    modules = dict(model.named_modules())
    handles = []
    for router in routers:
        handles.append(modules[router.name.rpartition(".")[0]].register_forward_pre_hook(enters(router)))
        handles.append(modules[router.experts].register_forward_pre_hook(chosen(router), with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def choices(top_k_index: Tensor, num_experts: int) -> Tensor:
    """Return bool [T, E], which experts each token visits."""
    empty = torch.zeros(len(top_k_index), num_experts, dtype=torch.bool, device=top_k_index.device)
    return empty.scatter_(1, top_k_index.long(), True)
