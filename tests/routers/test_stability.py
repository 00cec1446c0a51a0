"""Stability of routes: the share of retain tokens that keep their experts, measured in steps, and what follows."""

import copy

import pytest
import torch

from moe_unlearn.config import Recipe
from moe_unlearn.routers import routes, stability
from moe_unlearn.step import UnlearnStep
from tests.support.models import tiny_olmoe
from tests.support.steps import VOCAB, prepared, recipe

EVERY = "router={mode: invariant, stability_every: 2, refresh_below: 1.0}"


@pytest.fixture
def model():
    torch.manual_seed(0)
    return tiny_olmoe(vocab_size=VOCAB).eval()


def test_a_token_is_stable_in_a_layer_if_its_set_of_experts_is_the_same():
    before = torch.tensor([[[0, 1], [1, 2]], [[0, 3], [2, 3]]], dtype=torch.int16)
    now = before.clone()
    now[0, 1, 1] = 3
    assert stability(before, now) == 0.75 and stability(before, before) == 1


@pytest.mark.parametrize("how", ["free", "frozen"])
def test_it_is_measured_every_n_steps_whatever_the_routers_do(how, model):
    step, forget, retain = prepared(model, recipe("graddiff", f"router={{mode: {how}, stability_every: 2}}", lr=1e-2))
    before = routes(model, retain)
    logged = [step(*pair).get("routing_stability") for pair in zip(forget, retain, strict=True)]
    assert [value is not None for value in logged] == [False, True, False]
    step(forget[0], retain[0])
    assert 0 < logged[1] < 1 and stability(before, step.prepared.routes) == 1


def test_what_is_kept_is_found_anew_from_where_routers_are_when_stability_falls_and_a_resume_has_it(model):
    made = recipe("graddiff", EVERY, lr=1e-2)
    step, forget, retain = prepared(model.bfloat16(), made)
    name, first = next(iter(step.prepared.routers.items()))
    step(forget[0], retain[0])
    assert step.prepared.routers[name] is first
    assert step(forget[1], retain[1])["routing_stability"] < 1
    anew = step.prepared.routers[name]
    p = dict(model.named_parameters())[name]
    assert torch.equal(anew.weight, step.optimizer.state[p]["master"]) and not torch.equal(anew.basis, first.basis)
    weights, state = copy.deepcopy(model.state_dict()), copy.deepcopy(step.state_dict())
    for pair in [(forget[0], retain[0])] * 2:
        step(*pair)
    other = copy.deepcopy(model)
    other.load_state_dict(weights)
    resumed = UnlearnStep(other, made)
    resumed.load_state_dict(state)
    resumed.prepare(forget, retain)
    for pair in [(forget[0], retain[0])] * 2:
        resumed(*pair)
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in other.state_dict().items())
    unknown = UnlearnStep(copy.deepcopy(model), made)
    unknown.load_state_dict(state)
    unknown(forget[0], retain[0])
    with pytest.warns(UserWarning, match=r"not measured: call prepare\(\) with the same rows"):
        assert "routing_stability" not in unknown(forget[0], retain[0])


@pytest.mark.quick
def test_a_refresh_needs_invariant_routers_and_measurements():
    for settings in ({"refresh_below": 0.9}, {"mode": "frozen", "stability_every": 1, "refresh_below": 0.9}):
        with pytest.raises(ValueError, match="needs router.mode invariant and router.stability_every above 0"):
            Recipe.from_dict({"router": settings})
