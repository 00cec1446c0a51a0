"""The gradient store: the optimizer takes a step's gradients from it, whoever steps the optimizer."""

import copy

import pytest
import torch

from moe_unlearn.optim import MaskedSGD
from moe_unlearn.step.gradients import GradientStore
from tests.support.models import tiny_olmoe
from tests.support.steps import VOCAB, changed, prepared, recipe, weights

pytestmark = pytest.mark.quick
FORMS = {"factors": (), "compact": ("optimizer.max_grad_norm=1e9",)}


@pytest.fixture
def model():
    torch.manual_seed(0)
    return tiny_olmoe(vocab_size=VOCAB).eval()


@pytest.mark.parametrize("inside", [False, True], ids=["before", "in a closure"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.slow(but=2)
def test_whoever_steps_the_optimizer_takes_the_gradients(form, inside, model):
    made, results = recipe("wagle", *FORMS[form]), []
    for own in (True, False):
        step, forget, retain = prepared(copy.deepcopy(model), made)

        def combined(step=step, forget=forget, retain=retain):
            step.accumulate(forget[0], retain[0], last=True)
            return step.combine()["forget_loss"]

        if own:
            step(forget[0], retain[0])
        elif inside:
            assert step.optimizer.step(combined) == step.tally.losses()["forget_loss"]
            step.finish()
        else:
            combined()
            assert step.gradients.collected
            step.optimizer.step()
            step.finish()
        assert not step.gradients.collected
        results.append(weights(step.model))
    assert changed(model, results[0]) and all(torch.equal(results[0][name], results[1][name]) for name in results[0])


@pytest.mark.parametrize("form", FORMS)
def test_zero_grad_drops_what_a_step_has_collected(form, model):
    """Else a loop that skips a bad step trains the experts alone, on gradients without the other weights'."""
    step, forget, retain = prepared(model, recipe("wagle", *FORMS[form]))
    before = weights(model)
    for owner in (step, copy.deepcopy(step)):
        owner.accumulate(forget[0], retain[0], last=True)
        owner.combine()
        assert owner.gradients.collected
        owner.optimizer.zero_grad()
        owner.optimizer.step()
        assert not owner.gradients.collected and not changed(owner.model, before)
        owner.discard()
    step(forget[0], retain[0])
    assert changed(model, before)
    step.close()
    assert not step.optimizer.zero_grad_hooks


def test_the_optimizer_of_a_copied_step_takes_the_gradients_of_the_copy(model):
    step, forget, retain = prepared(model, recipe("graddiff"))
    copied, before = copy.deepcopy(step), weights(model)
    copied.accumulate(forget[0], retain[0], last=True)
    copied.combine()
    copied.optimizer.step()
    copied.finish()
    assert not changed(model, before)
    step(forget[0], retain[0])
    assert changed(model, before) and not changed(model, weights(copied.model))


def test_gradients_of_two_stores_and_of_the_caller_are_all_taken():
    weights = [torch.nn.Parameter(torch.zeros(2, 3)) for _ in range(3)]
    optimizer = MaskedSGD(weights, lr=1.0)
    stores = [GradientStore(optimizer) for _ in range(2)]
    for store, weight in zip(stores, weights, strict=False):
        store.collected[weight] = torch.ones(2, 3)
    optimizer.step(gradients={weights[2]: torch.ones(2, 3)})
    assert all((weight == -1).all() for weight in weights)
    stores[0].close()
    optimizer.step()
    assert [weight.unique().tolist() for weight in weights] == [[-1], [-2], [-1]]


def test_a_closed_step_hands_nothing_over(model):
    step, forget, retain = prepared(model, recipe("graddiff"))
    step(forget[0], retain[0])
    step.close()
    assert not step.optimizer._optimizer_step_pre_hooks
