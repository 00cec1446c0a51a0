"""What a step will do and what it will hold in memory, before it does it."""

import math
from dataclasses import dataclass, field

from torch import Tensor

from moe_unlearn import losses
from moe_unlearn.experts import experts_modules
from moe_unlearn.forward import Batch
from moe_unlearn.ops.bits import unpack_bits
from moe_unlearn.preparation import uses_kl

_HIDDEN_BYTES = 2  # cached hidden states are bfloat16
_LOGPROB_BYTES = 4


@dataclass
class Plan:
    """A step's plan; `str(plan)` is the table the command line prints. Memory is in bytes."""

    recipe: str
    levers: dict[str, str]
    weights: int  # elements of the model
    trained: int  # elements that may move
    layers: int
    steps: int
    memory: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def total(self) -> int:
        """Sum of the predicted components, without activations."""
        return sum(self.memory.values())

    def __str__(self) -> str:
        share = self.trained / max(self.weights, 1)
        lines = [
            f"recipe {self.recipe}: {self.steps} steps, {self.layers} MoE layers",
            f"trained weights: {self.trained:,} of {self.weights:,} ({share:.1%})",
            *(f"  {name:<8} {text}" for name, text in self.levers.items()),
            "memory beyond activations:",
            *(f"  {name:<22} {size / 2**20:10.2f} MiB" for name, size in self.memory.items()),
            f"  {'total':<22} {self.total / 2**20:10.2f} MiB",
            *(f"note: {note}" for note in self.notes),
        ]
        return "\n".join(lines)


def make_plan(step, forget: list[Batch], retain: list[Batch]) -> Plan:
    """The plan of an `UnlearnStep` as it stands: before prepare() masks and selections are unknown."""
    recipe = step.recipe
    named = list(step.model.named_parameters())
    trained = [(name, p) for name, p in named if p.requires_grad]
    plan = Plan(
        recipe=recipe.name,
        levers=_levers(step),
        weights=sum(p.numel() for _, p in named),
        trained=sum(_kept(p, step.masks.get(name)) for name, p in trained),
        layers=len(experts_modules(step.model)),
        steps=recipe.steps,
    )
    objectives = 1
    if recipe.mollm is not None:
        objectives = 2 + recipe.mollm.kl
        plan.notes.append(f"MOLLM keeps {objectives} gradient sets until their Gram matrix is known")
    plan.memory = {
        "weights": sum(p.numel() * p.element_size() for _, p in named),
        "gradients": sum(p.numel() * p.element_size() for _, p in trained) * (objectives + (objectives > 1)),
        "optimizer state": sum(step.optimizer.state_size(p, step.masks.get(name)) for name, p in trained),
        "mask": _mask_bytes(step, named),
        "reference caches": _cache_bytes(step, forget, retain),
    }
    if recipe.optimizer.max_grad_norm is not None:
        plan.notes.append("max_grad_norm needs every gradient before the first update")
    if step.verifier.remaining:
        steps = "every step" if step.verifier.remaining == math.inf else f"{step.verifier.remaining} steps"
        plan.memory["verification"] = step.verifier.memory()
        plan.notes.append(f"verify runs {steps} beside the plain path, at about six times their time")
    return plan


def _levers(step) -> dict[str, str]:
    recipe, prepared = step.recipe, step.prepared
    levers = {"trace": "off", "wagle": "off", "mollm": "off"}
    if recipe.trace is not None:
        levers["trace"] = "experts selected in prepare()"
        if prepared.inactive:
            levers["trace"] = "TRACE inactive: no forget-critical expert"
        elif prepared.calibration is not None:
            levers["trace"] = (
                f"{int(prepared.selected.sum())} experts selected, effective retain sample "
                f"{prepared.calibration.ess:.0f} tokens"
            )
    if recipe.wagle is not None:
        levers["wagle"] = f"keep {recipe.wagle.keep:g}, mask made in prepare()"
        if prepared.mask is not None:
            levers["wagle"] = f"kept {prepared.mask.fraction:.4f} of all weights (asked {recipe.wagle.keep:g})"
    if recipe.mollm is not None:
        names = ["forget", "retain", *(["kl"] if recipe.mollm.kl else [])]
        levers["mollm"] = f"common descent of {', '.join(names)} ({recipe.mollm.normalize})"
    levers["scope"] = recipe.scope.kind
    levers["update"] = f"{type(step.optimizer).__name__}, plain path (autograd, then the masked update)"
    return levers


def _kept(parameter: Tensor, words: Tensor | None) -> int:
    if words is None:
        return parameter.numel()
    return int(unpack_bits(words, parameter.shape[-1] if parameter.dim() else 1).sum())


def _mask_bytes(step, named) -> int:
    if step.masks:
        return sum(words.numel() * words.element_size() for words in step.masks.values())
    return sum(p.numel() for _, p in named) // 8 if step.recipe.wagle is not None else 0


def _cache_bytes(step, forget: list[Batch], retain: list[Batch]) -> int:
    prepared, recipe = step.prepared, step.recipe
    caches = (
        prepared.token_weights,
        prepared.ref_logprobs,
        prepared.ref_logprobs_idk,
        prepared.ref_hidden_states,
        prepared.ref_layer_states,
    )
    head = prepared.ref_lm_head
    held = sum(cache.nbytes for cache in caches if cache is not None)
    held += 0 if head is None else head.numel() * head.element_size()
    if prepared.done:
        return held
    hidden = losses.head_of(step.model).weight
    tokens = {
        side: sum(int(b["attention_mask"].sum()) for b in batches)
        for side, batches in (("forget", forget), ("retain", retain))
    }
    predicted = 0
    if recipe.trace is not None and recipe.trace.refresh == "offline":
        predicted += tokens["retain"] * _LOGPROB_BYTES
    if recipe.forget.objective in ("npo", "idk_dpo"):
        predicted += tokens["forget"] * _LOGPROB_BYTES
    if recipe.retain.objective == "embed_diff":
        predicted += tokens["retain"] * hidden.shape[1] * _HIDDEN_BYTES
    if uses_kl(recipe):
        predicted += tokens["retain"] * hidden.shape[1] * _HIDDEN_BYTES
        predicted += hidden.numel() * hidden.element_size() if hidden.requires_grad else 0
    return predicted
