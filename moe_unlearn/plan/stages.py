"""Plans of what is done beside a run, each without the model's weights: counting where tokens go, masks, measuring."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from moe_unlearn.experts import enable
from moe_unlearn.model.batches import Batch
from moe_unlearn.plan.amounts import scale
from moe_unlearn.plan.dry_run import Rehearsal, listed
from moe_unlearn.plan.known import largest
from moe_unlearn.plan.mask import mask_plan
from moe_unlearn.plan.repeat import collected_later
from moe_unlearn.trace import routing_frequencies
from moe_unlearn.view import StepView
from moe_unlearn.wagle.budget import SHARE, free_memory


@dataclass(frozen=True)
class StagePlan:
    """Says what a stage holds at the peak of its memory, in bytes by component; `str(plan)` is what a verb prints."""

    stage: str
    device: str
    memory: Mapping[str, int]
    note: str = ""

    @property
    def peak(self) -> int:
        """Return the predicted bytes at the peak, the sum over all components."""
        return sum(self.memory.values())

    def __str__(self) -> str:
        unit, one = scale(self.peak)
        lines = [
            f"{self.stage} on {self.device}",
            f"{f'memory ({unit})':<26} {'at the peak':>12}",
            *(f"  {name:<24} {size / one:12.2f}" for name, size in self.memory.items() if size),
            f"  {'peak':<24} {self.peak / one:12.2f}",
            *([f"note: {self.note}"] if self.note else []),
        ]
        return "\n".join(lines)


def stats_plan(model: nn.Module, batches: Sequence[Batch], device: torch.device) -> StagePlan:
    """Plan `trace.routing_frequencies` of a model, which may be on the meta device, for the largest of some batches.

    Beside the weights it has the activations of a forward pass; what it counts stays, a number for each expert.
    """
    rehearsal, twin = _twin(model, device)
    with collected_later(), enable(twin), rehearsal:
        routing_frequencies(twin, [largest(batches, device)])
    return StagePlan("stats", str(device), rehearsal.ledger.peak())


def work_plan(
    stage: str, model: nn.Module, device: torch.device, work: Callable[[Any], object], *, token: int = 1
) -> StagePlan:
    """Plan what `work` does with a model, which may be on the meta device; it gets a twin of fakes (`dry_run`).

    `token` is what the model is taken to choose, where its choices are read.
    Raises RuntimeError or TypeError for what torch's fakes cannot run.
    """
    rehearsal, twin = _twin(model, device)
    with collected_later(), listed(token), rehearsal:
        work(twin)
    return StagePlan(stage, str(device), rehearsal.ledger.peak())


def _twin(model: nn.Module, device: torch.device) -> tuple[Rehearsal, Any]:
    """Return a rehearsal whose ledger holds the weights of a model's twin, and the twin."""
    rehearsal = Rehearsal(device)
    twin = rehearsal.twin(model, {})
    for tensor in (*twin.parameters(), *twin.buffers()):
        rehearsal.ledger.add(tensor, "weights")
    return rehearsal, twin


def mask_stage(view: StepView, batches: Mapping[str, Sequence[Batch]], device: torch.device) -> StagePlan:
    """Plan making the mask of a step with WAGLE; `mask_plan` has the details and the errors."""
    # from its second batch on a side has the sums of all gradients beside the activations
    sides = {side: [largest(given, device)] * min(len(given), 2) for side, given in batches.items()}
    made = mask_plan(view, Rehearsal(device), sides)
    return StagePlan("mask", str(device), made.memory, str(made).replace("prepare()", "it", 1))


def default_memory(model: nn.Module, device: torch.device) -> str:
    """Return the budget of a mask that names none, once the model will be on its device: most of what is free then."""
    weights = sum(p.nbytes for p in model.parameters())
    return f"{max(int(SHARE * (free_memory(device) - weights)), 1)}"
