"""Weights of 8 bits by torchao, rounded by transformers as it loads them: linear layers and experts, one scale a row.

Importing this module needs torchao, and registers `Config` with transformers, whose own quantiser says of a choice of
weights that nothing trains beside them.
"""

from collections.abc import Iterable
from typing import Any

from torchao.quantization import FqnToConfig, Int8WeightOnlyConfig
from transformers import TorchAoConfig
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.quantizer_torchao import TorchAoHfQuantizer

_NAME = "moe_unlearn_int8"


@register_quantization_config(_NAME)
class Config(TorchAoConfig):
    """Asks for torchao's int8 in the layers and weights of some names."""

    def __init__(self, names: Iterable[str]) -> None:
        each = Int8WeightOnlyConfig(version=2)
        super().__init__(FqnToConfig({name: each for name in names}))
        self.quant_method: Any = _NAME


@register_quantizer(_NAME)
class _Quantizer(TorchAoHfQuantizer):
    @property
    def is_trainable(self) -> bool:
        """Return that adapters train beside these weights."""
        return True
