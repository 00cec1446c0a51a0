"""The transformers plug-in: equal to eager on nine families and every layout flag, forward and all gradients."""

import copy
import warnings

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.integrations.moe import use_experts_implementation

from moe_unlearn.experts import NAME, enable, experts_modules, step_inputs
from moe_unlearn.testing import assert_as_accurate
from tests.batches import random_batch
from tests.models import TINY_MODELS, tiny_gpt_oss, tiny_olmoe


def run(model, batch, implementation, dtype):
    """Logits and all gradients of one pass, under a non-uniform upstream gradient."""
    own = copy.deepcopy(model).to(dtype)
    own.set_experts_implementation(implementation)
    logits = own(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    generator = torch.Generator().manual_seed(3)
    upstream = torch.randn(logits.shape, generator=generator).to(torch.bfloat16).to(logits.dtype)
    logits.backward(upstream)
    return logits.detach(), {n: p.grad for n, p in own.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", TINY_MODELS)
def test_equals_eager_forward_and_every_gradient(name):
    """Whole models in float64, where nothing is rounded away: indexing, layout and gate agree to the last digits."""
    torch.manual_seed(0)
    model, batch = TINY_MODELS[name]().eval(), random_batch(64, seed=2)
    ours, our_grads = run(model, batch, NAME, torch.float64)
    gold, gold_grads = run(model, batch, "eager", torch.float64)
    torch.testing.assert_close(ours, gold)
    for key in gold_grads:
        # routers that compute in float32 whatever the model's dtype leave their own rounding
        torch.testing.assert_close(our_grads[key], gold_grads[key], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", TINY_MODELS)
def test_experts_module_is_as_accurate_as_eager(name, dtype):
    """The module alone, so that a rounded router cannot send a token elsewhere."""
    torch.manual_seed(0)
    module = next(iter(experts_modules(TINY_MODELS[name]()).values()))
    generator = torch.Generator().manual_seed(0)
    tokens = 200
    hidden = torch.randn(tokens, 32, generator=generator).to(dtype)
    index = torch.stack([torch.randperm(module.num_experts, generator=generator)[:2] for _ in range(tokens)])
    weights = torch.rand(tokens, 2, generator=generator).to(dtype)
    upstream = torch.randn(tokens, 32, generator=generator).to(dtype)
    results = {}
    for kind, implementation in (("ours", NAME), ("baseline", "eager"), ("gold", "eager")):
        used = torch.float64 if kind == "gold" else dtype
        own = copy.deepcopy(module).to(dtype).to(used)
        own.config = copy.deepcopy(own.config)
        own.config._experts_implementation = implementation
        x, w = (value.detach().clone().to(used).requires_grad_() for value in (hidden, weights))
        out = own(x, index, w)
        out.backward(upstream.to(used))
        results[kind] = {"out": out.detach(), "x": x.grad, "w": w.grad} | {n: p.grad for n, p in own.named_parameters()}
    for key in results["gold"]:
        assert_as_accurate(*(results[k][key] for k in ("ours", "baseline", "gold")), name=key)


def implementation_of(model):
    """The one implementation all experts modules of a model use."""
    (used,) = {module.config._experts_implementation for module in experts_modules(model).values()}
    return used


@pytest.mark.quick
def test_ways_to_switch(tmp_path):
    model = tiny_olmoe()
    assert implementation_of(model) == "eager"
    with enable(model) as first:
        assert implementation_of(model) == NAME
        second = enable(model)  # idempotent
        second.disable()
        assert implementation_of(model) == NAME
        assert first is not second
    assert implementation_of(model) == "eager"
    model.set_experts_implementation(NAME)
    assert implementation_of(model) == NAME
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, experts_implementation=NAME)
    assert implementation_of(loaded) == NAME
    ids = torch.randint(3, 64, (2, 7))
    assert torch.equal(loaded.eval()(ids).logits, model.eval()(ids).logits)


@pytest.mark.quick
def test_disable_restores_after_an_exception():
    model = tiny_olmoe()
    with pytest.raises(KeyError), enable(model):
        raise KeyError
    assert implementation_of(model) == "eager"


@pytest.mark.quick
def test_a_dense_model_is_refused_and_told_what_works():
    dense = LlamaForCausalLM(LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                                         num_attention_heads=2))  # fmt: skip
    with pytest.raises(ValueError, match="LlamaForCausalLM has no Mixture-of-Experts layers.*OLMoE"):
        enable(dense)


@pytest.mark.parametrize("name", ["olmoe", "gpt_oss", "deepseek_v3"])
def test_generate_equals_eager(name):
    torch.manual_seed(0)
    model = TINY_MODELS[name]().eval()
    ids = torch.randint(3, 64, (2, 5))
    expected = model.generate(ids, max_new_tokens=8, do_sample=False)
    with enable(model):
        assert torch.equal(model.generate(ids, max_new_tokens=8, do_sample=False), expected)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(reentrant):
    torch.manual_seed(0)
    model, batch = tiny_olmoe(implementation=NAME).train(), random_batch(64)
    model(**batch).loss.backward()
    plain = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model(**batch).loss.backward()
    assert all(torch.equal(p.grad, plain[n]) for n, p in model.named_parameters())


def test_compiles_fullgraph_inside_a_model():
    torch.manual_seed(0)
    model = tiny_olmoe(implementation=NAME).eval()
    ids = torch.randint(3, 64, (2, 9))
    expected = model(ids, use_cache=False).logits  # the gate is probed on the first call
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    got = compiled(ids, use_cache=False).logits
    torch.testing.assert_close(got, expected)


def test_peft_trains_expert_adapters():
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    batch = random_batch(64)
    losses = {}
    base = tiny_olmoe().eval()
    for implementation in ("eager", NAME):
        config = LoraConfig(
            r=2, target_modules=[], target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
            init_lora_weights=False,
        )  # fmt: skip
        torch.manual_seed(1)
        model = get_peft_model(copy.deepcopy(base), config)
        model.set_experts_implementation(implementation)
        loss = model(**batch).loss
        loss.backward()
        grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        assert grads and all("lora" in n for n in grads)
        losses[implementation] = (loss.detach(), grads)
        with model.disable_adapter():
            assert model(**batch).loss != loss
    torch.testing.assert_close(losses["eager"], losses[NAME])


def module_like(**flags):
    """A synthetic experts module with the given layout flags."""

    @use_experts_implementation(**flags)
    class Experts(torch.nn.Module):
        def __init__(self, config):
            super().__init__()
            self.num_experts = 4
            inner, hidden = 8, 8
            wide = inner if flags.get("has_gate") is False else 2 * inner
            shapes = [(4, wide, hidden), (4, hidden, inner)]
            if flags.get("is_transposed"):
                shapes = [(e, b, a) for e, a, b in shapes]
            up = "up_proj" if flags.get("has_gate") is False else "gate_up_proj"
            setattr(self, up, torch.nn.Parameter(torch.randn(shapes[0]) / 3))
            self.down_proj = torch.nn.Parameter(torch.randn(shapes[1]) / 3)
            if flags.get("has_bias"):
                setattr(self, f"{up}_bias", torch.nn.Parameter(torch.randn(4, wide)))
                self.down_proj_bias = torch.nn.Parameter(torch.randn(4, hidden))
            self.act_fn = torch.nn.SiLU()

        def forward(self, hidden_states, top_k_index, top_k_weights):
            raise NotImplementedError

    config = copy.deepcopy(tiny_olmoe().config)
    config._experts_implementation = NAME
    torch.manual_seed(0)
    return Experts(config)


FLAGS = {
    "no gate": {"has_gate": False},
    "no gate, bias": {"has_gate": False, "has_bias": True},
    "transposed": {"is_transposed": True},
    "interleaved": {"is_concatenated": False},
    "bias": {"has_bias": True},
    "transposed, interleaved, bias": {"is_transposed": True, "is_concatenated": False, "has_bias": True},
}


def call(module, implementation, index, seed=0, weights=None):
    module.config._experts_implementation = implementation
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(len(index), 8, generator=generator, requires_grad=True)
    if weights is None:
        weights = torch.rand(index.shape, generator=generator)
    weights = weights.clone().requires_grad_()
    module.zero_grad()
    out = module(hidden, index, weights)
    upstream = torch.randn(out.shape, generator=generator)
    grads = torch.autograd.grad(out, [hidden, weights, *module.parameters()], upstream, allow_unused=True)
    return [out.detach(), *grads]


@pytest.mark.quick
@pytest.mark.parametrize("flags", FLAGS.values(), ids=FLAGS)
@pytest.mark.parametrize("top_k", [1, 3])
def test_layout_flags_equal_grouped_mm(flags, top_k):
    module = module_like(**flags)
    index = torch.stack([torch.randperm(4)[:top_k] for _ in range(23)])
    for a, b in zip(call(module, NAME, index), call(module, "grouped_mm", index), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.quick
def test_sentinels_and_nan_weights():
    """Ids at and above num_experts are not on this rank; their weight may hold anything."""
    module = module_like()
    index = torch.tensor([[0, 4], [4, 4], [3, 1], [9, 2]])
    weights = torch.rand(4, 2)
    hidden = torch.randn(4, 8)
    out = module(hidden, index, weights.masked_fill(index >= 4, torch.nan))
    clean = module(hidden, index.clamp_max(3), weights.masked_fill(index >= 4, 0.0))
    torch.testing.assert_close(out, clean)
    assert (out[1] == 0).all()


@pytest.mark.quick
@pytest.mark.parametrize("rows", [0, 1])
def test_no_row_and_one_row(rows):
    module = module_like()
    index = torch.zeros(rows, 1, dtype=torch.int64)
    out, d_hidden, d_weights, *grads = call(module, NAME, index)
    assert out.shape == d_hidden.shape == (rows, 8)
    assert all((g[1:] == 0).all() for g in grads)


class OwnGate:
    """A gate that is none of the known formulas."""

    def __call__(self, gate_up):
        gate, up = gate_up.chunk(2, -1)
        return torch.sin(gate) * up


@pytest.mark.quick
def test_an_unknown_gate_is_delegated_with_one_warning():
    module = module_like()
    module._apply_gate = OwnGate()
    index = torch.stack([torch.randperm(4)[:2] for _ in range(9)])
    with pytest.warns(UserWarning, match="activation is none of the known formulas; .*'grouped_mm'"):
        ours = call(module, NAME, index)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = call(module, NAME, index)
    for a, b, c in zip(ours, again, call(module, "grouped_mm", index), strict=True):
        assert torch.equal(a, b) and torch.equal(a, c)


@pytest.mark.quick
@pytest.mark.parametrize("limit,alpha", [(7.0, 1.702), (3.0, 1.0), (5.5, 2.25)])
def test_a_gate_is_recognised_by_what_it_computes_not_by_its_attributes(limit, alpha):
    module = next(iter(experts_modules(tiny_gpt_oss()).values()))
    module.limit, module.alpha = limit, alpha
    module.config._experts_implementation = NAME
    index = torch.stack([torch.randperm(4)[:2] for _ in range(9)])
    hidden, weights = 4 * torch.randn(9, 32), torch.rand(9, 2)
    out = module(hidden, index, weights)
    gate = module._moe_unlearn.gate
    assert (gate.alpha, gate.limit, gate.shift) == (alpha, limit, 1.0)
    module.config._experts_implementation = "eager"
    torch.testing.assert_close(out, module(hidden, index, weights))


@pytest.mark.quick
def test_misleading_attributes_do_not_mislead():
    module = module_like()
    module.alpha, module.limit = 1.702, 7.0  # the attributes of gpt-oss, the formula of SwiGLU
    index = torch.stack([torch.randperm(4)[:2] for _ in range(9)])
    for a, b in zip(call(module, NAME, index), call(module, "grouped_mm", index), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.quick
def test_a_norm_after_the_experts_is_delegated():
    module = module_like(has_post_expert_norm=True)
    module.post_expert_norm = torch.nn.LayerNorm(8)
    index = torch.zeros(5, 1, dtype=torch.int64)
    with pytest.warns(UserWarning, match="normalises after each expert"):
        call(module, NAME, index)


@pytest.mark.quick
def test_step_inputs_are_set_counted_and_cleared():
    torch.manual_seed(0)
    model, batch = tiny_olmoe(implementation=NAME).eval(), random_batch(64)
    tokens = batch["input_ids"].numel()
    group = (torch.arange(tokens) % 3).int() - 1
    counts = torch.zeros(2, 2, 8, dtype=torch.int64)
    tilt, log_weight = torch.randn(2, 8), torch.zeros(tokens)
    with step_inputs(model, group=group, num_groups=2, log_tilt=tilt, log_weight=log_weight, tokens_per_expert=counts):
        model(batch["input_ids"], use_cache=False)
    assert counts.sum((1, 2)).tolist() == [2 * int((group >= 0).sum())] * 2
    assert log_weight.abs().min() > 0
    for module in experts_modules(model).values():
        assert module._moe_unlearn.inputs is None
    with pytest.raises(KeyError), step_inputs(model):
        raise KeyError
    assert all(m._moe_unlearn.inputs is None for m in experts_modules(model).values())


def test_checkpoint_recompute_counts_nothing_twice():
    torch.manual_seed(0)
    model, batch = tiny_olmoe(implementation=NAME).train(), random_batch(64)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    log_weight = torch.zeros(batch["input_ids"].numel())
    with step_inputs(model, log_tilt=torch.ones(2, 8), log_weight=log_weight):
        loss = model(**batch, use_cache=False).loss
    loss.backward()
    # two layers, two experts each, tilt one
    assert torch.equal(log_weight, torch.full_like(log_weight, 4.0))


@pytest.mark.quick
def test_two_models_do_not_share_state():
    one, two = tiny_olmoe(implementation=NAME), tiny_olmoe(implementation=NAME)
    with step_inputs(one, log_tilt=torch.ones(2, 8), log_weight=(first := torch.zeros(6))):
        two(torch.randint(3, 64, (1, 6)))
    assert (first == 0).all()
