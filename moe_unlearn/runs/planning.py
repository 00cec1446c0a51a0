"""Plans of runs from a model's config alone, without weights, and what to change where a device is too small."""

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from moe_unlearn.config import Recipe
from moe_unlearn.model.batches import Batch
from moe_unlearn.model.loading import meta_model
from moe_unlearn.model.modes import training_mode
from moe_unlearn.plan import Mesh, Plan, knobs
from moe_unlearn.plan.repeat import depths
from moe_unlearn.step import UnlearnStep

SIZES = (80.0, 141.0)  # GiB of the devices that are asked about unless others are named


def plan_of_config(
    source: str | Path,
    recipe: Recipe,
    forget: Iterable[Batch] = (),
    retain: Iterable[Batch] = (),
    *,
    mesh: Mesh | str | None = None,
    fits: Sequence[float] = SIZES,
    dtype: str = "auto",
    advise: bool = True,
) -> Plan:
    """Plan a run of the model whose config `meta_model` finds, with what to change for devices that are too small.

    A model whose layers repeat is planned from two with few of its layers, to the byte, and no model is loaded. The
    mask of WAGLE is bounded: its groups are not rehearsed. Without `advise` nothing is said of what to change.
    """
    sides = list(forget), list(retain)

    def planned(overrides: list[str], mesh: Mesh | str | None) -> Plan:
        built = partial(meta_model, source, dtype=dtype)
        return _planned(built, knobs.changed(recipe, overrides), sides, mesh, fits)

    plan = planned([], mesh)
    for size in plan.fits if advise else ():
        if not plan.fits_on(size):
            plan.remedies[size] = knobs.remedies(planned, plan, recipe, size)
    return plan


def _planned(
    built: Callable[..., nn.Module],
    recipe: Recipe,
    sides: tuple[list[Batch], list[Batch]],
    mesh: Mesh | str | None,
    fits: Sequence[float],
) -> Plan:
    mesh = Mesh.parse(mesh) if isinstance(mesh, str) else mesh
    model = built()
    with ExitStack() as inside:

        def step_on(model: nn.Module) -> UnlearnStep:
            if recipe.checkpointing == "on":
                switched: Any = model
                switched.gradient_checkpointing_enable({"use_reentrant": False})
                inside.enter_context(training_mode(model))
            return UnlearnStep(model, recipe)

        step = step_on(model)
        shallow = [step_on(built(layers=layers)) for layers in depths(model, recipe, mesh) or ()]
        return step.plan(*sides, mesh=mesh, fits=fits, shallow=shallow)
