"""Measure WAGLE's whole mask, gradients included: made at once, in 2 and in 5 groups within a budget, and by sorting.

The rival is what a user writes with autograd: dense float32 gradients of both sets, all scores concatenated, a double
argsort, one bool a weight. Groups cost passes over both sets, and a sample one pass more, for a fraction of the memory.
"""

import functools
from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import OlmoeConfig, OlmoeForCausalLM

from benchmarks.harness import OURS, Case, Work
from moe_unlearn import wagle
from moe_unlearn.experts import enable
from moe_unlearn.model.batches import Batch, target_mask
from moe_unlearn.model.head import token_losses
from moe_unlearn.wagle import mask as making
from moe_unlearn.wagle.pieces import all_pieces

#: OLMoE's geometry at an eighth of its width, with half of its experts, so that the rival's sorts do not take minutes
GEOMETRY = {
    "hidden_size": 256,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "num_experts": 32,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 2,
    "vocab_size": 2048,
}
TOKENS, BATCHES, KEEP, GAMMA = 512, 2, 0.8, 1.0
#: by the number of groups: the budget, as a share of what the gradients of all weights take
SHARES = {2: 0.7, 5: 0.235}
SORTED = "autograd + concatenate + double argsort"


def in_groups(count: int) -> str:
    """Return the contender's name of a mask in so many groups."""
    return f"{OURS}, {count} groups"


def cases(device: str) -> list[Case]:
    """Return the case of the CPU; on a GPU the whole step is measured, mask included."""
    if device != "cpu":
        return []
    names = (OURS, *map(in_groups, SHARES), SORTED)
    return [Case("weight_score", "a whole mask in groups, bfloat16", names, work, 2, 24)]


def work() -> Work:
    """Make model, batches and contenders; say how many groups each budget made and which passes over the sets."""
    torch.manual_seed(0)
    model = OlmoeForCausalLM(OlmoeConfig(**GEOMETRY, pad_token_id=0, bos_token_id=1, eos_token_id=2)).bfloat16().eval()
    enable(model)
    forget, retain = ([_batch(side * BATCHES + i) for i in range(BATCHES)] for side in range(2))
    needed = sum(piece.nbytes for piece in all_pieces(model, None))

    def mask(share: float | None) -> wagle.WeightMask:
        memory = needed if share is None else int(share * needed)
        return wagle.weight_mask(model, forget, retain, keep=KEEP, gamma=GAMMA, memory=memory)

    ours: dict[str, Callable[[], object]] = {in_groups(n): functools.partial(mask, s) for n, s in SHARES.items()}
    rival = functools.partial(by_sorting, model, forget, retain)
    passes = {name: _passes(make) for name, make in ours.items()}
    at_once, expected = mask(None), rival()
    differing = sum(int((at_once.kept(name) != kept).sum()) for name, kept in expected.items())
    return Work(
        {OURS: functools.partial(mask, None), **ours, SORTED: rival},
        rounds=3,
        memory=True,
        found={
            "weights": sum(p.numel() for p in model.parameters()),
            "tokens": 2 * BATCHES * TOKENS,
            "gradients_mib": round(needed / 2**20, 1),
            # a sample and one pass a group; more where a guess was wrong
            "passes_over_both_sets": passes,
            # the rival's sort is not stable
            "elements_chosen_differently": differing,
        },
    )


def by_sorting(model: nn.Module, forget: list[Batch], retain: list[Batch]) -> dict[str, Tensor]:
    """Return a bool for each weight of those with the largest scores, as plain autograd and two sorts find them."""
    named = dict(model.named_parameters())
    sides = []
    for side in (forget, retain):
        tokens = sum(int(target_mask(batch).sum()) for batch in side)
        total = {name: torch.zeros(p.shape) for name, p in named.items()}
        for batch in side:
            (token_losses(model, batch).sum() / tokens).backward()
            for name, p in named.items():
                if p.grad is not None:
                    total[name] += p.grad
                    p.grad = None
        sides.append(total)
    g_f, g_r = sides
    scores = torch.cat([((p.detach().float() - g_r[n] / GAMMA) * g_f[n]).abs().flatten() for n, p in named.items()])
    ranks = scores.argsort(descending=True).argsort()
    kept = (ranks < int(KEEP * len(scores))) & (scores > 0)
    parts = kept.split([p.numel() for p in named.values()])
    return {name: part.view(p.shape) for (name, p), part in zip(named.items(), parts, strict=True)}


def _batch(seed: int) -> Batch:
    ids = torch.randint(3, GEOMETRY["vocab_size"], (2, TOKENS // 2), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


def _passes(make: Callable[[], object]) -> int:
    """Return how often gradients of both sets are computed."""
    seen, real = [], making.gradients

    def counted(*given: object) -> object:
        seen.append(None)
        return real(*given)

    making.gradients = counted
    try:
        make()
    finally:
        making.gradients = real
    return len(seen) // 2
