"""References on disk: computed once per model and document, never used for another; PEFT's base model."""

import copy
import math
import re

import peft
import pytest
import torch

from moe_unlearn.config import Recipe
from moe_unlearn.experts import enable
from moe_unlearn.prepare import reference
from moe_unlearn.prepare.rows import values_of
from moe_unlearn.step import UnlearnStep
from tests.support.batches import random_batches, with_refusals
from tests.support.models import TINY_MODELS, tiny_olmoe

VOCAB = 64
pytestmark = pytest.mark.quick

# every kind of reference; RMU's has a recipe of its own
EVERYTHING = ["retain.objective=kl", "optimizer.lr=1e-2"]
RMU = ["forget.layer=1", r"scope.parameters=['layers\.[01].*down_proj']"]
CACHES = ("ref_logprobs", "ref_logprobs_idk", "ref_hidden_states", "ref_hidden_states_forget", "ref_layer_states")


@pytest.fixture
def model():
    torch.manual_seed(0)
    return tiny_olmoe(vocab_size=VOCAB).eval()


def data(seed=0):
    forget = [with_refusals(b, seed=i) for i, b in enumerate(random_batches(VOCAB, seed=seed + 1))]
    return forget, random_batches(VOCAB, seed=seed + 2)


def prepare(model, cache_dir=None, name="idk_dpo", overrides=EVERYTHING, sets=None):
    step = UnlearnStep(model, Recipe.load(name, overrides))
    step.prepare(*(sets or data()), cache_dir=cache_dir)
    return step


def values(step):
    made = {name: getattr(step.prepared, name) for name in CACHES}
    return {name: content(cache) for name, cache in made.items() if cache is not None}


def content(cache):
    """Keys, lengths and values, in memory or on disk."""
    rows = [values_of(row) for row in cache._rows.values()]
    return {"keys": list(cache._rows), "lengths": list(map(len, rows)), "values": torch.cat(rows)}


def check_same(ours, theirs, *, bitwise=True):
    assert ours.keys() == theirs.keys() and ours
    for name, state in ours.items():
        assert state["keys"] == theirs[name]["keys"] and state["lengths"] == theirs[name]["lengths"]
        if bitwise:
            assert torch.equal(state["values"], theirs[name]["values"])
        else:  # another batch, another rounding
            torch.testing.assert_close(state["values"], theirs[name]["values"])


class Forwards:
    """Rows seen by a model's decoder, one number per forward pass, without those of `verify_head`."""

    def __init__(self, model):
        self.rows = []
        decoder = getattr(model, "base_model", model)
        decoder.register_forward_pre_hook(lambda m, args, kw: self.rows.append(len(kw["input_ids"])), with_kwargs=True)

    def during(self, function, *args, **keywords):
        self.rows.clear()
        made = function(*args, **keywords)
        return made, self.rows[2:]


def test_what_is_on_disk_is_not_computed_again(model, tmp_path):
    plain = values(prepare(copy.deepcopy(model)))
    forwards = Forwards(model)
    first, computed = forwards.during(prepare, model, tmp_path)
    assert computed == [4] * 9
    again, computed = forwards.during(prepare, model, tmp_path)
    assert computed == []
    check_same(values(first), plain)
    check_same(values(again), plain)
    # other levers, the same references; only the KL floor is measured anew
    other, computed = forwards.during(prepare, model, tmp_path, "mollm", ["forget.objective=npo"])
    assert computed == [4] * 3
    check_same(values(other), {name: plain[name] for name in ("ref_logprobs", "ref_hidden_states")})


def test_rmu_keeps_the_states_of_each_layer_apart(model, tmp_path):
    forwards = Forwards(model)
    for layer in (1, 0, 1):
        overrides = [f"forget.layer={layer}", RMU[1]]
        made, computed = forwards.during(prepare, model, tmp_path, "rmu", overrides)
        check_same(values(made), values(prepare(copy.deepcopy(model), None, "rmu", overrides)))
    assert computed == [] and len(list(tmp_path.iterdir())) == 2


def test_an_interrupted_preparation_goes_on_where_it_stopped(model, tmp_path):
    plain, seen = values(prepare(copy.deepcopy(model))), []

    def interrupt(*_):
        seen.append(1)
        if len(seen) == 2 + 5:
            raise KeyboardInterrupt

    handle = model.model.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        prepare(model, tmp_path)
    handle.remove()
    made, computed = Forwards(model).during(prepare, model, tmp_path)
    assert computed == [4] * 5
    check_same(values(made), plain)


def test_rows_are_found_in_other_batches_under_any_index(model, tmp_path):
    forget, retain = data()
    prepare(model, tmp_path, sets=(forget, retain))
    # the index of the batches names other rows now, and one batch has two that are new
    shuffled = [{k: torch.cat([b[k] for b in forget[:2]])[[7, 2, 4]] for k in forget[0] if "idk" not in k}]
    extra = random_batches(VOCAB, 1, seed=50, rows=2)[0]
    shuffled.append({k: torch.cat([extra[k], forget[2][k]]) for k in extra})
    for i, made in enumerate(shuffled):
        made["index"] = torch.arange(len(made["input_ids"])) + 3 * i
    sets = shuffled, retain
    cached, computed = Forwards(model).during(prepare, model, tmp_path, "npo", sets=sets)
    assert computed == [2]
    check_same(values(cached), values(prepare(copy.deepcopy(model), None, "npo", sets=sets)), bitwise=False)


@pytest.mark.parametrize("change", ["one weight", "router", "buffer", "config", "dtype"])
def test_another_model_uses_nothing_of_the_first(model, tmp_path, change):
    first = values(prepare(model, tmp_path, "npo"))
    with torch.no_grad():
        if change == "one weight":
            model.model.layers[0].mlp.experts.down_proj[0, 0, 0] += 1
        elif change == "router":
            model.model.layers[1].mlp.gate.weight.neg_()
        elif change == "buffer":
            model.model.rotary_emb.inv_freq *= 2
        elif change == "config":
            model.config.norm_topk_prob = True
        else:
            model.bfloat16()
    made, computed = Forwards(model).during(prepare, model, tmp_path, "npo")
    assert computed == [4] * 6
    assert change == "config" or not torch.equal(
        values(made)["ref_logprobs"]["values"], first["ref_logprobs"]["values"]
    )


def test_steps_change_the_model_and_autocast_the_values(model, tmp_path):
    step = prepare(model, tmp_path, "npo")
    forget, retain = data()
    with torch.autocast("cpu", torch.bfloat16):
        assert Forwards(model).during(prepare, model, tmp_path, "npo")[1] == [4] * 6
    step(forget[0], retain[0])
    assert Forwards(model).during(prepare, model, tmp_path, "npo")[1] == [4] * 6


def test_a_damaged_file_is_computed_again(model, tmp_path):
    plain = values(prepare(model, tmp_path))
    path = min(tmp_path.glob("ref_hidden_states-*/*.safetensors"))
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.warns(UserWarning, match=f"{re.escape(str(path))} is damaged"):
        made, computed = Forwards(model).during(prepare, model, tmp_path)
    assert computed == [4]
    check_same(values(made), plain)


def test_a_folder_that_cannot_be_is_named_before_anything_runs(model, tmp_path):
    (tmp_path / "file").write_text("", encoding="utf-8")
    step = UnlearnStep(model, Recipe.load("combined"))
    for path, error in (("file", "it is a file"), ("file/below", "Not a directory")):
        message = f"cache_dir cannot be made a folder: {error}: '{tmp_path}/{path}'"
        with pytest.raises(OSError, match=re.escape(message)):
            step.prepare(*data(), cache_dir=tmp_path / path)
    assert step.prepared.done == []


def test_state_saved_after_reading_from_disk_goes_on_bitwise(model, tmp_path):
    prepare(copy.deepcopy(model), tmp_path)
    forget, retain = data()
    plain, cached = copy.deepcopy(model), copy.deepcopy(model)
    steps = [prepare(plain), prepare(cached, tmp_path)]
    restored = UnlearnStep(copy.deepcopy(model), steps[0].recipe)
    restored.load_state_dict(steps[1].state_dict())
    for i in range(2):
        results = [step(forget[i], retain[i]) for step in (*steps, restored)]
        assert results[0] == results[1] == results[2]
    for step in (steps[1], restored):
        assert all(torch.equal(p, q) for p, q in zip(plain.parameters(), step.model.parameters(), strict=True))


def test_references_on_disk_take_no_memory_and_are_found_where_their_folder_went(model, tmp_path):
    before, after = tmp_path / "before", tmp_path / "after"
    made = prepare(copy.deepcopy(model), before)
    caches = made.prepared.caches()
    assert caches.keys() == values(made).keys() and not any(cache.nbytes for cache in caches.values())
    assert "values" not in caches["ref_hidden_states"].state_dict()
    state, forget, retain = made.state_dict(), *data()
    before.rename(after)

    def restored():
        step = UnlearnStep(copy.deepcopy(model), made.recipe)
        step.load_state_dict(state)
        return step

    with pytest.raises(
        ValueError, match=rf"\d+ of \d+ rows are not in {before}/ref_.*: give prepare\(\) the cache_dir"
    ):
        restored()(forget[0], retain[0])
    moved, computed = Forwards(model).during(lambda step: step.prepare(*data(), cache_dir=after) and step, restored())
    assert computed == []
    again = restored()
    again.load_state_dict(moved.state_dict())  # before it was looked for, and after
    plain = prepare(copy.deepcopy(model))
    check_same(values(moved), values(plain))
    assert moved(forget[0], retain[0]) == plain(forget[0], retain[0])
    damaged = min(after.glob("ref_hidden*/*.safetensors"))
    damaged.write_bytes(damaged.read_bytes()[:-1])
    with (
        pytest.warns(UserWarning, match="is damaged"),
        pytest.raises(ValueError, match="reference hidden states: 4 of"),
    ):
        restored().prepare(*data(), cache_dir=after)


@pytest.mark.parametrize("family", TINY_MODELS)
def test_every_parameter_and_buffer_is_in_the_digest(family):
    torch.manual_seed(0)
    model = TINY_MODELS[family]()
    digest = reference.model_digest(model)
    tensors = [*model.parameters(), *model.buffers()]
    assert digest == reference.model_digest(copy.deepcopy(model))
    with enable(model):
        assert digest == reference.model_digest(model)
    for tensor in tensors[:3] + tensors[-6:]:
        first = tensor.data.view(-1)[0].clone()
        tensor.data.view(-1)[0] += 1
        assert reference.model_digest(model) != digest
        tensor.data.view(-1)[0] = first
    assert reference.model_digest(model) == digest


def test_digest_survives_saving_and_names_weights_that_are_not_there(model, tmp_path):
    digest = reference.model_digest(model)
    model.save_pretrained(tmp_path)
    assert reference.model_digest(type(model).from_pretrained(tmp_path)) == digest
    model.tie_weights()
    model.lm_head.weight = model.model.embed_tokens.weight
    tied = reference.model_digest(model)
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    assert reference.model_digest(model) == tied != digest
    with pytest.raises(ValueError, match=r"model.embed_tokens.weight is on the meta device"):
        reference.model_digest(model.to("meta"))


def adapted(model, **keywords):
    experts = [f"mlp.experts.{name}" for name in ("gate_up_proj", "down_proj")]
    settings = peft.LoraConfig(
        r=2, target_modules=["q_proj"], target_parameters=experts, init_lora_weights=False, **keywords
    )
    return peft.get_peft_model(copy.deepcopy(model), settings)


def logits(model, batch):
    return model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits


BASE = ["reference=base"]


@torch.no_grad()
def test_references_of_the_base_model_whatever_the_adapters_learned(model, tmp_path):
    base = prepare(copy.deepcopy(model), tmp_path, overrides=[*EVERYTHING, *BASE])
    wrapped = adapted(model, modules_to_save=["lm_head"])
    # frozen, but not the base model's
    wrapped.base_model.model.lm_head.modules_to_save["default"].weight.mul_(1.5).requires_grad_(False)
    digests = [reference.model_digest(m, adapters=False) for m in (model, wrapped)]
    assert digests[0] == digests[1] == reference.model_digest(model) != reference.model_digest(wrapped)
    enable(wrapped)  # the step's own implementation rounds differently
    before = logits(wrapped, data()[0][0])
    assert not torch.allclose(before, logits(model, data()[0][0]))
    step = prepare(wrapped, overrides=[*EVERYTHING, *BASE])
    check_same(values(step), values(base))
    assert torch.equal(step.prepared.ref_lm_head, model.lm_head.weight)
    assert torch.equal(before, logits(wrapped, data()[0][0]))
    forwards = Forwards(wrapped.get_base_model())
    cached, computed = forwards.during(prepare, wrapped, tmp_path, overrides=[*EVERYTHING, *BASE])
    assert computed == []
    check_same(values(cached), values(base))


def trained_adapter(model, how="peft"):
    """`model` with LoRA on q and v that has learned something."""
    own = copy.deepcopy(model)
    settings = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"])
    if how == "peft":
        own = peft.get_peft_model(own, settings)
    else:
        own.add_adapter(settings)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in own.named_parameters():
            if "lora_B" in name:
                p.normal_(0, 0.3, generator=generator)
    return own.eval()


@pytest.mark.parametrize("how", ["peft", "add_adapter"])
def test_a_trained_adapter_is_part_of_the_reference(model, how):
    forget, retain = data()
    off, kl = {}, {}
    for kind in ("prepared", "base"):
        settings = ["optimizer.lr=0", f"reference={kind}", "retain.objective=kl", "forget.beta=0.1"]
        first = prepare(trained_adapter(model, how), None, "npo", settings)(forget[0], retain[0])
        off[kind], kl[kind] = abs(first["forget_loss"] - 2 * math.log(2) / 0.1), first["retain_loss"]
    # nothing has moved: what is left is rounding, of KL that of bfloat16 states
    assert 1000 * off["prepared"] < off["base"]
    assert 20 * kl["prepared"] < kl["base"]


@pytest.mark.parametrize("how", ["peft", "add_adapter"])
def test_kl_of_an_adapter_starts_inactive(model, how):
    forget, retain = data()
    step = prepare(trained_adapter(model, how), None, "mollm", ["optimizer.lr=1e-5"])
    first = step(forget[0], retain[0])
    assert first["lambda_kl"] == 0 and first["kl_loss"] < 10 * step.prepared.kl_floor


@torch.no_grad()
@pytest.mark.parametrize("how", ["peft", "add_adapter"])
def test_what_an_adapter_computes_is_in_the_digest(model, how):
    own = trained_adapter(model, how)
    digest = reference.model_digest(own)
    assert digest == reference.model_digest(copy.deepcopy(own)) != reference.model_digest(model)
    layer = next(m for m in own.modules() if hasattr(m, "adapter_layer_names"))

    def differs(change):
        other = copy.deepcopy(own)
        change(next(m for m in other.modules() if hasattr(m, "adapter_layer_names")))
        assert reference.model_digest(other, adapters=False) == reference.model_digest(model)
        return reference.model_digest(other) != digest

    for name in layer.adapter_layer_names:
        for key in getattr(layer, name):  # those of LoRA on embeddings are empty here
            assert differs(lambda m, name=name, key=key: getattr(m, name)[key].weight.view(-1)[0].add_(1))
    assert differs(lambda m: m.scaling.update(default=3.0))
    assert differs(lambda m: m.enable_adapters(enabled=False))
    assert not differs(lambda m: None)


def test_a_cache_of_references_tells_adapters_apart(model, tmp_path):
    own = trained_adapter(model)
    first = prepare(own, tmp_path, "npo")
    again, computed = Forwards(own.get_base_model()).during(prepare, own, tmp_path, "npo")
    assert computed == []
    check_same(values(first), values(again))
    with torch.no_grad():
        next(p for name, p in own.named_parameters() if "lora_B" in name).mul_(2)
    other, computed = Forwards(own.get_base_model()).during(prepare, own, tmp_path, "npo")
    assert computed == [4] * 6
    assert not torch.equal(values(other)["ref_logprobs"]["values"], values(first)["ref_logprobs"]["values"])


def test_of_the_base_model_preparing_after_steps_is_preparing_before_them(model, tmp_path):
    wrapped = adapted(model)
    forget, retain = data()
    recipe = ["trace=null", "wagle=null", "optimizer.lr=1e-2", *BASE]
    step = prepare(wrapped, None, "combined", recipe)
    for i in range(3):
        step(forget[i], retain[i])
    late = prepare(wrapped, None, "combined", recipe)
    check_same(values(late), values(step))
    assert late.prepared.kl_floor == step.prepared.kl_floor
    assert late(forget[0], retain[0])["kl_loss"] > 10 * late.prepared.kl_floor


def test_adapters_come_back_as_they_were_after_an_exception_too(model):
    wrapped = adapted(model)
    batch = data()[0][0]
    names = [name for name, _ in wrapped.named_parameters() if "lora_A" in name]
    wrapped.get_parameter(names[0]).requires_grad_(False)
    flags = {name: p.requires_grad for name, p in wrapped.named_parameters()}
    before = logits(wrapped, batch)
    with pytest.raises(ZeroDivisionError), reference.base_model(wrapped):
        assert torch.equal(logits(wrapped, batch), logits(model, batch))
        raise ZeroDivisionError
    assert torch.equal(before, logits(wrapped, batch))
    assert flags == {name: p.requires_grad for name, p in wrapped.named_parameters()}
    wrapped.base_model.disable_adapter_layers()
    with reference.base_model(wrapped):
        pass
    assert torch.equal(logits(wrapped, batch), logits(model, batch)), "adapters that were off stay off"


def test_base_weights_under_adapters_are_in_the_digest_and_merged_ones_are_refused(model):
    wrapped = adapted(model)
    digest = reference.model_digest(wrapped, adapters=False)
    experts = wrapped.get_base_model().model.layers[0].mlp.experts.get_base_layer()
    with torch.no_grad():
        experts.down_proj[1, 1, 1] += 1
    assert reference.model_digest(wrapped, adapters=False) != digest
    wrapped.merge_adapter()
    with pytest.raises(ValueError, match=r"merged into the weights of .*: call unmerge_adapter\(\) first"):
        prepare(wrapped, overrides=[*EVERYTHING, *BASE])
    with reference.base_model(model):  # a model without adapters is what it is
        logits(model, data()[0][0])
