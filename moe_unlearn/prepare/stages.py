"""prepare(), which computes everything that a recipe needs once, on the unchanged model, stage by stage.

    trace      routing frequencies of both sets, forget-critical experts, token weights or tilt
    seuf       the one expert that may train
    reference  log-probs (NPO, DPO, level), final hidden states (KL, UNDIAL), layer outputs (RMU); see `reference`
    kl_floor   mean KL measured at the unchanged model: the rounding noise of the cached reference
    routers    what invariant routers keep, and the routes of retain tokens: see `routers`
    wagle      the weight mask

Finished stages are part of the step's state: preparing again after a restore runs only the missing ones. With a
`cache_dir` the references are on disk, not in memory, written batch by batch and read by each step: an interrupted run
continues from there, and another recipe that needs the same values of the same model and documents finds them. A state
then names their folder, and needs it. Final hidden states are cached in bfloat16 (2 H bytes a token) or in `float8`
(H + 4, `reference_dtype` of the recipe), layer outputs in bfloat16, log-probs in float32.
A mask that is made in groups goes on from its last one there.
"""

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from moe_unlearn import files, masks, routers, seuf, trace, wagle
from moe_unlearn.config import COMPARE_COMPANIONS, Recipe
from moe_unlearn.lazy import each
from moe_unlearn.model import states as forward
from moe_unlearn.model.batches import Batch, forgotten, refusal, target_mask
from moe_unlearn.model.capture import collect_routing
from moe_unlearn.model.head import final_hidden_states, head_of, token_losses
from moe_unlearn.model.modes import evaluation_mode
from moe_unlearn.prepare import float8, reference
from moe_unlearn.prepare.preparation import CACHED_SIDES, CACHES, Calibration, Preparation
from moe_unlearn.prepare.rows import RowCache, content_keys
from moe_unlearn.ranks import Ranks, gathered, shared_work, together
from moe_unlearn.sharding import whole

STAGES = ("trace", "seuf", "reference", "kl_floor", "routers", "wagle")
CHOOSING = ("trace", "seuf")  # stages that choose experts, by forward passes only; they cache only token weights


def needed(recipe: Recipe) -> list[str]:
    """Return the stages that this recipe needs, in order."""
    forget, retain, mollm = recipe.forget.objective, recipe.retain.objective, recipe.mollm
    uses = {
        "trace": recipe.trace is not None,
        "seuf": recipe.scope.kind == "seuf",
        "reference": forget in ("npo", "undial", *COMPARE_COMPANIONS)
        or retain in ("kl", "embed_diff")
        or uses_kl(recipe),
        "kl_floor": mollm is not None and mollm.kl,
        "routers": recipe.router.mode == "invariant" or recipe.router.stability_every > 0 or recipe.router.correct,
        "wagle": recipe.wagle is not None,
    }
    return [stage for stage in STAGES if uses[stage]]


@dataclass(frozen=True)
class _Work:
    """Holds what a stage works on; `ranks` share it, `folder` keeps references."""

    model: nn.Module
    recipe: Recipe
    prepared: Preparation
    forget: Sequence[Batch]
    retain: Sequence[Batch]
    folder: Path | None
    named: Path | None  # the first rank's
    ranks: Ranks | None


def prepare(
    model: nn.Module,
    recipe: Recipe,
    prepared: Preparation,
    forget: Sequence[Batch],
    retain: Sequence[Batch],
    on_stage: Callable[[str], None] | None = None,
    cache_dir: str | Path | None = None,
    ranks: Ranks | None = None,
    stages: Sequence[str] = STAGES,
) -> None:
    """Run those of `stages` that the recipe needs and that are not yet in `prepared.done`.

    `on_stage(name)` is called after each one. `cache_dir` is the folder where references are kept, between runs
    too, and where those of a state that was loaded are looked for; None keeps them in memory. All ranks share the work
    on the same rows (ValueError if they differ), one batch each at a time, and take the first rank's experts and mask.
    After an earlier preparation, as in a resume, all rows must be among those that it saw, whatever the recipe;
    otherwise ValueError is raised with the row's number.
    """
    ranks = Ranks(model) if ranks is None else ranks
    rows, _ = ranks.together(
        lambda: (_checked_rows(prepared, forget, retain), True),
        lambda: {
            "the rows of prepare()": [[content_keys(batch) for batch in side] for side in (forget, retain)],
            "the stages that prepare() has run": prepared.done,
        },
    )
    # all ranks share the work, and sharded weights need all of them in every forward pass
    shared = ranks if ranks.count > 1 else None

    def own_folder() -> Path | None:
        return None if cache_dir is None else files.make_folder(cache_dir)

    if shared is None:
        folder = named = own_folder()
    else:
        folder, told = gathered(own_folder, lambda made: made and str(made), ranks.group)
        folder, named = (folder, Path(told[0])) if all(told) else (None, None)
    ranks.together(lambda: (prepared.find(folder), True))
    work = _Work(model, recipe, prepared, forget, retain, folder, named, shared)
    with evaluation_mode(model):
        for stage in needed(recipe):
            if stage in stages and stage not in prepared.done:
                _STAGES[stage](work)
                ranks.share_(prepared.chosen())
                prepared.rows = rows
                prepared.done.append(stage)
                if on_stage is not None:
                    on_stage(stage)
    prepared.rows = rows


def _checked_rows(prepared: Preparation, forget: Sequence[Batch], retain: Sequence[Batch]) -> dict[str, list[str]]:
    """Return the content keys of each side's rows, or those of an earlier preparation, which must hold all of these."""
    sides = {
        "forget": forget,
        "refusals": each(forget, refusal) if all("idk_input_ids" in batch for batch in forget) else [],
        "retain": retain,
    }
    for name, side in CACHED_SIDES.items():
        cache = getattr(prepared, name)
        for batch in sides[side] if cache is not None else ():
            cache.known_keys(batch)
    rows = {side: [key for batch in batches for key in content_keys(batch)] for side, batches in sides.items()}
    if prepared.rows is None:
        return rows
    for side, keys in rows.items():
        seen = set(prepared.rows[side])
        for i, key in enumerate(keys):
            if key not in seen:
                raise ValueError(
                    f"row {i} of the {side} rows is none of the {len(seen)} that prepare() saw before: its tokens or "
                    "labels differ; resume with the rows, the tokenizer and the settings of `data` that the run began "
                    "with, or prepare again from the original model"
                )
    return prepared.rows


def _trace(work: _Work) -> None:
    model, prepared, ranks, settings = work.model, work.prepared, work.ranks, work.recipe.trace
    assert settings is not None  # the stage runs for this lever only
    f = trace.routing_frequencies(model, work.forget, ranks)
    r = trace.routing_frequencies(model, work.retain, ranks)
    prepared.frequencies = {"forget": f, "retain": r}
    prepared.selected = selected = trace.select_experts(
        f,
        r,
        per_layer=settings.per_layer,
        min_ratio=settings.min_ratio,
        min_load=settings.min_load,
        # in the scope "experts" only TRACE's experts train: without any there would be no weight to train
        allow_empty=settings.allow_empty and work.recipe.scope.kind != "experts",
    )
    if not selected.any():
        prepared.inactive = True
        return
    target = trace.calibration_target(f, r, settings.eta)
    counts = [int(target_mask(batch).sum()) for batch in work.retain]

    def hits_of(i: int) -> Tensor:
        batch = work.retain[i]
        return trace.selected_hits(collect_routing(model, batch)[:, target_mask(batch).flatten()], selected)

    hits = torch.cat([own for _, own in shared_work(hits_of, counts, ranks)])
    result = trace.weights_of_hits(hits, selected, target, cap=settings.cap)
    numbers = torch.tensor([result.bias, result.ess], dtype=torch.float64)
    if ranks is not None:
        # processors of several kinds may round the solution otherwise
        ranks.share_([result.weights, result.achieved, result.tilt, numbers])
    bias, ess = numbers.tolist()
    largest = float(result.weights.max())
    prepared.calibration = Calibration(result.tilt, bias, result.achieved, ess, largest_weight=largest)
    if settings.refresh == "offline":
        prepared.token_weights = token_weights = RowCache(CACHES["token_weights"])
        for batch, part in zip(work.retain, result.weights.split(counts), strict=True):
            mask = target_mask(batch)
            weights = part.new_zeros(mask.shape)
            weights[mask] = part
            token_weights.put(batch, weights)


def _seuf(work: _Work) -> None:
    work.prepared.selected = seuf.select(seuf.affinity(work.model, work.forget, work.ranks))


@torch.no_grad()
def _reference(work: _Work) -> None:
    model, recipe, prepared, folder = work.model, work.recipe, work.prepared, work.folder
    forget, retain = work.forget, work.retain
    trained_head = head_of(model)
    with reference.reference_model(model, recipe.reference):
        head = head_of(model)
        hidden, layer = (head.weight.shape[1],), recipe.forget.layer
        with_adapters = recipe.reference != "base"
        digest = None if folder is None else reference.model_digest(model, adapters=with_adapters, ranks=work.ranks)

        def cached(
            kind: str,
            batches: Sequence[Batch],
            compute: Callable[[Batch], Tensor],
            dtype: torch.dtype,
            shape: tuple[int, ...] = (),
            **settings: int,
        ) -> None:
            store = None
            if digest is not None and folder is not None and work.named is not None:
                store = reference.open_store(folder, work.named, kind, digest, dtype, shape, **settings)
            setattr(prepared, kind, reference.fill(RowCache(CACHES[kind]), batches, compute, store, work.ranks))

        def token_logprobs(batch: Batch) -> Tensor:
            return -token_losses(model, batch, kind="nll").float()

        kept_dtype, width = float8.form(*hidden, recipe.reference_dtype)

        def hidden_states(batch: Batch) -> Tensor:
            return float8.coded(final_hidden_states(model, batch), recipe.reference_dtype)

        def layer_states(batch: Batch) -> Tensor:
            return forward.layer_states(model, batch, layer).to(torch.bfloat16)

        if recipe.forget.objective in ("npo", "idk_dpo"):
            cached("ref_logprobs", forget, token_logprobs, torch.float32)
        if recipe.forget.objective in COMPARE_COMPANIONS:
            cached("ref_logprobs_idk", each(forget, refusal), token_logprobs, torch.float32)
        if uses_kl(recipe):
            cached("ref_hidden_states", retain, hidden_states, kept_dtype, (width,))
        if recipe.forget.objective == "undial":
            cached("ref_hidden_states_forget", forget, hidden_states, kept_dtype, (width,))
        if needs_head(recipe):
            parts = reference.head_to_keep(trained_head, head)
            prepared.ref_lm_head, prepared.ref_bias = (
                None if kept is None else whole(kept.detach()).clone() for kept in parts
            )
        if recipe.retain.objective == "embed_diff":
            cached("ref_layer_states", retain, layer_states, torch.bfloat16, hidden, layer=layer)


@torch.no_grad()
def _kl_floor(work: _Work) -> None:
    model, retain, prepared = work.model, work.retain, work.prepared
    kept = prepared.ref_hidden_states
    assert kept is not None  # the stage `reference` runs before this one

    def summed(i: int) -> Tensor:
        batch = retain[i]
        states = final_hidden_states(model, batch)
        per_token = token_losses(
            model,
            batch,
            kind="kl",
            hidden_states=states,
            ref_hidden_states=float8.unpacked(kept.get(batch)).to(states.dtype),
            **prepared.ref_head,
        )
        return per_token.double().sum().view(1)

    with reference.reference_model(model, work.recipe.reference):
        total = sum(float(value) for _, value in shared_work(summed, [1] * len(retain), work.ranks))
    positions = sum(int(target_mask(batch).sum()) for batch in retain)
    prepared.kl_floor = total / max(positions, 1)


def _routers(work: _Work) -> None:
    # each rank watches all rows and holds one batch; all take what the first has found
    settings, prepared = work.recipe.router, work.prepared
    if settings.mode == "invariant":
        prepared.routers = routers.collect(work.model, work.retain, settings)
    watched = routers.watched_batches(work.retain) if settings.stability_every or settings.correct else []
    if watched:
        prepared.routes = routers.routes(work.model, watched)
    if settings.correct:
        prepared.router_logits = routers.logits(work.model, watched)


def _wagle(work: _Work) -> None:
    settings = work.recipe.wagle
    assert settings is not None  # the stage runs for this lever only
    if settings.mask is not None:
        load = partial(masks.load, settings.mask, work.model)
        work.prepared.mask = load() if work.ranks is None else together(load, work.ranks.group)
        return
    rule = wagle.Rule(settings.keep, settings.gamma, settings.official, settings.accumulation)
    forget = each(work.forget, partial(forgotten, work.recipe))
    with contextlib.ExitStack() as inside:
        resume = None
        if work.folder is not None:
            resume = inside.enter_context(reference.resume_of(work.model, work.folder, ranks=work.ranks))
        work.prepared.mask = wagle.mask_of(
            work.model, forget, work.retain, rule, memory=settings.memory, ranks=work.ranks, resume=resume
        )


_STAGES = {
    "trace": _trace,
    "seuf": _seuf,
    "reference": _reference,
    "kl_floor": _kl_floor,
    "routers": _routers,
    "wagle": _wagle,
}


def needs_head(recipe: Recipe) -> bool:
    """Return whether logits of the reference are computed, which need its head where the trained model's differs."""
    return uses_kl(recipe) or recipe.forget.objective == "undial"


def uses_kl(recipe: Recipe) -> bool:
    """Return whether the recipe has a KL to the reference on retain rows: as retain objective or in MOLLM."""
    return recipe.retain.objective == "kl" or (recipe.mollm is not None and recipe.mollm.kl)
