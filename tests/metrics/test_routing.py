"""Routing change against a slow loop over tokens."""

import math

import pytest
import torch

from moe_unlearn.data import Example
from moe_unlearn.metrics import Routes, routes, routing_change
from moe_unlearn.testing import routing

pytestmark = pytest.mark.quick


def table(patterns, seed):
    index = torch.stack([routing(p, 40, 6, 2, seed=seed + i) for i, p in enumerate(patterns)])
    return Routes(index.int(), 6, list(patterns))


def test_a_slow_loop_gives_the_same():
    before, after = table(["uniform", "skewed", "first_empty"], 0), table(["skewed", "skewed", "last_empty"], 9)
    change = routing_change(before, after)
    for layer in range(3):
        counts = [[0] * 6, [0] * 6]
        stayed = 0.0
        for old, new in zip(before.top_k_index[layer].tolist(), after.top_k_index[layer].tolist(), strict=True):
            stayed += len(set(old) & set(new)) / 2
            for expert in old:
                counts[0][expert] += 1
            for expert in new:
                counts[1][expert] += 1
        kl = l1 = 0.0
        for a, b in zip(*counts, strict=True):
            p, q = (a + 0.5) / (80 + 3), (b + 0.5) / (80 + 3)
            kl += p * math.log(p / q)
            l1 += abs(a - b) / 80
        assert change.kl[layer].item() == pytest.approx(kl, abs=1e-12) and kl >= 0
        assert change.l1[layer].item() == pytest.approx(l1, abs=1e-12)
        assert change.overlap[layer].item() == pytest.approx(stayed / 40, abs=1e-12)
    assert change.means()["routing_l1"] == pytest.approx(change.l1.mean().item())


def test_no_change_and_every_change():
    before = table(["uniform"], 0)
    assert routing_change(before, before).means() == {"routing_kl": 0, "routing_l1": 0, "routing_overlap": 1}
    left = Routes(torch.tensor([[[0, 1]] * 5]).int(), 4, ["a"])
    right = Routes(torch.tensor([[[2, 3]] * 5]).int(), 4, ["a"])
    change = routing_change(left, right).means()
    assert change["routing_l1"] == 2 and change["routing_overlap"] == 0 and math.isfinite(change["routing_kl"])
    with pytest.raises(ValueError, match="same \\[L, T, K\\]"):
        routing_change(left, before)


def test_routes_are_those_of_the_tokens_in_order(random_model, examples):
    rows = [Example(e.input_ids[:n], e.labels[:n], 1) for e, n in zip(examples, (9, 3, 14), strict=True)]
    together = routes(random_model, rows, batch_size=2, pad_id=5)
    alone = torch.cat([routes(random_model, [row]).top_k_index for row in rows], 1)
    assert torch.equal(together.top_k_index, alone) and together.top_k_index.shape == (2, 26, 2)
    assert together.num_experts == 4 and len(together.layers) == 2
    assert routing_change(together, routes(random_model, rows)).means()["routing_overlap"] == 1
