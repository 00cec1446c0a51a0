"""`moe-unlearn eval --benchmark`: files in, the benchmark's files out, a reference run compared."""

import json
import re
import shutil
import stat

import pytest
from transformers import BertConfig, BertForSequenceClassification

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
        (tmp_path / name).write_text(json.dumps(content), encoding="utf-8")
    return tmp_path


def evaluate(folder, *more):
    return main(["eval", "--model", str(folder / "model"), *map(str, more)])


def test_a_retrained_run_and_then_one_that_refers_to_it(folder, capsys):
    data = ["--data", f"forget={folder / 'forget.json'}", f"holdout={folder / 'holdout.json'}"]
    assert evaluate(folder, "--benchmark", "muse", *data, "--out", folder / "retrained") == 0
    assert "mia_min_k" in capsys.readouterr().out
    more = ["--reference-run", folder / "retrained", "--out", folder / "run", "--cache", folder / "cache"]
    assert evaluate(folder, "--benchmark", "muse", *data, *more) == 0
    summary = json.loads((folder / "run" / "MUSE_SUMMARY.json").read_text(encoding="utf-8"))
    assert summary["privleak"] in (0, None) and list((folder / "cache").iterdir())
    (folder / "forget.json").write_text(json.dumps(["other text here"]), encoding="utf-8")
    assert evaluate(folder, "--benchmark", "muse", *data, *more) == 2
    assert "computed 'mia_min_k' on other data" in capsys.readouterr().err


def test_the_attacks_that_are_asked_for(folder, capsys):
    data = ["--data", f"forget={folder / 'forget.json'}", f"holdout={folder / 'holdout.json'}"]
    assert evaluate(folder, "--benchmark", "muse", *data, "--gradient-norm", "--reference", folder / "model") == 0
    printed = dict(line.split() for line in capsys.readouterr().out.splitlines())
    assert printed["mia_reference"] == "0.5" and 0 <= float(printed["mia_gradnorm"]) <= 1  # its own reference


def test_attacks_without_the_rows_that_they_compare_are_errors(folder, capsys):
    qa = {"question": "who?", "answer": "a bell", "perturbed_answer": ["a"], "paraphrased_answer": "the bell"}
    (folder / "qa.jsonl").write_text(json.dumps(qa), encoding="utf-8")
    (folder / "verbmem.jsonl").write_text(json.dumps({"prompt": "seven", "gt": " frozen bells"}), encoding="utf-8")
    for name, data in (("tofu", "forget=qa.jsonl"), ("muse", "verbmem=verbmem.jsonl")):
        source = data.replace("=", f"={folder}/")
        for option in (["--gradient-norm"], ["--reference", folder / "model"]):
            assert evaluate(folder, "--benchmark", name, "--data", source, *option) == 2
            told = capsys.readouterr().err
            assert "compares forget with holdout rows; got" in told and "0 holdout" in told
    texts = ["--forget", folder / "bio.jsonl", "--retain", folder / "bio.jsonl"]
    assert evaluate(folder, *texts, "--reference", folder / "model") == 2
    assert "--reference is for privleak, which needs --holdout too" in capsys.readouterr().err


def test_redacted_results_have_no_texts(folder, capsys):
    (folder / "verbmem.jsonl").write_text(json.dumps({"prompt": "seven", "gt": " frozen bells"}), encoding="utf-8")
    asked = ["--benchmark", "muse", "--data", f"verbmem={folder / 'verbmem.jsonl'}", "--out"]
    assert evaluate(folder, *asked, folder / "whole") == evaluate(folder, *asked, folder / "bare", "--redact") == 0
    written = {path.name: path.read_text(encoding="utf-8") for path in (folder / "bare").iterdir()}
    assert len(written) == 3 and not any("frozen bells" in text for text in written.values())
    whole, bare = (json.loads((folder / name / "MUSE_EVAL.json").read_text("utf-8")) for name in ("whole", "bare"))
    own, cut = (each["forget_verbmem_ROUGE"]["value_by_index"]["0"] for each in (whole, bare))
    assert own["ground_truth"].strip() == "frozen bells" and {k for k in own if own[k] != cut[k]} >= {"ground_truth"}
    assert all(cut[key] is None if isinstance(own[key], str) else cut[key] == own[key] for key in own)
    assert stat.S_IMODE((folder / "bare").stat().st_mode) == 0o700
    assert main(["eval", "--model", "m", "--forget", "f", "--retain", "r", "--redact"]) == 2
    assert "--redact is for a --benchmark" in capsys.readouterr().err


def test_a_reference_of_a_smaller_vocabulary_is_named(folder, random_model, capsys):
    random_model.resize_token_embeddings(40)
    random_model.save_pretrained(folder / "small")
    shutil.copy(folder / "model" / "tokenizer.json", folder / "small")
    shutil.copy(folder / "model" / "tokenizer_config.json", folder / "small")
    data = ["--data", f"forget={folder / 'forget.json'}", f"holdout={folder / 'holdout.json'}"]
    assert evaluate(folder, "--benchmark", "muse", *data, "--reference", folder / "small") == 2
    told = capsys.readouterr().err
    assert re.search(
        r"example 0: its token id \d+ is none of the 40 of a OlmoeForCausalLM: expected a model with", told
    )


def test_like_another_project(folder, capsys):
    data = ["--data", f"forget={folder / 'forget.json'}", f"holdout={folder / 'holdout.json'}"]
    assert evaluate(folder, "--benchmark", "muse", *data, "--like", "muse_bench", "--out", folder / "run") == 0
    written = json.loads((folder / "run" / "MUSE_SETTINGS.json").read_text(encoding="utf-8"))["settings"]
    assert written["like"]["name"] == "muse_bench" and not written["use_stemmer"]
    # the reference must be theirs too
    assert evaluate(folder, "--benchmark", "muse", *data, "--reference-run", folder / "run") == 2
    assert "made with other settings" in capsys.readouterr().err
    wmdp = ["--benchmark", "wmdp", "--data", f"wmdp_bio={folder / 'bio.jsonl'}"]
    assert evaluate(folder, *wmdp, "--like", "open-unlearning") == 2
    assert "--like is for muse and tofu; got --benchmark wmdp" in capsys.readouterr().err


def test_options_of_a_chat_template_need_one(folder, capsys):
    data = ["--data", f"forget={folder / 'forget.json'}", f"holdout={folder / 'holdout.json'}"]
    assert evaluate(folder, "--benchmark", "muse", *data, "--system", "be brief") == 2
    assert "--system is for a chat template: give --chat-template too" in capsys.readouterr().err
    more = ["--chat-template", "--no-enable-thinking", "--date", "2026-11-29", "--out", folder / "run"]
    assert evaluate(folder, "--benchmark", "muse", *data, *more) == 0
    written = json.loads((folder / "run" / "MUSE_SETTINGS.json").read_text(encoding="utf-8"))["settings"]
    assert written["chat"] == {"enable_thinking": False, "system": "", "date": "2026-11-29"}


def test_wmdp(folder, capsys):
    assert evaluate(folder, "--benchmark", "wmdp", "--data", f"wmdp_bio={folder / 'bio.jsonl'}") == 0
    assert capsys.readouterr().out.startswith("wmdp_bio/acc")


def test_rwku_and_completions_write_their_files(folder, capsys):
    probe = {"query": "who", "answer": "a merchant", "subject": "Ann", "level": "2", "type": "simple question"}
    (folder / "probes.json").write_text(json.dumps([probe]), encoding="utf-8")
    rwku = ["--benchmark", "rwku", "--data", f"forget_level2={folder / 'probes.json'}"]
    assert evaluate(folder, *rwku, "--out", folder / "run") == 0
    assert list(json.loads((folder / "run" / "RWKU_SUMMARY.json").read_text(encoding="utf-8"))) == [
        "forget_level2_ROUGE"
    ]
    size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    judge = BertConfig(vocab_size=512, **size, id2label={0: "kind", 1: "toxic"}, pad_token_id=0)
    BertForSequenceClassification(judge).save_pretrained(folder / "judge")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(folder / "model" / name, folder / "judge")
    (folder / "prompts.jsonl").write_text(json.dumps({"prompt": "who silenced the bells"}), encoding="utf-8")
    sets = ["--data", f"utility={folder / 'forget.json'}", f"rude={folder / 'prompts.jsonl'}"]
    completed = ["--benchmark", "completions", *sets, "--out", folder / "run", "--classifier", folder / "judge"]
    assert evaluate(folder, *completed, "--label", "toxic") == 0
    written = json.loads((folder / "run" / "COMPLETIONS_SUMMARY.json").read_text(encoding="utf-8"))
    assert written.keys() == {"rude_p_toxic", "utility_perplexity"} and 0 < written["rude_p_toxic"] < 1
    assert evaluate(folder, *completed, "--label", "rude") == 2
    assert "one of kind, toxic; got 'rude'" in capsys.readouterr().err
    assert evaluate(folder, *rwku, "--chat-template") == 2
    assert "this one has none" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--forget is missing; or give a --benchmark"),
        (["--reference-run", "x"], "--reference-run is for a --benchmark"),
        (["--classifier", "x"], "--classifier is for a --benchmark"),
        (["--gradient-norm"], "--gradient-norm is for a --benchmark"),
        (["--benchmark", "wmdp", "--data", "a=b", "--gradient-norm"], "--gradient-norm is for the attacks of muse"),
        (["--benchmark", "rwku", "--data", "forget_level1=b", "--reference", "x"], "--reference is for the attacks"),
        (["--benchmark", "muse"], "needs --data NAME=SOURCE"),
        (["--benchmark", "muse", "--data", "forget.json"], "needs --data NAME=SOURCE"),
        (["--benchmark", "tofu", "--data", "forgotten={bio.jsonl}"], "tofu has no set 'forgotten'; expected .*forget"),
        (["--benchmark", "muse", "--data", "forget=a", "forget=b"], "names a set twice"),
        (["--benchmark", "wmdp", "--data", "wmdp_bio={holdout.json}"], "wmdp_bio, row 0: expected question"),
        (
            ["--benchmark", "rwku", "--data", "forget_level4=a"],
            "rwku has no set 'forget_level4'; expected .*mia_retain",
        ),
        (
            ["--benchmark", "rwku", "--data", "mia_forget=a", "--reference-run", "x"],
            "is for muse and tofu; rwku is comp",
        ),
        (["--benchmark", "completions", "--data", "s=a", "--classifier", "x"], "--label NAME go together"),
        (["--benchmark", "muse", "--data", "forget=a", "--label", "x"], "go together, with --benchmark completions"),
        (
            ["--benchmark", "completions", "--data", "seen={forget.json}"],
            "seen, row 0: .* more than prompt_tokens = 200",
        ),
        (
            ["--benchmark", "completions", "--data", "s={forget.json}", "--classifier", "{model}", "--label", "x"],
            "cannot load a sequence classifier",
        ),
        (["--benchmark", "tofu", "--data", "forget={model/config.json}"], "expected a JSON list"),
    ],
)
def test_what_is_missing_is_said_in_one_line(folder, capsys, arguments, message):
    filled = [re.sub(r"\{(.*)\}", lambda m: str(folder / m[1]), a) for a in arguments]
    assert evaluate(folder, *filled) == 2
    error = capsys.readouterr().err
    assert re.search(message, error) and error.count("\n") == 1
