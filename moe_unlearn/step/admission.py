"""Admits a micro-batch to a step: whatever a step refuses in its arguments is refused here, on all ranks together.

A rank that raised alone would leave the others to wait for it in a collective. Therefore all ranks say once whether
they can go on, before the first of them waits for another inside the step.

Deterministic. Source: our specification.
"""

from typing import TYPE_CHECKING

from moe_unlearn.model.admissible import check_values
from moe_unlearn.model.batches import Batch, Sizes, checked
from moe_unlearn.step.checks import check_finished, check_prepared

if TYPE_CHECKING:
    from moe_unlearn.step.unlearn import UnlearnStep


def admit(
    step: "UnlearnStep", forget: Batch, retain: Batch, sizes: Sizes | None, last: bool
) -> tuple[Batch, Batch, bool]:
    """Return the checked batches of a micro-batch, and whether its sides may share a forward pass.

    Where weights are sharded they may if they can on every rank, since each forward pass needs all ranks. Raises
    NotPreparedError, ValueError for a bad batch, for wrong `sizes`, for ones that differ from rank to rank and for
    ranks of which an error left some a step behind, and RuntimeError after the last micro-batch of a step, amid another
    thread's and after an error that left an update half-way; of what one rank alone met, the others raise a RankError.
    """
    ranks, objectives = step.ranks, step.objectives

    def check() -> tuple[Batch, Batch]:
        check_prepared(step.recipe, step.prepared)
        check_finished(step.gradients.under_way)
        pair = checked(forget, "forget"), checked(retain, "retain")
        for batch, side in zip(pair, ("forget", "retain"), strict=True):
            check_values(batch, side, objectives.model)
        step.tally.own()
        step.tally.expect(sizes)
        return pair

    if ranks.group is None:
        return *check(), True

    def check_rank() -> tuple[tuple[Batch, Batch], bool]:
        pair = check()
        objectives.check_cached(*pair)
        return pair, objectives.joint(*pair)

    def same() -> dict[str, object]:
        return {"`sizes`": sizes, "`last`": last, "the number of steps done": step.steps}

    pair, joint = ranks.together(check_rank, same)
    return *pair, joint or not ranks.sharded
