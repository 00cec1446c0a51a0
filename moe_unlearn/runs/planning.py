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
from moe_unlearn.plan.known import at_least
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
    mesh = Mesh.parse(mesh) if isinstance(mesh, str) else mesh
    search = search_of(source, recipe, forget, retain, mesh=mesh, fits=fits, dtype=dtype)
    plan = search.plan()
    if advise:
        add_remedies(plan, search)
    return plan


def add_remedies(plan: Plan, search: knobs.Search) -> None:
    """Add to a plan what makes the run fit those of its devices on which it does not."""
    plan.remedies |= {size: search.remedies(plan, size) for size in plan.fits if not plan.fits_on(size)}


def search_of(
    source: str | Path,
    recipe: Recipe,
    forget: Iterable[Batch] = (),
    retain: Iterable[Batch] = (),
    *,
    mesh: Mesh | None = None,
    fits: Sequence[float] = SIZES,
    dtype: str = "auto",
) -> knobs.Search:
    """Return the search for what makes a run fit, by plans from a config alone; all is as in `plan_of_config`."""
    sides = list(forget), list(retain)
    built = partial(meta_model, source, dtype=dtype)

    def planned(overrides: Sequence[str], named: str | None) -> Plan:
        on = mesh if named is None else Mesh.parse(named)
        return _planned(built, knobs.changed(recipe, overrides), sides, on, fits)

    def bounded(overrides: Sequence[str], named: str | None) -> int:
        on = mesh if named is None else Mesh.parse(named)
        step = UnlearnStep(built(), knobs.changed(recipe, overrides))
        return at_least(step.view(), step.prepared, on)

    return knobs.Search(planned, bounded, recipe)


def _planned(
    built: Callable[..., nn.Module],
    recipe: Recipe,
    sides: tuple[list[Batch], list[Batch]],
    mesh: Mesh | None,
    fits: Sequence[float],
) -> Plan:
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
        return step.plan(*sides, mesh=mesh, fits=fits, shallow=shallow, stored=True)
