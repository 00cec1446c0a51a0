"""Objectives against their formulas, and the way from real models to per-token losses."""

import copy
import itertools
import math
from operator import itemgetter

import peft
import pytest
import torch
from transformers import CohereConfig, CohereForCausalLM, Gemma2Config, Gemma2ForCausalLM

from moe_unlearn import losses
from moe_unlearn.model.batches import target_mask
from moe_unlearn.model.head import Head, final_hidden_states, head_of, token_losses, verify_head
from moe_unlearn.model.states import control_vector
from moe_unlearn.step import UnlearnStep
from moe_unlearn.testing import assert_as_accurate
from moe_unlearn.testing.yardstick import Reference
from tests.support.batches import random_batch
from tests.support.models import SIZE, TINY_MODELS, tiny_granite_moe, tiny_olmoe
from tests.support.steps import recipe

VOCAB = 64


def dense(model_class, config_class, **keywords):
    torch.manual_seed(0)
    return model_class(config_class(**SIZE, vocab_size=VOCAB, intermediate_size=48, **keywords)).eval()


def gemma():
    """Soft-capped logits; small enough a cap to bend them."""
    return dense(Gemma2ForCausalLM, Gemma2Config, final_logit_softcapping=0.1, head_dim=8)


def cohere():
    """Logits multiplied."""
    return dense(CohereForCausalLM, CohereConfig, logit_scale=0.25)


MODELS = {name: (lambda build=build: build(vocab_size=VOCAB)) for name, build in TINY_MODELS.items()}
MODELS |= {"gemma2": gemma, "cohere": cohere}


def make(name):
    torch.manual_seed(0)
    return MODELS[name]().eval()


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def model_losses(model, batch):
    """Per-token NLL by the model's own logits, aligned as `token_losses`."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    targets = batch["labels"].roll(-1, 1)
    nll = -torch.log_softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)), -1)
    nll = nll.gather(2, targets.clamp_min(0)[..., None]).squeeze(2)
    return torch.where(target_mask(batch), nll, 0)


@pytest.mark.quick
def test_target_mask_by_hand():
    batch = {
        "attention_mask": torch.tensor([[1, 1, 1, 1, 0], [0, 0, 1, 1, 1]]),
        "labels": torch.tensor([[5, -100, 7, 8, 9], [4, 5, 6, -100, 3]]),
    }
    # row 0: position 0 predicts -100; position 3 predicts 9 and is attended; 4 is last. row 1 is left-padded
    expected = [[0, 1, 1, 1, 0], [0, 0, 0, 1, 0]]
    assert target_mask(batch).int().tolist() == expected


@pytest.mark.quick
@pytest.mark.parametrize("name", MODELS)
def test_token_losses_reproduce_the_models_logits(name):
    model, batch = make(name), random_batch(VOCAB, rows=6, length=20)
    verify_head(model, batch)
    with torch.no_grad():
        ours, reference = token_losses(model, batch), Reference(lambda: model_losses(model, batch))
        gold = model_losses(copy.deepcopy(model).double(), batch)
    mask = target_mask(batch)
    assert ours.shape == mask.shape and not ours[~mask].any() and ours[mask].all()
    with torch.no_grad():
        assert_as_accurate(ours[mask], reference.baseline(lambda made: made[mask]), gold[mask])


@pytest.mark.quick
@pytest.mark.parametrize("name", ["olmoe", "granite_moe", "phimoe", "gemma2"])
def test_gradients_are_those_of_the_models_loss(name):
    model, batch = make(name), random_batch(VOCAB, rows=6, length=20)
    weights = randn(6, 20, seed=1, dtype=torch.float32)

    def gradients(function, dtype=torch.float32):
        own = copy.deepcopy(model).to(dtype)
        (function(own, batch) * weights).sum().backward()
        return {n: p.grad.flatten() for n, p in own.named_parameters() if p.grad is not None}

    ours, gold = gradients(token_losses), gradients(model_losses, torch.float64)
    reference = Reference(lambda: gradients(model_losses))
    assert ours.keys() == gold.keys()
    for key in gold:
        assert_as_accurate(ours[key], reference.baseline(itemgetter(key)), gold[key], name=key)


@pytest.mark.quick
def test_weights_and_given_states_and_kinds():
    model, batch = make("granite_moe"), random_batch(VOCAB)
    mask, weights = target_mask(batch), randn(4, 12, dtype=torch.float32)
    with torch.no_grad():
        states = final_hidden_states(model, batch)
        plain = token_losses(model, batch)
        weighted = token_losses(model, batch, token_weights=weights, hidden_states=states)
        uce = token_losses(model, batch, kind="uce", hidden_states=states)
        same = token_losses(model, batch, kind="kl", hidden_states=states, ref_hidden_states=states.clone())
        other = token_losses(
            model,
            batch,
            kind="kl",
            hidden_states=states,
            ref_hidden_states=states.flip(1),
            ref_lm_head=2 * head_of(model).weight,
        )
    assert torch.equal(weighted, weights * plain * mask)
    torch.testing.assert_close(uce[mask], -(1 - (-plain[mask]).exp() / 2).log())
    assert not same.any() and (other[mask] > 0).all() and not other[~mask].any()


@pytest.mark.quick
def test_the_decoder_runs_alone_and_is_asked_for_nothing_more():
    model, batch = make("olmoe"), random_batch(VOCAB)
    model.config.output_router_logits = True
    calls = []
    model.lm_head.register_forward_hook(lambda *args: calls.append("head"))
    model.model.register_forward_pre_hook(lambda m, args, kwargs: calls.append(set(kwargs)), with_kwargs=True)
    states = final_hidden_states(model, batch)
    assert calls == [{"input_ids", "attention_mask", "use_cache"}]
    assert states.shape == (4, 12, 32)


@pytest.mark.quick
def test_head_of_reads_flags():
    assert head_of(make("granite_moe")).logit_scale == 0.5
    assert head_of(make("cohere")).logit_scale == 0.25
    assert head_of(make("gemma2")).logit_softcap == 0.1
    assert head_of(make("phimoe")).bias is not None
    olmoe = make("olmoe")
    head = head_of(olmoe)
    assert head.weight is olmoe.lm_head.weight and head == Head(head.weight)
    with pytest.raises(ValueError, match="OlmoeModel has no output head"):
        head_of(olmoe.model)


@pytest.mark.quick
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_verify_head_finds_what_a_config_does_not_say(dtype):
    model, batch = tiny_granite_moe(vocab_size=VOCAB).to(dtype).train(), random_batch(VOCAB)
    model.model.layers[0].eval()
    modes = [m.training for m in model.modules()]
    verify_head(model, batch)
    assert [m.training for m in model.modules()] == modes

    scaled = model.lm_head.register_forward_hook(lambda m, args, out: out * 1.2)
    with pytest.raises(ValueError, match="GraniteMoeForCausalLM: its logits are not the head"):
        verify_head(model, batch)
    scaled.remove()
    normed = model.lm_head.register_forward_pre_hook(lambda m, args: (args[0] - args[0].mean(-1, keepdim=True),))
    with pytest.raises(ValueError, match="log-probs differ by up to"):
        verify_head(model, batch)
    normed.remove()
    broken = model.lm_head.register_forward_hook(lambda m, args, out: out * math.nan)
    with pytest.raises(ValueError, match="differ by up to nan"):
        verify_head(model, batch)
    broken.remove()
    verify_head(model, batch)
    with pytest.raises(ValueError, match="a position that carries a loss"):
        verify_head(model, batch | {"labels": torch.full_like(batch["labels"], -100)})


@pytest.mark.quick
def test_under_peft():
    batch = random_batch(VOCAB)
    config = peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"], init_lora_weights=False)
    wrapped = peft.get_peft_model(make("olmoe"), config).eval()
    with torch.no_grad():
        wrapped.base_model.model.lm_head.modules_to_save["default"].weight.mul_(1.5)
    verify_head(wrapped, batch)
    token_losses(wrapped, batch).sum().backward()
    trained = {n for n, p in wrapped.named_parameters() if p.grad is not None}
    assert any("lora_A" in n for n in trained) and any("lm_head.modules_to_save" in n for n in trained)
    adapted = peft.get_peft_model(make("olmoe"), peft.LoraConfig(target_modules=["lm_head"]))
    with pytest.raises(ValueError, match="leave it out of target_modules"):
        token_losses(adapted, batch)


@pytest.mark.quick
def test_token_means():
    logp = -randn(50).abs()
    weights = randn(50, seed=1)
    torch.testing.assert_close(losses.nll(logp), -logp.mean())
    torch.testing.assert_close(losses.nll(logp, weights), -(weights * logp).mean())
    torch.testing.assert_close(losses.uce(logp, weights), -(weights * (1 - logp.exp() / 2).log()).mean())
    assert 0 <= losses.uce(torch.tensor([-1e4])) < losses.uce(torch.zeros(1)) == torch.tensor(2.0).log()
    assert losses.nll(torch.zeros(0)) == losses.uce(torch.zeros(0)) == 0
    assert losses.uce(logp.bfloat16()).dtype == torch.float32


@pytest.mark.quick
def test_sequence_objectives_by_hand():
    s, ref, idk, ref_idk = (-10 * randn(5, seed=i).abs() for i in range(4))
    beta, delta, lengths = 0.3, 0.2, torch.tensor([3, 1, 7, 2, 5])

    def reference(margins):
        return sum(-(2 / beta) * math.log(1 / (1 + math.exp(-beta * float(m)))) for m in margins) / 5

    # S is the sequence NLL: forgetting raises it, and the loss falls as S - S_ref grows
    assert float(losses.npo(s, ref, beta)) == pytest.approx(reference(ref - s))
    assert float(losses.simnpo(s, lengths, beta, delta)) == pytest.approx(reference(-s / lengths - delta))
    margin = (idk - ref_idk) - (s - ref)
    assert float(losses.idk_dpo(idk, ref_idk, s, ref, beta)) == pytest.approx(reference(margin))
    assert float(losses.npo(ref, ref, 0.1)) == pytest.approx(20 * math.log(2))
    assert losses.npo(s - 1, ref, beta) < losses.npo(s, ref, beta)
    assert losses.simnpo(s - 1, lengths, beta) < losses.simnpo(s, lengths, beta)
    assert losses.idk_dpo(idk + 1, ref_idk, s, ref, beta) < losses.idk_dpo(idk, ref_idk, s, ref, beta)
    assert losses.simnpo(torch.zeros(1), torch.zeros(1).long(), beta).isfinite()
    # gradient of NPO at the reference is gradient ascent's: d / ds = mean of 1
    leaf = ref.clone().requires_grad_()
    losses.npo(leaf, ref, beta).backward()
    torch.testing.assert_close(leaf.grad, torch.full((5,), 1 / 5, dtype=torch.float64))


@pytest.mark.quick
def test_kl_from_hidden_states():
    h, ref, weight, bias = randn(30, 8), randn(30, 8, seed=1), randn(20, 8, seed=2), randn(20, seed=3)
    old, weights = randn(20, 8, seed=4), randn(30, seed=5)
    head = Head(weight, bias, 0.5, 3.0)

    def log_softmax(hidden, matrix, added):
        return torch.log_softmax(3 * torch.tanh(0.5 * (hidden @ matrix.T + added) / 3), -1)

    for frozen, shift in itertools.product((None, old), (None, randn(20, seed=6))):
        q = log_softmax(ref, weight if frozen is None else old, bias if shift is None else shift)
        p = log_softmax(h, weight, bias)
        expected = (weights * (q.exp() * (q - p)).sum(1)).mean()
        torch.testing.assert_close(losses.kl(h, ref, head, weights, ref_lm_head=frozen, ref_bias=shift), expected)
    assert losses.kl(h, h.clone(), head, ref_bias=bias.clone()) == 0
    assert losses.kl(h, h.clone(), head) == 0
    assert losses.kl(h[:0], ref[:0], head) == 0


@pytest.mark.quick
def test_layer_objectives_read_counted_positions_only():
    h, ref, control = randn(3, 4, 8), randn(3, 4, 8, seed=1), randn(8, seed=2)
    mask = randn(3, 4, seed=3) > 0
    assert 0 < mask.sum() < 12
    expected_rmu = ((h - control) ** 2)[mask].mean()
    expected_diff = ((h - ref) ** 2)[mask].mean()
    h[~mask] = ref[~mask] = torch.nan
    h.requires_grad_()
    rmu, diff = losses.rmu(h, control, mask), losses.embed_diff(h, ref, mask)
    torch.testing.assert_close(rmu, expected_rmu)
    torch.testing.assert_close(diff, expected_diff)
    grad = torch.autograd.grad(rmu + diff, h)[0]
    assert not grad[~mask].any() and grad[mask].all()
    nothing = torch.zeros_like(mask)
    assert losses.embed_diff(h, ref, nothing) == 0
    for loss in (lambda m: losses.rmu(h, control, m), lambda m: losses.embed_diff(h, ref, m)):
        with pytest.raises(ValueError, match=r"mask must be bool, .*; got torch.int64"):
            loss(mask.long())
    # the difference is taken in float32: 1 is below the rounding step of bfloat16 at 300
    wide = torch.full((1, 1, 2), 300.0)
    assert losses.embed_diff(wide.bfloat16(), (wide + 2).bfloat16(), mask[:1, :1] | True) == 4


@pytest.mark.quick
def test_sequence_sums():
    values, mask = randn(3, 4), randn(3, 4, seed=1) > 0
    torch.testing.assert_close(losses.sequence_sums(values), values.sum(1))
    torch.testing.assert_close(losses.sequence_sums(values, mask), (values * mask).sum(1))
    values[~mask] = torch.nan
    assert losses.sequence_sums(values, mask).isfinite().all()


@pytest.mark.quick
def test_the_last_position_and_padding_never_count():
    """A row that ends in padding, one that is all padding, and left padding."""
    model = tiny_olmoe(vocab_size=VOCAB).eval()
    batch = random_batch(VOCAB, rows=3)
    batch["attention_mask"][1] = 0
    batch["attention_mask"][2, :4] = 0
    with torch.no_grad():
        values = token_losses(model, batch)
    assert not values[1].any() and not values[2, :4].any() and not values[:, -1].any()
    assert values[0].any() and values[2].any() and values.isfinite().all()


def test_rmu_steers_and_keeps_the_states_of_labelled_tokens():
    """Of the tokens themselves, as the reference does, not of those before them, which predict them."""
    torch.manual_seed(0)
    model = tiny_olmoe(VOCAB).double().eval()
    forget, retain = (random_batch(VOCAB, rows=3, seed=seed, prompt=3) for seed in (1, 2))
    step = UnlearnStep(copy.deepcopy(model), recipe("rmu", "forget.layer=0", "forget.steering=3"))
    step.prepare([forget], [retain])

    def states(of, batch):
        hidden = of(**batch, output_hidden_states=True).hidden_states[1]  # behind the first layer
        return hidden[batch["labels"] != -100]

    with torch.no_grad():
        for p in step.model.parameters():
            p.mul_(1.05)
        values = step.objectives(forget, retain)
        steered = states(step.model, forget) - control_vector(step.recipe.seed, 3.0, SIZE["hidden_size"]).double()
        kept = states(step.model, retain) - states(model, retain).bfloat16().double()
    torch.testing.assert_close(values["forget"], steered.square().mean())
    torch.testing.assert_close(values["retain"], kept.square().mean())
    assert step.sizes([(forget, retain)]) == {"forget": len(steered), "retain": len(kept)}
