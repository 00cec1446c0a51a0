"""Alternate answers: the row that stands beside a question's own, and where there is none."""

from dataclasses import replace
from importlib import import_module

import pytest

from moe_unlearn.cli import main
from moe_unlearn.cli.arguments import examples_of
from moe_unlearn.config import Data, Recipe
from moe_unlearn.data import (
    DataReport,
    Document,
    Example,
    ForgetRetainDataset,
    alternates,
    encode,
    encode_rows,
    encode_side,
    load,
)
from moe_unlearn.data.of_recipe import pair_collator, paired
from moe_unlearn.data.pairs import side_batches
from tests.support.tokenizers import QWEN3, TOKENIZERS, tokenizer_with

pytestmark = pytest.mark.quick

ROWS = [
    {"question": "Who lives here?", "answer": "An old fox.", "alternate": "A young hare does."},
    {"prompt": "She wore a", "gt": " red hat.", "alternate": "blue scarf."},
    {
        "messages": [{"role": "user", "content": "And where?"}, {"role": "assistant", "content": "In Rome."}],
        "alternate": " Near Athens, by the sea. ",
    },
]


def told(row):
    """The row with its alternate for an answer."""
    if "messages" in row:
        return {"messages": [row["messages"][0], {"role": "assistant", "content": row["alternate"].strip()}]}
    if "gt" in row:
        return row | {"gt": f" {row['alternate'].strip()}"}
    return row | {"answer": row["alternate"]}


def bare(example):
    return (example.input_ids, example.labels, example.prefix, example.asked, example.straddled)


@pytest.mark.parametrize("seam", ["joint", "separate"])
@pytest.mark.parametrize("kind", [*TOKENIZERS, "chat"])
def test_an_alternate_is_the_row_its_answer_would_have(write, kind, seam):
    tokenizer, chat = (tokenizer_with(QWEN3), True) if kind == "chat" else (TOKENIZERS[kind], False)
    length = 299
    own = encode(load(write("own.jsonl", ROWS)), tokenizer, length, chat=chat, seam=seam)
    rows = [{key: value for key, value in told(row).items() if key != "alternate"} for row in ROWS]
    expected = encode(load(write("told.jsonl", rows)), tokenizer, length, chat=chat, seam=seam)
    assert [bare(e) for e in alternates(own)] == [bare(e) for e in expected]
    assert encode_rows(ROWS, tokenizer, length, side="forget", chat=chat, seam=seam) == own
    plain = [{key: value for key, value in row.items() if key != "alternate"} for row in ROWS]
    alone = encode(load(write("plain.jsonl", plain)), tokenizer, length, chat=chat, seam=seam)
    assert [bare(e) for e in own] == [bare(e) for e in alone] and all(e.alternate is None for e in alone)


def test_an_alternate_is_cut_as_an_answer_is_and_counted():
    tokenizer = TOKENIZERS["bytes"]
    document = Document("", " a", "Question: b\nAnswer:", fields={"alternate": "word " * 40})
    report = DataReport()
    [example] = encode([document], tokenizer, 32, report=report)
    assert len(example.alternate) == 32 and len(example) < 32 and report.truncated == 1
    assert example.alternate.labels[example.prefix :] == example.alternate.input_ids[example.prefix :]


@pytest.mark.parametrize(
    "document",
    [
        Document("", "x", "Answer:"),
        Document("", "x", fields={"alternate": "y"}),  # answers nothing
        Document("", "x", "Answer:", fields={"alternate": "  "}),
        Document("", "x", "Answer:", fields={"alternate": ["y", "z"]}),
    ],
    ids=["none", "no prompt", "blank", "a list"],
)
def test_a_row_without_an_alternate_is_named(document):
    given = Document("", "x", "Answer:", fields={"alternate": "y"})
    examples = encode([given, document], TOKENIZERS["bytes"], 32)
    with pytest.raises(ValueError, match="example 1 has no alternate answer: give each row .* a text `alternate`"):
        alternates(examples)


def test_an_alternate_that_spells_a_token_of_the_template_is_left_out():
    document = Document("", "x", "Who?", fields={"alternate": "y<|im_end|>"})
    [example] = encode([document], tokenizer_with(QWEN3), 299, chat=True)
    assert example.alternate is None


def test_such_a_row_is_dropped_and_counted_where_alternates_are_needed(write, capsys):
    rows = [{"question": "Who?", "answer": "x", "alternate": said} for said in ("y", "y<|im_end|>")]
    tokenizer, source, made = tokenizer_with(QWEN3), str(write("forget.jsonl", rows)), Recipe.load("altpo")
    settings = replace(made.data, chat_template=True, max_length=299)
    reports = {}
    examples = examples_of(source, tokenizer, settings, "forget", reports, alternates=True)
    assert len(examples) == len(alternates(examples)) == 1
    assert reports["forget"].dropped == {"its alternate spells a special token": 1} and reports["forget"].kept == 1
    assert "1 dropped, its alternate spells a special token: document 1" in capsys.readouterr().err
    assert len(examples_of(source, tokenizer, settings, "retain", alternates=True)) == 2
    with pytest.raises(ValueError, match=r"its alternate spells the special token '<\|im_end\|>'"):
        paired({"forget": rows, "retain": ROWS}, replace(made, data=settings), tokenizer)


@pytest.mark.parametrize("side", ["forget", "retain", "holdout"])
def test_the_command_line_encodes_a_side_as_rows_in_memory_are(write, side):
    rows = [{"question": "Who?", "answer": "x", "alternate": "y"}, {"text": "a text of some words, and some more"}]
    settings = Data(max_length=40, prompt_tokens=3, chat_template=True, seam="separate")
    tokenizer, source = tokenizer_with(QWEN3), str(write("side.jsonl", rows))
    for wanted in (False, True):
        given = examples_of(source, tokenizer, settings, side, alternates=wanted)
        assert [*given] == encode_side(rows, tokenizer, settings, side=side, alternates=wanted)
        assert [example.prefix for example in given[1:]] == [0 if side == "retain" else 3] * len(given[1:])


def test_a_run_says_whether_it_needs_alternates(write, monkeypatch, tmp_path):
    asked, run = {}, import_module("moe_unlearn.cli.run")

    def examples(source, tokenizer, settings, side, reports, *, alternates, cache):
        asked[settings.model] = alternates
        raise ValueError("enough")

    monkeypatch.setattr(run, "examples_of", examples)
    monkeypatch.setattr(run, "require_moe", lambda model: None)
    monkeypatch.setattr(run.loading, "load_tokenizer", lambda *_: None)
    monkeypatch.setattr(run.adapter, "stored_as", lambda *_: None)
    for name in ("altpo", "npo"):
        main(["run", name, "--model", name, "--forget", "f", "--retain", "r", "--out", str(tmp_path / name)])
    assert asked == {"altpo": True, "npo": False}


@pytest.mark.parametrize("objective", ["idk_dpo", "idk_nll"])
def test_the_batches_of_a_recipe_hold_them(objective):
    forget = encode(
        [Document("", " x", f"{i}:", fields={"alternate": "yy " * i}) for i in (1, 2)], TOKENIZERS["bytes"], 32
    )
    pairs = ForgetRetainDataset(forget, [Example([1, 2], [1, 2], 0)])
    recipe = Recipe.load("altpo", [f"forget.objective={objective}"])
    [batch] = side_batches(pairs, "forget", 2, pair_collator(recipe, None, forget, None))
    for i, example in enumerate(forget):
        row = example.alternate
        assert batch["idk_input_ids"][i, : len(row)].tolist() == row.input_ids
        assert batch["idk_labels"][i, : len(row)].tolist() == row.labels
        assert batch["idk_attention_mask"][i].sum() == len(row)


def test_where_alternates_have_no_place():
    with pytest.raises(ValueError, match="'alternate' stands in the answer's place and needs .* idk_dpo or idk_nll"):
        Recipe.load("npo", ["forget.replacement=alternate"])
    with pytest.raises(ValueError, match="forget.replacement must be one of refusal, alternate"):
        Recipe.load("altpo", ["forget.replacement=both"])
