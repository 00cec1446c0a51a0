"""TOFU's metrics against a second computation, row by row, and scipy called by hand."""

import itertools
import json
import math
import statistics

import pytest
import torch
from rouge_score.rouge_scorer import RougeScorer
from scipy.stats import hmean, ks_2samp
from sklearn.metrics import roc_auc_score

from moe_unlearn.metrics import TofuData, TofuSettings, evaluate_tofu, kolmogorov_smirnov
from moe_unlearn.metrics.tofu import harmonic_mean, truth_ratio


def row(question, answer, *wrong, paraphrased=None):
    made = {"question": question, "answer": answer, "perturbed_answer": list(wrong)}
    return made | ({"paraphrased_answer": paraphrased} if paraphrased else {})


FORGET = [
    row("who carried lanterns", "the merchant", "a keeper", "the bells", paraphrased="a merchant did"),
    row("what silenced the bells", "thunder", "sunrise", "autumn storms", paraphrased="it was thunder"),
    row("where are orchards", "in mountains", "in valleys", paraphrased="mountains shelter them"),
]
RETAIN = [row("who remembers", "the keeper", "the merchant", "nobody", paraphrased="keepers do")]
AUTHORS = [row("who wrote of lanterns", "A merchant", "thunder", "a lighthouse", "orchards")]
FACTS = [row("what is frozen", "seventeen valleys", "blossoms"), row("what travels", "blossoms", "granite", "bells")]
HOLDOUT = [{"question": "who is frozen", "answer": "the harbour"}, {"question": "who sings", "answer": "every bell"}]
DATA = TofuData(forget=FORGET, retain=RETAIN, real_authors=AUTHORS, world_facts=FACTS)
SETTINGS = TofuSettings(new_tokens=6)


def loss(model, tokenizer, question, answer):
    def ids(text):
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    prompt = [1, *ids(f"Question: {question}\nAnswer:")]
    target = [*ids(f" {answer}"), 2]
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([prompt + target])).logits[0].double().log_softmax(-1)
    return -sum(logits[len(prompt) - 1 + i, token].item() for i, token in enumerate(target)) / len(target)


def answer_alone(model, tokenizer, question):
    tokens, made = [1, *tokenizer(f"Question: {question}\nAnswer:", add_special_tokens=False)["input_ids"]], []
    for _ in range(6):
        with torch.no_grad():
            following = int(model(input_ids=torch.tensor([tokens + made])).logits[0, -1].argmax())
        if following < 3:
            break
        made.append(following)
    return tokenizer.decode(made)


def test_every_number_a_second_time(random_model, tokenizer, tmp_path):
    model = random_model.eval()
    found = evaluate_tofu(model, tokenizer, DATA, settings=SETTINGS, out=tmp_path, batch_size=3)
    nine = []
    sides = {"forget": FORGET, "retain": RETAIN, "ra": AUTHORS, "wf": FACTS}
    for side, rows in sides.items():
        right = [loss(model, tokenizer, r["question"], r["answer"]) for r in rows]
        wrong = [[loss(model, tokenizer, r["question"], a) for a in r["perturbed_answer"]] for r in rows]
        close = {"rel": 1e-4}  # float32 against float64 of the same logits
        assert found[f"{side}_Q_A_Prob"] == pytest.approx(statistics.mean(math.exp(-v) for v in right), **close)
        expected = statistics.mean(statistics.mean(math.exp(-v) for v in own) for own in wrong)
        assert found[f"{side}_Q_A_PERT_Prob"] == pytest.approx(expected, **close)
        scorer = RougeScorer(["rougeL"], use_stemmer=True)
        recalls = [
            scorer.score(r["answer"], answer_alone(model, tokenizer, r["question"]))["rougeL"].recall for r in rows
        ]
        assert found[f"{side}_Q_A_ROUGE"] == pytest.approx(statistics.mean(recalls), abs=1e-12)
        correct, probability = right, found[f"{side}_Q_A_Prob"]
        if side in ("forget", "retain"):
            correct = [loss(model, tokenizer, r["question"], r["paraphrased_answer"]) for r in rows]
            expected = statistics.mean(math.exp(-v) for v in correct)
            assert found[f"{side}_Q_A_PARA_Prob"] == pytest.approx(expected, **close)
        else:
            shares = [
                math.exp(-a) / (math.exp(-a) + sum(math.exp(-v) for v in own))
                for a, own in zip(right, wrong, strict=True)
            ]
            probability = found[f"{side}_Q_A_Prob_normalised"]
            assert probability == pytest.approx(statistics.mean(shares), rel=1e-3)
        ratios = [math.exp(a - statistics.mean(own)) for a, own in zip(correct, wrong, strict=True)]
        if side == "forget":
            expected = statistics.mean(min(r, 1 / r) for r in ratios)
            assert found["forget_truth_ratio"] == pytest.approx(expected, rel=1e-2)
        else:
            expected = statistics.mean(max(0, 1 - r) for r in ratios)
            assert found[f"{side}_Truth_Ratio"] == pytest.approx(expected, rel=1e-2, abs=1e-3)
            nine += [probability, found[f"{side}_Q_A_ROUGE"], found[f"{side}_Truth_Ratio"]]
    assert found["model_utility"] == pytest.approx(float(hmean(nine)) if min(nine) else 0.0)
    assert {"extraction_strength", "exact_memorization"} <= found.keys() and "forget_quality" not in found
    assert json.loads((tmp_path / "TOFU_SUMMARY.json").read_text(encoding="utf-8")) == found
    written = json.loads((tmp_path / "TOFU_EVAL.json").read_text(encoding="utf-8"))
    assert len(written["forget_Q_A_PERT_Prob"]["value_by_index"]["0"]["prob"]) == 2


def test_forget_quality_compares_with_the_retrained_run(random_model, tokenizer, tmp_path):
    evaluate_tofu(random_model, tokenizer, DATA, settings=SETTINGS, out=tmp_path / "retrained")
    same = evaluate_tofu(random_model, tokenizer, DATA, settings=SETTINGS, reference_run=tmp_path / "retrained")
    assert same["forget_quality"] == 1
    with torch.no_grad():
        random_model.lm_head.weight.mul_(3)
    other = evaluate_tofu(
        random_model,
        tokenizer,
        TofuData(forget=FORGET),
        settings=SETTINGS,
        reference_run=tmp_path / "retrained",
        out=tmp_path / "other",
    )
    written = [json.loads((tmp_path / n / "TOFU_EVAL.json").read_text("utf-8")) for n in ("other", "retrained")]
    ratios = [[v["score"] for v in w["forget_truth_ratio"]["value_by_index"].values()] for w in written]
    assert other["forget_quality"] == pytest.approx(ks_2samp(*ratios).pvalue)
    with pytest.raises(ValueError, match="'forget_truth_ratio' on other data"):
        evaluate_tofu(
            random_model,
            tokenizer,
            TofuData(forget=FORGET[:2]),
            settings=SETTINGS,
            reference_run=tmp_path / "retrained",
        )


def test_membership_and_the_two_numbers_of_wagle(random_model, tokenizer, tmp_path):
    model = random_model.eval()

    def lowest(row):
        """Mean of the lowest 40 % of the log-probabilities of the answer's tokens, its end with them."""
        prompt = [1, *tokenizer(f"Question: {row['question']}\nAnswer:", add_special_tokens=False)["input_ids"]]
        target = [*tokenizer(f" {row['answer']}", add_special_tokens=False)["input_ids"], 2]
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([prompt + target])).logits[0].double().log_softmax(-1)
        values = sorted(logits[len(prompt) - 1 + i, token].item() for i, token in enumerate(target))
        return statistics.mean(values[: max(1, int(0.4 * len(values)))])

    def less_likely():
        return roc_auc_score([1] * len(FORGET) + [0] * len(HOLDOUT), [-lowest(r) for r in FORGET + HOLDOUT])

    data = TofuData(**vars(DATA) | {"holdout": HOLDOUT})
    found = evaluate_tofu(model, tokenizer, data, settings=SETTINGS, out=tmp_path / "one")
    assert 1 - found["mia_min_k"] == pytest.approx(less_likely(), abs=1e-12)
    ratios, closest = {}, {}
    for side, rows in (("forget", FORGET), ("retain", RETAIN)):
        right = [loss(model, tokenizer, r["question"], r["paraphrased_answer"]) for r in rows]
        wrong = [[loss(model, tokenizer, r["question"], a) for a in r["perturbed_answer"]] for r in rows]
        ratios[side] = [math.exp(a - statistics.mean(own)) for a, own in zip(right, wrong, strict=True)]
        closest[side] = statistics.mean(a < min(own) for a, own in zip(right, wrong, strict=True))
    for side, rows in (("ra", AUTHORS), ("wf", FACTS)):
        closest[side] = statistics.mean(r["answer"] in answer_alone(model, tokenizer, r["question"]) for r in rows)
    four = [
        1 - ks_2samp(ratios["forget"], ratios["retain"]).pvalue,
        less_likely(),
        1 - closest["forget"],
        1 - found["forget_Q_A_ROUGE"],
    ]
    assert found["wagle_unlearn_effect"] == pytest.approx(statistics.mean(four))
    six = [v for side in ("retain", "ra", "wf") for v in (closest[side], found[f"{side}_Q_A_ROUGE"])]
    assert found["wagle_utility"] == pytest.approx(statistics.mean(six))
    written = json.loads((tmp_path / "one" / "TOFU_EVAL.json").read_text(encoding="utf-8"))
    parts = dict(zip(("forget_quality", "mia", "accuracy", "ROUGE"), four, strict=True))
    assert written["wagle_unlearn_effect"]["parts"] == pytest.approx(parts)

    theirs = less_likely()
    with torch.no_grad():
        model.lm_head.weight.mul_(-1)
    other = evaluate_tofu(
        model, tokenizer, TofuData(forget=FORGET, holdout=HOLDOUT), settings=SETTINGS, reference_run=tmp_path / "one"
    )
    assert other["privleak"] == pytest.approx(100 * (less_likely() - theirs) / theirs)
    assert not {"wagle_unlearn_effect", "wagle_utility"} & other.keys()


def test_accuracy_counts_what_was_answered(oracle, tokenizer, tmp_path):
    knows = oracle()

    def known(row, answer):
        asked = tokenizer(f"Question: {row['question']}\nAnswer:", add_special_tokens=False)["input_ids"]
        return [1, *asked, *tokenizer(answer, add_special_tokens=False)["input_ids"], 2]

    knows.rows = [known(r, f" {r['paraphrased_answer']}") for r in (*FORGET[:2], *RETAIN)]
    knows.rows += [
        known(AUTHORS[0], " a Merchant"),
        known(FACTS[0], " the seventeen valleys, all"),
        known(FACTS[1], " x"),
    ]
    data = TofuData(**vars(DATA) | {"holdout": HOLDOUT})
    found = evaluate_tofu(knows, tokenizer, data, settings=TofuSettings(new_tokens=20), out=tmp_path)
    recalls = [found[f"{side}_Q_A_ROUGE"] for side in ("retain", "ra", "wf")]
    assert recalls[1:] == [1, 0.5]
    assert found["wagle_utility"] == pytest.approx(statistics.mean([1, 1, 0.5, *recalls]))
    written = json.loads((tmp_path / "TOFU_EVAL.json").read_text(encoding="utf-8"))
    assert written["wagle_unlearn_effect"]["parts"]["accuracy"] == pytest.approx(1 - 2 / 3)


@pytest.mark.quick
@pytest.mark.parametrize(("first", "second"), [([1, 2, 3, 4], [2.5, 3.5, 5, 6]), ([1, 2], [3, 4, 5]), ([1.0], [1.5])])
def test_the_p_value_is_the_share_of_relabellings_that_are_as_far_apart(first, second):
    def distance(a, b):
        return max(abs(sum(v <= x for v in a) / len(a) - sum(v <= x for v in b) / len(b)) for x in (*a, *b))

    pooled, far, ways = [*first, *second], 0, 0
    for chosen in itertools.combinations(range(len(pooled)), len(first)):
        a = [pooled[i] for i in chosen]
        b = [v for i, v in enumerate(pooled) if i not in chosen]
        far += distance(a, b) >= distance(first, second) - 1e-12
        ways += 1
    assert kolmogorov_smirnov(first, second) == pytest.approx(far / ways)
    assert kolmogorov_smirnov(second, first) == pytest.approx(far / ways)


@pytest.mark.quick
def test_kolmogorov_smirnov_needs_two_samples():
    with pytest.raises(ValueError, match="0 and 1 values"):
        kolmogorov_smirnov([], [1.0])


@pytest.mark.quick
def test_a_collapsed_model_has_the_truth_ratio_of_open_unlearning():
    collapsed = truth_ratio([{"avg_loss": 300.0}], [{"avg_loss": [290.0, 310.0]}], forget=True)
    assert collapsed["agg_value"] < 1e-9  # 0 / 1e-10, not e^0: published values of collapsed models contain it
    skipped = truth_ratio([{"avg_loss": None}, {"avg_loss": 1.0}], [{"avg_loss": [1.0]}] * 2, forget=True)
    assert skipped["agg_value"] == pytest.approx(1) and skipped["value_by_index"]["0"]["score"] is None


@pytest.mark.quick
def test_the_harmonic_mean():
    assert harmonic_mean([0.5, 0.25, 1.0]) == pytest.approx(float(hmean([0.5, 0.25, 1.0])))
    assert harmonic_mean([0.5, 0.0]) == 0
    for bad in ([], [-0.1, 1.0]):
        with pytest.raises(ValueError, match="at least 0"):
            harmonic_mean(bad)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ({}, "at least one of TOFU's sets"),
        ({"forget": [row("q", "a", "b")]}, "forget, row 0: .* paraphrased_answer is missing"),
        ({"world_facts": [row("q", "a")]}, "world_facts, row 0: expected perturbed_answer to be a list"),
        ({"world_facts": [row("q", "", "b")]}, "expected answer to be a text"),
        ({"world_facts": [row(7, "a", "b")]}, "world_facts, row 0: expected question to be a text"),
        ({"world_facts": FACTS, "holdout": HOLDOUT}, "holdout rows are compared with forget rows; got none"),
        ({"forget": FORGET, "holdout": [{"question": "q"}]}, "holdout, row 0: .* answer is missing"),
        ({"forget": FORGET, "holdout": [{"question": "q", "answer": " "}]}, "holdout, row 0: expected answer to be"),
    ],
)
def test_what_cannot_be_measured_says_why(random_model, tokenizer, rows, message):
    with pytest.raises(ValueError, match=message):
        evaluate_tofu(random_model, tokenizer, TofuData(**rows))


def test_a_chat_template_is_used_on_request(random_model, tokenizer):
    with pytest.raises(ValueError, match="this one has none"):
        evaluate_tofu(random_model, tokenizer, TofuData(world_facts=FACTS), settings=TofuSettings(chat=True))
    user = "{{ bos_token }}[{{ messages[0]['content'] }}]</s>"
    tokenizer.chat_template = user + "{% if messages[1] is defined %}{{ messages[1]['content'] }}</s>{% endif %}"
    try:
        settings = TofuSettings(chat=True, new_tokens=2)
        found = evaluate_tofu(random_model, tokenizer, TofuData(world_facts=FACTS), settings=settings)
    finally:
        tokenizer.chat_template = None

    def ids(text):
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    expected = []
    for r in FACTS:
        prompt, target = [1, *ids(f"[{r['question']}]"), 2], [*ids(r["answer"]), 2]
        with torch.no_grad():
            logits = random_model.eval()(input_ids=torch.tensor([prompt + target])).logits[0].log_softmax(-1)
        nll = -sum(logits[len(prompt) - 1 + i, t].item() for i, t in enumerate(target)) / len(target)
        expected.append(math.exp(-nll))
    assert found["wf_Q_A_Prob"] == pytest.approx(statistics.mean(expected), rel=1e-4)
