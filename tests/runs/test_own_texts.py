"""Texts of the model's own join the retain rows, none of which repeats a forget row."""

import dataclasses
import json

import pytest

from moe_unlearn.benchmark import tiny_models
from moe_unlearn.cli import main
from moe_unlearn.config import Recipe
from moe_unlearn.runs import own_texts
from tests.support.command_line import arguments, saved

pytestmark = pytest.mark.quick
SETTINGS = tiny_models.Settings(
    forget=4, retain=8, holdout=2, max_length=24, vocab_size=300, hidden_size=32, intermediate_size=16, layers=1,
    experts=4, top_k=2,
)  # fmt: skip


def recipe(count, **changed):
    return Recipe.from_dict({"data": {"sampled": count, "max_length": 16}} | changed)


@pytest.fixture(scope="module")
def made():
    """A model as it is made, its tokenizer and 40 texts that it writes where nothing is to be forgotten."""
    tokenizer, *_ = tiny_models.build_data("builtin:pydoc", 0, SETTINGS)
    model = tiny_models.tiny_olmoe(len(tokenizer), 0, SETTINGS)
    return model, tokenizer, own_texts.own_texts(model, tokenizer, recipe(40), [])


def test_texts_that_repeat_a_forget_row_are_left_out(made):
    model, tokenizer, written = made
    assert all(row.input_ids[0] == tokenizer.bos_token_id and row.labels == row.input_ids for row in written)
    assert len(written) == 40 and all(2 < len(row.input_ids) <= 16 for row in written)
    long = [row for row in written if len(row.input_ids) > own_texts.SHARED + 1]
    # eight tokens from the middle of a text are enough
    forget = [dataclasses.replace(row, input_ids=[5, *row.input_ids[1:9], 5]) for row in long[:3]]
    found = own_texts.own_texts(model, tokenizer, recipe(40), forget)
    assert found[:37] == [row for row in written if row not in long[:3]] and len(found) == 40


def test_texts_depend_on_the_seed_alone(made):
    model, tokenizer, written = made
    first, again, other = (
        own_texts.own_texts(model, tokenizer, dataclasses.replace(recipe(6), seed=seed), []) for seed in (0, 0, 1)
    )
    assert first == again == written[:6] != other
    assert own_texts.own_texts(model, tokenizer, recipe(0), []) == []


def test_too_few_texts_are_said_and_taken(made, monkeypatch):
    model, tokenizer, written = made
    monkeypatch.setattr(own_texts, "runs_of", lambda tokens, length: {0})  # every text repeats every row
    with pytest.warns(UserWarning, match="asks for 3 texts; of 24 that the model wrote 0 repeat no forget row"):
        assert own_texts.own_texts(model, tokenizer, recipe(3), written[:1]) == []


def test_a_later_turn_writes_twice_what_is_missing(made, monkeypatch):
    model, tokenizer, written = made
    asked, write = [], own_texts.metrics.sampled
    monkeypatch.setattr(
        own_texts.metrics,
        "sampled",
        lambda model, prompts, *a, **k: asked.append(len(prompts)) or write(model, prompts, *a, **k),
    )
    forget = [row for row in written[:40] if len(row.input_ids) > own_texts.SHARED][:2]
    assert len(own_texts.own_texts(model, tokenizer, recipe(40), forget)) == 40
    assert asked == [40, 4]


def test_a_tokenizer_without_a_first_token_is_refused(made):
    model, tokenizer, written = made
    bare = type("Bare", (), {"bos_token_id": None, "eos_token_id": None})()
    with pytest.raises(ValueError, match="data.sampled needs a tokenizer with a bos_token or an eos_token"):
        own_texts.own_texts(model, bare, recipe(3), [])
    ended = type("Ended", (), {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id})()
    assert own_texts.own_texts(model, ended, recipe(1), [])[0].input_ids[0] == tokenizer.eos_token_id


def test_a_run_trains_on_them_and_measures_none(tmp_path, capsys):
    saved(tmp_path)
    settings = ("steps=1", "batch_size=3", "data.max_length=48", "data.sampled=5", "retain.objective=kl")
    main(["run", "graddiff", *arguments(tmp_path), "--out", str(tmp_path / "out"), "--set", *settings])
    without = [*settings[:3], "data.sampled=0", settings[4]]
    main(["run", "graddiff", *arguments(tmp_path), "--out", str(tmp_path / "plain"), "--set", *without])
    summaries, paths = (
        [json.loads((tmp_path / out / f"{name}.json").read_text(encoding="utf-8")) for out in ("out", "plain")]
        for name in ("summary", "trajectory")
    )
    assert summaries[0]["target"] == summaries[1]["target"]  # the rows that are measured are the same
    assert paths[0]["graddiff"][0]["retain_loss"] != paths[1]["graddiff"][0]["retain_loss"]
    assert main(["run", "graddiff", *arguments(tmp_path), "--dry-run", "--set", "data.sampled=-1"]) == 2
    assert "data.sampled must be at least 0" in capsys.readouterr().err


def test_a_run_that_goes_on_takes_the_texts_it_has_kept(made, tmp_path, monkeypatch):
    model, tokenizer, written = made
    own_texts.keep(tmp_path, written)
    assert own_texts.own_texts(None, tokenizer, recipe(40), [], tmp_path) == written
    path = tmp_path / "sampled.json"
    path.write_bytes(path.read_bytes().replace(b"[", b"[ ", 1))
    with pytest.warns(UserWarning, match="sampled.json is damaged .*; the model writes the texts again"):
        assert own_texts.own_texts(model, tokenizer, recipe(40), [], tmp_path) == written
    assert own_texts.own_texts(None, tokenizer, recipe(0), [], tmp_path) == []
    own_texts.keep(tmp_path / "none", [])
    assert not (tmp_path / "none").exists()


def test_a_resume_writes_no_text_again(tmp_path, capsys, monkeypatch):
    saved(tmp_path)
    settings = ("steps=2", "batch_size=3", "data.max_length=48", "data.sampled=5", "retain.objective=kl")
    line = ["run", "graddiff", *arguments(tmp_path), "--no-eval", "--out", str(tmp_path / "out"), "--set", *settings]
    assert main(line) == 0
    kept = (tmp_path / "out" / "sampled.json").read_bytes()
    monkeypatch.setattr(own_texts.metrics, "sampled", None)
    capsys.readouterr()
    assert main([*line, "--resume"]) == 0 and "nothing is left to do" in capsys.readouterr().out
    assert (tmp_path / "out" / "sampled.json").read_bytes() == kept


def test_a_plan_assumes_them_at_their_longest(tmp_path, capsys):
    saved(tmp_path)
    told = []
    for count in (0, 100):
        settings = ("batch_size=3", "data.max_length=48", f"data.sampled={count}", "retain.objective=kl")
        main(["run", "graddiff", *arguments(tmp_path), "--dry-run", "--json", "--set", *settings])
        told.append(json.loads(capsys.readouterr().out))
    assert "retain 3 x 48" in told[1]["shape"] != told[0]["shape"]
    assert ["15 retain rows" in told[0]["data"], "115 retain rows" in told[1]["data"]] == [True, True]
