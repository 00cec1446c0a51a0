"""UnlearnStep, which takes batches, updates the weights and returns metrics.

    step = UnlearnStep(model, recipe)
    step.prepare(forget_batches, retain_batches)         # on the unchanged model
    metrics = step(forget_batch, retain_batch)           # one update; update=False accumulates

`model.batches` describes what a batch may hold, such as packed rows. One step computes the recipe's losses, turns them
into one gradient and updates the weights that the scope and the mask allow:

    g = grad( gamma L_forget + alpha (L_retain + router_aux L_router_aux) + anchor L_anchor )  without MOLLM; see `dual`
    g = sum_i c_i grad L_i,  c from the Gram matrix of the masked gradients  with MOLLM

Each of several micro-batches is weighed by its number of units, so that the step equals that of all rows in one batch
(`tally`; but for a load-balancing loss, which depends on how they are cut, see `router_aux`):

    sizes = step.sizes(pairs)                            # the units of all of them together
    metrics = [step(*pair, update=pair is pairs[-1], sizes=sizes) for pair in pairs][-1]

The fused step (the default) sends forget and retain rows through one forward pass where they can share it, and takes
the gradients of the expert weights where they are made (`sinks`), in one of three forms: compact, of the trained
experts only and with the mask applied; as factors, where these are smaller, so that dW exists only inside the kernel
that updates the weight; or, under `guard: loss`, as the update itself during the backward pass. `obstacle` gives the
reason where this last form is not possible. `fused=False` takes the plain path, of autograd, to the same result.

Under `guard: strict` every gradient, or its factors, is known before the first weight changes: a value that is not
finite leaves the weights bitwise as they were. `guard: loss` checks losses likewise, but gradients of experts layer by
layer during the backward pass: a bad one stops the step when layers above it are updated already, and `restore()`, if
set, should bring back the last checkpoint. On a GPU the device does these checks: from the bad layer on nothing is
written, and the step raises its error after the backward pass.

With a `process_group` each process is one of several ranks (`ranks`). Every rank calls the step with its own rows and
`prepare` with all rows; losses, and so the checks that stop a step, are means over the rows of all ranks. A model that
FSDP2 shards (`fully_shard`) is trained by all ranks too, each with its part of the weights (`sharded`).
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moe_unlearn import mollm
from moe_unlearn.config import Mollm, Recipe
from moe_unlearn.errors import NonFiniteError
from moe_unlearn.experts import check_model, enable, step_inputs
from moe_unlearn.model.batch_sets import check_batches, counted_row
from moe_unlearn.model.batches import Batch, Sizes, checked
from moe_unlearn.model.head import verify_head
from moe_unlearn.optim import MaskedAdamW, MaskedSGD
from moe_unlearn.plan import Plan, plan_with_advice, ways
from moe_unlearn.prepare.preparation import Preparation
from moe_unlearn.prepare.stages import STAGES, prepare
from moe_unlearn.ranks import Ranks, local
from moe_unlearn.sharding import as_forward, reshard
from moe_unlearn.step import copies, saved
from moe_unlearn.step.admission import admit
from moe_unlearn.step.checks import check_budget, check_finite, check_open, left_clean
from moe_unlearn.step.objectives import Objectives
from moe_unlearn.step.routers import RouterGuard
from moe_unlearn.step.sharded import Shards, store_of
from moe_unlearn.step.shown import view_of
from moe_unlearn.step.sinks import sink_of
from moe_unlearn.step.tally import Tally
from moe_unlearn.step.weights import TrainedWeights, build_optimizer
from moe_unlearn.verify import Verifier
from moe_unlearn.view import StepView


class UnlearnStep:
    """One unlearning step over a model with Mixture-of-Experts layers.

    Args:
        model: a transformers causal LM (PEFT-wrapped or not); its experts are switched to the
            "moe_unlearn" implementation and parameters outside the scope are frozen until `close()`.
        recipe: a `Recipe`, a mapping of its keys, the path of a YAML file or the name of a shipped recipe.
        optimizer: a `MaskedSGD` or `MaskedAdamW` over the model's parameters; None builds the recipe's.
        fused: False takes the plain path, for comparison.
        verify: the number of steps, True for all, that are replayed on the plain path and compared; see `verify`. Of
            several ranks, the first makes the replays, of whole models.
        process_group: the ranks that train this model; all take the first rank's weights. See `ranks`.

    Raises TypeError for a model, recipe or optimizer of another kind. Raises ValueError for a model without MoE layers,
    with nothing to train in the scope or float16 there, with weights cut along another dimension than 0, with adapters
    on experts that are shared out, and for `retain.router_aux` without a load-balancing loss.
    """

    def __init__(
        self,
        model: nn.Module,
        recipe: Recipe | Mapping | str | Path,
        optimizer: MaskedSGD | MaskedAdamW | None = None,
        *,
        fused: bool = True,
        verify: int | bool = 0,
        process_group: "torch.distributed.ProcessGroup | None" = None,
    ):
        check_model(model)
        self.recipe = Recipe.of(recipe)
        self.ranks = Ranks(model, process_group)
        self.model, self.fused = local(model), fused
        self.shards = Shards(self.model, self.ranks) if self.ranks.sharded else None
        #: called when a step stopped with some weights updated already; the error's message ends with the returned text
        self.restore: Callable[[], str] | None = None
        #: why the caller needs whole gradients before the update; empty if it does not
        self.held_back = ""
        #: the number of micro-batches in a step that the plan assumes
        self.micro_batches = self.recipe.accumulate
        self.prepared = Preparation()
        self.objectives = Objectives(self.model, self.recipe, self.prepared)
        self._implementation = enable(self.model)
        self.weights = TrainedWeights(self.model, self.recipe, self.shards)
        self.steps = 0
        #: whether the last step saw a forget loss at or below `recipe.stop_forget_loss`
        self.done = False
        self.weights.restrict(self.prepared)
        if optimizer is None:
            optimizer = build_optimizer(self.model, self.recipe)
        elif not isinstance(optimizer, MaskedSGD | MaskedAdamW):
            raise TypeError(f"optimizer must be a MaskedSGD or MaskedAdamW; got {type(optimizer).__name__}")
        self.optimizer = optimizer
        self.weights.know(optimizer)
        self.routers = RouterGuard(self.model, self.recipe, self.optimizer, shared=self.shards is not None)
        self.tally = Tally(self.ranks)  #: record of the micro-batches of this step
        self.gradients = store_of(self.optimizer, self.shards)
        self.updated: list[str] = []
        self._norm: float | None = None
        self.verifier = Verifier(self, verify)

    def prepare(
        self,
        forget_batches: Iterable[Batch],
        retain_batches: Iterable[Batch],
        *,
        on_stage: Callable[[str], None] | None = None,
        cache_dir: str | Path | None = None,
        stages: Sequence[str] = STAGES,
    ) -> Preparation:
        """Run those of `stages` that the recipe needs and that have not run, the same on all ranks; see `prepare`.

        Both sets must hold every row that the step will meet. `on_stage(name)` is called after each stage, when
        `state_dict()` holds its result. The folder `cache_dir` keeps references from run to run, by the content of
        model and rows; OSError if it cannot be written to. References are of the model as it is, with its adapters.
        """
        check_open(self._implementation.enabled)
        reshard(self.model)

        def check() -> tuple[tuple[Sequence[Batch], Sequence[Batch]], bool]:
            sides = check_batches(forget_batches, "forget"), check_batches(retain_batches, "retain")
            self.objectives.check(*sides)
            return sides, True

        (forget, retain), _ = self.ranks.together(check, lambda: {"`stages`": list(stages)})
        self.ranks.together(lambda: (verify_head(self.model, counted_row(retain)), True))

        def after(stage: str) -> None:
            self.weights.restrict(self.prepared)
            if on_stage is not None:
                on_stage(stage)

        self.routers.rows = retain
        prepare(self.model, self.recipe, self.prepared, forget, retain, after, cache_dir, self.ranks, stages)
        self.apply_masks()
        return self.prepared

    def __call__(
        self, forget_batch: Batch, retain_batch: Batch, *, update: bool = True, sizes: Sizes | None = None
    ) -> dict[str, float]:
        """Make one step, or with `update=False` accumulate one micro-batch of it; return the metrics as floats.

        Micro-batches that differ in tokens or sequences need `sizes`, the same for all of a step: `step.sizes(pairs)`.
        The losses of a step are means over all of them. Raises NotPreparedError, ValueError for a bad batch or wrong
        `sizes`, and before any weight changes NonFiniteError and RetainBudgetError; under `guard: loss` NonFiniteError
        may come later, see the module docstring.
        """
        metrics = self.accumulate(forget_batch, retain_batch, sizes=sizes, last=update)
        return metrics | self.update() if update else metrics

    def sizes(self, pairs: Iterable[tuple[Batch, Batch]]) -> dict[str, int]:
        """Count the units (`Objectives.units`) of a step with these (forget, retain) pairs, on all ranks."""
        sides = ((checked(forget, "forget"), checked(retain, "retain")) for forget, retain in pairs)
        return self.tally.count(self.objectives.units(*pair) for pair in sides)

    def accumulate(
        self, forget_batch: Batch, retain_batch: Batch, *, sizes: Sizes | None = None, last: bool = False
    ) -> dict[str, float]:
        """Compute losses and gradients of one micro-batch and add the gradients up; no weight changes.

        `last` says that no micro-batch follows before the update: if it is also the first, and there is no
        `obstacle`, expert weights are nevertheless updated in the backward pass.
        """
        if self.shards is not None:
            reshard(self.model)  # an evaluation may have left weights whole
        forget_batch, retain_batch, joint = admit(self, forget_batch, retain_batch, sizes, last)
        losses = partial(as_forward(self.model, self.objectives), joint=joint and self.fused)
        whole = last and not self.tally.parts
        view, sink = self.view(), None
        self.gradients.touched = self.shards is not None  # FSDP2 has to forget even a forward pass that stopped
        if not self.tally.parts:
            self.gradients.begin(view.trained, view.masks)
        if self.fused:
            late = ways.form(view) if whole or self.recipe.mollm is not None else "compact"
            form = "update" if whole and not ways.obstacle(view) else late
            sink = sink_of(self.gradients, form) if self.shards is None else self.shards.sink(self.gradients, form)
        # the backward pass belongs inside: with gradient checkpointing the recomputation needs the sink again
        with (
            left_clean(self),
            step_inputs(self.model, weight_gradients=sink),
            self.verifier.watch(forget_batch, retain_batch, sizes),
        ):
            values = losses(forget_batch, retain_batch)
            # a step of one micro-batch on one rank has nothing to weigh
            alone = whole and sizes is None and self.ranks.count == 1
            units = None if alone else self.objectives.units(forget_batch, retain_batch)
            part = self.tally.measure(values, units)
            check_finite(part.losses, self.steps)
            if whole:
                check_budget(self.recipe, part.losses, self.steps)
            shares = self.tally.shares(part, sizes, last)
            if sink is not None:
                sink.micro_batches = 1 / max(min(shares.values()), 1e-9)
            self.gradients.touched = True
            self._backward({name: (shares[f"{name}_loss"], value) for name, value in values.items()})
            if sink is not None:
                sink.settle()
            self.updated = [] if sink is None else sink.updated
            self.tally.add(part, sizes, last)
        return dict(part.losses)

    def combine(self) -> dict[str, float]:
        """Turn the accumulated gradients into the step's, which the optimizer takes; no weight changes.

        This is for callers that step the optimizer themselves: combine, clip, `optimizer.step()`, `finish()`. Returns
        metrics, the step's losses among them. Raises NonFiniteError or RetainBudgetError after dropping the gradients.
        """
        if not self.tally.parts:
            raise RuntimeError("nothing accumulated: call accumulate(), or the step itself, first")
        metrics = self.tally.losses() | self.objectives.dual.metrics()
        with left_clean(self):
            check_budget(self.recipe, metrics, self.steps)
            self.gradients.add_up(self.ranks)
            self.gradients.divide(self.tally.divisor)
            self.gradients.change(self.routers.changes)
            if self.recipe.mollm is not None:
                metrics |= self._descend(self.recipe.mollm)
            factored = self.recipe.mollm is None and self.gradients.settle()
            norm = self.gradients.norm()
            if not math.isfinite(norm):
                raise NonFiniteError(f"the gradient norm is {norm}: stopped before the update", (*self.updated,))
        # with updates in the backward pass or from factors the whole gradient never exists
        self._norm = None if self.updated or factored else norm
        if self._norm is not None:
            metrics["grad_norm"] = norm
        if self.recipe.stop_forget_loss is not None:
            self.done = metrics["forget_loss"] <= self.recipe.stop_forget_loss
        return metrics

    def update(self) -> dict[str, float]:
        """Combine and clip the gradients, step the optimizer and finish the step; return its metrics."""
        metrics = self.combine()
        with left_clean(self):
            self.clip(self.recipe.optimizer.max_grad_norm)
            self.optimizer.step(gradients=self.gradients.collected)
        return metrics | {"lr": float(self.optimizer.param_groups[0]["lr"])} | self.finish()

    def clip(self, limit: float | None) -> float:
        """Scale the combined gradient down to the norm `limit`; return the norm before, masks applied.

        Without whole gradients of the experts it raises RuntimeError for a `limit`, and returns NaN for None.
        """
        if self._norm is None:
            if limit is not None:
                raise RuntimeError("a step that makes its update from factors has no whole gradient to clip")
            return math.nan
        self.verifier.clipped_to = limit
        if limit is not None and self._norm > limit:
            self.gradients.scale(limit / self._norm)
        return self._norm

    def finish(self) -> dict[str, float]:
        """Close a step whose update has been made: verify it, drop its gradients and count it; return metrics.

        For MOLLM they include `descent_NAME` where it is known, the update's inner product with that gradient.
        """
        with left_clean(self):
            metrics = {f"descent_{name}": value for name, value in self.gradients.descent().items()}
            metrics |= self.verifier.check()
            self.objectives.dual.follow(self.tally.losses(), self.objectives.router_aux, self.steps)
        self.discard()
        self.gradients.under_way = False
        self.steps += 1
        return metrics | self.routers.measure(self.prepared, self.masks, self.steps, self.ranks)

    def correct_routers(self) -> dict[str, float]:
        """Correct the routers after the last step; return metrics. See `RouterGuard.correct` for errors."""
        return self.routers.correct(self.prepared, self.masks, self.ranks)

    def discard(self) -> None:
        """Drop accumulated gradients and forget the micro-batches."""
        self.gradients.clear()
        self.tally.clear()
        self.updated = []

    def plan(self, forget_batches: Iterable[Batch] = (), retain_batches: Iterable[Batch] = (), **options: Any) -> Plan:
        """Plan what the step will do and what it will cost for the largest of the given batches; see `plan`.

        All batches size the reference caches; the step stays unchanged. Of devices of `fits` GiB, one or several, the
        plan says whether they are enough, and for those that are not, which overrides of the recipe make the step fit
        (`Plan.remedies`; none are searched with `advise=False`). The options and errors are `plan_with_advice`'s.
        """
        return plan_with_advice(self, partial(copies.like, self), forget_batches, retain_batches, **options)

    def state_dict(self) -> dict:
        """Return all but the weights that a bitwise resume needs; where weights are sharded, on every rank: `saved`."""
        return saved.state_of(self, shared=self.shards is not None)

    def load_state_dict(self, state: dict) -> None:
        """Restore a `state_dict`, of one process or of any number of ranks; ValueError if it is of another recipe."""
        saved.load_state(self, state)

    def rewind(self, steps: int, alpha: float, optimizer: dict | None) -> None:
        """Set the steps done, the multiplier of the retain loss and, but for None, the optimizer's state; no weight."""
        self.discard()
        self.gradients.under_way = False
        self.steps, self.objectives.dual.value = steps, alpha
        if optimizer is not None:
            self.optimizer.load_state_dict(optimizer)

    def apply_preparation(self) -> None:
        """Let exactly those weights train that the scope and what is prepared allow."""
        self.weights.restrict(self.prepared)
        self.apply_masks()

    def apply_masks(self) -> None:
        """Give the optimizer the masks of what is prepared, and routers what they keep."""
        self.weights.mask(self.prepared, self.optimizer)
        self.routers.take(self.prepared, self.masks)

    def close(self) -> None:
        """Restore the model's experts implementation and `requires_grad` flags as they were before."""
        self.discard()
        self.gradients.close()
        self.routers.close()
        self.weights.restore()
        self._implementation.disable()

    @property
    def masks(self) -> dict[str, Tensor]:
        """Return the packed masks by name of the parameter; without one, all its weights may change."""
        return self.weights.masks

    @property
    def obstacle(self) -> str:
        """Return why expert weights are not updated in the backward pass itself; empty if they are."""
        return ways.obstacle(self.view())

    def view(self) -> StepView:
        """Return what the step shows of itself at this moment; RuntimeError after `close()`."""
        check_open(self._implementation.enabled)
        return view_of(self)

    def twin(self, model: nn.Module, prepared: dict | None = None) -> "UnlearnStep":
        """Return a plain step over `model`, a copy of this step's model; see `copies.twin`."""
        return copies.twin(self, model, prepared)

    def shadow(self, copied: Callable[[Any, dict], Any], prepared: Preparation) -> "UnlearnStep":
        """Return a copy of the step for a rehearsal; see `copies.shadow`."""
        return copies.shadow(self, copied, prepared)

    def rebind(self) -> None:
        """Take up the parameters that an engine has put into the model, and share masks out as it shares weights.

        Every rank calls this, before the first step. Raises ValueError if the sharding is not supported, and if the
        optimizer has states of the parameters that were there before.
        """
        self.weights.take_up(self.optimizer)
        self.discard()
        self.gradients.close()
        self.ranks = self.tally.ranks = Ranks(self.model, self.ranks.group)
        self.weights.shards = self.shards = Shards(self.model, self.ranks) if self.ranks.sharded else None
        self.gradients = store_of(self.optimizer, self.shards)
        self.apply_preparation()

    def _backward(self, weighed: dict[str, tuple[float, Tensor]]) -> None:
        factors = self.objectives.factors
        if self.recipe.mollm is None:
            total = sum(factors[name] * share * value for name, (share, value) in weighed.items())
            assert isinstance(total, Tensor)  # there is always a forget loss
            total.backward()
            return
        values = {name: share * value for name, (share, value) in weighed.items()}
        self.gradients.backward(self.objectives.merged(values))

    def _descend(self, settings: Mollm) -> dict[str, float]:
        kl, floor = self.tally.losses().get("kl_loss"), self.prepared.kl_floor
        active = kl is None or floor is None or mollm.kl_active(kl, floor, factor=settings.kl_floor)
        left_out = [] if active else ["kl"]
        return self.gradients.common_descent(settings, left_out, measure=self.steps % settings.log_descent_every == 0)
