"""Makes a model with whole weights like one whose weights ranks share out.

A model with FSDP2's hooks or transformers' expert parallelism cannot be copied. Its class and configuration make
another one, to which the adapters of a PeftModel are added.
"""

import copy
from typing import Any

import torch
from torch import nn

from moe_unlearn.model.modes import copy_modes, renamed_quietly
from moe_unlearn.model.saving import has_adapters


def unshared(model: nn.Module) -> nn.Module:
    """Return a model like `model`, whose weights are shared out, with whole weights of any values.

    Buffers, dtypes, modes and `requires_grad` flags are those of the model. No rank waits for another, and no random
    number is drawn. Raises ValueError for a model that is not as its configuration makes it.
    """
    own, buffers = dict(model.named_parameters()), dict(model.named_buffers())
    device = next(iter(own.values())).device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), torch.device(device):
        made: nn.Module = _made(model)
    shapes = ({name: p.shape for name, p in each.items()} for each in (own, dict(made.named_parameters())))
    if len({*map(repr, shapes)}) > 1 or dict(made.named_buffers()).keys() != buffers.keys():
        raise ValueError(f"expected a {type(model).__name__} as its configuration makes it; got other weights")
    for name, p in made.named_parameters():
        p.data = p.data.to(own[name].dtype)
        p.requires_grad_(own[name].requires_grad)
    for name, buffer in made.named_buffers():
        buffer.data = buffers[name].detach().clone()
    copy_modes(model, made)
    return made


def _made(model: Any) -> Any:
    base = model.get_base_model() if has_adapters(model) else model
    # FSDP2 has put a class of its own before that of the model
    family: Any = next(each for each in type(base).__mro__ if not each.__name__.startswith("FSDP"))
    made = family._from_config(copy.deepcopy(base.config), dtype=base.dtype)
    if base is model:
        return made
    # imported here because only models with adapters need it
    from peft import get_peft_model

    (first, settings), *others = copy.deepcopy(model.peft_config).items()
    with renamed_quietly():
        adapted: Any = get_peft_model(made, settings, first, autocast_adapter_dtype=False)
    for name, more in others:
        adapted.add_adapter(name, more)
    adapted.set_adapter(model.active_adapter)
    return adapted
