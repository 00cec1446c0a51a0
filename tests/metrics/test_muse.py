"""MUSE's metrics against a second computation: no batches, no cache, scikit-learn, rouge-score by hand."""

import json

import numpy as np
import pytest
import torch
from rouge_score.rouge_scorer import RougeScorer
from sklearn.metrics import roc_auc_score

from moe_unlearn.metrics import MuseData, MuseSettings, evaluate_muse

QA = [
    {"question": "who carried lanterns", "answer": "the wandering merchant"},
    {"question": "what silenced the bells", "answer": "thunder"},
    {"question": "what do mountains shelter", "answer": "orchards and blossoms in autumn"},
]
ICL = [{"question": "who remembers", "answer": "every lighthouse keeper"}]
VERBMEM = [
    {"prompt": "the wandering merchant carried", "gt": " lanterns across seventeen frozen valleys"},
    {"prompt": "every lighthouse keeper", "gt": " remembers an evening when thunder silenced the harbour bells"},
]
FORGET = [{"text": "the wandering merchant carried lanterns"}, {"text": "granite mountains shelter orchards"}]
HOLDOUT = [{"text": "seven frozen bells travel"}, {"text": "an evening before sunrise"}, {"text": "storms, valleys"}]
SETTINGS = MuseSettings(verbmem_tokens=10, knowmem_tokens=8)


@pytest.fixture()
def model(random_model):
    random_model.config.max_position_embeddings = 256
    return random_model.eval()


@pytest.fixture()
def data():
    return MuseData(verbmem=VERBMEM, forget_qa=QA, forget_qa_icl=ICL, retain_qa=QA[:1], forget=FORGET, holdout=HOLDOUT)


def ids(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def continue_alone(model, tokenizer, prompt, new_tokens):
    tokens, made = [tokenizer.bos_token_id, *ids(tokenizer, prompt)], []
    for _ in range(new_tokens):
        with torch.no_grad():
            following = int(model(input_ids=torch.tensor([tokens + made])).logits[0, -1].argmax())
        if following in tokenizer.all_special_ids:
            break
        made.append(following)
    return tokenizer.decode(made)


def rouge_f1(truth, answer, stem=True):
    return RougeScorer(["rougeL"], use_stemmer=stem).score(truth, answer)["rougeL"].fmeasure


def logprobs(model, tokenizer, text):
    tokens = torch.tensor([[tokenizer.bos_token_id, *ids(tokenizer, text)]])
    with torch.no_grad():
        logits = model(input_ids=tokens).logits[0, :-1].double()
    return (
        logits.log_softmax(-1)[torch.arange(logits.shape[0]), tokens[0, 1:]].numpy(),
        logits.argmax(-1),
        tokens[0, 1:],
    )


def unknown_auc(model, tokenizer):
    scores = []
    for row in FORGET + HOLDOUT:
        values = np.sort(logprobs(model, tokenizer, row["text"])[0])
        scores.append(values[: max(1, int(0.4 * len(values)))].mean())
    # MUSE: forget is class 0, holdout class 1, scored by the mean log-probability
    return roc_auc_score([0] * len(FORGET) + [1] * len(HOLDOUT), scores)


def test_every_number_a_second_time(model, tokenizer, data, tmp_path):
    found = evaluate_muse(model, tokenizer, data, settings=SETTINGS, out=tmp_path, batch_size=2)
    shown = "Question: who remembers\nAnswer: every lighthouse keeper\n\n"
    expected = []
    for row in QA:
        answer = continue_alone(model, tokenizer, f"{shown}Question: {row['question']}\nAnswer:", 8)
        for mark in ("\n\n", "\nQuestion", "Question:"):
            answer = answer.split(mark)[0]
        expected.append(rouge_f1(row["answer"], answer))
    assert found["forget_knowmem_ROUGE"] == pytest.approx(np.mean(expected), abs=1e-12)
    alone = continue_alone(model, tokenizer, f"Question: {QA[0]['question']}\nAnswer:", 8)
    assert found["retain_knowmem_ROUGE"] == pytest.approx(rouge_f1(QA[0]["answer"], alone), abs=1e-12)
    expected, exact, strength, their_strength = [], [], [], []
    for row in VERBMEM:
        answer = continue_alone(model, tokenizer, row["prompt"], 10)
        expected.append(rouge_f1(tokenizer.decode(ids(tokenizer, row["gt"])[:10]), answer))
        tokens = torch.tensor([[1, *ids(tokenizer, row["prompt"]), *ids(tokenizer, row["gt"])]])
        n = len(ids(tokenizer, row["gt"]))
        hits = (model(input_ids=tokens).logits[0, -n - 1 : -1].argmax(-1) == tokens[0, -n:]).tolist()
        exact.append(sum(hits) / n)
        strength.append(1 - next(k for k in range(n + 1) if all(hits[k:])) / n)
        their_strength.append(1 - next((k for k in range(n) if all(hits[k:])), n - 1) / n)
    assert found["forget_verbmem_ROUGE"] == pytest.approx(np.mean(expected), abs=1e-12)
    assert found["exact_memorization"] == pytest.approx(np.mean(exact), abs=1e-12)
    assert found["extraction_strength"] == pytest.approx(np.mean(strength), abs=1e-12)
    theirs = found["extraction_strength_open_unlearning"]
    assert theirs == pytest.approx(np.mean(their_strength), abs=1e-12) and theirs != found["extraction_strength"]
    assert 1 - found["mia_min_k"] == pytest.approx(unknown_auc(model, tokenizer), abs=1e-12)
    assert "privleak" not in found
    assert json.loads((tmp_path / "MUSE_SUMMARY.json").read_text(encoding="utf-8")) == found
    rows = json.loads((tmp_path / "MUSE_EVAL.json").read_text(encoding="utf-8"))
    assert rows["forget_verbmem_ROUGE"]["value_by_index"]["1"]["ground_truth"].startswith("remembers")
    assert rows["mia_min_k"]["auc_muse"] == pytest.approx(1 - rows["mia_min_k"]["auc"])


def test_privleak_needs_the_retrained_run_and_agrees_with_its_formula(model, tokenizer, data, tmp_path):
    with torch.no_grad():
        evaluate_muse(model, tokenizer, data, settings=SETTINGS, out=tmp_path)
        theirs = unknown_auc(model, tokenizer)
        model.lm_head.weight.mul_(-1)
        ours = unknown_auc(model, tokenizer)
    assert ours != theirs
    found = evaluate_muse(model, tokenizer, data, settings=SETTINGS, reference_run=tmp_path)
    assert found["privleak"] == pytest.approx(100 * (ours - theirs) / theirs)
    with pytest.raises(ValueError, match="verbmem_tokens 10 instead of 11"):
        evaluate_muse(
            model, tokenizer, data, settings=MuseSettings(verbmem_tokens=11, knowmem_tokens=8), reference_run=tmp_path
        )
    fewer = MuseData(forget=FORGET, holdout=HOLDOUT[:2])
    with pytest.raises(ValueError, match="'mia_min_k' on other data"):
        evaluate_muse(model, tokenizer, fewer, settings=SETTINGS, reference_run=tmp_path)


def test_the_sign_of_both_conventions(oracle, tokenizer, tmp_path):
    knows = oracle()
    knows.rows = [[1, *ids(tokenizer, row["text"])] for row in FORGET]
    data = MuseData(forget=FORGET, holdout=HOLDOUT)
    found = evaluate_muse(knows, tokenizer, data, out=tmp_path)
    assert found["mia_min_k"] == 1  # open-unlearning's: a forget document is always the likelier one
    knows.rows = []
    knows.sure = 0.5
    fresh = evaluate_muse(knows, tokenizer, data, out=tmp_path / "fresh")
    assert fresh["mia_min_k"] == 0.5
    knows.rows, knows.sure = [[1, *ids(tokenizer, row["text"])] for row in FORGET], 0.9
    under = evaluate_muse(knows, tokenizer, data, reference_run=tmp_path / "fresh")
    assert under["privleak"] == -100
    assert evaluate_muse(knows, tokenizer, data, reference_run=tmp_path)["privleak"] is None  # it knows them itself


def test_a_cached_evaluation_runs_no_forward_pass(model, tokenizer, data, tmp_path):
    first = evaluate_muse(model, tokenizer, data, settings=SETTINGS, cache_dir=tmp_path)

    def refuse(*arguments, **keywords):
        raise AssertionError("a forward pass")

    handle = model.register_forward_pre_hook(refuse)
    assert evaluate_muse(model, tokenizer, data, settings=SETTINGS, cache_dir=tmp_path, batch_size=3) == first
    handle.remove()


def test_stemming_is_a_setting(model, tokenizer, oracle):
    knows = oracle()
    knows.rows = [[1, *ids(tokenizer, "the frozen"), *ids(tokenizer, " valley")]]
    data = MuseData(verbmem=[{"prompt": "the frozen", "gt": " valleys"}])
    cut = len(ids(tokenizer, " valley"))  # the answer goes on after it
    settings = (MuseSettings(verbmem_tokens=max(cut, len(ids(tokenizer, " valleys"))), use_stemmer=s) for s in (1, 0))
    stemmed, plain = (evaluate_muse(knows, tokenizer, data, settings=s)["forget_verbmem_ROUGE"] for s in settings)
    assert stemmed == 1 and plain == 0


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ({}, "at least one of MUSE's sets"),
        ({"forget": FORGET}, "needs both sides; got 2 forget and 0 holdout"),
        ({"verbmem": [{"prompt": "a"}]}, "verbmem, row 0: expected prompt, gt; gt is missing"),
        ({"forget_qa": [QA[0], {"question": "?"}]}, "forget_qa, row 1: .* answer is missing"),
        (
            {"forget": [{"text": ""}], "holdout": HOLDOUT},
            "forget, row 0: expected text to be a text, not empty",
        ),
        ({"forget": FORGET, "holdout": [*HOLDOUT, {"text": 7}]}, "holdout, row 3: expected text to be a text"),
        ({"forget_qa": [QA[0], {**QA[0], "answer": 1912}]}, "forget_qa, row 1: expected answer to be a text"),
        ({"retain_qa": QA, "retain_qa_icl": [{**ICL[0], "question": " "}]}, "retain_qa_icl, row 0: expected question"),
        ({"verbmem": [VERBMEM[0], {"prompt": "", "gt": "a"}]}, "verbmem, row 1: expected prompt to be a text"),
        ({"verbmem": [{"prompt": "the " * 300, "gt": "end"}]}, "leaves no room"),
    ],
)
def test_what_cannot_be_measured_says_why(model, tokenizer, rows, message):
    with pytest.raises(ValueError, match=message):
        evaluate_muse(model, tokenizer, MuseData(**rows))


def test_one_row_a_long_text_and_no_pad_token(model, tokenizer, tmp_path):
    tokenizer.pad_token, kept = None, tokenizer.pad_token
    try:
        long = [{"text": "granite mountains " * 400}]
        found = evaluate_muse(model, tokenizer, MuseData(forget=long, holdout=HOLDOUT[:1]))
        assert 0 <= found["mia_min_k"] <= 1
        found = evaluate_muse(model, tokenizer, MuseData(forget_qa=QA), settings=SETTINGS, batch_size=3)
        assert found == evaluate_muse(model, tokenizer, MuseData(forget_qa=QA), settings=SETTINGS, batch_size=1)
    finally:
        tokenizer.pad_token = kept
