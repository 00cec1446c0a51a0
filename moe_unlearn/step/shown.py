"""What a step shows of itself to those who plan or verify it."""

from typing import TYPE_CHECKING

from moe_unlearn.view import StepView

if TYPE_CHECKING:
    from moe_unlearn.step.unlearn import UnlearnStep


def view_of(step: "UnlearnStep") -> StepView:
    """Return the view of a step at this moment."""
    return StepView(
        model=step.model,
        recipe=step.recipe,
        optimizer=step.optimizer,
        masks=step.masks,
        fused=step.fused,
        peers=step.ranks.peers,
        micro_batches=step.micro_batches,
        separate=step.objectives.separate,
        held_back=step.held_back,
        steps=step.steps,
        alpha=step.objectives.dual.value,
        losses=[part.losses for part in step.tally.parts],
        updated=step.updated,
        gradients=step.gradients,
        held=step.routers.held,
    )
