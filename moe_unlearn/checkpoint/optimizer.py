"""Translates what an optimizer keeps of one parameter between this rank's rows and the whole parameter.

    tree = {name: to_tree(optimizer.state[p], part_of(p)) for name, p in parameters.items() if p in optimizer.state}
    sharded.save(folder, {"optimizer": tree})
    found = sharded.load(folder, {"optimizer": {name: part_of(p) for name, p in parameters.items()}})["optimizer"]
    optimizer.state[p] = from_tree(found[name], part_of(p))

This is for state in plain tensors, as that of `MaskedAdamW` and `MaskedSGD`: of all rows that the rank holds, or of
those of `state["slices"]`. The state of torch's own optimizers, in DTensors, is a tree as it is.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from moe_unlearn.checkpoint.sharded import Part, Slices
from moe_unlearn.sharding import held_rows


def part_of(parameter: Tensor) -> Part:
    """Return which rows of a parameter this rank holds, by arithmetic; all of one that is no DTensor.

    Raises ValueError for one that is shared out along another dimension than its first.
    """
    held, count = held_rows(parameter), len(parameter) if parameter.dim() else 1
    return Part(held.start, held.stop, count, parameter.device)


def to_tree(state: Mapping[str, Any], rows: Part) -> dict[str, Any]:
    """Return the state of a parameter's rows with its moments as `Slices` of the whole parameter."""
    slices = state.get("slices")
    tree = {}
    for name, value in state.items():
        if name == "slices":
            continue
        if isinstance(value, Tensor) and value.dim():
            ids = torch.arange(len(value), device=value.device) if slices is None else slices
            value = Slices(ids + rows.start, value, rows.count)
        tree[name] = value
    return tree


def from_tree(tree: Mapping[str, Any], rows: Part) -> dict[str, Any]:
    """Undo `to_tree` for the rows that this rank holds now; empty if none of them has a state.

    The `Slices` may be of more rows, such as all those of one process: `to_tree(state, Part(0, n, n))`.
    """
    state: dict[str, Any] = {}
    slices = None
    for name, value in tree.items():
        if isinstance(value, Slices):
            own = value.within(rows.start, rows.stop)
            slices, value = (own.ids - rows.start).to(rows.device), own.values.to(rows.device)
        elif isinstance(value, Tensor):
            value = value.cpu().clone()  # where optimizers count steps
        state[name] = value
    if slices is None:
        return state
    if len(slices) == 0:
        return {}
    return state if len(slices) == rows.stop - rows.start else state | {"slices": slices}
