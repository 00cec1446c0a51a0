"""Measure how far routing moved: frequencies of two models on the same text, and the experts of each token."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from moe_unlearn.data import Example, batches
from moe_unlearn.metrics.scoring import evaluating
from moe_unlearn.model.batches import attended_mask
from moe_unlearn.model.capture import routing_capture
from moe_unlearn.model.head import final_hidden_states
from moe_unlearn.ranks import local


@dataclass(frozen=True)
class Routes:
    """Experts of every token of a set: `top_k_index` [L, T, K] int32 on the CPU."""

    top_k_index: Tensor
    num_experts: int
    layers: list[str]


@dataclass(frozen=True)
class RoutingChange:
    """Difference between two `Routes` on the same tokens, per layer, float64 [L].

    Let p and q be the shares of each expert in all top-K hits before and after. `kl` = sum p log(p / q) in nats, with
    1/2 added to every count, and `l1` = sum |p - q| in [0, 2], without. `overlap` is the mean over tokens of the
    share of their K experts that stayed, in [0, 1].
    """

    kl: Tensor
    l1: Tensor
    overlap: Tensor

    def means(self) -> dict[str, float]:
        """Return `routing_kl`, `routing_l1` and `routing_overlap`, the means over layers."""
        return {f"routing_{name}": value.mean().item() for name, value in vars(self).items()}


def routes(model: nn.Module, examples: Sequence[Example], *, batch_size: int = 32, pad_id: int = 0) -> Routes:
    """Return the routing of every token of the examples, in their order; every rank computes all of it.

    Raises ValueError if there are no examples, or the model has no Mixture-of-Experts layers.
    """
    plain, parts = local(model), []
    device = next(plain.parameters()).device
    with evaluating(plain):
        for batch in batches(examples, batch_size, pad_id=pad_id):
            batch = {key: value.to(device) for key, value in batch.items()}
            with routing_capture(plain, keep_index=True) as capture:
                final_hidden_states(plain, batch)
            attended = attended_mask(batch).flatten().to(capture.top_k_index.device)
            parts.append(capture.top_k_index[:, attended].int().cpu())
            experts, layers = capture.counts.shape[1], capture.layers
    return Routes(torch.cat(parts, 1), experts, layers)


def routing_change(before: Routes, after: Routes) -> RoutingChange:
    """Return the `RoutingChange`; raise ValueError unless both have the same layers, experts and tokens."""
    shapes = [(list(r.top_k_index.shape), r.num_experts) for r in (before, after)]
    if shapes[0] != shapes[1] or not before.top_k_index.numel():
        raise ValueError(f"expected two Routes of the same [L, T, K] and experts, not empty; got {shapes}")
    counts = torch.stack([_counts(before), _counts(after)])
    p, q = counts / counts.sum(-1, keepdim=True)
    smooth_p, smooth_q = (counts + 0.5) / (counts + 0.5).sum(-1, keepdim=True)
    stayed = torch.stack(
        [
            (a[:, :, None] == b[:, None, :]).any(-1).double().mean()
            for a, b in zip(before.top_k_index, after.top_k_index, strict=True)
        ]
    )
    return RoutingChange((smooth_p * (smooth_p / smooth_q).log()).sum(-1), (p - q).abs().sum(-1), stayed)


def _counts(routes: Routes) -> Tensor:
    rows = [torch.bincount(layer.flatten().long(), minlength=routes.num_experts) for layer in routes.top_k_index]
    return torch.stack(rows).double()


def routing_drift(before: Tensor, after: Tensor) -> tuple[Tensor, float]:
    """Return the total variation between two routing frequency tables [L, E]: per layer [L], and the mean over layers.

    A row of a table sums to K, the experts a token visits; 0.5 sum_e |f_e - f'_e| / K is in [0, 1]. Raises
    ValueError if the shapes differ or a row of one table sums to another number than in the other.
    """
    before, after = before.double(), after.double()
    if before.ndim != 2 or before.shape != after.shape:
        shapes = f"{list(before.shape)} and {list(after.shape)}"
        raise ValueError(f"expected two tables [L, E] of one shape; got {shapes}")
    top_k = before.sum(1)
    if not torch.allclose(top_k, after.sum(1), rtol=1e-4) or not (top_k > 0).all():
        raise ValueError(
            "expected frequencies that sum to the same K > 0 in every layer of both tables; got "
            f"{top_k.tolist()} and {after.sum(1).tolist()}"
        )
    per_layer = 0.5 * (before - after).abs().sum(1) / top_k
    return per_layer, per_layer.mean().item()
