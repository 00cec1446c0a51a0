"""Weights of experts in 4 bits (NF4), rounded by transformers as it loads them, beside bitsandbytes' linear layers.

bitsandbytes makes layers of its own of a model's `nn.Linear`, and leaves weights [E, out, in] as they are. Here its
functions make such a weight an `NF4`, a tensor of the same shape and dtype that has codes of 4 bits and a scale for 64
of them, and gives the rounded weight by `dequantize`.

Importing this module needs bitsandbytes, and registers `Config` with transformers.
"""

from typing import Any

import torch
from bitsandbytes.functional import QuantState, dequantize_4bit, get_4bit_type, quantize_4bit
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.core_model_loading import ConversionOps
from transformers.integrations.bitsandbytes import Bnb4bitQuantize
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer
from transformers.quantizers.quantizers_utils import get_module_from_name

from moe_unlearn.experts import weights_of
from moe_unlearn.model.quantised import BLOCK

_NAME = "moe_unlearn_nf4"
_aten = torch.ops.aten
_SAME = (_aten.detach.default, _aten.alias.default, _aten.clone.default)


class NF4(Tensor):
    """A frozen weight in NF4: `codes` uint8 [numel / 2, 1] and `scales` float32 [numel / 64].

    What moves or copies it whole leaves it so; every other operation sees the rounded weight.
    """

    codes: Tensor
    scales: Tensor

    @staticmethod
    def __new__(cls, codes: Tensor, scales: Tensor, shape: torch.Size, dtype: torch.dtype) -> "NF4":
        made: NF4 = Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=codes.device)
        made.codes, made.scales = codes, scales
        return made

    @classmethod
    def of(cls, weight: Tensor) -> "NF4":
        """Round a weight [E, out, in]."""
        codes, state = quantize_4bit(weight.contiguous(), blocksize=BLOCK, quant_type="nf4", quant_storage=torch.uint8)
        return cls(codes, state.absmax, weight.shape, weight.dtype)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """Return the rounded weight."""
        state = QuantState(
            absmax=self.scales,
            shape=self.shape,
            code=get_4bit_type("nf4", device=self.codes.device),
            blocksize=BLOCK,
            quant_type="nf4",
            dtype=self.dtype if dtype is None else dtype,
        )
        whole: Tensor = dequantize_4bit(self.codes, state)
        return whole

    def __tensor_flatten__(self) -> tuple[list[str], tuple[torch.Size, torch.dtype]]:
        return ["codes", "scales"], (self.shape, self.dtype)

    @staticmethod
    def __tensor_unflatten__(parts: dict[str, Tensor], kind: Any, *_: object) -> "NF4":
        return NF4(parts["codes"], parts["scales"], *kind)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch types it as of an instance
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _SAME or (func is _aten._to_copy.default and kwargs.get("dtype") in (None, args[0].dtype)):
            own, kept = args[0], {name: value for name, value in kwargs.items() if name not in ("dtype", "layout")}
            codes, scales = (func(part, *args[1:], **kept) for part in (own.codes, own.scales))
            return cls(codes, scales, own.shape, own.dtype)
        args, kwargs = tree_map_only(NF4, NF4.dequantize, (args, kwargs))
        return func(*args, **kwargs)


@register_quantization_config(_NAME)
class Config(BitsAndBytesConfig):
    """Asks for bitsandbytes' NF4 in linear layers, and for `NF4` in experts."""

    def __init__(self) -> None:
        super().__init__(load_in_4bit=True, bnb_4bit_quant_type="nf4")
        self.quant_method: Any = _NAME


@register_quantizer(_NAME)
class _Quantizer(Bnb4BitHfQuantizer):
    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **kwargs: Any) -> bool:
        return _is_expert(model, param_name) or super().param_needs_quantization(model, param_name, **kwargs)

    def get_quantize_ops(self) -> ConversionOps:
        return _Quantize(self)


class _Quantize(Bnb4bitQuantize):
    def convert(  # type: ignore[override]  # transformers' own differ from each other
        self, input_dict: dict[str, Any], full_layer_name: str | None = None, model: Any = None, **kwargs: Any
    ) -> dict[str, Tensor]:
        ((name, value),) = input_dict.items()
        if not _is_expert(model, name):
            made: dict[str, Tensor] = super().convert(input_dict, full_layer_name, model, **kwargs)
            return made
        return {name: nn.Parameter(NF4.of(value[0] if isinstance(value, list) else value), requires_grad=False)}


def _is_expert(model: PreTrainedModel, name: str) -> bool:
    """Return whether a weight is one of all experts of a layer."""
    module, leaf = get_module_from_name(model, name)
    return leaf in weights_of(module)
