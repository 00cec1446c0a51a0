"""Measures how many tokens still go to the experts that they went to before."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from moe_unlearn.model.batches import Batch, attended_mask
from moe_unlearn.model.capture import collect_routing

WATCHED = 4096  # retain tokens, in whole batches, on which stability is measured


def watched_batches(batches: Iterable[Batch]) -> list[Batch]:
    """Return the first batches that hold `WATCHED` attended tokens together, all if there are fewer."""
    found, tokens = [], 0
    for batch in batches:
        found.append(batch)
        tokens += int(attended_mask(batch).sum())
        if tokens >= WATCHED:
            break
    return found


def routes(model: nn.Module, batches: Sequence[Batch]) -> Tensor:
    """Return the experts of every attended token in rising order, int16 [L, T, K]; all ranks make the same passes."""
    parts = []
    for batch in batches:
        index = collect_routing(model, batch)
        parts.append(index[:, attended_mask(batch).flatten().to(index.device)].sort(2).values.short())
    return torch.cat(parts, 1)


def stability(before: Tensor, now: Tensor) -> float:
    """Return the share of tokens, over all layers, whose set of experts is the same in two `routes` [L, T, K]."""
    return (before == now.to(before.device)).all(2).double().mean().item()
