"""The rehearsal of a step: two steps of its shadow, whole or on two shallow models whose layers are repeated."""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from moe_unlearn.model.batches import Batch, Sizes
from moe_unlearn.model.states import decoder_layers
from moe_unlearn.optim import MaskedAdamW, MaskedSGD
from moe_unlearn.optim_state import is_offloaded
from moe_unlearn.plan.assumed import CACHES, assumed
from moe_unlearn.plan.dry_run import Rehearsal
from moe_unlearn.plan.known import ROUTERS, WHOLE, rounded_sizes, router_bytes, whole_bytes
from moe_unlearn.plan.memory import HOST
from moe_unlearn.plan.mesh import Mesh
from moe_unlearn.plan.one_rank import OneRank
from moe_unlearn.plan.repeat import Counted, NotRepeated, Rehearsed, collected_later, extended
from moe_unlearn.plan.ways import form
from moe_unlearn.prepare.preparation import Preparation
from moe_unlearn.ranks import Ranks
from moe_unlearn.verify import Verifier
from moe_unlearn.view import StepView


class Step(Protocol):
    """A step as it is planned: it shows its view, and its shadow is rehearsed."""

    prepared: Preparation
    verifier: Verifier
    ranks: Ranks

    def view(self) -> StepView:
        """Return what the step shows of itself at this moment."""

    def shadow(self, copied: Callable[[Any, dict], Any], prepared: Preparation) -> "Step":
        """Return a copy of the step by `copied`, prepared as given, without accumulated gradients."""

    def apply_preparation(self) -> None:
        """Let exactly those weights train that the scope and what is prepared allow."""

    def sizes(self, pairs: Iterable[tuple[Batch, Batch]]) -> dict[str, int]:
        """Count the units of a step with these (forget, retain) pairs."""

    def accumulate(
        self, forget_batch: Batch, retain_batch: Batch, *, sizes: Sizes | None, last: bool
    ) -> dict[str, float]:
        """Compute losses and gradients of one micro-batch and add the gradients up."""

    def update(self) -> dict[str, float]:
        """Update the weights from the accumulated gradients."""


class Setting(NamedTuple):
    """Holds what a step is rehearsed with: the batches, and the bytes of caches on its device."""

    mesh: Mesh | None
    device: torch.device
    batches: dict[str, Batch]
    caches: int


def rehearsed(step: Step, shallow: Sequence[Step], setting: Setting) -> Rehearsed:
    """Rehearse the step, or two shallow ones in its place where its layers repeat theirs."""
    with collected_later():
        if shallow:
            # what cannot be repeated is rehearsed as a whole
            with suppress(NotRepeated):
                low, high = (_counted(each, setting) for each in shallow)
                return extended(low, high, periods_of(step, shallow))
        return _counted(step, setting).rehearsed()


def periods_of(step: Step, shallow: Sequence[Step]) -> int:
    """Return how many times as much deeper than the first shallow model that of `step` is as the second."""
    low, high, own = (len(list(decoder_layers(each.view().model))) for each in (*shallow, step))
    return (own - low) // (high - low)


def _counted(step: Step, setting: Setting) -> Counted:
    """Run two steps of a shadow of `step`, on one rank of a mesh if there is one, and return what they cost."""
    mesh, device, batches, caches = setting
    rehearsal = Rehearsal(device)
    view = step.view() if mesh is None else dataclasses.replace(step.view(), peers=mesh.peers)
    ledger, rank = rehearsal.ledger, None
    shadow = step.shadow(rehearsal.twin, assumed(view, step.prepared, rehearsal, batches))
    if mesh is not None:
        rehearsal.phase = "mask"
        with rehearsal:
            shadow.apply_preparation()
            rank = OneRank(shadow, mesh, rehearsal)
    copied = shadow.view()
    for weight, size in rounded_sizes(copied).items():
        ledger.leave_out(weight)
        ledger.hold(size, "weights")
    for tensor in (*copied.model.parameters(), *copied.model.buffers()):
        ledger.add(tensor, "weights")
    ledger.hold(whole_bytes(view), WHOLE)
    for tensors, component in _held(copied.optimizer):
        for tensor in tensors:
            ledger.add(tensor, component)
    ledger.hold(caches, CACHES)
    ledger.hold(router_bytes(view), ROUTERS)
    copied.optimizer.register_step_pre_hook(lambda *_: ledger.label(copied.gradients.held(), "gradients"))
    pair, factored = (batches["forget"], batches["retain"]), view.recipe.mollm is not None and form(view) != "compact"
    devices = [] if rehearsal.device.type == "cpu" else [rehearsal.device]
    with torch.random.fork_rng(devices), rehearsal:
        if rank is None:
            rehearsal.phase = "mask"
            shadow.apply_preparation()
        sizes = None if view.micro_batches == 1 else shadow.sizes([pair] * view.micro_batches)
        # the first step creates the optimizer's state, the second one has it from its start
        for _ in range(2):
            # two micro-batches are enough: the second finds gradients, and later ones hold no more; but factors add up
            for _ in range(view.micro_batches if factored else min(view.micro_batches, 2)):
                rehearsal.reset_costs()
                if rank is not None:
                    rank.traffic.clear()
                rehearsal.phase = "activations"
                shadow.accumulate(*pair, sizes=sizes, last=view.micro_batches == 1)
                ledger.label(copied.gradients.held(), "gradients")
            rehearsal.phase = "workspace"
            shadow.update()
            for tensors, component in _held(copied.optimizer):
                ledger.label(tensors, component)
    traffic = {} if rank is None else rank.traffic
    products = rehearsal.products / max(rehearsal.losses, 1)
    return Counted(ledger, rehearsal.flops, rehearsal.moved, traffic, products)


def _held(optimizer: MaskedSGD | MaskedAdamW) -> Iterator[tuple[list[Tensor], str]]:
    """Yield the tensors of an optimizer's state with their component, and the buffers of what lies on the host."""
    for slot in optimizer.slots():
        component = HOST if is_offloaded(slot.parameter, slot.group) else "optimizer state"
        yield _tensors(optimizer.state.get(slot.parameter, {})), component
    yield _tensors(optimizer.stages), "optimizer state"


def _tensors(value: object) -> list[Tensor]:
    """Return the tensors in nested dicts, lists, tuples and plain objects of this package."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = value.values()
    elif type(value).__module__.startswith("moe_unlearn.") and hasattr(value, "__dict__"):
        value = vars(value).values()
    elif not isinstance(value, list | tuple):
        return []
    return [tensor for item in value for tensor in _tensors(item)]
