"""SEUF: unlearns through one expert, to which an anchor loss binds the forget tokens.

Source: ACL 2025, arXiv 2411.18797; read.

The affinity of expert i in layer l is the mean over sequences of the mean over tokens of the gate after top-K:

    s_i = (1 / Z) sum_j (1 / L_j) sum_t g_{i,t}

The expert with the highest affinity in the whole model trains together with its layer's router, and everything else is
frozen. The anchor loss keeps the forget tokens on that expert:

    L_anchor = mean_t || g_t - a ||_2^2,   a_i = 1 for the chosen expert, 0 otherwise

The gate g is transformers' `top_k_weights`, which carry the model's own normalisation and scaling. The
mean over tokens in L_anchor is our reading: the paper prints one token's vector.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from moe_unlearn.experts import experts_modules, total_experts
from moe_unlearn.model.head import final_hidden_states
from moe_unlearn.model.packing import call_of
from moe_unlearn.ranks import Ranks, shared_work


class Gate(NamedTuple):
    """Routing of one layer's tokens in a forward pass: top_k_index and top_k_weights [T, K]."""

    top_k_index: Tensor
    weights: Tensor
    num_experts: int

    def dense(self) -> Tensor:
        """Return the gate [T, E] with its gradient, 0 for experts that a token does not visit."""
        # ids behind the last expert mean "not here"
        gate = self.weights.new_zeros(len(self.top_k_index), self.num_experts + 1)
        return gate.scatter_add(1, self.top_k_index.clamp_max(self.num_experts), self.weights)[:, :-1]


@contextlib.contextmanager
def gates(model: nn.Module, names: list[str] | None = None) -> Iterator[dict[str, Gate]]:
    """Collect the gate of each experts module during the first forward pass inside, with its gradient.

    Raises RuntimeError in a layer that runs without a graph although gradients are on: a loss computed from its gate
    would have no gradient.
    """
    collected: dict[str, Gate] = {}
    with_graph = torch.is_grad_enabled()

    def hook(name: str) -> Callable[[nn.Module, tuple, dict], None]:
        def collect(module: Any, args: tuple, kwargs: dict) -> None:
            if torch.is_grad_enabled() != with_graph:
                raise RuntimeError(
                    f"{name} runs in a reentrant gradient checkpoint that is not transformers': a loss of its routing "
                    "would have no gradient; expected a checkpoint with use_reentrant=False"
                )
            index: Any = kwargs.get("top_k_index", args[1] if len(args) > 1 else None)
            weights: Any = kwargs.get("top_k_weights", args[2] if len(args) > 2 else None)
            # nothing may be computed here: a checkpoint runs the layer again without the hook, and would miss it
            collected.setdefault(name, Gate(index, weights, experts[name]))

        return collect

    modules = experts_modules(model)
    chosen = modules if names is None else {name: modules[name] for name in names}
    experts = {name: total_experts(module) for name, module in chosen.items()}
    handles = [m.register_forward_pre_hook(hook(n), with_kwargs=True) for n, m in chosen.items()]
    try:
        yield collected
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def affinity(model: nn.Module, batches: Sequence[dict[str, Tensor]], ranks: Ranks | None = None) -> Tensor:
    """Compute the affinity s [L, E] float64 over the attended tokens, layers in `experts_modules` order.

    `batches` are padded ones of `model.batches`; `ranks` share them, and have the same bits as one process.
    """

    def summed(i: int) -> Tensor:
        call = call_of(batches[i])
        with gates(model) as collected:
            final_hidden_states(model, batches[i], call)
        mask = call.attended.to(torch.float64)
        per_layer = [call.rows(g.dense().double()) for g in collected.values()]
        length = mask.sum(1).clamp_min(1)
        return torch.stack([((g * mask[..., None]).sum(1) / length[:, None]).sum(0) for g in per_layer])

    totals = shared_work(summed, [len(experts_modules(model))] * len(batches), ranks)
    sequences = sum(len(batch["input_ids"]) for batch in batches)
    return functools.reduce(torch.add, (of_batch for _, of_batch in totals)) / sequences


def select(score: Tensor) -> Tensor:
    """Select the one expert with the highest affinity, bool [L, E] (the lowest index on a tie)."""
    selected = torch.zeros_like(score, dtype=torch.bool)
    selected.view(-1)[score.flatten().argmax()] = True
    return selected


def anchor_loss(gate: Tensor, expert: int, attended: Tensor) -> Tensor:
    """Compute L_anchor [] of one layer from its gate [T, E] and `attended`, bool [T]."""
    target = torch.zeros_like(gate[0])
    target[expert] = 1
    distance = (gate - target).square().sum(-1)
    return distance[attended].mean()
