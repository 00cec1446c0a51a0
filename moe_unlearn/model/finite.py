"""Finds weights that are NaN or infinite."""

from collections.abc import Iterable

import torch
from torch import Tensor

from moe_unlearn.expert_state import whole
from moe_unlearn.sharding import part


@torch.no_grad()
def not_finite(named: Iterable[tuple[str, Tensor]]) -> list[str]:
    """Return the names of the floating-point tensors that have a number which is NaN or infinite.

    Each is read once and nothing is copied but what is quantised; of one that is shared out a rank reads its own part.
    Tensors on meta and of single bytes have no such numbers. Waits once for the device.
    """
    spans: dict[str, Tensor] = {}
    for name, tensor in named:
        own = whole(part(tensor))
        if own.numel() and own.is_floating_point() and own.itemsize > 1 and not own.is_meta:
            least, largest = own.aminmax()  # both NaN where one number is
            span = ((largest - largest) + (least - least)).float()  # 0, or NaN
            spans[name] = span.to(next(iter(spans.values()), span).device)
    finite = torch.stack(list(spans.values())).isfinite().tolist() if spans else []
    return [name for name, holds in zip(spans, finite, strict=True) if not holds]
