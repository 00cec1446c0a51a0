"""The recipes of the papers' settings: complete, sourced, and planned from a model's config alone."""

import json
import re
import resource
import time
from importlib import resources

import pytest
import torch
from transformers import AutoConfig

from moe_unlearn.cli import main
from moe_unlearn.config import Recipe, files
from moe_unlearn.model import loading
from moe_unlearn.step import UnlearnStep

FOLDER = resources.files("moe_unlearn") / "recipes"
WAGLE = {"tofu-graddiff", "tofu-npo", "tofu-po", "wmdp-graddiff", "wmdp-npo", "whp-po", "detox-po"}
SETTINGS = {
    "trace-wmdp",
    "trace-muse-books",
    "mollm-saferlhf",
    "seuf-wmdp",
    "seuf-rwku",
    "rmu",
    "combined",
    *(f"wagle-{name}" for name in WAGLE),
}
SIZES = {  # billions of parameters, as the models are known
    "olmoe-1b-7b": 6.92,
    "qwen1.5-moe-a2.7b": 14.3,
    "qwen3-30b-a3b": 30.5,
    "deepseek-v2-lite": 15.7,
    "gpt-oss-20b": 20.9,
    "mixtral-8x7b": 46.7,
}


@pytest.fixture
def tiny(tmp_path):
    return write_config(tmp_path / "config.json", 1)


def write_config(path, layers):
    path.write_text(
        json.dumps(
            {
                "model_type": "olmoe",
                "vocab_size": 64,
                "hidden_size": 16,
                "intermediate_size": 8,
                "num_hidden_layers": layers,
                "num_attention_heads": 2,
                "num_key_value_heads": 2,
                "num_experts": 4,
                "num_experts_per_tok": 2,
            }
        ),
        encoding="utf-8",
    )
    return path


@pytest.mark.quick
def test_every_setting_of_the_papers_is_there():
    assert set(files.shipped()) >= SETTINGS
    assert set(files.models()) == set(SIZES)


@pytest.mark.quick
@pytest.mark.parametrize("name", sorted(SETTINGS))
def test_each_number_says_where_it_comes_from(name):
    head, _, body = (FOLDER / f"{name}.yaml").read_text(encoding="utf-8").partition("name:")
    before = ""
    for line in body.splitlines()[1:]:
        stated, _, origin = line.partition("#")
        if re.search(r"\d", stated) and "every number is ours" not in head.lower():
            assert origin or before.lstrip().startswith("#"), line
        before = line
    assert Recipe.load(name).name == name


@pytest.mark.quick
def test_recipes_with_trace_go_on_where_it_finds_no_expert():
    found = [recipe for recipe in map(Recipe.load, files.shipped()) if recipe.trace is not None]
    assert {"trace", "combined", "trace-wmdp", "trace-muse-books"} <= {recipe.name for recipe in found}
    assert all(recipe.trace.allow_empty for recipe in found)


@pytest.mark.parametrize("name", sorted(SETTINGS))
def test_a_dry_run_needs_neither_weights_nor_data(name, tmp_path, capsys):
    layers = 8 if name == "rmu" else 1  # RMU's layer is the seventh
    args = ["run", name, "--model-config", str(write_config(tmp_path / "config.json", layers)), "--dry-run"]
    assert main([*args, "--set", "data.max_length=16", "data.prompt_tokens=0", "batch_size=2"]) == 0
    text = capsys.readouterr().out
    recipe = Recipe.load(name)
    assert f"{recipe.steps} steps" in text and "peak" in text and "not rehearsed" not in text
    if recipe.data.forget_rows:
        assert f"data: {recipe.data.forget_rows:,} forget rows" in text and "epochs" in text
    assert ("two float32 gradients" in text) == (recipe.wagle is not None)
    assert ("chooses the experts that train" in text) == (recipe.scope.kind == "seuf")


@pytest.mark.quick
@pytest.mark.parametrize("name", sorted(SIZES))
def test_shipped_geometries_are_the_models(name):
    model = loading.meta_model(name)
    assert sum(p.numel() for p in model.parameters()) / 1e9 == pytest.approx(SIZES[name], rel=5e-3)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert all(p.is_meta for p in model.parameters())
    known = AutoConfig.for_model(files.geometry(name)["model_type"])
    # a misspelt key would be a new one; head_dim is one that only a file brings
    assert all(hasattr(known, key) for key in files.geometry(name).keys() - {"head_dim"})


def test_rmu_trains_the_routed_experts_of_its_layers_on_every_model():
    for name, steering in (("olmoe-1b-7b", 3000), ("qwen1.5-moe-a2.7b", 3000), ("deepseek-v2-lite", 30000)):
        recipe = Recipe.load("rmu", model=name)
        assert (recipe.forget.steering, recipe.retain.alpha) == (steering, 1200)
        model = loading.meta_model(name)
        UnlearnStep(model, recipe)
        assert [n for n, p in model.named_parameters() if p.requires_grad] == [
            f"model.layers.{i}.mlp.experts.{kind}_proj" for i in (5, 6, 7) for kind in ("gate_up", "down")
        ]


@pytest.mark.quick
def test_a_models_values_come_before_the_overrides():
    recipe = Recipe.load("rmu", ["forget.steering=5"], model="deepseek-v2-lite")
    assert (recipe.forget.steering, recipe.forget.layer, recipe.retain.alpha) == (5, 7, 1200)
    assert Recipe.load("npo", model="olmoe-1b-7b") == Recipe.load("npo")
    with pytest.raises(ValueError, match="no model 'llama' among those shipped: deepseek-v2-lite, gpt-oss"):
        Recipe.load("npo", model="llama")


@pytest.mark.quick
def test_values_for_a_model_are_of_recipes_that_exist():
    for model in files.models():
        for name in files.read_model(model)["recipes"]:
            Recipe.load(name, model=model)


def test_a_30b_model_is_planned_within_a_minute_and_little_memory(capsys):
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    assert main(["run", "rmu", "--model-config", "qwen3-30b-a3b", "--dry-run"]) == 0
    assert time.process_time() - start < 60
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**20  # KiB: 1 GiB of 57 GiB of weights
    text = capsys.readouterr().out
    assert re.search(r"memory \(GiB\) .*\n +weights +56\.87", text) and "fits on 1 x 80 GiB" in text


def test_a_plan_is_json_for_machines(tiny, capsys):
    words = ["run", "npo", "--model-config", str(tiny), "--set", "data.max_length=16"]
    assert main([*words, "--dry-run", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["recipe"] == "npo" and plan["peak"] == sum(plan["memory"].values()) > 0
    with pytest.raises(SystemExit) as ended:
        main([*words, "--json"])
    assert ended.value.code == 2 and "--json: expected --dry-run too" in capsys.readouterr().err


@pytest.mark.quick
def test_without_weights_only_a_dry_run(tiny, tmp_path, capsys):
    assert main(["run", "npo", "--model-config", str(tiny), "--out", str(tmp_path / "out")]) == 2
    assert "gives no weights, only a --dry-run" in capsys.readouterr().err
    assert main(["run", "npo", "--model-config", "olmo", "--dry-run"]) == 2
    assert "no model 'olmo': a folder, a config.json or one of deepseek-v2-lite" in capsys.readouterr().err
    tiny.write_text("{", encoding="utf-8")
    assert main(["run", "npo", "--model-config", str(tiny), "--dry-run"]) == 2
    assert "cannot read a model's config" in capsys.readouterr().err
