"""Advice: what to change where a run does not fit a device, found by plans from its model's config alone."""

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

from torch import nn

from moe_unlearn.config import Recipe
from moe_unlearn.model.batch_sets import all_checked
from moe_unlearn.model.batches import Batch
from moe_unlearn.model.loading import unloaded
from moe_unlearn.model.modes import checkpoint_activations, training_mode
from moe_unlearn.plan.knobs import Search, changed
from moe_unlearn.plan.known import at_least
from moe_unlearn.plan.mesh import Mesh
from moe_unlearn.plan.plan import Plan, make_plan
from moe_unlearn.plan.rehearse import Step
from moe_unlearn.plan.repeat import depths


@dataclass(frozen=True)
class Unloaded:
    """Plans a run without its weights.

    build: makes the model without storage, with `layers=n` its first n layers alone. step_of: makes the step of such a
    model and a recipe. sides: the forget and the retain batches. mesh, fits, stored: as in `make_plan`.

    A model whose layers repeat is planned from two with few of its layers, to the byte. The mask of WAGLE is bounded
    then: its groups are not rehearsed.
    """

    build: Callable[..., nn.Module]
    step_of: Callable[[nn.Module, Recipe], Step]
    sides: tuple[Sequence[Batch], Sequence[Batch]] = ((), ())
    mesh: Mesh | None = None
    fits: Sequence[float] = ()
    stored: bool = True

    def plan(self, recipe: Recipe, mesh: str | None = None) -> Plan:
        """Plan a step of `recipe`, with checkpointing if it `recomputes`; on another mesh if one is named."""
        model, on = self.build(), self._on(mesh)
        with ExitStack() as inside:

            def step_on(model: nn.Module) -> Step:
                if recipe.recomputes:
                    checkpoint_activations(model)
                    inside.enter_context(training_mode(model))
                return self.step_of(model, recipe)

            step = step_on(model)
            shallow = [step_on(self.build(layers=layers)) for layers in depths(model, recipe, on) or ()]
            return make_plan(step, *self.sides, mesh=on, fits=self.fits, shallow=shallow, stored=self.stored)

    def at_least(self, recipe: Recipe, mesh: str | None = None) -> int:
        """Return bytes that each rank has at least at the end of a step; see `known.at_least`."""
        step = self.step_of(self.build(), recipe)
        return at_least(step.view(), step.prepared, self._on(mesh))

    def search(self, recipe: Recipe) -> Search:
        """Return the search for what makes a run of `recipe` fit."""
        return Search(
            lambda overrides, mesh: self.plan(changed(recipe, overrides), mesh),
            lambda overrides, mesh: self.at_least(changed(recipe, overrides), mesh),
            recipe,
        )

    def _on(self, mesh: str | None) -> Mesh | None:
        return self.mesh if mesh is None else Mesh.parse(mesh)


def add_remedies(plan: Plan, search: Search) -> None:
    """Add to a plan what makes the run fit those of its devices on which it does not."""
    plan.remedies |= {size: search.remedies(plan, size) for size in plan.fits if not plan.fits_on(size)}


def plan_with_advice(
    step: Step,
    step_of: Callable[[nn.Module, Recipe], Step],
    forget_batches: Iterable[Batch],
    retain_batches: Iterable[Batch],
    *,
    mesh: Mesh | str | None = None,
    fits: float | Sequence[float] | None = None,
    shallow: Sequence[Step] = (),
    stored: bool = False,
    advise: bool = True,
) -> Plan:
    """Make the plan of an `UnlearnStep`, with what makes it fit those devices of `fits` on which it does not.

    That is searched among plans from the config of the step's model, before prepare(); `step_of` makes their steps, of
    a model and a recipe. It says nothing of an optimizer other than the recipe's. A note says why where there are no
    such plans: the weights are not those of the config, as with adapters, or its class is unknown to transformers.
    Without `advise` nothing is searched. All else, errors included, is `make_plan`'s.
    """
    sides = all_checked(forget_batches, "forget"), all_checked(retain_batches, "retain")
    made = make_plan(step, *sides, mesh=mesh, fits=fits, shallow=shallow, stored=stored)
    if not advise or all(map(made.fits_on, made.fits)):
        return made
    view = step.view()
    # a recipe asks for checkpointing; what counts is whether the model does it
    on = any(m.training and getattr(m, "gradient_checkpointing", False) for m in view.model.modules())
    recipe = changed(view.recipe, [f"checkpointing={'on' if on else 'off'}"])
    given = [*sides[0]], [*sides[1]]  # which many plans read
    try:
        add_remedies(made, Unloaded(unloaded(view.model), step_of, given, made.mesh, made.fits, stored).search(recipe))
    except ValueError as error:
        made.notes.append(f"what would make it fit is not known: {next(iter(str(error).splitlines()), '')}")
    return made
