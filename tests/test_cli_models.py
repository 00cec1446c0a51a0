"""Which models the command line loads, to where, and how many of them are in memory at a time."""

import gc
import importlib
import json
import re
import shutil
import stat
import weakref

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from moe_unlearn import trace, wagle
from moe_unlearn.cli import evaluate, main
from moe_unlearn.config import Recipe
from moe_unlearn.data import encode, load
from moe_unlearn.lazy import Lazy
from moe_unlearn.model import loading
from moe_unlearn.runs import run as runs
from moe_unlearn.runs.run import Run
from tests.support.command_line import arguments, saved
from tests.support.own_code import add_own_code

VERBS = {
    "run": ["run", "npo"],
    "dry run": ["run", "npo", "--dry-run"],
    "stats": ["stats"],
    "mask": ["mask", "--out", "mask.safetensors"],
    "eval": ["eval"],
    "benchmark": ["eval", "--benchmark", "wmdp", "--data", "a=a.jsonl"],
    "alternates": ["alternates", "--out", "a.jsonl"],
}
QUICK = ["--set", "steps=2", "batch_size=4", "data.max_length=48"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("cli")
    saved(root)
    return root


def error_of(capsys):
    error = capsys.readouterr().err
    lines = [line for line in error.strip().splitlines() if "data.retain_eval" not in line]
    assert "Traceback" not in error and len(lines) == 1
    return error


@pytest.mark.quick
@pytest.mark.parametrize("verb", VERBS)
def test_a_device_that_is_not_here_ends_a_verb_before_it_reads(tmp_path, capsys, monkeypatch, verb):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    options = arguments(tmp_path)[: 4 if verb == "alternates" else None]
    for device, told in (("cuda:9", "device 'cuda:9' is not here"), ("tpu", "expected a device among")):
        assert main([*VERBS[verb], *options, "--device", device]) == 2
        assert told in error_of(capsys)


class _Stop(Exception):
    """Ends a verb where the test has seen enough."""


@pytest.mark.parametrize("verb", ["stats", "mask", "dry run"])
def test_batches_go_to_the_models_device(folder, tmp_path, monkeypatch, verb):
    """The meta device stands for a GPU here."""
    load = loading.load_model
    monkeypatch.setattr(loading, "load_model", lambda *given: (load(*given)[0].to("meta"), load(*given)[1]))

    def seen(*given, **_):
        batches = [batch for value in given if isinstance(value, list | Lazy) for batch in value]
        assert batches and {value.device.type for batch in batches for value in batch.values()} == {"meta"}
        raise _Stop

    monkeypatch.setattr(trace, "routing_frequencies", seen)
    monkeypatch.setattr(wagle, "mask_of", seen)
    monkeypatch.setattr(runs.UnlearnStep, "plan", lambda step, *given, **_: seen(*given))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(_Stop):
        main([*VERBS[verb], *arguments(folder)])


def test_a_micro_batch_is_on_the_models_device(folder):
    model, tokenizer = loading.load_model(folder / "model")
    sets = [encode(load(folder / f"{side}.jsonl"), tokenizer, 48) for side in ("forget", "retain")]
    made = Run(model.to("meta"), tokenizer, Recipe.load("npo"), *sets).micro_batch(0)
    assert {value.device.type for batch in made.values() for value in batch.values()} == {"meta"}


@pytest.mark.quick
def test_the_trainer_leaves_the_model_on_its_gpu(tmp_path):
    """transformers' own arguments say the first GPU, and that every GPU there is gets a copy."""
    made = runs._Arguments(output_dir=str(tmp_path), model_device="cuda:1", use_cpu=True, report_to="none")
    assert made.device == torch.device("cuda:1")
    made._n_gpu = 4
    assert made.n_gpu == 1
    plain = runs._Arguments(output_dir=str(tmp_path), use_cpu=True, report_to="none")
    assert plain.device == torch.device("cpu") and plain.n_gpu == 0


def test_the_dtype_is_that_of_the_whole_run(folder, tmp_path):
    dtypes = ["--dtype", "bfloat16", "--out", str(tmp_path / "out")]
    assert main(["run", "npo", *arguments(folder), *dtypes, *QUICK]) == 0
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "model", dtype="auto")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == 0o700  # it holds what is forgotten
    loaded = json.loads((tmp_path / "out" / "loaded.json").read_text(encoding="utf-8"))
    name = str(folder / "model")
    assert loaded == {"model": name, "dtype": "bfloat16", "device": "cpu", "trust_remote_code": False}
    report = (tmp_path / "out" / "report.md").read_text(encoding="utf-8")
    assert f"{name}, bfloat16 on cpu " in report
    assert main(["report", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / "report.md").read_text(encoding="utf-8") == report


def test_trusted_code_is_named_in_the_plan_and_in_the_report(folder, tmp_path, capsys):
    shutil.copytree(folder / "model", tmp_path / "model")
    add_own_code(tmp_path / "model", tmp_path / "trace")
    given = ["run", "npo", *arguments(folder, model=tmp_path / "model"), "--out", str(tmp_path / "out"), *QUICK]
    capsys.readouterr()
    assert main([*given, "--dry-run"]) == 2
    assert "It is run with --trust-remote-code alone" in error_of(capsys) and not (tmp_path / "trace").exists()
    assert main([*given, "--dry-run", "--trust-remote-code"]) == 0
    assert "note: code that comes with the model was run (--trust-remote-code)" in capsys.readouterr().out
    assert main([*given, "--trust-remote-code"]) == 0
    report = (tmp_path / "out" / "report.md").read_text(encoding="utf-8")
    assert "**its own code was run** (`--trust-remote-code`)" in report


@pytest.mark.quick
def test_a_model_on_several_devices_is_for_eval(folder, tmp_path, monkeypatch, capsys):
    model, tokenizer = loading.load_model(folder / "model")
    model.lm_head.to("meta")
    monkeypatch.setattr(loading, "load_model", lambda *_: (model, tokenizer))
    assert main(["mask", *arguments(folder), "--out", str(tmp_path / "mask"), "--device", "auto-map"]) == 2
    assert "expected a model on one device; got one on cpu, meta" in error_of(capsys)


@pytest.mark.quick
@pytest.mark.parametrize("verb", ["stats", "mask"])
def test_tokens_that_a_model_has_not_are_named(folder, tmp_path, capsys, verb):
    shutil.copytree(folder / "model", tmp_path / "model")
    tokenizer = loading.load_tokenizer(folder / "model")
    tokenizer.add_tokens(["agent"])
    tokenizer.save_pretrained(tmp_path / "model")
    given = [*arguments(folder, model=tmp_path / "model"), "--max-length", "48"]
    assert main([*VERBS[verb][:1], *given, *(["--out", str(tmp_path / "mask")] if verb == "mask" else [])]) == 2
    told = rf"the forget batch: input_ids must be tokens of the model's vocabulary, in \[0, {len(tokenizer) - 1}\)"
    assert re.search(told, error_of(capsys)) and not (tmp_path / "mask").exists()


@pytest.fixture
def alone(monkeypatch):
    """Return the names of the models that were loaded, each when no other one was in memory."""
    load, seen, names = loading.load_model, [], []

    def watched(source, *given, **more):
        gc.collect()
        alive = [name for name, model in seen if model() is not None]
        assert not alive, f"{source} is loaded beside {alive}"
        model, tokenizer = load(source, *given, **more)
        names.append(str(source).rpartition("/")[2])
        seen.append((names[-1], weakref.ref(model)))
        return model, tokenizer

    for module in (loading, importlib.import_module("moe_unlearn.cli.run").loading, evaluate.loading, runs.loading):
        monkeypatch.setattr(module, "load_model", watched)
    return names


def test_eval_holds_one_model_at_a_time(folder, tmp_path, alone):
    for name in ("before", "retrained"):
        shutil.copytree(folder / "model", tmp_path / name)
    more = ["--holdout", str(folder / "holdout.jsonl"), "--reference", str(tmp_path / "retrained")]
    more += ["--before", str(tmp_path / "before"), "--relearn", "2", "--max-length", "48"]
    assert main(["eval", *arguments(folder), *more, "--out", str(tmp_path / "found.json")]) == 0
    assert alone == ["retrained", "model", "before"]
    found = json.loads((tmp_path / "found.json").read_text(encoding="utf-8"))
    assert found["privleak"] == 0 and found["routing_kl"] == 0 and found["relearn_half"] is not None


def test_run_measures_the_retrained_model_before_it_loads_its_own(folder, tmp_path, alone):
    shutil.copytree(folder / "model", tmp_path / "retrained")
    more = ["--reference", str(tmp_path / "retrained"), "--holdout", str(folder / "holdout.jsonl")]
    assert main(["run", "npo", *arguments(folder), *more, "--out", str(tmp_path / "out"), *QUICK]) == 0
    assert alone == ["retrained", "model"]
    summary = json.loads((tmp_path / "out" / "summary.json").read_text(encoding="utf-8"))
    assert summary["retrain"].keys() == summary["target"].keys() - {"privleak"}
    same = {key: summary["target"][key] for key in summary["retrain"]}
    assert same == pytest.approx(summary["retrain"], rel=1e-5)  # the step computes the experts otherwise


def test_a_run_trains_an_adapter_and_saves_it(folder, tmp_path):
    base, _ = loading.load_model(folder / "model")
    peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(tmp_path / "adapter")
    out = tmp_path / "out"
    given = arguments(folder, model=tmp_path / "adapter")
    assert main(["run", "npo", *given, "--out", str(out), *QUICK, "optimizer.lr=1e-2"]) == 0
    assert not (out / "model" / "model.safetensors").exists()
    before, after = (load_file(path / "adapter_model.safetensors") for path in (tmp_path / "adapter", out / "model"))
    assert before.keys() == after.keys() and not all(torch.equal(before[name], after[name]) for name in before)
    assert main(["eval", *arguments(folder, model=out / "model"), "--max-length", "48"]) == 0
    assert main(["run", "npo", *given, "--out", str(out), *QUICK, "optimizer.lr=1e-2", "steps=3", "--resume"]) == 0
    # a run of a whole model in the same folder leaves nothing of the adapter, neither there nor in its checkpoints
    assert main(["run", "npo", *arguments(folder), "--out", str(out), "--no-eval", "--overwrite", *QUICK]) == 0
    for path in (out / "model", out / "checkpoints" / "checkpoint-2"):
        assert (path / "config.json").is_file() and not list(path.glob("adapter_*"))


@pytest.mark.quick
@pytest.mark.parametrize("option", ["--model", "--reference"])
def test_a_run_does_not_overwrite_a_model_that_it_reads(folder, tmp_path, capsys, option):
    shutil.copytree(folder / "model", tmp_path / "model")
    before = (tmp_path / "model" / "model.safetensors").read_bytes()
    given = {"--model": folder / "model", option: tmp_path / "model"}
    paths = [str(each) for pair in given.items() for each in pair]
    data = [f"--{side}={folder / side}.jsonl" for side in ("forget", "retain")]
    assert main(["run", "npo", *paths, *data, "--out", str(tmp_path)]) == 2
    assert "expected an output apart from what is read" in error_of(capsys)
    assert (tmp_path / "model" / "model.safetensors").read_bytes() == before


@pytest.mark.quick
def test_a_model_before_that_is_not_there_is_found_before_any_work(folder, capsys, monkeypatch):
    monkeypatch.setattr(loading, "load_model", lambda *given: pytest.fail("a model was loaded"))
    assert main(["eval", *arguments(folder), "--before", str(folder / "none")]) == 2
    assert "expected a model folder written by save_pretrained" in error_of(capsys)
