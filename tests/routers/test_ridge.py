"""The ridge correction of routers after training."""

import pytest
import torch

from moe_unlearn.config import Recipe
from moe_unlearn.ops.bits import unpack_bits
from moe_unlearn.routers import corrected, logits
from tests.support.models import tiny_olmoe
from tests.support.steps import VOCAB, prepared, recipe, weights

CORRECT = "router={correct: true, ridge: 1.0e-4, stability_every: 1}"


@pytest.fixture
def model():
    torch.manual_seed(0)
    return tiny_olmoe(vocab_size=VOCAB).eval().double()


def test_a_corrected_weight_is_where_the_gradient_of_its_sum_vanishes(model):
    """sum_t (x w' - z)^2 + lambda |w' - w|^2 with the inputs of now, z of before; under a mask in its coordinates."""
    step, _, retain = prepared(model, recipe("wagle", CORRECT))
    before = step.prepared.router_logits
    name = next(iter(before))
    p = dict(model.named_parameters())[name]
    with torch.no_grad():
        p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(1), dtype=p.dtype))
    seen = []
    handle = model.get_submodule(name.removesuffix(".weight")).register_forward_pre_hook(
        lambda module, args: seen.append(args[0].reshape(-1, p.shape[1]))
    )
    found = {}
    for free in (None, unpack_bits(step.masks[name], p.shape[1])):
        seen.clear()
        found[free is None] = corrected(model, retain, before, 1e-4, {} if free is None else {name: free})[name]
        rows = [batch["attention_mask"].flatten().bool() for batch in retain]
        x = torch.cat([own[at] for own, at in zip(seen, rows, strict=True)])
        made = found[free is None].clone().requires_grad_()
        weight = 1e-4 * (x.T @ x).diagonal().mean()
        ((x @ made.T - before[name]).square().sum() + weight * (made - p.detach()).square().sum()).backward()
        gradient = made.grad if free is None else made.grad[free]
        assert gradient.abs().max() < 1e-8 * (x.T @ x).norm()
        assert free is None or torch.equal(made.detach()[~free], p.detach()[~free])
    handle.remove()
    assert not torch.equal(found[True], found[False])


def test_a_moved_router_comes_back_and_a_worse_correction_is_undone(model, monkeypatch):
    step, forget, retain = prepared(model, recipe("graddiff", CORRECT, lr=1e-3))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("mlp.gate.weight"):
                p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1), dtype=p.dtype))
    metrics = step.correct_routers()
    assert metrics["routing_stability_uncorrected"] < metrics["routing_stability"]
    first = next(iter(step.prepared.router_logits))
    torch.testing.assert_close(logits(model, retain)[first], step.prepared.router_logits[first], rtol=0, atol=1e-2)
    before = weights(model)
    monkeypatch.setattr(
        "moe_unlearn.routers.corrected", lambda model, *_: {first: -dict(model.named_parameters())[first].detach()}
    )
    metrics = step.correct_routers()
    assert metrics["routing_stability"] == metrics["routing_stability_uncorrected"]
    assert all(torch.equal(value, before[name]) for name, value in weights(model).items())


@pytest.mark.quick
def test_frozen_routers_cannot_be_corrected():
    with pytest.raises(ValueError, match="router.correct moves routers after the last step"):
        Recipe.from_dict({"router": {"mode": "frozen", "correct": True}})
