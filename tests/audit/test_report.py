"""The report's three files, what they say, and the command line that writes them."""

import dataclasses
import json
import re
import stat
from xml.etree import ElementTree

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from moe_unlearn import progress
from moe_unlearn.audit import Settings, audit, figures
from moe_unlearn.audit.attack import SIDES
from moe_unlearn.audit.report import NAMES, write
from moe_unlearn.audit.summary import summary
from moe_unlearn.cli import main
from moe_unlearn.config import Recipe
from moe_unlearn.page.charts import forest, heat
from moe_unlearn.page.svg import Axis

FAST = Settings(new_tokens=8, relearn_steps=2, samples=1, experts=2)


@pytest.fixture(scope="module")
def report(experiment, rows):
    few = {side: own[:10] for side, own in rows.items()}
    known, fast = experiment.target, {"settings": FAST, "resamples": 999}
    return audit(known, experiment.tokenizer, before=known, say=lambda line: None, **fast, **few)


def test_the_three_files(report, tmp_path):
    assert write(tmp_path / "out", report) == [tmp_path / "out" / name for name in NAMES]
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == 0o700
    text, page, plain = ((tmp_path / "out" / name).read_text(encoding="utf-8") for name in NAMES)
    content = json.loads(plain, parse_constant=pytest.fail)  # no NaN, no Infinity
    assert content["verdict"] == "present" == content["attacks"]["plain"]
    assert len(content["findings"]) == len(report.findings)
    assert text.startswith("# Audit of forgetting: present\n") and re.search(r"\| \*\*present\*\* +\|", text)
    assert "<svg" in page and not re.search(r"(src|href)=|https?:|url\(", page) and page.count("<script") == 1
    assert "prefers-color-scheme: dark" in page
    for told in (text, page):
        assert "Looking inside, a probe of hidden states: what is inside differs by more" in told
    ElementTree.fromstring(re.search("<body>.*</body>", page, re.DOTALL)[0])  # every tag is closed
    for drawn in re.findall(r"<svg.*?</svg>", page, re.DOTALL):
        ElementTree.fromstring(drawn)  # well formed


def test_no_report_holds_a_text(report, experiment, rows, tmp_path):
    write(tmp_path, report)
    words = experiment.tokenizer.decode(rows["forget"][0].input_ids[8:], skip_special_tokens=True).split()
    longest = max(words, key=len)
    assert len(longest) > 6 and not any(longest in (tmp_path / name).read_text(encoding="utf-8") for name in NAMES)


def test_a_model_before_that_knew_nothing_gives_no_verdict(report):
    blank = [dataclasses.replace(own, verdict="", why="the model before shows no more") for own in report.findings]
    told = summary(dataclasses.replace(report, findings=blank))
    assert told.startswith("No score could be judged: the model before shows no more.")


def test_what_a_figure_has_nothing_for_is_left_out():
    assert figures.shares([], 0.1) == [] and heat("", []) is None is heat("", [[None]])
    drawn = heat("", [[0.5, None]]).inline()
    assert drawn.count('class="cell"') == drawn.count('class="empty"') == 1


def test_an_interval_that_leaves_the_axis_has_an_arrow():
    axis = Axis("share", -1.0, 1.5)
    inside, outside = (forest([("x", "gone", ends)], 0.1, axis).inline() for ends in ((0, 0.1, 0.2), (-9, 0.1, 9)))
    assert inside.count('class="arrow"') == 0 and outside.count('class="arrow"') == 2


@pytest.fixture
def folder(experiment, tmp_path):
    documents = {
        side: [
            experiment.tokenizer.decode(e.input_ids, skip_special_tokens=True) for e in getattr(experiment, side)[:10]
        ]
        for side in ("forget", "retain", "holdout")
    }
    for side, texts in documents.items():
        lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
        (tmp_path / f"{side}.jsonl").write_text(lines, encoding="utf-8")
    (tmp_path / "run").mkdir()
    for name, model in (("before", experiment.target), ("run/model", experiment.retrain)):
        model.save_pretrained(tmp_path / name)
        experiment.tokenizer.save_pretrained(tmp_path / name)
    return tmp_path


def asked(folder, *more, **changed):
    options = {"model": "run/model", "before": "before", "out": "out"}
    options |= {side: f"{side}.jsonl" for side in SIDES} | changed
    return main(["audit", *(f"--{name}={folder / value}" for name, value in options.items()), "--max-length=64", *more])


def test_the_command_line_goes_on_where_it_was(folder, capsys, monkeypatch):
    monkeypatch.setattr(progress, "EVERY", 0)  # a line for every attack
    assert asked(folder, "--attacks", "plain") == 0
    told = capsys.readouterr()
    assert "Asked as it is" in told.out and "AUDIT.html" in told.out and "former model" in told.err
    assert "audit: 1 of 1 (attack)" in told.err
    assert stat.S_IMODE((folder / "out").stat().st_mode) == 0o700
    content = json.loads((folder / "out" / "AUDIT.json").read_text(encoding="utf-8"))
    assert content["not_tested"]["rounding"] == "it was not asked for"
    kept = sorted((folder / "out" / "cache").glob("result-*"))
    assert len(kept) == 2  # of the model and of the one before
    assert asked(folder, "--attacks", "plain,rounding") == 0
    assert "former model: asked" not in capsys.readouterr().err  # known
    assert asked(folder, "--attacks", "plain", "--quiet") == 0 and capsys.readouterr().err == ""
    assert set(kept) < set((folder / "out" / "cache").glob("result-*"))
    assert main(["purge", str(folder / "out")]) == 0
    assert {path.name for path in (folder / "out").iterdir()} == set(NAMES)


def test_holdout_rows_that_the_run_trained_on_are_left_out(folder, capsys):
    def ran_with(*sides, name="graddiff", **others):
        sources = {side: side for side in sides} | others
        recipe = Recipe.load(name, [f"data.{side}={folder / source}.jsonl" for side, source in sources.items()])
        (folder / "run" / "recipe.yaml").write_text(recipe.to_yaml(), encoding="utf-8")

    unseen, trained = (lines_of(folder / f"{side}.jsonl") for side in ("holdout", "retain"))
    (folder / "holdout.jsonl").write_text("".join([*unseen, *trained[:2]]), encoding="utf-8")
    (folder / "own.jsonl").write_text("".join(trained[2:]), encoding="utf-8")  # not what the run had
    ran_with("forget", "retain")
    assert asked(folder, "--attacks", "plain", retain="own.jsonl") == 0
    content = json.loads((folder / "out" / "AUDIT.json").read_text(encoding="utf-8"))
    assert content["documents"]["holdout"] == 10
    assert content["left_out"] == ["2 holdout rows were trained on, and are no unseen text"]
    # level trains on unseen rows, too
    ran_with("forget", "retain", unseen="holdout", name="level")
    assert asked(folder, "--attacks", "plain", retain="own.jsonl") == 2
    assert "holdout: expected documents to audit with; got 12 holdout rows were trained on" in capsys.readouterr().err


def test_an_adapter_is_audited_as_its_base_with_it(folder, experiment):
    """An audit attacks the weights of the merged model, whether the adapter is the model or the one before."""
    base = folder / "before"
    settings = peft.LoraConfig(r=2, target_modules=["q_proj"], target_parameters=["mlp.experts.down_proj"])
    torch.manual_seed(0)
    adapter = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), settings)
    for name, weight in adapter.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.3)
    adapter.save_pretrained(folder / "adapter")
    few = {side: getattr(experiment, side)[:2] for side in SIDES}
    with pytest.raises(ValueError, match=r"merge the adapter first: merge_and_unload\(\)"):
        audit(adapter, experiment.tokenizer, before=experiment.target, **few)  # whose weights are left as they are
    adapter.merge_and_unload().save_pretrained(folder / "merged")
    experiment.tokenizer.save_pretrained(folder / "merged")
    kept, moved = (load_file(folder / name / "model.safetensors") for name in ("before", "merged"))
    assert kept.keys() == moved.keys() and sum(not torch.equal(kept[name], moved[name]) for name in kept) == 18
    attacks = ("--attacks", "plain,rounding,relearning,routing", "--relearn-steps", "1")
    for out, changed in {
        "of adapter": {"model": "adapter"},
        "of merged": {"model": "merged"},
        "before adapter": {"before": "adapter", "model": "before"},
    }.items():
        assert asked(folder, *attacks, out=out, **changed) == 0
    ours, theirs = (json.loads((folder / out / "AUDIT.json").read_text("utf-8")) for out in ("of adapter", "of merged"))
    assert not ours["not_tested"].keys() & {"plain", "rounding", "relearning", "routing"}
    assert ours["findings"] == theirs["findings"] and ours["more"] == theirs["more"]


def lines_of(path):
    return path.read_text(encoding="utf-8").splitlines(True)


@pytest.mark.parametrize(
    ("more", "changed", "message"),
    [
        (["--attacks", "guess"], {}, "expected --attacks among plain"),
        (["--budget", "0"], {}, "expected a budget above 0 minutes; got 0"),
        ([], {"before": "nothing"}, "expected a model folder written by save_pretrained"),
        ([], {"out": "run/model"}, "expected an output apart from what is read"),
        ([], {"out": "forget.jsonl"}, "expected an output apart from what is read"),
    ],
)
def test_refusals_leave_nothing_behind(more, changed, message, folder, capsys):
    there = sorted(folder.rglob("*"))
    assert asked(folder, *more, **changed) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and message in told
    assert sorted(folder.rglob("*")) == there


def test_settings_are_written(report):
    assert report.to_dict()["settings"] == dataclasses.asdict(FAST)
