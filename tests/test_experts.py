"""The transformers plug-in on whole models: equal to eager on every family, forward and all gradients."""

import copy
from operator import itemgetter

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, LlavaConfig, OlmoeForCausalLM

from moe_unlearn.experts import NAME, enable, experts_modules
from moe_unlearn.testing import assert_as_accurate
from moe_unlearn.testing.yardstick import Reference
from tests.support.batches import random_batch
from tests.support.models import ALL_EXPERTS, TINY_MODELS, nemotron_h_experts, tiny_olmoe


def build(name, **changes):
    torch.manual_seed(0)
    model = TINY_MODELS[name](**changes).eval()
    if not experts_modules(model):
        # GraniteMoE in the oldest transformers; the newest, which `make test` has, decorates every family
        assert name == "granite_moe", name
        pytest.skip("this version of transformers does not decorate the family's experts")
    return model


def run(model, batch, implementation, dtype):
    """Logits and all gradients of one pass, under a non-uniform upstream gradient."""
    own = copy.deepcopy(model).to(dtype)
    own.set_experts_implementation(implementation)
    seen = []
    handles = [
        m.register_forward_pre_hook(lambda module, args: seen.append(args[1].sort().values))
        for m in experts_modules(own).values()
    ]
    logits = own(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    for handle in handles:
        handle.remove()
    generator = torch.Generator().manual_seed(3)
    upstream = torch.randn(logits.shape, generator=generator).to(torch.bfloat16).to(logits.dtype)
    logits.backward(upstream)
    grads = {n: p.grad for n, p in own.named_parameters() if p.grad is not None}
    return logits.detach(), grads, torch.stack(seen)


def check(model, batch, dtype):
    """Ours against eager in `dtype`, with eager in float64 as truth."""
    model = model.to(dtype)
    ours, our_grads, routed = run(model, batch, NAME, dtype)
    reference = Reference(lambda: run(model, batch, "eager", dtype))
    _, eager_grads, eager_routed = reference.value
    gold, gold_grads, gold_routed = run(model, batch, "eager", torch.float64)
    assert torch.equal(routed, gold_routed) and torch.equal(eager_routed, gold_routed)
    assert_as_accurate(ours, reference.baseline(itemgetter(0)), gold, name="logits")
    assert our_grads.keys() == eager_grads.keys()
    assert any("gate" in k or "router" in k for k in our_grads), "the router must have a gradient"
    for key, truth in gold_grads.items():
        # one row for the whole gradient: behind several layers a row's error is that of its upstream
        baseline = reference.baseline(lambda made, key=key: made[1][key].flatten())
        assert_as_accurate(our_grads[key].flatten(), baseline, truth.flatten(), name=key)


@pytest.mark.quick
@pytest.mark.parametrize("name", TINY_MODELS)
@pytest.mark.slow(but=1)
def test_equals_eager_in_float32_forward_and_every_gradient(name):
    check(build(name), random_batch(64, seed=1), torch.float32)


@pytest.mark.parametrize("name", TINY_MODELS)
def test_equals_eager_in_bf16_forward_and_every_gradient(name):
    """All experts take part, so that a rounded router cannot send a token elsewhere."""
    check(build(name, **ALL_EXPERTS[name]), random_batch(64, seed=1), torch.bfloat16)


@pytest.mark.quick
@pytest.mark.parametrize("name", TINY_MODELS)
def test_equals_eager_in_float64(name):
    """Nothing is rounded away: indexing, layout and gate agree to the last digits."""
    model, batch = build(name), random_batch(64, seed=2)
    ours, our_grads, _ = run(model, batch, NAME, torch.float64)
    gold, gold_grads, _ = run(model, batch, "eager", torch.float64)
    assert_as_accurate(ours.float(), gold.float(), gold, name="logits")
    for key, truth in gold_grads.items():
        assert_as_accurate(our_grads[key].float(), truth.float(), truth, name=key)


@pytest.mark.quick
@pytest.mark.parametrize("router_dtype", [None, torch.float32], ids=["same", "float32"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", [*TINY_MODELS, "nemotron_h"])
def test_experts_module_equals_eager(name, dtype, router_dtype):
    """The module alone, row by row; float32 routing weights in a bf16 model keep their gradient's dtype."""
    torch.manual_seed(0)
    module = nemotron_h_experts() if name == "nemotron_h" else next(iter(experts_modules(build(name)).values()))
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(70, 32, generator=generator).to(dtype)
    index = torch.stack([torch.randperm(module.num_experts, generator=generator)[:2] for _ in range(70)])
    weights = torch.rand(70, 2, generator=generator).to(router_dtype or dtype)
    upstream = torch.randn(70, 32, generator=generator).to(dtype)

    def results(implementation, wide=False):
        own = copy.deepcopy(module).to(dtype)
        own = own.double() if wide else own
        own.config = copy.deepcopy(own.config)
        own.config._experts_implementation = implementation
        x, w = ((v.double() if wide else v.clone()).requires_grad_() for v in (hidden, weights))
        out = own(x, index, w)
        out.backward(upstream.to(out.dtype))
        # some eager forwards return the dtype of the routing weights
        made = {"out": out.detach().to(torch.float64 if wide else dtype), "x": x.grad, "w": w.grad}
        return made | {n: p.grad for n, p in own.named_parameters()}

    ours, reference, gold = results(NAME), Reference(lambda: results("eager")), results("eager", wide=True)
    assert ours["w"].dtype == weights.dtype
    for key in gold:
        assert_as_accurate(ours[key], reference.baseline(itemgetter(key)), gold[key], name=key)


def chosen(model):
    return model.config._experts_implementation


@pytest.mark.quick
def test_ways_to_switch(tmp_path):
    model = tiny_olmoe()
    assert chosen(model) == "eager"
    with enable(model):
        assert chosen(model) == NAME
    assert chosen(model) == "eager"
    model.set_experts_implementation(NAME)
    assert chosen(model) == NAME
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, experts_implementation=NAME)
    assert chosen(loaded) == NAME
    ids = torch.randint(3, 64, (2, 7))
    assert torch.equal(loaded.eval()(ids).logits, model.eval()(ids).logits)
    model.set_experts_implementation("grouped_mm")
    handle = enable(model)
    assert chosen(model) == NAME
    handle.disable()
    assert chosen(model) == "grouped_mm"


@pytest.mark.quick
def test_enable_is_idempotent():
    model = tiny_olmoe()
    first = enable(model)
    second = enable(model)
    second.disable()
    assert chosen(model) == NAME
    first.disable()
    assert chosen(model) == "eager"
    model.set_experts_implementation("grouped_mm")
    first.disable()
    assert chosen(model) == "grouped_mm"


@pytest.mark.quick
def test_disable_restores_after_an_exception():
    model = tiny_olmoe()
    with pytest.raises(KeyError), enable(model):
        raise KeyError
    assert chosen(model) == "eager"


@pytest.mark.quick
def test_enable_leaves_every_other_config_alone():
    """A composite model dispatches on its sub-configs; each gets back what it had."""
    composite = LlavaConfig(text_config=tiny_olmoe().config)
    parts = {"one": OlmoeForCausalLM(composite.text_config), "two": tiny_olmoe(implementation="grouped_mm")}
    parts["one"].set_experts_implementation("eager")
    composite._experts_implementation_internal = "batched_mm"
    whole = torch.nn.ModuleDict(parts)
    with enable(whole):
        assert chosen(parts["one"]) == chosen(parts["two"]) == NAME
        assert composite._experts_implementation == "batched_mm"
    assert (chosen(parts["one"]), chosen(parts["two"])) == ("eager", "grouped_mm")


@pytest.mark.quick
def test_a_model_without_experts_is_refused_and_told_what_works():
    dense = LlamaForCausalLM(
        LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    )
    with pytest.raises(ValueError, match="LlamaForCausalLM has no Mixture-of-Experts layers.*found: none.*OLMoE"):
        enable(dense)

    class MyExpertStack(torch.nn.Linear):
        pass

    with pytest.raises(ValueError, match="found: MyExpertStack"):
        enable(torch.nn.Sequential(MyExpertStack(2, 2)))


@pytest.mark.parametrize("name", TINY_MODELS)
def test_generate_equals_eager(name):
    model = build(name)
    ids = torch.randint(3, 64, (2, 5), generator=torch.Generator().manual_seed(1))
    expected = model.generate(ids, max_new_tokens=8, do_sample=False)
    assert expected.shape[1] > 6
    with enable(model):
        assert torch.equal(model.generate(ids, max_new_tokens=8, do_sample=False), expected)


@pytest.mark.quick
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


@pytest.mark.parametrize("first", ["enable", "forward"])
def test_compiles_fullgraph_inside_a_model(first):
    torch.manual_seed(0)
    torch._dynamo.reset()
    model = tiny_olmoe().eval()
    ids, upstream = torch.randint(3, 64, (2, 9)), torch.randn(2, 9, 64)

    def passes(function, own):
        own.zero_grad()
        logits = function(ids, use_cache=False).logits
        logits.backward(upstream.to(logits.dtype))
        return [logits.detach(), *(p.grad.flatten() for p in own.parameters())]

    wide, plain = copy.deepcopy(model).double(), copy.deepcopy(model)
    gold, reference = passes(wide, wide), Reference(lambda: passes(plain, plain))
    if first == "enable":
        enable(model)
    else:
        model.set_experts_implementation(NAME)
        model(ids, use_cache=False)
    ours = passes(torch.compile(model, fullgraph=True, backend="aot_eager"), model)
    for i, (mine, truth) in enumerate(zip(ours, gold, strict=True)):
        assert_as_accurate(mine, reference.baseline(itemgetter(i)), truth)


def test_compiling_an_unprobed_model_says_what_to_do():
    torch._dynamo.reset()
    model = tiny_olmoe(implementation=NAME).eval()
    ids = torch.randint(3, 64, (2, 9))
    with pytest.raises(RuntimeError, match="call moe_unlearn.enable"):
        torch.compile(model, fullgraph=True, backend="eager")(ids, use_cache=False)
    torch._dynamo.reset()
    torch.compile(model, backend="eager")(ids, use_cache=False)  # a graph break is allowed here


def test_autocast():
    """float32 weights, bf16 arithmetic: what transformers' Trainer does with bf16=True."""
    torch.manual_seed(0)
    model, batch = tiny_olmoe(num_experts_per_tok=8).eval(), random_batch(64)

    def gradients(implementation, dtype=torch.float32):
        own = copy.deepcopy(model).to(dtype)
        own.set_experts_implementation(implementation)
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.float32):
            own(**batch).loss.backward()
        return {n: p.grad.flatten() for n, p in own.named_parameters()}

    ours, reference = gradients(NAME), Reference(lambda: gradients("eager"))
    for key, truth in gradients("eager", torch.float64).items():
        # both are rounded to bf16 on the way, so that bf16 is the unit to measure in
        baseline = reference.baseline(lambda made, key=key: made[key].bfloat16())
        assert_as_accurate(ours[key].bfloat16(), baseline, truth, name=key)


def test_peft_trains_expert_adapters():
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    batch = random_batch(64)
    base = tiny_olmoe().eval()
    config = LoraConfig(
        r=2,
        target_modules=[],
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
        init_lora_weights=False,
    )

    def adapted(implementation, dtype=torch.float32):
        torch.manual_seed(1)
        model = get_peft_model(copy.deepcopy(base), config).to(dtype)
        assert len(experts_modules(model)) == 2
        model.set_experts_implementation(implementation)
        return model

    def gradients(implementation, dtype=torch.float32):
        model = adapted(implementation, dtype)
        model(**batch).loss.backward()
        made = {n: p.grad.flatten() for n, p in model.named_parameters() if p.grad is not None}
        assert len(made) == 8 and all("lora" in n for n in made)
        return made

    for implementation in (NAME, "eager"):
        model = adapted(implementation)
        base.set_experts_implementation(implementation)
        with torch.no_grad(), model.disable_adapter():
            plain = model(**batch).loss
        assert torch.equal(plain, base(**batch).loss) and plain != model(**batch).loss
    ours, gold = gradients(NAME), gradients("eager", torch.float64)
    reference = Reference(lambda: gradients("eager"))
    for key in gold:
        assert_as_accurate(ours[key], reference.baseline(itemgetter(key)), gold[key], name=key)


@pytest.mark.quick
def test_enable_works_through_a_peft_wrapper():
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(
        tiny_olmoe(), LoraConfig(r=2, target_modules=[], target_parameters=["mlp.experts.down_proj"])
    )
    with enable(model):
        assert chosen(model.get_base_model()) == NAME
        model(torch.randint(3, 64, (1, 4)))
    assert chosen(model.get_base_model()) == "eager"


@pytest.mark.quick
def test_frozen_experts_and_frozen_layers_below_cost_nothing(monkeypatch):
    """Only the weight gradients that are asked for reach the op."""
    from moe_unlearn import backend

    monkeypatch.setenv("MOE_UNLEARN_IMPL", "ref")
    calls = []
    real = backend._kernels["expert_wgrad", "ref"]
    monkeypatch.setitem(backend._kernels, ("expert_wgrad", "ref"), lambda *a: calls.append(1) or real(*a))
    model, batch = tiny_olmoe(implementation=NAME), random_batch(64)
    model.requires_grad_(False)
    model.model.layers[1].mlp.experts.down_proj.requires_grad_()
    model(**batch).loss.backward()
    assert calls == [1]
    assert [n for n, p in model.named_parameters() if p.grad is not None] == ["model.layers.1.mlp.experts.down_proj"]


@pytest.mark.quick
def test_models_can_be_copied_and_two_of_them_share_nothing():
    one = tiny_olmoe(implementation=NAME).eval()
    ids = torch.randint(3, 64, (1, 6))
    logits = one(ids).logits
    two = copy.deepcopy(one)
    assert torch.equal(two(ids).logits, logits)
    for a, b in zip(experts_modules(one).values(), experts_modules(two).values(), strict=True):
        assert a._moe_unlearn is not b._moe_unlearn
    assert set(one.state_dict()) == set(tiny_olmoe().state_dict())
