"""Adapters from recipe and command line: what they are, what trains, what is saved, merged, planned and refused."""

import json

import peft
import pytest
import torch
from safetensors.torch import load_file

from moe_unlearn import UnlearnStep
from moe_unlearn.cli import main
from moe_unlearn.config import Adapter, Recipe
from moe_unlearn.model import loading
from moe_unlearn.model.adapters import adapted, merged
from moe_unlearn.runs.planning import plan_of_config
from tests.support.command_line import arguments, saved
from tests.support.models import tiny_olmoe

QUICK = ["--no-eval", "--set", "steps=2", "batch_size=4", "data.max_length=48", "optimizer.lr=1e-2"]
EXPERTS = {"mlp.experts.down_proj", "mlp.experts.gate_up_proj"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("adapters")
    saved(root)
    return root


def recipe(*overrides, name="npo"):
    return Recipe.load(name, ["adapter=true", *overrides])


def lora(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if "lora_" in name}


def error_of(capsys):
    error = capsys.readouterr().err
    lines = [line for line in error.strip().splitlines() if "data.retain_eval" not in line]
    assert "Traceback" not in error and len(lines) == 1
    return error


@pytest.mark.quick
@pytest.mark.filterwarnings("error::FutureWarning")
@pytest.mark.parametrize("targets", ["attention", "experts", "all"])
def test_the_adapter_is_pefts_on_the_layers_asked_for(targets):
    model = adapted(tiny_olmoe(), recipe("adapter.r=2", "adapter.alpha=6", f"adapter.targets={targets}"))
    config = model.peft_config["default"]
    assert (config.r, config.lora_alpha, config.lora_dropout) == (2, 6, 0.0)
    attention = {f"self_attn.{x}_proj" for x in "qkvo"}
    assert config.target_modules == (attention if targets != "experts" else set())
    assert set(config.target_parameters or ()) == (EXPERTS if targets != "attention" else set())
    assert {name for name, p in model.named_parameters() if p.requires_grad} == lora(model).keys()
    wrapped = {name.partition(".lora_")[0].replace(".base_layer", "") for name in lora(model)}
    ends = {".".join(name.rsplit(".", 2)[-2:]) for name in wrapped}
    assert ends == {"attention": attention, "experts": {"mlp.experts"}, "all": {*attention, "mlp.experts"}}[targets]


@pytest.mark.quick
def test_the_recipes_seed_draws_the_adapter():
    first, again, other = (lora(adapted(tiny_olmoe(), recipe(f"seed={seed}"))) for seed in (1, 1, 2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert all(torch.equal(first[name], other[name]) == ("lora_B" in name) for name in first)


@pytest.mark.quick
def test_drawing_an_adapter_leaves_torchs_generator():
    model = tiny_olmoe()
    state = torch.get_rng_state()
    adapted(model, recipe())
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.quick
@pytest.mark.parametrize("targets", ["attention", "experts", "all"])
def test_a_merged_model_computes_what_the_adapter_did(targets):
    model = adapted(tiny_olmoe().double().eval(), recipe(f"adapter.targets={targets}"))
    for p in lora(model):
        torch.nn.init.normal_(model.get_parameter(p), std=0.1)
    ids = torch.arange(3, 19)[None]
    with torch.no_grad():
        before = model(ids).logits
        whole = merged(model)
        assert not lora(whole) and not isinstance(whole, peft.PeftModel)
        torch.testing.assert_close(whole(ids).logits, before, rtol=1e-9, atol=1e-12)


@pytest.mark.quick
def test_what_cannot_be_is_refused():
    model = tiny_olmoe()
    with pytest.raises(ValueError, match=r"the recipe trains adapters, and the model has none: expected .*adapted\("):
        UnlearnStep(model, recipe())
    with pytest.raises(ValueError, match="needs a model without one: .* adapter=null"):
        adapted(adapted(model, recipe()), recipe())
    with pytest.raises(ValueError, match="has no linear layers inside a module that is named attn"):
        adapted(torch.nn.Linear(2, 2), recipe())
    with pytest.raises(ValueError, match="has no routed experts to adapt"):
        adapted(torch.nn.Linear(2, 2), recipe("adapter.targets=experts"))
    for override, message in {
        "adapter.r=0": "adapter.r must be above 0; got 0",
        "adapter.alpha=0": "adapter.alpha must be above 0; got 0",
        "adapter.targets=router": "adapter.targets must be one of attention, experts, all; got 'router'",
        "adapter.dropout=1": "adapter.dropout must be at most 0.9; got 1",
        "adapter.rank=4": "unknown recipe key 'adapter.rank'; did you mean",
        "scope.kind=seuf": "adapter trains adapters alone, and scope.kind 'seuf' weights under them",
    }.items():
        with pytest.raises(ValueError, match=message):
            recipe(override)
    with pytest.raises(ValueError, match="adapter.dropout is for adapter.targets 'attention'; got 0.1 with 'all'"):
        recipe("adapter.dropout=0.1", "adapter.targets=all")


@pytest.mark.slow
@pytest.mark.parametrize("targets", ["experts", pytest.param("attention", marks=pytest.mark.nightly)])
def test_a_run_saves_an_adapter_that_every_library_loads_and_resumes(folder, tmp_path, targets):
    out, given = tmp_path / "out", [*arguments(folder), "--adapter", f"r=2,alpha=4,targets={targets}"]
    assert main(["run", "npo", *given, "--out", str(out), *QUICK]) == 0
    assert not (out / "model" / "model.safetensors").exists()
    settings = json.loads((out / "model" / "adapter_config.json").read_text(encoding="utf-8"))
    assert (settings["r"], settings["lora_alpha"]) == (2, 4)
    weights = load_file(out / "model" / "adapter_model.safetensors")
    assert all("lora_" in name for name in weights)
    assert all(value.any() for name, value in weights.items() if "lora_B" in name)  # which begins as zero
    model, _ = loading.load_model(out / "model")
    loaded = {name.replace(".default", ""): p for name, p in lora(model).items()}
    assert loaded.keys() == weights.keys() and all(torch.equal(loaded[name], weights[name]) for name in loaded)
    # the same run in two parts ends with the same bits
    parts = tmp_path / "parts"
    assert main(["run", "npo", *given, "--out", str(parts), *QUICK, "steps=1"]) == 0
    assert main(["run", "npo", *given, "--out", str(parts), *QUICK, "--resume"]) == 0
    again = load_file(parts / "model" / "adapter_model.safetensors")
    assert all(torch.equal(again[name], weights[name]) for name in weights)


@pytest.mark.slow
def test_a_run_merges_on_request(folder, tmp_path):
    given = [*arguments(folder), "--adapter", "r=2,targets=all", *QUICK]
    assert main(["run", "npo", *given, "--out", str(tmp_path / "adapter")]) == 0
    assert main(["run", "npo", *given, "--merge", "--delta", "--out", str(tmp_path / "merged")]) == 0
    assert not list((tmp_path / "merged" / "model").glob("adapter_*"))
    assert (tmp_path / "merged" / "delta.safetensors").exists()
    whole, _ = loading.load_model(tmp_path / "merged" / "model")
    model, _ = loading.load_model(tmp_path / "adapter" / "model")
    expected = dict(merged(model).named_parameters())
    assert not lora(whole)
    for name, p in whole.named_parameters():
        torch.testing.assert_close(p, expected[name], rtol=1e-6, atol=1e-7)


@pytest.mark.quick
@pytest.mark.parametrize(
    "options,message",
    [
        (["--merge"], "there is none: give --adapter r=8 too"),
        (["--adapter", "r"], "--adapter: expected KEY=VALUE,..., such as r=8,targets=attention; got 'r'"),
        (["--adapter", "r=2,depth=3"], "unknown recipe key 'adapter.depth'"),
        (["--adapter", "r=2", "--delta"], "give --merge too"),
        (["--adapter", "r=2", "--dry-run", "--mesh", "fsdp=2"], "leave --mesh out, or adapter=null"),
    ],
)
def test_options_that_do_not_fit_are_one_line(folder, tmp_path, capsys, options, message):
    assert main(["run", "npo", *arguments(folder), "--out", str(tmp_path / "out"), *options]) == 2
    assert message in error_of(capsys)
    assert not (tmp_path / "out").exists()


@pytest.mark.quick
def test_an_adapter_on_an_adapters_folder_is_refused(folder, tmp_path, capsys):
    base, _ = loading.load_model(folder / "model")
    adapted(base, Recipe.from_dict({"adapter": {"r": 2}})).save_pretrained(tmp_path / "adapter")
    given = [*arguments(folder, model=tmp_path / "adapter"), "--adapter", "r=2", "--out", str(tmp_path / "out")]
    assert main(["run", "npo", *given, *QUICK]) == 2
    assert "the recipe's adapter needs a model without one" in error_of(capsys)


@pytest.mark.quick
def test_without_peft_the_run_ends_before_it_reads(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("moe_unlearn.model.adapters.find_spec", lambda name: None)
    given = arguments(tmp_path / "nowhere", "--adapter", "r=2", "--out", str(tmp_path / "out"))
    assert main(["run", "npo", *given]) == 2
    assert "the recipe's adapter needs the library 'peft', which is missing: pip install peft" in error_of(capsys)


@pytest.mark.quick
def test_a_plan_without_weights_counts_the_adapter():
    config = tiny_olmoe().config
    whole, small = (
        plan_of_config(config, Recipe.load("npo", ["steps=1", *more]), advise=False) for more in ([], ["adapter.r=2"])
    )
    trained = sum(p.numel() for p in lora(adapted(tiny_olmoe(), recipe("adapter.r=2"))).values())
    assert small.trained == trained and whole.trained == whole.weights
    counters = small.memory["optimizer state"] - 8 * small.trained  # beside two moments in float32
    assert 0 <= counters < 100 and small.memory["optimizer state"] < whole.memory["optimizer state"]


def test_defaults_are_those_of_the_section():
    assert recipe().adapter == Adapter()
