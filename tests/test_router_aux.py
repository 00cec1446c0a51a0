"""The load-balancing loss that a model adds to its own: transformers' value, and a step with it that of autograd."""

import copy
import importlib
import re

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from moe_unlearn import router_aux
from moe_unlearn.config import Recipe
from moe_unlearn.data import Example, ForgetRetainDataset
from moe_unlearn.model.batches import target_mask
from moe_unlearn.model.head import final_hidden_states, token_losses
from moe_unlearn.prepare.preparation import Preparation
from moe_unlearn.step import UnlearnStep
from moe_unlearn.step.objectives import Objectives
from moe_unlearn.trainer import UnlearnTrainer
from tests.support.batches import random_batch
from tests.support.models import TINY_MODELS, tiny_deepseek_v3, tiny_olmoe
from tests.support.steps import VOCAB, data, made_of, recipe, weights
from tests.support.training import arguments

pytestmark = pytest.mark.quick
# of the largest: two orders of sums in float64, but for norms and routers, which are in float32 whatever the model
CLOSE = 2.0**-14
ONE_LAYER = ["scope.kind=parameters", r"scope.parameters=['layers\.1\.']"]
BALANCED = ("olmoe", "qwen2_moe", "qwen3_moe", "mixtral", "gpt_oss", "granite_moe", "phimoe")


def switched_on(model, coefficient=1.0):
    model.config.output_router_logits, model.router_aux_loss_coef = True, coefficient
    return model


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return switched_on(tiny_olmoe(vocab_size=VOCAB).double().eval())


def theirs(model, batch):
    """The model's own loss, and its load-balancing loss by transformers' function."""
    out = model(**batch, output_router_logits=True)
    function = importlib.import_module(type(model).__module__).load_balancing_loss_func
    return out.loss, function(out.router_logits, model.num_experts, model.num_experts_per_tok, batch["attention_mask"])


def ours(model, batch):
    with router_aux.routing(model) as layers:
        final_hidden_states(model, batch)
    return router_aux.load_balancing_loss(layers, batch["attention_mask"].bool().flatten())


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("family", BALANCED)
def test_the_loss_is_that_of_transformers_with_its_gradient(family, side):
    torch.manual_seed(1)
    model, batch = TINY_MODELS[family](vocab_size=VOCAB).eval(), random_batch(VOCAB)
    if side == "left":
        batch = {key: value.flip(1) for key, value in batch.items()}
    assert (batch["attention_mask"] == 0).any()
    found = {}
    for name, make in (("ours", ours), ("theirs", lambda *args: theirs(*args)[1])):
        model.zero_grad()
        value = make(model, batch)
        value.backward()
        found[name] = value.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    assert found["ours"][1].keys() == found["theirs"][1].keys() and any("embed" in name for name in found["ours"][1])
    torch.testing.assert_close(*(value for value, _ in found.values()))
    for name, gradient in found["theirs"][1].items():
        torch.testing.assert_close(found["ours"][1][name], gradient, rtol=1e-3, atol=1e-5)


def test_padding_takes_no_part_whatever_it_holds():
    generator = torch.Generator().manual_seed(2)
    logits = torch.randn(6, 4, generator=generator, requires_grad=True)
    index, attended = torch.tensor([[0, 1], [1, 2], [3, 0], [0, 2], [1, 4], [9, 9]]), torch.tensor([1, 1, 1, 1, 1, 0])
    spoiled = torch.cat([logits[:5], torch.full((1, 4), float("nan"))])
    value = router_aux.load_balancing_loss([router_aux.Layer(spoiled, index)], attended.bool())
    value.backward()
    # an id of 4 is an expert on another machine
    visits = torch.tensor([3.0, 3.0, 2.0, 1.0])
    torch.testing.assert_close(value, 4 * (visits / 5 * logits[:5].softmax(1).mean(0)).sum())
    assert logits.grad.isfinite().all() and logits.grad[:5].any(1).all() and not logits.grad[5].any()
    assert router_aux.load_balancing_loss([router_aux.Layer(logits, index)], torch.zeros(6, dtype=torch.bool)) == 0


@pytest.mark.parametrize("coefficient", [1.0, 0.3])
def test_retain_loss_and_balance_are_the_models_own_loss(model, coefficient):
    own, (forget, retain) = switched_on(copy.deepcopy(model), coefficient), (b[0] for b in data())
    step = UnlearnStep(own, recipe("graddiff"))
    metrics = step(forget, retain)
    with torch.no_grad():
        expected, balance = theirs(model, retain)
    # transformers adds up in the balance's float32
    assert metrics["router_aux_loss"] == pytest.approx(float(balance), rel=1e-5)
    assert metrics["retain_loss"] + metrics["router_aux_loss"] == pytest.approx(float(expected), rel=1e-5)


def plain(model, forget, retain, factor, alpha=1.0):
    """Gradients of GradDiff with the load-balancing loss, by autograd, and of transformers' loss alone."""
    own = copy.deepcopy(model)

    def nll(batch):
        return token_losses(own, batch, kind="nll").sum() / target_mask(batch).sum()

    (-nll(forget) + alpha * (nll(retain) + factor * ours(own, retain))).backward()
    return {name: p.grad for name, p in own.named_parameters()}


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "plain"])
@pytest.mark.parametrize("guard", ["strict", "loss"])
@pytest.mark.parametrize("length", [12, 30], ids=["one pass", "two passes"])
def test_a_step_is_that_of_autograd(model, fused, guard, length):
    """Retain rows so long that padding keeps them apart, and rows that share a pass with the forget rows."""
    own, forget, retain = copy.deepcopy(model), random_batch(VOCAB, seed=1), random_batch(VOCAB, length=length, seed=2)
    changes = ("optimizer.name=sgd", f"guard={guard}", "retain.router_aux=3", "retain.alpha=0.5")
    step = UnlearnStep(own, recipe("graddiff", *changes, lr=1e-2), fused=fused)
    before = weights(own)
    step(forget, retain)
    for name, gradient in plain(model, forget, retain, 3.0, 0.5).items():
        update = -1e-2 * gradient
        off = own.state_dict()[name] - before[name] - update
        assert off.abs().max() <= CLOSE * update.abs().max(), (name, off.abs().max() / update.abs().max())


def test_mollm_has_it_in_its_retain_objective(model):
    settings = recipe("mollm", "mollm.kl=false", "retain.router_aux=2")
    step = UnlearnStep(copy.deepcopy(model), settings)
    forget, retain = data()
    step.prepare(forget, retain)
    step.accumulate(forget[0], retain[0], last=True)
    made = Objectives(copy.deepcopy(model), settings, Preparation())
    values = made.retain(retain[0])
    (values["retain"] + 2 * values["router_aux"]).backward()
    # its gradients are seen by their inner products
    squares = sum(float(p.grad.square().sum()) for p in made.model.parameters() if p.grad is not None)
    names = list(step.gradients.sets)
    products = step.gradients.products()
    assert float(products[names.index("retain"), names.index("retain")]) == pytest.approx(squares, rel=1e-5)


@pytest.mark.parametrize("mode", [True, False], ids=["reentrant", "not reentrant"])
@pytest.mark.parametrize(
    "name, scope", [("graddiff", []), ("graddiff", ONE_LAYER), ("mollm", []), ("mollm", ONE_LAYER), ("seuf", [])]
)
@pytest.mark.slow(but=4)
def test_checkpointing_changes_nothing(model, name, scope, mode):
    made, (forget, retain), found = recipe(name, "retain.router_aux=5", *scope, lr=1e-2), data(), []
    for checkpointed in (False, True):
        own = copy.deepcopy(model).train()
        if checkpointed:
            own.gradient_checkpointing_enable({"use_reentrant": mode})
        step = UnlearnStep(own, made)
        step.prepare(forget, retain)
        found.append((step(forget[0], retain[0]), weights(own)))
    assert found[0][0] == found[1][0]
    assert all(torch.equal(p, found[1][1][name]) for name, p in found[0][1].items())


def test_a_checkpoint_without_a_graph_is_an_error(model):
    own, (forget, retain) = copy.deepcopy(model).train(), data()
    own.gradient_checkpointing_enable()
    for layer in own.model.layers:
        layer._gradient_checkpointing_func = lambda f, *args: checkpoint(f, *args, use_reentrant=True)
    with pytest.raises(RuntimeError, match="a loss of its routing would have no gradient"):
        UnlearnStep(own, recipe("graddiff"))(forget[0], retain[0])


def test_micro_batches_balance_their_own_rows_and_weigh_their_positions(model):
    forget, retain = random_batch(VOCAB, rows=2), random_batch(VOCAB, rows=3, length=20, seed=3)
    pairs = [
        ({k: v[i : i + 1] for k, v in forget.items()}, {k: v[rows] for k, v in retain.items()})
        for i, rows in enumerate((slice(0, 1), slice(1, 3)))
    ]
    step = UnlearnStep(copy.deepcopy(model), recipe("graddiff", "accumulate=2"))
    sizes = step.sizes(pairs)
    assert sizes["router_aux"] == int(retain["attention_mask"].sum())
    shares = [int(r["attention_mask"].sum()) / sizes["router_aux"] for _, r in pairs]
    values = [float(ours(model, r).detach()) for _, r in pairs]
    expected = sum(share * value for share, value in zip(shares, values, strict=True))
    assert made_of(step, pairs)["router_aux_loss"] == pytest.approx(expected, rel=1e-12)
    assert abs(values[0] - values[1]) > 0.01, "both would have one value, and this test would show nothing"


@pytest.mark.parametrize("name", ["graddiff", "kl_min", "trace", "combined", "seuf"])
@pytest.mark.slow
def test_a_fused_step_is_verified_in_bfloat16(model, name):
    """The truth takes the step's routes, in f as in the experts; a token near a tie would be an error otherwise."""
    own = copy.deepcopy(model).bfloat16()
    step = UnlearnStep(own, recipe(name, "retain.router_aux=1"), verify=True)
    forget, retain = data()
    step.prepare(forget, retain)
    for pair in zip(forget, retain, strict=True):
        step(*pair)
    assert len(step.verifier.reports) == len(forget) and all(report.compared for report in step.verifier.reports)


def test_adapters_and_what_no_config_switches_on(model):
    peft = pytest.importorskip("peft")
    own = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(target_modules=["q_proj", "v_proj"]))
    forget, retain = data()
    assert UnlearnStep(own, recipe("graddiff"))(forget[0], retain[0])["router_aux_loss"] > 0
    for settings, config in ((["retain.router_aux=off"], True), ([], False), (["retain.router_aux=0"], True)):
        own = copy.deepcopy(model)
        own.config.output_router_logits = config
        step = UnlearnStep(own, recipe("graddiff", *settings))
        assert "router_aux_loss" not in step(forget[0], retain[0])
        assert "router_aux" not in step.sizes([(forget[0], retain[0])])


@pytest.mark.parametrize(
    "settings, config, words",
    [
        ([], True, "1 x the load-balancing loss of retain rows is added, the model's own coefficient"),
        (["retain.router_aux=0.01"], False, "0.01 x the load-balancing loss .* the recipe's coefficient"),
        ([], False, r"left out, .*: its config does not switch it on \(output_router_logits\)"),
        (["retain.router_aux=off"], True, "left out, .* which its config switches on: retain.router_aux is off"),
        (["retain.router_aux=off"], False, "left out, the model's load-balancing loss: retain.router_aux is off"),
        (["retain.router_aux=0"], True, "which its config switches on: its coefficient is 0"),
        (["retain.objective=none"], True, "retain.objective 'none' has no pass of retain rows"),
        (["scope.kind=parameters", "scope.parameters=[experts]"], True, "moves weights below routers only"),
        (["scope.kind=parameters", r"scope.parameters=['layers\.1\..*experts', lm_head]"], True, "it moves nothing"),
        (["scope.kind=parameters", r"scope.parameters=['layers\.1\..*gate\.']"], True, "the model's own coefficient$"),
        (["scope.kind=parameters", r"scope.parameters=['layers\.0\..*down_proj']"], True, "below routers only"),
        (["scope.kind=parameters", r"scope.parameters=['layers\.1\..*q_proj']"], True, "below routers only"),
    ],
)
@pytest.mark.slow
def test_the_plan_says_what_is_added_or_left_out(model, settings, config, words):
    own = copy.deepcopy(model)
    own.config.output_router_logits = config
    step = UnlearnStep(own, recipe("graddiff", *settings))
    plan = step.plan(*([batch] for batch in (random_batch(VOCAB), random_batch(VOCAB, seed=1))))
    assert plan.levers["router_aux"] in str(plan) and not any("not rehearsed" in note for note in plan.notes)
    assert re.search(words, plan.levers["router_aux"])
    # what the plan says is what autograd does
    values = step.objectives.retain(random_batch(VOCAB))
    if "router_aux" in values:
        assert values["router_aux"].requires_grad == ("it moves nothing" not in plan.levers["router_aux"])


def test_an_evaluation_weighs_the_losses_as_a_step_does(model, tmp_path):
    rows = ForgetRetainDataset(*([Example(list(range(3, 9)), list(range(3, 9)), 1)] for _ in range(2)))
    made = recipe("graddiff", "forget.gamma=3", "retain.alpha=2", "retain.router_aux=0.5")
    trainer = UnlearnTrainer(copy.deepcopy(model), arguments(tmp_path), made, rows)
    pair = dict(zip(("forget", "retain"), (side[0] for side in data()), strict=True))
    found, *_ = trainer.prediction_step(trainer.model, pair, True)
    with torch.no_grad():
        forget, retain, balance = trainer.unlearn_step.objectives(*pair.values()).values()
    torch.testing.assert_close(found, 3 * forget + 2 * (retain + 0.5 * balance))


@pytest.mark.slow
def test_models_without_the_loss():
    torch.manual_seed(0)
    model = tiny_deepseek_v3(vocab_size=VOCAB)
    model.config.output_router_logits = True
    step = UnlearnStep(model, recipe("graddiff"))
    assert "router_aux" not in step.plan().levers and not step.objectives.router_aux
    step.close()
    with pytest.raises(ValueError, match="DeepseekV3ForCausalLM has no load-balancing loss"):
        UnlearnStep(model, recipe("graddiff", "retain.router_aux=0.01"))
    assert model.config._experts_implementation != "moe_unlearn"


def test_a_decoder_that_gives_no_logits_is_an_error(model):
    own = copy.deepcopy(model)
    own.model.register_forward_hook(lambda *args: setattr(args[2], "router_logits", args[2].router_logits[:1]))
    forget, retain = data()
    with pytest.raises(ValueError, match="router logits of 1 layers, expected 2.*off leaves it out"):
        UnlearnStep(own, recipe("graddiff"))(forget[0], retain[0])


def test_values_of_a_recipe():
    for text, value in (
        ("off", "off"),
        ("false", "off"),
        ("auto", "auto"),
        ("1e-2", 0.01),
        ("2", 2.0),
        ("'off'", "off"),
    ):
        made = Recipe.load("npo", [f"retain.router_aux={text}"])
        assert made.retain.router_aux == value and Recipe.from_dict(made.to_dict()) == made
    for text, objective, message in (
        ("on", "nll", "retain.router_aux must be a word or a finite number; got True"),
        ("null", "nll", "retain.router_aux must be a word or a finite number; got None"),
        (".nan", "nll", "retain.router_aux must be a word or a finite number; got nan"),
        ("some", "nll", "retain.router_aux must be auto, off or a number; got 'some'"),
        ("-1", "nll", "retain.router_aux must be at least 0; got -1"),
        ("1", "none", "needs retain.objective 'nll' or 'kl'; got 1 with 'none'"),
    ):
        with pytest.raises(ValueError, match=message):
            Recipe.load("npo", [f"retain.router_aux={text}", f"retain.objective={objective}"])
