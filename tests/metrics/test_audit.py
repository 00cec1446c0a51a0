"""What an audit is made of: each number is that of its metric, on the documents it says."""

import copy

import pytest
import torch

from moe_unlearn import metrics
from moe_unlearn.data import pad_token_id


@pytest.fixture
def pair(random_model):
    """A model, and the same with its routers turned."""
    after = copy.deepcopy(random_model)
    with torch.no_grad():
        for layer in after.model.layers:
            layer.mlp.gate.weight.copy_(layer.mlp.gate.weight.roll(1, 0))
    return random_model, after


def test_numbers_are_those_of_the_metrics(pair, tokenizer, examples):
    before, after = pair
    found = metrics.audit(
        after, tokenizer, forget=examples[:2], retain=examples[2:], before=before, relearn_steps=6, relearn_lr=1e-2,
        prompt_tokens=4, new_tokens=8,
    )  # fmt: skip
    pad = pad_token_id(tokenizer)
    change = metrics.routing_change(*(metrics.routes(m, examples[2:], pad_id=pad) for m in pair)).means()
    assert {k: v for k, v in found.items() if k.startswith("routing")} == pytest.approx(change)
    prompts = [e.input_ids[:4] for e in examples[:2]]
    stop = set(tokenizer.all_special_ids)
    old, new = (metrics.greedy(m, prompts, 8, pad_id=pad, stop=stop) for m in pair)
    assert found["gibberish"] == metrics.gibberish_rate(before, prompts, new, old, pad_id=pad).rate
    curve = metrics.relearning_attack(after, examples[:2], steps=6, lr=1e-2, pad_id=pad)
    assert found["relearning"] == curve.to_dict()
    known = metrics.nll(metrics.token_scores(before, examples[:2], pad_id=pad))
    assert found["relearn_half"] == curve.steps_until("nll", (curve.values[0]["nll"] + known) / 2)


def test_only_what_was_asked_for(pair, tokenizer, examples):
    sides = {"forget": examples[:2], "retain": examples[2:]}
    assert metrics.audit(pair[0], tokenizer, **sides, relearn_steps=1).keys() == {"relearning"}
    same = metrics.audit(pair[0], tokenizer, **sides, before=pair[0], prompt_tokens=4, new_tokens=8)
    assert same == {"routing_kl": 0, "routing_l1": 0, "routing_overlap": 1, "gibberish": 0}
    with pytest.raises(ValueError, match="got neither"):
        metrics.audit(pair[0], tokenizer, **sides)
