"""Multiple choice: against sums of log-probabilities one by one, and against lm-eval where it is installed."""

import copy
import json
import os

import pytest
import torch
from tokenizers import Tokenizer, models, processors, trainers
from transformers import PreTrainedTokenizerFast

from moe_unlearn.metrics import continuation_logprobs, evaluate_choices, harness, multiple_choice, write_task
from moe_unlearn.metrics.choices import DESCRIPTION, question_text

BIO = [
    {"question": " who carries lanterns? ", "choices": ["a merchant", "a bell", "a valley", "thunder"], "answer": 0},
    {"question": "what is frozen?", "choices": ["sunrise", "valleys", "orchards", "storms"], "answer": 1},
    {"question": "what shelters orchards", "choices": ["bells", "autumn", "mountains", "keepers"], "answer": 2},
    {"question": "when", "choices": ["before sunrise", "never", "in an autumn storm", "southward"], "answer": 3},
    {"question": "which keeper?", "choices": ["every", "no", "one", "seventeen"], "answer": 0},
]
MMLU = [{**BIO[0], "subject": "harbour_law"}, {**BIO[1], "subject": "bells"}, {**BIO[2], "subject": "harbour_law"}]


def alone(model, tokenizer, context, continuation):
    def ids(text):
        return [1, *tokenizer.encode(text, add_special_tokens=False)]

    whole, start = ids(context + continuation), len(ids(context))
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([whole])).logits[0].double().log_softmax(-1)
    return sum(logits[i - 1, whole[i]].item() for i in range(start, len(whole)))


@pytest.fixture()
def model(random_model):
    random_model.config.max_position_embeddings = 512
    return random_model.eval()


def test_every_log_probability_a_second_time(model, tokenizer, tmp_path):
    found = evaluate_choices(model, tokenizer, {"wmdp_bio": BIO}, out=tmp_path, batch_size=2)
    rows = json.loads((tmp_path / "LMEval_EVAL.json").read_text(encoding="utf-8"))["wmdp_bio/acc"]["value_by_index"]
    hits = 0
    for i, row in enumerate(BIO):
        context = "The following are multiple choice questions (with answers) about biology.\n\n"
        context += row["question"].strip() + "".join(f"\n{x}. {c}" for x, c in zip("ABCD", row["choices"], strict=True))
        expected = [alone(model, tokenizer, f"{context}\nAnswer:", f" {letter}") for letter in "ABCD"]
        assert rows[str(i)]["logprobs"] == pytest.approx(expected, abs=1e-4)
        hits += expected.index(max(expected)) == row["answer"]
    assert found["wmdp_bio/acc"] == hits / 5
    assert found["wmdp_bio/acc_stderr"] == pytest.approx((hits / 5 * (1 - hits / 5) / 4) ** 0.5)
    assert json.loads((tmp_path / "LMEval_SUMMARY.json").read_text(encoding="utf-8")) == found


def test_shots_of_the_same_subject_come_first(model, tokenizer):
    shots = [{**BIO[3], "subject": "bells", "answer": "D"}, {**BIO[4], "subject": "harbour_law"}]
    found = evaluate_choices(model, tokenizer, {"mmlu": MMLU}, shots={"mmlu": shots})
    rows = multiple_choice(model, tokenizer, MMLU, shots=[{**shots[0], "answer": 3}, shots[1]])
    assert found["mmlu/acc"] == rows["agg_value"]
    context = "The following are multiple choice questions (with answers) about harbour law.\n\n"
    context += f"{question_text(BIO[4])} A\n\n{question_text(BIO[2])}"
    expected = [alone(model, tokenizer, context, f" {letter}") for letter in "ABCD"]
    assert rows["value_by_index"]["2"]["logprobs"] == pytest.approx(expected, abs=1e-4)


def test_continuations_of_several_lengths_and_a_short_context(model):
    requests = [
        ([1, 5, 9], [7]),
        ([1, 5, 9], [8]),
        ([1, 5, 9], [8, 4, 11]),
        ([3], [3, 3]),
        (list(range(3, 40)), [5, 6]),
    ]

    def slow(context, continuation, limit=10**9):
        ids = [*context, *continuation]
        shown = ids[:-1][-limit:]
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([shown])).logits[0].log_softmax(-1)
        return sum(logits[-len(continuation) + i, t].item() for i, t in enumerate(continuation))

    for batch_size in (1, 2, 9):
        found = continuation_logprobs(model, requests, batch_size=batch_size, pad_id=2)
        assert found == pytest.approx([slow(*r) for r in requests], abs=1e-4)
    model.config.max_position_embeddings = 8
    assert continuation_logprobs(model, requests) == pytest.approx([slow(*r, limit=8) for r in requests], abs=1e-4)
    with pytest.raises(ValueError, match="continuation of 9 tokens exceeds 8"):
        continuation_logprobs(model, [([1], [2] * 9)])
    with pytest.raises(ValueError, match="request 0: expected context and continuation"):
        continuation_logprobs(model, [([], [2])])


@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        ({}, "at least one task"),
        ({"wmdp_bio": []}, "wmdp_bio: expected at least one row"),
        ({"mmlu": BIO}, "mmlu, row 0: .* subject is missing"),
        ({"wmdp_bio": [{**BIO[0], "answer": 4}]}, "2 to 26 choices .* got 4 and 4"),
        ({"wmdp_bio": [{**BIO[0], "answer": "E"}]}, "got 4 and 'E'"),
        ({"wmdp_bio": [{**BIO[0], "choices": ["a"]}]}, "got 1 and 0"),
        ({"wmdp_bio": [BIO[0], {**BIO[0], "question": 7}]}, "row 1: expected question to be a text; got 7"),
        ({"mmlu": [{**BIO[0], "subject": 7}]}, "mmlu, row 0: expected subject to be a text; got 7"),
        ({"wmdp_bio": [{**BIO[0], "choices": "abcd"}]}, "expected choices to be a list; got 'abcd'"),
        ({"wmdp_bio": [{**BIO[0], "choices": 4}]}, "expected choices to be a list; got 4"),
    ],
)
def test_what_cannot_be_asked_says_why(model, tokenizer, tasks, message):
    with pytest.raises(ValueError, match=message):
        evaluate_choices(model, tokenizer, tasks)


def merging_tokenizer():
    """One whose tokens know no words: ": A" is one, and letters behind D are not known at all."""
    made = Tokenizer(models.BPE(unk_token="<unk>"))
    trainer = trainers.BpeTrainer(vocab_size=90, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False)
    texts = [f"{question_text(row)} {letter}" for row in BIO for letter in "AABCD"]
    made.train_from_iterator(["Answer: A", "Answer: B"] * 40 + texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def test_a_token_across_the_seam_is_part_of_the_answer_and_ends_no_evaluation(model, tmp_path, capsys):
    tokenizer = merging_tokenizer()
    prompt = question_text(BIO[0])
    alone = tokenizer(prompt)["input_ids"]
    wholes = [tokenizer(f"{prompt} {letter}")["input_ids"] for letter in "ABCD"]
    assert any(whole[: len(alone)] != alone for whole in wholes)  # a token stands on both sides
    unknown = {**BIO[1], "choices": [f"choice {i}" for i in range(26)], "answer": 2}
    found = evaluate_choices(model, tokenizer, {"wmdp_bio": [*BIO, unknown]}, out=tmp_path)
    result = json.loads((tmp_path / "LMEval_EVAL.json").read_text(encoding="utf-8"))["wmdp_bio/acc"]
    reason = "its letters have equal tokens, which cannot be told apart"
    assert result["straddled"] == 6 and result["left_out"] == [{"set": "wmdp_bio", "row": 5, "reason": reason}]
    assert f"wmdp_bio: left out 1: row 5: {reason}" in capsys.readouterr().err
    rows = list(result["value_by_index"].values())
    assert rows[-1] == {"acc": None, "choice": None, "logprobs": None}
    context = DESCRIPTION.format(subject="biology") + prompt
    wholes = [tokenizer(f"{context} {letter}")["input_ids"] for letter in "ABCD"]
    start = len(os.path.commonprefix(wholes))
    with torch.no_grad():
        tables = [model(input_ids=torch.tensor([whole])).logits[0].double().log_softmax(-1) for whole in wholes]
    expected = [
        sum(table[i - 1, whole[i]].item() for i in range(start, len(whole)))
        for table, whole in zip(tables, wholes, strict=True)
    ]
    assert rows[0]["logprobs"] == pytest.approx(expected, abs=1e-4)
    share = sum(row["acc"] for row in rows[:-1]) / 5
    assert found["wmdp_bio/acc"] == share
    assert found["wmdp_bio/acc_stderr"] == pytest.approx((share * (1 - share) / 4) ** 0.5)
    with pytest.raises(ValueError, match="wmdp_bio, row 0: its letters have equal tokens"):
        evaluate_choices(model, tokenizer, {"wmdp_bio": [unknown]})
    model.config.max_position_embeddings = 1
    with pytest.raises(ValueError, match=r"a letter of \d tokens exceeds .* of 1; none of its 5 rows"):
        evaluate_choices(model, tokenizer, {"wmdp_bio": BIO})


def test_a_task_file_is_the_harness_own_form(tmp_path):
    path = write_task(tmp_path, "wmdp_bio", BIO)
    task = json.loads(path.read_text(encoding="utf-8"))
    assert task["description"].endswith("about biology.\n\n") and task["doc_to_choice"] == ["A", "B", "C", "D"]
    assert task["doc_to_text"].startswith("{{question.strip()}}\nA. {{choices[0]}}\nB.")
    lines = (tmp_path / "wmdp_bio.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == BIO
    with pytest.raises(ValueError, match="needs a subject"):
        write_task(tmp_path, "other", BIO)
    with pytest.raises(ValueError, match="same number of choices"):
        write_task(tmp_path, "wmdp_bio", [*BIO, {**BIO[0], "choices": ["a", "b"]}])


def test_lm_eval_gives_the_same(model, tokenizer, tmp_path, monkeypatch):
    pytest.importorskip("lm_eval")
    # the harness takes a prompt as the tokenizer has a text, with an end token where it adds one
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing("<s> $A", None, [("<s>", 1)])
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    write_task(tmp_path, "local_bio", BIO, "biology")
    model.train()
    found = harness(model, tokenizer, ["local_bio"], include_path=tmp_path, batch_size=2)
    assert model.training
    ours = evaluate_choices(model, tokenizer, {"wmdp_bio": BIO}, out=tmp_path)
    assert found["local_bio/acc"] == ours["wmdp_bio/acc"]
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    asked = [
        Instance("loglikelihood", {}, (DESCRIPTION.format(subject="biology") + question_text(row), f" {letter}"), 0)
        for row in BIO
        for letter in "ABCD"
    ]
    theirs = [value for value, _ in HFLM(pretrained=model.eval(), tokenizer=tokenizer).loglikelihood(asked)]
    rows = json.loads((tmp_path / "LMEval_EVAL.json").read_text(encoding="utf-8"))["wmdp_bio/acc"][
        "value_by_index"
    ].values()
    assert [value for row in rows for value in row["logprobs"]] == pytest.approx(theirs, abs=1e-4)
    with pytest.raises(ValueError, match="knows no task 'nothing_like_it'"):
        harness(model, tokenizer, ["nothing_like_it"], include_path=tmp_path)
