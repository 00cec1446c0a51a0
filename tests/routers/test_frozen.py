"""Frozen routers: no objective, direction, mask or decay moves them, and everything else trains as before."""

import pytest
import torch

from moe_unlearn.config import Recipe, Router
from moe_unlearn.model.scope import routing_parameters
from moe_unlearn.step import UnlearnStep
from tests.support.models import TINY_MODELS, tiny_olmoe
from tests.support.steps import VOCAB, changed, prepared, recipe, weights

DECAY = "optimizer.weight_decay=0.1"


def build(family="olmoe"):
    torch.manual_seed(0)
    return TINY_MODELS[family](vocab_size=VOCAB).eval()


def after_steps(model, made, count=2):
    step, forget, retain = prepared(model, made)
    before = weights(model)
    for pair in list(zip(forget, retain, strict=True))[:count]:
        step(*pair)
    return changed(model, before)


@pytest.mark.quick
def test_one_word_says_the_mode():
    short = Recipe.from_dict({"router": "frozen"})
    assert short.router == Router(mode="frozen") and Recipe.from_dict(short.to_dict()) == short
    assert Recipe.load("npo", ["router=frozen"]).router == short.router
    assert Recipe.load("npo").router == Router(mode="free")


@pytest.mark.parametrize("name", ["npo", "mollm", "combined", "seuf", "wagle"])
def test_frozen_routers_keep_their_bits_under_every_objective_direction_and_mask(name):
    model = build()
    routers = routing_parameters(model)
    assert after_steps(model, recipe(name, DECAY)) & routers, "the case says nothing: a free router does not move"
    model = build()
    moved = after_steps(model, recipe(name, DECAY, "router=frozen"))
    assert moved and not moved & routers


@pytest.mark.parametrize("family", ["gpt_oss", "deepseek_v3"])
def test_biases_and_routers_of_other_families_are_frozen_too(family):
    model = build(family)
    moved = after_steps(model, recipe("graddiff", DECAY, "router=frozen"), count=1)
    assert moved and not moved & routing_parameters(model)


def test_a_router_that_alone_is_in_the_scope_cannot_be_frozen():
    only = ["scope.kind=parameters", r"scope.parameters=['mlp\.gate']", "router=frozen"]
    with pytest.raises(ValueError, match="'parameters', less the routers by router.mode frozen"):
        UnlearnStep(tiny_olmoe(vocab_size=VOCAB), recipe("npo", *only))


def test_a_plan_says_that_routers_are_frozen():
    step, forget, retain = prepared(build(), recipe("npo", "router=frozen"))
    assert step.plan(forget, retain).levers["router"] == "frozen"
    step, forget, retain = prepared(build(), recipe("npo"))
    assert "router" not in step.plan(forget, retain).levers
