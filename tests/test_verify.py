"""verify: what it finds, what it reports, and what a run that is stopped looks like."""

import copy

import pytest
import torch

from moe_unlearn.optim import MaskedSGD
from moe_unlearn.step import UnlearnStep
from moe_unlearn.step.gradients import GradientStore
from moe_unlearn.step.objectives import Objectives
from moe_unlearn.step.sinks import CompactSink, UpdateSink
from moe_unlearn.verify import VerificationError
from moe_unlearn.verify.forced_routing import Routes
from tests.support.covers import cover
from tests.support.models import tiny_olmoe, tiny_phimoe
from tests.support.steps import VOCAB, changed, prepared, recipe, weights

pytestmark = pytest.mark.quick
COMPACT = ("optimizer.weight_decay=0.1",)
UPDATE = (*COMPACT, "guard=loss")


@pytest.fixture
def model():
    torch.manual_seed(0)
    return tiny_olmoe(vocab_size=VOCAB).eval()


def skip_the_mask(patch):
    original = UpdateSink.take, CompactSink.take

    def take(sink, weight, factors):
        layout = sink.optimizer.layout
        sink.optimizer.layout = lambda p: layout(p) and layout(p)._replace(mask=None)
        original[1](sink, weight, factors)
        del sink.optimizer.layout

    patch.setattr(CompactSink, "take", take)


def forget_to_count(patch):
    original = UpdateSink.take

    def take(sink, weight, factors):
        original(sink, weight, factors)
        sink.optimizer.state[weight]["step"] -= 1

    patch.setattr(UpdateSink, "take", take)


def swap_factors(patch):
    # of square weights only: the shapes of others would tell
    for sink in (CompactSink, UpdateSink):
        original = sink.take

        def take(self, weight, factors, original=original):
            if weight.dim() == 3 and weight.shape[1] == weight.shape[2]:
                g, x, offsets, rows_g, rows_x = factors
                factors = type(factors)(x, g, offsets, rows_x, rows_g)
            original(self, weight, factors)

        patch.setattr(sink, "take", take)


def take_the_retain_rows_twice(patch):
    original = Objectives.__call__

    def call(self, forget, retain, *, joint=True):
        made = original(self, forget, retain, joint=joint)
        return {**made, "retain": 2 * made["retain"]} if joint else made

    patch.setattr(Objectives, "__call__", call)


def drop_weight_decay(patch):
    for sink in (UpdateSink, CompactSink):
        original = sink.take

        def take(self, weight, factors, original=original):
            for group in self.optimizer.param_groups:
                group["weight_decay"] = 0.0
            original(self, weight, factors)

        patch.setattr(sink, "take", take)


def mask_moves(patch):
    original = UnlearnStep.finish

    def finish(self):
        if self.fused:
            p = next(p for p in self.gradients.collected if p.dim() == 3)
            with torch.no_grad():
                p.mul_(0.99)
        return original(self)

    patch.setattr(UnlearnStep, "finish", finish)


def forget_the_divisor(patch):
    original = GradientStore.divide
    patch.setattr(GradientStore, "divide", lambda g, n: original(g, 1 if g.collected else n))


BUGS = {
    "mask skipped": (skip_the_mask, "wagle", COMPACT, "gradient of .*experts"),
    "step not counted": (forget_to_count, "graddiff", UPDATE, "state of .*at step 0"),
    "factors swapped": (swap_factors, "graddiff", UPDATE, "experts.down_proj"),
    "retain rows twice": (take_the_retain_rows_twice, "graddiff", COMPACT, "retain_loss"),
    "no weight decay": (drop_weight_decay, "graddiff", UPDATE, "weight .*experts"),
    "masked weights move": (mask_moves, "wagle", COMPACT, "moved that the mask holds back"),
    "sum for mean": (forget_the_divisor, "graddiff", COMPACT, "gradient of .*experts"),
}


@cover(full=True, numerics=("float32", "bfloat16"), optimizer=("adamw", "sgd"), bug=tuple(BUGS))
@pytest.mark.slow
def test_a_wrong_step_is_stopped_and_undone(bug, optimizer, numerics, monkeypatch):
    inject, name, overrides, found = BUGS[bug]
    torch.manual_seed(0)
    model = tiny_olmoe(vocab_size=VOCAB, intermediate_size=32).eval().to(getattr(torch, numerics))
    overrides = [*overrides, f"optimizer.name={optimizer}", "forget.gamma=0.5"]
    step, forget, retain = prepared(model, recipe(name, *overrides, lr=1e-2), verify=True)
    before, state = weights(model), copy.deepcopy(step.optimizer.state_dict())
    inject(monkeypatch)
    if bug == "sum for mean":
        step(forget[0], retain[0], update=False)
    with pytest.raises(VerificationError, match=found) as caught:
        step(forget[0], retain[0])
    assert "NOT the plain step" in str(caught.value) and "0 steps done" in str(caught.value)
    assert not changed(model, before) and step.steps == 0
    assert step.optimizer.state_dict()["state"] == state["state"] == {}
    assert not step.gradients.collected and all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize(("bits", "passes"), [(1, True), (4, False)])
@pytest.mark.slow
def test_a_weight_may_miss_its_update_by_the_last_bit_and_no_more(bits, passes, model, monkeypatch):
    original = UnlearnStep.finish

    def finish(self):
        weight[0] += bits * 2**-24
        return original(self)

    # the one weight whose rounding shows among the small ones of its row
    weight = model.model.layers[0].self_attn.q_proj.weight.data.view(-1)
    weight.zero_()[0] = 0.75
    monkeypatch.setattr(UnlearnStep, "finish", finish)
    step, forget, retain = prepared(model, recipe("graddiff"), verify=True)
    if passes:
        step(forget[0], retain[0])
    else:
        with pytest.raises(VerificationError, match="weight model.layers.0.self_attn.q_proj.weight: pooled row"):
            step(forget[0], retain[0])


@pytest.mark.slow
def test_the_first_steps_are_reported_and_the_others_cost_nothing(model):
    step, forget, retain = prepared(model, recipe("graddiff"), verify=2)
    assert "verify runs 2 steps" in str(step.plan()) and step.verifier.memory() > 0
    for i in range(2):
        metrics = step(forget[i], retain[i])
        assert 0 < metrics["verify_difference"] == step.verifier.reports[i].largest < 1e-4
    assert "verify_difference" not in step(forget[2], retain[2])
    assert len(step.verifier.reports) == 2 and step.steps == 3
    summary = step.verifier.summary()
    assert "step 2: equals the plain step" in summary and "gradient of" in summary
    assert "verify" not in str(step.plan())


@pytest.mark.slow
def test_verifying_changes_nothing(model):
    results = []
    for verify in (False, True):
        own = copy.deepcopy(model)
        step, forget, retain = prepared(own, recipe("combined"), verify=verify)
        for i in range(2):
            step(forget[i], retain[i])
        results.append(weights(own))
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


def test_tokens_at_a_tie_are_compared_on_the_routes_of_the_fused_step(model):
    gates = [layer.mlp.gate for layer in model.model.layers]
    ties = 0

    def break_otherwise(gate, _, made):
        """Route as another precision may: the fused step alone takes the last experts where its plain twin takes the
        first."""
        nonlocal ties
        logits, scores, index = made
        ties += int((logits == logits[:, :1]).all(1).sum())
        index = gate.num_experts - 1 - index
        return logits, torch.softmax(logits, -1).gather(1, index), index

    with torch.no_grad():
        for gate in gates:
            # one term for each score, so that no order of sums parts them
            gate.weight.zero_()[:, 0] = 1.0
    step, forget, retain = prepared(model, recipe("graddiff", "optimizer.name=sgd", "forget.gamma=0.5"), verify=1)
    for gate in gates:
        gate.register_forward_hook(lambda own, *made: break_otherwise(own, *made) if own in gates else None)
    step(forget[0], retain[0])
    report = step.verifier.reports[0]
    assert ties >= report.routed > 0, "the scores are not tied"
    assert report.compared and 0 < report.rerouted <= report.routed
    assert f"{report.rerouted} of {report.routed}" in str(report)


def test_a_step_whose_routes_part_is_not_judged(model, monkeypatch):
    step, forget, retain = prepared(model, recipe("graddiff"), verify=1)
    monkeypatch.setattr(Routes, "equal", lambda own, other: False)
    take_the_retain_rows_twice(monkeypatch)
    assert step(forget[0], retain[0])["verify_difference"] == 0
    assert "not compared" in str(step.verifier.reports[0])


def test_random_numbers_in_the_forward_pass_are_refused_and_undone():
    torch.manual_seed(0)
    model = tiny_olmoe(vocab_size=VOCAB, attention_dropout=0.5).train()
    step, forget, retain = prepared(model, recipe("graddiff", *UPDATE), verify=True)
    model.train()
    before = weights(model)
    with pytest.raises(ValueError, match="expected a forward pass without random numbers"):
        step(forget[0], retain[0])
    assert not changed(model, before) and not step.optimizer.state


def test_an_optimizer_of_the_caller_is_verified_with_its_own_options(model):
    own = MaskedSGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.1)
    step, forget, retain = prepared(model, recipe("graddiff", "forget.gamma=0.5"), optimizer=own, verify=True)
    for i in range(2):
        step(forget[i], retain[i])


@pytest.mark.parametrize("verify", [-1, 1.5, "all"])
def test_a_bad_number_of_steps(verify, model):
    with pytest.raises(ValueError, match="verify must be a number of steps"):
        UnlearnStep(model, recipe("graddiff"), verify=verify)


def test_a_plain_path_that_stops_is_a_difference(model, monkeypatch):
    step, forget, retain = prepared(model, recipe("graddiff", *UPDATE), verify=True)
    before, norm = weights(model), GradientStore.norm
    monkeypatch.setattr(GradientStore, "norm", lambda g: norm(g) if step.gradients is g else float("nan"))
    with pytest.raises(VerificationError, match="the plain path stops"):
        step(forget[0], retain[0])
    assert not changed(model, before) and step.steps == 0


def test_a_router_without_topk_keeps_its_own_routes():
    torch.manual_seed(0)
    model = tiny_phimoe(vocab_size=VOCAB).eval()
    step, forget, retain = prepared(model, recipe("graddiff", "forget.gamma=0.5"), verify=True)
    step(forget[0], retain[0])
    assert step.verifier.reports[0].rerouted == 0 and step.verifier.reports[0].compared
