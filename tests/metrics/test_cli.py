"""`moe-unlearn eval --benchmark`: files in, the benchmark's files out, a reference run compared."""

import json
import re

import pytest

from moe_unlearn.cli import main


@pytest.fixture()
def folder(random_model, tokenizer, tmp_path):
    random_model.config.max_position_embeddings = 512
    random_model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    rows = {
        "forget.json": ["the wandering merchant carried lanterns", "granite mountains"],  # MUSE's own: a list of texts
        "holdout.json": [{"text": "seven frozen bells"}],
        "bio.jsonl": {"question": "which?", "choices": ["a", "b", "c", "d"], "answer": 1},
    }
    for name, content in rows.items():
        (tmp_path / name).write_text(json.dumps(content))
    return tmp_path


def evaluate(folder, *more):
    return main(["eval", "--model", str(folder / "model"), *map(str, more)])


def test_a_retrained_run_and_then_one_that_refers_to_it(folder, capsys):
    data = ["--data", f"forget={folder / 'forget.json'}", f"holdout={folder / 'holdout.json'}"]
    assert evaluate(folder, "--benchmark", "muse", *data, "--out", folder / "retrained") == 0
    assert "mia_min_k" in capsys.readouterr().out
    more = ["--reference-run", folder / "retrained", "--out", folder / "run", "--cache", folder / "cache"]
    assert evaluate(folder, "--benchmark", "muse", *data, *more) == 0
    summary = json.loads((folder / "run" / "MUSE_SUMMARY.json").read_text())
    assert summary["privleak"] in (0, None) and list((folder / "cache").iterdir())
    (folder / "forget.json").write_text(json.dumps(["other text here"]))
    assert evaluate(folder, "--benchmark", "muse", *data, *more) == 2
    assert "computed 'mia_min_k' on other data" in capsys.readouterr().err


def test_wmdp(folder, capsys):
    assert evaluate(folder, "--benchmark", "wmdp", "--data", f"wmdp_bio={folder / 'bio.jsonl'}") == 0
    assert capsys.readouterr().out.startswith("wmdp_bio/acc")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--forget is missing; or give a --benchmark"),
        (["--reference-run", "x"], "--reference-run is for a --benchmark"),
        (["--benchmark", "muse"], "needs --data NAME=SOURCE"),
        (["--benchmark", "muse", "--data", "forget.json"], "needs --data NAME=SOURCE"),
        (["--benchmark", "tofu", "--data", "forgotten={bio.jsonl}"], "tofu has no set 'forgotten'; expected .*forget"),
        (["--benchmark", "muse", "--data", "forget=a", "forget=b"], "names a set twice"),
        (["--benchmark", "wmdp", "--data", "wmdp_bio={holdout.json}"], "wmdp_bio, row 0: expected question"),
        (["--benchmark", "tofu", "--data", "forget={model/config.json}"], "expected a JSON list"),
    ],
)
def test_what_is_missing_is_said_in_one_line(folder, capsys, arguments, message):
    filled = [re.sub(r"\{(.*)\}", lambda m: str(folder / m[1]), a) for a in arguments]
    assert evaluate(folder, *filled) == 2
    error = capsys.readouterr().err
    assert re.search(message, error) and error.count("\n") == 1
