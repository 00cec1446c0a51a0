"""Copies of a step: the twin that verifies it, the shadow that rehearses it for a plan, and steps of other models."""

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import nn

from moe_unlearn.config import Recipe
from moe_unlearn.experts import copy_gate, experts_modules
from moe_unlearn.prepare.preparation import Preparation
from moe_unlearn.step.weights import twin_of

if TYPE_CHECKING:
    from moe_unlearn.step.unlearn import UnlearnStep


def twin(step: "UnlearnStep", model: nn.Module, prepared: dict | None = None) -> "UnlearnStep":
    """Return a plain step of one process over `model`, a copy of the step's model, with no retain budget.

    `prepared` is the state of its preparation, None that of the step. Its optimizer has the same options, and no state.
    """
    recipe = dataclasses.replace(step.recipe, retain_budget=None)
    made = type(step)(model, recipe, twin_of(step.optimizer, step.model, model), fused=False)
    prepared = step.prepared.state_dict() if prepared is None else prepared
    made.load_state_dict({"recipe": recipe.to_dict(), "steps": step.steps, "prepared": prepared})
    for name, cache in step.prepared.caches().items():
        setattr(made.prepared, name, cache)  # whose rows on disk need not be found again
    return made


def shadow(step: "UnlearnStep", copied: Callable[[Any, dict], Any], prepared: Preparation) -> "UnlearnStep":
    """Return a copy of the step for a rehearsal, by `copied(step, memo)` as in copy.deepcopy, and `prepared`.

    It has no accumulated gradients and, until `apply_preparation`, no masks.
    """
    memo = {id(step.prepared): prepared, id(step.masks): {}}
    memo |= {id(mask): mask for slot in step.optimizer.slots() if (mask := slot.mask) is not None}
    made: UnlearnStep = copied(step, memo)
    for own, copy in zip(*(experts_modules(s.model).values() for s in (step, made)), strict=True):
        copy_gate(own, copy)
    made.objectives.dual.warns = False  # its losses are not real
    made.verifier.remaining = 0
    made.discard()
    return made


def like(step: "UnlearnStep", model: nn.Module, recipe: Recipe) -> "UnlearnStep":
    """Return a new step of another model and recipe, run as `step` is, that does not communicate."""
    made = type(step)(model, recipe, fused=step.fused)
    made.ranks.count, made.ranks.peers = step.ranks.count, step.ranks.peers
    made.held_back = step.held_back
    return made
