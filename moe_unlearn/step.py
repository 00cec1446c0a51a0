"""UnlearnStep: batches in, updated weights and metrics out.

    step = UnlearnStep(model, recipe)
    step.prepare(forget_batches, retain_batches)         # on the unchanged model
    metrics = step(forget_batch, retain_batch)           # one update; update=False accumulates

One step computes the recipe's losses, turns them into one gradient and moves the weights the scope and
the mask allow:

    g = grad( gamma L_forget + alpha L_retain + anchor L_anchor )          without MOLLM
    g = sum_i c_i grad L_i,  c from the Gram matrix of the masked gradients  with MOLLM

Micro-batches are averaged equally; `sizes` (what `Objectives.sizes` counts, summed over the global batch)
weighs them exactly instead. This is the plain path: autograd and one masked optimizer.
"""

import math
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor, nn

from moe_unlearn import losses, mollm, scope
from moe_unlearn.config import Recipe
from moe_unlearn.experts import enable, experts_modules
from moe_unlearn.forward import Batch
from moe_unlearn.objectives import NotPreparedError, Objectives
from moe_unlearn.ops import gram
from moe_unlearn.optim import MaskedAdamW, MaskedSGD
from moe_unlearn.plan import Plan, make_plan
from moe_unlearn.preparation import Preparation, needed, prepare


class NonFiniteError(FloatingPointError):
    """A loss or gradient is NaN or infinite; raised before the update, so no weight has changed."""


class UnlearnStep:
    """One unlearning step over a model with Mixture-of-Experts layers.

    Args:
        model: a transformers causal LM (PEFT-wrapped or not); its experts are switched to the
            "moe_unlearn" implementation and parameters outside the scope are frozen until `close()`.
        recipe: a `Recipe`, the path of a YAML file or the name of a shipped recipe.
        optimizer: a `MaskedSGD` or `MaskedAdamW` over the model's parameters; None builds the recipe's.

    Raises TypeError for another optimizer and ValueError for a model without MoE layers, or with nothing to
    train within the recipe's scope.
    """

    def __init__(
        self,
        model: nn.Module,
        recipe: Recipe | str | Path,
        optimizer: MaskedSGD | MaskedAdamW | None = None,
    ):
        self.recipe = recipe if isinstance(recipe, Recipe) else Recipe.load(recipe)
        self.model = model
        self._implementation = enable(model)
        self._flags = {name: p.requires_grad for name, p in model.named_parameters()}
        self.prepared = Preparation()
        self.objectives = Objectives(model, self.recipe, self.prepared)
        self.masks: dict[str, Tensor] = {}
        self.steps = 0
        #: whether the last step saw a forget loss at or below `recipe.stop_forget_loss`
        self.done = False
        self._apply_scope()
        if optimizer is None:
            optimizer = build_optimizer(model, self.recipe)
        elif not isinstance(optimizer, MaskedSGD | MaskedAdamW):
            raise TypeError(f"optimizer must be a MaskedSGD or MaskedAdamW; got {type(optimizer).__name__}")
        self.optimizer = optimizer
        self._micro_batches: list[dict[str, float]] = []
        self._sizes_given = False
        self._gradients: dict[str, list[Tensor | None]] = {}
        self._norm = 0.0

    def prepare(
        self,
        forget_batches: Iterable[Batch],
        retain_batches: Iterable[Batch],
        *,
        on_stage: Callable[[str], None] | None = None,
    ) -> Preparation:
        """Run the preparation stages the recipe needs and that have not run; see `preparation`.

        Both sets must hold every row the step will meet when weights or references are cached for it.
        `on_stage(name)` is called after each stage, when `state_dict()` already holds its result.
        """
        forget, retain = list(forget_batches), list(retain_batches)
        for batch in forget:
            check_batch(batch, "forget")
        for batch in retain:
            check_batch(batch, "retain")
        for side, batches in (("forget", forget), ("retain", retain)):
            if not any(losses.target_mask(batch).any() for batch in batches):
                raise ValueError(f"the {side} set carries no loss: it is empty or all labels are -100")
        losses.verify_head(self.model, {key: value[:1] for key, value in retain[0].items()})

        def after(stage: str) -> None:
            self._apply_scope()
            if on_stage is not None:
                on_stage(stage)

        prepare(self.model, self.recipe, self.prepared, forget, retain, after)
        self._apply_masks()
        return self.prepared

    def __call__(
        self,
        forget_batch: Batch,
        retain_batch: Batch,
        *,
        update: bool = True,
        sizes: dict[str, int] | None = None,
    ) -> dict[str, float]:
        """One step, or with `update=False` one micro-batch of it; returns the metrics as floats.

        Raises NotPreparedError, ValueError for a bad batch, NonFiniteError before any weight changes.
        """
        metrics = self.accumulate(forget_batch, retain_batch, sizes=sizes)
        return metrics | self.update() if update else metrics

    def accumulate(
        self, forget_batch: Batch, retain_batch: Batch, *, sizes: dict[str, int] | None = None
    ) -> dict[str, float]:
        """Losses and gradients of one micro-batch; nothing moves."""
        missing = [stage for stage in needed(self.recipe) if stage not in self.prepared.done]
        if missing:
            raise NotPreparedError(
                f"recipe {self.recipe.name!r} needs prepare(forget_batches, retain_batches) first; "
                f"stages not run: {', '.join(missing)}"
            )
        if self._micro_batches and self._sizes_given != (sizes is not None):
            raise ValueError("`sizes` must be given for all micro-batches of a step or for none")
        check_batch(forget_batch, "forget")
        check_batch(retain_batch, "retain")
        values = {**self.objectives.forget(forget_batch), **self.objectives.retain(retain_batch)}
        metrics = {f"{name}_loss": float(value.detach()) for name, value in values.items()}
        bad = [name for name, value in metrics.items() if not math.isfinite(value)]
        if bad:
            self.discard()
            raise NonFiniteError(
                f"{', '.join(f'{name} is {metrics[name]}' for name in bad)}: stopped before the update; "
                f"{self.steps} steps done, weights unchanged by this one"
            )
        self._sizes_given = sizes is not None
        if self._sizes_given:
            own = self.objectives.sizes(forget_batch, retain_batch)
            share = {side: own[side] / max(sizes[side], 1) for side in own}
            values = {name: v * share["forget" if name in _FORGET_SIDE else "retain"]
                      for name, v in values.items()}  # fmt: skip
        self._backward(values)
        self._micro_batches.append(metrics)
        return metrics

    def combine(self) -> dict[str, float]:
        """Turn what was accumulated into the gradient of one step, in `.grad`; nothing moves.

        For callers that step the optimizer themselves: combine, clip, `optimizer.step()`, `finish()`.
        Raises NonFiniteError, with the gradients dropped, if the gradient is not finite.
        """
        if not self._micro_batches:
            raise RuntimeError("nothing accumulated: call accumulate(), or the step itself, first")
        parts = 1 if self._sizes_given else len(self._micro_batches)
        for gradient in self._accumulated():
            gradient.div_(parts)
        metrics = self._combine_mollm() if self.recipe.mollm is not None else {}
        masks = [self.masks.get(name) for name, _ in self._trained()]
        norm = float(gram([[p.grad for _, p in self._trained()]], masks=masks)[0, 0]) ** 0.5
        if not math.isfinite(norm):
            self.discard()
            raise NonFiniteError(f"the gradient norm is {norm}: stopped before the update, weights unchanged")
        self._norm = metrics["grad_norm"] = norm
        if self.recipe.stop_forget_loss is not None:
            forget = sum(m["forget_loss"] for m in self._micro_batches) / len(self._micro_batches)
            self.done = forget <= self.recipe.stop_forget_loss
        return metrics

    def update(self) -> dict[str, float]:
        """`combine()`, the optimizer's step, and a clean slate; returns its metrics."""
        metrics = self.combine()
        self.clip(self.recipe.optimizer.max_grad_norm)
        metrics |= self._optimizer_step()
        metrics["lr"] = float(self.optimizer.param_groups[0]["lr"])
        self.finish()
        return metrics

    def clip(self, limit: float | None) -> float:
        """Scale the combined gradient down to the norm `limit`; returns the norm before, masks applied."""
        if limit is not None and self._norm > limit:
            for _, p in self._trained():
                if p.grad is not None:
                    p.grad.mul_(limit / self._norm)
        return self._norm

    def finish(self) -> None:
        """Close a step whose update has been made: drop its gradients and count it."""
        self.discard()
        self.steps += 1

    def discard(self) -> None:
        """Drop accumulated gradients."""
        self.optimizer.zero_grad(set_to_none=True)
        self._gradients.clear()
        self._micro_batches.clear()

    def plan(self, forget_batches: Iterable[Batch] = (), retain_batches: Iterable[Batch] = ()) -> Plan:
        """What the step will do and what it will take for the largest batches given; see `plan`.

        All batches together size the reference caches. Before prepare() as after; changes nothing. Raises
        ValueError for a bad batch.
        """
        forget, retain = list(forget_batches), list(retain_batches)
        for side, batches in (("forget", forget), ("retain", retain)):
            for batch in batches:
                check_batch(batch, side)
        return make_plan(self, forget, retain)

    def state_dict(self) -> dict:
        """Preparation, optimizer and step count; with the model's weights, all a bitwise resume needs."""
        return {
            "recipe": self.recipe.to_dict(),
            "steps": self.steps,
            "prepared": self.prepared.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }

    def load_state_dict(self, state: dict) -> None:
        """Restore `state_dict`; ValueError if it belongs to another recipe."""
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
        self._apply_scope()
        self._apply_masks()
        if "optimizer" in state:
            self.optimizer.load_state_dict(state["optimizer"])

    def close(self) -> None:
        """Give the model back: experts implementation and `requires_grad` flags as they were."""
        self.discard()
        scope.set_trainable(self.model, self._flags, set(self._flags))
        self._implementation.disable()

    def _trained(self) -> list[tuple[str, nn.Parameter]]:
        return [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]

    def _apply_scope(self) -> None:
        kind, selected = self.recipe.scope.kind, self.prepared.selected
        names = set(self._flags)
        if kind == "parameters":
            names = scope.matching(self.model, self.recipe.scope.parameters)
        elif kind in ("experts", "seuf") and selected is not None:
            names = set(scope.expert_masks(self.model, selected))
            if kind == "seuf":
                layer = int(selected.any(1).nonzero()[0])
                names |= scope.router_parameters(self.model, list(experts_modules(self.model))[layer])
        if not any(self._flags[name] for name in names):
            raise ValueError(
                f"nothing to train: every parameter in the scope ({kind!r}) is frozen; a parameter that does not "
                "require grad when the step is built, as those under adapters, stays as it is"
            )
        scope.set_trainable(self.model, self._flags, names)

    def _apply_masks(self) -> None:
        masks = {}
        if self.recipe.scope.kind in ("experts", "seuf") and self.prepared.selected is not None:
            masks = scope.expert_masks(self.model, self.prepared.selected)
        if self.prepared.mask is not None:
            words = {name: self.prepared.mask.words(name) for name in self.prepared.mask.names}
            masks = scope.combine(masks, {name: words[name] for name, _ in self._trained()})
        device = {name: p.device for name, p in self.model.named_parameters()}
        self.masks = {name: words.to(device[name]) for name, words in masks.items()}
        by_parameter = {p: self.masks.get(name) for name, p in self.model.named_parameters()}
        for group in self.optimizer.param_groups:
            group["masks"] = [by_parameter.get(p) for p in group["params"]]

    def _backward(self, values: dict[str, Tensor]) -> None:
        if self.recipe.mollm is None:
            weights = {
                "forget": self.recipe.forget.gamma,
                "retain": self.recipe.retain.alpha,
                "anchor": self.recipe.scope.anchor,
            }
            sum(weights[name] * value for name, value in values.items()).backward()
            return
        if "anchor" in values:
            anchor = self.recipe.scope.anchor * values["anchor"]
            values = {name: v for name, v in values.items() if name != "anchor"}
            values["forget"] = values["forget"] + anchor
        for i, (name, value) in enumerate(values.items()):
            # forget has a graph of its own; retain and KL share theirs, freed by the last of the two
            value.backward(retain_graph=name != "forget" and i + 1 < len(values))
            held = self._gradients.setdefault(name, [None] * len(self._trained()))
            for j, (_, p) in enumerate(self._trained()):
                if p.grad is not None:
                    held[j] = p.grad if held[j] is None else held[j] + p.grad
                    p.grad = None

    def _accumulated(self) -> list[Tensor]:
        lists = list(self._gradients.values()) or [[p.grad for _, p in self._trained()]]
        return [g for gradients in lists for g in gradients if g is not None]

    def _combine_mollm(self) -> dict[str, float]:
        settings, names = self.recipe.mollm, list(self._gradients)
        masks = [self.masks.get(name) for name, _ in self._trained()]
        products = gram(list(self._gradients.values()), masks=masks)
        active = torch.ones(len(names), dtype=torch.bool)
        if "kl" in names:
            value = sum(m["kl_loss"] for m in self._micro_batches) / len(self._micro_batches)
            active[names.index("kl")] = mollm.kl_active(value, self.prepared.kl_floor, factor=settings.kl_floor)
        if not torch.isfinite(products).all():
            self.discard()
            raise NonFiniteError("a gradient is not finite: stopped before the update, weights unchanged")
        direction = mollm.common_descent(
            products, normalize=settings.normalize, rescale=settings.rescale, active=active
        )
        for j, (_, p) in enumerate(self._trained()):
            terms = [(float(c), g[j]) for c, g in
                     zip(direction.coefficients, self._gradients.values(), strict=True)]  # fmt: skip
            present = [c * g for c, g in terms if g is not None and c != 0]
            # at a stationary point nothing may move, momentum and decay included
            p.grad = sum(present[1:], present[0]) if present and not direction.stationary else None
        metrics = {f"lambda_{n}": float(w) for n, w in zip(names, direction.weights, strict=True)}
        metrics["stationary"] = float(direction.stationary)
        if isinstance(self.optimizer, MaskedSGD):
            # exact for plain SGD: the update is -lr d, so the products are already in the Gram matrix
            rates = -self.optimizer.param_groups[0]["lr"] * (products @ direction.coefficients.to(products))
            metrics |= {f"descent_{n}": float(r) for n, r in zip(names, rates, strict=True)}
        return metrics

    def _optimizer_step(self) -> dict[str, float]:
        settings = self.recipe.mollm
        measured = settings is not None and not isinstance(self.optimizer, MaskedSGD)
        if not measured or self.steps % settings.log_descent_every:
            self.optimizer.step()
            return {}
        trained = self._trained()
        before = [p.detach().clone() for _, p in trained]
        self.optimizer.step()
        change = [p.detach() - old for (_, p), old in zip(trained, before, strict=True)]
        products = gram([*self._gradients.values(), change])[:-1, -1]
        return {f"descent_{n}": float(v) for n, v in zip(self._gradients, products, strict=True)}


_FORGET_SIDE = ("forget", "anchor")
_MAY_DIFFER = ("name", "steps", "data")


def build_optimizer(model: nn.Module, recipe: Recipe) -> MaskedSGD | MaskedAdamW:
    """The recipe's masked optimizer over every parameter that requires a gradient."""
    settings = recipe.optimizer
    parameters = [p for p in model.parameters() if p.requires_grad]
    numerics = settings.numerics
    if numerics is None:
        numerics = "stochastic" if any(p.dtype == torch.bfloat16 for p in parameters) else "parity"
    common = {
        "lr": settings.lr,
        "weight_decay": settings.weight_decay,
        "numerics": numerics,
        "seed": recipe.seed,
    }
    if settings.name == "sgd":
        return MaskedSGD(parameters, momentum=settings.momentum, **common)
    return MaskedAdamW(parameters, betas=tuple(settings.betas), eps=settings.eps, **common)


def check_batch(batch: Batch, side: str) -> None:
    """Raise ValueError unless `batch` has the three tensors [B, S] of transformers' conventions."""
    for key in ("input_ids", "attention_mask", "labels"):
        if key not in batch:
            raise ValueError(f"the {side} batch has no {key!r}; got {', '.join(map(str, batch)) or 'nothing'}")
        if batch[key].shape != batch["input_ids"].shape or batch[key].dim() != 2:
            raise ValueError(
                f"{side} batch: {key} must be [B, S] = {list(batch['input_ids'].shape)}; got {list(batch[key].shape)}"
            )
    if len(batch["input_ids"]) == 0:
        raise ValueError(f"the {side} batch has no rows")
