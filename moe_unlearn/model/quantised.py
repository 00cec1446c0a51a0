"""Base weights of 8 or 4 bits under adapters: which library rounds them, what they take, and what they are not for.

    load_model(folder, Loading(bits=8))      # linear layers and experts by torchao, one scale a row
    load_model(folder, Loading(bits=4))      # by bitsandbytes' NF4, one scale for 64 weights

transformers rounds each weight when it reads it. Embeddings, the output head, norms and routers stay as they are. A
layer's experts are made whole, in the model's dtype, while the layer runs, so that the weights of one layer stand in
memory twice; gradient checkpoints see to it that no others do (`Recipe.recomputes`).

Rounded weights never move. What rewrites weights refuses them.
"""

from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

from torch import Tensor, nn

from moe_unlearn.config import Recipe
from moe_unlearn.config.adapter import bits_of
from moe_unlearn.experts import experts_modules, weights_of
from moe_unlearn.model.saving import has_adapters

LIBRARIES = {8: "torchao", 4: "bitsandbytes"}
_UNROUNDED = ("mxfp4",)  # what transformers makes whole weights of where it cannot compute with the codes
BLOCK = 64  # weights of a scale in 4 bits
_PACKING = "support_avx512bf16_for_cpu"  # bitsandbytes' flag of a linear layer


def check_library(bits: int) -> None:
    """Raise ValueError where the library that rounds to `bits` is missing."""
    library = LIBRARIES[bits]
    if find_spec(library) is None:
        raise ValueError(f"{bits} bits a weight need the library {library!r}, which is missing: pip install {library}")


def config_of(bits: int, model: nn.Module) -> Any:
    """Return the `quantization_config` that rounds the weights of such a model, here without storage, to `bits`."""
    check_library(bits)
    # imported here because the libraries are optional
    if bits == 4:
        from moe_unlearn.model import four_bits

        return four_bits.Config()
    from moe_unlearn.model import eight_bits

    return eight_bits.Config(name.removesuffix(".weight") for name, _ in rounded_weights(model))


def rounded_weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield the weights that are rounded, with their names: of linear layers but the output head, and of experts."""
    causal: Any = model.get_base_model() if has_adapters(model) else model  # type: ignore[operator]  # PEFT's
    head = causal.get_output_embeddings()
    tied = {id(p) for p in causal.get_input_embeddings().parameters()}
    for name, module in causal.named_modules():
        if type(module) is nn.Linear and module is not head and id(module.weight) not in tied and "lora_" not in name:
            yield f"{name}.weight", module.weight
        for own in weights_of(module):
            yield f"{name}.{own}", getattr(module, own)


def rounded_bytes(weight: Tensor, bits: int) -> int:
    """Return what a weight takes with its scales."""
    if bits == 8:
        return weight.numel() + weight.numel() // weight.shape[-1] * weight.element_size()
    return -(-weight.numel() // 2) + -(-weight.numel() // BLOCK) * 4


def made_whole(model: nn.Module) -> int:
    """Return the most bytes that the weights of a layer's experts take where they are whole."""
    modules = experts_modules(model).values()
    return max((sum(getattr(m, name).nbytes for name in weights_of(m)) for m in modules), default=0)


def method_of(settings: dict[str, Any] | None) -> str | None:
    """Return how the `quantization_config` of a config.json quantises weights; None if they are or become whole."""
    if not settings:
        return None
    method = str(settings.get("quant_method", "bitsandbytes"))
    return None if method in _UNROUNDED or settings.get("dequantize") else method


def is_quantised(model: Any) -> bool:
    """Return whether a model, below its adapters if it has some, computes with quantised weights."""
    base = model.get_base_model() if has_adapters(model) else model
    return getattr(base, "hf_quantizer", None) is not None


def check_whole(model: nn.Module, what: str, instead: str = "") -> None:
    """Raise ValueError for a model with quantised weights, where `what` needs others, and `instead` is another way."""
    if is_quantised(model):
        raise ValueError(f"{what}, and those of this one are quantised: give a model whose weights are whole{instead}")


def check_moves(model: nn.Module) -> None:
    """Raise ValueError for a model whose weights are quantised, so that a step cannot move them, and no adapter."""
    if not has_adapters(model):
        check_whole(model, "a step without an adapter moves the weights of the model", ", or adapter.r=8")


def check_rounded(model: nn.Module, recipe: Recipe) -> None:
    """Raise ValueError for a recipe that asks for rounded weights, where the model has others."""
    bits = bits_of(recipe.adapter)
    if bits is not None and not is_quantised(model):
        raise ValueError(
            f"adapter.bits={bits} is for a model with such weights: moe_unlearn.model.loading.load_model(folder, "
            f"Loading(bits={bits})), or adapter.bits=null"
        )


def keep_layout(model: nn.Module) -> None:
    """Have bitsandbytes keep the layout of 4-bit weights on CPUs.

    In evaluation it lays them out anew for a kernel that has no gradient, which training would then use unawares.
    """
    for module in model.modules():
        if hasattr(module, _PACKING):
            setattr(module, _PACKING, False)
