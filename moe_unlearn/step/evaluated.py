"""Evaluates the objectives of a step on a batch, without an update."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from moe_unlearn.model.batches import Batch, checked
from moe_unlearn.sharding import as_forward
from moe_unlearn.step.unlearn import UnlearnStep


def evaluated(step: UnlearnStep, batch: Mapping[str, Any]) -> dict[str, Tensor] | None:
    """Return the losses of {"forget": rows, "retain": rows} by name, as `Objectives.weighed` takes them.

    None for a batch without forget rows, which is no pair. Every rank calls this, and what one refuses, all refuse; so
    do they if only some have a pair. Raises as `UnlearnStep.accumulate` does for a bad batch.
    """
    objectives, is_pair = step.objectives, "forget" in batch

    def check() -> tuple[list[Batch], bool]:
        pair = [checked(batch[side], side) for side in ("forget", "retain")] if is_pair else []
        if pair and step.ranks.group is not None:
            objectives.check_cached(*pair)
        return pair, True

    pair, _ = step.ranks.together(check, lambda: {"whether a batch is a pair": is_pair})
    if not is_pair:
        return None
    forget, retain = pair

    def losses() -> dict[str, Tensor]:
        return {**objectives.forget(forget), **objectives.retain(retain)}

    found: dict[str, Tensor] = as_forward(step.model, losses)()
    return found
