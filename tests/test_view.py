"""A step's public face: what its view shows, and the twin that makes the same step."""

import copy
import dataclasses

import pytest
import torch

from moe_unlearn.model.scope import expert_masks
from tests.support.models import tiny_olmoe
from tests.support.steps import VOCAB, prepared, recipe, weights

pytestmark = pytest.mark.quick


@pytest.fixture
def model():
    torch.manual_seed(0)
    return tiny_olmoe(vocab_size=VOCAB).eval()


def test_a_view_shows_what_trains_and_the_step_in_progress(model):
    made = recipe("trace", "scope.kind=experts", "trace.per_layer=1", "guard=loss")
    step, forget, retain = prepared(model, made)
    before = step.view()
    assert (
        {name for name, _ in before.trained}
        == before.masks.keys()
        == expert_masks(model, step.prepared.selected).keys()
    )
    assert (before.losses, before.updated, before.steps) == ([], [], 0)
    losses = step.accumulate(forget[0], retain[0], last=True)
    during = step.view()
    assert during.losses == [losses] and set(during.updated) == before.masks.keys()
    step.update()
    after = step.view()
    assert (after.losses, after.updated, after.steps) == ([], [], 1) and before.steps == 0
    with pytest.raises(dataclasses.FrozenInstanceError):
        after.steps = 2


@pytest.mark.parametrize("name", ["wagle", "combined"])
def test_a_twin_makes_the_same_step_on_the_plain_path(name, model):
    step, forget, retain = prepared(model, recipe(name, "optimizer.name=sgd", "retain_budget=100.0"), fused=False)
    twin = step.twin(copy.deepcopy(step.model))
    before = weights(twin.model)
    assert step(forget[0], retain[0]) == twin(forget[0], retain[0])
    ours, theirs = weights(step.model), weights(twin.model)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert any(not torch.equal(before[name], theirs[name]) for name in before)
    assert not twin.view().fused and twin.view().recipe.retain_budget is None
    twin.rewind(7, 0.5, None)
    assert (twin.view().steps, twin.view().alpha, step.view().steps) == (7, 0.5, 1)
