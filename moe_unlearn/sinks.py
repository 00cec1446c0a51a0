"""Where the weight gradients of the experts go in the fused step, instead of `.grad`.

    CompactSink    sum of the masked dW of the trained slices, [M_e, M, P] in the parameter's dtype
    UpdateSink     the optimizer's update straight from the factors of dW, which is never stored

A sink is given to `step_inputs(weight_gradients=...)`. The experts of the forward pass announce their weights
(`enter`), and in the backward pass, after a layer's dgrad, each hands over the factors of its dW (`take`). A
weight that entered twice has two gradients to wait for, and a bias none that a kernel could update from: such
take the compact form also in an `UpdateSink`. What the optimizer does not train is dropped.

Deterministic. Source: our specification.
"""

import torch
from torch import Tensor

from moe_unlearn.ops.bits import unpack_bits
from moe_unlearn.ops.expert_wgrad import Factors, expert_wgrad
from moe_unlearn.optim import MaskedAdamW, MaskedSGD


class NonFiniteError(FloatingPointError):
    """A loss or gradient is NaN or infinite; `updated` names the weights that had been updated before."""

    def __init__(self, message: str, updated: tuple[str, ...] = ()):
        super().__init__(message)
        self.updated = updated


class CompactSink:
    """Adds to `gradients`, parameter -> compact gradient, which the caller may replace between backward passes."""

    def __init__(self, optimizer: MaskedSGD | MaskedAdamW, gradients: dict[Tensor, Tensor]):
        self.optimizer, self.gradients = optimizer, gradients

    def enter(self, weight: Tensor) -> None:
        """A forward pass uses `weight`."""

    def take(self, weight: Tensor, factors: Factors) -> None:
        """The backward pass has the factors of a gradient of `weight`."""
        layout = self.optimizer.layout(weight)
        if layout is None:
            return
        experts, mask = layout
        held = self.gradients.get(weight)
        if weight.dim() == 3:
            dw = expert_wgrad(**factors._asdict(), experts=experts, mask=mask, out=held, out_dtype=weight.dtype)
        else:  # a bias, whose mask runs along the other dimension
            dw = expert_wgrad(**factors._asdict(), experts=experts, out_dtype=weight.dtype).squeeze(2)
            dw = dw if mask is None else torch.where(unpack_bits(mask, dw.shape[1]), dw, 0)
            dw = dw if held is None else held.add_(dw)
        self.gradients[weight] = dw


class UpdateSink(CompactSink):
    """Updates every weight [E, M, P] of `names` (parameter -> name) that one forward pass used once.

    Factors that are not finite raise NonFiniteError, naming what was updated before; where their product
    could overflow, the gradient is stored for the caller to check.
    """

    def __init__(self, optimizer: MaskedSGD | MaskedAdamW, gradients: dict[Tensor, Tensor], names: dict[Tensor, str]):
        super().__init__(optimizer, gradients)
        self.names = names
        self.updated: list[str] = []
        self._uses: dict[Tensor, int] = {}

    def enter(self, weight: Tensor) -> None:
        self._uses[weight] = self._uses.get(weight, 0) + 1

    def take(self, weight: Tensor, factors: Factors) -> None:
        if weight.dim() != 3 or self._uses.get(weight, 0) > 1 or self.optimizer.layout(weight) is None:
            super().take(weight, factors)
            return
        largest = _largest_sum(factors)
        if not largest < torch.finfo(torch.float32).max:
            if not largest < float("inf"):
                raise NonFiniteError(
                    f"the gradient of {self.names[weight]} is not finite: stopped before its update", (*self.updated,)
                )
            super().take(weight, factors)
            return
        self.optimizer.update_from(weight, factors)
        self.updated.append(self.names[weight])


def _largest_sum(factors: Factors) -> float:
    """A bound on every |dW|, in float64; infinite or NaN if a factor is."""
    offsets = factors.expert_offsets
    rows = int(offsets[-1])
    bound = (offsets[1:] - offsets[:-1]).max().double()
    for values, index in ((factors.grad, factors.grad_rows), (factors.input, factors.input_rows)):
        # rows behind the last expert belong to nobody and may hold anything
        values = values[:rows] if index is None else values
        if not values.numel():
            return 0.0
        low, high = values.aminmax()  # the infinity norm, many times as fast
        bound = bound * torch.maximum(-low, high).double()
    return float(bound)
