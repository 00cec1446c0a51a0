"""The unlearning step against hand-written torch, lever by lever."""

import copy
import math

import pytest
import torch

from moe_unlearn import mollm, trace
from moe_unlearn.config import shipped
from moe_unlearn.errors import NonFiniteError, NotPreparedError
from moe_unlearn.experts import enable, experts_modules
from moe_unlearn.model.batches import refusal, target_mask
from moe_unlearn.model.head import token_losses
from moe_unlearn.ops.bits import unpack_bits
from moe_unlearn.step import UnlearnStep
from moe_unlearn.testing.yardstick import Reference
from moe_unlearn.wagle import weight_mask
from tests.support.batches import random_batch
from tests.support.models import tiny_olmoe
from tests.support.steps import VOCAB, changed, check_changes, prepared, recipe, weights


@pytest.fixture
def model():
    torch.manual_seed(0)
    return tiny_olmoe(vocab_size=VOCAB).eval()


@pytest.mark.parametrize("name", shipped())
def test_every_shipped_recipe_moves_the_losses_it_means_to(name, model):
    step, forget, retain = prepared(model, recipe(name, lr=3e-3))
    first = step(forget[0], retain[0])
    for i in range(1, 9):
        last = step(forget[i % 3], retain[i % 3])
        assert all(math.isfinite(v) for v in last.values())
    last = step(forget[0], retain[0], update=False)
    assert step.steps == 9
    assert last["forget_loss"] < first["forget_loss"]


@pytest.mark.quick
def test_graddiff_with_sgd_is_what_torch_computes_by_hand(model):
    """One step in float32 as accurate as transformers' eager path, with float64 as truth."""
    forget, retain = random_batch(VOCAB, seed=5), random_batch(VOCAB, seed=6)

    def by_hand(dtype):
        own = copy.deepcopy(model).to(dtype)
        own.set_experts_implementation("eager")
        loss = -0.5 * own(**forget).loss + 2 * own(**retain).loss
        loss.backward()
        with torch.no_grad():
            for p in own.parameters():
                p -= 0.1 * p.grad
        return weights(own)

    ours, overrides = copy.deepcopy(model), ("optimizer.name=sgd", "forget.gamma=0.5", "retain.alpha=2")
    UnlearnStep(ours, recipe("graddiff", *overrides, lr=0.1))(forget, retain)
    check_changes(model, weights(ours), Reference(lambda: by_hand(torch.float32)), by_hand(torch.float64))


@pytest.mark.quick
def test_accumulated_micro_batches_equal_one_batch_when_sizes_are_given(model):
    whole = random_batch(VOCAB, rows=6, seed=3)
    parts = [{k: v[rows] for k, v in whole.items()} for rows in (slice(0, 1), slice(1, 6))]
    # GradDiff of one batch with itself would cancel at gamma 1
    made = recipe("graddiff", "optimizer.name=sgd", "forget.gamma=0.5", lr=0.1)

    def at_once(dtype):
        own = copy.deepcopy(model).to(dtype)
        UnlearnStep(own, made)(whole, whole)
        return weights(own)

    ours = copy.deepcopy(model)
    step = UnlearnStep(ours, made)
    sizes = step.sizes([(whole, whole)])
    step(parts[0], parts[0], update=False, sizes=sizes)
    assert changed(ours, weights(model)) == set()
    step(parts[1], parts[1], sizes=sizes)
    check_changes(model, weights(ours), Reference(lambda: at_once(torch.float32)), at_once(torch.float64))


@pytest.mark.quick
def test_equal_micro_batches_average(model):
    batch = random_batch(VOCAB, seed=3)
    once, twice = copy.deepcopy(model), copy.deepcopy(model)
    made = recipe("npo", "forget.objective=uce", "optimizer.name=sgd")
    UnlearnStep(once, made)(batch, batch)
    step = UnlearnStep(twice, made)
    step(batch, batch, update=False)
    step(batch, batch)
    # doubling and halving are exact in binary
    assert not changed(twice, weights(once))


@pytest.mark.quick
def test_npo_starts_at_its_known_value(model):
    step, forget, retain = prepared(model, recipe("npo"))
    # -(2 / beta) log sigmoid(0); the cached reference differs by the rounding of another batch shape
    loss = step(forget[0], retain[0], update=False)["forget_loss"]
    assert loss == pytest.approx(2 / 0.1 * math.log(2), rel=1e-4)


@pytest.mark.quick
def test_trace_offline_loss_is_the_weighted_mean(model):
    step, forget, retain = prepared(model, recipe("trace"))
    state = step.prepared
    assert state.selected.any()
    batch = retain[1]
    mask = target_mask(batch)
    given = state.token_weights.get(batch)
    assert (given[~mask] == 0).all() and given[mask].min() >= 0
    with torch.no_grad():
        per_token = token_losses(model, batch, kind="nll")
        expected = (given * per_token).sum() / mask.sum()
    got = step(forget[1], batch, update=False)["retain_loss"]
    assert got == pytest.approx(float(expected), rel=1e-5)
    assert got != pytest.approx(float(per_token.sum() / mask.sum()), rel=1e-3)


@pytest.mark.quick
@pytest.mark.parametrize("repeated", [False, True])
def test_trace_online_equals_offline_at_the_unchanged_model(repeated, model):
    """Of a router too that names an expert twice in a row, as one that looks ids up may."""
    results = []
    if repeated:
        for module in experts_modules(model).values():
            module.register_forward_pre_hook(name_twice, with_kwargs=True)
    for refresh in ("offline", "online"):
        own = copy.deepcopy(model)
        step, forget, retain = prepared(own, recipe("trace", f"trace.refresh={refresh}"))
        results.append(step(forget[0], retain[0], update=False)["retain_loss"])
        assert (step.prepared.token_weights is None) == (refresh == "online")
    assert results[0] == pytest.approx(results[1], rel=1e-5)


def name_twice(module, args, keywords):
    """Let every second token visit its first expert twice."""
    hidden, index, gates = (*args, *keywords.values())
    index = index.clone()
    index[::2, 1] = index[::2, 0]
    return (hidden, index, gates), {}


@pytest.mark.quick
def test_trace_weights_have_mean_one_and_hit_their_targets(model):
    step, forget, retain = prepared(model, recipe("trace", "trace.cap=null"))
    state = step.prepared
    masks = [target_mask(b) for b in retain]
    given = torch.cat([state.token_weights.get(b)[m] for b, m in zip(retain, masks, strict=True)]).double()
    assert float(given.mean()) == pytest.approx(1, abs=1e-6)
    f, r = state.frequencies["forget"].frequency, state.frequencies["retain"].frequency
    target = trace.calibration_target(state.frequencies["forget"], state.frequencies["retain"], 0.3)
    chosen = state.selected
    assert target[chosen].tolist() == pytest.approx((0.7 * r + 0.3 * f)[chosen].tolist())
    assert state.calibration.achieved[chosen].tolist() == pytest.approx(target[chosen].tolist(), abs=1e-5)


@pytest.mark.quick
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_wagle_leaves_masked_weights_bitwise_alone(optimizer, model):
    made = recipe("wagle", "wagle.keep=0.5", "optimizer.weight_decay=0.1", f"optimizer.name={optimizer}", lr=1e-2)
    step, forget, retain = prepared(model, made)
    before = weights(model)
    for i in range(5):
        step(forget[i % 3], retain[i % 3])
    moved = 0
    for name, p in model.named_parameters():
        kept = unpack_bits(step.masks[name], p.shape[-1]).view(p.shape)
        assert torch.equal(p[~kept], before[name][~kept]), name
        moved += int((p != before[name]).sum())
    assert 0 < moved <= 0.5 * sum(p.numel() for p in model.parameters())


def test_mollm_from_bf16_references_lowers_both_losses(model):
    """KL is rounding noise at the start and must not steer; forget and retain fall within 10 steps."""
    step, forget, retain = prepared(model, recipe("mollm", "optimizer.name=sgd", lr=0.1))
    assert step.prepared.kl_floor > 0
    first = step(forget[0], retain[0])
    assert first["lambda_kl"] == 0
    assert first["descent_forget"] < 0 and first["descent_retain"] < 0
    seen_kl = 0.0
    for _ in range(9):
        last = step(forget[0], retain[0])
        seen_kl = max(seen_kl, last["lambda_kl"])
    last = step(forget[0], retain[0], update=False)
    assert last["forget_loss"] < first["forget_loss"] and last["retain_loss"] < first["retain_loss"]


@pytest.mark.quick
def test_mollm_direction_lowers_every_masked_objective(model):
    """<g^_i, d> >= |d|^2 for the normalised, masked gradients and the direction before rescaling."""
    made = recipe("combined", "mollm.rescale=none", "mollm.normalize=unit", "mollm.kl_floor=0")
    step, forget, retain = prepared(model, made, fused=False)
    step(forget[1], retain[1])  # leave the unchanged model, where KL has no gradient
    step.accumulate(forget[0], retain[0])
    raw = {name: [None if g is None else g.clone() for g in gs] for name, gs in step.gradients.sets.items()}
    metrics = step.combine()
    kept = [unpack_bits(step.masks[name], p.shape[-1]).view(p.shape) for name, p in step.view().trained]

    def flat(gradients):
        parts = [
            torch.where(k, torch.zeros(()) if g is None else g, 0.0).flatten()
            for g, k in zip(gradients, kept, strict=True)
        ]
        return torch.cat(parts).double()

    d = flat([p.grad for _, p in step.view().trained])
    assert float(d.norm()) > 0
    for name, gradients in raw.items():
        g = flat(gradients)
        assert float(g @ d / g.norm()) >= float(d @ d) * (1 - 1e-4), name
    assert sum(metrics[f"lambda_{name}"] for name in raw) == pytest.approx(1)


@pytest.mark.quick
def test_a_stationary_point_stops(model, monkeypatch):
    step, forget, retain = prepared(model, recipe("mollm", "optimizer.weight_decay=0.1"))
    real = mollm.common_descent
    monkeypatch.setattr(
        mollm,
        "common_descent",
        lambda *a, **k: (
            real(*a, **k)._replace(stationary=True)
            if hasattr(real(*a, **k), "_replace")
            else _stationary(real(*a, **k))
        ),
    )
    before = weights(model)
    assert step(forget[0], retain[0])["stationary"] == 1
    assert not changed(model, before)


def _stationary(result):
    import dataclasses

    return dataclasses.replace(result, stationary=True)


@pytest.mark.quick
def test_scope_experts_trains_the_selected_ones_only(model):
    step, forget, retain = prepared(model, recipe("trace", "scope.kind=experts"))
    before = weights(model)
    for i in range(3):
        step(forget[i], retain[i])
    selected = step.prepared.selected
    moved = changed(model, before)
    assert moved
    for row, (name, module) in zip(selected, experts_modules(model).items(), strict=True):
        for suffix, p in module.named_parameters():
            own = f"{name}.{suffix}"
            difference = (p != before[own]).flatten(1).any(1)
            assert not difference[~row].any()
            moved.discard(own)
    assert not moved
    for p in model.parameters():
        state = step.optimizer.state.get(p, {})
        for value in state.values():
            if torch.is_tensor(value) and value.dim() == 3:
                assert len(value) <= 2, "state for experts that do not train"


@pytest.mark.quick
def test_seuf_trains_one_expert_and_its_router(model):
    step, forget, retain = prepared(model, recipe("seuf"))
    before = weights(model)
    metrics = step(forget[0], retain[0])
    assert metrics["anchor_loss"] > 0
    assert int(step.prepared.selected.sum()) == 1
    moved = changed(model, before)
    assert sum("experts" in name for name in moved) == 2 and sum("gate.weight" in n for n in moved) == 1
    assert len(moved) == 3


def test_idk_nll_is_the_nll_of_the_refusals(model):
    step, forget, retain = prepared(model, recipe("wagle", "forget.objective=idk_nll"))
    refused = refusal(forget[0])
    expected = token_losses(model, refused).sum() / target_mask(refused).sum()
    for joint in (True, False):
        value = step.objectives(forget[0], retain[0], joint=joint)["forget"]
        torch.testing.assert_close(value, expected)
    assert step.sizes([(forget[0], retain[0])])["forget"] == int(target_mask(refused).sum())
    again = weight_mask(model, [refusal(b) for b in forget], retain, keep=0.8, gamma=1.0)
    assert all(torch.equal(step.prepared.mask.packed[name], words) for name, words in again.packed.items())


@pytest.mark.quick
@pytest.mark.parametrize(
    "name", ["npo", "trace", "mollm", "wagle", "rmu", "idk_dpo", "level", "seuf", "kl_min", "undial"]
)
def test_a_step_without_its_preparation_is_an_error(name, model):
    step = UnlearnStep(model, recipe(name))
    before = weights(model)
    with pytest.raises(NotPreparedError, match="stages not run"):
        step(random_batch(VOCAB), random_batch(VOCAB))
    assert not changed(model, before)


@pytest.mark.quick
@pytest.mark.parametrize("mode", ["loss", "gradient"])
@pytest.mark.parametrize("name", ["graddiff", "mollm"])
def test_nothing_moves_when_something_is_not_finite(mode, name, model):
    step, forget, retain = prepared(model, recipe(name, "optimizer.weight_decay=0.1"))
    step(forget[0], retain[0])
    if mode == "loss":
        with torch.no_grad():
            model.model.norm.weight[3] = torch.nan
    else:
        handle = model.model.norm.weight.register_hook(lambda g: g * torch.nan)
    before = weights(model)
    with pytest.raises(NonFiniteError, match="stopped before the update"):
        step(forget[0], retain[0])
    assert all(torch.equal(p.nan_to_num(7), before[n].nan_to_num(7)) for n, p in model.named_parameters())
    assert all(p.grad is None for p in model.parameters())
    if mode == "gradient":
        handle.remove()
        step(forget[0], retain[0])


@pytest.mark.parametrize("name", ["combined", "npo", "wagle", "seuf"])
def test_resume_from_state_is_bitwise(name, model, tmp_path):
    from moe_unlearn import checkpoint

    step, forget, retain = prepared(model, recipe(name))
    step(forget[0], retain[0])
    checkpoint.commit(tmp_path, 1, {"step": step.state_dict(), "model": model.state_dict()})
    for i in (1, 2):
        step(forget[i], retain[i])

    torch.manual_seed(99)
    other = tiny_olmoe(vocab_size=VOCAB).eval()
    resumed = UnlearnStep(other, recipe(name))
    _, states = checkpoint.load(checkpoint.latest(tmp_path))
    other.load_state_dict(states["model"])
    resumed.load_state_dict(states["step"])
    assert resumed.steps == 1
    for i in (1, 2):
        resumed(forget[i], retain[i])
    assert not changed(other, weights(model))


@pytest.mark.parametrize("side", ["forget", "retain"])
@pytest.mark.parametrize("name", ["graddiff", "npo", "mollm", "wagle", "trace", "seuf", "pdu"])
def test_a_state_prepared_on_other_rows_is_refused(name, side, model):
    """Rows of which nothing is cached were exchanged without a word: GradDiff's, and those a mask was made from."""
    step, forget, retain = prepared(model, recipe(name))
    state = step.state_dict()
    step.close()
    resumed = UnlearnStep(model, recipe(name))
    resumed.load_state_dict(state)
    sides = {"forget": forget, "retain": retain}
    resumed.prepare(*sides.values())
    before = sides[side][1]
    sides[side] = [sides[side][0], before | {"labels": before["labels"].roll(1, 0)}]
    with pytest.raises(ValueError, match=r"prepare\(\), which saw|prepare\(\) saw"):
        resumed.prepare(*sides.values())


@pytest.mark.quick
def test_a_prepared_state_is_not_prepared_again(model):
    step, forget, retain = prepared(model, recipe("combined"))
    stages = []
    step.prepare(forget, retain, on_stage=stages.append)
    assert stages == []
    fresh = UnlearnStep(copy.deepcopy(model), recipe("combined"))
    fresh.prepare(forget, retain, on_stage=stages.append)
    assert stages == ["trace", "reference", "kl_floor", "wagle"]


@pytest.mark.quick
def test_state_of_another_recipe_is_refused(model):
    state = UnlearnStep(model, recipe("graddiff")).state_dict()
    with pytest.raises(ValueError, match="another recipe: forget.objective was 'ga', is 'npo'"):
        UnlearnStep(model, recipe("npo")).load_state_dict(state)


@pytest.mark.quick
def test_bad_batches_and_optimizers(model):
    step = UnlearnStep(model, recipe("graddiff"))
    good = random_batch(VOCAB)
    with pytest.raises(ValueError, match="forget batch has no 'labels'; got input_ids, attention_mask"):
        step({k: good[k] for k in ("input_ids", "attention_mask")}, good)
    with pytest.raises(ValueError, match=r"retain batch: labels must be \[B, S\] = \[4, 12\]; got \[4, 11\]"):
        step(good, good | {"labels": good["labels"][:, 1:]})
    with pytest.raises(ValueError, match="has no rows"):
        step({k: v[:0] for k, v in good.items()}, good)
    ignored = good | {"labels": torch.full_like(good["labels"], -100)}
    with pytest.raises(ValueError, match="the retain set carries no loss"):
        step.prepare([good], [ignored])
    with pytest.raises(TypeError, match="must be a MaskedSGD or MaskedAdamW; got SGD"):
        UnlearnStep(model, recipe("graddiff"), torch.optim.SGD(model.parameters(), lr=1))
    with pytest.raises(RuntimeError, match="nothing accumulated"):
        step.update()
    with pytest.raises(ValueError, match="idk_input_ids"):
        UnlearnStep(model, recipe("idk_dpo")).prepare([good], [good])


@pytest.mark.quick
def test_unseen_rows_are_named(model):
    step, forget, retain = prepared(model, recipe("trace"))
    with pytest.raises(ValueError, match="TRACE token weights: rows .* not seen by prepare"):
        step(forget[0], random_batch(VOCAB, seed=4242))


@pytest.mark.quick
def test_close_gives_the_model_back(model):
    model.get_input_embeddings().weight.requires_grad_(False)
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    implementation = model.config._experts_implementation
    step = UnlearnStep(model, recipe("rmu"))
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        "model.layers.0.mlp.experts.down_proj",
        "model.layers.1.mlp.experts.down_proj",
    }
    step.close()
    assert flags == {n: p.requires_grad for n, p in model.named_parameters()}
    assert model.config._experts_implementation == implementation


@pytest.mark.quick
def test_a_closed_step_makes_no_step(model):
    step, forget, retain = prepared(model, recipe("graddiff"))
    step.close()
    step.close()
    before = weights(model)
    for call in (step, step.accumulate):
        with pytest.raises(RuntimeError, match="the step is closed, .* make another UnlearnStep"):
            call(forget[0], retain[0])
    for call in (step.prepare, step.plan):
        with pytest.raises(RuntimeError, match="the step is closed"):
            call(forget, retain)
    assert changed(model, before) == set() and not any(p.grad is not None for p in model.parameters())
    assert step.state_dict()["steps"] == 0
    UnlearnStep(model, recipe("graddiff"))(forget[0], retain[0])
    assert changed(model, before)


@pytest.mark.quick
def test_what_is_of_another_kind_is_named(model):
    batch = random_batch(VOCAB)
    step = UnlearnStep(model, recipe("graddiff").to_dict())
    assert step.recipe == recipe("graddiff")
    for call in (step.prepare, step.plan):
        with pytest.raises(
            TypeError, match=r"expected the forget batches, in a list .*; got one batch: give \[forget_"
        ):
            call(batch, batch)
        with pytest.raises(TypeError, match="expected the retain batches, .*; got NoneType"):
            call([batch], None)
        with pytest.raises(TypeError, match="the retain batch must be a mapping of tensors, .*; got str"):
            call([batch], ["text"])
    with pytest.raises(TypeError, match="the forget batch must be a mapping of tensors, .*; got list"):
        step([batch], batch)
    for wrong in ("folder", [model], None):
        for take in (enable, lambda model: UnlearnStep(model, "npo")):
            with pytest.raises(TypeError, match=f"model: expected a torch module, .*; got {type(wrong).__name__}"):
                take(wrong)
    with pytest.raises(TypeError, match="recipe: expected a Recipe, a mapping .*; got NoneType"):
        UnlearnStep(model, None)


@pytest.mark.quick
@pytest.mark.parametrize("name", ["npo", "combined"])
def test_adapters_learn_and_the_weights_under_them_stay(model, name):
    peft = pytest.importorskip("peft")
    experts = [n for n, _ in model.named_parameters() if ".experts." in n]
    settings = peft.LoraConfig(r=2, target_modules=["q_proj"], target_parameters=experts, init_lora_weights=False)
    wrapped = peft.get_peft_model(model, settings)
    before = weights(wrapped)
    step, forget, retain = prepared(wrapped, recipe(name))
    step(forget[0], retain[0])
    assert changed(wrapped, before) == {n for n in before if "lora_" in n}
    with pytest.raises(ValueError, match=r"nothing to train: .* \('parameters'\) is frozen"):
        UnlearnStep(wrapped, recipe("rmu"))


@pytest.mark.quick
@pytest.mark.slow
def test_plan_is_readable_and_counts(model):
    step, forget, retain = prepared(model, recipe("combined"))
    plan = step.plan()
    assert plan.trained < plan.weights == sum(p.numel() for p in model.parameters())
    assert plan.trained == pytest.approx(step.prepared.mask.fraction * plan.weights)
    text = str(plan)
    for word in ("trace", "wagle", "mollm", "gradients", "optimizer state", "reference caches", "MiB"):
        assert word in text
    assert all(size > 0 for size in plan.memory.values())
