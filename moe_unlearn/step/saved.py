"""What ranks save and load of a step whose weights they share out, on any number of ranks and under any engine.

    sharded.save(folder, saved.tree_of(step))
    state = sharded.load(folder, states=["step"])["step"]
    step.load_state_dict(state)
    saved.load_weights(step, folder)
    saved.load_optimizer(step, folder, state)

Every rank makes each call. One process reads what ranks have saved too, and goes on from there.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moe_unlearn.checkpoint import sharded
from moe_unlearn.checkpoint.optimizer import from_tree, part_of, to_tree
from moe_unlearn.ranks import gather
from moe_unlearn.sharding import reshard
from moe_unlearn.step.unlearn import UnlearnStep


def tree_of(step: UnlearnStep) -> dict[str, Any]:
    """Return what this rank holds of weights, optimizer and step, as `checkpoint.sharded` takes it."""
    reshard(step.model)
    optimizer, named = step.optimizer, step.model.named_parameters()
    states = {name: to_tree(optimizer.state[p], part_of(p)) for name, p in named if optimizer.state.get(p)}
    state = step.state_dict()
    del state["optimizer"]  # its states are those of whole parameters in `states`
    # a rank without rows of a parameter has no state of it, but has to ask for it with the others
    state["trained"] = sorted({name for names in gather(list(states), step.ranks.group) for name in names})
    state["groups"] = [{k: v for k, v in g.items() if k not in ("params", "masks")} for g in optimizer.param_groups]
    return {"model": step.model.state_dict(), "optimizer": states, "step": state}


def load_weights(step: UnlearnStep, folder: Path) -> None:
    """Fill this rank's part of the weights; CheckpointError on all ranks, and no change, if they do not fit."""
    reshard(step.model)
    sharded.load(folder, {"model": step.model.state_dict()}, states=["model"], group=step.ranks.group)


def load_optimizer(step: UnlearnStep, folder: Path, state: Mapping[str, Any]) -> None:
    """Load the optimizer's options and this rank's part of its states; `state` is the "step" of the same folder."""
    named = dict(step.model.named_parameters())
    parts = {name: part_of(named[name]) for name in state["trained"]}
    found = sharded.load(folder, {"optimizer": parts}, states=["optimizer"], group=step.ranks.group)["optimizer"]
    step.optimizer.state.clear()
    for name, part in parts.items():
        if own := from_tree(found[name], part):
            step.optimizer.state[named[name]] = own
    for group, options in zip(step.optimizer.param_groups, state["groups"], strict=True):
        group.update(options)
