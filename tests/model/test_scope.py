"""Scopes: patterns, expert masks over every layout, routers, and SEUF's affinity and anchor."""

import re

import pytest
import torch

from moe_unlearn import seuf
from moe_unlearn.experts import experts_modules
from moe_unlearn.model import scope
from moe_unlearn.ops.bits import unpack_bits
from tests.support.batches import random_batches
from tests.support.models import TINY_MODELS, tiny_olmoe

pytestmark = pytest.mark.quick


@pytest.fixture
def model():
    torch.manual_seed(0)
    return tiny_olmoe(vocab_size=64).eval()


def test_matching_names(model):
    chosen = scope.matching(model, [r"layers\.0\..*down_proj", "norm"])
    assert "model.layers.0.mlp.experts.down_proj" in chosen and "model.norm.weight" in chosen
    assert "model.layers.1.mlp.experts.down_proj" not in chosen
    with pytest.raises(ValueError, match="'nope' matches no parameter; names look like model.embed"):
        scope.matching(model, ["nope"])
    with pytest.raises(ValueError, match="with forget.objective rmu add forget.layer=1") as refused:
        scope.matching(model, ["nope"])
    [named] = re.findall(r"scope.parameters=\['(.*)'\]", str(refused.value))  # the remedy is one
    experts = {name for name, _ in model.named_parameters() if "experts" in name}
    assert scope.matching(model, [named]) == experts
    with pytest.raises(ValueError, match="is no regular expression"):
        scope.matching(model, ["("])


@pytest.mark.parametrize("name", TINY_MODELS)
def test_expert_masks_and_routers_on_every_family(name):
    model = TINY_MODELS[name]()
    modules = experts_modules(model)
    first, module = next(iter(modules.items()))
    selected = torch.zeros(len(modules), module.num_experts, dtype=torch.bool)
    selected[0, 1] = True
    masks = scope.expert_masks(model, selected)
    parameters = dict(model.named_parameters())
    assert set(masks) == {f"{first}.{suffix}" for suffix, _ in module.named_parameters()}
    for key, words in masks.items():
        kept = unpack_bits(words, parameters[key].shape[-1])
        assert kept.shape == parameters[key].shape
        assert kept[1].all() and int(kept.sum()) == kept[1].numel()
    routers = scope.router_parameters(model, first)
    assert routers and all(parameters[r].shape[0] == module.num_experts for r in routers)
    assert not any("shared" in r or "experts." in r for r in routers)
    everywhere = {name for layer in modules for name in scope.router_parameters(model, layer)}
    assert scope.routing_parameters(model) == everywhere and len(everywhere) > len(routers)


def test_bad_selection(model):
    with pytest.raises(ValueError, match=r"selected must be bool \[L, E\] with L = 2"):
        scope.expert_masks(model, torch.ones(3, 8, dtype=torch.bool))


def test_combine():
    one, other = torch.tensor([0b0110], dtype=torch.int32), torch.tensor([0b0011], dtype=torch.int32)
    both = scope.combine({"a": one, "b": one}, {"a": other, "c": other})
    assert {k: int(v) for k, v in both.items()} == {"a": 0b0010, "b": 0b0110, "c": 0b0011}


def test_affinity_is_the_mean_over_sequences_of_the_mean_gate(model):
    batches = random_batches(64, count=2, rows=3)
    expected, sequences = torch.zeros(2, 8, dtype=torch.float64), 0
    for batch in batches:
        for row in range(3):
            length = int(batch["attention_mask"][row].sum())
            seen = []
            hooks = [
                m.register_forward_pre_hook(lambda mod, a, s=seen: s.append((a[1], a[2])))
                for m in experts_modules(model).values()
            ]
            with torch.no_grad():
                model(batch["input_ids"][row : row + 1, :length])
            for h in hooks:
                h.remove()
            for layer, (index, weights) in enumerate(seen):
                for t in range(length):
                    for k in range(index.shape[1]):
                        expected[layer, index[t, k]] += weights[t, k].double() / length
            sequences += 1
    got = seuf.affinity(model, batches)
    assert torch.allclose(got, expected / sequences, atol=1e-6)
    chosen = seuf.select(got)
    assert int(chosen.sum()) == 1 and got[chosen] == got.max()


def test_anchor_loss_by_hand():
    # an id that is behind the last expert is not here
    index, top_k = torch.tensor([[1, 0], [1, 3], [2, 3]]), torch.tensor([[0.5, 0.5], [1.0, 9.0], [7.0, 9.0]])
    gate = seuf.Gate(index, top_k, 3).dense()
    assert torch.equal(gate, torch.tensor([[0.5, 0.5, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 7.0]]))
    attended = torch.tensor([True, True, False])
    assert float(seuf.anchor_loss(gate, 1, attended)) == pytest.approx((0.25 + 0.25 + 0.0) / 2)
