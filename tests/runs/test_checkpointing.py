"""Gradient checkpointing of a run: on, off, or where a step would not fit, and the plan counts what it saves."""

import math

import pytest
import torch

from moe_unlearn.cli import main
from moe_unlearn.config import Recipe
from moe_unlearn.data import encode, load
from moe_unlearn.model.loading import load_model
from moe_unlearn.runs import run as runs
from moe_unlearn.step.checks import check_recipe
from tests.support.command_line import arguments, saved


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    saved(root)
    return root


@pytest.fixture
def made(folder):
    def make(*overrides):
        model, tokenizer = load_model(folder / "model")
        sets = [encode(load(folder / f"{side}.jsonl"), tokenizer, 48) for side in ("forget", "retain")]
        return runs.Run(model, tokenizer, Recipe.load("npo", overrides), *sets)

    return make


def test_auto_is_on_where_a_step_does_not_fit(made, monkeypatch):
    assert runs.room(torch.device("cpu")) == math.inf
    for checkpointing, space, expected in (
        ("auto", None, False),
        ("auto", 2.0**40, False),
        ("auto", 2.0**10, True),
        ("off", 2.0**10, False),
        ("on", None, True),
    ):
        run = made(f"checkpointing={checkpointing}")
        with monkeypatch.context() as patch:
            if space is not None:
                patch.setattr(runs, "room", lambda device, space=space: space)
            assert run.checkpoint_activations() is expected
        assert run.model.is_gradient_checkpointing is expected and not run.model.training


def test_the_plan_counts_what_checkpointing_saves(made):
    off, on = (made(f"checkpointing={value}").plan() for value in ("off", "on"))
    assert on.largest["activations"] < 0.8 * off.largest["activations"]
    assert sum(on.flops.values()) > 1.1 * sum(off.flops.values())
    assert [note for note in on.notes if "checkpointing is on" in note] and on.memory["weights"] == off.memory[
        "weights"
    ]


@pytest.mark.parametrize("recipe", ["npo", "seuf", "combined"])
def test_a_run_with_checkpointing_has_the_weights_of_one_without(folder, tmp_path, monkeypatch, recipe):
    again = []
    make = runs.Run.trainer

    def trainer(run, *given, **more):
        layer = run.model.model.layers[1].mlp
        layer.register_forward_pre_hook(lambda *_: again.append(torch._C._current_graph_task_id() != -1))
        return make(run, *given, **more)

    monkeypatch.setattr(runs.Run, "trainer", trainer)
    more = ["--set", "steps=2", "batch_size=4", "data.max_length=48", "trace.min_ratio=1.001", "--no-eval"]
    more = [word for word in more if recipe == "combined" or not word.startswith("trace")]
    found = {}
    for value in ("off", "on"):
        again.clear()
        out = tmp_path / value
        assert (
            main(["run", recipe, *arguments(folder), "--out", str(out), *more, "--set", f"checkpointing={value}"]) == 0
        )
        assert any(again) is (value == "on")
        found[value] = load_model(out / "model")[0].state_dict()
    assert all(torch.equal(weight, found["on"][name]) for name, weight in found["off"].items())


@pytest.mark.quick
def test_a_state_from_before_there_was_checkpointing_is_taken():
    recipe = Recipe.load("npo", ["checkpointing=on"])
    earlier = {key: value for key, value in recipe.to_dict().items() if key != "checkpointing"}
    check_recipe(recipe, earlier)
    with pytest.raises(ValueError, match="checkpointing must be|checkpointing"):
        Recipe.load("npo", ["checkpointing=maybe"])
