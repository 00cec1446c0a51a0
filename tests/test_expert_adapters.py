"""Adapters on experts without the dense sum: exact beside PEFT's own way, and PEFT's way where that is asked for."""

import copy

import pytest
import torch

from moe_unlearn import UnlearnStep
from moe_unlearn.config import Recipe
from moe_unlearn.experts import enable
from moe_unlearn.model.adapters import adapted
from moe_unlearn.ops import ExpertLayout, ExpertWeights, Gate, expert_mlp_ref, low_rank, route
from moe_unlearn.ops.low_rank import LowRank, low_rank_mlp
from tests.support.batches import random_batch
from tests.support.models import tiny_olmoe

pytestmark = pytest.mark.quick
LORA = {"adapter": {"r": 4, "targets": "experts"}}


def operands(dtype, *, rank, transposed, gated, bias):
    torch.manual_seed(0)
    experts, hidden, inner = 5, 16, 24
    wide = inner * 2 if gated else inner
    sizes = {"up": (wide, hidden), "down": (hidden, inner)}
    weights, changes = [], []
    for out, into in sizes.values():
        n, m = (into, out) if transposed else (out, into)
        weights.append(torch.randn(experts, n, m, dtype=dtype) / 4)
        left = torch.randn(n, rank, experts, dtype=dtype).permute(2, 0, 1)  # as PEFT's: not contiguous
        right = torch.randn(experts, rank, m, dtype=dtype)
        changes.append(LowRank(left.requires_grad_(), right.requires_grad_(), 0.7))
    biases = [torch.randn(experts, out, dtype=dtype) if bias else None for out, _ in sizes.values()]
    layout = ExpertLayout(Gate("silu"), transposed, False, gated)
    return ExpertWeights(*weights, *biases), changes, layout


def both(dtype, *, here=slice(None), only=(0, 1), **kind):
    """Return output and gradients of the layer and of the one whose weights are the dense sum."""
    weights, changes, layout = operands(dtype, **kind)
    changes = [change if i in only else None for i, change in enumerate(changes)]
    torch.manual_seed(1)
    x = torch.randn(11, 16, dtype=dtype, requires_grad=True)
    routing_weights = torch.rand(11, 3, dtype=dtype, requires_grad=True)
    index = torch.rand(11, 5).argsort(1)[:, :3]
    index[here] = 5  # an expert that is not here
    index = index if here != slice(None) else torch.rand(11, 4).argsort(1)[:, :3]  # the last expert gets no row
    routed = x, routing_weights, *(getattr(route(index, 5), name) for name in ("sorted_rows", "expert_offsets"))
    leaves = [x, routing_weights, *(t for c in changes if c for t in (c.left, c.right))]
    dense = [w if c is None else w + c.scale * c.left @ c.right for w, c in zip(weights[:2], changes, strict=True)]
    made = []
    for out in (
        low_rank_mlp(*routed, weights, *changes, layout=layout),
        expert_mlp_ref(*routed, ExpertWeights(*dense, *weights[2:]), layout=layout),
    ):
        made.append([out, *torch.autograd.grad((out * torch.linspace(-1, 1, 16, dtype=dtype)).sum(), leaves)])
    return made


@pytest.mark.parametrize("rank", [1, 8])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_layer_and_gradients_are_those_of_the_dense_sum(rank, transposed, gated, bias):
    ours, dense = both(torch.float64, rank=rank, transposed=transposed, gated=gated, bias=bias)
    for mine, theirs in zip(ours, dense, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("only,rank", [((0,), 3), ((1,), 3), ((0, 1), 4)])
@pytest.mark.parametrize("here", [slice(None), slice(2, 7)])
def test_float32_takes_the_grouped_product(only, rank, here, monkeypatch):
    monkeypatch.setattr(low_rank, "grouped_linear", lambda *_: pytest.fail("a loop over experts"))
    ours, dense = both(torch.float32, rank=rank, transposed=False, gated=True, bias=True, only=only, here=here)
    for mine, theirs in zip(ours, dense, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=2e-4, atol=2e-4)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(3)
    made = adapted(tiny_olmoe().eval(), Recipe.from_dict(LORA))
    for name, p in made.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.3)
    return made


def gradients(model, batch):
    model.zero_grad()
    model(**batch).loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def test_a_model_has_pefts_gradients_and_no_dense_weight(model, monkeypatch):
    own, batch = copy.deepcopy(model), random_batch(64)
    dense = gradients(own, batch)
    with enable(own):
        monkeypatch.setattr(torch, "baddbmm", lambda *_, **__: pytest.fail("PEFT's dense sum"))
        lean = gradients(own, batch)
        monkeypatch.undo()
    assert lean.keys() == dense.keys() and all("lora_" in name for name in lean)
    for name, grad in lean.items():
        torch.testing.assert_close(grad, dense[name], rtol=2e-3, atol=1e-6)


def test_copies_other_implementations_and_two_adapters_take_what_is_theirs(model):
    own, batch = copy.deepcopy(model), random_batch(64)
    expected = own(**batch).logits
    switch = enable(own)
    twin = copy.deepcopy(own)
    torch.nn.init.zeros_(next(p for n, p in own.named_parameters() if "lora_B" in n))
    torch.testing.assert_close(twin(**batch).logits, expected, rtol=1e-4, atol=1e-5)  # of its own factors
    own = copy.deepcopy(twin)
    own.set_experts_implementation("eager")
    torch.testing.assert_close(own(**batch).logits, expected, rtol=1e-4, atol=1e-5)
    with own.disable_adapter():
        assert not torch.allclose(own(**batch).logits, expected, rtol=1e-3)
    switch.disable()
    switch.disable()


def test_disable_gives_pefts_way_back(model):
    own = copy.deepcopy(model)
    with enable(own):
        enable(own).disable()  # which leaves what another one has switched
        assert any("_activate_lora" in vars(m) for m in own.modules())
    assert not any("_activate_lora" in vars(m) for m in own.modules())


def test_a_step_recomputes_under_checkpoints_and_mollm(model):
    forget, retain = random_batch(64, seed=1), random_batch(64, seed=2)
    for name, checkpointing in (("mollm", False), ("graddiff", True)):
        own = copy.deepcopy(model)
        if checkpointing:
            own.gradient_checkpointing_enable({"use_reentrant": False})
            own.train()
        step = UnlearnStep(own, Recipe.load(name, ["optimizer.name=sgd", "optimizer.lr=0.1"]), verify=True)
        step.prepare([forget], [retain])
        before = {n: p.detach().clone() for n, p in own.named_parameters()}
        step(forget, retain)
        moved = {n for n, p in own.named_parameters() if not torch.equal(p, before[n])}
        assert moved == {n for n in before if "lora_" in n}
