"""Checks that stop a step, or refuse to begin one."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import nn

from moe_unlearn.config import Recipe
from moe_unlearn.errors import NonFiniteError, NotPreparedError, RetainBudgetError
from moe_unlearn.experts import experts_modules, is_parallel
from moe_unlearn.model.finite import not_finite
from moe_unlearn.model.scope import wrapped_name
from moe_unlearn.prepare.preparation import Preparation
from moe_unlearn.prepare.stages import needed

if TYPE_CHECKING:
    from moe_unlearn.step.unlearn import UnlearnStep

# keys of a recipe in which a saved state may differ from the step that takes it
MAY_DIFFER = ("name", "steps", "data", "guard", "retain_budget", "checkpointing", "trainer")
# by section, its keys that change no result
CHANGE_NOTHING = {"wagle": ("memory",), "optimizer": ("offload",), "adapter": ("merge",)}


def check_prepared(recipe: Recipe, prepared: Preparation) -> None:
    """Raise NotPreparedError, which names them, if stages that the recipe needs have not run."""
    missing = [stage for stage in needed(recipe) if stage not in prepared.done]
    if missing:
        raise NotPreparedError(
            f"recipe {recipe.name!r} needs prepare(forget_batches, retain_batches) first; "
            f"stages not run: {', '.join(missing)}"
        )


def check_open(is_open: bool) -> None:
    """Raise RuntimeError for a step that was closed."""
    if not is_open:
        raise RuntimeError(
            "the step is closed, and its model has the experts and the `requires_grad` flags from before: make another "
            "UnlearnStep of the model to go on"
        )


def check_finished(under_way: bool) -> None:
    """Raise RuntimeError for a step that an error left while it updated weights."""
    if under_way:
        raise RuntimeError(
            "an error left this step while its update was under way, so that some weights may have changed and others "
            "not: restore the model and then the step (load_state_dict), or make another UnlearnStep of a whole model"
        )


def check_recipe(recipe: Recipe, saved: dict) -> None:
    """Raise ValueError if a state with the `saved` recipe belongs to another recipe."""
    own, saved = _deciding(recipe.to_dict()), _deciding(saved)
    different = [k for k in own if k not in MAY_DIFFER and own[k] != saved.get(k)]
    if different:
        name, was, now = different[0], saved.get(different[0]), own[different[0]]
        if isinstance(was, dict) and isinstance(now, dict):  # of a lever, the first key that differs
            key = next(key for key in {**now, **was} if now.get(key) != was.get(key))
            name, was, now = f"{name}.{key}", was.get(key), now.get(key)
        raise ValueError(f"the state belongs to another recipe: {name} was {was!r}, is {now!r}")


def _deciding(recipe: dict) -> dict:
    """Return the keys of a recipe but for those that change no result."""
    kept = dict(recipe)
    for lever, keys in CHANGE_NOTHING.items():
        if isinstance(kept.get(lever), dict):
            kept[lever] = {key: value for key, value in kept[lever].items() if key not in keys}
    return kept


def check_adapters(model: nn.Module) -> None:
    """Raise ValueError, which names them, if adapters change weights of experts that are shared out over ranks.

    An adapter is made for the weight of all experts, and a rank computes with those of its own.
    """
    for name, module in experts_modules(model).items():
        wrapper = wrapped_name(name)
        if is_parallel(module) and wrapper != name:
            raise ValueError(
                f"{wrapper} has adapters on weights that expert parallelism shares out, which is not supported; "
                "expected adapters on other modules alone, experts that FSDP2 shares out (ep_size=1), or weights with "
                "their adapters merged (merge_and_unload) and saved before they are loaded with ep_size"
            )


def check_finite(metrics: dict[str, float], steps: int) -> None:
    """Raise NonFiniteError, which states the number of steps done, if a loss is not finite."""
    bad = [f"{name} is {value}" for name, value in metrics.items() if not math.isfinite(value)]
    if bad:
        raise NonFiniteError(f"{', '.join(bad)}: stopped before the update; {steps} steps done")


def check_dtypes(model: nn.Module) -> None:
    """Raise ValueError, which says what to do, if weights that train are float16.

    Their gradients and updates underflow without loss scaling, which the step does not do, and overflow at 65,504.
    """
    narrow = [name for name, p in model.named_parameters() if p.requires_grad and p.dtype == torch.float16]
    if narrow:
        raise ValueError(
            f"{narrow[0]} is float16, in which updates are lost or overflow: expected weights in bfloat16 or float32, "
            "such as by dtype=torch.bfloat16 in from_pretrained, or --dtype bfloat16"
        )


def check_weights(step: "UnlearnStep") -> None:
    """Raise NonFiniteError, on all ranks, which names some, if weights that may train are NaN or infinite.

    Losses and gradients tell of those only in the step that follows. The weights are read once, and nothing is copied.
    """
    bad = not_finite((name, p) for name, p in step.model.named_parameters() if p.requires_grad)
    count = round(step.ranks.sums([len(bad)])[0])
    if count:
        named = f": {', '.join(bad[:3])}" if bad else ""
        raise NonFiniteError(
            f"{count} of the trained parameters hold NaN or infinite weights after {step.steps} steps{named}; expected "
            "finite ones: a smaller optimizer.lr, optimizer.max_grad_norm or, of a narrow dtype, bfloat16 may help"
        )


def check_budget(recipe: Recipe, metrics: dict[str, float], steps: int) -> None:
    """Raise RetainBudgetError, which states the number of steps done, if the retain loss exceeds the budget."""
    budget, retain = recipe.retain_budget, metrics.get("retain_loss")
    if budget is not None and retain is not None and retain > budget:
        raise RetainBudgetError(
            f"retain_loss is {retain:.6g}, above the budget of {budget:.6g}: stopped before the update; "
            f"{steps} steps done, weights unchanged by this one"
        )


@contextmanager
def left_clean(step: "UnlearnStep") -> Iterator[None]:
    """Have whatever leaves the block by an exception leave no gradient and no micro-batch of the step in progress.

    Those of micro-batches before stay where this one had not begun to change gradients. NonFiniteError and
    RetainBudgetError end the step in any case, and get the message of `stopped`.
    """
    try:
        yield
    except (NonFiniteError, RetainBudgetError) as error:
        step.discard()
        if isinstance(error, RetainBudgetError) or not error.updated:
            step.gradients.under_way = False  # updates whose checks were put off have written nothing
        raise stopped(error, step.restore) from None
    except BaseException as error:  # Ctrl-C too
        try:
            if step.gradients.touched:
                step.discard()
            elif not step.tally.parts:
                step.tally.clear()  # the step is no thread's again
        finally:
            raise error  # whatever becomes of discarding, such as where FSDP2 waits for a rank that is lost


def stopped(
    error: NonFiniteError | RetainBudgetError, restore: Callable[[], str] | None
) -> NonFiniteError | RetainBudgetError:
    """Return the error of a step that stopped, which says what state the weights are in, after `restore` if need be."""
    if isinstance(error, RetainBudgetError):
        return error
    if not error.updated:
        return NonFiniteError(f"{error}, weights unchanged by this one")
    restored = "no checkpoint was restored" if restore is None else restore()
    return NonFiniteError(f"{error}; updated already: {', '.join(error.updated)}; {restored}", error.updated)
