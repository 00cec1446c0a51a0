"""Keeps what `moe_unlearn.experts` has to know of an experts module: its gate, the step's inputs, adapters' factors."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from moe_unlearn.ops.gate import Gate, recognise
from moe_unlearn.ops.low_rank import LowRank
from moe_unlearn.ops.sink import GradientSink

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass
class StepInputs:
    """Inputs of one step for one layer; all tensors or plain numbers.

    Every forward pass adds to two tensors (the recompute of a gradient checkpoint does not):
    `tokens_per_expert` int64 [G, E] counts the tokens of each `group` [T]; `log_weight` float32 [T] collects
    `log_tilt` [E] over a token's experts.

    With `weight_gradients` no weight gets a gradient: its factors go to that sink, under the layer's `owners` if the
    sink has any.
    """

    group: Tensor | None = None
    num_groups: int = 1
    log_tilt: Tensor | None = None
    log_weight: Tensor | None = None
    tokens_per_expert: Tensor | None = None
    weight_gradients: GradientSink | None = None
    owners: Mapping[str, Tensor] | None = None


@dataclass
class State:
    """State kept on an experts module: its gate (if None, `reason` says why), the step's inputs, adapters' factors."""

    gate: Gate | None
    interleaved: bool = False
    reason: str = ""
    warned: bool = False
    inputs: StepInputs | None = None
    low_rank: dict[str, LowRank] = field(default_factory=dict)  # of the weights by name, while an adapter's layer runs


def not_computable(weight: Tensor) -> str:
    """Return why `expert_mlp` cannot take this weight; empty if it can."""
    if weight.dtype not in _DTYPES:
        return f"its weights are {weight.dtype}"
    if hasattr(weight, "__tensor_flatten__") and not is_quantised(weight):
        return f"its weights are {type(weight).__name__}"
    return ""


def is_quantised(weight: Tensor) -> bool:
    """Return whether a weight is codes that its own class makes a rounded weight of."""
    return type(weight).dequantize is not Tensor.dequantize


def whole(weight: Tensor) -> Tensor:
    """Return a weight as it is, or the rounded weight, made anew, where it is quantised."""
    made: Tensor = weight.dequantize() if is_quantised(weight) else weight
    return made


def probe(module: Any) -> State:
    """Find the module's gate and layout, or the reason why they cannot be computed here."""
    if getattr(module, "has_post_expert_norm", False):
        return State(None, reason="it normalises after each expert")
    if module.down_proj.dtype not in _DTYPES:
        return State(None, reason=f"its weights are {module.down_proj.dtype}")
    device = torch.device("cpu") if module.down_proj.is_meta else module.down_proj.device
    function = module._apply_gate if module.has_gate else module.act_fn
    # the layout of the flag is tried first, but the function itself decides
    layouts = (not module.is_concatenated, module.is_concatenated) if module.has_gate else (False,)
    # the module's attributes only supply numbers to try
    numbers = {float(v) for v in vars(module).values() if type(v) in (int, float) and v > 0}
    found = recognise(function, layouts, numbers, device, gated=module.has_gate)
    return State(None, reason=found) if isinstance(found, str) else State(*found)
