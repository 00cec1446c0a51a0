"""SEUF: unlearn through one expert, held in place by an anchor loss (ACL 2025, arXiv 2411.18797; read).

Affinity of expert i in layer l, a mean over sequences of the mean over tokens of the gate after top-K:

    s_i = (1 / Z) sum_j (1 / L_j) sum_t g_{i,t}

The expert with the highest affinity in the whole model trains with its layer's router, everything else is
frozen, and the anchor keeps the forget tokens on it:

    L_anchor = mean_t || g_t - a ||_2^2,   a_i = 1 for the chosen expert, 0 otherwise

The gate g is transformers' `top_k_weights`, which carry the model's own normalisation and scaling. The
mean over tokens in L_anchor is our reading: the paper prints one token's vector.
"""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from moe_unlearn.experts import experts_modules
from moe_unlearn.losses import final_hidden_states


@contextlib.contextmanager
def gates(model: nn.Module, names: list[str] | None = None) -> Iterator[dict[str, Tensor]]:
    """Collect the gate [T, E] of each experts module during a forward pass, with its gradient."""
    collected: dict[str, Tensor] = {}

    def hook(name):
        def collect(module, args, kwargs):
            index = kwargs.get("top_k_index", args[1] if len(args) > 1 else None)
            weights = kwargs.get("top_k_weights", args[2] if len(args) > 2 else None)
            gate = weights.new_zeros(len(index), module.num_experts + 1)
            # a checkpoint's recompute repeats the forward: the first gate is the one in the graph
            collected.setdefault(name, gate.scatter_add(1, index.clamp_max(module.num_experts), weights))

        return collect

    modules = experts_modules(model)
    chosen = modules if names is None else {name: modules[name] for name in names}
    handles = [m.register_forward_pre_hook(hook(n), with_kwargs=True) for n, m in chosen.items()]
    try:
        yield collected
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def affinity(model: nn.Module, batches: list[dict[str, Tensor]]) -> Tensor:
    """s [L, E] float64 over the attended tokens of `batches`, layers in `experts_modules` order."""
    total, sequences = 0.0, 0
    for batch in batches:
        with gates(model) as collected:
            final_hidden_states(model, batch)
        mask = batch["attention_mask"].to(torch.float64)
        per_layer = [g[:, :-1].double().view(*mask.shape, -1) for g in collected.values()]
        length = mask.sum(1).clamp_min(1)
        total = total + torch.stack([((g * mask[..., None]).sum(1) / length[:, None]).sum(0) for g in per_layer])
        sequences += len(mask)
    return total / sequences


def select(score: Tensor) -> Tensor:
    """bool [L, E]: the one expert with the highest affinity (the lowest index on a tie)."""
    selected = torch.zeros_like(score, dtype=torch.bool)
    selected.view(-1)[score.flatten().argmax()] = True
    return selected


def anchor_loss(gate: Tensor, expert: int, attended: Tensor) -> Tensor:
    """L_anchor of one layer: gate [T, E + 1] as `gates` collects it, `attended` bool [T]."""
    target = torch.zeros_like(gate[0, :-1])
    target[expert] = 1
    distance = (gate[:, :-1] - target).square().sum(-1)
    return distance[attended].mean()
