"""Fills a model with the weights of a folder that `save_pretrained` wrote, also where ranks share the weights out."""

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from moe_unlearn.checkpoint import CheckpointError
from moe_unlearn.delta import ModelFolder
from moe_unlearn.masks.hub import from_hub
from moe_unlearn.model.saving import has_adapters, is_savable, saved_kinds, saved_state
from moe_unlearn.model.whole import check_finite, whole_model
from moe_unlearn.ranks import Ranks
from moe_unlearn.sharding import held_rows, part, reshard


@torch.no_grad()
def load_pretrained(model: nn.Module, folder: Path, ranks: Ranks) -> None:
    """Fill the weights and buffers of a model, of which each rank may have a part; every rank calls this.

    transformers converts what the hub holds in another form as `from_pretrained` does. One process reads what it has
    saved weight by weight, so that no other model is in memory. Where weights are shared out, the first rank alone
    reads them, in memory for all of them, and sends one after the other. Raises CheckpointError, and fills nothing, if
    they are of another model, or not all there; an error of the first rank is raised on all.
    """
    if not ranks.sharded and _filled(model, folder):
        return
    reshard(model)
    state = model.state_dict(keep_vars=True)

    def read() -> tuple[dict[str, Tensor], bool]:
        if ranks.sharded and not ranks.first:
            return {}, True
        dtypes = {p.dtype for p in model.parameters()}
        # float32 holds every narrower value exactly; a model of one dtype is loaded in that dtype
        dtype = dtypes.pop() if len(dtypes) == 1 else torch.float32
        try:
            found = whole_model(folder, _plain(model), "the model", folder, dtype=dtype).state_dict()
        except ValueError as error:
            raise CheckpointError(str(error)) from error
        shapes = [{name: tuple(t.shape) for name, t in each.items()} for each in (state, found)]
        for name in sorted(shapes[0].keys() | shapes[1].keys()):
            own, other = (each.get(name) for each in shapes)
            if own != other:
                raise CheckpointError(f"{folder}: {name} has the shape {other} there, {own} in the model")
        return found, True

    whole, _ = ranks.together(read)
    for name, own in state.items():
        value = whole.get(name)
        if ranks.sharded:
            value = torch.empty(own.shape, dtype=own.dtype) if value is None else value.to(own.dtype)
            ranks.share_([value])
        assert value is not None  # a rank that did not read has got it
        rows = held_rows(own)
        part(own).copy_(value[rows.start : rows.stop] if own.dim() else value)


def _filled(model: Any, folder: Path) -> bool:
    """Fill a model with what `save_pretrained` wrote of one like it, weight by weight; return False for all else.

    Raises CheckpointError for numbers that are not finite, and for a file that cannot be read.
    """
    if not is_savable(model) or has_adapters(model) or model._keys_to_ignore_on_save:
        return False
    try:
        found = ModelFolder(folder)
    except (OSError, ValueError):
        return False  # transformers says what is wrong, or knows another form
    shapes = ({name: kind.shape for name, kind in kinds.items()} for kinds in (found.kinds, saved_kinds(model)))
    if next(shapes) != next(shapes):
        return False
    state = saved_state(model)
    with ExitStack() as opened:
        try:
            files = {name: opened.enter_context(safe_open(folder / name, "pt")) for name in found.files}

            def read(name: str) -> Tensor:
                stored: Tensor = files[found.tensors[name].path.name].get_tensor(name)
                return stored

            check_finite(folder, ((name, read(name)) for name in found.tensors))
        except (OSError, ValueError, SafetensorError) as error:
            raise CheckpointError(str(error)) from error
        try:
            for name, value in from_hub(model, found.tensors, read, state):
                state[name].copy_(value)
        except ValueError:  # conversions that do not go both ways: what is filled is filled again
            return False
    return True


def _plain(model: nn.Module) -> Any:
    """Return the class of a model as it was before FSDP2 put one of its own in its place."""
    # imported here because it is slow to import
    from torch.distributed.fsdp import FSDPModule

    return next(kind for kind in type(model).__mro__ if not issubclass(kind, FSDPModule))
