"""Gradient checkpointing of a run: on, off, or where a step would not fit, and the plan counts what it saves."""

import math
from functools import partial
from unittest import mock

import pytest
import torch

from moe_unlearn.cli import main
from moe_unlearn.config import Recipe
from moe_unlearn.data import encode, load
from moe_unlearn.model.loading import Loading, load_model
from moe_unlearn.plan import Mesh
from moe_unlearn.runs import run as runs
from moe_unlearn.runs.planning import plan_of_config
from moe_unlearn.step.checks import check_recipe
from tests.support.command_line import arguments, saved
from tests.support.forked_ranks import found_on


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    saved(root)
    return root


def run_of(folder, *overrides, how=None):
    model, tokenizer = load_model(folder / "model", how)
    sets = [encode(load(folder / f"{side}.jsonl"), tokenizer, 48) for side in ("forget", "retain")]
    return runs.Run(model, tokenizer, Recipe.load("npo", overrides), dict(zip(runs.SIDES, sets, strict=True)))


def is_on(model):
    return any(getattr(module, "gradient_checkpointing", False) for module in model.modules())


@pytest.fixture
def made(folder):
    return partial(run_of, folder)


@pytest.mark.filterwarnings("error::FutureWarning")
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
        assert is_on(run.model) is expected and not run.model.training


def decided(folder, rank):
    """Return whether a rank switches checkpointing on, by mesh and by the bytes that the second rank lacks."""
    found = {}
    for mesh in ("fsdp=2", "fsdp=2,ep=2"):
        sizes = Mesh.parse(mesh)
        run = run_of(folder, "checkpointing=auto", how=Loading(fsdp=sizes.fsdp, ep=sizes.ep))
        peak = plan_of_config(folder / "model", run.recipe, *map(run.batches, runs.SIDES), mesh=mesh, fits=()).peak
        for lacking in (0, 1):
            with mock.patch.object(runs, "room", lambda device, space=peak - lacking * rank: space):
                found[f"{mesh}, {lacking}"] = run.checkpoint_activations(), is_on(run.model)
    return found


@pytest.mark.slow
def test_ranks_that_share_weights_out_decide_alike_by_the_one_that_lacks_room(folder, tmp_path):
    expected = {f"{mesh}, {lacking}": [lacking > 0] * 2 for mesh in ("fsdp=2", "fsdp=2,ep=2") for lacking in (0, 1)}
    assert found_on(2, tmp_path / "ranks", partial(decided, folder)) == [expected] * 2


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
