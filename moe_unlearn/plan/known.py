"""What a plan knows of a step's memory without a rehearsal."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from moe_unlearn import offload
from moe_unlearn.config import COMPARE_COMPANIONS, Data
from moe_unlearn.config.adapter import bits_of
from moe_unlearn.lazy import each
from moe_unlearn.model.batches import Batch, attended_mask, refusal
from moe_unlearn.model.head import head_of
from moe_unlearn.model.packing import call_of
from moe_unlearn.model.quantised import is_quantised, made_whole, rounded_bytes, rounded_weights
from moe_unlearn.plan.assumed import CACHES, reference_head
from moe_unlearn.plan.mesh import Mesh
from moe_unlearn.prepare import float8
from moe_unlearn.prepare.preparation import Preparation
from moe_unlearn.prepare.stages import needed, uses_kl
from moe_unlearn.routers import kept_bytes, routers_of
from moe_unlearn.view import StepView

ROUTERS = "kept of routers"
WHOLE = "experts made whole"
_HIDDEN_BYTES = 2  # cached layer outputs are bfloat16
_LOGPROB_BYTES = 4


class Caches(NamedTuple):
    """Holds the bytes of values cached row by row: those that memory holds, and those that lie on disk."""

    held: int
    stored: int


def first_share(view: StepView, mesh: Mesh | None) -> Callable[[Tensor, float], int]:
    """Return a function of a parameter and a size, which gives what of it the first rank of a mesh has; else all."""
    placings = {} if mesh is None else mesh.placings(view.model)

    def share(p: Tensor, size: float) -> int:
        placing = placings.get(p)
        if placing is None:
            return round(size)
        return round(size * len(placing.held(len(p), placing.coordinates()[0])) / max(len(p), 1))

    return share


def device_of(view: StepView) -> torch.device:
    """Return the device that a step is planned for: that of its model, or the one that a model on meta would have."""
    device = next(view.model.parameters()).device
    if device.type != "meta":
        return device
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def retain_rows(settings: Data) -> int:
    """Return how many retain rows a plan without documents assumes, the model's own texts among them."""
    return (settings.retain_rows or 0) + settings.sampled


def largest(batches: Sequence[Batch], device: torch.device) -> Batch:
    """Return the batch with the most positions in a call of the model, on a device."""
    batch = max(batches, key=lambda batch: (call_of(batch).shape.numel(), batch["input_ids"].numel()))
    return {name: value.to(device) for name, value in batch.items()}


def on_host(view: StepView) -> set[Tensor]:
    """Return the parameters whose optimizer state lies on the host, beside the device."""
    groups = view.optimizer.param_groups if offload.is_apart(device_of(view)) else []
    return {p for group in groups if group["offload"] for p in group["params"]}


def held_at_rest(view: StepView, prepared: Preparation, caches: int, mesh: Mesh | None) -> dict[str, int]:
    """Return the bytes by component that are known without a rehearsal, on the first rank of a mesh if there is one."""
    share, away, rounded = first_share(view, mesh), on_host(view), rounded_sizes(view)
    named = dict(view.model.named_parameters())
    known = {
        "weights": sum(share(p, rounded.get(p, p.nbytes)) for p in view.model.parameters()),
        "optimizer state": sum(
            share(p, view.optimizer.state_size(p, view.masks.get(name))) for name, p in view.trained if p not in away
        ),
        "mask": sum(share(named[name], words.nbytes) for name, words in view.masks.items()),
        WHOLE: whole_bytes(view),
        ROUTERS: router_bytes(view),
        CACHES: caches + sum(kept.nbytes for kept in reference_head(view, prepared) if kept is not None),
    }
    return {name: size for name, size in known.items() if size}


def rounded_sizes(view: StepView) -> dict[Tensor, int]:
    """Return the bytes of the weights that `adapter.bits` rounds when they are loaded, where they are whole here."""
    bits = bits_of(view.recipe.adapter)
    if bits is None or is_quantised(view.model):
        return {}
    return {p: rounded_bytes(p, bits) for _, p in rounded_weights(view.model)}


def whole_bytes(view: StepView) -> int:
    """Return the bytes of the experts that are whole at a time where `adapter.bits` rounds them: those of a layer."""
    return made_whole(view.model) if rounded_sizes(view) else 0


def router_bytes(view: StepView) -> int:
    """Return the bytes of what invariant routers keep, at most."""
    recipe = view.recipe
    if recipe.router.mode != "invariant":
        return 0
    masked = recipe.wagle is not None or bool(view.masks)
    return sum(kept_bytes(recipe.router, router.weight, masked=masked) for router in routers_of(view.model))


def of_routers(view: StepView) -> str:
    """Describe what invariant routers take; empty without them."""
    if not (kept := router_bytes(view)):
        return ""
    weights = [router.weight for router in routers_of(view.model)]
    sketches = sum(2 * min(view.recipe.router.rank, w.shape[1]) * w.numel() * max(w.itemsize, 4) for w in weights)
    return (
        f"invariant routers keep {kept / 2**20:.2f} MiB, and prepare() has {sketches / 2**20:.2f} MiB of sketches of "
        "the inputs that it makes this of"
    )


def state_bytes(view: StepView) -> int:
    """Return the bytes of a token's final hidden state in the reference caches; 0 where the recipe has none there."""
    recipe, hidden = view.recipe, head_of(view.model).weight.shape[1]
    if not uses_kl(recipe) and recipe.forget.objective != "undial":
        return 0
    dtype, width = float8.form(hidden, recipe.reference_dtype)
    return width * dtype.itemsize


def at_least(view: StepView, prepared: Preparation, mesh: Mesh | None) -> int:
    """Return bytes that every step ends with, on the first rank of a mesh if there is one: no plan says less.

    The state of weights that prepare() has yet to choose among does not count.
    """
    known = held_at_rest(view, prepared, 0, mesh)
    chosen = prepared.selected is not None or view.recipe.scope.kind not in ("experts", "seuf")
    return known["weights"] + (known.get("optimizer state", 0) if chosen else 0)


def cache_bytes(
    view: StepView, prepared: Preparation, forget: Sequence[Batch], retain: Sequence[Batch], *, stored: bool
) -> Caches:
    """Return the bytes of values cached row by row, which lie on the host; the reference's head is on the device.

    `stored` says that prepare() keeps those of the reference on disk (its `cache_dir`), all but TRACE's token weights.
    """
    recipe = view.recipe
    caches = (
        prepared.token_weights,
        prepared.ref_logprobs,
        prepared.ref_logprobs_idk,
        prepared.ref_hidden_states,
        prepared.ref_hidden_states_forget,
        prepared.ref_layer_states,
    )
    if set(needed(recipe)) <= set(prepared.done):
        return Caches(sum(cache.nbytes for cache in caches if cache is not None), 0)
    hidden, states = head_of(view.model).weight.shape[1], state_bytes(view)

    def tokens(batches: Sequence[Batch], rows: int | None) -> int:
        assumed = (rows or 0) * recipe.data.max_length
        return sum(int(attended_mask(b).sum()) for b in batches) if batches else assumed

    forgotten, retained = tokens(forget, recipe.data.forget_rows), tokens(retain, retain_rows(recipe.data))
    weights = reference = 0
    if recipe.trace is not None and recipe.trace.refresh == "offline" and not prepared.inactive:
        weights = retained * _LOGPROB_BYTES
    if recipe.forget.objective in ("npo", "idk_dpo"):
        reference += forgotten * _LOGPROB_BYTES
    if recipe.forget.objective in COMPARE_COMPANIONS:
        reference += tokens(each(forget, refusal), recipe.data.forget_rows) * _LOGPROB_BYTES
    if recipe.retain.objective == "embed_diff":
        reference += retained * hidden * _HIDDEN_BYTES
    if uses_kl(recipe):
        reference += retained * states
    if recipe.forget.objective == "undial":
        reference += forgotten * states
    return Caches(weights, reference) if stored else Caches(weights + reference, 0)
