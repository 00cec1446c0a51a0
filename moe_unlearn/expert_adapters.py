"""Keeps the factors of PEFT's adapters on experts beside the experts' weights while a layer runs.

PEFT makes of a weight [E, n, m] under an adapter the sum W + scale * left @ right, anew in each forward pass, and its
gradient, which is as large, in each backward pass. `Aside` gives the layer the two factors in place of the sum
(`ops.low_rank`), where the layer takes them; wherever it does not, PEFT's own way stands.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn

from moe_unlearn.ops.low_rank import LowRank

#: where an experts module takes the factors for a weight, by its name; None if it does not
Place = Callable[[nn.Module, Tensor], dict[str, LowRank] | None]
_METHOD = "_activate_lora"  # PEFT's context in which the module that an adapter wraps runs


def has_factors(module: nn.Module) -> bool:
    """Return whether a module is PEFT's wrapper of experts, in a version that gives the factors of its adapter."""
    return hasattr(module, "get_delta_factors") and hasattr(module, _METHOD)


class Aside:
    """Lets the adapters on the experts of a model keep their factors aside until `undo`.

    Adapters of other versions of PEFT, which have no such context or no factors, and those put on the model later stay
    as they are.
    """

    def __init__(self, model: nn.Module, place: Place):
        found = filter(has_factors, model.modules())
        self._wrappers = [wrapper for wrapper in found if _METHOD not in vars(wrapper)]
        for wrapper in self._wrappers:
            # a partial, which a copy of the model copies with its own wrapper
            setattr(wrapper, _METHOD, partial(_aside, wrapper, place))

    def undo(self) -> None:
        """Give the adapters PEFT's way back; a second call changes nothing more."""
        for wrapper in self._wrappers:
            delattr(wrapper, _METHOD)
        self._wrappers = []


@contextlib.contextmanager
def _aside(wrapper: Any, place: Place, active: Sequence[str]) -> Iterator[None]:
    """Keep the factors of the one active adapter aside inside; more than one take PEFT's way."""
    adapters = [name for name in active if name in wrapper.lora_A]
    weight = wrapper.get_param()
    kept = place(wrapper.get_base_layer(), weight) if len(adapters) == 1 and weight.dim() == 3 else None
    if kept is None:
        with getattr(type(wrapper), _METHOD)(wrapper, active):
            yield
        return
    kept[wrapper.parameter_name] = LowRank(*wrapper.get_delta_factors(adapters[0]))
    try:
        yield
    finally:
        kept.clear()
