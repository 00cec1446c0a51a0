"""Membership attacks against their formulas, row by row in float64, as open-unlearning and as this package counts."""

import copy
import json
import statistics
import weakref
import zlib

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score
from tokenizers import processors

from moe_unlearn.metrics import MuseData, MuseSettings, TofuData, TofuSettings, evaluate_muse, evaluate_tofu, like

FORGET = ["the wandering merchant carried lanterns", "granite mountains shelter orchards", "thunder silenced bells"]
HOLDOUT = ["seven frozen bells travel", "an evening before sunrise", "storms, valleys"]
ATTACKS = ("loss", "min_k", "min_k_plus_plus", "zlib", "gradnorm", "reference")
QA = {"perturbed_answer": ["a bell"], "paraphrased_answer": "it was"}


@pytest.fixture()
def model(random_model):
    random_model.config.max_position_embeddings = 256
    return random_model.eval()


@pytest.fixture()
def reference(model):
    other = type(model)(model.config).eval()
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for weight in other.parameters():
            weight.copy_(0.2 * torch.randn(weight.shape, generator=generator))
    return other


def by_hand(model, reference, tokenizer, ids, begin, last):
    """Scores of one row whose tokens from `begin` on carry labels; the last counts everywhere only with `last`."""
    tokens = torch.tensor([ids])
    logits = model(input_ids=tokens).logits[0].double()
    table = torch.stack([row - torch.logsumexp(row, 0) for row in logits])
    places = list(range(max(begin, 1), len(ids)))
    counted = places if last else places[:-1]
    means, deviations = [], []
    for row in table.detach().numpy():
        p = np.exp(row)
        means.append(p @ row)
        deviations.append(np.sqrt(max(p @ row**2 - means[-1] ** 2, 1e-6)))
    own = {i: table[i - 1, ids[i]].item() for i in places}
    loss = -statistics.mean(own.values())
    with torch.no_grad():
        theirs = reference(input_ids=tokens).logits[0].double().log_softmax(-1)

    def lowest(values):
        return -statistics.mean(sorted(values)[: max(1, int(0.4 * len(values)))])

    model.zero_grad()
    (-sum(table[i - 1, ids[i]] for i in counted) / len(counted)).backward()
    norms = [p.grad.double().pow(2).sum().sqrt().item() for p in model.parameters() if p.grad is not None]
    model.zero_grad(set_to_none=True)
    text = tokenizer.decode([ids[i] for i in places], skip_special_tokens=True)
    return {
        "loss": loss,
        "min_k": lowest([own[i] for i in counted]),
        "min_k_plus_plus": lowest([(own[i] - means[i - 1]) / deviations[i - 1] for i in counted]),
        "zlib": loss / len(zlib.compress(text.encode())),
        "gradnorm": statistics.mean(norms),
        "reference": loss + statistics.mean(theirs[i - 1, ids[i]].item() for i in places),
    }


def check(found, expected):
    """`expected` has the scores of the rows of both sides."""
    for attack in ATTACKS:
        result, scores = found[f"mia_{attack}"], {s: [row[attack] for row in own] for s, own in expected.items()}
        for side, own in scores.items():
            written = [row["score"] for row in result[side]["value_by_index"].values()]
            assert written == pytest.approx(own, rel=2e-5, abs=1e-6), (attack, side)
        labels = [1] * len(scores["forget"]) + [0] * len(scores["holdout"])
        value = roc_auc_score(labels, [-v for v in scores["forget"] + scores["holdout"]])
        assert result["agg_value"] == pytest.approx(value) == 1 - result["auc_muse"], attack


@pytest.mark.parametrize("theirs", [False, True])
def test_muse(model, reference, tokenizer, tmp_path, theirs):
    settings = like("open-unlearning", MuseSettings) if theirs else MuseSettings()
    data = MuseData(forget=[{"text": t} for t in FORGET], holdout=[{"text": t} for t in HOLDOUT])
    made = []

    def make():
        own = copy.deepcopy(reference)
        made.append(weakref.ref(own))
        return own

    more = {"gradient_norm": True, "reference_model": make if theirs else reference, "batch_size": 2}
    evaluate_muse(model, tokenizer, data, settings=settings, out=tmp_path, **more)
    expected = {}
    for side, texts in (("forget", FORGET), ("holdout", HOLDOUT)):
        # <s>, the text and for them </s>, which the tokenizer adds
        rows = [tokenizer(text)["input_ids"][: None if theirs else -1] for text in texts]
        expected[side] = [by_hand(model, reference, tokenizer, ids, 1, not theirs) for ids in rows]
    found = json.loads((tmp_path / "MUSE_EVAL.json").read_text(encoding="utf-8"))
    check(found, expected)
    assert all(p.grad is None for p in model.parameters())
    assert [own() for own in made] == [None] * theirs


def test_tofu_as_open_unlearning(model, reference, tokenizer, tmp_path):
    def rows(texts):
        return [{"question": "who", "answer": text} for text in texts]

    tokenizer = copy.deepcopy(tokenizer)  # as Llama's: no end token by itself
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing("<s> $A", None, [("<s>", 1)])
    data = TofuData(forget=[row | QA for row in rows(FORGET)], holdout=rows(HOLDOUT))
    settings = like("open-unlearning", TofuSettings, new_tokens=2)
    more = {"gradient_norm": True, "reference_model": reference}
    evaluate_tofu(model, tokenizer, data, settings=settings, out=tmp_path, **more)
    expected = {}
    for side, texts in (("forget", FORGET), ("holdout", HOLDOUT)):
        prompt = "Question: who\nAnswer: "
        cut = len(tokenizer(prompt)["input_ids"])
        whole = [tokenizer(prompt + text)["input_ids"] + [2] for text in texts]
        expected[side] = [by_hand(model, reference, tokenizer, ids, cut, False) for ids in whole]
    check(json.loads((tmp_path / "TOFU_EVAL.json").read_text(encoding="utf-8")), expected)


def test_what_the_auc_is_compared_with(model, reference, tokenizer, tmp_path):
    data = MuseData(forget=[{"text": t} for t in FORGET], holdout=[{"text": t} for t in HOLDOUT])
    retrained = evaluate_muse(reference, tokenizer, data, out=tmp_path)
    base = retrained["mia_min_k"]
    assert not {"privleak", "rel_diff", "mia_gradnorm", "mia_reference"} & retrained.keys()
    found = evaluate_muse(model, tokenizer, data, reference_run=tmp_path)
    known = found["mia_min_k"]
    assert 0 < base < 1 and known != base
    assert found["rel_diff"] == pytest.approx(100 * (known - base) / base)
    assert found["privleak"] == pytest.approx(100 * (base - known) / (1 - base))
    assert found["privleak_unseen"] == pytest.approx(100 * (0.5 - known) / 0.5)
    theirs = evaluate_muse(model, tokenizer, data, settings=like("open-unlearning", MuseSettings))
    assert theirs["privleak"] == pytest.approx(100 * (0.5 - theirs["mia_min_k"]) / 0.5)
    assert theirs["rel_diff"] == pytest.approx(100 * (theirs["mia_min_k"] - 0.5) / 0.5)


def test_gradient_norms_are_cached_under_the_weights_that_require_a_gradient(model, tokenizer, tmp_path):
    data = MuseData(forget=[{"text": t} for t in FORGET], holdout=[{"text": t} for t in HOLDOUT])

    def scores(name, cache):
        evaluate_muse(model, tokenizer, data, gradient_norm=True, out=tmp_path / name, cache_dir=cache)
        result = json.loads((tmp_path / name / "MUSE_EVAL.json").read_text(encoding="utf-8"))["mia_gradnorm"]
        return [row["score"] for row in result["forget"]["value_by_index"].values()]

    whole = scores("whole", tmp_path / "cache")
    for name, weight in model.named_parameters():
        weight.requires_grad_(name == "lm_head.weight")
    assert scores("head", tmp_path / "cache") == scores("anew", None) != whole
    model.requires_grad_(True)
    assert scores("again", tmp_path / "cache") == whole


def test_gradient_norms_need_weights_that_require_a_gradient(model, tokenizer):
    data = MuseData(forget=[{"text": FORGET[0]}], holdout=[{"text": HOLDOUT[0]}])
    with pytest.raises(ValueError, match="mia_gradnorm needs parameters that require a gradient"):
        evaluate_muse(model.requires_grad_(False), tokenizer, data, gradient_norm=True)
