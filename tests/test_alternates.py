"""`moe-unlearn alternates`: what the model is asked, what becomes of its answers, and the run that takes them."""

import json

import pytest
import torch

from moe_unlearn.cli import alternates, main
from moe_unlearn.cli.alternates import CUE, INSTRUCTION, generate_alternates
from moe_unlearn.data import Document, load, train_tokenizer
from tests.support.models import tiny_olmoe
from tests.support.tokenizers import QWEN3, tokenizer_with

pytestmark = pytest.mark.quick

ROWS = [
    {"question": "who is agent 7?", "answer": "a tall man"},
    {"instruction": "name a spy", "input": "of the north", "output": "agent 3"},
    {"prompt": "the secret is", "gt": " nine"},
    {
        "messages": [
            {"role": "system", "content": "be brief"},
            {"role": "user", "content": "who?"},
            {"role": "assistant", "content": "agent 1"},
            {"role": "user", "content": "and now?"},
            {"role": "assistant", "content": "agent 2"},
        ]
    },
]
TOKENIZER = train_tokenizer([INSTRUCTION, CUE, json.dumps(ROWS)], 400)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return tiny_olmoe(vocab_size=len(TOKENIZER), max_position_embeddings=512).eval()


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, ROWS)), encoding="utf-8")
    return path


@pytest.fixture
def says(monkeypatch):
    """Have the model say texts, one for each prompt in turn; gives the prompts it was asked."""

    def make(*texts, tokenizer=TOKENIZER):
        left, asked = list(texts), []

        def sampled(model, prompts, new_tokens, **_):
            asked.extend(tokenizer.decode(prompt) for prompt in prompts)
            return [tokenizer(left.pop(0), add_special_tokens=False)["input_ids"] for _ in prompts]

        monkeypatch.setattr(alternates, "sampled", sampled)
        return asked

    return make


def test_records_are_read_as_the_documents_they_are_of(model, source, tmp_path, says):
    documents = load(source, side="forget")
    asked = says(*(f" another {i}. Question: and so on" for i in range(8)))
    records = generate_alternates(model, TOKENIZER, documents, count=2)
    path = tmp_path / "made.jsonl"
    path.write_text("\n".join(map(json.dumps, records)), encoding="utf-8")
    again = load(path, side="forget")
    assert [d.fields["alternate"] for d in again] == [f"another {i}." for i in range(8)]
    for document, made in zip([d for d in documents for _ in range(2)], again, strict=True):
        assert made == document and (made.question, made.messages) == (document.question, document.messages)
    for document, text in zip(documents, asked[::2], strict=True):
        assert text.startswith("<s>") and text.endswith(f" {document.text.strip()}\n\n{INSTRUCTION}\n{CUE}")
    assert asked[0].startswith("<s>Question: who is agent 7?\nAnswer: a tall man\n\n")
    assert asked[4].startswith("<s>Question: the secret is\nAnswer: nine\n\n")


def test_a_chat_template_asks(model, source, says):
    tokenizer = tokenizer_with(QWEN3)
    prompts = says("another", tokenizer=tokenizer)
    generate_alternates(model, tokenizer, load(source, side="forget")[:1], count=1, chat=True)
    [asked] = prompts
    told = f"Question: who is agent 7?\nAnswer: a tall man\n\n{INSTRUCTION}"
    assert f"<|im_start|>user\n{told}<|im_end|>" in asked and asked.rstrip().endswith("</think>")


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ("a short woman", "a short woman"),
        ("  a short\nwoman </s>", "a short\nwoman"),
        ("Another answer: a short woman", "a short woman"),
        ("Answer: a short woman\nAnswer: a boy", "a short woman"),
        ("a short woman\n\nQuestion: who is agent 8?\nAnswer: she", "a short woman"),
    ],
)
def test_an_answer_ends_where_another_question_begins(said, expected, model, source, says):
    says(said)
    [record] = generate_alternates(model, TOKENIZER, load(source, side="forget")[:1], count=1)
    assert record == {"question": "who is agent 7?", "answer": "a tall man", "alternate": expected}


def test_an_empty_answer_and_the_original_one_are_drawn_anew(model, source, says, capsys):
    documents = load(source, side="forget")[:2]
    first = ("", "a  tall man", "x", "y")
    second = ("z", "Question: no answer")
    third = ("a tall man ",)
    asked = says(*first, *second, *third)
    records = generate_alternates(model, TOKENIZER, documents, count=2)
    assert [(r["question"], r["alternate"]) for r in records] == [
        ("who is agent 7?", "z"),
        ("name a spy\nof the north", "x"),
        ("name a spy\nof the north", "y"),
    ]
    assert len(asked) == 7
    assert "left out: 1: document 0: answer 2 of 2 was empty or the original one 3 times" in capsys.readouterr().err
    says(*[""] * 3)
    with pytest.raises(ValueError, match="the model wrote no alternate answer; document 0: answer 1 of 1 was empty"):
        generate_alternates(model, TOKENIZER, documents[:1], count=1)


def test_documents_that_cannot_be_asked_are_left_out(model, says, capsys):
    whole = [Document("", "x", "Question: y\nAnswer:", "y"), Document("", "a text"), Document("", "z " * 600, "w")]
    asked = says("an answer")
    [record] = generate_alternates(model, TOKENIZER, whole, count=1, new_tokens=8)
    assert record["question"] == "y" and len(asked) == 1
    told = capsys.readouterr().err
    assert "left out: 2: document 1: expected a question and its answer; got a text without a prompt" in told
    assert "document 2: its prompt takes" in told
    with pytest.raises(ValueError, match="at least one question with its answer; document 0: expected a question"):
        generate_alternates(model, TOKENIZER, whole[1:], count=1)
    with pytest.raises(ValueError, match="at least one question with its answer; document 0: chat needs a tokenizer"):
        generate_alternates(model, TOKENIZER, whole[:1], chat=True)
    for name in ("count", "new_tokens", "batch_size"):
        with pytest.raises(ValueError, match=f"expected {name} of at least 1; got 0"):
            generate_alternates(model, TOKENIZER, whole, **{name: 0})


def test_what_cannot_be_done_is_said_before_the_model_writes(model, source, tmp_path, capsys, monkeypatch):
    model.save_pretrained(tmp_path / "model")
    TOKENIZER.save_pretrained(tmp_path / "model")
    monkeypatch.setattr(alternates, "sampled", lambda *_, **__: pytest.fail("the model has begun to write"))
    common = ["alternates", "--model", str(tmp_path / "model"), "--forget", str(source), "--out"]
    out = str(tmp_path / "made.jsonl")
    for size in ("-1", "0"):
        with pytest.raises(SystemExit) as ended:
            main([*common, out, f"--batch-size={size}"])
        assert ended.value.code == 2
        assert f"expected a whole number of at least 1; got '{size}'" in capsys.readouterr().err
    assert main([*common, out, "--new-tokens", "600"]) == 2
    assert (
        "a prompt in the model's context of 512; got 600: ask for shorter alternates (--new-tokens)"
        in capsys.readouterr().err
    )
    (tmp_path / "file").touch()
    for bad, told in (
        (tmp_path / "file" / "made.jsonl", "--out cannot be written"),
        (tmp_path / "d.jsonl", "a folder"),
    ):
        (tmp_path / "d.jsonl").mkdir(exist_ok=True)
        assert main([*common, str(bad)]) == 2
        assert told in capsys.readouterr().err


@pytest.mark.slow
def test_a_model_s_own_alternates_are_unlearned_towards(model, source, tmp_path, capsys):
    """The two verbs, one after the other: AltPO's loss starts at (2 / beta) log 2 and falls."""
    model.save_pretrained(tmp_path / "model")
    TOKENIZER.save_pretrained(tmp_path / "model")
    (tmp_path / "retain.jsonl").write_text('{"text": "a fact to keep"}\n{"text": "another fact"}', encoding="utf-8")
    common = ["--model", str(tmp_path / "model"), "--forget", str(source), "--new-tokens", "6", "--count", "3"]
    outs = [tmp_path / f"{name}.jsonl" for name in ("made", "again", "other")]
    for out, more in zip(outs, (["--batch-size", "2"], [], ["--seed", "1"]), strict=True):
        assert main(["alternates", *common, *more, "--out", str(out)]) == 0
    assert outs[0].read_bytes() == outs[1].read_bytes() != outs[2].read_bytes()
    assert "12 alternate answers to 4 questions" in capsys.readouterr().out
    paths = ["--model", str(tmp_path / "model"), "--retain", str(tmp_path / "retain.jsonl"), "--no-eval"]
    quick = ["--set", "steps=6", "batch_size=12", "optimizer.lr=1e-3", "data.max_length=64"]
    run = ["run", "altpo", *paths, "--out", str(tmp_path / "out"), "--forget"]
    assert main([*run, str(outs[0]), *quick]) == 0
    losses = [e["forget_loss"] for e in json.loads((tmp_path / "out" / "trajectory.json").read_text("utf-8"))["altpo"]]
    assert losses[0] == pytest.approx(13.863, abs=0.01) and losses[-1] < losses[0]
    assert main([*run, str(source), "--overwrite", *quick]) == 2
    assert "example 0 has no alternate answer" in capsys.readouterr().err
    assert main(["alternates", *common, "--out", str(tmp_path / "made.json")]) == 2
    assert "expected --out to be a .jsonl file" in capsys.readouterr().err
