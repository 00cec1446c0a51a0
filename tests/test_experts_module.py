"""The experts module by itself: layout flags, probed gates, delegation, sentinels, the inputs of a step."""

import copy
import warnings
from operator import itemgetter

import pytest
import torch
from transformers import PreTrainedConfig
from transformers.integrations.finegrained_fp8 import ALL_FP8_EXPERTS_FUNCTIONS
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, use_experts_implementation

from moe_unlearn.experts import NAME, enable, experts_modules, step_inputs
from moe_unlearn.ops import Gate
from moe_unlearn.testing import ROUTINGS, assert_as_accurate, poison, routing
from moe_unlearn.testing.yardstick import Reference
from tests.support.batches import random_batch
from tests.support.models import tiny_gpt_oss, tiny_olmoe

HIDDEN, INNER, EXPERTS = 32, 24, 4


def module_like(act_fn=torch.nn.functional.silu, apply_gate=None, num_experts=EXPERTS, **flags):
    """A synthetic experts module with the given layout flags; its eager forward is a loop over experts."""
    gated, bias = flags.get("has_gate", True), flags.get("has_bias", False)
    transposed, interleaved = flags.get("is_transposed", False), not flags.get("is_concatenated", True)

    class Experts(torch.nn.Module):
        def __init__(self, config):
            super().__init__()
            self.num_experts = num_experts
            wide = 2 * INNER if gated else INNER
            shapes = [(num_experts, wide, HIDDEN), (num_experts, HIDDEN, INNER)]
            for name, (e, out, inp) in zip(("gate_up_proj" if gated else "up_proj", "down_proj"), shapes, strict=True):
                weight = torch.randn((e, inp, out) if transposed else (e, out, inp)) / inp**0.5
                self.register_parameter(name, torch.nn.Parameter(weight))
                if bias:
                    self.register_parameter(f"{name}_bias", torch.nn.Parameter(torch.randn(e, out)))
            self.act_fn = act_fn

        def forward(self, hidden_states, top_k_index, top_k_weights):
            out = torch.zeros_like(hidden_states)
            for e in range(num_experts):
                token, k = torch.where(top_k_index == e)
                y = hidden_states[token]
                for name in ("gate_up_proj" if gated else "up_proj", "down_proj"):
                    weight = getattr(self, name)[e]
                    b = getattr(self, f"{name}_bias")[e] if bias else None
                    y = torch.nn.functional.linear(y, weight.t() if transposed else weight, b)
                    if name != "down_proj":
                        y = self._apply_gate(y) if gated else self.act_fn(y)
                out = out.index_add(0, token, (y * top_k_weights[token, k, None]).to(out.dtype))
            return out

    if apply_gate is not None:
        Experts._apply_gate = apply_gate
    elif interleaved:
        Experts._apply_gate = lambda self, z: self.act_fn(z[..., ::2]) * z[..., 1::2]
    torch.manual_seed(0)
    return use_experts_implementation(**flags)(Experts)(config_like())


def config_like(**fields):
    config = PreTrainedConfig(**fields)
    config._experts_implementation = NAME
    return config


def call(module, implementation, index, dtype=torch.float32, wide=False):
    """Output and every gradient under a random upstream gradient; `wide` computes them in float64."""
    own = copy.deepcopy(module).to(dtype)
    own.config._experts_implementation = implementation
    generator = torch.Generator().manual_seed(len(index))
    hidden, upstream = (torch.randn(len(index), HIDDEN, generator=generator).to(dtype) for _ in range(2))
    weights = (torch.rand(index.shape, generator=generator) + 0.1).to(dtype)
    if wide:
        own, hidden, upstream, weights = (v.double() for v in (own, hidden, upstream, weights))
    leaves = [hidden.requires_grad_(), weights.requires_grad_(), *own.parameters()]
    out = own(hidden, index, weights)
    grads = torch.autograd.grad(out, leaves, upstream, allow_unused=True)
    return [out.detach(), *(torch.zeros_like(x) if g is None else g for g, x in zip(grads, leaves, strict=True))]


def check_in_float64(module, index):
    """To the last digits of float32: for so few rows that two roundings say little about each other."""
    ours = call(module, NAME, index, wide=True)
    gold = call(module, "eager", index, wide=True)
    for i, (a, b) in enumerate(zip(ours, gold, strict=True)):
        assert_as_accurate(a.float(), b.float(), b, name=f"result {i}")


def check(module, index, dtype=torch.float32):
    ours, reference = call(module, NAME, index, dtype), Reference(lambda: call(module, "eager", index, dtype))
    gold = call(module, "eager", index, dtype, wide=True)
    for i, (mine, truth) in enumerate(zip(ours, gold, strict=True)):
        assert_as_accurate(mine, reference.baseline(itemgetter(i)), truth, name=f"result {i}")


FLAGS = {
    "plain": {},
    "bias": {"has_bias": True},
    "transposed": {"is_transposed": True},
    "interleaved": {"is_concatenated": False},
    "transposed, interleaved, bias": {"is_transposed": True, "is_concatenated": False, "has_bias": True},
    "no gate": {"has_gate": False},
    "no gate, bias": {"has_gate": False, "has_bias": True},
    "no gate, transposed, bias": {"has_gate": False, "is_transposed": True, "has_bias": True},
}


@pytest.mark.quick
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("top_k", [1, 3])
@pytest.mark.parametrize("flags", FLAGS.values(), ids=FLAGS)
def test_layout_flags_equal_eager(flags, top_k, dtype):
    check(module_like(**flags), routing("uniform", 43, EXPERTS, top_k), dtype)


@pytest.mark.quick
@pytest.mark.parametrize("pattern", ROUTINGS)
def test_routing_patterns_equal_eager(pattern):
    check_in_float64(module_like(has_bias=True, num_experts=7), routing(pattern, 43, 7, 2))


@pytest.mark.quick
@pytest.mark.parametrize("rows", [0, 1])
@pytest.mark.parametrize("flags", FLAGS.values(), ids=FLAGS)
def test_no_row_and_one_row(flags, rows):
    check_in_float64(module_like(**flags), routing("uniform", rows, EXPERTS, 2))


@pytest.mark.quick
@pytest.mark.parametrize("expert_parallel", [False, True])
def test_sentinels_with_nan_in_everything_that_belongs_to_them(expert_parallel):
    """Ids at and above num_experts are not on this rank; their weights and rows may hold anything."""
    module = module_like()
    module._is_expert_parallel = expert_parallel
    index = torch.tensor([[0, 4], [4, 4], [3, 1], [9, 2]])
    away = index >= 4
    weights, hidden = torch.rand(4, 2), torch.randn(4, HIDDEN)
    clean = module(hidden, index, weights.masked_fill(away, 0.0))
    hidden[1] = torch.nan
    hidden, dirty = hidden.requires_grad_(), weights.masked_fill(away, torch.nan).requires_grad_()
    with torch.no_grad():
        module.gate_up_proj[0, 0, 0] += 0  # expert 0 is used
    with poison():
        out = module(hidden, index, dirty)
        grads = torch.autograd.grad(out, [hidden, dirty, *module.parameters()], torch.randn(4, HIDDEN))
    assert torch.equal(out, clean) and (out[1] == 0).all()
    assert all(g.isfinite().all() for g in grads)
    assert (grads[0][1] == 0).all() and (grads[1][away] == 0).all()


@pytest.mark.quick
def test_an_expert_without_rows_may_hold_nan():
    module = module_like()
    index = torch.tensor([[0, 1], [1, 3]])
    with torch.no_grad():
        for p in module.parameters():
            p[2] = torch.nan
    out = module(torch.randn(2, HIDDEN), index, torch.rand(2, 2))
    out.sum().backward()
    assert out.isfinite().all()
    for p in module.parameters():
        assert (p.grad[2] == 0).all() and p.grad.isfinite().all() and (p.grad[[0, 1, 3]] != 0).any()


def silu(self, z):
    gate, up = z.chunk(2, -1)
    return torch.nn.functional.silu(gate) * up


def clamped_swiglu(limit):
    def gate_of(self, z):
        gate, up = z.chunk(2, -1)
        return torch.nn.functional.silu(gate.clamp(max=limit)) * up.clamp(-limit, limit)

    return gate_of


def clamped_after_silu(limit):
    def gate_of(self, z):
        gate, up = z.chunk(2, -1)
        return torch.nn.functional.silu(gate).clamp(max=limit) * up.clamp(-limit, limit)

    return gate_of


def clamped_up_only(limit):
    def gate_of(self, z):
        gate, up = z.chunk(2, -1)
        return torch.nn.functional.silu(gate) * up.clamp(-limit, limit)

    return gate_of


ACTIVATIONS = {
    "silu": torch.nn.functional.silu,
    "gelu": torch.nn.functional.gelu,
    "gelu_tanh": torch.nn.GELU(approximate="tanh"),
    "relu": torch.relu,
    "relu2": lambda x: x.relu().square(),
}


@pytest.mark.quick
@pytest.mark.parametrize("flags", [{}, {"has_gate": False}, {"is_concatenated": False}], ids=str)
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_known_activations_are_recognised_and_computed(name, flags):
    module = module_like(ACTIVATIONS[name], **flags)
    check(module, routing("uniform", 43, EXPERTS, 2))
    enable(module)
    assert module._moe_unlearn.gate == Gate(name)


@pytest.mark.quick
@pytest.mark.parametrize("limit,alpha", [(7.0, 1.702), (3.0, 1.0), (5.5, 2.25), (7, 1.5), (3e4, 1.702)])
def test_a_gate_is_recognised_by_what_it_computes(limit, alpha):
    module = next(iter(experts_modules(tiny_gpt_oss()).values()))
    module.limit, module.alpha = limit, alpha
    enable(module)
    assert module._moe_unlearn.gate == Gate("silu", alpha, limit, 1.0)
    check(module, routing("uniform", 43, 4, 2))


@pytest.mark.quick
def test_misleading_attributes_do_not_mislead():
    module = module_like()
    module.alpha, module.limit = 1.702, 7.0  # the attributes of gpt-oss, the formula of SwiGLU
    enable(module)
    assert module._moe_unlearn.gate == Gate()
    check(module, routing("uniform", 43, EXPERTS, 2))


@pytest.mark.quick
def test_the_layout_of_the_gate_is_probed_too():
    """A flag that contradicts the gate: transformers' own functions follow the gate."""
    module = module_like(is_concatenated=False, apply_gate=silu)
    check(module, routing("uniform", 43, EXPERTS, 2))


@pytest.mark.quick
def test_clamped_swiglu():
    module = module_like(apply_gate=clamped_swiglu(0.5))
    module.swiglu_limit = 0.5
    enable(module)
    assert module._moe_unlearn.gate == Gate("silu", 1.0, 0.5)
    check(module, routing("uniform", 43, EXPERTS, 2))


def own_parameter(self, z):
    gate, up = z.chunk(2, -1)
    return torch.nn.functional.silu(gate) * up * self.scale


def per_channel(self, z):
    gate, up = z.chunk(2, -1)
    return torch.nn.functional.silu(gate) * up * torch.ones(INNER)


FOREIGN = {
    "a formula of its own": (lambda self, z: z.chunk(2, -1)[0].sin() * z.chunk(2, -1)[1], "none of the known"),
    "clamped after silu": (clamped_after_silu(7.0), "none of the known"),
    "clamped far out at a number unknown": (clamped_swiglu(3e4), "none of the known"),
    "up clamped alone": (clamped_up_only(7.0), "none of the known"),
    "one sign": (lambda self, z: z.chunk(2, -1)[0].abs() * z.chunk(2, -1)[1], "none of the known"),
    "a parameter": (own_parameter, "parameters of its own"),
    "a fixed width": (per_channel, "fails on a probe"),
}


@pytest.mark.quick
@pytest.mark.parametrize("gate,reason", FOREIGN.values(), ids=FOREIGN)
def test_a_foreign_gate_is_delegated(gate, reason):
    module = module_like(apply_gate=gate)
    module.limit, module.scale = 7.0, torch.nn.Parameter(torch.ones(()))
    index = routing("uniform", 20, EXPERTS, 2)
    with pytest.warns(UserWarning, match=f"Experts: its activation .*{reason}.*run on 'grouped_mm'"):
        ours = call(module, NAME, index)
    for a, b in zip(ours, call(module, "grouped_mm", index), strict=True):
        assert torch.equal(a, b)


def warned(run):
    """What a user sees: the warnings of `run` under Python's default filter."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("default")
        run()
    return [w for w in seen if issubclass(w.category, UserWarning) and "moe_unlearn" in str(w.message)]


@pytest.mark.quick
def test_delegation_warns_once_for_all_layers_and_passes():
    model = tiny_olmoe(implementation=NAME).eval()
    for module in experts_modules(model).values():
        module._apply_gate = lambda z: z.chunk(2, -1)[0].sin() * z.chunk(2, -1)[1]
    ids = torch.randint(3, 64, (1, 4))
    assert len(warned(lambda: [model(ids), model(ids)])) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(ids)


@pytest.mark.quick
def test_a_norm_after_the_experts_is_delegated():
    module = module_like(has_post_expert_norm=True)
    module.post_expert_norm = torch.nn.LayerNorm(HIDDEN)
    index = routing("uniform", 20, EXPERTS, 2)
    with pytest.warns(UserWarning, match="normalises after each expert"):
        ours = call(module, NAME, index)
    for a, b in zip(ours, call(module, "grouped_mm", index), strict=True):
        assert torch.equal(a, b)


@pytest.mark.quick
@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn], ids=str)
def test_quantised_weights_are_delegated(dtype, monkeypatch):
    calls = []
    monkeypatch.setitem(ALL_EXPERTS_FUNCTIONS._global_mapping, "grouped_mm", lambda self, x, *a: calls.append(1) or x)
    module = module_like()
    for name in ("gate_up_proj", "down_proj"):
        weight = torch.zeros_like(getattr(module, name)).to(dtype)
        setattr(module, name, torch.nn.Parameter(weight, requires_grad=False))
    x = torch.randn(3, HIDDEN)
    with pytest.warns(UserWarning, match=f"its weights are {dtype}"):
        assert module(x, torch.zeros(3, 1, dtype=torch.int64), torch.ones(3, 1)) is x
    assert calls == [1]


@pytest.mark.quick
def test_transformers_fp8_experts_are_delegated_to_their_own_function(monkeypatch):
    monkeypatch.setitem(ALL_FP8_EXPERTS_FUNCTIONS._global_mapping, "grouped_mm", lambda self, x, *a: x + 1)
    module = module_like(experts_interface=ALL_FP8_EXPERTS_FUNCTIONS)
    for name in ("gate_up_proj", "down_proj"):
        weight = getattr(module, name).detach().to(torch.float8_e4m3fn)
        setattr(module, name, torch.nn.Parameter(weight, requires_grad=False))
    counts = torch.zeros(1, 1, EXPERTS, dtype=torch.int64)
    x = torch.zeros(2, HIDDEN)
    with step_inputs(torch.nn.ModuleList([module]), tokens_per_expert=counts):
        with pytest.warns(UserWarning, match="its weights are torch.float8_e4m3fn"):
            assert torch.equal(module(x, torch.tensor([[1], [3]]), torch.ones(2, 1)), x + 1)
    assert counts.flatten().tolist() == [0, 1, 0, 1]


@pytest.fixture
def model():
    torch.manual_seed(0)
    return tiny_olmoe(implementation=NAME).eval()


def inputs_of(model):
    return [m._moe_unlearn.inputs for m in experts_modules(model).values()]


@pytest.mark.quick
def test_step_inputs_count_weigh_and_are_cleared(model):
    batch = random_batch(64)
    tokens = batch["input_ids"].numel()
    group = (torch.arange(tokens) % 3).int() - 1
    counts = torch.zeros(2, 2, 8, dtype=torch.int64)
    tilt, log_weight = torch.randn(2, 8), torch.zeros(tokens)
    seen = []
    for module in experts_modules(model).values():
        module.register_forward_pre_hook(lambda module, args: seen.append(args[1]))
    with step_inputs(model, group=group, num_groups=2, log_tilt=tilt, log_weight=log_weight, tokens_per_expert=counts):
        model(batch["input_ids"], use_cache=False)
    expected = torch.zeros(tokens)
    for row, index in zip(tilt, seen, strict=True):
        for k in range(2):
            expected += row[index[:, k]]
    assert torch.equal(log_weight, expected)
    for layer, index in enumerate(seen):
        for g in (0, 1):
            assert torch.equal(counts[layer, g], torch.bincount(index[group == g].flatten(), minlength=8))
    assert inputs_of(model) == [None, None]
    with pytest.raises(KeyError), step_inputs(model):
        raise KeyError
    assert inputs_of(model) == [None, None]


@pytest.mark.quick
@pytest.mark.parametrize("inside", [True, False], ids=["backward inside", "backward outside"])
@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpoints_recompute_counts_nothing_twice(model, reentrant, inside):
    batch = random_batch(64)
    model.train().gradient_checkpointing_enable({"use_reentrant": reentrant})
    calls = []
    next(iter(experts_modules(model).values())).register_forward_pre_hook(lambda *a: calls.append(1))
    log_weight = torch.zeros(batch["input_ids"].numel())
    counts = torch.zeros(2, 1, 8, dtype=torch.int64)
    with step_inputs(model, log_tilt=torch.ones(2, 8), log_weight=log_weight, tokens_per_expert=counts):
        loss = model(**batch, use_cache=False).loss
        if inside:
            loss.backward()
    if not inside:
        loss.backward()
    assert len(calls) == 2, "the recompute must have run, or this test shows nothing"
    # two layers, two experts each, tilt one
    assert torch.equal(log_weight, torch.full_like(log_weight, 4.0))
    assert counts.sum((1, 2)).tolist() == [2 * log_weight.numel()] * 2


@pytest.mark.quick
def test_delegated_layers_count_too():
    module = module_like(apply_gate=lambda self, z: z.chunk(2, -1)[0].sin() * z.chunk(2, -1)[1])
    whole, counts = torch.nn.ModuleList([module]), torch.zeros(1, 1, EXPERTS, dtype=torch.int64)
    with pytest.warns(UserWarning), step_inputs(whole, tokens_per_expert=counts):
        module(torch.randn(3, HIDDEN), torch.tensor([[0], [2], [2]]), torch.ones(3, 1))
    assert counts.flatten().tolist() == [1, 0, 2, 0]


@pytest.mark.quick
def test_step_inputs_of_another_shape_are_named(model):
    with pytest.raises(ValueError, match="log_tilt must have one entry for each of 2 MoE layers; got 3"):
        with step_inputs(model, log_tilt=torch.ones(3, 8), log_weight=torch.zeros(6)):
            pass
    with pytest.raises(ValueError, match=r"group must be \[T\] = \[6\]"):
        with step_inputs(model, group=torch.zeros(5, dtype=torch.int32)):
            model(torch.randint(3, 64, (1, 6)))
    assert inputs_of(model) == [None, None]


@pytest.mark.quick
def test_two_models_do_not_share_inputs(model):
    other, log_weight = tiny_olmoe(implementation=NAME), torch.zeros(6)
    with step_inputs(model, log_tilt=torch.ones(2, 8), log_weight=log_weight):
        other(torch.randint(3, 64, (1, 6)))
    assert (log_weight == 0).all()
