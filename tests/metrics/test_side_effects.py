"""What side effects are made of: each number is that of its metric, on the documents it says."""

import copy
import sys

import pytest
import torch
from transformers import AddedToken

from moe_unlearn import metrics
from moe_unlearn.data import Document, encode, pad_token_id, special_ids, train_tokenizer

TEXTS = ["the wandering merchant carried lanterns across seventeen frozen valleys", "every lighthouse keeper"]


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
    found = metrics.side_effects(
        after,
        tokenizer,
        forget=examples[:2],
        retain=examples[2:],
        before=before,
        relearn_steps=6,
        relearn_lr=1e-2,
        prompt_tokens=4,
        new_tokens=8,
    )
    pad = pad_token_id(tokenizer)
    change = metrics.routing_change(*(metrics.routes(m, examples[2:], pad_id=pad) for m in pair)).means()
    assert {k: v for k, v in found.items() if k.startswith("routing")} == pytest.approx(change)
    prompts = [e.input_ids[:4] for e in examples[:2]]
    stop = special_ids(tokenizer)
    old, new = (metrics.greedy(m, prompts, 8, pad_id=pad, stop=stop) for m in pair)
    assert found["gibberish"] == metrics.gibberish_rate(before, prompts, new, old, pad_id=pad).rate
    curve = metrics.relearning_attack(after, examples[:2], steps=6, lr=1e-2, pad_id=pad)
    assert found["relearning"] == curve.to_dict()
    known = metrics.nll(metrics.token_scores(before, examples[:2], pad_id=pad))
    assert found["relearn_half"] == curve.steps_until("nll", (curve.values[0]["nll"] + known) / 2)


def test_only_what_was_asked_for(pair, tokenizer, examples):
    sides = {"forget": examples[:2], "retain": examples[2:]}
    assert metrics.side_effects(pair[0], tokenizer, **sides, relearn_steps=1).keys() == {"relearning"}
    same = metrics.side_effects(pair[0], tokenizer, **sides, before=pair[0], prompt_tokens=4, new_tokens=8)
    assert same == {"routing_kl": 0, "routing_l1": 0, "routing_overlap": 1, "gibberish": 0}
    with pytest.raises(ValueError, match="got neither"):
        metrics.side_effects(pair[0], tokenizer, **sides)


def asked_for(pair, tokenizer, examples, monkeypatch, **options):
    """Return the prompts and the stops with which side effects on these forget examples are looked for."""
    seen = []

    def generate(model, prompts, new_tokens, *, stop, **more):
        seen.append(([list(prompt) for prompt in prompts], set(stop)))
        return [[9]] * len(prompts)

    # the package's attribute of the module's name is the function
    monkeypatch.setattr(sys.modules["moe_unlearn.metrics.side_effects"], "greedy", generate)
    metrics.side_effects(pair[1], tokenizer, forget=examples, retain=examples, before=pair[0], **options)
    assert len(seen) == 2 and seen[0] == seen[1]
    return seen[0]


def test_answers_end_at_special_tokens_outside_the_tokenizers_map(pair, monkeypatch):
    tokenizer = train_tokenizer(TEXTS, 300)
    tokenizer.add_tokens([AddedToken("<|eot_id|>", special=True)])
    eot = tokenizer.convert_tokens_to_ids("<|eot_id|>")
    assert eot not in tokenizer.all_special_ids
    _, stop = asked_for(pair, tokenizer, encode([Document("", TEXTS[0])], tokenizer, 128), monkeypatch)
    assert eot in stop and tokenizer.eos_token_id in stop


def test_prompts_are_those_of_verbmem(pair, tokenizer, monkeypatch):
    question = Document("", "the bells.", "Who rang? ", "Who rang?")
    [asked_apart] = encode([question], tokenizer, 128, seam="separate")
    assert asked_apart.asked != asked_apart.input_ids[: asked_apart.prefix]
    short, whole = encode([Document("", "ab"), Document("", TEXTS[0])], tokenizer, 128)
    assert short.input_ids[-1] == tokenizer.eos_token_id and len(short) < 8
    prompts, _ = asked_for(pair, tokenizer, [asked_apart, short, whole], monkeypatch, prompt_tokens=8)
    # a document that is no longer than its prompt has nothing to continue, and its end token is no part of a prompt
    assert prompts == [asked_apart.asked, whole.input_ids[:8]]
    with pytest.raises(ValueError, match="longer than its prompt"):
        asked_for(pair, tokenizer, [short], monkeypatch, prompt_tokens=8)
