"""Verifier, which compares the first steps of a run with the plain path, in the model's dtype and in float64.

    step = UnlearnStep(model, recipe, verify=10)         # True verifies every step
    step(forget_batch, retain_batch)["verify_difference"]
    print(step.verifier.reports[-1])

From the same weights and optimizer state the plain path (`fused=False`) makes the step twice more: in the
model's dtype, the baseline, and in float64, the truth. Losses, gradients (where the fused step has them),
weights and optimizer state must meet the criterion of `testing`. Where a simple comparison would judge rounding
instead of the step, it is done as follows:

    routing     A token near a tie goes to other experts in another precision. The plain runs therefore take the
                fused step's experts, and the report counts how often they would have chosen others. A router that
                does not choose by topk cannot be made to; a step whose routes then differ is reported as not compared.
    losses      The error of one number may be small by luck, and so may that of a factor that all gradients share.
                The errors of float64 runs with each weight changed by a few last bits therefore count beside the
                baseline's; these runs are made only where the step would not pass without them.
    weights     Adam divides by |g|, so a gradient of rounding noise gives an update of either sign. Weights are
                compared with the formula at the step's own new moments (which are compared with the truth), those of
                SGD with the truth; all in terms of the change, no closer than the last bit of the weight.
    rounding    A weight narrower than its arithmetic must be what the same random bits make of a value
                within the error of that arithmetic.
    masks       Weights that the mask holds back must keep their bits.

Several ranks are compared with one process whose micro-batches are theirs, in the order of the ranks. The first rank
makes the replays: the batches, routes, weights, gradients and state of all are put together there (`gathering`), and
all ranks get its report. What several ranks hold must have the same bits on each of them after the step.

Memory while steps are verified (`Verifier.memory`): the trained weights and their optimizer state from before
the step, so that it can be undone; two copies of the model, one in float64, with dense gradients and optimizer state;
and gradients, weights and state of each run that is compared. With all weights trained by AdamW in float32 this
is about 400 bytes per weight, so verify on a small model or within a small scope. Of ranks, the first alone needs the
memory of the replays, of whole models; the others wait for it, no longer than the time-out of their group. On tiny
models a verified step takes five to eight times as long as another one; where runs on perturbed weights are needed,
each of the eight takes up to three and a half times as long in addition.

Deterministic. Source: our specification.
"""

import contextlib
import copy
import dataclasses
import math
from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from moe_unlearn.errors import NonFiniteError, VerificationError
from moe_unlearn.model.batches import Batch, Sizes
from moe_unlearn.model.unshared import unshared
from moe_unlearn.optim import MaskedAdamW, MaskedSGD, Slot
from moe_unlearn.ranks import Ranks
from moe_unlearn.testing import yardstick
from moe_unlearn.verify.forced_routing import Routes
from moe_unlearn.verify.gathering import check_precision, differing, of_all_ranks, whole_run
from moe_unlearn.verify.judge import Comparison, Report, Run
from moe_unlearn.view import StepView

PERTURBATIONS = 8  # float64 runs on weights perturbed by rounding; if there were two, both might be accurate by luck
# the perturbation in last bits: sums of float32 round at every addition, those of narrower numbers when they are stored
_ULPS_OF_FLOAT32, _ULPS_OF_NARROWER = 8, 1


class Record(Protocol):
    """Records what a step knows of its micro-batches."""

    def counted(self) -> Sizes:
        """Return the `sizes` of a step that has seen all its micro-batches."""

    def join(self, count: int) -> None:
        """Make one micro-batch of the last `count`, which are those of as many ranks."""


class Prepared(Protocol):
    """Holds what a step has prepared."""

    def state_dict(self) -> dict:
        """Return it whole; all ranks call this."""


class Step(Protocol):
    """A step that can be verified: it shows its view, and its twin makes the same step on the plain path."""

    @property
    def ranks(self) -> Ranks:
        """Return the ranks that make the step."""

    @property
    def tally(self) -> Record:
        """Return the record of the micro-batches of the step in progress."""

    @property
    def prepared(self) -> Prepared:
        """Return the preparation."""

    def view(self) -> StepView:
        """Return what the step shows of itself at this moment."""

    def twin(self, model: nn.Module, prepared: dict) -> "Step":
        """Return a plain step of one process over `model`, a copy of this step's model, with this preparation."""

    def rewind(self, steps: int, alpha: float, optimizer: dict | None) -> None:
        """Set the steps done, the multiplier of the retain loss and, but for None, the optimizer's state; no weight."""

    def accumulate(self, forget_batch: Batch, retain_batch: Batch, *, sizes: Sizes | None) -> dict[str, float]:
        """Compute losses and gradients of one micro-batch and add the gradients up."""

    def combine(self) -> dict[str, float]:
        """Turn the accumulated gradients into the step's."""

    def clip(self, limit: float | None) -> float:
        """Scale the combined gradient down to the norm `limit`."""


class MicroBatch(NamedTuple):
    """One micro-batch: the pairs of batches of the ranks in their order, of this rank until they are gathered."""

    pairs: list[tuple[Batch, Batch]]
    sizes: Sizes | None
    autocast: tuple[bool, torch.dtype]
    routes: Routes


class Seen(NamedTuple):
    """Holds what the replays start from and are compared with, of all ranks."""

    before: Run  # weights of all parameters and optimizer state before the step
    ours: Run
    micro_batches: list[MicroBatch]
    routes: Routes
    optimizer: dict  # the state of the optimizer before the step, as its twins load it


class Verifier:
    """Watches an `UnlearnStep` and verifies its first `steps` updates, or all of them for True."""

    def __init__(self, step: Step, steps: int | bool):
        if not isinstance(steps, int) or steps < 0:
            raise ValueError(f"verify must be a number of steps, or True for all of them; got {steps!r}")
        self.step = step
        self.remaining = math.inf if steps is True else int(steps)
        self.reports: list[Report] = []
        #: the limit that the gradient norm was clipped to
        self.clipped_to: float | None = None
        self._micro_batches: list[MicroBatch] = []
        self._twins: dict[torch.dtype | None, Step] = {}

    @contextlib.contextmanager
    def watch(self, forget: Batch, retain: Batch, sizes: Sizes | None) -> Iterator[None]:
        """Record the losses and gradients of one micro-batch inside; at a step's first one, keep the state before it.

        Raises ValueError on all ranks if the forward pass of one draws random numbers, because the two paths would draw
        different ones, where FSDP2 computes with fewer bits than the weights have, and for narrow optimizer state.
        """
        if not self.remaining:
            yield
            return
        view = self.step.view()
        if not view.losses:
            check_precision(view.model)
            _check_state(view.optimizer)
            self._micro_batches, self.clipped_to = [], None
            self._weights = {name: p.detach().clone() for name, p in view.trained}
            self._optimizer = copy.deepcopy(view.optimizer.state_dict())
        device = next(view.model.parameters()).device
        before, routes = _random_state(device), Routes(view.model)
        with routes.record(view.model):
            yield

        def check() -> tuple[None, bool]:
            if torch.equal(before, _random_state(device)):
                return None, True
            raise ValueError(
                "expected a forward pass without random numbers to verify; this one drew some (dropout, jitter): "
                "set them to 0 or verify=0"
            )

        try:
            self.step.ranks.together(check)
        except Exception:
            self._undo()
            raise
        autocast = torch.is_autocast_enabled(device.type), torch.get_autocast_dtype(device.type)
        self._micro_batches.append(MicroBatch([(forget, retain)], sizes, autocast, routes))

    def check(self) -> dict[str, float]:
        """Verify an update while its gradients still exist; return the metric `verify_difference`.

        Raises VerificationError on all ranks, with weights and the optimizer's state restored to those before the step.
        """
        if not self.remaining or not self._micro_batches:
            return {}
        self.remaining -= 1
        ranks, view = self.step.ranks, self.step.view()
        prepared = None if self.reports else self.step.prepared.state_dict()
        seen = self._seen(view)
        parted = differing(Run.of(view), view, ranks)

        def judged() -> list:
            if prepared is not None:
                self._twins = {dtype: self._twin(dtype, prepared) for dtype in (None, torch.float64)}
            try:
                report, stopped = self._report(view, seen), ""
            except NonFiniteError as error:
                report, stopped = Report(view.steps + 1, problems=["the plain path stops"]), str(error)
            report.problems += parted
            return [dataclasses.asdict(report), stopped]

        found, stopped = ranks.said_by_first(judged)
        report = Report(**found)
        self.reports.append(report)
        self._micro_batches = []
        if not self.remaining:
            self._twins.clear()
        if report.problems:
            self._undo()
            stopped = stopped or f"stopped; {view.steps} steps done, weights and optimizer as before this"
            raise VerificationError(report, stopped)
        return {"verify_difference": report.largest}

    def _seen(self, view: StepView) -> Seen:
        """Put together what all ranks have of the step."""
        ranks = self.step.ranks
        saved = _by_name(view, self._optimizer["state"])
        weights = {name: self._weights.get(name, p.detach()) for name, p in view.model.named_parameters()}
        before = whole_run(Run([], {}, set(), set(), weights, saved), view, ranks)
        ours = whole_run(Run.of(view), view, ranks)
        micro_batches, routes = [], Routes(view.model)
        for own in self._micro_batches:
            sides = [of_all_ranks(batch, ranks) for batch in own.pairs[0]]
            for of_rank in of_all_ranks(own.routes.joined(), ranks):
                routes.add(of_rank)
            sizes = own.sizes if ranks.count == 1 else self.step.tally.counted()
            micro_batches.append(own._replace(pairs=[*zip(*sides, strict=True)], sizes=sizes))
        return Seen(before, ours, micro_batches, routes, self._whole_optimizer(view, before))

    def _whole_optimizer(self, view: StepView, before: Run) -> dict:
        """Return the state before the step as an optimizer of whole parameters loads it."""
        if not self.step.ranks.sharded:
            return self._optimizer
        ids = {name: slot.parameter_id for name, slot in _slots(view).items()}
        # a twin has whole masks of its own
        groups = [{k: v for k, v in group.items() if k != "masks"} for group in self._optimizer["param_groups"]]
        return {"state": {ids[name]: s for name, s in before.state.items() if s}, "param_groups": groups}

    def _report(self, view: StepView, seen: Seen) -> Report:
        """Compare the step with its replays; return the report."""
        baseline, routes = self._replay(seen, None)
        gold, _ = self._replay(seen, torch.float64)
        # perturbed runs only ever allow more, so they are not needed where the step passes without them
        for seeds in (range(0), range(PERTURBATIONS)):
            others = [self._replay(seen, torch.float64, seed)[0] for seed in seeds]
            report = Report(view.steps + 1, routed=seen.routes.count, rerouted=routes.rerouted)
            report.compared = routes.equal(seen.routes)
            if report.compared:
                plain = self._twins[None].view()
                Comparison(plain, seen.before, report, seen.ours, baseline, gold, others).run()
            if not report.problems:
                break
        return report

    @property
    def plain(self) -> Step | None:
        """Return the plain step in its state after the last verified update; None before the first."""
        return self._twins.get(None)

    def memory(self) -> int:
        """Return the largest number of bytes that verifying a step adds; see the module docstring."""
        view = self.step.view()
        weights = list(view.model.parameters())
        state = sum(view.optimizer.state_size(p, view.masks.get(name)) for name, p in view.trained)
        moved = sum(p.numel() for _, p in view.trained)
        width = max(p.element_size() for p in weights)
        # bytes of what is kept from before the step, of one run's result, and of the model that the run was made on
        narrow = [width * moved + state, 2 * width * moved + state, width * sum(map(torch.numel, weights))]
        wide = [part * 8 // min(width, 4) for part in narrow]
        return narrow[0] + 3 * narrow[1] + narrow[2] + (2 + PERTURBATIONS) * wide[1] + wide[2]

    def summary(self) -> str:
        """Return the reports of all verified steps as text."""
        return "\n".join(map(str, self.reports))

    @torch.no_grad()
    def _undo(self) -> None:
        view = self.step.view()
        for name, p in view.model.named_parameters():
            if name in self._weights:
                p.copy_(self._weights[name])
        self.step.rewind(view.steps, view.alpha, self._optimizer)

    def _replay(self, seen: Seen, dtype: torch.dtype | None, perturb: int | None = None) -> tuple[Run, Routes]:
        """Make the plain step from the state before the step; return its `Run` and the routes it took."""
        twin = self._twins[dtype]
        generator = torch.Generator().manual_seed(perturb or 0)
        enabled, narrow = seen.micro_batches[0].autocast
        with torch.no_grad():
            for name, p in twin.view().model.named_parameters():
                source = seen.before.weights[name]
                p.copy_(source)
                if perturb is not None:
                    off = 2 * torch.rand(p.shape, generator=generator, dtype=p.dtype) - 1
                    rounded = narrow if enabled else source.dtype
                    ulps = _ULPS_OF_NARROWER if rounded.itemsize < 4 else _ULPS_OF_FLOAT32
                    p.mul_(1 + ulps * torch.finfo(rounded).eps * off.to(p.device))
        with yardstick.applied():
            return self._made(seen, twin, dtype)

    def _made(self, seen: Seen, twin: Step, dtype: torch.dtype | None) -> tuple[Run, Routes]:
        """Make the step on a twin whose weights are those before the step; return its `Run` and routes."""
        own = self.step.view()
        twin.rewind(own.steps, own.alpha, seen.optimizer)
        model, optimizer = twin.view().model, twin.view().optimizer
        routes = Routes(model)
        for pairs, sizes, (enabled, narrow), _ in seen.micro_batches:
            for forget, retain in pairs:
                device = forget["input_ids"].device.type
                with (
                    torch.autocast(device, narrow, enabled=enabled and dtype is None),
                    routes.record(model, seen.routes, wide=dtype is not None),
                ):
                    twin.accumulate(forget, retain, sizes=sizes)
            twin.tally.join(len(pairs))
        twin.combine()
        twin.clip(self.clipped_to)
        if dtype is not None:
            _take_masters(optimizer, seen.optimizer["state"])
        optimizer.step()
        return Run.of(twin.view()), routes

    def _twin(self, dtype: torch.dtype | None, prepared: dict) -> Step:
        """Return a plain step over a copy of the model."""
        source = self.step.view().model
        model = (unshared(source) if self.step.ranks.sharded else copy.deepcopy(source)).to(dtype)
        module: Any
        for module in model.modules():
            # checkpointing changes no result, and its recomputation would choose routes anew
            if getattr(module, "gradient_checkpointing", False):
                module.gradient_checkpointing = False
        return self.step.twin(model, prepared)


def _check_state(optimizer: MaskedSGD | MaskedAdamW) -> None:
    """Raise ValueError for rounded moments, which no longer say how far the weights should have moved."""
    kinds = {group["state"] for group in optimizer.param_groups} - {"float32"}
    if kinds:
        raise ValueError(f"expected optimizer.state float32 to verify; got {sorted(kinds)}: set it, or verify=0")


@torch.no_grad()
def _take_masters(optimizer: MaskedSGD | MaskedAdamW, saved: dict) -> None:
    """Set a float64 twin's weights to the saved master weights, since it keeps no masters of its own.

    Call this after the gradient has been computed from the rounded weights.
    """
    for slot in optimizer.slots():
        p, master = slot.parameter, saved.get(slot.parameter_id, {}).get("master")
        if master is not None:
            own = optimizer.state[p]
            p[own["slices"] if "slices" in own else slice(None)] = master.to(p.device, p.dtype)
            del own["master"]


def _slots(view: StepView) -> dict[str, Slot]:
    """Return the optimizer's slots by name of the parameter."""
    slots = {slot.parameter: slot for slot in view.optimizer.slots()}
    return {name: slots[p] for name, p in view.model.named_parameters() if p in slots}


def _by_name(view: StepView, saved: dict) -> dict[str, dict]:
    """Return the states of an optimizer's `state_dict` by name of the parameter."""
    return {name: saved[slot.parameter_id] for name, slot in _slots(view).items() if slot.parameter_id in saved}


def _random_state(device: torch.device) -> Tensor:
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()
