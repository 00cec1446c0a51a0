"""A model saved one weight at a time is the folder that transformers writes."""

import json
from contextlib import nullcontext

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.core_model_loading import Chunk, WeightConverter

from moe_unlearn.checkpoint import CheckpointError
from moe_unlearn.model import saving
from moe_unlearn.model.resuming import load_pretrained
from moe_unlearn.model.saving import save_pretrained
from moe_unlearn.ranks import Ranks
from tests.support.models import TINY_MODELS
from tests.support.tokenizers import TRIMMED


def made(family="olmoe", **changes):
    torch.manual_seed(0)
    return TINY_MODELS[family](**changes).to(torch.bfloat16)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", TINY_MODELS)
def test_the_folder_has_the_bytes_that_transformers_writes(tmp_path, family, tied):
    model = made(family, tie_word_embeddings=tied)
    model.save_pretrained(tmp_path / "theirs")
    save_pretrained(model, tmp_path / "ours")
    assert contents(tmp_path / "ours") == contents(tmp_path / "theirs")


def test_files_have_at_most_the_size_asked_for(tmp_path):
    model = made(tie_word_embeddings=True)
    save_pretrained(model, tmp_path / "ours", max_shard_size="20KB")
    index = json.loads((tmp_path / "ours" / "model.safetensors.index.json").read_text(encoding="utf-8"))
    sizes = [path.stat().st_size for path in (tmp_path / "ours").glob("*.safetensors")]
    assert len(sizes) == len(set(index["weight_map"].values())) > 3 and max(sizes) < 30_000
    assert index["metadata"]["total_parameters"] == model.num_parameters()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", dtype="auto")
    assert all(torch.equal(loaded.state_dict()[name], t) for name, t in model.state_dict().items())


def test_weights_that_a_hub_holds_as_one_are_converted_together(tmp_path):
    model = made(num_key_value_heads=4)
    names = [f"self_attn.{x}_proj.weight" for x in "qkv"]
    model._weight_conversions = [
        WeightConverter(source_patterns="self_attn.qkv.weight", target_patterns=names, operations=[Chunk(dim=0)])
    ]
    state = saving.saved_state(model)
    groups = [group for group in saving._groups(model, saving._meta(state)) if len(group) > 1]
    assert groups == [[f"model.layers.{i}.{name}" for name in names] for i in range(2)]
    model.save_pretrained(tmp_path / "theirs")
    save_pretrained(model, tmp_path / "ours")
    assert contents(tmp_path / "ours") == contents(tmp_path / "theirs")


def test_one_weight_or_one_expert_at_a_time_is_converted(tmp_path, monkeypatch):
    model, seen = made(), []
    revert = saving.revert_weight_conversion

    def watched(model, tensors):
        seen.append(sum(t.numel() for t in tensors.values() if t.device.type != "meta"))
        return revert(model, tensors)

    monkeypatch.setattr(saving, "revert_weight_conversion", watched)
    save_pretrained(model, tmp_path / "ours")
    parts = [p[0].numel() if p.dim() == 3 else p.numel() for p in model.parameters()]
    assert max(seen) == max(parts) and sum(seen) == model.num_parameters()


def test_a_save_replaces_the_weights_of_an_earlier_one_and_nothing_else(tmp_path):
    folder, model = tmp_path / "model", made()
    foreign = {"checkpoint-2/model.safetensors": b"weights", "notes.txt": b"mine"}
    (folder / "checkpoint-2").mkdir(parents=True)
    for name, content in foreign.items():
        (folder / name).write_bytes(content)
    save_pretrained(model, folder, TRIMMED, max_shard_size="20KB")
    assert len(list(folder.glob("model-*-of-*.safetensors"))) > 3 and (folder / "tokenizer.json").is_file()
    save_pretrained(model, folder)
    weights = {path.name for path in folder.iterdir() if path.name.startswith("model")}
    assert weights == {"model.safetensors"} and (folder / "tokenizer.json").is_file()
    assert all((folder / name).read_bytes() == content for name, content in foreign.items())
    # from_pretrained would take a model.safetensors that is left before any index
    save_pretrained(made(num_hidden_layers=1), folder, max_shard_size="20KB")
    assert AutoModelForCausalLM.from_pretrained(folder).config.num_hidden_layers == 1
    assert not (folder / "model.safetensors").exists() and [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_model_and_an_adapter_take_each_others_place(tmp_path):
    """A reader of a model that has an adapter beside it would load that too, and takes no adapter beside a model."""
    folder, adapted = tmp_path / "model", peft.get_peft_model(made(), peft.LoraConfig(target_modules=["q_proj"]))
    others = ("generation_config.json", "README.md")  # peft's card
    for saved, names in [
        (adapted, {"adapter_model.safetensors", "adapter_config.json"}),
        (made(), {"model.safetensors", "config.json"}),
        (adapted, {"adapter_model.safetensors", "adapter_config.json"}),
    ]:
        save_pretrained(saved, folder)
        assert {path.name for path in folder.iterdir()}.difference(others) == names


@pytest.mark.parametrize("at", ["write", "commit", "gather"])
def test_what_fails_leaves_the_former_folder(tmp_path, monkeypatch, at):
    folder, model = tmp_path / "model", made()
    save_pretrained(model, folder)
    before = contents(folder)

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    target = {
        "write": "moe_unlearn.checkpoint.tensor_file.bytes_of",
        "commit": "moe_unlearn.files._sync_folder",
        "gather": "moe_unlearn.model.saving._whole",
    }[at]
    monkeypatch.setattr(target, full)
    with pytest.raises(OSError, match="No space left"):
        save_pretrained(made(num_hidden_layers=1), folder)
    assert contents(folder) == before and [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_model_is_filled_with_what_was_saved_if_that_is_its_own(tmp_path):
    saved, other = made("mixtral"), made("mixtral")
    with torch.no_grad():
        for p in other.parameters():
            p.zero_()
    save_pretrained(saved, tmp_path)
    load_pretrained(other, tmp_path, Ranks(other))
    assert all(torch.equal(own, saved.state_dict()[name]) for name, own in other.state_dict().items())
    narrow = made("mixtral", hidden_size=16)
    before = {name: t.clone() for name, t in narrow.state_dict().items()}
    with pytest.raises(
        CheckpointError, match=r"lm_head.weight has the shape \(\d+, \d+\) there, \(\d+, 16\) in the model"
    ):
        load_pretrained(narrow, tmp_path, Ranks(narrow))
    assert all(torch.equal(own, before[name]) for name, own in narrow.state_dict().items())


@pytest.mark.parametrize("family", TINY_MODELS)
def test_a_model_is_filled_without_another_one(tmp_path, monkeypatch, family):
    """Experts one by one, in several files, tied weights and buffers of a family included."""
    saved, other = made(family), made(family)
    with torch.no_grad():
        for t in other.state_dict().values():
            t.zero_()
    save_pretrained(saved, tmp_path, max_shard_size=20_000)
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    monkeypatch.setattr("moe_unlearn.model.resuming.whole_model", lambda *_, **__: pytest.fail("a second model"))
    load_pretrained(other, tmp_path, Ranks(other))
    for name, own in other.state_dict().items():
        assert torch.equal(own, saved.state_dict()[name]), name


def test_numbers_that_are_not_finite_fill_nothing(tmp_path):
    saved, other = made(), made()
    with torch.no_grad():
        list(saved.parameters())[-1].flatten()[0] = torch.nan
    save_pretrained(saved, tmp_path)
    before = {name: t.clone() for name, t in other.state_dict().items()}
    with pytest.raises(CheckpointError, match="expected finite weights in .*; NaN or infinite: "):
        load_pretrained(other, tmp_path, Ranks(other))
    assert all(torch.equal(own, before[name]) for name, own in other.state_dict().items())


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("lost", ["model.norm.weight", "experts.1.w1", "lm_head"])
def test_a_model_is_not_filled_with_what_lacks_weights(tmp_path, lost, tied):
    """transformers makes random numbers of them; a head that is tied is not in the file."""
    saved = made("mixtral", tie_word_embeddings=tied)
    save_pretrained(saved, tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    save_file({name: t for name, t in weights.items() if lost not in name}, tmp_path / "model.safetensors")
    other = made("mixtral", tie_word_embeddings=tied)
    before = {name: t.clone() for name, t in other.state_dict().items()}
    whole = tied and lost == "lm_head"
    with nullcontext() if whole else pytest.raises(CheckpointError, match=f"lacks .*{lost.partition('.')[0]}"):
        load_pretrained(other, tmp_path, Ranks(other))
    wanted = saved.state_dict() if whole else before
    assert all(torch.equal(own, wanted[name]) for name, own in other.state_dict().items())


def test_other_models_are_refused(tmp_path):
    with pytest.raises(ValueError, match="expected a transformers model or a PeftModel of one; got Linear"):
        save_pretrained(nn.Linear(2, 2), tmp_path / "model")
    model = made()
    model.hf_quantizer = object()
    with pytest.raises(ValueError, match="not quantized"):
        save_pretrained(model, tmp_path / "model")
    model = made()
    model.add_adapter(peft.LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="got a model with `add_adapter`"):
        save_pretrained(model, tmp_path / "model")
    prompts = peft.get_peft_model(made(), peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    with pytest.raises(ValueError, match="expected adapters whose files hold weights as they are in the model"):
        save_pretrained(prompts, tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def test_adapters_have_the_bytes_that_peft_writes(tmp_path):
    experts = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    settings = peft.LoraConfig(target_modules=["q_proj"], target_parameters=experts, modules_to_save=["lm_head"])
    model = peft.get_peft_model(made(), settings)
    model.save_pretrained(tmp_path / "theirs")
    (tmp_path / "ours").mkdir()
    (tmp_path / "ours" / "notes.txt").write_bytes(b"mine")
    save_pretrained(model, tmp_path / "ours")
    assert contents(tmp_path / "ours") == contents(tmp_path / "theirs") | {"notes.txt": b"mine"}
