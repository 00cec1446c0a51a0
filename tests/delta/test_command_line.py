"""`run --delta`, `delta`, `apply` and `revert`: what a user does, on models that transformers saves."""

import hashlib
import json
import os
import shutil

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers.utils import hub

from moe_unlearn import delta
from moe_unlearn.cli import main
from moe_unlearn.model import loading
from tests.delta.folders import bits, files
from tests.support.command_line import arguments, saved
from tests.support.models import TINY_MODELS

SETTINGS = ("steps=1", "batch_size=3", "optimizer.lr=1e-3", "data.max_length=48")


def run(folder, out, *more, model="model"):
    own = arguments(folder, model=model)
    return main(["run", "npo", *own, "--out", str(out), "--no-eval", "--delta", "--set", *SETTINGS, *more])


def error_of(capsys):
    told = capsys.readouterr().err.splitlines()[-1]
    assert told.startswith("moe-unlearn ") and ": error: " in told
    return told


def weights(folder):
    return load_file(folder / "model.safetensors")


def same(one, other):
    return one.keys() == other.keys() and all(bits(one[name]).equal(bits(other[name])) for name in one)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A saved model in bfloat16, and a run of one step on the experts of its last layer, with a delta."""
    root = tmp_path_factory.mktemp("delta")
    saved(root)
    AutoModelForCausalLM.from_pretrained(root / "model", dtype=torch.bfloat16).save_pretrained(root / "model")
    scope = ("scope.kind=parameters", r"scope.parameters=['layers\.1\.mlp\.experts\.down_proj']")
    assert run(root, root / "run", *scope) == 0
    return root


def test_a_run_writes_what_it_changed(folder, tmp_path, capsys):
    path = folder / "run" / "delta.safetensors"
    base, after = weights(folder / "model"), weights(folder / "run" / "model")
    changed = {name for name in base if not bits(base[name]).equal(bits(after[name]))}
    assert changed and all("layers.1.mlp.experts." in name and "down_proj" in name for name in changed)
    made = delta.read(path)
    assert {*made.changed} == changed and path.stat().st_size < (folder / "model/model.safetensors").stat().st_size / 4
    assert made.recipe == hashlib.sha256((folder / "run" / "recipe.yaml").read_bytes()).hexdigest()

    assert main(["apply", str(folder / "model"), str(path), "--out", str(tmp_path / "applied")]) == 0
    assert capsys.readouterr().out == f"model: {tmp_path / 'applied'}, with the digest {made.result}\n"
    assert same(weights(tmp_path / "applied"), after)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "applied", dtype="auto")
    loaded.save_pretrained(tmp_path / "again")
    assert same(weights(tmp_path / "again"), after), "it loads, and with the same bits"
    own, carried = files(folder / "model"), files(tmp_path / "applied")
    assert carried.keys() == own.keys() and [n for n in own if own[n] != carried[n]] == ["model.safetensors"]

    assert main(["revert", str(tmp_path / "applied"), str(path), "--out", str(tmp_path / "back")]) == 0
    assert files(tmp_path / "back") == own


def test_the_verb_writes_what_the_run_wrote(folder, tmp_path, capsys):
    named = ("--recipe", str(folder / "run" / "recipe.yaml"), "--out", str(tmp_path / "d"))
    assert main(["delta", str(folder / "model"), str(folder / "run" / "model"), *named]) == 0
    assert (tmp_path / "d").read_bytes() == (folder / "run" / "delta.safetensors").read_bytes()
    made = delta.read(tmp_path / "d")
    assert capsys.readouterr().out.splitlines() == [
        f"delta: {tmp_path / 'd'}: {len(made.changed)} of {len(made.changes)} tensors changed",
        f"{made.size:,} bytes, {made.size / made.model_size:.1%} of the model's {made.model_size:,}",
        f"base   {made.base}",
        f"result {made.result}",
    ]


def test_bad_input_ends_with_one_line_and_writes_nothing(folder, tmp_path, capsys):
    base, changed, path = folder / "model", folder / "run" / "model", folder / "run" / "delta.safetensors"
    made, out = delta.read(path), str(tmp_path / "out")
    before = files(folder)
    (tmp_path / "file").write_text("x", encoding="utf-8")
    for command, told in (
        (
            ["apply", changed, path, "--out", out],
            f"with the digest {made.base}; got {made.result}, which is its result",
        ),
        (["revert", base, path, "--out", out], f"with the digest {made.result}; got {made.base}, which is its base"),
        (["apply", base, path, "--out", base], "expected an output apart from what is read"),
        (["apply", base, path, "--out", base / "below"], "expected an output apart from what is read"),
        (["apply", base, path, "--out", folder / "run"], "expected an output apart from what is read"),
        (["delta", base, changed, "--out", changed / "d"], "expected an output apart from what is read"),
        (["delta", base, changed, "--out", tmp_path], "expected --out to be a file to write"),
        (["delta", base, changed, "--recipe", out, "--out", out], "No such file or directory"),
        (["delta", base, folder, "--out", out], "it has neither"),
        (["apply", base, base / "config.json", "--out", out], "expected a whole safetensors file"),
        (["apply", base, path, "--out", tmp_path / "file"], "--out cannot be written"),
    ):
        assert main([*map(str, command)]) == 2
        assert told in error_of(capsys)
    assert files(folder) == before and [p.name for p in tmp_path.iterdir()] == ["file"]


def test_what_was_left_out_is_said(folder, tmp_path, capsys):
    base = tmp_path / "base"
    base.mkdir()
    for name, content in files(folder / "model").items():
        (base / name).write_bytes(content)
    (base / "pytorch_model.bin").write_bytes(b"the model, unchanged")
    assert main(["apply", str(base), str(folder / "run/delta.safetensors"), "--out", str(tmp_path / "out")]) == 0
    assert capsys.readouterr().err == "left out, weights in another form: pytorch_model.bin\n"
    assert "pytorch_model.bin" not in os.listdir(tmp_path / "out")


def test_a_model_of_the_hub_is_a_base(folder, tmp_path, capsys, monkeypatch):
    """From the hub's cache, as it lies on the disk after a download."""
    cache, commit = tmp_path / "hub", "a" * 40
    snapshot = cache / "models--org--name" / "snapshots" / commit
    (cache / "models--org--name" / "refs").mkdir(parents=True)
    (cache / "models--org--name" / "refs" / "v1").write_text(commit, encoding="utf-8")
    shutil.copytree(folder / "model", snapshot)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    path, out = str(folder / "run" / "delta.safetensors"), str(tmp_path / "out")
    assert main(["delta", "org/name@v1", str(folder / "run" / "model"), "--out", str(tmp_path / "d")]) == 0
    assert delta.read(tmp_path / "d").result == delta.read(path).result
    assert main(["apply", "org/name@v1", path, "--out", out]) == 0
    assert files(tmp_path / "out").keys() == files(folder / "model").keys()
    shutil.rmtree(snapshot), shutil.copytree(tmp_path / "out", snapshot)
    assert main(["revert", "org/name@v1", path, "--out", out]) == 0
    assert files(tmp_path / "out") == files(folder / "model")
    assert main(["apply", "org/other", path, "--out", out]) == 2
    assert "cannot load a model's files from org/other: " in error_of(capsys)
    shutil.rmtree(snapshot), shutil.copytree(folder / "model", snapshot)
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", True)
    data = [f"--{side}={folder / side}.jsonl" for side in ("forget", "retain")]
    given = ["--model", "org/name@v1", *data, "--out", out, "--no-eval", "--delta", "--set", *SETTINGS]
    assert main(["run", "npo", *given]) == 0
    assert delta.read(tmp_path / "out" / "delta.safetensors").base == delta.read(path).base


@pytest.mark.parametrize("more", [[], ["--dry-run"]])
def test_a_run_that_could_not_have_a_delta_is_refused_before_a_model_is_loaded(
    folder, tmp_path, capsys, monkeypatch, more
):
    monkeypatch.setattr(loading, "load_model", lambda *given: pytest.fail("a model was loaded"))
    both = weights(folder / "model")
    shutil.copytree(folder / "model", tmp_path / "bin")
    (tmp_path / "bin" / "model.safetensors").unlink()
    torch.save(both, tmp_path / "bin" / "pytorch_model.bin")
    (tmp_path / "adapter").mkdir()
    settings = {"base_model_name_or_path": str(folder / "model"), "peft_type": "LORA"}
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(settings), encoding="utf-8")
    known = ["--model-config", "olmoe-1b-7b"]
    for model, given, told in (
        (folder / "model", ["--dtype", "float32"], "of what the run saves to be bfloat16"),
        (tmp_path / "bin", [], "expected model.safetensors or model.safetensors.index.json"),
        (tmp_path / "adapter", [], f"expected a whole model; {tmp_path / 'adapter'} is an adapter"),
        (None, known, "--delta writes what changed since --model, which is missing"),
    ):
        own = [f"--model={model}"] if model else []
        data = [f"--{side}={folder / side}.jsonl" for side in ("forget", "retain")]
        assert main(["run", "npo", *own, *data, "--out", str(tmp_path / "run"), "--delta", *given, *more]) == 2
        assert told in error_of(capsys) and not (tmp_path / "run").exists()


def test_a_run_over_its_own_base_cannot_have_a_delta(folder, tmp_path, capsys):
    saved(tmp_path)
    before = files(tmp_path / "model")
    assert run(tmp_path, tmp_path) == 2
    assert "expected an output apart from what is read" in error_of(capsys)
    assert files(tmp_path / "model") == before


def test_tied_weights_are_one(folder, tmp_path, capsys):
    """A head that a folder has beside the embedding, though both are one, is refused before the run."""
    tokenizer = saved(tmp_path)
    torch.manual_seed(0)
    TINY_MODELS["olmoe"](vocab_size=len(tokenizer), tie_word_embeddings=True).save_pretrained(tmp_path / "model")
    assert run(tmp_path, tmp_path / "run") == 0
    made = delta.apply(tmp_path / "model", tmp_path / "run/delta.safetensors", tmp_path / "applied")
    assert "lm_head.weight" not in weights(tmp_path / "applied") and made.left_out == []
    assert same(weights(tmp_path / "applied"), weights(tmp_path / "run" / "model"))
    assert "model.embed_tokens.weight" in delta.read(tmp_path / "run/delta.safetensors").changed

    both = weights(tmp_path / "model")
    both["lm_head.weight"] = both["model.embed_tokens.weight"].clone()
    save_file(both, tmp_path / "model/model.safetensors", {"format": "pt"})
    capsys.readouterr()
    assert run(tmp_path, tmp_path / "second") == 2
    told = error_of(capsys)
    assert "expected what the run saves to have the tensors of" in told and "it lacks 'lm_head.weight'" in told
    assert not (tmp_path / "second").exists()


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v2", "gpt_oss"])
def test_a_model_that_is_loaded_and_saved_has_its_bits(family, tmp_path):
    """Then a delta from a folder to what a run saves holds what the run changed, whatever the layout."""
    torch.manual_seed(0)
    TINY_MODELS[family]().bfloat16().save_pretrained(tmp_path / "a", max_shard_size="20KB")
    assert len(delta.ModelFolder(tmp_path / "a").files) > 1
    AutoModelForCausalLM.from_pretrained(tmp_path / "a", dtype="auto").save_pretrained(tmp_path / "b")
    made = delta.write(tmp_path / "a", tmp_path / "b", tmp_path / "d")
    assert made.base == made.result and made.size == 0 < made.model_size
