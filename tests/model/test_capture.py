"""Routing capture: every layer, every implementation, padding out, a checkpoint's recompute never twice."""

import pytest
import torch

from moe_unlearn.experts import experts_modules
from moe_unlearn.model.batches import target_mask
from moe_unlearn.model.capture import collect_routing, evaluation_mode, routing_capture
from tests.support.batches import random_batch
from tests.support.models import TINY_MODELS, tiny_olmoe

VOCAB = 64


@pytest.fixture
def model():
    torch.manual_seed(0)
    return tiny_olmoe(vocab_size=VOCAB).eval()


def run(model, batch):
    return model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)


def expected_routing(model, batch):
    """The router's own top-K, from the hidden states that stand before each experts module."""
    seen = []
    routers = [m for n, m in model.named_modules() if n.endswith("mlp.gate")]
    handles = [r.register_forward_hook(lambda module, args, out: seen.append(out[-1])) for r in routers]
    with torch.no_grad():
        run(model, batch)
    for handle in handles:
        handle.remove()
    return torch.stack(seen)


def hits(model, batch, mask):
    """The top-K hits [L, E] over the positions in `mask`."""
    group = torch.where(mask.flatten(), 0, -1).int()
    with torch.no_grad(), evaluation_mode(model), routing_capture(model, group=group) as capture:
        run(model, batch)
    return capture.counts


def counted(index, mask, num_experts):
    return torch.stack([torch.bincount(i[mask.flatten()].flatten(), minlength=num_experts) for i in index])


@pytest.mark.quick
def test_ids_are_the_routers(model):
    batch = random_batch(VOCAB)
    index = collect_routing(model, batch)
    assert index.dtype == torch.int64 and index.shape == (2, batch["input_ids"].numel(), 2)
    assert torch.equal(index, expected_routing(model, batch))


@pytest.mark.quick
def test_counts_leave_out_what_the_mask_leaves_out(model):
    batch = random_batch(VOCAB)
    mask = target_mask(batch)
    counts = hits(model, batch, mask)
    assert torch.equal(counts, counted(collect_routing(model, batch), mask, 8))
    assert counts.dtype == torch.int64 and counts.sum(1).tolist() == [2 * int(mask.sum())] * 2
    assert 0 < int(mask.sum()) < int(batch["attention_mask"].sum())


@pytest.mark.quick
@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "moe_unlearn"])
def test_every_experts_implementation_is_seen(model, implementation):
    batch = random_batch(VOCAB)
    reference = collect_routing(model, batch)
    model.set_experts_implementation(implementation)
    index = collect_routing(model, batch)
    assert torch.equal(index[0], reference[0])  # later layers may differ by rounding at a tie
    assert index.shape == reference.shape


@pytest.mark.parametrize("family", TINY_MODELS)
def test_every_family(family):
    torch.manual_seed(0)
    model = TINY_MODELS[family](VOCAB).eval()
    batch = random_batch(VOCAB)
    mask = target_mask(batch)
    counts = hits(model, batch, mask)
    modules = list(experts_modules(model).values())
    assert counts.shape == (len(modules), modules[0].num_experts)
    assert torch.equal(counts, counted(collect_routing(model, batch), mask, modules[0].num_experts))
    assert len(set(counts.sum(1).tolist())) == 1


@pytest.mark.quick
def test_groups_count_apart_and_ignored_positions_nowhere(model):
    batch = random_batch(VOCAB)
    group = torch.arange(batch["input_ids"].numel()) % 3 - 1
    with torch.no_grad(), routing_capture(model, group=group, num_groups=2, keep_index=True) as capture:
        run(model, batch)
    assert capture.counts.shape == (2, 2, 8)
    for g in (0, 1):
        assert torch.equal(capture.counts[:, g], counted(capture.top_k_index, group == g, 8))


@pytest.mark.quick
def test_forward_passes_add_up(model):
    batches = [random_batch(VOCAB, seed=1), random_batch(VOCAB, rows=2, length=7, seed=2)]
    with torch.no_grad(), routing_capture(model, keep_index=True) as capture:
        for batch in batches:
            capture.group = torch.where(target_mask(batch).flatten(), 0, -1)
            run(model, batch)
    assert torch.equal(capture.counts, sum(hits(model, b, target_mask(b)) for b in batches))
    assert torch.equal(capture.top_k_index, torch.cat([collect_routing(model, b) for b in batches], 1))
    run(model, batches[0])  # the context is over: nothing more is counted
    assert torch.equal(capture.counts, sum(hits(model, b, target_mask(b)) for b in batches))


@pytest.mark.quick
@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpoints_recompute_is_not_counted(model, reentrant):
    batch = random_batch(VOCAB)
    everything = torch.ones_like(target_mask(batch))
    expected = hits(model, batch, everything)
    model.train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    calls = []
    first = next(iter(experts_modules(model).values()))
    first.register_forward_pre_hook(lambda *a: calls.append(1))
    with routing_capture(model) as capture:
        for _ in range(2):
            model(**batch).loss.backward()
    assert len(calls) == 4, "the recompute must have run, or this test shows nothing"
    assert torch.equal(capture.counts, 2 * expected)


@pytest.mark.quick
def test_peft_wrapped_models():
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    model = tiny_olmoe(vocab_size=VOCAB).eval()
    batch = random_batch(VOCAB)
    expected = collect_routing(model, batch)
    parameters = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], target_parameters=parameters)
    wrapped = peft.get_peft_model(model, config)
    # fresh adapters are zero: the routing must not change
    assert torch.equal(collect_routing(wrapped, batch), expected)
    assert len(experts_modules(wrapped)) == 2


@pytest.mark.quick
def test_modes_come_back_module_by_module(model):
    model.train()
    model.model.layers[0].eval()
    flags = {m: m.training for m in model.modules()}
    config = model.config.output_router_logits
    collect_routing(model, random_batch(VOCAB))
    assert flags == {m: m.training for m in model.modules()}
    assert model.config.output_router_logits == config
    with pytest.raises(ZeroDivisionError), evaluation_mode(model):
        assert not any(m.training for m in model.modules())
        raise ZeroDivisionError
    assert flags == {m: m.training for m in model.modules()}


@pytest.mark.quick
def test_hooks_go_away(model):
    with pytest.raises(ZeroDivisionError), routing_capture(model):
        raise ZeroDivisionError
    assert not any(m._forward_pre_hooks for m in experts_modules(model).values())


@pytest.mark.quick
def test_an_experts_module_that_is_bypassed_is_named(model, monkeypatch):
    batch = random_batch(VOCAB)
    mlp = model.model.layers[1].mlp
    # a kernel that replaces the whole block
    monkeypatch.setattr(mlp, "forward", lambda hidden_states: hidden_states)
    with pytest.raises(RuntimeError, match=r"layers\.1\.mlp\.experts \(1 of 2.*bypassed"):
        collect_routing(model, batch)
    with routing_capture(model) as capture:
        pass
    with pytest.raises(RuntimeError, match="no forward pass ran inside the context"):
        _ = capture.counts


@pytest.mark.quick
def test_bad_input_is_named(model):
    with (
        pytest.raises(ValueError, match="Linear has no Mixture-of-Experts layers"),
        routing_capture(torch.nn.Linear(2, 2)),
    ):
        pass
    with (
        pytest.raises(ValueError, match="48 tokens but group has 5"),
        routing_capture(model, group=torch.zeros(5, dtype=torch.int64)),
    ):
        run(model, random_batch(VOCAB))
    with routing_capture(model) as capture:
        run(model, random_batch(VOCAB))
    with pytest.raises(RuntimeError, match="keep_index=True"):
        _ = capture.top_k_index
    experts_modules(model)["model.layers.1.mlp.experts"].num_experts = 9
    with pytest.raises(ValueError, match="different numbers of experts.*9"), routing_capture(model):
        pass
