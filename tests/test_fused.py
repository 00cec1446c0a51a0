"""The fused step: the gradients' ways, what they cost, and what happens when a step must stop."""

import copy
import math

import pytest
import torch

from moe_unlearn.errors import NonFiniteError, RetainBudgetError
from moe_unlearn.experts import experts_modules, step_inputs
from moe_unlearn.ops.bits import pack_bits
from moe_unlearn.ops.expert_wgrad import Factors, _products
from moe_unlearn.optim import MaskedSGD
from moe_unlearn.plan.ways import paths
from moe_unlearn.prepare.preparation import Preparation
from moe_unlearn.step import UnlearnStep
from moe_unlearn.step.factors import inner_products, join
from moe_unlearn.step.gradients import GradientStore
from moe_unlearn.step.objectives import Objectives
from moe_unlearn.step.sinks import CompactSink, FactorSink, UpdateSink
from moe_unlearn.testing.yardstick import Reference
from tests.support.batches import random_batch
from tests.support.models import TINY_MODELS, tiny_olmoe
from tests.support.steps import VOCAB, changed, check_changes, prepared, recipe, weights

pytestmark = pytest.mark.quick
ONE_PASS = ("guard=loss",)
WHOLE = ("optimizer.max_grad_norm=1e9",)  # the norm wants whole gradients
WAYS = {"factors": (), "compact": WHOLE, "update": ONE_PASS}


@pytest.fixture
def model():
    torch.manual_seed(0)
    return tiny_olmoe(vocab_size=VOCAB).eval()


def spoil(model, layer, value=math.inf):
    """Multiply the gradient that leaves a decoder layer downward."""
    return model.model.layers[layer].register_forward_pre_hook(
        lambda module, args: (args[0].register_hook(lambda g: g * value), None)[1]
    )


def check_against_plain(model, made, steps=2, **options):
    """The fused step as accurate as the plain one, each step from the same weights and state."""
    gold_model = copy.deepcopy(model).double()
    pair = {
        "ours": (copy.deepcopy(model), True),
        "baseline": (copy.deepcopy(model), False),
        "gold": (gold_model, False),
    }
    made_steps = {}
    for kind, (own, fused) in pair.items():
        made_steps[kind], forget, retain = prepared(own, made, fused=fused, **options)
    plain = made_steps["baseline"]
    for kind in ("ours", "gold"):
        # one preparation, or a threshold might part them
        made_steps[kind].load_state_dict(plain.state_dict())
    start, state = weights(plain.model), copy.deepcopy(plain.state_dict())
    for i in range(steps):

        def after(kind, i=i, start=start, state=state):
            step, dtype = made_steps[kind], torch.float64 if kind == "gold" else torch.float32
            step.model.load_state_dict({n: w.to(dtype) for n, w in start.items()}, strict=False)
            step.load_state_dict(copy.deepcopy(state))
            step(forget[i], retain[i])
            return weights(step.model)

        before = copy.deepcopy(model)
        before.load_state_dict(start, strict=False)
        ours, reference, gold = after("ours"), Reference(lambda after=after: after("baseline")), after("gold")
        start, state = reference.value, copy.deepcopy(plain.state_dict())
        check_changes(before, ours, reference, gold, only_changed=True)
    return made_steps["ours"]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("name", ["graddiff", "wagle"])
@pytest.mark.slow(but=1)
def test_a_fused_step_is_the_plain_step(name, optimizer, way, model):
    made = recipe(name, f"optimizer.name={optimizer}", "optimizer.weight_decay=0.1", "forget.gamma=0.5", *WAYS[way])
    step = check_against_plain(model, made)
    assert {path.way for path in paths(step.view())} == {way}


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_mollm_with_compact_gradients_is_the_plain_step(optimizer, model):
    made = recipe("mollm", f"optimizer.name={optimizer}", "mollm.gradients=compact", "optimizer.weight_decay=0.1")
    step = check_against_plain(model, made)
    assert {path.way for path in paths(step.view())} == {"compact"}


def test_the_strict_guard_keeps_factors_where_they_are_smaller(model, monkeypatch):
    kept, settle = [], GradientStore.settle
    monkeypatch.setattr(
        GradientStore, "settle", lambda own: (kept.append((set(own.factors), set(own.collected))), settle(own))[1]
    )
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("experts" in name)
    step, forget, retain = prepared(model, recipe("graddiff"))
    before = weights(model)
    metrics = step(forget[0], retain[0])
    short = {key: value[:1, :4] for key, value in forget[1].items()}
    step(short, {key: value[:1, :4] for key, value in retain[1].items()})
    experts = {p for p in model.parameters() if p.requires_grad}
    # 2 x 32 rows an expert take more than its gradient, eight rows less
    assert kept == [(set(), experts), (experts, set())]
    assert "grad_norm" in metrics and changed(model, before) == {n for n, p in model.named_parameters() if p in experts}


def test_factors_that_may_overflow_are_made_gradients_first(model):
    step, forget, retain = prepared(model, recipe("graddiff"))
    weight = model.model.layers[0].mlp.experts.down_proj
    offsets = torch.arange(0, 2 * len(weight) + 1, 2, dtype=torch.int32)
    grad, x = torch.ones(len(weight) * 2, weight.shape[1]), torch.ones(len(weight) * 2, weight.shape[2])
    step.gradients.begin(step.view().trained, step.masks)
    for scale, way in ((1.0, Factors), (1e20, torch.Tensor)):
        step.gradients.factors[weight] = [Factors(scale * grad, scale * x, offsets)]
        assert step.gradients.settle() == (way is Factors)
        assert isinstance(step.gradients.collected[weight], way)
    step.gradients.factors[weight] = [Factors(math.nan * grad, x, offsets)]
    with pytest.raises(NonFiniteError, match="layers.0.mlp.experts.down_proj is not finite"):
        step.gradients.settle()


@pytest.mark.parametrize("name", ["mollm", "combined"])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.slow
def test_the_two_phases_of_mollm_are_the_plain_step(name, optimizer, model):
    made = recipe(name, f"optimizer.name={optimizer}", "mollm.gradients=factors", "optimizer.weight_decay=0.1")
    step = check_against_plain(model, made)
    assert {path.way for path in paths(step.view())} == {"factors"}


def test_factors_and_compact_gradients_have_the_same_products(model):
    metrics, products = [], []
    for form in ("compact", "factors"):
        made = recipe("mollm", f"mollm.gradients={form}", "optimizer.name=sgd", "mollm.kl_floor=0")
        step, forget, retain = prepared(copy.deepcopy(model), made)
        step(forget[1], retain[1])
        pairs = [(forget[i], retain[i]) for i in (0, 2)]
        for pair in pairs:
            step(*pair, update=False, sizes=step.sizes(pairs))
        assert step.gradients.factored == (form == "factors")
        kept = [f for gs in step.gradients.sets.values() for g in gs if isinstance(g, list) for f in g]
        assert not any(v.requires_grad for f in kept for v in f if v is not None)
        products.append(step.gradients.products())
        metrics.append(step.update())
    torch.testing.assert_close(products[0], products[1], rtol=1e-5, atol=0)
    assert metrics[0] == pytest.approx(metrics[1], rel=1e-4)


@pytest.mark.parametrize("rows", [1, 40])
def test_inner_products_choose_a_form_and_agree(rows):
    def factors(seed):
        g = torch.Generator().manual_seed(seed)
        offsets = torch.tensor([0, rows, rows, rows + 3], dtype=torch.int32)
        index = torch.randperm(rows + 5, generator=g)[: rows + 3]
        return Factors(
            torch.randn(rows + 3, 6, generator=g), torch.randn(rows + 5, 8, generator=g), offsets, None, index
        )

    sides = [factors(1), factors(2)]
    dense = [torch.stack(list(_products(f, None, torch.float64))).flatten() for f in sides]
    expected = torch.stack(dense) @ torch.stack(dense).t()
    torch.testing.assert_close(inner_products(sides, None, None), expected, rtol=1e-5, atol=1e-5)
    full = pack_bits(torch.ones(3, 6, 8, dtype=torch.bool))
    torch.testing.assert_close(inner_products(sides, None, full), expected, rtol=1e-5, atol=1e-5)
    joined, part = join([(2.0, sides[0]), (-1.0, sides[1])], torch.tensor([2]))
    total = torch.stack(list(_products(joined, None, torch.float64)))
    expected = (2 * dense[0] - dense[1]).view(3, 6, 8)
    torch.testing.assert_close(total[2], expected[2], rtol=1e-5, atol=1e-5)
    assert not total[:2].any() and part.tolist() == [0, 0, 0, 1, 1, 1]


@pytest.mark.parametrize(("like", "way"), [(1, list), (16, torch.Tensor)])
def test_auto_keeps_factors_where_those_of_all_micro_batches_are_smaller(like, way, model):
    """Of one micro-batch among 16 they are, of all 16 they are not; and what is chosen holds for the step."""
    step, _, _ = prepared(model, recipe("mollm"))
    weight = experts_modules(model)["model.layers.0.mlp.experts"].down_proj
    rows, named = 8, step.view().trained
    step.gradients.begin(named, step.masks)
    factors = Factors(
        torch.ones(rows, weight.shape[1]),
        torch.ones(rows, weight.shape[2]),
        torch.full((9,), rows, dtype=torch.int32).index_fill(0, torch.tensor([0]), 0),
    )
    for micro_batches in (like, 17 - like):
        sink = FactorSink(step.gradients, "auto")
        sink.micro_batches = micro_batches
        sink.take(weight, factors)
        step.gradients.collect("forget")
    (held,) = [g for (_, p), g in zip(named, step.gradients.sets["forget"], strict=True) if p is weight]
    assert isinstance(held, way)


def test_forget_and_retain_rows_share_one_forward_pass(model):
    step, forget, retain = prepared(model, recipe("graddiff"))
    calls = []
    model.model.register_forward_hook(lambda *_: calls.append(1))
    long = random_batch(VOCAB, rows=3, seed=8)
    joint = step.objectives(forget[0], long)
    assert len(calls) == 1
    counts = torch.stack(list(step.objectives.tokens_per_expert))
    apart = step.objectives(forget[0], long, joint=False)
    assert len(calls) == 3
    for name in ("forget", "retain"):
        assert float(joint[name]) == pytest.approx(float(apart[name]), rel=1e-5)
    positions = step.sizes([(forget[0], long)])
    assert counts.sum(2).tolist() == [[2 * positions["forget"], 2 * positions["retain"]]] * len(counts)


def test_rows_of_very_different_length_travel_apart(model):
    calls = []
    model.model.register_forward_hook(lambda *_: calls.append(1))
    short = {k: v[:, :4].contiguous() for k, v in random_batch(VOCAB, seed=1).items()}
    long = {k: v.repeat(1, 4) for k, v in random_batch(VOCAB, seed=2).items()}
    Objectives(model, recipe("graddiff"), Preparation())(short, long)
    assert len(calls) == 2


def test_gradients_are_compact_and_masked_weights_and_frozen_experts_have_none(model):
    step, forget, retain = prepared(model, recipe("trace", "scope.kind=experts", "trace.per_layer=1"))
    step(forget[0], retain[0], update=False)
    selected = step.prepared.selected.sum(1).tolist()
    for count, module in zip(selected, experts_modules(model).values(), strict=True):
        for p in module.parameters():
            assert p.grad is None
            gradient = step.gradients.collected.get(p)
            assert gradient is None if count == 0 else gradient.shape == (count, *p.shape[1:])


def test_one_pass_leaves_no_gradient_of_an_expert_weight(model):
    step, forget, retain = prepared(model, recipe("graddiff", *ONE_PASS))
    seen = []
    original = UpdateSink.take
    before = weights(model)

    def watch(sink, weight, factors):
        original(sink, weight, factors)
        seen.append((weight.grad, dict(sink.store.collected)))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(UpdateSink, "take", watch)
        metrics = step(forget[0], retain[0])
    assert seen and all(grad is None and not compact for grad, compact in seen)
    assert "grad_norm" not in metrics
    assert changed(model, before) == set(before)


def test_gradient_checkpointing_takes_the_same_way(model):
    results = []
    for checkpointing in (False, True):
        own = copy.deepcopy(model).train()
        if checkpointing:
            own.gradient_checkpointing_enable({"use_reentrant": False})
        step, forget, retain = prepared(own, recipe("graddiff", *ONE_PASS, "optimizer.name=sgd"))
        own.train()
        step(forget[0], retain[0])
        results.append(weights(own))
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


@pytest.mark.parametrize("overrides", WAYS.values(), ids=WAYS)
def test_under_autocast_experts_learn_as_on_the_plain_path(overrides, model):
    changes = []
    for fused in (True, False):
        step, forget, retain = prepared(copy.deepcopy(model), recipe("graddiff", *overrides, lr=1e-2), fused=fused)
        with torch.autocast("cpu", torch.bfloat16):
            step.accumulate(forget[0], retain[0], last=True)
        step.update()
        changes.append(
            {n: p.detach() - q for (n, p), q in zip(step.model.named_parameters(), model.parameters(), strict=True)}
        )
    for name, change in changes[0].items():
        assert change.any(), name
        # AdamW's first step is a sign, which rounding turns where a gradient is next to nothing
        agree = (change.sign() == changes[1][name].sign()).double().mean()
        assert agree > 0.9, (name, float(agree))


def test_an_update_below_a_retained_graph_is_noticed_by_autograd(model):
    step, forget, retain = prepared(model, recipe("graddiff", *ONE_PASS))
    step.gradients.begin(step.view().trained, step.masks)
    with step_inputs(model, weight_gradients=UpdateSink(step.gradients)):
        loss = sum(step.objectives(forget[0], retain[0]).values())
        loss.backward(retain_graph=True)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


def test_a_weight_used_twice_waits_for_both_gradients(model):
    first = model.model.layers[0].mlp
    model.model.layers[1].mlp.experts = first.experts
    step = check_against_plain(model, recipe("graddiff", *ONE_PASS, "optimizer.name=sgd", "forget.gamma=0.5"), steps=1)
    step(*(random_batch(VOCAB, seed=i) for i in (1, 2)), update=False)
    metrics = step.update()
    assert "grad_norm" in metrics


@pytest.mark.parametrize("way", ["factors", "compact"])
@pytest.mark.parametrize("value", [math.inf, math.nan])
@pytest.mark.parametrize("name", ["graddiff", "wagle", "mollm"])
@pytest.mark.slow(but=4)
def test_under_the_strict_guard_a_bad_gradient_changes_nothing(name, value, way, model):
    step, forget, retain = prepared(model, recipe(name, *WAYS[way]))
    step(forget[0], retain[0])
    before, state = weights(model), copy.deepcopy(step.optimizer.state_dict())
    hook = spoil(model, 1, value)
    with pytest.raises(NonFiniteError, match="weights unchanged") as caught:
        step(forget[1], retain[1])
    assert caught.value.updated == () and not changed(model, before)
    for old, new in zip(state["state"].values(), step.optimizer.state_dict()["state"].values(), strict=True):
        assert all(torch.equal(old[k], new[k]) for k in old if torch.is_tensor(old[k]))
    hook.remove()
    step(forget[1], retain[1])
    assert changed(model, before)


def test_in_one_pass_a_bad_gradient_stops_at_its_layer_and_names_what_was_updated(model):
    step, forget, retain = prepared(model, recipe("graddiff", *ONE_PASS))
    before = weights(model)
    spoil(model, 1)
    step.restore = lambda: model.load_state_dict(before, strict=False) and "checkpoint-0 was restored"
    upper, lower = list(experts_modules(model))[1], list(experts_modules(model))[0]
    with pytest.raises(NonFiniteError, match="updated already.*checkpoint-0 was restored") as caught:
        step(forget[0], retain[0])
    assert {name.rpartition(".")[0] for name in caught.value.updated} == {upper}
    assert f"the gradient of {lower}" in str(caught.value)
    assert not changed(model, before)
    assert not step.gradients.collected and all(p.grad is None for p in model.parameters())


def test_a_product_that_may_overflow_is_stored_and_checked_first():
    weight = torch.nn.Parameter(torch.zeros(2, 4, 4))
    store = GradientStore(MaskedSGD([weight], lr=1.0))
    store.begin([("w", weight)], {})
    sink = UpdateSink(store)
    huge = torch.full((3, 4), 1e20)
    sink.take(weight, Factors(huge, huge, torch.tensor([0, 3, 3], dtype=torch.int32)))
    assert not sink.updated and not weight.any() and not store.collected[weight].isfinite().all()


def test_the_retain_budget_stops_before_the_update(model):
    step, forget, retain = prepared(model, recipe("graddiff", "retain_budget=0.5", *ONE_PASS))
    before = weights(model)
    with pytest.raises(RetainBudgetError, match=r"retain_loss is .* above the budget of 0.5"):
        step(forget[0], retain[0])
    assert not changed(model, before) and step.steps == 0


def test_what_forbids_one_pass_is_said():
    for override, reason in {
        "guard=strict": "guard 'strict'",
        "optimizer.max_grad_norm=1.0": "max_grad_norm: null",
        "accumulate=2": "micro-batches",
        "mollm=true": "MOLLM",
    }.items():
        step = UnlearnStep(tiny_olmoe(vocab_size=VOCAB), recipe("graddiff", *ONE_PASS, override))
        assert reason in step.obstacle, override
        assert {p.way for p in paths(step.view())} <= {"compact", "factors"} and all(
            reason in p.reason for p in paths(step.view())
        )


def test_paths_below_the_lowest_trained_layer_keep_no_graph(model):
    last = list(experts_modules(model))[-1]
    name = last.replace(".", r"\.") + r"\.down_proj"
    step, forget, retain = prepared(model, recipe("graddiff", f"scope.parameters=['{name}']", "scope.kind=parameters"))
    assert [p.way for p in paths(step.view())] == ["below"] * (len(paths(step.view())) - 1) + ["factors"]
    inputs = []
    for module in experts_modules(model).values():
        module.register_forward_pre_hook(lambda m, args: inputs.append(args[0].requires_grad))
    step(forget[0], retain[0])
    assert inputs == [False] * len(inputs)


def test_a_weight_without_a_trained_bit_is_frozen(model):
    step, forget, retain = prepared(model, recipe("wagle", "wagle.keep=0.5"))
    name, p = next((n, p) for n, p in model.named_parameters() if "down_proj" in n)
    step.prepared.mask.words(name).zero_()
    step.apply_preparation()
    assert not p.requires_grad
    before = p.detach().clone()
    step(forget[0], retain[0])
    assert torch.equal(p, before) and p not in step.optimizer.state


@pytest.mark.parametrize("family", ["gpt_oss", "qwen3_moe"])
def test_biases_and_other_layouts(family):
    torch.manual_seed(1)
    model = TINY_MODELS[family](vocab_size=VOCAB).eval()
    check_against_plain(model, recipe("graddiff", "forget.gamma=0.5", "optimizer.name=sgd", *ONE_PASS), steps=1)


def test_a_compact_sink_adds_up_and_masks():
    weight = torch.nn.Parameter(torch.zeros(3, 2, 33))
    mask = torch.zeros(3, 2, 33, dtype=torch.bool)
    mask[1, 0, ::2] = True
    optimizer = MaskedSGD([weight], lr=1.0)
    optimizer.set_masks([pack_bits(mask)])
    factors = Factors(torch.ones(4, 2), torch.ones(4, 33), torch.tensor([0, 1, 4, 4], dtype=torch.int32))
    sink = CompactSink(GradientStore(optimizer))
    sink.take(weight, factors)
    sink.take(weight, factors)
    assert torch.equal(sink.store.collected[weight], torch.where(mask[1:2], 6.0, 0.0))


@pytest.mark.parametrize("sink", [CompactSink, UpdateSink, lambda store: FactorSink(store, "factors")])
def test_a_gradient_of_a_weight_that_the_step_does_not_know_is_not_lost(sink):
    known, foreign, unused = (torch.nn.Parameter(torch.zeros(1, 2, 4)) for _ in range(3))
    store = GradientStore(MaskedSGD([known], lr=1.0))
    store.begin([("known", known), ("unused", unused)], {})
    factors = Factors(torch.ones(1, 2), torch.ones(1, 4), torch.tensor([0, 1], dtype=torch.int32))
    sink(store).take(unused, factors)  # the optimizer leaves it out: its gradient is dropped on purpose
    assert not store.collected and not store.factors
    with pytest.raises(RuntimeError, match=r"a weight \[1, 2, 4\] that is no parameter of the step"):
        sink(store).take(foreign, factors)
