"""Choice of the way that each layer's gradients take in a step, with its reason.

A plan prints the choice, and the step acts on it.
"""

from typing import NamedTuple

from torch import nn

from moe_unlearn.experts import experts_modules, total_experts
from moe_unlearn.model.scope import wrapped_name
from moe_unlearn.view import StepView

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


def obstacle(view: StepView) -> str:
    """Return why a step does not update expert weights in its backward pass; empty if it does."""
    return need(view) or ("" if view.recipe.guard == "loss" else _STRICT)


def need(view: StepView) -> str:
    """Return why a step needs whole gradients before the first update; empty if it does not."""
    recipe, separate = view.recipe, view.separate
    clips = recipe.optimizer.max_grad_norm is not None
    reasons = (
        (not view.fused, "the plain path was asked for"),
        (view.peers > 1, f"the gradients of {view.peers} ranks are added up"),
        (recipe.mollm is not None, "MOLLM's direction needs every gradient"),
        (separate and recipe.retain.objective != "none", f"two forward passes use each weight: {separate}"),
        (clips, "clipping needs every gradient (optimizer.max_grad_norm: null allows it)"),
        (view.micro_batches > 1, "several micro-batches make one gradient"),
        (view.held_back, view.held_back),
    )
    return next((reason for holds, reason in reasons if holds), "")


def form(view: StepView) -> str:
    """Return the form in which gradients are kept until the update.

    The forms are "compact", "factors", and "auto" for the smaller of the two.
    """
    if view.peers > 1:
        return "compact"
    if view.recipe.mollm is not None:
        return view.recipe.mollm.gradients
    return "compact" if need(view) else "auto"


def paths(view: StepView) -> list[Path]:
    """Return the way of every MoE layer, in the order of `experts_modules`."""
    blocked, made = obstacle(view), []
    trains = {name for name, _ in view.trained}
    modules = experts_modules(view.model)
    order = [name for name, _ in view.model.named_modules()]
    lowest = min((order.index(name.rpartition(".")[0]) for name in trains), default=len(order))
    for name, module in modules.items():
        own = {suffix: p for suffix, p in module.named_parameters() if p.requires_grad}
        if own:
            path = _way(view, module, own, blocked)
        elif any(parameter.startswith(wrapped_name(name) + ".") for parameter in trains):
            path = "autograd", "adapters", _ADAPTED
        elif lowest > order.index(name):
            path = "below", "no expert", "nothing trains here or below: no graph is kept"
        else:
            path = "frozen", "no expert", "gradients of layers below pass through"
        made.append(Path(name, *path))
    return made


def _way(view: StepView, module: nn.Module, own: dict[str, nn.Parameter], blocked: str) -> tuple[str, str, str]:
    layouts = [(p, view.optimizer.layout(p)) for p in own.values()]
    counts = [
        len(p if layout is None or layout.trained_slices is None else layout.trained_slices) for p, layout in layouts
    ]
    trained = f"{max(counts)} of {total_experts(module)} experts"
    if not view.fused:
        return "autograd", trained, blocked
    # with an adapter the experts use a computed sum of weights; autograd carries its gradient on to the adapter
    weights = {suffix for suffix, _ in module.named_parameters(recurse=False)}
    if not own.keys() <= weights or not all(p.is_leaf for p in own.values()):
        return "autograd", trained, _ADAPTED
    if blocked:
        return "compact" if form(view) == "compact" else "factors", trained, blocked
    biases = any(p.dim() != 3 for p in own.values())
    return "update", trained, "in the epilogue of the weight gradient" + (", biases compact" if biases else "")
