"""What a rehearsal assumes of a preparation that has not been made: results of the largest shape."""

from typing import Any

import torch
from torch import Tensor

from moe_unlearn.config import COMPARE_COMPANIONS
from moe_unlearn.experts import experts_modules, total_experts
from moe_unlearn.masks import WeightMask
from moe_unlearn.model.batches import Batch, refusal
from moe_unlearn.model.head import head_of
from moe_unlearn.ops.bits import words_shape
from moe_unlearn.plan.dry_run import Rehearsal
from moe_unlearn.prepare import float8
from moe_unlearn.prepare.preparation import Calibration, Preparation
from moe_unlearn.prepare.reference import head_to_keep
from moe_unlearn.prepare.rows import RowCache
from moe_unlearn.prepare.stages import needed, needs_head, uses_kl
from moe_unlearn.view import StepView

CACHES = "reference caches"


def assumed(view: StepView, own: Preparation, rehearsal: Rehearsal, batches: dict[str, Batch]) -> Preparation:
    """Return a preparation with what `own` has, and stand-ins for the rest; caches hold zeros for `batches`."""
    recipe = view.recipe
    stages = needed(recipe)
    out = Preparation(
        done=stages,
        inactive=own.inactive,
        selected=own.selected,
        mask=own.mask,
        calibration=own.calibration,
        kl_floor=own.kl_floor or 0.0,
    )
    forget, retain = batches["forget"], batches["retain"]
    modules: dict[str, Any] = experts_modules(view.model)
    hidden = head_of(view.model).weight.shape[1]

    form = float8.form(hidden, recipe.reference_dtype)

    def zeros(batch: Batch, dtype: torch.dtype = torch.float32, *tail: int) -> RowCache:
        cache = RowCache("stand-in")
        cache.put(batch, torch.zeros(*batch["input_ids"].shape, *tail, dtype=dtype))
        return cache

    if out.selected is None and ("trace" in stages or "seuf" in stages):
        selected = torch.zeros(len(modules), max(total_experts(m) for m in modules.values()), dtype=torch.bool)
        if "seuf" in stages:
            selected[0, 0] = True
        else:
            assert recipe.trace is not None
            selected[:, : recipe.trace.per_layer] = True
        out.selected = selected
    if "trace" in stages and recipe.trace is not None and not out.inactive:
        assert out.selected is not None
        if out.calibration is None:
            tilt = torch.zeros(out.selected.shape)
            out.calibration = Calibration(tilt, 0.0, tilt, 0.0, 1.0)
        if recipe.trace.refresh == "offline":
            out.token_weights = zeros(retain)
    if recipe.forget.objective in ("npo", "idk_dpo"):
        out.ref_logprobs = zeros(forget)
    if recipe.forget.objective in COMPARE_COMPANIONS:
        out.ref_logprobs_idk = zeros(refusal(forget))
    if uses_kl(recipe):
        out.ref_hidden_states = zeros(retain, *form)
    if recipe.forget.objective == "undial":
        out.ref_hidden_states_forget = zeros(forget, *form)
    out.ref_lm_head, out.ref_bias = (
        None if kept is None else rehearsal.fake(kept) for kept in reference_head(view, own)
    )
    for kept in (out.ref_lm_head, out.ref_bias):
        if kept is not None:
            rehearsal.ledger.add(kept, CACHES)
    if recipe.retain.objective == "embed_diff":
        out.ref_layer_states = zeros(retain, torch.bfloat16, hidden)
    if recipe.wagle is not None and "wagle" in stages and out.mask is None:
        shapes = {name: tuple(p.shape) for name, p in view.model.named_parameters()}
        packed = {name: rehearsal.empty(words_shape(s), torch.int32) for name, s in shapes.items()}
        out.mask = WeightMask(shapes, packed, recipe.wagle.keep)
    if out.mask is not None:
        for words in out.mask.packed.values():
            rehearsal.ledger.add(words, "mask")
    return out


def reference_head(view: StepView, prepared: Preparation) -> tuple[Tensor | None, Tensor | None]:
    """Return weight and bias of the head that the preparation keeps, or will; None where the model's own serves."""
    if "reference" in prepared.done:
        return prepared.ref_lm_head, prepared.ref_bias
    head = head_of(view.model)
    return head_to_keep(head, head) if needs_head(view.recipe) else (None, None)
