"""Plans of published models from their configs, against arithmetic by hand; and what a plan says would make it fit."""

import shlex

import pytest
import torch
from torch import nn

from moe_unlearn.config import Recipe
from moe_unlearn.model.loading import meta_model
from moe_unlearn.plan.knobs import Search
from moe_unlearn.plan.known import at_least
from moe_unlearn.plan.mesh import Mesh
from moe_unlearn.runs.planning import plan_of_config
from moe_unlearn.step import UnlearnStep
from tests.support.models import TINY_MODELS

# embedding and head, last norm; of a layer: attention, norms, router, experts
WEIGHTS = {
    "olmoe-1b-7b": 2 * 50304 * 2048 + 2048
    + 16 * (4 * 2048 * 2048 + 4 * 2048 + 64 * 2048 + 64 * 3 * 1024 * 2048),
    "mixtral-8x7b": 2 * 32000 * 4096 + 4096
    + 32 * ((2 * 4096 + 2 * 1024) * 4096 + 2 * 4096 + 8 * 4096 + 8 * 3 * 14336 * 4096),
}  # fmt: skip
EXPERTS = {"olmoe-1b-7b": 16 * 64 * 3 * 1024 * 2048, "mixtral-8x7b": 32 * 8 * 3 * 14336 * 4096}


@pytest.mark.parametrize("name", WEIGHTS)
def test_a_plan_has_the_bytes_of_the_published_model(name):
    recipe = Recipe.load("graddiff", ["batch_size=1", "accumulate=2", "data.max_length=16", "guard=strict"])
    plan = plan_of_config(name, recipe, advise=False)
    count = WEIGHTS[name]
    assert plan.memory["weights"] == pytest.approx(2 * count, rel=1e-6)  # bfloat16; rotary frequencies beside them
    assert plan.memory["optimizer state"] == pytest.approx(8 * count, rel=1e-6)  # two moments in float32, and steps
    assert plan.memory["gradients"] == 2 * count  # of two micro-batches, in the dtype of the weights
    assert plan.peak == pytest.approx(12 * count, rel=0.01)  # two rows of 16 tokens take little


@pytest.mark.quick
@pytest.mark.parametrize("name", WEIGHTS)
@pytest.mark.parametrize(
    ("overrides", "mesh", "expected"),
    [
        ([], None, lambda count, experts: (2 + 8) * count),
        (["optimizer.state=bfloat16"], None, lambda count, experts: (2 + 4) * count),
        # a byte for each moment and a float32 for each block of 64
        (["optimizer.state=int8"], None, lambda count, experts: (2 + 2 + 2 * 4 / 64) * count),
        (
            ["scope.parameters=['experts']", "scope.kind=parameters"],
            None,
            lambda count, experts: 2 * count + 8 * experts,
        ),
        ([], "fsdp=4", lambda count, experts: (2 + 8) * count / 4),
        # nothing is chosen yet, so that only the weights are known to be there
        (["scope.kind=seuf"], None, lambda count, experts: 2 * count),
    ],
)
def test_what_a_step_ends_with_is_known_without_a_rehearsal(name, overrides, mesh, expected):
    step = UnlearnStep(meta_model(name), Recipe.load("graddiff", overrides))
    found = at_least(step.view(), step.prepared, None if mesh is None else Mesh.parse(mesh))
    assert found == pytest.approx(expected(WEIGHTS[name], EXPERTS[name]), rel=1e-3)


def test_what_a_plan_says_makes_a_run_fit_is_planned_to_fit(tmp_path):
    TINY_MODELS["olmoe"](vocab_size=256, hidden_size=64, num_hidden_layers=6).config.save_pretrained(tmp_path)
    recipe = Recipe.load("graddiff", ["batch_size=1", "data.max_length=8"])
    peak = plan_of_config(tmp_path, recipe, advise=False).peak / 2**30
    size = 0.5 * peak
    said = [shlex.split(line) for line in plan_of_config(tmp_path, recipe, fits=[size]).remedies[size]]
    assert len(said) == 2 and "--set" in said[0] and "--mesh" in said[1], said
    for words in said:
        overrides = words[words.index("--set") + 1 :] if "--set" in words else []
        mesh = words[words.index("--mesh") + 1] if "--mesh" in words else None
        changed = Recipe.load("graddiff", ["batch_size=1", "data.max_length=8", *overrides])
        assert plan_of_config(tmp_path, changed, mesh=mesh, fits=[size], advise=False).fits_on(size), words


def test_a_plan_of_a_step_names_what_a_plan_of_its_config_does(tmp_path, monkeypatch):
    model = TINY_MODELS["olmoe"](vocab_size=64, hidden_size=16).eval()
    model.config.save_pretrained(tmp_path)
    recipe = Recipe.load("graddiff", ["batch_size=1", "data.max_length=128"])
    step = UnlearnStep(model, recipe)
    plan = step.plan(stored=True, fits=1e-6, advise=False)
    assert plan.remedies == {}
    size = 0.99 * plan.peak / 2**30
    made = step.plan(fits=[size, 2 * size], stored=True)
    assert made.remedies == {size: ["it fits with --set checkpointing=on"]} and made.remedies[size][0] in str(made)
    assert plan_of_config(tmp_path, recipe, fits=[size]).remedies == made.remedies
    # what the model does counts, whatever its recipe asks for
    monkeypatch.setattr(Search, "remedies", lambda search, plan, size: [search.recipe.checkpointing])
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    assert step.plan(fits=1e-6).remedies == {1e-6: ["on"]}


@pytest.mark.quick
def test_what_would_make_it_fit_is_not_known_of_weights_that_no_config_makes():
    model = TINY_MODELS["olmoe"](vocab_size=64, hidden_size=16)
    model.model.layers[0].mlp.gate.register_parameter("extra", nn.Parameter(torch.zeros(4)))
    plan = UnlearnStep(model, Recipe.load("graddiff", ["batch_size=1", "data.max_length=8"])).plan(fits=1e-6)
    assert plan.remedies == {} and not plan.fits_on(1e-6)
    expected = "what would make it fit is not known: model.layers.0.mlp.gate.extra is not the weight"
    assert [note for note in plan.notes if expected in note], plan.notes
