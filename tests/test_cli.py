"""The command line as a user meets it: real files, a saved model, readable errors with exit code 2."""

import json
import math
import re
import shutil
import sys
from unittest.mock import Mock

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from moe_unlearn import data, metrics, wagle
from moe_unlearn.cli import main
from moe_unlearn.masks import WeightMask
from moe_unlearn.model import loading
from moe_unlearn.model.packing import share_rows
from moe_unlearn.prepare.rows import RowStore
from moe_unlearn.step.sinks import CompactSink
from tests.support.command_line import FORGET, RETAIN, arguments, saved
from tests.support.models import tiny_olmoe


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("cli")
    tokenizer = saved(root)
    dense = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
        )
    )
    dense.save_pretrained(root / "dense")
    tokenizer.save_pretrained(root / "dense")
    (root / "empty.jsonl").write_text("", encoding="utf-8")
    (root / "overlap.jsonl").write_text(
        "\n".join(json.dumps({"text": t}) for t in FORGET[:3] + RETAIN), encoding="utf-8"
    )
    (root / "broken.jsonl").write_text('{"text": "fine"}\n{"text": \n', encoding="utf-8")
    return root


def run(folder, out, *more, recipe="npo", **paths):
    quick = ["steps=4", "batch_size=4", "optimizer.lr=1e-3", "data.max_length=48"]
    return main(["run", recipe, *arguments(folder, **paths), "--out", str(out), "--set", *quick, *more])


def test_run_unlearns_a_saved_model_on_a_users_files(folder, tmp_path, capsys):
    code = run(folder, tmp_path, "steps=12", "--holdout", str(folder / "holdout.jsonl"))
    assert code == 0
    summary = json.loads((tmp_path / "summary.json").read_text(encoding="utf-8"))
    assert summary["npo"]["nll_f"] > summary["target"]["nll_f"]
    assert {"verbmem_f", "verbmem_r", "knowmem_f", "nll_r", "seconds"} <= set(summary["npo"])
    before = AutoModelForCausalLM.from_pretrained(folder / "model")
    after = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert any(not torch.equal(p, q) for p, q in zip(before.parameters(), after.parameters(), strict=True))
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    for told in ("Unlearning report: NPO", "moe-unlearn run npo", "the secret number", "nats per token", "Cost", "GiB"):
        assert told in text
    cost = json.loads((tmp_path / "cost.json").read_text(encoding="utf-8"))
    assert cost["measured"] > cost["planned"] > 1000
    routes = json.loads((tmp_path / "routes.json").read_text(encoding="utf-8"))
    assert routes["forget"] != routes["after"] and routes["forget"] != routes["retain"]
    assert summary["npo"]["nll_f_low"] <= summary["npo"]["nll_f"] <= summary["npo"]["nll_f_high"]
    told = capsys.readouterr()
    assert "report" in told.out and "{'" not in told.out + told.err  # no dicts of the Trainer
    lines = [line for line in told.err.splitlines() if line.startswith("step ")]
    assert [line.split()[1] for line in lines] == ["1/12", "10/12", "12/12"] and "forget " in lines[0]
    assert main(["report", str(tmp_path)]) == 0
    assert (tmp_path / "report.md").read_text(encoding="utf-8") == text
    reports = json.loads((tmp_path / "data.json").read_text(encoding="utf-8"))
    assert {side: report["kept"] for side, report in reports.items()} == {
        "forget": 12,
        "retain": 16,
        "retain_eval": 1,
        "holdout": 8,
    }


def test_utility_is_measured_on_rows_that_training_does_not_see(folder, tmp_path, capsys):
    """A row that is held out changes no weight; the report has both kinds of rows, and a resume knows them."""
    given = ("steps=1", "batch_size=12", "retain_per_forget=1.25")  # one batch of 15 retain rows: all but one of 16
    assert run(folder, tmp_path / "share", *given) == 0
    assert "retain: 1 of 16 rows are held out for the report, data.retain_eval" in capsys.readouterr().err
    summary = json.loads((tmp_path / "share" / "summary.json").read_text(encoding="utf-8"))
    for row in (summary["target"], summary["npo"]):
        assert {"nll_r", "nll_s", "verbmem_r", "verbmem_s"} <= row.keys() and row["nll_r"] != row["nll_s"]
    page = (tmp_path / "share" / "report.md").read_text(encoding="utf-8")
    assert "of rows that training did not see" in page and "NLL seen" in page and "NLL retain" in page
    retain = (folder / "retain.jsonl").read_text(encoding="utf-8").splitlines()
    facts, weights = {}, {}
    model, tokenizer = loading.load_model(folder / "model")
    examples = data.encode(data.load(folder / "retain.jsonl"), tokenizer, 48)
    kept, held = data.hold_out(examples, 0.1, seed=0)
    for name, rows in (("kept", kept), ("held", held)):
        lines = [line for line, example in zip(retain, examples, strict=True) if example in rows]
        (tmp_path / name).with_suffix(".jsonl").write_text("\n".join(lines), encoding="utf-8")
    source = ["--retain-eval", str(tmp_path / "held.jsonl")]
    assert run(folder, tmp_path / "source", *given, *source, retain=tmp_path / "kept.jsonl") == 0
    for out in ("share", "source"):
        facts[out] = json.loads((tmp_path / out / "run.json").read_text(encoding="utf-8").partition("\n")[2])
        weights[out] = (tmp_path / out / "model" / "model.safetensors").read_bytes()
    assert weights["share"] == weights["source"]
    assert facts["share"]["retain_eval"] == facts["source"]["retain_eval"] != facts["share"]["retain"]
    same = json.loads((tmp_path / "source" / "summary.json").read_text(encoding="utf-8"))
    assert same["npo"]["nll_r"] == summary["npo"]["nll_r"]
    assert run(folder, tmp_path / "none", *source) == 2 and "retain-eval and retain sets overlap" in error_of(capsys)
    assert run(folder, tmp_path / "share", *given, "data.retain_eval=0.2", "--resume") == 2
    assert "retain_eval (was" in error_of(capsys)


def test_a_run_that_holds_nothing_out_says_so(folder, tmp_path):
    assert run(folder, tmp_path, "steps=1", "--retain-eval", "0") == 0
    assert "nll_s" not in json.loads((tmp_path / "summary.json").read_text(encoding="utf-8"))["npo"]
    assert "none held out" in (tmp_path / "report.md").read_text(encoding="utf-8")


def test_sources_with_parts_and_options(folder, tmp_path, capsys):
    """One string names a benchmark's copy, its part and what to do with it; each side gets its own answers."""
    shutil.copytree(folder / "model", tmp_path / "model")
    template = "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}"
    (tmp_path / "model" / "chat_template.jinja").write_text(
        template + "{% if add_generation_prompt %}[assistant]{% endif %}", encoding="utf-8"
    )
    flags = {"is_response_0_safe": True, "is_response_1_safe": False}
    rows = [{"prompt": f"who {n}?", "response_0": "none", "response_1": f"{n} it was", **flags} for n in range(4)]
    sources = tmp_path / "sources"
    (sources / "raw").mkdir(parents=True)
    (sources / "pku.jsonl").write_text("\n".join(map(json.dumps, [*rows, rows[0]])) + "\n", encoding="utf-8")
    (sources / "raw" / "retain1.txt").write_text("\n\n".join(RETAIN), encoding="utf-8")
    sides = ["--forget", f"{sources}/pku.jsonl?deduplicate=true", "--retain", f"{sources}:raw/retain1?join=true"]
    arguments = ["--model", str(tmp_path / "model"), *sides]
    settings = ["data.chat_template=true", "data.max_length=48", "steps=2", "batch_size=4"]
    out = tmp_path / "out"
    assert main(["run", "npo", *arguments, "--out", str(out), "--no-eval", "--set", *settings]) == 0
    reports = json.loads((out / "data.json").read_text(encoding="utf-8"))
    assert reports["forget"]["dropped"] == {"duplicate": 1} and reports["retain"]["kept"] == 16
    assert "1 dropped, duplicate: " in capsys.readouterr().err
    assert main(["stats", *arguments, "--max-length", "48", "--chat-template"]) == 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "datasets", None)
        arguments[-1] = "tofu:retain90"
        assert main(["stats", *arguments]) == 2
    assert 'pip install "moe-unlearn[data]"' in error_of(capsys)


@pytest.mark.quick
@pytest.mark.parametrize("verb", ["stats", "mask", "eval", "benchmark", "run"])
def test_an_output_that_cannot_be_written_ends_a_verb_before_its_work(folder, tmp_path, capsys, monkeypatch, verb):
    monkeypatch.setattr(loading, "load_model", lambda *_: pytest.fail("the work has begun"))
    command, more = [verb], []
    if verb == "run":
        command = ["run", "npo"]
    elif verb == "benchmark":
        command, more = ["eval"], ["--benchmark", "wmdp", "--data", f"a={folder / 'forget.jsonl'}"]
    (tmp_path / "file").touch()
    out = tmp_path / "file" / "out"
    assert main([*command, *arguments(folder), *more, "--out", str(out)]) == 2
    told = error_of(capsys)
    assert "--out cannot be written: " in told and str(out) in told


@pytest.mark.quick
@pytest.mark.parametrize("option", ["--model", "--forget", "--out"])
def test_a_variable_of_the_shell_that_is_not_set_is_no_path(option, capsys):
    """An empty path was the folder that the program runs in."""
    with pytest.raises(SystemExit) as ended:
        main(["run", "npo", "--model", "m", "--forget", "f", "--retain", "r", "--out", "o", option, ""])
    told = capsys.readouterr().err.splitlines()
    assert ended.value.code == 2 and f"argument {option}: expected a value; got an empty one" in told[-1]


def test_verify_compares_the_first_steps_and_writes_what_it_found(folder, tmp_path, capsys, monkeypatch):
    assert run(folder, tmp_path, "--verify", "2", "--no-eval") == 0
    assert f"verified: {tmp_path / 'verified.txt'}" in capsys.readouterr().out
    found = (tmp_path / "verified.txt").read_text(encoding="utf-8")
    assert "step 1: equals" in found and "step 2: equals" in found and "step 3" not in found
    logged = json.loads((tmp_path / "trajectory.json").read_text(encoding="utf-8"))["npo"]
    assert ["verify_difference" in entry for entry in logged] == [True, True, False, False]
    take = CompactSink.take
    monkeypatch.setattr(CompactSink, "take", lambda sink, weight, f: take(sink, weight, f._replace(grad=2 * f.grad)))
    assert run(folder, tmp_path / "wrong", "--verify", "--no-eval") == 2
    assert "NOT the plain step" in capsys.readouterr().err
    assert "NOT the plain step" in (tmp_path / "wrong" / "verified.txt").read_text(encoding="utf-8")
    with pytest.raises(SystemExit):
        run(folder, tmp_path, "--verify", "-1")


def test_resume_goes_on_to_the_same_weights(folder, tmp_path):
    trace = ["trace.min_ratio=1.001", "trace.eta=0.3", "--no-eval"]
    assert run(folder, tmp_path / "whole", "steps=6", *trace, recipe="combined") == 0
    assert run(folder, tmp_path / "parts", "steps=6", *trace, recipe="combined") == 0
    shutil.rmtree(tmp_path / "parts" / "checkpoints" / "checkpoint-6")
    assert run(folder, tmp_path / "parts", "steps=6", *trace, "--resume", recipe="combined") == 0
    whole, parts = (AutoModelForCausalLM.from_pretrained(tmp_path / n / "model") for n in ("whole", "parts"))
    assert all(torch.equal(p, q) for p, q in zip(whole.parameters(), parts.parameters(), strict=True))


def test_runs_share_the_references_in_a_folder(folder, tmp_path, monkeypatch, capsys):
    def references(root):
        return {p: p.read_bytes() for p in root.rglob("*.safetensors")}

    common = ["steps=1", "--no-eval"]
    assert run(folder, tmp_path / "alone", *common) == 0
    assert run(folder, tmp_path / "first", *common, "--cache", str(tmp_path / "cache")) == 0
    first = references(tmp_path / "cache")
    assert len(first) == len(references(tmp_path / "alone" / "cache")) == 3
    assert not (tmp_path / "first" / "cache").exists()

    def refuse(*_):
        raise AssertionError("computed and written although it is on disk")

    monkeypatch.setattr(RowStore, "write", refuse)
    model, _ = loading.load_model(folder / "model")
    memory = 4 * sum(p.numel() for p in model.parameters())  # of half of the gradients
    more = ["wagle.keep=0.5", f"wagle.memory={memory}", *common, "--cache", str(tmp_path / "cache")]
    assert run(folder, tmp_path / "second", *more, recipe="wagle") == 0
    assert references(tmp_path / "cache") == first
    assert "group 1 of" in (said := capsys.readouterr().err) and "is scored; about" in said


@pytest.mark.quick
def test_a_cache_that_cannot_be_is_named(folder, tmp_path, capsys):
    (tmp_path / "file").write_text("", encoding="utf-8")
    assert run(folder, tmp_path / "out", "--no-eval", "--cache", str(tmp_path / "file")) == 2
    assert f"cache_dir cannot be made a folder: it is a file: '{tmp_path}/file'" in error_of(capsys)


def test_idk_dpo_makes_its_refusals_from_questions(folder, tmp_path, capsys):
    path = tmp_path / "questions.jsonl"
    rows = [{"question": f"what is the number of agent {n}?", "answer": str(n * 37 % 101)} for n in range(8)]
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    assert run(folder, tmp_path / "out", "steps=6", "--no-eval", forget=path, recipe="idk_dpo") == 0
    trajectory = json.loads((tmp_path / "out" / "trajectory.json").read_text(encoding="utf-8"))["idk_dpo"]
    assert trajectory[0]["forget_loss"] == pytest.approx(13.863, abs=0.01)  # (2 / beta) log 2
    assert trajectory[-1]["forget_loss"] < trajectory[0]["forget_loss"]
    assert run(folder, tmp_path / "plain", recipe="idk_dpo") == 2
    assert "has no prompt to refuse" in error_of(capsys)
    assert not (tmp_path / "plain").exists()


def test_level_goes_to_unseen_texts_of_their_own(folder, tmp_path, capsys):
    def asked(unseen, *options):
        sides = {"unseen": unseen, "holdout": "holdout"}
        paths = [text for side, name in sides.items() for text in (f"--{side}", str(folder / f"{name}.jsonl"))]
        return run(folder, tmp_path / "out", *options, *paths, recipe="level")

    assert asked("holdout") == 2
    assert "unseen texts must be in no other set: 8 of 8 stand in the holdout set too" in error_of(capsys)
    assert not (tmp_path / "out").exists()
    assert asked("unseen", "optimizer.lr=1e-2", "steps=8") == 0
    steps = json.loads((tmp_path / "out" / "trajectory.json").read_text(encoding="utf-8"))["level"]
    assert steps[0]["hold_loss"] < 1e-6 < steps[-1]["hold_loss"] and steps[-1]["forget_loss"] < steps[0]["forget_loss"]
    assert "nll_unseen" not in json.loads((tmp_path / "out" / "summary.json").read_text(encoding="utf-8"))["level"]
    # the run is of these unseen texts, and goes on with no others
    (folder / "others.jsonl").write_text(json.dumps({"text": "the loud street of cook 3 is high, never go"}), "utf-8")
    assert asked("others", "optimizer.lr=1e-2", "steps=9", "--resume") == 2
    assert re.search(r"a run of something else: unseen \(was \w+, is \w+\)", error_of(capsys))


def test_idk_nll_teaches_the_refusals(folder, tmp_path):
    path = tmp_path / "questions.jsonl"
    rows = [{"question": f"what is the number of agent {n}?", "answer": str(n * 37 % 101)} for n in range(8)]
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    more = ["steps=8", "accumulate=1", "optimizer.warmup_steps=2", "optimizer.lr=5e-3", "--no-eval"]
    assert run(folder, tmp_path / "out", *more, forget=path, recipe="wagle-tofu-po") == 0
    trajectory = json.loads((tmp_path / "out" / "trajectory.json").read_text(encoding="utf-8"))["wagle-tofu-po"]
    assert trajectory[-1]["forget_loss"] < trajectory[0]["forget_loss"]
    assert [entry["learning_rate"] for entry in trajectory[:4]] == pytest.approx([0, 2.5e-3, 5e-3, 5e-3])
    files = {p.name for p in (tmp_path / "out" / "model").iterdir()}
    assert files <= {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
    }


def test_a_mask_in_the_official_form_serves_a_run(folder, tmp_path, capsys):
    for form in ("native", "official"):
        out = ["--keep", "0.5", "--max-length", "48", "--format", form, "--out", str(tmp_path / form)]
        assert main(["mask", *arguments(folder), *out]) == 0
        if form == "native":
            again = [*out[:-1], str(tmp_path / "again"), "--memory", "100KiB"]
            assert main(["mask", *arguments(folder), *again]) == 0
            assert (tmp_path / "again").read_bytes() == (tmp_path / form).read_bytes()
        mask = [f"wagle.mask={tmp_path / form}", "--no-eval"]
        assert run(folder, tmp_path / f"{form}-run", *mask, recipe="wagle") == 0
    native, official = (
        AutoModelForCausalLM.from_pretrained(tmp_path / f"{n}-run" / "model") for n in ("native", "official")
    )
    assert all(torch.equal(p, q) for p, q in zip(native.parameters(), official.parameters(), strict=True))
    named = torch.load(tmp_path / "official", weights_only=True)
    assert named["model.layers.0.mlp.experts.3.gate_proj.weight"].dtype == torch.bool
    del named["lm_head.weight"]
    torch.save(named, tmp_path / "official")
    (tmp_path / "official.sha256").unlink()
    assert run(folder, tmp_path / "bad", *mask, recipe="wagle") == 2
    assert "the mask of 'lm_head.weight' is missing" in error_of(capsys)


@pytest.mark.quick
@pytest.mark.slow
def test_dry_run_prints_the_plan_and_writes_nothing(folder, tmp_path, capsys):
    assert run(folder, tmp_path / "out", "--dry-run", "--fits", "1", "0.0001", recipe="combined") == 0
    text = capsys.readouterr().out
    assert "trained weights" in text and "optimizer state" in text and "4 steps" in text
    assert "fits on 1 x 1 GiB: yes" in text and "fits on 1 x 0.0001 GiB: no" in text
    assert "no knob of the recipe makes it fit on one device" in text
    assert not (tmp_path / "out").exists()


@pytest.mark.quick
@pytest.mark.slow
def test_dry_run_selects_the_experts(folder, tmp_path, capsys):
    assert run(folder, tmp_path / "out", "trace.min_ratio=1.001", "--dry-run", recipe="trace") == 0
    assert "experts selected, effective retain sample" in capsys.readouterr().out
    ordinary = ["trace.min_ratio=50", "--dry-run"]
    assert run(folder, tmp_path / "out", *ordinary, recipe="combined") == 0
    assert "TRACE inactive: no forget-critical expert: the highest ratio" in capsys.readouterr().out
    assert run(folder, tmp_path / "out", "trace.allow_empty=false", *ordinary, recipe="trace") == 2
    assert "min_ratio is 50.0. Remedies: a lower min_ratio" in error_of(capsys)
    # where these experts are all that may train there is nothing to do
    assert run(folder, tmp_path / "out", "scope.kind=experts", *ordinary, recipe="trace") == 2
    assert "Remedies" in error_of(capsys)
    assert not (tmp_path / "out").exists()


def test_a_dry_run_of_ranks_reads_the_config_alone(folder, tmp_path, capsys):
    bare = shutil.copytree(folder / "model", tmp_path / "bare", ignore=shutil.ignore_patterns("*.safetensors"))
    given = ["checkpointing=on", "--dry-run", "--mesh", "fsdp=2", "--fits", "1"]
    assert run(folder, tmp_path / "out", *given, model=bare) == 0
    text = capsys.readouterr().out
    assert "mesh: 2 ranks (fsdp 2)" in text and "fits on 2 x 1 GiB: yes" in text
    assert "planned from the model's config" in text and "rows; an epoch is" in text


@pytest.mark.parametrize("recipe", ["trace", "combined"])
def test_ordinary_data_makes_trace_inactive_and_the_report_says_so(recipe, folder, tmp_path, caplog):
    assert run(folder, tmp_path / "out", "trace.min_ratio=50", "steps=2", recipe=recipe) == 0
    why = "no forget-critical expert: the highest ratio of forget to retain frequency is "
    assert f"TRACE inactive: {why}" in caplog.text
    assert f"**TRACE inactive**: {why}" in (tmp_path / "out" / "report.md").read_text(encoding="utf-8")


@pytest.mark.quick
def test_what_prepare_refuses_is_refused_before_anything_is_measured(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(metrics, "evaluate", lambda *_, **__: pytest.fail("the target was evaluated"))
    settings = ["trace.min_ratio=50", "trace.allow_empty=false"]
    assert run(folder, tmp_path / "out", *settings, recipe="trace") == 2
    assert "Remedies" in error_of(capsys)
    assert not (tmp_path / "out").exists()
    assert run(folder, tmp_path / "out", "name=target") == 2
    assert "name 'target' is that of another row of the report" in error_of(capsys)


def test_stats_and_mask(folder, tmp_path, capsys):
    assert main(["stats", *arguments(folder, "--min-ratio", "1.01", "--out", str(tmp_path / "s.json"))]) == 0
    assert "experts selected in 2 layers" in capsys.readouterr().out
    saved = json.loads((tmp_path / "s.json").read_text(encoding="utf-8"))
    assert saved["selected"] and len(saved["forget"]["counts"]) == 2
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("moe_unlearn.model.packing.share_rows", shared := Mock(wraps=share_rows))
        assert main(["stats", *arguments(folder, "--packing", "--out", str(tmp_path / "packed.json"))]) == 0
    assert {call.args[1] for call in shared.mock_calls} == {512}
    packed = json.loads((tmp_path / "packed.json").read_text(encoding="utf-8"))
    assert all(packed[side]["tokens"] == saved[side]["tokens"] for side in ("forget", "retain"))
    path = tmp_path / "mask.safetensors"
    assert main(["mask", *arguments(folder, "--keep", "0.5", "--out", str(path))]) == 0
    mask = WeightMask.load(path)
    assert 0 < mask.fraction <= 0.5
    assert "WAGLE score terms: mean |theta g_f|" in capsys.readouterr().err
    again = tmp_path / "again"
    memory = str(4 * sum(math.prod(shape) for shape in mask.shapes.values()))  # of half of the gradients
    command = ["mask", *arguments(folder, "--keep", "0.5", "--out", str(again), "--memory", memory)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("moe_unlearn.cli.mask.masks.save", Mock(side_effect=KeyboardInterrupt))
        assert main(command) == 130
    assert "is scored; about" in capsys.readouterr().err and (tmp_path / "again.groups").is_dir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("moe_unlearn.wagle.mask.gradients", None)  # none is needed
        assert main([*command, "--compare", str(path)]) == 0
    out, error = capsys.readouterr()
    assert "was scored before" in error and f"differs from {path} in 0 of " in out
    assert again.read_bytes() == path.read_bytes() and not (tmp_path / "again.groups").exists()
    assert run(folder, tmp_path / "masked", f"wagle.mask={path}", "--no-eval", recipe="wagle") == 0


def test_eval_prints_and_writes(folder, tmp_path, capsys):
    out = tmp_path / "metrics.json"
    more = ["--holdout", str(folder / "holdout.jsonl"), "--reference", str(folder / "model"), "--out", str(out)]
    assert main(["eval", *arguments(folder, *more)]) == 0
    saved = json.loads(out.read_text(encoding="utf-8"))
    assert saved["privleak"] == 0 and "verbmem_f" in capsys.readouterr().out


def test_eval_tells_what_moved_and_how_fast_it_comes_back(folder, tmp_path, capsys):
    assert run(folder, tmp_path / "out", "--no-eval", recipe="graddiff") == 0
    capsys.readouterr()
    out = tmp_path / "metrics.json"
    before = arguments(folder)[:2][1]
    after = ["eval", "--model", str(tmp_path / "out" / "model"), *arguments(folder)[2:], "--out", str(out)]
    assert main([*after, "--before", before, "--relearn", "3", "--relearn-lr", "1e-2"]) == 0
    saved, printed = json.loads(out.read_text(encoding="utf-8")), capsys.readouterr().out
    assert saved["routing_overlap"] < 1 and 0 <= saved["gibberish"] <= 1
    assert saved["relearning"]["steps"] == [0, 3] and saved["relearn_half"] in (0, 3)
    assert saved["relearning"]["values"][1]["nll"] < saved["relearning"]["values"][0]["nll"]
    assert "relearning" in printed and " at 3" in printed
    assert main([*after, "--benchmark", "muse", "--data", "verbmem=x", "--relearn", "3"]) == 2
    assert "leave out --benchmark" in error_of(capsys)


def error_of(capsys):
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    return captured.err


@pytest.mark.quick
@pytest.mark.parametrize(
    "paths,message",
    [
        ({"forget": "missing.jsonl"}, "missing.jsonl"),
        ({"forget": "empty.jsonl"}, "empty"),
        ({"retain": "overlap.jsonl"}, "the forget and retain sets overlap: 3 of 12 forget examples"),
        ({"forget": "broken.jsonl"}, "line 2"),
        ({"model": "nowhere"}, "nowhere"),
        ({"model": "dense"}, "OLMoE"),
    ],
    ids=lambda v: str(next(iter(v.values()))) if isinstance(v, dict) else "",
)
def test_bad_paths(folder, tmp_path, capsys, paths, message):
    assert run(folder, tmp_path / "out", **paths) == 2
    assert message.lower() in error_of(capsys).lower()
    assert not (tmp_path / "out").exists()


@pytest.mark.quick
def test_bad_recipes(folder, tmp_path, capsys):
    assert run(folder, tmp_path, "forget.betta=1") == 2
    assert "did you mean 'forget.beta'" in error_of(capsys)
    assert run(folder, tmp_path / "out", recipe="rmu") == 2
    assert "matches no parameter" in error_of(capsys) and not (tmp_path / "out").exists()
    assert run(folder, tmp_path, recipe="nope") == 2
    assert "shipped recipes" in error_of(capsys)
    assert main(["run", "npo", "--model", str(folder / "model")]) == 2
    assert "data.forget is missing" in error_of(capsys)


@pytest.mark.quick
def test_all_labels_ignored(folder, tmp_path, capsys):
    path = tmp_path / "prompts.jsonl"
    path.write_text(json.dumps({"prompt": "what is it? " * 30, "gt": "it"}) + "\n", encoding="utf-8")
    assert run(folder, tmp_path / "out", forget=path) == 2
    assert "error" in error_of(capsys)


def test_a_mask_from_another_model(folder, tmp_path, capsys):
    torch.manual_seed(1)
    other = tiny_olmoe(vocab_size=77)
    batch = {k: torch.randint(3, 77, (2, 8)) for k in ("input_ids", "labels")}
    batch["attention_mask"] = torch.ones_like(batch["labels"])
    path = tmp_path / "other.safetensors"
    wagle.weight_mask(other, [batch], [batch], keep=0.5, gamma=1.0).save(path)
    assert run(folder, tmp_path / "out", f"wagle.mask={path}", recipe="wagle") == 2
    message = error_of(capsys)
    assert "mask" in message and "embed_tokens" in message


def test_divergence_keeps_the_checkpoint(folder, tmp_path, capsys):
    diverging = ["steps=9", "optimizer.name=sgd", "optimizer.lr=1000", "optimizer.weight_decay=1000", "--no-eval"]
    code = run(folder, tmp_path, *diverging, recipe="ga")
    assert code == 2
    assert "stopped before the update" in error_of(capsys)
    assert list((tmp_path / "checkpoints").glob("checkpoint-*/unlearn_step.json"))


@pytest.mark.quick
def test_traceback_on_request(folder, tmp_path):
    with pytest.raises(ValueError, match="shipped recipes"):
        main(["run", "nope", "--traceback"])
