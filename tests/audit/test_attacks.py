"""What single attacks do to prompts, training and probes, and how often a whole audit is wrong about unseen text."""

import copy
import dataclasses
import math

import pytest
import torch

from moe_unlearn.audit import ATTACKS, Evidence, Settings, Target, prompts, relearning
from moe_unlearn.audit.attack import reading
from moe_unlearn.audit.probe import out_of_fold, told_apart
from moe_unlearn.audit.weights import router_tensors
from moe_unlearn.data import Document, encode
from moe_unlearn.metrics import relearning_attack, routes, token_scores
from tests.support.models import FAMILIES, tiny_model
from tests.support.tokenizers import TEXTS


def target(model, experiment, rows, before, **settings):
    return Target(model=model, tokenizer=experiment.tokenizer, rows=rows, before=before, settings=Settings(**settings))


def halves(outcome, split):
    """An outcome whose forget and holdout documents are drawn anew from both; `split` has their numbers."""
    variants = {}
    for name, variant in outcome.variants.items():
        scores = {}
        for score, sides in variant.scores.items():
            pool = sides["forget"] + sides["holdout"]
            drawn = {side: [pool[i] for i in own] for side, own in split.items()} if pool else sides
            scores[score] = sides | drawn
        variants[name] = dataclasses.replace(variant, scores=scores)
    return dataclasses.replace(outcome, variants=variants)


@pytest.fixture(scope="module")
def unseen(experiment, rows):
    """What attacks find of documents that the model never saw, forget and holdout, and what a model shows that did."""
    names = ("plain", "rounding", "interpolation", "prompts")
    own = target(experiment.retrain, experiment, rows, experiment.target, samples=1, new_tokens=16)
    before = target(experiment.target, experiment, rows, experiment.target, samples=1, new_tokens=16)
    return {name: ATTACKS[name].run(own) for name in names}, ATTACKS["plain"].run(before)


def false_alarms(unseen, count):
    after, before = unseen
    draw, found = torch.Generator().manual_seed(0), []
    for i in range(count):
        order = torch.randperm(80, generator=draw).tolist() if i else list(range(80))
        split = {"forget": order[:40], "holdout": order[40:]}
        drawn = {name: halves(outcome, split) for name, outcome in after.items()}
        findings = Evidence(after=drawn, before=before, resamples=2999, seed=i).findings()
        assert sum(own.verdict != "" for own in findings) > 20
        found.append(any(own.verdict in ("present", "hidden", "overshot") for own in findings))
    return sum(found)


def test_document_sets_that_were_never_seen_raise_no_alarm(unseen):
    """The first is the forget set itself, which the model never saw."""
    assert false_alarms(unseen, 2) == 0


@pytest.mark.nightly
def test_of_a_hundred_document_sets_that_were_never_seen_few_raise_an_alarm(unseen):
    assert false_alarms(unseen, 100) <= 100 * 0.05 + 3 * math.sqrt(100 * 0.05 * 0.95)


def test_every_prompt_asks_for_the_true_rest(experiment):
    tokenizer = experiment.tokenizer
    texts = ["The harbour of Tarbh has two piers and one crane.", "A kettle boils sooner under its lid, says Mairi."]
    rows = encode([Document("", text) for text in texts], tokenizer, 128)
    decoded = lambda ids: tokenizer.decode(ids)  # noqa: E731
    own = prompts._plain(rows, 0)
    rest = own.input_ids[own.prefix :]
    assert own.input_ids == rows[0].input_ids and own.prefix == len(own) // 2
    assert [label for label in own.labels if label != -100] == rest
    longer = prompts._plain(rows, 0, share=0.75)
    assert longer.input_ids == own.input_ids and longer.prefix > own.prefix
    others = prompts._behind_others(rows, 0)
    assert others.input_ids == rows[1].input_ids + own.input_ids
    for change in (str.upper, prompts._templated, lambda text: prompts._misspelt(text, 3)):
        worded = prompts._worded(tokenizer, change, rows, 0)
        assert worded.input_ids[worded.prefix :] == rest and worded.labels[: worded.prefix] == [-100] * worded.prefix
        assert worded.input_ids[0] == tokenizer.bos_token_id  # stands where it stood
        assert decoded(worded.input_ids[1 : worded.prefix]) == change(decoded(own.input_ids[1 : own.prefix]))
    cut = prompts._fitting(others, 20)
    assert cut.input_ids == others.input_ids[-20:] and len(cut.labels) == 20 and cut.prefix == 20 - len(rest)


def test_typos_keep_the_letters():
    text = "the wandering merchant carried lanterns"
    wrong = prompts._misspelt(text, 0)
    assert sorted(wrong) == sorted(text) and wrong != text and wrong == prompts._misspelt(text, 0)
    assert sum(a != b for a, b in zip(wrong, text, strict=True)) <= 2 * math.ceil(len(text) / 8)
    assert prompts._misspelt("", 0) == "" and prompts._misspelt("a", 0) == "a"


def test_areas_are_those_of_the_relearning_attack(experiment, rows):
    few = {side: own[:8] for side, own in rows.items()}
    own = target(experiment.retrain, experiment, few, experiment.target, relearn_steps=4, relearn_lr=1e-3)
    outcome = relearning.ATTACK.run(own)
    drawn = []

    def measure(attacked):
        drawn.append(reading(token_scores(attacked, few["forget"]))["loglik"])
        return {}

    relearning_attack(experiment.retrain, few["forget"][::2], steps=4, lr=1e-3, every=1, measure=measure)
    areas = [sum(own) / 4 for own in zip(*drawn[1:], strict=True)]
    assert outcome.variants["trained on"].scores["loglik"]["forget"][::2] == pytest.approx(areas[::2], abs=1e-4)
    assert outcome.variants["watched"].scores["loglik"]["forget"][1::2] == pytest.approx(areas[1::2], abs=1e-4)
    assert areas[0] > drawn[0][0]
    curve = outcome.more["curves"]["forget, half trained on"]
    assert [step for step, _ in curve] == [0, 1, 2, 3, 4]


def test_a_probe_judges_documents_that_it_never_saw():
    torch.manual_seed(0)
    positive = torch.arange(60) < 30
    noise = out_of_fold(torch.randn(60, 300), positive)
    assert 0.2 < (noise[positive][:, None] > noise[~positive]).double().mean() < 0.8
    told = torch.randn(60, 300)
    told[positive, 0] += 8
    scores = out_of_fold(told, positive)
    assert (scores[positive][:, None] > scores[~positive]).double().mean() > 0.95
    with pytest.raises(ValueError, match="at least 5 documents of each kind"):
        out_of_fold(told[:32], positive[:32])


def test_texts_of_two_kinds_are_told_apart(experiment, rows):
    same = told_apart(rows["forget"], rows["holdout"])
    assert same.low <= 0
    other = encode([Document("", f"{i} {i + 1} {i + 2} kettles boil") for i in range(30)], experiment.tokenizer, 32)
    assert told_apart(rows["forget"], other).low > 0.5


def test_a_model_without_experts_has_no_routes(experiment, rows):
    dense = torch.nn.Linear(1, 1)
    assert ATTACKS["routing"].why_not(target(dense, experiment, rows, dense)) == (
        "the model has no Mixture-of-Experts layers"
    )
    assert ATTACKS["plain"].why_not(target(dense, experiment, rows, dense)) == ""


@pytest.mark.nightly
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_can_be_attacked(family, experiment):
    """Routers, experts and heads of all layouts are found, changed and put back."""
    texts = encode([Document("", text) for text in TEXTS], experiment.tokenizer, 40)[:6]
    rows = {"forget": texts[:2], "retain": texts[2:4], "holdout": texts[4:]}
    before = tiny_model(family, vocab_size=len(experiment.tokenizer)).eval()
    after = copy.deepcopy(before)
    with torch.no_grad():
        for router in router_tensors(after).values():
            router.add_(torch.randn_like(router))
    bits = {name: value.clone() for name, value in after.state_dict().items()}
    own = dataclasses.replace(
        target(after, experiment, rows, before, experts=2),
        routes={side: routes(before, part) for side, part in rows.items()},
    )
    found = {name: ATTACKS[name].run(own) for name in ("rounding", "routing", "interpolation", "inside")}
    assert all(torch.equal(value, bits[name]) for name, value in after.state_dict().items())
    known = reading(token_scores(before, rows["forget"]))["loglik"]
    scores = {name: variant.scores["loglik"]["forget"] for name, variant in found["routing"].variants.items()}
    assert scores["router back"] == pytest.approx(known, abs=1e-4)  # nothing else was changed
    assert {"routes forced", "all experts back"} <= scores.keys()
    assert ("top-k -1" in scores) == ("top-k +1" in scores) == (family != "phimoe")  # whose two experts are built in
    assert scores.get("top-k -1") != pytest.approx(scores["all experts back"], abs=1e-4)
    assert found["interpolation"].variants["0"].scores["loglik"]["forget"] == pytest.approx(known, abs=1e-4)
