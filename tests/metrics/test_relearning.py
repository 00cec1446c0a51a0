"""The relearning attack against a training loop written out, and the model it leaves alone."""

import pytest
import torch
from torch.nn.functional import cross_entropy

from moe_unlearn.data import Example
from moe_unlearn.metrics import RelearningCurve, relearning_attack

pytestmark = pytest.mark.quick


def test_the_curve_is_that_of_plain_training(random_model, examples):
    import copy

    plain = copy.deepcopy(random_model)
    optimizer = torch.optim.AdamW(plain.parameters(), 1e-2, weight_decay=0.0)
    expected = []
    for step in range(5):
        losses = []
        for example in examples:
            ids = torch.tensor([example.input_ids])
            losses.append(cross_entropy(plain(input_ids=ids).logits[0, :-1], ids[0, 1:], reduction="sum"))
        loss = sum(losses) / sum(len(e) - 1 for e in examples)
        if step in (0, 2, 4):
            expected.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    curve = relearning_attack(random_model, examples, steps=4, lr=1e-2, every=2, batch_size=9)
    assert curve.steps == [0, 2, 4]
    assert [v["nll"] for v in curve.values] == pytest.approx(expected, rel=1e-3)
    assert expected[2] < expected[0]


def test_the_model_and_the_random_state_are_left_alone(random_model, examples):
    random_model.train()
    random_model.lm_head.weight.requires_grad_(False)
    weights = {k: v.clone() for k, v in random_model.state_dict().items()}
    state = torch.get_rng_state()
    seen = []

    def measure(attacked):
        seen.append(attacked.lm_head.weight.clone())
        return {"x": 0.0}

    curve = relearning_attack(random_model, examples, steps=3, lr=1e-2, every=2, batch_size=2, measure=measure)
    assert curve.steps == [0, 2, 3] and not torch.equal(seen[0], seen[2])  # the attacker trains what was frozen
    assert torch.equal(torch.get_rng_state(), state) and random_model.training
    assert all(torch.equal(v, weights[k]) for k, v in random_model.state_dict().items())
    assert all(p.grad is None for p in random_model.parameters())
    assert not random_model.lm_head.weight.requires_grad
    with torch.inference_mode():
        assert len(relearning_attack(random_model, examples, steps=1).steps) == 2


def test_how_fast_it_comes_back():
    curve = RelearningCurve([0, 5, 10], [{"nll": 4.0, "verbmem": 0.1}, {"nll": 2.0, "verbmem": 0.5}, {"nll": 1.0}])
    assert curve.steps_until("nll", 3.0) == 5 and curve.steps_until("nll", 1.0) == 10
    assert curve.steps_until("nll", 0.5) is None and curve.steps_until("nll", 4.0) == 0
    assert curve.to_dict()["steps"] == [0, 5, 10]
    rising = RelearningCurve([0, 1], [{"v": 0.1}, {"v": 0.9}])
    assert rising.steps_until("v", 0.5) == 1


def test_nothing_to_relearn_is_an_error(random_model, examples):
    unlabelled = Example([1, 5, 6], [-100] * 3, 1)
    with pytest.raises(ValueError, match="at least one labelled token"):
        relearning_attack(random_model, [unlabelled])
    with pytest.raises(ValueError, match="at least one step"):
        relearning_attack(random_model, examples, steps=0)
    assert relearning_attack(random_model, [unlabelled, examples[0]], steps=2, batch_size=1).steps == [0, 2]
