"""Finds the calls of ops that a run of a recipe makes, so that their kernels are compiled before; a config is enough.

Steps of the recipe are rehearsed (`plan.dry_run`) on the first layers of the model, as many as have all kinds of them,
with batches of several lengths. `regress.beforehand` compiles what the calls launch.

Not rehearsed is what other values than shapes decide: `retain_weights` goes by the number of experts that TRACE
selects, and `optimizer.offload` by the pieces that it cuts. Their kernels are compiled when they are first launched.
"""

from collections.abc import Hashable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils._pytree import tree_map

from moe_unlearn import backend
from moe_unlearn.config import Recipe
from moe_unlearn.experts import enable
from moe_unlearn.model.adapters import adapted
from moe_unlearn.model.loading import meta_model
from moe_unlearn.plan.dry_run import watched
from moe_unlearn.plan.rehearse import Setting, rehearsed
from moe_unlearn.plan.repeat import depths
from moe_unlearn.plan.stages import mask_stage, stats_plan, work_plan
from moe_unlearn.regress.beforehand import Call, Form
from moe_unlearn.step import UnlearnStep

_SHORTEST = 16  # tokens of a row


def calls_of(source: str | Path, recipe: Recipe, *, dtype: str = "auto", lengths: Sequence[int] = ()) -> list[Call]:
    """Return the calls of ops of ours in a run of `recipe`, each once, from the config that `meta_model` finds.

    They are those of its steps, of its passes over routing and gradients beforehand, and of a forward pass alone. The
    batches have the recipe's rows, of `lengths` tokens; without them of the recipe's length, of a quarter of it, and so
    on down to 16. Raises ValueError for a model without a config, or one that the recipe does not fit or torch's fakes
    cannot run.
    """
    found: dict[Hashable, Call] = {}

    def watch(function: OpOverload, args: tuple, kwargs: dict) -> None:
        call = Call(function, tree_map(_form, args))
        found.setdefault(call.key(), call)

    model = adapted(meta_model(source, dtype=dtype), recipe)
    with backend.recording(), watched(watch):
        if layers := depths(model, recipe):
            model = adapted(meta_model(source, dtype=dtype, layers=layers[0]), recipe)
        for length in lengths or [*_lengths(recipe.data.max_length)]:
            try:
                _rehearse(model, recipe, _batch(recipe.batch_size, length))
            except (RuntimeError, TypeError) as error:
                why = next(iter(str(error).splitlines()), type(error).__name__)
                raise ValueError(f"a step of {recipe.name} on {source} cannot be rehearsed: {why}") from error
    return list(found.values())


def _rehearse(model: Any, recipe: Recipe, batch: dict[str, Tensor]) -> None:
    """Rehearse a forward pass with this batch, what a run makes beforehand, and steps."""
    device = torch.device("cpu")
    work_plan("forward", model, device, lambda twin: _forward(twin, batch))
    if recipe.trace is not None or recipe.scope.kind == "seuf":
        stats_plan(model, [batch], device)
    step = UnlearnStep(model, recipe)
    if recipe.wagle is not None and recipe.wagle.mask is None:
        mask_stage(step.view(), {"forget": [batch], "retain": [batch]}, device)
    if recipe.recomputes:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
    rehearsed(step, (), Setting(None, device, {"forget": batch, "retain": batch}, 0))


def _forward(model: Any, batch: dict[str, Tensor]) -> None:
    with enable(model), torch.no_grad():
        model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])


def _lengths(longest: int) -> Iterator[int]:
    yield longest
    while longest > _SHORTEST:
        longest = max(longest // 4, _SHORTEST)
        yield longest


def _batch(rows: int, length: int) -> dict[str, Tensor]:
    ids = torch.ones(rows, length, dtype=torch.int64)
    batch = {"input_ids": ids, "attention_mask": ids, "labels": ids}
    return batch | {f"idk_{key}": value for key, value in batch.items()}


def _form(value: object) -> object:
    return Form.of(value) if isinstance(value, Tensor) else value
