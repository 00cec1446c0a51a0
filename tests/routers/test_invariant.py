"""Invariant routers: the logits of retain inputs stay, whatever the optimizer, the direction and the mask."""

import copy

import pytest
import torch

from moe_unlearn import routers
from moe_unlearn.model.head import final_hidden_states
from moe_unlearn.ops.bits import unpack_bits
from moe_unlearn.optim import MaskedAdamW
from moe_unlearn.routers.watch import choices, routers_of, watched
from moe_unlearn.step import UnlearnStep
from tests.support.models import tiny_deepseek_v3, tiny_gpt_oss, tiny_olmoe
from tests.support.steps import VOCAB, data, recipe

ALL = "router={mode: invariant, energy: 1, rank: 32, margin_inputs: 4096}"
ADAMW = ("optimizer.name=adamw", "optimizer.weight_decay=0.1")


def build(family=tiny_olmoe, dtype=torch.float32):
    torch.manual_seed(0)
    return family(vocab_size=VOCAB).eval().to(dtype)


def begun(model, made, **options):
    """A prepared step with one retain batch, whose inputs leave each expert some dimensions."""
    step = UnlearnStep(model, made, **options)
    forget, retain = data()
    step.prepare(forget, retain[:1])
    return step, forget, retain[:1]


def inputs_of(model, batches):
    """Inputs and choices of every router on these batches, and the weights that made them."""
    found = {}

    def see(router, x, index):
        at = attended.flatten()
        found.setdefault(router.name, []).append((x[at].float(), choices(index[at], len(router.weight))))

    with torch.no_grad(), watched(model, routers_of(model, trained=False), see):
        for batch in batches:
            attended = batch["attention_mask"].bool()
            final_hidden_states(model, batch)
    named = dict(model.named_parameters())
    return {name: (*map(torch.cat, zip(*seen, strict=True)), named[name].detach().clone())
            for name, seen in found.items()}  # fmt: skip


def largest_move(weight, x, chosen, before):
    """The largest change of a logit that was chosen, in units of what float32 rounds away of such a product."""
    change = (x.double() @ (weight.double() - before.double()).T).abs()
    unit = torch.finfo(torch.float32).eps * x.double().norm(dim=1)[:, None] * before.double().norm(dim=1)
    return (change / unit)[chosen].max().item()


def after(step, forget, retain, steps=20):
    for i in range(steps):
        step(forget[i % len(forget)], retain[0])


@pytest.mark.parametrize("name", ["graddiff", "mollm", "wagle"])
def test_logits_of_retain_inputs_stay_to_rounding_through_adamw_and_decay(name, monkeypatch):
    moved = {}
    for how in ("invariant", "gradients alone", "free"):
        model = build()
        before = inputs_of(model, data()[1][:1])
        step, forget, retain = begun(model, recipe(name, *ADAMW, *([ALL] if how != "free" else [])))
        with monkeypatch.context() as patch:
            if how == "gradients alone":  # without the second projection
                patch.setattr(routers, "hold", lambda weight, kept: weight)
            after(step, forget, retain, 20 if how == "invariant" else 2)
        named = dict(model.named_parameters())
        moved[how] = max(largest_move(named[layer], *seen) for layer, seen in before.items())
        for layer, (_, _, weight) in before.items():
            assert not torch.equal(named[layer], weight), "the case says nothing: the router does not move"
            if name == "wagle":
                kept = unpack_bits(step.masks[layer], weight.shape[1])
                assert not kept.all() and torch.equal(named[layer][~kept], weight[~kept])
    assert moved["invariant"] < 4, moved
    assert min(moved["gradients alone"], moved["free"]) > 100, moved


def test_no_other_expert_comes_into_the_choice_of_a_retain_input():
    wrong = {}
    for how in ([ALL], []):
        model = build()
        before = inputs_of(model, data()[1][:1])
        step, forget, retain = begun(model, recipe("graddiff", *ADAMW, *how, lr=2e-2))
        after(step, forget, retain, 10)
        named = dict(model.named_parameters())
        wrong[bool(how)] = 0
        for layer, (x, chosen, _) in before.items():
            now = choices((x @ named[layer].T).topk(int(chosen[0].sum())).indices, chosen.shape[1])
            wrong[bool(how)] += int((now != chosen).any(1).sum())
    assert wrong[True] == 0 < wrong[False]


def test_gradients_have_no_part_along_kept_directions_when_mollm_looks_at_them():
    model = build()
    step, forget, retain = begun(model, recipe("mollm", ALL))
    seen = {}
    step.gradients.products, real = lambda: seen.update(sets=step.gradients.sets) or real(), step.gradients.products
    step.accumulate(forget[0], retain[0], last=True)
    step.combine()
    for name, kept in step.prepared.routers.items():
        at = [n for n, _ in step.gradients.trained].index(name)
        for objective in ("forget", "retain"):
            gradient = seen["sets"][objective][at]
            along = torch.einsum("eh,erh->er", gradient, kept.basis).abs().max()
            assert gradient.abs().max() > 0 and along < 1e-5 * gradient.norm()


def test_routers_of_a_bfloat16_model_have_float32_masters_that_keep_the_logits():
    model = build(dtype=torch.bfloat16)
    step, forget, retain = begun(model, recipe("graddiff", *ADAMW, ALL))
    before = inputs_of(model, retain)
    after(step, forget, retain, 5)
    for layer, seen in before.items():
        p = dict(model.named_parameters())[layer]
        master = step.optimizer.state[p]["master"]
        assert master.dtype == torch.float32 and torch.equal(master.bfloat16(), p)
        assert largest_move(master, *seen) < 4 and not torch.equal(p, seen[2])
    with pytest.raises(ValueError, match="needs float32 masters of model.layers.0.mlp.gate.weight, which is bfloat16"):
        own = build(dtype=torch.bfloat16)
        begun(own, recipe("graddiff", ALL), optimizer=MaskedAdamW(own.parameters(), numerics="stochastic"))


@pytest.mark.parametrize("name", ["graddiff", "wagle"])
def test_a_resumed_step_goes_on_with_the_same_bytes(name):
    made = recipe(name, *ADAMW, ALL)
    model = build()
    step, forget, retain = begun(model, made)
    after(step, forget, retain, 2)
    weights, state = copy.deepcopy(model.state_dict()), copy.deepcopy(step.state_dict())
    after(step, forget, retain, 2)
    other = build()
    other.load_state_dict(weights)
    resumed = UnlearnStep(other, made)
    resumed.load_state_dict(state)
    after(resumed, forget, retain, 2)
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in other.state_dict().items())


def test_a_verified_step_holds_the_plain_path_to_the_same_projections():
    model = build()
    step, forget, retain = begun(model, recipe("mollm", *ADAMW, ALL), verify=1)
    step(forget[0], retain[0])
    assert step.verifier.reports[0].compared and not step.verifier.reports[0].problems


@pytest.mark.parametrize("name", ["graddiff", "wagle"])
def test_a_plan_counts_what_routers_keep_and_refuses_a_mesh(name):
    step, forget, retain = begun(build(), recipe(name, "router={mode: invariant, rank: 16, margin_inputs: 8}"))
    plan = step.plan(forget, retain)
    held = [each.nbytes for each in step.routers._held.values()]
    kept = [each.basis.nbytes for each in step.prepared.routers.values()]
    assert plan.memory["kept of routers"] == sum(held) + (name == "wagle") * sum(kept)
    assert any("invariant routers keep" in note and "of sketches" in note for note in plan.notes)
    with pytest.raises(ValueError, match="router.mode invariant needs whole weights on each rank, not those of a mesh"):
        step.plan(forget, retain, mesh="fsdp=2")


def test_what_cannot_be_kept_is_refused_or_said():
    with pytest.raises(ValueError, match="needs routers that choose the largest logits; that of .* groups of experts"):
        begun(build(tiny_deepseek_v3), recipe("graddiff", ALL))
    model = build(tiny_gpt_oss)
    before = {name: p.detach().clone() for name, p in model.named_parameters() if "router.bias" in name}
    step, forget, retain = begun(model, recipe("graddiff", *ADAMW, ALL))
    step(forget[0], retain[0])
    named = dict(model.named_parameters())
    assert before and all(torch.equal(named[name], value) for name, value in before.items())
    model = build()
    step = UnlearnStep(model, recipe("graddiff", ALL))
    forget, retain = data()
    with pytest.warns(UserWarning, match=r"[0-9]+ of the 16 rows of invariant routers cannot move"):
        step.prepare(forget, retain)
    assert "rows of invariant routers cannot move" in step.plan(forget, retain).levers["router"]
