"""What a step saves and loads beside the weights, in one process or on ranks that share them out.

    state = step.state_dict()
    sharded.save(folder, {"model": step.model.state_dict(), "step": state})
    state = sharded.load(folder, {"model": step.model.state_dict()})["step"]
    step.load_state_dict(state)

Every rank makes each call. Any number of ranks, under any engine, and one process go on from what others have saved.
The optimizer's state may be as large as the weights; with these a rank reads its own part of it alone:

    sharded.save(folder, saved.tree_of(step))
    state = sharded.load(folder, states=["step"])["step"]
    step.load_state_dict(state)
    saved.load_weights(step, folder)
    saved.load_optimizer(step, folder, state)

The state of an optimizer of sharded weights is, by the names of parameters,

    states     what `checkpoint.optimizer.to_tree` makes of each, `Slices` of the whole; not in the "step" of a tree
    trained    the names of those that have a state on any rank
    groups     the options of each group, without masks, which are part of the preparation
"""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from moe_unlearn.ranks import gather
from moe_unlearn.sharding import reshard
from moe_unlearn.step.checks import check_finished, check_recipe

if TYPE_CHECKING:
    from moe_unlearn.step.unlearn import UnlearnStep


def state_of(step: "UnlearnStep", *, shared: bool) -> dict[str, Any]:
    """Return the state of a step; `shared` says that it is in `Slices`, which every rank can read.

    Raises RuntimeError after an error that left an update half-way.
    """
    check_finished(step.gradients.under_way)
    return {
        "recipe": step.recipe.to_dict(),
        "steps": step.steps,
        "done": step.done,
        "dual": step.objectives.dual.value,
        "prepared": step.prepared.state_dict(),
        "optimizer": _optimizer(step) if shared else step.optimizer.state_dict(),
    }


def load_state(step: "UnlearnStep", state: Mapping[str, Any]) -> None:
    """Restore what `state_of` returned in this or in another number of processes; ValueError for another recipe."""
    check_recipe(step.recipe, state["recipe"])
    step.discard()
    step.prepared.load_state_dict(state["prepared"])
    step.apply_preparation()
    step.rewind(state["steps"], state.get("dual", step.recipe.retain.alpha), None)
    step.done = state.get("done", False)
    if (optimizer := state.get("optimizer")) is not None:
        take_optimizer(step, optimizer)


def tree_of(step: "UnlearnStep") -> dict[str, Any]:
    """Return what this rank holds of weights, optimizer and step, as `checkpoint.sharded` takes it."""
    reshard(step.model)
    state = state_of(step, shared=True)
    return {"model": _weights(step), "optimizer": state["optimizer"].pop("states"), "step": state}


def load_weights(step: "UnlearnStep", folder: Path) -> None:
    """Fill this rank's part of the weights; CheckpointError on all ranks, and no change, if they do not fit."""
    from moe_unlearn.checkpoint import sharded

    reshard(step.model)
    sharded.load(folder, {"model": _weights(step)}, states=["model"], group=step.ranks.group)


def load_optimizer(step: "UnlearnStep", folder: Path, state: Mapping[str, Any]) -> None:
    """Load the optimizer's options and this rank's part of its states; `state` is the "step" of the same folder."""
    from moe_unlearn.checkpoint import sharded
    from moe_unlearn.checkpoint.optimizer import part_of

    named = dict(step.model.named_parameters())
    parts = {name: part_of(named[name]) for name in state["optimizer"]["trained"]}
    found = sharded.load(folder, {"optimizer": parts}, states=["optimizer"], group=step.ranks.group)["optimizer"]
    take_optimizer(step, {**state["optimizer"], "states": found})


def take_optimizer(step: "UnlearnStep", saved: Mapping[str, Any]) -> None:
    """Load the state of an optimizer, of sharded weights or of whole ones, into that of this step."""
    if "trained" not in saved and step.shards is None:
        step.optimizer.load_state_dict(dict(saved))
        return
    from moe_unlearn.checkpoint.optimizer import from_tree, part_of

    named, optimizer = dict(step.model.named_parameters()), step.optimizer
    if "trained" not in saved:
        saved = _shared(step, saved)
    optimizer.state.clear()
    for name, tree in saved.get("states", {}).items():
        if own := from_tree(tree, part_of(named[name])):
            optimizer.state[named[name]] = own
    for group, options in zip(optimizer.param_groups, saved["groups"], strict=True):
        group.update(options)


def _weights(step: "UnlearnStep") -> dict[str, Any]:
    """Return the weights that are saved: with adapters those that may train, since the others are the base model's."""
    state = step.model.state_dict()
    if not hasattr(step.model, "peft_config"):
        return state
    return {name: state[name] for name in step.weights.trainable if name in state}


def _optimizer(step: "UnlearnStep") -> dict[str, Any]:
    """Return the state of the optimizer in `Slices`."""
    # imported here, as above, because a single process never needs it and it is slow to import
    from moe_unlearn.checkpoint.optimizer import part_of, to_tree

    optimizer, named = step.optimizer, step.model.named_parameters()
    states = {name: to_tree(optimizer.state[p], part_of(p)) for name, p in named if optimizer.state.get(p)}
    # a rank without rows of a parameter has no state of it, but has to ask for it with the others
    trained = sorted({name for names in gather(list(states), step.ranks.group) for name in names})
    return {"states": states, "trained": trained, "groups": _options(optimizer.param_groups)}


def _shared(step: "UnlearnStep", whole: Mapping[str, Any]) -> dict[str, Any]:
    """Return in `Slices` what the optimizer of one process with whole weights has saved."""
    from moe_unlearn.checkpoint.optimizer import part_of, to_tree
    from moe_unlearn.checkpoint.sharded import Part

    names: dict[Tensor, str] = {p: name for name, p in step.model.named_parameters()}
    states = {}
    for slot in step.optimizer.slots():
        if values := whole["state"].get(slot.parameter_id):
            count = part_of(slot.parameter).count
            states[names[slot.parameter]] = to_tree(values, Part(0, count, count))
    return {"states": states, "groups": _options(whole["param_groups"])}


def _options(groups: list[dict]) -> list[dict[str, Any]]:
    """Return the options of groups that belong to a state, and not to the step that holds it."""
    left_out = {"params", "masks", "offload"}
    return [{key: value for key, value in group.items() if key not in left_out} for group in groups]
