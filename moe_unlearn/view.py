"""StepView, what an `UnlearnStep` shows of itself to those who plan or verify it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

from torch import Tensor, nn

from moe_unlearn.config import Recipe
from moe_unlearn.optim import Gradients, MaskedAdamW, MaskedSGD


class GradientsView(Protocol):
    """The gradients that a step has accumulated."""

    @property
    def collected(self) -> Gradients:
        """Return by parameter the gradients that are not in `.grad`: compact ones, and factors."""

    def made(self, p: nn.Parameter) -> Tensor | None:
        """Return the gradient of `p`, whole or compact; compute it from its factors if need be."""

    def held(self) -> list[Tensor]:
        """Return every tensor that holds a gradient or one of its factors."""


@dataclass(frozen=True, eq=False)
class StepView:
    """A step at one moment: what it works on, how it is run, and the step in progress. It copies no tensor."""

    model: nn.Module
    recipe: Recipe
    optimizer: MaskedSGD | MaskedAdamW
    #: packed masks by name of the parameter
    masks: Mapping[str, Tensor]
    #: whether the fused step is asked for, or the plain path
    fused: bool
    #: the number of ranks that add up the gradient of an expert weight
    peers: int
    #: the number of micro-batches in a step
    micro_batches: int
    #: why forget and retain rows need separate forward passes; empty if they can share one
    separate: str
    #: why the caller needs whole gradients before the update; empty if it does not
    held_back: str
    #: the number of steps done
    steps: int
    #: the present multiplier of the retain loss
    alpha: float
    #: the losses of each micro-batch of the step in progress
    losses: Sequence[Mapping[str, float]]
    #: names of the weights that the step in progress has updated in its backward pass
    updated: Sequence[str]
    gradients: GradientsView
    #: what becomes of rows of a parameter, those of its trained slices, after an update: invariant routers
    held: Callable[[Tensor, Tensor, Tensor | None], Tensor]

    @cached_property
    def trained(self) -> list[tuple[str, nn.Parameter]]:
        """Return the parameters that train, by name."""
        return [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]
