"""Costs of `gram`: products of gradient sets, stored or as factors."""

from collections.abc import Iterable, Sequence

from torch import Tensor

from moe_unlearn.ops.costs.cost import Cost


def bytes_moved(gradients: Iterable[Tensor]) -> int:
    """Return the least bytes of a Gram matrix, for which each gradient is read once."""
    return sum(gradient.numel() * gradient.element_size() for gradient in gradients)


def _flops(*, gradients: Sequence[Tensor], **_: object) -> int:
    m = len(gradients)
    return m * (m + 1) * gradients[0].numel()


def _factor_flops(*, row_gradients: Sequence[Tensor], inputs: Tensor, expert_offsets: Tensor, **_: object) -> float:
    rows, m = inputs.shape[0], len(row_gradients)
    per_expert = rows / max(len(expert_offsets) - 1, 1)
    return 2 * rows * per_expert * (inputs.shape[1] + m**2 * row_gradients[0].shape[1])


COSTS = {"gram": Cost(_flops), "gram_factors": Cost(_factor_flops)}
