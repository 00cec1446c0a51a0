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
reason where this last form is not possible. `fused=False` takes the plain path, autograd and one masked optimizer, and
the fused step must give the same result.

Under `guard: strict` every gradient, or its factors, is known before the first weight changes: a value that is not
finite leaves the weights bitwise as they were. `guard: loss` checks losses likewise, but gradients of experts layer by
layer during the backward pass: a bad one stops the step when layers above it are updated already, and `restore()`, if
set, should bring back the last checkpoint. On a GPU the device does these checks: from the bad layer on nothing is
written, and the step raises its error after the backward pass.

With a `process_group` each process is one of several ranks (`ranks`). Every rank calls the step with its own rows and
`prepare` with all rows; losses, and so the checks that stop a step, are means over the rows of all ranks.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from moe_unlearn import mollm
from moe_unlearn.config import Recipe
from moe_unlearn.errors import NonFiniteError, NotPreparedError, RetainBudgetError
from moe_unlearn.experts import enable, step_inputs
from moe_unlearn.model import scope
from moe_unlearn.model.batches import Batch, Sizes, check_batches, checked, counted_row
from moe_unlearn.model.head import verify_head
from moe_unlearn.optim import MaskedAdamW, MaskedSGD, build_optimizer
from moe_unlearn.plan import Plan, make_plan, ways
from moe_unlearn.prepare.stages import STAGES, Preparation, needed, prepare
from moe_unlearn.ranks import Ranks, local
from moe_unlearn.step.gradients import Gradients
from moe_unlearn.step.objectives import Objectives, check_budget, check_finite
from moe_unlearn.step.sinks import CompactSink, FactorSink, UpdateSink
from moe_unlearn.step.tally import Tally
from moe_unlearn.verify import Verifier


class UnlearnStep:
    """One unlearning step over a model with Mixture-of-Experts layers.

    Args:
        model: a transformers causal LM (PEFT-wrapped or not); its experts are switched to the
            "moe_unlearn" implementation and parameters outside the scope are frozen until `close()`.
        recipe: a `Recipe`, the path of a YAML file or the name of a shipped recipe.
        optimizer: a `MaskedSGD` or `MaskedAdamW` over the model's parameters; None builds the recipe's.
        fused: False takes the plain path, for comparison.
        verify: the number of steps, True for all, that are replayed on the plain path and compared; see `verify`.
        process_group: the ranks that train this model; all take the first rank's weights. See `ranks`.

    Raises TypeError for another optimizer. Raises ValueError for a model without MoE layers, with nothing to train in
    the recipe's scope or with sharded weights, for `verify` with several ranks, and for `retain.router_aux` if the
    model has no load-balancing loss to multiply.
    """

    def __init__(
        self,
        model: nn.Module,
        recipe: Recipe | str | Path,
        optimizer: MaskedSGD | MaskedAdamW | None = None,
        *,
        fused: bool = True,
        verify: int | bool = 0,
        process_group: "torch.distributed.ProcessGroup | None" = None,
    ):
        self.recipe = recipe if isinstance(recipe, Recipe) else Recipe.load(recipe)
        self.ranks = Ranks(model, process_group)
        if verify and self.ranks.count > 1:
            raise ValueError(f"verify is for one process; got a model shared by {self.ranks.count} ranks")
        self.model, self.fused = local(model), fused
        #: called when a step stopped with some weights updated already; the error's message ends with the returned text
        self.restore: Callable[[], str] | None = None
        #: why the caller needs whole gradients before the update; empty if it does not
        self.held_back = ""
        #: the number of micro-batches in a step that the plan assumes
        self.micro_batches = self.recipe.accumulate
        self.prepared = Preparation()
        self.objectives = Objectives(self.model, self.recipe, self.prepared)
        self._implementation = enable(self.model)
        self._flags = {name: p.requires_grad for name, p in self.model.named_parameters()}
        self.masks: dict[str, Tensor] = {}
        self.steps = 0
        #: whether the last step saw a forget loss at or below `recipe.stop_forget_loss`
        self.done = False
        self._apply_scope()
        if optimizer is None:
            optimizer = build_optimizer(self.model, self.recipe)
        elif not isinstance(optimizer, MaskedSGD | MaskedAdamW):
            raise TypeError(f"optimizer must be a MaskedSGD or MaskedAdamW; got {type(optimizer).__name__}")
        self.optimizer = optimizer
        #: record of the micro-batches of this step
        self.tally = Tally(self.ranks)
        self.gradients = Gradients(self.optimizer, self._trained(), self.masks)
        self._updated: list[str] = []
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
        forget, retain = check_batches(forget_batches, "forget"), check_batches(retain_batches, "retain")
        self.objectives.check(forget, retain)
        verify_head(self.model, counted_row(retain))

        def after(stage: str) -> None:
            self._apply_scope()
            if on_stage is not None:
                on_stage(stage)

        prepare(self.model, self.recipe, self.prepared, forget, retain, after, cache_dir, self.ranks, stages)
        self._apply_masks()
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
        return self.tally.count([
            self.objectives.units(checked(forget, "forget"), checked(retain, "retain")) for forget, retain in pairs
        ])  # fmt: skip

    def accumulate(
        self, forget_batch: Batch, retain_batch: Batch, *, sizes: Sizes | None = None, last: bool = False
    ) -> dict[str, float]:
        """Compute losses and gradients of one micro-batch and add the gradients up; no weight changes.

        `last` says that no micro-batch follows before the update: if it is also the first, and there is no
        `obstacle`, expert weights are nevertheless updated in the backward pass.
        """
        missing = [stage for stage in needed(self.recipe) if stage not in self.prepared.done]
        if missing:
            raise NotPreparedError(
                f"recipe {self.recipe.name!r} needs prepare(forget_batches, retain_batches) first; "
                f"stages not run: {', '.join(missing)}"
            )
        self.tally.expect(sizes)
        forget_batch, retain_batch = checked(forget_batch, "forget"), checked(retain_batch, "retain")
        whole = last and not self.tally.parts
        single_pass = whole and not self.obstacle
        if not self.tally.parts:
            self.gradients = Gradients(self.optimizer, self._trained(), self.masks)
        sink = self._sink(whole, single_pass)
        try:
            # the backward pass belongs inside: with gradient checkpointing the recomputation needs the sink again
            with step_inputs(self.model, weight_gradients=sink), self.verifier.watch(forget_batch, retain_batch, sizes):
                values = self.objectives(forget_batch, retain_batch, joint=self.fused)
                # a step of one micro-batch on one rank has nothing to weigh
                alone = whole and sizes is None and self.ranks.count == 1
                units = None if alone else self.objectives.units(forget_batch, retain_batch)
                part = self.tally.measure(values, units)
                check_finite(part.losses, self.steps)
                if whole:
                    self._check_budget(part.losses)
                shares = self.tally.shares(part, sizes, last)
                if sink is not None:
                    sink.micro_batches = 1 / max(min(shares.values()), 1e-9)
                self._backward({name: (shares[f"{name}_loss"], value) for name, value in values.items()})
                if sink is not None:
                    sink.settle()
        except NonFiniteError as error:
            raise self._stopped(error) from None
        self._updated = sink.updated if single_pass else []
        self.tally.add(part, sizes, last)
        return dict(part.losses)

    def combine(self) -> dict[str, float]:
        """Turn the accumulated gradients into the step's, in `.grad` or `optimizer.gradients`; no weight changes.

        This is for callers that step the optimizer themselves: combine, clip, `optimizer.step()`, `finish()`. Returns
        metrics, the step's losses among them. Raises NonFiniteError or RetainBudgetError after dropping the gradients.
        """
        if not self.tally.parts:
            raise RuntimeError("nothing accumulated: call accumulate(), or the step itself, first")
        metrics = self.tally.losses() | self.objectives.dual.metrics()
        self._check_budget(metrics)
        self.gradients.add_up(self.ranks)
        self.gradients.divide(self.tally.divisor)
        if self.recipe.mollm is not None:
            metrics |= self._combine_mollm()
        try:
            factored = self.recipe.mollm is None and self.gradients.settle()
            norm = self.gradients.norm()
            if not math.isfinite(norm):
                raise NonFiniteError(f"the gradient norm is {norm}: stopped before the update", self._updated)
        except NonFiniteError as error:
            raise self._stopped(error) from None
        # with updates in the backward pass or from factors the whole gradient never exists
        self._norm = None if self._updated or factored else norm
        if self._norm is not None:
            metrics["grad_norm"] = norm
        if self.recipe.stop_forget_loss is not None:
            self.done = metrics["forget_loss"] <= self.recipe.stop_forget_loss
        return metrics

    def update(self) -> dict[str, float]:
        """Combine and clip the gradients, step the optimizer and finish the step; return its metrics."""
        metrics = self.combine()
        self.clip(self.recipe.optimizer.max_grad_norm)
        self.optimizer.step()
        metrics["lr"] = float(self.optimizer.param_groups[0]["lr"])
        return metrics | self.finish()

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
        metrics = {f"descent_{name}": value for name, value in self.gradients.descent().items()}
        metrics |= self.verifier.check()
        self.objectives.dual.follow(self.tally.losses(), self.objectives.router_aux, self.steps)
        self.discard()
        self.steps += 1
        return metrics

    def discard(self) -> None:
        """Drop accumulated gradients and forget the micro-batches."""
        self.gradients.clear()
        self.tally.clear()
        self._updated = []

    def plan(self, forget_batches: Iterable[Batch] = (), retain_batches: Iterable[Batch] = ()) -> Plan:
        """Plan what the step will do and what it will cost for the largest of the given batches; see `plan`.

        All batches together size the reference caches. The step stays unchanged. Raises ValueError for a bad batch.
        """
        return make_plan(self, list(forget_batches), list(retain_batches))

    def state_dict(self) -> dict:
        """Return preparation, optimizer, steps done and dual variable: with the weights, all a bitwise resume needs."""
        return {
            "recipe": self.recipe.to_dict(),
            "steps": self.steps,
            "dual": self.objectives.dual.value,
            "prepared": self.prepared.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }

    def load_state_dict(self, state: dict) -> None:
        """Restore a `state_dict`; raise ValueError if it belongs to another recipe."""
        own = self.recipe.to_dict()
        different = [k for k in own if k not in _MAY_DIFFER and own[k] != state["recipe"].get(k)]
        if different:
            raise ValueError(
                f"the state belongs to another recipe: {different[0]} was "
                f"{state['recipe'].get(different[0])!r}, is {own[different[0]]!r}"
            )
        self.discard()
        self.prepared.load_state_dict(state["prepared"])
        self.steps = state["steps"]
        self.objectives.dual.value = state.get("dual", self.recipe.retain.alpha)
        self._apply_scope()
        self._apply_masks()
        if "optimizer" in state:
            self.optimizer.load_state_dict(state["optimizer"])

    def close(self) -> None:
        """Restore the model's experts implementation and `requires_grad` flags as they were before."""
        self.discard()
        scope.set_trainable(self.model, self._flags, set(self._flags))
        self._implementation.disable()

    def _trained(self) -> list[tuple[str, nn.Parameter]]:
        return [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]

    def _apply_scope(self) -> None:
        scope.restrict(self.model, self.recipe.scope, self._flags, self.prepared.selected)

    def _apply_masks(self) -> None:
        prepared = self.prepared
        self.masks = scope.weight_masks(self.model, self.recipe.scope, prepared.selected, prepared.mask)
        by_parameter = {p: self.masks.get(name) for name, p in self.model.named_parameters()}
        for group in self.optimizer.param_groups:
            group["masks"] = [by_parameter.get(p) for p in group["params"]]
        for name, p in self._trained():
            if name in self.masks and not self.masks[name].any():
                p.requires_grad_(False)

    @property
    def obstacle(self) -> str:
        """Return why expert weights are not updated in the backward pass itself; empty if they are."""
        return ways.obstacle(self)

    def _sink(self, whole: bool, single_pass: bool) -> CompactSink | None:
        if not self.fused:
            return None
        held = self.optimizer, self.optimizer.gradients
        if single_pass:
            return UpdateSink(*held, {p: name for name, p in self._trained()})
        form = ways.form(self) if whole or self.recipe.mollm else "compact"
        factored = self.gradients.factors, self.gradients.kept, form
        return CompactSink(*held) if form == "compact" else FactorSink(*held, *factored)

    def _stopped(self, error: NonFiniteError) -> NonFiniteError:
        """Drop the gradients and return the error, extended by what state the weights are in."""
        self.discard()
        if not error.updated:
            return NonFiniteError(f"{error}, weights unchanged by this one")
        restored = "no checkpoint was restored" if self.restore is None else self.restore()
        return NonFiniteError(f"{error}; updated already: {', '.join(error.updated)}; {restored}", error.updated)

    def _check_budget(self, step_losses: dict[str, float]) -> None:
        try:
            check_budget(self.recipe, step_losses, self.steps)
        except RetainBudgetError:
            self.discard()
            raise

    def _backward(self, weighed: dict[str, tuple[float, Tensor]]) -> None:
        factors = self.objectives.factors
        if self.recipe.mollm is None:
            sum(factors[name] * share * value for name, (share, value) in weighed.items()).backward()
            return
        values = {name: share * value for name, (share, value) in weighed.items()}
        # anchor and router_aux are part of another objective, with a factor that does not include that objective's own
        for name, whole, factor in (
            ("anchor", "forget", factors["anchor"]),
            ("router_aux", "retain", self.objectives.router_aux),
        ):
            if name in values:
                values[whole] = values[whole] + factor * values.pop(name)
        for i, (name, value) in enumerate(values.items()):
            # forget has a graph of its own; retain and KL share one, which the last of the two frees
            value.backward(retain_graph=name != "forget" and i + 1 < len(values))
            self.gradients.collect(name)

    def _combine_mollm(self) -> dict[str, float]:
        settings, names = self.recipe.mollm, list(self.gradients.sets)
        products = self.gradients.products()
        active = torch.ones(len(names), dtype=torch.bool)
        if "kl" in names:
            value = self.tally.losses()["kl_loss"]
            active[names.index("kl")] = mollm.kl_active(value, self.prepared.kl_floor, factor=settings.kl_floor)
        if not torch.isfinite(products).all():
            raise self._stopped(NonFiniteError("a gradient is not finite: stopped before the update"))
        measure = self.steps % settings.log_descent_every == 0
        direction = self.gradients.descend(settings, products, active, measure=measure)
        metrics = {f"lambda_{n}": float(w) for n, w in zip(names, direction.weights, strict=True)}
        return metrics | {"stationary": float(direction.stationary)}


_MAY_DIFFER = ("name", "steps", "data", "guard", "retain_budget")
