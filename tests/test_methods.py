"""Forget objectives against the formulas of their papers, written out over whole logits, and fused against plain."""

import copy
from operator import itemgetter

import pytest
import torch
from torch.nn.functional import log_softmax

from moe_unlearn.config import Recipe
from moe_unlearn.model.batches import forgotten, target_mask
from moe_unlearn.step import UnlearnStep
from moe_unlearn.testing import assert_as_accurate
from moe_unlearn.testing.yardstick import Reference
from tests.support.models import tiny_olmoe
from tests.support.steps import VOCAB, data

pytestmark = pytest.mark.quick


def logits(model, batch):
    return model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits


def nll(model, batch):
    """NLL of each next token that is labelled, a vector."""
    mask = target_mask(batch)
    return -log_softmax(logits(model, batch)[mask], 1).gather(1, batch["labels"].roll(-1, 1)[mask][:, None])[:, 0]


def wga(model, batch, forget):
    loss = nll(model, batch)
    return -((-loss).exp().detach() ** forget.beta * loss).mean()


def satimp(model, batch, forget):
    loss = nll(model, batch)
    p = (-loss).exp().detach()
    return -(p**forget.beta1 * (1 - p) ** forget.beta2 * loss).mean()


def ceu(model, batch, forget):
    skipped = {**batch, "labels": batch["labels"].clone()}
    for row in skipped["labels"]:
        row[(row != -100).nonzero()[: forget.ignore_first_n_answer_tokens]] = -100
    mask = target_mask(skipped)
    z, y = logits(model, skipped)[mask], skipped["labels"].roll(-1, 1)[mask][:, None]
    q = torch.softmax(z.detach().scatter(1, y, -torch.inf), 1)
    return -(q * log_softmax(z, 1)).sum(1).mean()


def undial(model, batch, forget, ref_lm_head):
    """The reference's states are given with the batch, to both sides alike."""
    mask = target_mask(batch)
    targets = batch["ref_hidden_states"][mask].to(model.dtype) @ ref_lm_head.to(model.dtype).T
    y = batch["labels"].roll(-1, 1)[mask][:, None]
    q = torch.softmax(targets.scatter_add(1, y, torch.full_like(y, -forget.beta, dtype=model.dtype)), 1)
    return -(q * log_softmax(logits(model, batch)[mask], 1)).sum(1).mean()


def flattening(model, batch, forget):
    z = logits(model, batch)[target_mask(batch)]
    return ((z.max(1).values - z.mean(1)) ** 2).mean()


METHODS = {
    "undial": (undial, ["forget.beta=5.0"]),
    "ceu": (ceu, ["forget.ignore_first_n_answer_tokens=2"]),
    "pdu": (flattening, ["dual=null", "retain.alpha=1"]),
    "wga": (wga, ["forget.beta=0.7"]),
    "satimp": (satimp, ["forget.beta1=0.6", "forget.beta2=1.5"]),
}


@pytest.fixture
def model():
    torch.manual_seed(0)
    return tiny_olmoe(vocab_size=VOCAB).eval()


def made(name, *overrides):
    return Recipe.load(name, [*METHODS[name][1], "optimizer.lr=1e-3", *overrides])


def loss_and_gradients(loss, model):
    loss.backward()
    grads = {name: p.grad.flatten() for name, p in model.named_parameters() if p.grad is not None}
    return grads | {"loss": loss.detach()[None]}


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.slow
def test_loss_and_gradients_are_the_papers(name, model):
    recipe, (forget, retain) = made(name), data()
    given, more = forget[1], []
    if name == "undial":
        more = [model.lm_head.weight.detach()]
        given = {**given, "ref_hidden_states": torch.randn(*given["input_ids"].shape, 32)}

    def ours():
        own = copy.deepcopy(model)
        step = UnlearnStep(own, recipe)
        step.prepare(forget, retain)
        move(own)
        return loss_and_gradients(step.objectives.forget(given)["forget"], own)

    def theirs(dtype):
        own = copy.deepcopy(model).to(dtype)
        own.set_experts_implementation("eager")
        move(own)
        return loss_and_gradients(METHODS[name][0](own, given, recipe.forget, *more), own)

    def move(own):
        # away from the reference, and to tokens of very different probabilities
        draw = torch.Generator().manual_seed(7)
        with torch.no_grad():
            for p in own.parameters():
                p += 0.05 * torch.randn(p.shape, generator=draw).to(p.dtype)
            own.lm_head.weight *= 6

    found, reference, gold = ours(), Reference(lambda: theirs(torch.float32)), theirs(torch.float64)
    assert found.keys() == gold.keys()
    for key, truth in gold.items():
        assert_as_accurate(found[key], reference.baseline(itemgetter(key)), truth, name=key)


def test_ceu_leaves_out_predicted_tokens_of_a_text(model):
    """The first token of a text has a label that nothing predicts: it is none of those left out."""
    ids = torch.arange(3, 10)[None]
    text = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    skipped = forgotten(made("ceu", "forget.ignore_first_n_answer_tokens=2"), text)
    assert target_mask(skipped).int().tolist() == [[0, 0, 1, 1, 1, 1, 0]]
    step = UnlearnStep(model, made("ceu", "forget.ignore_first_n_answer_tokens=1"))
    assert step.sizes([(text, text)])["forget"] == 5


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("overrides", [[], ["mollm=true"], ["guard=loss", "optimizer.name=sgd"]], ids=str)
@pytest.mark.slow(but=2)
def test_the_fused_step_is_the_plain_one(name, overrides, model):
    step = UnlearnStep(model, made(name, *overrides), verify=2)
    forget, retain = data()
    step.prepare(forget, retain)
    for i in range(2):
        step(forget[i], retain[i])
    assert step.verifier.summary().count("equals") == 2
