"""Prediction of the memory that making WAGLE's mask takes: a rehearsal of the gradients of its groups.

Scores decide how many of them are remembered; what is assumed is what a good guess of the threshold leaves open.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from moe_unlearn.model.batches import Batch, forgotten
from moe_unlearn.model.head import token_losses
from moe_unlearn.model.modes import evaluation_mode
from moe_unlearn.ops.weight_score import BINS, SMALL_BLOCK
from moe_unlearn.plan.amounts import amount
from moe_unlearn.plan.dry_run import Rehearsal
from moe_unlearn.plan.memory import Ledger
from moe_unlearn.plan.repeat import collected_later, peaks
from moe_unlearn.view import StepView
from moe_unlearn.wagle.budget import Budget, budget_of
from moe_unlearn.wagle.gradients import Side, gradients
from moe_unlearn.wagle.pieces import Piece, all_pieces, grouped, sample_of, stride_of
from moe_unlearn.wagle.threshold import open_share

_HISTOGRAM = 8 * BINS  # bytes; one is held from group to group
_HISTOGRAMS = 3  # at a time beside that one
_BYTES_OF_SCORING = 40  # for each element of a block


@dataclass(frozen=True)
class MaskPlan:
    """How a mask will be made: in how many groups, within how many bytes, and the memory by component at the peak."""

    groups: int
    budget: int
    memory: dict[str, int]

    def __str__(self) -> str:
        peak = f"{amount(sum(self.memory.values()))} at the peak, weights and activations included"
        if self.groups == 1:
            return f"prepare() makes WAGLE's mask from two float32 gradients of all weights at once: {peak}"
        within = f"of {self.groups} groups of weights one after the other within {amount(self.budget)}"
        return f"prepare() makes WAGLE's mask from two float32 gradients, {within}: {peak}"


def mask_at_most(
    view: StepView, shallow: Sequence[StepView], periods: int, device: torch.device, batches: Mapping[str, Batch]
) -> MaskPlan:
    """Bound the memory of the mask of a deep model by rehearsals of two shallow ones, without its groups.

    The gradients take the budget, or those of all weights if it has room for them, and beside them there are all that
    a forward and a backward pass take at their peak and the mask of all weights.
    """
    settings = view.recipe.wagle
    assert settings is not None
    pieces = all_pieces(view.model, None)
    budget = budget_of(pieces, settings.memory)
    timelines = []
    for each in shallow:
        rehearsal = Rehearsal(device)
        trained = [piece for piece in all_pieces(each.model, None) if piece.parameter.requires_grad]
        model, sides = _twin(each, rehearsal, {side: [batch] for side, batch in batches.items()})
        named = dict(model.named_parameters())
        # a row of the lowest weight and one of the highest: the backward pass goes through all, and nothing is held
        ends = [
            replace(piece, parameter=named[piece.name], elements=piece.elements[: piece.width])
            for piece in {piece.name: piece for piece in (trained[0], trained[-1])}.values()
        ]
        with collected_later():
            _rehearsed(model, rehearsal, sides, ends, Budget(budget.size), 1.0)
        timelines.append(rehearsal.ledger.timeline())
    low, high = timelines
    memory, _ = peaks(low, high, periods)
    memory["gradients"] = min(budget.size, sum(piece.nbytes for piece in pieces))
    return MaskPlan(len(grouped(pieces, budget.gradients)), budget.size, memory)


def mask_plan(view: StepView, rehearsal: Rehearsal, batches: Mapping[str, Sequence[Batch]]) -> MaskPlan:
    """Rehearse the sample and some groups of the mask of a step with WAGLE, from up to two batches of each side.

    A model on the meta device is planned for a device where all gradients fit, unless the recipe has a budget. Raises
    ValueError for a budget below the smallest group, and RuntimeError or TypeError for a model that torch's fakes
    cannot run.
    """
    settings = view.recipe.wagle
    assert settings is not None
    pieces, total = all_pieces(view.model, None), sum(p.numel() for p in view.model.parameters())
    budget = budget_of(pieces, settings.memory)
    passes: list[tuple[float, list[Piece]]] = []  # the share of the groups that is done, and the pieces of a pass
    if budget.sample:
        passes.append((0.0, sample_of(pieces, stride_of(pieces, budget.sample))))
        budget = budget.with_room(total * open_share(budget.sample, settings.keep)) or budget
    groups = grouped(pieces, budget.gradients)
    # activations are most in the first group, and what is done in the last
    passes += [((i + 1) / len(groups), groups[i]) for i in sorted({0, len(groups) // 2, len(groups) - 1})]
    model, sides = _twin(view, rehearsal, batches)
    named = dict(model.named_parameters())
    found = [
        _rehearsed(model, rehearsal, sides, [replace(p, parameter=named[p.name]) for p in part], budget, done)
        for done, part in passes
    ]
    return MaskPlan(len(groups), budget.size, max(found, key=lambda memory: sum(memory.values())))


def _twin(view: StepView, rehearsal: Rehearsal, batches: Mapping[str, Sequence[Batch]]) -> tuple[Any, list[Side]]:
    """Return the model for a rehearsal, and both sides of its gradients."""
    settings = view.recipe.wagle
    assert settings is not None
    divided = settings.accumulation if settings.official else None
    forget = [forgotten(view.recipe, batch) for batch in batches["forget"]]
    sides = [
        Side.of("forget", forget, token_losses, divided),
        Side.of("retain", batches["retain"], token_losses, divided),
    ]
    return rehearsal.twin(view.model, {}), sides


def _rehearsed(
    model: Any, rehearsal: Rehearsal, sides: Sequence[Side], pieces: Sequence[Piece], budget: Budget, done: float
) -> dict[str, int]:
    """Return the memory by component at the peak of the pass that makes the gradients of some pieces."""
    rehearsal.ledger = ledger = Ledger(rehearsal.device)
    for tensor in (*model.parameters(), *model.buffers()):
        ledger.add(tensor, "weights")
    for p in model.parameters():  # one by one, so that those of a layer are repeated with it
        ledger.hold(round(done * p.numel() / 8), "mask")
    # all gradients of a single group are there before scores are counted
    counts = _HISTOGRAM if done and budget.gradients is not None else 0
    ledger.hold(round(done * budget.room) + counts, "scores")
    devices = [] if rehearsal.device.type == "cpu" else [rehearsal.device]
    held = []
    with torch.random.fork_rng(devices), rehearsal, evaluation_mode(model):
        rehearsal.phase = "activations"
        for side in sides:
            held.append(gradients(model, side, pieces, None))
            ledger.label(held[-1].values(), "gradients")
    most = max(len(piece.elements) for piece in pieces)
    blocks = _BYTES_OF_SCORING * min(SMALL_BLOCK, most)
    ledger.pulse(max(blocks, _HISTOGRAMS * _HISTOGRAM) + _HISTOGRAM - counts, "workspace")
    return ledger.peak()
