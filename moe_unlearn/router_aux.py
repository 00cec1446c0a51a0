"""Computes the load-balancing loss, which a model adds to its own loss if its config has `output_router_logits`.

    L = E sum_e f_e P_e
    f_e = (1 / n) sum over layers l and positions t of [how often t visits expert e in l]
    P_e = (1 / n) sum over layers l and positions t of softmax(router logits of t in l)_e

n = layers * positions; the positions are the attended ones of retain rows, whether they carry a loss or not. f has no
gradient; P has one to the routers that train and to every weight below a router. TRACE's token weights do not enter.
In a recipe the loss is part of the retain loss, alpha (L_retain + router_aux L), where `coefficient` reads
`retain.router_aux`.

A product of two means is not linear in the batch: the loss of all rows cannot be computed from the losses of their
parts. Each micro-batch of each rank balances its own rows; the loss of a step is the mean of these losses, weighted by
their numbers of positions. (transformers' Trainer adds up the losses of its micro-batches, so that their weight grows
with `accumulate`.)

Source: Switch Transformer (arXiv 2101.03961), equations 4 to 6, pooled over layers as in transformers'
`load_balancing_loss_func`. The two values agree wherever a router sends tokens to its K largest logits: there f counts
the K largest logits, here the experts visited, and a router with a correction bias visits others. The softmax is in
float32 for narrower logits.
"""

import contextlib
import functools
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from moe_unlearn import seuf
from moe_unlearn.config import Recipe
from moe_unlearn.experts import experts_modules
from moe_unlearn.model.head import decoder_of, unwrapped
from moe_unlearn.model.packing import Call
from moe_unlearn.model.scope import router_parameters, wrapped_name

_FUNCTION = "load_balancing_loss_func"  # transformers' name of the loss, in the file of every model that has it
_COEFFICIENT = "router_aux_loss_coef"


class Layer(NamedTuple):
    """Routing of one layer in a forward pass: router logits [T, E] with their gradient, experts visited [T, K]."""

    logits: Tensor
    top_k_index: Tensor

    def rows(self, call: Call, rows: slice, length: int) -> "Layer":
        """Return the routing of the first `length` positions of some rows of the batch of a call."""
        return Layer(*(call.rows(part)[rows, :length].flatten(0, 1) for part in self))


@contextlib.contextmanager
def routing(model: nn.Module) -> Iterator[list[Layer]]:
    """Collect the routing of each MoE layer in the first forward pass of the decoder inside.

    Raises ValueError where the decoder does not return one tensor of router logits for each MoE layer, RuntimeError in
    a reentrant gradient checkpoint that is not transformers'.
    """
    collected: list[Layer] = []

    def ask(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        return args, kwargs | {"output_router_logits": True}

    def take(module: nn.Module, args: tuple, output: Any) -> None:
        if collected:
            return
        logits = output.get("router_logits") or ()
        if len(logits) != len(gates):
            raise ValueError(
                f"{type(module).__name__} gives router logits of {len(logits)} layers, expected {len(gates)}: its "
                "load-balancing loss cannot be made (retain.router_aux: off leaves it out)"
            )
        # logits and gates are both in the order of the layers
        collected.extend(Layer(z.flatten(0, -2), g.top_k_index) for z, g in zip(logits, gates.values(), strict=True))

    decoder = decoder_of(model)
    with seuf.gates(model) as gates:
        handles = [decoder.register_forward_pre_hook(ask, with_kwargs=True), decoder.register_forward_hook(take)]
        try:
            yield collected
        finally:
            for handle in handles:
                handle.remove()


def load_balancing_loss(layers: list[Layer], attended: Tensor) -> Tensor:
    """Compute L [] over the set positions of `attended`, bool [T]; 0 where none is set. See the module docstring."""
    parts = zip(*(_sums(_on(layer, attended.device), attended) for layer in layers), strict=True)
    visits, probability = (functools.reduce(torch.add, of_layers) for of_layers in parts)
    n = len(layers) * attended.sum().clamp_min(1)
    loss: Tensor = len(visits) * (visits / n * (probability / n)).sum()
    return loss


def _sums(layer: Layer, attended: Tensor) -> tuple[Tensor, Tensor]:
    """Compute each expert's visits [E] in one layer and its summed probability [E] over the attended positions."""
    kept, experts = attended[:, None], layer.logits.shape[1]
    # padding may hold NaN, so that it is taken out before the softmax too
    wide = torch.where(kept, layer.logits if layer.logits.dtype == torch.float64 else layer.logits.float(), 0)
    # ids behind the last expert mean "not here"
    ids = torch.where(kept, layer.top_k_index.long(), experts).clamp_max(experts).flatten()
    visits = torch.zeros(experts + 1, dtype=torch.int64, device=ids.device).scatter_add_(0, ids, torch.ones_like(ids))
    return visits[:-1], torch.where(kept, wide.softmax(1), 0).sum(0)


def _on(layer: Layer, device: torch.device) -> Layer:
    """Move a layer's routing to a device: the layers of a model may lie on several devices."""
    return Layer(*(part.to(device) for part in layer))


def coefficient(model: nn.Module, recipe: Recipe) -> float:
    """Return the factor of the load-balancing loss that is added to the retain loss, 0 if none is added.

    `retain.router_aux` is "off", a number, or "auto": the model's own coefficient if its config has
    `output_router_logits` and the recipe's retain objective reads all layers. Raises ValueError for a number if the
    model has no such loss in transformers.
    """
    setting = recipe.retain.router_aux
    if setting == "off":
        return 0.0
    if isinstance(setting, str):
        return 0.0 if _left_out(model, recipe) else _own(model) or 0.0
    if setting and not _has_loss(model):
        raise ValueError(
            f"retain.router_aux is {setting:g}, but {type(unwrapped(model)).__name__} has no load-balancing loss "
            "(no router_aux_loss_coef); expected 'auto' or 'off'"
        )
    return setting


def described(model: nn.Module, recipe: Recipe) -> str:
    """Describe for a plan which load-balancing loss is added or left out; empty for a model without one."""
    if not _has_loss(model):
        return ""
    setting, value = recipe.retain.router_aux, coefficient(model, recipe)
    if not value:
        why = _left_out(model, recipe) if setting == "auto" else "retain.router_aux is off" if setting == "off" else ""
        switched_on = " which its config switches on" if setting != "auto" and _switched_on(model) else ""
        return f"left out, the model's load-balancing loss{switched_on}: {why or 'its coefficient is 0'}"
    whose = "the model's own coefficient" if setting == "auto" else "the recipe's coefficient"
    return f"{value:g} x the load-balancing loss of retain rows is added, {whose}{_reach(model)}"


def _left_out(model: nn.Module, recipe: Recipe) -> str:
    """Return why "auto" adds no loss; empty if it adds one."""
    if not _has_loss(model):
        return "it has none"
    if not _switched_on(model):
        return "its config does not switch it on (output_router_logits)"
    if recipe.retain.objective not in ("nll", "kl"):
        return f"retain.objective {recipe.retain.objective!r} has no pass of retain rows through all layers"
    return ""


def _has_loss(model: nn.Module) -> bool:
    files = [sys.modules.get(kind.__module__) for kind in type(unwrapped(model)).__mro__]
    return _own(model) is not None and any(hasattr(file, _FUNCTION) for file in files)


def _own(model: nn.Module) -> float | None:
    """Return the coefficient by which the model multiplies the loss: its own attribute, else its config's."""
    causal = unwrapped(model)
    own: float | None = getattr(causal, _COEFFICIENT, getattr(_config(causal), _COEFFICIENT, None))
    return own


def _switched_on(model: nn.Module) -> bool:
    return bool(getattr(_config(unwrapped(model)), "output_router_logits", False))


def _config(causal: Any) -> Any:
    return causal.config.get_text_config() if hasattr(causal.config, "get_text_config") else causal.config


def _reach(model: nn.Module) -> str:
    """Describe what the loss can move if no router trains; empty if one trains."""
    names = [name for name, _ in model.named_parameters()]
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    modules = list(experts_modules(model))
    routers = set().union(*(router_parameters(model, name) for name in modules))
    if not routers.isdisjoint(trained):
        return ""
    last = wrapped_name(modules[-1]).rpartition(".")[0]
    layer = last.rpartition(".")[0] + "."
    end = max(i for i, name in enumerate(names) if name.startswith(layer))
    below = {name for name in names[: end + 1] if not name.startswith(last + ".")}
    if below.isdisjoint(trained):
        return "; it moves nothing, since no router trains and no weight below one"
    return "; no router trains, so that it moves weights below routers only"
