"""Turns a recipe's scope, which says what may train, into frozen parameters and packed masks.

Everything outside the scope is frozen with `requires_grad_(False)`. The experts of a layer share one tensor, so that
the choice of experts becomes a packed mask (layout: `ops.bits`) with whole slices set or clear; the optimizer then
keeps state for the chosen experts only.
"""

import re
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from moe_unlearn.config import Recipe, Scope
from moe_unlearn.experts import experts_modules, total_experts
from moe_unlearn.masks import WeightMask
from moe_unlearn.masks.shards import held_words
from moe_unlearn.ops.bits import pack_bits
from moe_unlearn.sharding import first_row, is_sharded, part


def matching(model: nn.Module, patterns: list[str]) -> set[str]:
    """Return the names of the parameters in which any of the regular expressions is found."""
    names = [name for name, _ in model.named_parameters()]
    chosen = set()
    for pattern in patterns:
        try:
            found = {name for name in names if re.search(pattern, name)}
        except re.error as error:
            raise ValueError(f"scope.parameters: {pattern!r} is no regular expression: {error}") from None
        if not found:
            raise ValueError(
                f"scope.parameters: {pattern!r} matches no parameter; names look like "
                f"{', '.join(names[:2] + names[-2:])}{_experts_of_the_last_layers(names)}"
            )
        chosen |= found
    return chosen


def _experts_of_the_last_layers(names: list[str]) -> str:
    """Return how the experts of the last layers are named on the command line, for a model that has any."""
    layers = sorted({int(found[1]) for name in names if (found := re.search(r"layers\.(\d+)\..*experts", name))})
    if not layers:
        return ""
    last = "|".join(map(str, layers[-3:]))
    given = f"--set \"scope.parameters=['layers.({last})[.].*experts']\""
    return f". {given} takes the experts of the last layers; with forget.objective rmu add forget.layer={layers[-1]}"


def trained_names(model: nn.Module, settings: Scope, selected: Tensor | None) -> set[str]:
    """Return the names of the parameters within the scope.

    A scope of experts holds all parameters as long as none are `selected` (bool [L, E]).
    """
    if settings.kind == "parameters":
        return matching(model, settings.parameters)
    if settings.kind not in ("experts", "seuf") or selected is None:
        return {name for name, _ in model.named_parameters()}
    names = {name for name, _, _ in _selected_parameters(model, selected)}
    if settings.kind == "seuf":
        layer = int(selected.any(1).nonzero()[0])
        names |= router_parameters(model, list(experts_modules(model))[layer])
    return names


def set_trainable(model: nn.Module, flags: dict[str, bool], names: set[str]) -> None:
    """Set `requires_grad` of the parameters in `names` to their `flags`, and freeze all others."""
    for name, p in model.named_parameters():
        p.requires_grad_(flags[name] and name in names)


def restrict(model: nn.Module, recipe: Recipe, flags: dict[str, bool], selected: Tensor | None) -> None:
    """Freeze the parameters outside the scope; ValueError if the `flags` let none inside it train.

    Routers that the recipe freezes are in no scope.
    """
    names, without = trained_names(model, recipe.scope, selected), ""
    if recipe.router.mode == "invariant":  # a bias moves the logits of every input
        named = dict(model.named_parameters())
        names -= {name for name in routing_parameters(model) if named[name].dim() == 1}
    if recipe.router.mode == "frozen":
        names, without = names - routing_parameters(model), ", less the routers by router.mode frozen"
    if not any(flags[name] for name in names):
        raise ValueError(
            f"nothing to train: every parameter in the scope ({recipe.scope.kind!r}{without}) is frozen; a parameter "
            "that does not require grad when the step is built, as those under adapters, stays as it is"
        )
    set_trainable(model, flags, names)


def weight_masks(
    model: nn.Module, settings: Scope, selected: Tensor | None, mask: WeightMask | None
) -> dict[str, Tensor]:
    """Return packed masks by parameter, each on its device: the chosen experts, WAGLE's `mask`, or both combined.

    They are of the rows that this rank holds.
    """
    masks = {}
    if settings.kind in ("experts", "seuf") and selected is not None:
        masks = expert_masks(model, selected)
    if mask is not None:
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        masks = combine(masks, {name: held_words(mask.packed[name], p) for name, p in trained.items()})
    return masks


def expert_masks(model: nn.Module, selected: Tensor) -> dict[str, Tensor]:
    """Return packed masks of the expert parameters that let the experts in `selected` (bool [L, E]) move.

    Layers follow the order of `experts_modules`; a layer without a selected expert has no entry. Of sharded parameters
    they are of the rows that this rank holds.
    """
    masks = {}
    for name, row, parameter in _selected_parameters(model, selected):
        p, start = part(parameter.detach()), first_row(parameter)
        row = row[start : start + len(p)] if is_sharded(parameter) else row
        # the rows of an expert are alike, so that one of them is packed and repeated
        words = pack_bits(row.to(p.device)[:, None].expand(-1, p.shape[-1]))
        masks[name] = words.view(len(row), *[1] * (p.dim() - 2), -1).expand(*p.shape[:-1], -1).contiguous()
    return masks


def _selected_parameters(model: nn.Module, selected: Tensor) -> Iterator[tuple[str, Tensor, nn.Parameter]]:
    """Yield name, selection [E] and parameter of every expert weight in the layers with a selected expert."""
    modules = experts_modules(model)
    if selected.dtype != torch.bool or selected.dim() != 2 or len(selected) != len(modules):
        raise ValueError(
            f"selected must be bool [L, E] with L = {len(modules)}; got {selected.dtype} {tuple(selected.shape)}"
        )
    for row, (name, module) in zip(selected, modules.items(), strict=True):
        for suffix, parameter in module.named_parameters() if row.any() else ():
            yield f"{name}.{suffix}", row, parameter


def wrapped_name(experts_name: str) -> str:
    """Return the name under which an experts module stands together with the PEFT wrappers around it."""
    while experts_name.endswith(".base_layer"):
        experts_name = experts_name.removesuffix(".base_layer")
    return experts_name


def router_parameters(model: nn.Module, experts_name: str) -> set[str]:
    """Return the names of the router's parameters beside one experts module.

    They are the parameters under the same parent, outside the experts, with one row per expert.
    """
    num_experts = total_experts(experts_modules(model)[experts_name])
    own = wrapped_name(experts_name)
    parent = own.rpartition(".")[0]
    return {
        name
        for name, p in model.named_parameters()
        if name.startswith(parent + ".")
        and not name.startswith(own + ".")
        and p.dim() <= 2
        and p.shape[0] == num_experts
    }


def routing_parameters(model: nn.Module) -> set[str]:
    """Return the names of the parameters of all routers, those of adapters on them too."""
    found = set()
    for experts_name in experts_modules(model):
        parent = wrapped_name(experts_name).rpartition(".")[0] + "."
        owners = {name.removeprefix(parent).split(".")[0] for name in router_parameters(model, experts_name)}
        found |= {
            name
            for name, _ in model.named_parameters()
            if name.startswith(parent) and name.removeprefix(parent).split(".")[0] in owners
        }
    return found


def combine(masks: dict[str, Tensor], others: dict[str, Tensor]) -> dict[str, Tensor]:
    """Combine two sets of masks by a word-wise AND; a parameter in one set only keeps that mask."""
    both = {name: masks[name] & others[name] for name in masks.keys() & others.keys()}
    return {**masks, **others, **both}
