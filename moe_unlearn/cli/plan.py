"""The plans that `moe-unlearn run`, `stats`, `mask` and `eval` print with `--dry-run`."""

import argparse
import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase as Tokenizer

from moe_unlearn import data, metrics
from moe_unlearn.cli.arguments import loading_of, sets_of
from moe_unlearn.cli.sides import batches_of
from moe_unlearn.config import Recipe
from moe_unlearn.data.of_recipe import pair_collator
from moe_unlearn.data.pairs import side_batches
from moe_unlearn.model.batches import Batch
from moe_unlearn.model.loading import load_tokenizer, meta_model
from moe_unlearn.plan import Mesh, Plan
from moe_unlearn.plan.amounts import amount
from moe_unlearn.plan.stages import StagePlan, default_memory, mask_stage, stats_plan, work_plan
from moe_unlearn.runs.planning import SIZES, plan_of_config
from moe_unlearn.runs.run import CHECKPOINTED, SIDES, Run, held
from moe_unlearn.step import UnlearnStep

_LONGEST = 128  # texts of a set with which an evaluation is planned: the largest batch of any metric


def show(options: argparse.Namespace, made: Plan | StagePlan) -> None:
    """Print a plan, to read or with --json for machines: all its fields and the peak, in bytes."""
    print(json.dumps(dataclasses.asdict(made) | {"peak": made.peak}, indent=1) if options.json else made)


def of_config(options: argparse.Namespace, recipe: Recipe, mesh: Mesh | None) -> Plan:
    """Plan for the config that `--model-config` names, without weights and data."""
    return plan_of_config(options.model_config, recipe, mesh=mesh, fits=options.fits or SIZES)


def of_mesh(
    options: argparse.Namespace,
    recipe: Recipe,
    mesh: Mesh | None,
    tokenizer: Tokenizer,
    sets: Mapping[str, Sequence[data.Example]],
) -> Plan:
    """Plan for ranks that share out the weights of `--model`, or for rounded ones; its config alone is read."""
    assert recipe.data.model is not None
    forget, retain = sets["forget"], held(recipe, sets)
    pairs = data.ForgetRetainDataset(forget, retain, seed=recipe.seed, retain_per_forget=recipe.retain_per_forget)
    collator = pair_collator(recipe, tokenizer, forget, None, sets.get("unseen"))
    batches = [list(side_batches(pairs, side, recipe.batch_size, collator)) for side in SIDES]
    fits = options.fits or (() if mesh is None else SIZES)
    made = plan_of_config(recipe.data.model, recipe, *batches, mesh=mesh, fits=fits, dtype=options.dtype)
    made.notes.append("planned from the model's config: experts and masks are assumed at their largest")
    if recipe.recomputes:
        made.notes.append(CHECKPOINTED)
    return made


def of_weights(options: argparse.Namespace, run: Run) -> Plan:
    """Plan for a model that is loaded, whose experts and mask are chosen first; what makes it fit is of its config."""
    made = run.plan(verify=options.verify, fits=options.fits)
    if options.trust_remote_code:
        made.notes.append("code that comes with the model was run (--trust-remote-code)")
    return made


def of_stats(options: argparse.Namespace) -> StagePlan:
    """Plan `moe-unlearn stats` from the model's config and the data."""
    model, sides, device = _unloaded(options)
    return stats_plan(model, [*sides["forget"], *sides["retain"]], device)


def of_mask(options: argparse.Namespace) -> StagePlan:
    """Plan `moe-unlearn mask` from the model's config and the data."""
    model, sides, device = _unloaded(options)
    settings = {"keep": options.keep, "memory": options.memory or default_memory(model, device)}
    if options.official:
        settings |= {"official": True, "accumulation": options.accumulation}
    return mask_stage(UnlearnStep(model, Recipe.from_dict({"wagle": settings})).view(), sides, device)


def of_eval(options: argparse.Namespace) -> StagePlan:
    """Plan `moe-unlearn eval` from the models' configs and the longest texts; models are in memory one at a time."""
    _alone(options)
    how = loading_of(options)
    tokenizer = load_tokenizer(options.model, how)
    sets = sets_of(options, tokenizer, ("forget", "retain", "holdout"))
    longest: dict[str, Any] = {side: sorted(examples, key=len)[-_LONGEST:] for side, examples in sets.items()}
    effects = metrics.SideEffects(
        tokenizer, forget=longest["forget"], retain=longest["retain"], batch_size=options.batch_size
    )

    def measured(model: nn.Module) -> None:
        metrics.evaluate(model, tokenizer, **longest)
        if options.before is not None:
            effects.observe(model)

    works: dict[str, tuple[str | None, Callable[[Any], object]]] = {
        "the model": (options.model, measured),
        "the reference": (
            options.reference,
            lambda model: metrics.min_k_auc(model, tokenizer, longest["forget"], longest["holdout"]),
        ),
        "the model before": (options.before, effects.observe),
    }
    device, special = torch.device(how.device_map or "cpu"), data.special_ids(tokenizer)
    token = next(i for i in range(len(special) + 1) if i not in special)  # one that ends no answer
    made = {
        name: work_plan("eval", meta_model(source, dtype=options.dtype), device, work, token=token)
        for name, (source, work) in works.items()
        if source is not None
    }
    most = max(made, key=lambda name: made[name].peak)
    peaks = ", ".join(f"{name} {amount(plan.peak)}" for name, plan in made.items())
    note = f"one model after the other: {peaks}" if len(made) > 1 else ""
    return dataclasses.replace(made[most], note=note)


def _alone(options: argparse.Namespace) -> None:
    """Raise ValueError for a mesh, which a run alone is planned for."""
    if options.mesh is not None:
        raise ValueError("--mesh with --dry-run plans a run; leave it out to plan this verb on one process")


def _unloaded(options: argparse.Namespace) -> tuple[nn.Module, dict[str, list[Batch]], torch.device]:
    """Return the model on the meta device, the batches of both sides, and the device for which it is planned."""
    _alone(options)
    model = meta_model(options.model, dtype=options.dtype)
    how = loading_of(options)
    tokenizer = load_tokenizer(options.model, how)
    sides = batches_of(options, model, tokenizer, sets_of(options, tokenizer), planned=True)
    return model, {side: [*batches] for side, batches in sides.items()}, torch.device(how.device_map or "cpu")
