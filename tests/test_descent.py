"""MOLLM's log of descent: the inner product of each objective's gradient with the update that was made."""

import dataclasses

import pytest
import torch

from moe_unlearn.data import ForgetRetainDataset
from moe_unlearn.trainer import UnlearnTrainer
from tests.support.models import tiny_olmoe
from tests.support.steps import VOCAB, prepared, recipe, weights
from tests.support.training import arguments, examples

pytestmark = pytest.mark.quick


@pytest.fixture
def model():
    torch.manual_seed(0)
    return tiny_olmoe(vocab_size=VOCAB).eval()


UPDATES = {
    "plain": ["optimizer.name=sgd"],
    "plain, factors": ["optimizer.name=sgd", "mollm.gradients=factors"],
    "clipped": ["optimizer.name=sgd", "optimizer.max_grad_norm=0.1"],
    "momentum": ["optimizer.name=sgd", "optimizer.momentum=0.9"],
    "decay": ["optimizer.name=sgd", "optimizer.weight_decay=10"],
    "all of it": [
        "optimizer.name=sgd",
        "optimizer.max_grad_norm=0.1",
        "optimizer.momentum=0.9",
        "optimizer.weight_decay=10",
    ],
    "adamw": ["optimizer.name=adamw", "optimizer.weight_decay=0.1"],
    "masked": ["optimizer.name=sgd", "optimizer.momentum=0.9", "wagle.keep=0.5"],
}


@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.slow(but=2)
def test_descent_is_the_inner_product_of_gradient_and_update(update, model):
    """Of each step that logs it, whoever steps the optimizer, and none is logged that was not known."""
    made = recipe("mollm", "mollm.kl_floor=0", "mollm.log_descent_every=2", *UPDATES[update], lr=1e-2)
    if "factors" not in update:
        made = dataclasses.replace(made, mollm=dataclasses.replace(made.mollm, gradients="compact"))
    step, forget, retain = prepared(model.double(), made)
    known = []
    for i in range(4):
        before = weights(step.model)
        pair = forget[i % 3], retain[i % 3]
        gradients = gradients_of(step, *pair)
        step.accumulate(*pair)
        if i % 2:
            metrics = step.update()
        else:
            metrics = step.combine()
            step.clip(made.optimizer.max_grad_norm)
            step.optimizer.step()
            metrics |= step.finish()
        known.append({key for key in metrics if key.startswith("descent_")})
        for name, gradient in gradients.items() if known[-1] else ():
            moved = sum((gradient[n] * (p.detach() - before[n])).sum() for n, p in step.view().trained if n in gradient)
            assert metrics[f"descent_{name}"] == pytest.approx(float(moved), rel=2**-20), (i, name)
    every, free = {"descent_forget", "descent_retain", "descent_kl"}, update.startswith("plain") or update == "clipped"
    assert known == [every, every if free else set()] * 2


def gradients_of(step, forget, retain):
    """By objective the gradient of its loss, by autograd alone."""
    values = step.objectives(forget, retain)
    found = {}
    for name, value in values.items():
        named = step.view().trained
        made = torch.autograd.grad(value, [p for _, p in named], retain_graph=True, allow_unused=True)
        found[name] = {n: g for (n, _), g in zip(named, made, strict=True) if g is not None}
    return found


def test_no_descent_where_nothing_moves(model):
    """A stationary point has no update, whatever a direction would have done."""
    step, forget, retain = prepared(model, recipe("mollm", "mollm.kl=false", "optimizer.name=sgd"))
    step.gradients.begin(step.view().trained, step.masks)
    for objective, sign in (("forget", 1), ("retain", -1)):
        step.gradients.sets[objective] = [sign * torch.ones_like(p) for _, p in step.view().trained]
    products, active = step.gradients.products(), torch.ones(2, dtype=torch.bool)
    assert step.gradients.descend(step.recipe.mollm, products, active, measure=True).stationary
    assert step.gradients.descent() == {"forget": 0.0, "retain": 0.0}


def test_in_bfloat16_descent_is_measured(model):
    """SGD's update is rounded away, and so is what it lowers."""
    made = recipe("mollm", "optimizer.name=sgd", "optimizer.numerics=parity", "mollm.gradients=compact", lr=1e-9)
    step, forget, retain = prepared(model.bfloat16(), made)
    metrics = step(forget[0], retain[0])
    assert metrics["descent_forget"] == metrics["descent_retain"] == 0.0


@pytest.mark.slow
def test_the_trainer_logs_descent(model, tmp_path):
    """It steps the optimizer itself, and clips before it."""
    dataset = ForgetRetainDataset(examples(8, 1), examples(8, 2), seed=0)
    settings = recipe("mollm", "mollm.log_descent_every=2", "mollm.gradients=compact")
    trainer = UnlearnTrainer(model, arguments(tmp_path, max_steps=3, save_strategy="no"), settings, dataset)
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "forget_loss" in entry]
    assert ["descent_forget" in entry for entry in logged] == [True, False, True]
    assert logged[0]["descent_forget"] < 0 and logged[0]["descent_retain"] < 0
