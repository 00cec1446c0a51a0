"""Choice of the way that each layer's gradients take in a step, with its reason.

A plan prints the choice, and the step acts on it.
"""

from typing import NamedTuple

from torch import nn

from moe_unlearn.experts import experts_modules
from moe_unlearn.model.scope import wrapped_name

_STRICT = "guard 'strict' knows every gradient before the first update (guard: loss allows it)"
_ADAPTED = "the weights are made of others (an adapter)"


class Path(NamedTuple):
    """The way of one MoE layer's gradients, with its reason.

    way: `update` in the backward pass; `compact` gradients; their `factors` (or compact gradients, where these are
    smaller); `autograd`; `frozen` (gradients pass through to layers below); or `below` (nothing trains in this layer
    or below it, and its forward pass keeps nothing).
    """

    layer: str
    way: str
    trained: str
    reason: str


def obstacle(step) -> str:
    """Return why an `UnlearnStep` does not update expert weights in its backward pass; empty if it does."""
    return need(step) or ("" if step.recipe.guard == "loss" else _STRICT)


def need(step) -> str:
    """Return why a step needs whole gradients before the first update; empty if it does not."""
    recipe, separate = step.recipe, step.objectives.separate
    reasons = {
        "the plain path was asked for": not step.fused,
        f"the gradients of {step.ranks.count} ranks are added up": step.ranks.count > 1,
        "MOLLM's direction needs every gradient": recipe.mollm is not None,
        f"two forward passes use each weight: {separate}": bool(separate) and recipe.retain.objective != "none",
        "clipping needs every gradient (optimizer.max_grad_norm: null allows it)":
            recipe.optimizer.max_grad_norm is not None,
        "several micro-batches make one gradient": step.micro_batches > 1,
        step.held_back: bool(step.held_back),
    }  # fmt: skip
    return next((reason for reason, holds in reasons.items() if holds), "")


def form(step) -> str:
    """Return the form in which gradients are kept until the update.

    The forms are "compact", "factors", and "auto" for the smaller of the two.
    """
    if step.ranks.count > 1:
        return "compact"
    if step.recipe.mollm is not None:
        return step.recipe.mollm.gradients
    return "compact" if need(step) else "auto"


def paths(step) -> list[Path]:
    """Return the way of every MoE layer, in the order of `experts_modules`."""
    blocked, made = obstacle(step), []
    trains = {name for name, p in step.model.named_parameters() if p.requires_grad}
    modules = experts_modules(step.model)
    order = [name for name, _ in step.model.named_modules()]
    lowest = min((order.index(name.rpartition(".")[0]) for name in trains), default=len(order))
    for name, module in modules.items():
        own = {suffix: p for suffix, p in module.named_parameters() if p.requires_grad}
        if own:
            path = _way(step, module, own, blocked)
        elif any(parameter.startswith(wrapped_name(name) + ".") for parameter in trains):
            path = "autograd", "adapters", _ADAPTED
        elif lowest > order.index(name):
            path = "below", "no expert", "nothing trains here or below: no graph is kept"
        else:
            path = "frozen", "no expert", "gradients of layers below pass through"
        made.append(Path(name, *path))
    return made


def _way(step, module: nn.Module, own: dict[str, nn.Parameter], blocked: str) -> tuple[str, str, str]:
    layouts = {suffix: step.optimizer.layout(p) for suffix, p in own.items()}
    counts = {len(p) if not layout or layout[0] is None else len(layout[0]) for p, layout in
              zip(own.values(), layouts.values(), strict=True)}  # fmt: skip
    trained = f"{max(counts)} of {module.num_experts} experts"
    if not step.fused:
        return "autograd", trained, blocked
    # with an adapter the experts use a computed sum of weights; autograd carries its gradient on to the adapter
    weights = {suffix for suffix, _ in module.named_parameters(recurse=False)}
    if not own.keys() <= weights or not all(p.is_leaf for p in own.values()):
        return "autograd", trained, _ADAPTED
    if blocked:
        return "compact" if form(step) == "compact" else "factors", trained, blocked
    biases = any(p.dim() != 3 for p in own.values())
    return "update", trained, "in the epilogue of the weight gradient" + (", biases compact" if biases else "")
