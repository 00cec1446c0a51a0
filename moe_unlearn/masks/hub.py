"""Converts weights between their names and shapes in memory and those on the hub, as `save_pretrained` does.

The hub holds experts one by one (`experts.3.gate_proj.weight`), transformers fused (`experts.gate_up_proj` [E, 2I, H]).
The conversions are transformers' own, of every family that has some.
"""

import copy
from collections.abc import Callable, Collection, Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
    revert_weight_conversion,
)


def to_hub(model: PreTrainedModel, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Convert tensors with the names and shapes of a model in memory to those of a checkpoint on disk."""
    converted: dict[str, Tensor] = revert_weight_conversion(model, dict(tensors))
    return converted


def from_hub(
    model: PreTrainedModel, names: Collection[str], read: Callable[[str], Tensor], wanted: Collection[str]
) -> Iterator[tuple[str, Tensor]]:
    """Undo `to_hub` of the tensors that `read` returns by `names`: yield those `wanted`, one after the other.

    No more is in memory than what one of them is made of, and that once more. Raises ValueError if transformers'
    conversions do not go both ways, or if one that is wanted does not come.
    """
    conversions = getattr(model, "_weight_conversions", None) or get_model_conversion_mapping(model, add_legacy=False)
    renamings = [c for c in conversions if isinstance(c, WeightRenaming)]
    converters = [c for c in conversions if isinstance(c, WeightConverter)]
    by_pattern = {pattern: c for c in converters for pattern in c.source_patterns}
    left = {*wanted}
    sources: dict[str, list[tuple[str, str | None]]] = {}
    # sorted so that experts are stacked in the order of their numbers
    for name in sorted(names, key=dot_natural_key):
        target, pattern = rename_source_key(name, renamings, converters)
        sources.setdefault(target, []).append((name, pattern))
    for target, named in sources.items():
        parts = {name: read(name) for name, _ in named}
        out = {}
        collected: WeightConverter | None = None
        for name, pattern in named:
            if pattern is None:
                out[target] = parts[name]
                continue
            collected = collected or copy.deepcopy(by_pattern[pattern])
            tensor: Any = parts[name]  # transformers asks for a future of one, and takes either
            collected.add_tensor(target, name, pattern, tensor)
        if collected is not None:
            converted = collected.convert(target, model=model, config=model.config)
            out |= {name: t[0] if isinstance(t, list) else t for name, t in converted.items()}
        back = to_hub(model, out) if out.keys() <= left else {}
        if back.keys() != parts.keys() or not all(torch.equal(back[name], parts[name]) for name in back):
            raise ValueError(f"transformers' weight conversions of {type(model).__name__} do not go both ways")
        left -= out.keys()
        yield from out.items()
    if left:
        raise ValueError(f"transformers' weight conversions of {type(model).__name__} make no {sorted(left)[0]}")
