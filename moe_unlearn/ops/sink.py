"""What takes the gradients of expert weights from the backward pass of `expert_mlp`, in place of the weights."""

from collections.abc import Mapping, Sequence
from typing import Protocol

from torch import Tensor

from moe_unlearn.ops.expert_wgrad import Factors


class GradientSink(Protocol):
    """Takes the gradients of expert weights where they are made; the sinks of a step are in `step.sinks`."""

    #: whether the sink needs the largest absolute value of the factors
    bounded: bool
    #: by experts module and name of a weight the optimizer's parameter, where a forward pass sees another tensor
    owners: Mapping[str, Mapping[str, Tensor]] | None

    def enter(self, weight: Tensor) -> None:
        """Note that a forward pass uses `weight`."""

    def trained_slices(self, weights: Sequence[Tensor]) -> Tensor | None:
        """Return the slices that train of any of one layer's `weights`, ascending int32 [M_e]; None for all."""

    def take(self, weight: Tensor, factors: Factors) -> None:
        """Take the factors of a gradient of `weight` from the backward pass."""


class OfOnePass(GradientSink):
    """Hands factors to a sink under the parameters that own the weights of one forward pass.

    A weight without an owner stays itself: the sink refuses it unless it is a parameter of the step.
    """

    owners = None

    def __init__(self, sink: GradientSink, owner: Mapping[Tensor, Tensor]):
        self.sink, self.owner, self.bounded = sink, owner, sink.bounded

    def enter(self, weight: Tensor) -> None:
        self.sink.enter(self._owner(weight))

    def trained_slices(self, weights: Sequence[Tensor]) -> Tensor | None:
        return self.sink.trained_slices([self._owner(weight) for weight in weights])

    def take(self, weight: Tensor, factors: Factors) -> None:
        self.sink.take(self._owner(weight), factors)

    def _owner(self, weight: Tensor) -> Tensor:
        return self.owner.get(weight, weight)
