"""The masks of a step: made once, from what is prepared, and again where others are in use."""

import pytest
import torch

from moe_unlearn.model import scope
from tests.support.models import tiny_olmoe
from tests.support.steps import VOCAB, prepared, recipe


@pytest.fixture
def model():
    torch.manual_seed(0)
    return tiny_olmoe(vocab_size=VOCAB).eval()


@pytest.mark.quick
def test_masks_are_made_once_and_again_where_they_are_not_the_ones_in_use(model, monkeypatch):
    made, real = [], scope.weight_masks
    monkeypatch.setattr(scope, "weight_masks", lambda *given: made.append(None) or real(*given))
    step, forget, retain = prepared(model, recipe("combined"))
    assert len(made) == 1
    step.load_state_dict(step.state_dict())
    step.prepare(forget, retain)
    assert len(made) == 2
    own = [mask for mask in step.optimizer.param_groups[0]["masks"] if mask is not None]
    assert len(own) > 2 and all(any(mask is one for one in step.weights.masks.values()) for mask in own)
    step.optimizer.set_masks([None] * len(step.optimizer.param_groups[0]["params"]))
    step.prepare(forget, retain)
    assert len(made) == 3 and any(mask is not None for mask in step.optimizer.param_groups[0]["masks"])
