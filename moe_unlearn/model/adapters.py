"""Puts the adapters that a recipe describes on a model, and merges them into its weights.

    model = adapted(model, recipe)           # a PeftModel whose adapters alone train
    model = merged(model)                    # the whole model again

They are PEFT's LoRA: a layer W [out, in] computes W x + (alpha / r) B A x, with A [r, in] random and B [out, r] zero,
so that the model computes at first what it did without them. Of experts, which stand in one tensor [E, out, in], each
has a pair of its own (`target_parameters`).
"""

from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from moe_unlearn.config import Recipe
from moe_unlearn.expert_adapters import has_factors
from moe_unlearn.experts import experts_modules, weights_of
from moe_unlearn.model.modes import put_in_mode, renamed_quietly
from moe_unlearn.model.saving import has_adapters
from moe_unlearn.ranks import sharded


def check_peft(what: str) -> None:
    """Raise ValueError, which says what needs it, where the library peft is missing."""
    if find_spec("peft") is None:
        raise ValueError(f"{what} needs the library 'peft', which is missing: pip install peft")


def adapted(model: nn.Module, recipe: Recipe) -> nn.Module:
    """Return the model with the adapters of a recipe, which alone train; the model itself for a recipe without any.

    The model is changed in place: its layers are wrapped. A is drawn from the recipe's seed, the same on every device.
    Adapters of bfloat16 and float16 weights are float32. Raises ValueError for a model that has adapters already, one
    whose weights are shared out, one without layers to adapt, and without the library peft.
    """
    if recipe.adapter is None:
        return model
    check_peft("the recipe's adapter")
    if has_adapters(model) or getattr(model, "_hf_peft_config_loaded", False):
        raise ValueError(
            "the recipe's adapter needs a model without one: to go on training the adapter that the model has, "
            "adapter=null; to train another one on it, merge it first (merge_and_unload)"
        )
    if sharded(model):
        raise ValueError("the recipe's adapter trains on whole weights; got weights that ranks share out: no --mesh")
    # imported here because peft is optional
    import peft
    from peft import LoraConfig, get_peft_model

    known, training = {*model.modules()}, model.training
    own, both = recipe.adapter, recipe.adapter.targets == "all"
    settings = LoraConfig(
        r=own.r,
        lora_alpha=own.alpha,
        lora_dropout=own.dropout,
        target_modules=_attention(model) if both or own.targets == "attention" else [],
        target_parameters=_experts(model) if both or own.targets == "experts" else None,
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(recipe.seed)  # PEFT draws on the CPU; GPUs' generators stay as they are
        with renamed_quietly():
            made: nn.Module = get_peft_model(model, settings)
    if own.bits == 8 and settings.target_parameters and not any(map(has_factors, made.modules())):
        raise ValueError(
            f"adapters on experts of 8 bits need a PEFT that gives their factors; this is {peft.__version__}: pip "
            "install -U peft, or adapter.bits=4, or adapter.targets=attention"
        )
    put_in_mode(made, training, but=known)
    return made


def merged(model: Any) -> nn.Module:
    """Return a PeftModel's own model with the adapters added to its weights, one weight at a time and in place."""
    made: nn.Module = model.merge_and_unload()
    return made


def check_adapted(model: nn.Module, recipe: Recipe) -> None:
    """Raise ValueError, which says what makes them, where a recipe has adapters and the model none."""
    if recipe.adapter is not None and not has_adapters(model):
        raise ValueError(
            "the recipe trains adapters, and the model has none: expected that of moe_unlearn.model.adapters.adapted("
            "model, recipe), or adapter=null"
        )


def _attention(model: nn.Module) -> list[str]:
    """Return the ends of the names of attention's linear layers, such as self_attn.q_proj."""
    found = set()
    for name, module in model.named_modules():
        parts = name.split(".")
        inside = [i for i, part in enumerate(parts[:-1]) if "attn" in part or "attention" in part]
        if isinstance(module, nn.Linear) and inside:
            found.add(".".join(parts[inside[0] :]))
    if not found:
        raise ValueError(
            f"adapter.targets 'attention': {type(model).__name__} has no linear layers inside a module that is named "
            "attn or attention; expected some, or adapter.targets=experts"
        )
    return sorted(found)


def _experts(model: nn.Module) -> list[str]:
    """Return the ends of the names of the experts' weights, such as mlp.experts.down_proj."""
    found = set()
    modules: dict[str, Any] = experts_modules(model)
    for name, module in modules.items():
        end = ".".join(name.split(".")[-2:])
        found |= {f"{end}.{weight}" for weight in weights_of(module)}
    if not found:
        raise ValueError(
            f"adapter.targets: {type(model).__name__} has no routed experts to adapt; expected some, or "
            "adapter.targets=attention"
        )
    return sorted(found)
