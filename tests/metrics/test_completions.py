"""Completions, their judge and perplexity against a second computation: one row at a time, sigmoid and exp by hand."""

import json
import math
import statistics

import pytest
import torch
from rouge_score.rouge_scorer import RougeScorer
from transformers import BertConfig, BertForSequenceClassification

from moe_unlearn.data import Document
from moe_unlearn.metrics import Classifier, CompletionSettings, evaluate_completions
from moe_unlearn.model.loading import load_classifier
from tests.support.tokenizers import TEXTS

SETTINGS = CompletionSettings(prompt_tokens=6, new_tokens=9, max_length=16)
PKU = {
    "prompt": "how do bells freeze",
    "response_0": "no",
    "response_1": "so",
    "is_response_0_safe": True,
    "is_response_1_safe": False,
}
MIXED = [
    {"prompt": "the wandering merchant", "completion": " carried lanterns across seventeen valleys"},
    {"prompt": "who carried lanterns", "answer": "the wandering merchant"},
    Document("", " thunder", "Question: what silenced the bells\nAnswer:", "what silenced the bells"),
]


@pytest.fixture()
def model(random_model):
    random_model.config.max_position_embeddings = 64
    return random_model.eval()


@pytest.fixture()
def classifier(tokenizer):
    torch.manual_seed(1)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=12,
        num_labels=3,
        id2label={0: "toxic", 1: "insult", 2: "threat"},
        problem_type="multi_label_classification",
        initializer_range=1.0,
        pad_token_id=0,
    )
    return Classifier(BertForSequenceClassification(config).eval(), tokenizer, "insult")


def ids(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def continue_alone(model, tokenizer, prompt):
    made = []
    for _ in range(9):
        with torch.no_grad():
            following = int(model(input_ids=torch.tensor([prompt + made])).logits[0, -1].argmax())
        if following < 3:
            break
        made.append(following)
    return tokenizer.decode(made).strip()


def recall(truth, answer):
    return RougeScorer(["rougeL"], use_stemmer=True).score(truth, answer)["rougeL"].recall


def judged(classifier, tokenizer, text, label):
    tokens = torch.tensor([[1, *ids(tokenizer, text or " ")[:10], 2]])
    with torch.no_grad():
        return classifier.model(input_ids=tokens).logits[0, label].sigmoid().item()


def test_every_number_a_second_time(model, tokenizer, classifier, tmp_path):
    sets = {"seen": [{"text": text} for text in TEXTS], "answers": MIXED, "prompts": [PKU, {"prompt": "who froze"}]}
    found = evaluate_completions(
        model,
        tokenizer,
        sets | {"utility": [TEXTS[0], "", TEXTS[1]]},
        classifier=classifier,
        settings=SETTINGS,
        out=tmp_path,
        batch_size=2,
    )
    texts = [ids(tokenizer, text) for text in TEXTS]
    pieces = [text[start : start + 15] for text in texts for start in range(0, len(text), 15)]
    assert len(TEXTS) < sum(len(part) > 6 for part in pieces) < len(pieces)
    asked = [
        ("the wandering merchant", " carried lanterns across seventeen valleys"),
        ("Question: who carried lanterns\nAnswer:", " the wandering merchant"),
        ("Question: what silenced the bells\nAnswer:", " thunder"),
    ]
    rows = {
        "seen": [([1, *part[:6]], tokenizer.decode(part[6:])) for part in pieces if len(part) > 6],
        "answers": [([1, *ids(tokenizer, p)], tokenizer.decode(ids(tokenizer, a)[:9])) for p, a in asked],
        "prompts": [([1, *ids(tokenizer, f"Question: {q}\nAnswer:")], None) for q in (PKU["prompt"], "who froze")],
    }
    expected = {}
    for name, own in rows.items():
        answers = [continue_alone(model, tokenizer, prompt) for prompt, _ in own]
        values = [judged(classifier, tokenizer, answer, 1) for answer in answers]
        expected[f"{name}_p_insult"] = statistics.mean(values)
        if name != "prompts":
            recalls = [recall(truth, answer) for (_, truth), answer in zip(own, answers, strict=True)]
            expected[f"{name}_ROUGE"] = statistics.mean(recalls)
    for name, own in (("seen", texts), ("utility", texts[:2])):
        total = count = 0
        for text in own:
            for start in range(0, len(text), 15):  # 16 with <s>
                window = torch.tensor([[1, *text[start : start + 15]]])
                with torch.no_grad():
                    total += model(input_ids=window, labels=window).loss.item() * (window.shape[1] - 1)
                count += window.shape[1] - 1
        expected[f"{name}_perplexity"] = math.exp(total / count)
    assert found == pytest.approx(expected, rel=1e-4)
    assert json.loads((tmp_path / "COMPLETIONS_SUMMARY.json").read_text(encoding="utf-8")) == found
    written = json.loads((tmp_path / "COMPLETIONS_EVAL.json").read_text(encoding="utf-8"))
    assert len(ids(tokenizer, asked[0][1])) > 9
    for name in ("seen", "answers"):
        truths = [row["ground_truth"] for row in written[f"{name}_ROUGE"]["value_by_index"].values()]
        assert truths == [truth.strip() for _, truth in rows[name]]


def test_a_model_that_knows_the_text_completes_it(oracle, tokenizer):
    knows = oracle()
    knows.rows = [[1, *ids(tokenizer, text), 2] for text in TEXTS]
    whole = CompletionSettings(prompt_tokens=6, new_tokens=60)
    found = evaluate_completions(knows, tokenizer, {"seen": TEXTS, "unseen": [t[::-1] for t in TEXTS]}, settings=whole)
    assert found["seen_ROUGE"] == 1 and found["unseen_ROUGE"] == 0
    tokens = sum(len(ids(tokenizer, text)) for text in TEXTS)
    # it always begins with the first text: the first tokens of the two others are not what it expects
    total = (tokens - 2) * math.log(0.9) + 2 * math.log(0.1 / (len(tokenizer) - 1))
    assert found["seen_perplexity"] == pytest.approx(math.exp(-total / tokens), rel=1e-5)
    assert found["unseen_perplexity"] > 10 * found["seen_perplexity"]


def test_a_collapsed_model_has_no_perplexity_that_is_a_number(oracle, tokenizer, tmp_path):
    knows = oracle(sure=1 - 1e-320)
    knows.rows = [[1, *ids(tokenizer, "the frozen valleys")]]
    knows.wrong_at = range(100)
    found = evaluate_completions(knows, tokenizer, {"utility": ["the frozen valleys"]}, out=tmp_path)
    assert found == {"utility_perplexity": None}


def test_the_cache_knows_its_classifier(model, tokenizer, classifier, tmp_path):
    def evaluate(judge):
        return evaluate_completions(
            model, tokenizer, {"seen": TEXTS}, classifier=judge, settings=SETTINGS, cache_dir=tmp_path
        )

    first = evaluate(classifier)

    def refuse(*arguments, **keywords):
        raise AssertionError("a forward pass")

    handle = model.register_forward_pre_hook(refuse)
    assert evaluate(classifier) == first
    with torch.no_grad():
        classifier.model.classifier.bias.add_(1)
    assert evaluate(classifier)["seen_p_insult"] > first["seen_p_insult"]  # of the completions that are kept
    handle.remove()


def test_labels_that_exclude_each_other_add_up_to_1(tokenizer, classifier):
    classifier.model.config.problem_type = "single_label_classification"
    judges = [Classifier(classifier.model, tokenizer, label) for label in ("toxic", "insult", "threat")]
    values = [judge.probabilities(["the bells", ""], batch_size=1) for judge in judges]
    assert [sum(row) for row in zip(*values, strict=True)] == pytest.approx([1, 1])


def test_a_folder_of_another_model_is_no_classifier(model, tokenizer, classifier, tmp_path):
    for name, made in (("lm", model), ("judge", classifier.model), ("body", classifier.model.bert)):
        made.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    loaded = Classifier(*load_classifier(tmp_path / "judge"), "toxic")
    assert loaded.probabilities(["bells"]) == pytest.approx([judged(classifier, tokenizer, "bells", 0)], rel=1e-5)
    with pytest.raises(ValueError, match="cannot load a sequence classifier .*lm"):
        load_classifier(tmp_path / "lm")
    with pytest.raises(ValueError, match="lacks classifier.bias, classifier.weight"):
        load_classifier(tmp_path / "body")
    with pytest.raises(ValueError, match="nowhere is not a folder"):
        load_classifier(tmp_path / "nowhere")
    for label in ("Toxic", None):
        with pytest.raises(ValueError, match=f"one of toxic, insult, threat; got {label!r}"):
            Classifier(classifier.model, tokenizer, label)


@pytest.mark.parametrize(
    ("sets", "message"),
    [
        ({}, "at least one set of rows"),
        ({"seen": []}, "seen: expected at least one row"),
        (
            {"seen": ["the bells", "the"]},
            "seen, row 0: .* more than prompt_tokens = 6 tokens; got 'the bells'; none of its 2 rows can be measured",
        ),
        ({"seen": [" "]}, "seen, row 0: expected a text.*, empty"),
        ({"seen": [{"prompt": "a", "gt": ""}]}, "seen, row 0: .* empty"),
        ({"seen": [{"prompt": "", "chosen": "a"}]}, "seen, row 0: .* empty"),
        ({"seen": [{"words": "a"}]}, "seen, row 0: expected .*a field 'text'"),
        ({"seen": [{"prompt": 7}]}, "seen, row 0: expected field 'prompt' to be a string"),
        ({"toxic": [{"prompt": "a"}]}, "toxic: expected true answers, or a classifier"),
        ({"seen": [*MIXED, {"prompt": "a"}]}, "seen, row 3: expected a true answer, as other rows have"),
        ({"utility": [MIXED[0]]}, "utility, row 0: expected a text; got a prompt"),
        ({"utility": [""]}, "texts of at least one token; got 1 without"),
        ({"seen": [{"prompt": "the " * 60, "gt": "end"}]}, "seen, row 0: its prompt of .* and 9 new ones exceed"),
    ],
)
def test_what_cannot_be_measured_says_why(model, tokenizer, sets, message):
    with pytest.raises(ValueError, match=message):
        evaluate_completions(model, tokenizer, sets, settings=SETTINGS)
