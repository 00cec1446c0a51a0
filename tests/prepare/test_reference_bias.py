"""References of a head with a bias: its bias is kept where the model's own may move, and only there."""

import copy

import peft
import pytest
import torch
from torch.nn.functional import log_softmax

from moe_unlearn.model.batches import target_mask
from moe_unlearn.step import UnlearnStep
from tests.support.models import tiny_olmoe, tiny_phimoe
from tests.support.steps import VOCAB, data, recipe

pytestmark = pytest.mark.quick

# the side whose loss has targets of the reference, and that loss
TARGETS = {"kl_min": ("retain", "retain"), "mollm": ("retain", "kl"), "undial": ("forget", "forget")}


@pytest.fixture
def model():
    torch.manual_seed(0)
    made = tiny_phimoe(vocab_size=VOCAB).double().eval()
    with torch.no_grad():
        made.lm_head.bias.normal_()
    return made


def moved(model, *names):
    """Move parameters of a model away from the reference."""
    draw = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name in names:
            p = model.get_parameter(name)
            p += torch.randn(p.shape, generator=draw, dtype=p.dtype)
    return model


def with_states(model, batch):
    """The batch with the reference's states, which caches would round."""
    with torch.no_grad():
        states = model.get_decoder()(batch["input_ids"], batch["attention_mask"]).last_hidden_state
    return batch | {"ref_hidden_states": states}


def expected(name, model, reference, batch, beta):
    mask = target_mask(batch)
    z, z_ref = (m(batch["input_ids"], batch["attention_mask"]).logits[mask] for m in (model, reference))
    if name != "undial":
        q, p = log_softmax(z_ref.detach(), 1), log_softmax(z, 1)
        return (q.exp() * (q - p)).sum(1).mean()
    y = batch["labels"].roll(-1, 1)[mask][:, None]
    q = torch.softmax(z_ref.detach().scatter_add(1, y, torch.full_like(y, -beta, dtype=z.dtype)), 1)
    return -(q * log_softmax(z, 1)).sum(1).mean()


@pytest.mark.parametrize("frozen", [(), ("lm_head.weight",), ("lm_head.bias",)], ids=str)
@pytest.mark.parametrize("name", TARGETS)
def test_targets_are_those_of_the_reference_whatever_moved(name, frozen, model):
    made, original = recipe(name), copy.deepcopy(model)
    for parameter in frozen:
        model.get_parameter(parameter).requires_grad_(False)
    plain = copy.deepcopy(model)
    step = UnlearnStep(model, made)
    sides = dict(zip(("forget", "retain"), data(), strict=True))
    step.prepare(*sides.values())
    for part, kept in (("weight", step.prepared.ref_lm_head), ("bias", step.prepared.ref_bias)):
        assert (kept is None) == (f"lm_head.{part}" in frozen)
        assert kept is None or torch.equal(kept, original.lm_head.get_parameter(part))
    resumed = UnlearnStep(copy.deepcopy(model), made)
    resumed.load_state_dict(copy.deepcopy(step.state_dict()))
    parameters = [p for p in ("lm_head.weight", "lm_head.bias") if p not in frozen]
    side, loss = TARGETS[name]
    batch = with_states(original, sides[side][1])
    truth = expected(name, moved(plain, *parameters), original, batch, made.forget.beta)
    truth.backward()
    for other in (step, resumed):
        moved(other.model, *parameters)
        found = getattr(other.objectives, side)(batch)[loss]
        torch.testing.assert_close(found, truth)
        gradients = torch.autograd.grad(found, [other.model.get_parameter(p) for p in parameters])
        for parameter, gradient in zip(parameters, gradients, strict=True):
            torch.testing.assert_close(gradient, plain.get_parameter(parameter).grad)


@pytest.mark.parametrize("name", TARGETS)
def test_the_fused_step_is_the_plain_one(name, model):
    step = UnlearnStep(model.float(), recipe(name), verify=2)
    forget, retain = data()
    step.prepare(forget, retain)
    assert step.prepared.ref_bias is not None
    moved(model, "lm_head.bias")
    for i in range(2):
        step(forget[i], retain[i])
    assert step.verifier.summary().count("equals") == 2


def test_a_frozen_bias_that_an_adapter_brought_is_not_the_base_models(model):
    base = model.lm_head.bias.detach().clone()
    config = peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"])
    wrapped = peft.get_peft_model(model, config)
    head = wrapped.base_model.model.lm_head.modules_to_save["default"]
    head.requires_grad_(False)
    with torch.no_grad():
        head.bias += 1
    for reference, kept in (("base", base), ("prepared", None)):
        step = UnlearnStep(
            wrapped, recipe("kl_min", f"reference={reference}", "scope.kind=parameters", "scope.parameters=['lora']")
        )
        step.prepare(*data())
        found = step.prepared.ref_bias
        assert found is kept or torch.equal(found, kept)
        step.close()


@pytest.mark.parametrize("name", ["kl_min", "undial"])
@pytest.mark.slow
def test_a_plan_predicts_the_bias(name, model):
    forget, retain = data()
    step = UnlearnStep(model, recipe(name))
    predicted = step.plan(forget, retain).memory["reference caches"]
    step.prepare(forget, retain)
    assert step.plan(forget, retain).memory["reference caches"] == predicted


def test_heads_without_a_bias_have_none():
    torch.manual_seed(0)
    step = UnlearnStep(tiny_olmoe(vocab_size=VOCAB), recipe("kl_min"))
    step.prepare(*data())
    assert step.prepared.ref_bias is None and step.prepared.ref_lm_head is not None
