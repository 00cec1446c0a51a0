"""Evaluation mode for a while: every submodule has its own mode back, whoever asked for it."""

import pytest
import torch

from moe_unlearn.metrics import evaluating
from moe_unlearn.model.capture import collect_routing
from moe_unlearn.model.head import verify_head
from moe_unlearn.model.modes import evaluation_mode
from moe_unlearn.step import UnlearnStep
from moe_unlearn.trace import routing_frequencies
from moe_unlearn.wagle import weight_mask
from tests.support.batches import random_batch
from tests.support.models import tiny_olmoe
from tests.support.steps import VOCAB, data, recipe

pytestmark = pytest.mark.quick


@pytest.fixture
def mixed():
    """A model that trains, with a part that its owner keeps in evaluation mode and a child of that which trains."""
    model = tiny_olmoe(vocab_size=VOCAB).train()
    model.model.layers[0].eval()
    model.model.layers[0].mlp.train()
    return model


def modes(model):
    return [module.training for module in model.modules()]


def whole_preparation(model):
    UnlearnStep(model, recipe("combined", "forget.objective=npo")).prepare(*data())


def seuf_preparation(model):
    UnlearnStep(model, recipe("seuf")).prepare(*data())


USES = {
    "prepare": whole_preparation,
    "prepare seuf": seuf_preparation,
    "routing": lambda model: collect_routing(model, random_batch(VOCAB)),
    "frequencies": lambda model: routing_frequencies(model, data()[0]),
    "mask": lambda model: weight_mask(model, *data(), keep=0.5, gamma=1.0),
    "head": lambda model: verify_head(model, random_batch(VOCAB)),
}


@pytest.mark.parametrize("use", USES)
def test_whatever_evaluates_restores_each_module(mixed, use):
    before, seen = modes(mixed), []
    mixed.model.layers[1].register_forward_pre_hook(lambda *_: seen.append(modes(mixed)))
    USES[use](mixed)
    assert seen and not any(any(flags) for flags in seen), "nothing ran, or not in evaluation mode"
    assert modes(mixed) == before


def test_a_preparation_that_fails_restores_them_too(mixed):
    before = modes(mixed)

    def broken(stage):
        raise ZeroDivisionError(stage)

    with pytest.raises(ZeroDivisionError, match="trace"):
        UnlearnStep(mixed, recipe("combined")).prepare(*data(), on_stage=broken)
    assert modes(mixed) == before


@pytest.mark.parametrize("context", [evaluation_mode, evaluating])
def test_contexts_nest_and_survive_exceptions(mixed, context):
    before = modes(mixed)
    with pytest.raises(ZeroDivisionError), context(mixed):
        with context(mixed):
            assert not any(modes(mixed))
        assert not any(modes(mixed))
        raise ZeroDivisionError
    assert modes(mixed) == before and not torch.is_inference_mode_enabled()
