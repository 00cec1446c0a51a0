"""Models are loaded whole, to the device that was named, and nothing comes from elsewhere unless it was asked for."""

import json
import os
import shutil
import subprocess
import sys

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import OlmoeConfig, OlmoeForCausalLM, modeling_utils

from moe_unlearn import benchmark
from moe_unlearn.model import adapters, loading
from moe_unlearn.model.loading import Loading, load_model, load_tokenizer, located
from tests.support.command_line import saved
from tests.support.own_code import add_own_code

EXPERTS = "model.layers.1.mlp.experts"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("loading")
    saved(root)
    return root / "model"


@pytest.fixture
def copied(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "model")
    return tmp_path / "model"


def gpus(monkeypatch, count):
    """Let torch see so many GPUs, of which the second is the current one."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)


class Asked(Exception):
    """Carries what `from_pretrained` was asked for."""


@pytest.fixture
def asked(monkeypatch):
    """Return a function that loads and returns what `from_pretrained` was asked for."""

    class Recorder:
        @staticmethod
        def from_pretrained(name, **keywords):
            error = Asked("recorded")
            error.given = name, keywords
            raise error

    def load(source, how, **more):
        monkeypatch.setattr(loading, "AutoModelForCausalLM", Recorder)
        monkeypatch.setattr(loading, "find_adapter_config_file", lambda name, **where: None)
        with pytest.raises(ValueError, match="recorded") as caught:
            load_model(source, how, **more)
        return caught.value.__cause__.given

    return load


@pytest.mark.quick
@pytest.mark.parametrize(
    ("count", "device", "told"),
    [
        (0, "tpu", "expected a device among auto, cpu, cuda, cuda:N and auto-map; got 'tpu'"),
        (0, "cuda:", "got 'cuda:'"),
        (0, "cuda", "device 'cuda' is not here: the GPUs that torch sees are none"),
        (2, "cuda:9", "device 'cuda:9' is not here: the GPUs that torch sees are cuda:0 to cuda:1"),
    ],
)
def test_a_device_that_is_not_here_is_refused(monkeypatch, count, device, told):
    gpus(monkeypatch, count)
    with pytest.raises(ValueError, match=told):
        Loading(device=device)


@pytest.mark.quick
def test_what_is_unknown_or_not_installed_is_refused(monkeypatch):
    with pytest.raises(ValueError, match="expected a dtype among auto, float32, bfloat16, float16; got 'int8'"):
        Loading(dtype="int8")
    with pytest.raises(ValueError, match=r"expected a regular expression; got '\['"):
        Loading(allow_weights="[")
    assert Loading(device="auto-map").device_map == "auto"
    monkeypatch.setattr(loading, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="needs the library 'accelerate'"):
        Loading(device="auto-map")


@pytest.mark.quick
@pytest.mark.parametrize("backend", ["gloo", "nccl"])
def test_ranks_have_devices_of_their_own(monkeypatch, backend):
    gpus(monkeypatch, 2)
    monkeypatch.setattr(loading, "initialised", lambda: True)
    monkeypatch.setattr(loading.distributed, "get_backend", lambda: backend)
    for device in ("cuda", "cuda:1", "auto-map", *(["cpu"] if backend == "nccl" else [])):
        with pytest.raises(ValueError, match=f"each rank has a device of its own: .*; got '{device}'"):
            Loading(device=device)
    assert Loading().device_map == "cuda:1"


@pytest.mark.quick
@pytest.mark.parametrize(
    ("count", "device", "expected"),
    [
        (0, "auto", None),
        (2, "auto", "cuda:1"),
        (2, "cuda", "cuda:1"),
        (2, "cuda:0", "cuda:0"),
        (2, "cpu", None),
        (2, "auto-map", "auto"),
        (0, "auto-map", "auto"),
    ],
)
def test_weights_go_straight_to_the_device(monkeypatch, folder, asked, count, device, expected):
    gpus(monkeypatch, count)
    name, given = asked(folder, Loading(device=device, dtype="bfloat16"))
    assert name == str(folder) and given.get("device_map") == expected
    assert given["dtype"] == "bfloat16" and given["local_files_only"] and given["trust_remote_code"] is False


@pytest.mark.quick
def test_a_hub_id_is_asked_for_by_name_alone(asked, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for source, revision in (("org/name", None), ("org/name@v1.2", "v1.2"), ("org/name@refs/pr/3", "refs/pr/3")):
        name, given = asked(source, Loading())
        assert (name, given.get("revision")) == ("org/name", revision)
        assert "local_files_only" not in given and given["trust_remote_code"] is False
    (tmp_path / "org").mkdir()  # a folder's name that was mistyped is no id
    with pytest.raises(ValueError, match="org/name is not a folder"):
        located("org/name")
    (tmp_path / "org" / "name").mkdir()
    with pytest.raises(ValueError, match="org/name has no config.json"):
        located("org/name")
    for source in ("name", "/org/name", "org/name/more", "./org/nam", "org/name@"):
        with pytest.raises(ValueError, match="is not a folder"):
            located(source)


def test_a_model_of_the_hub_is_loaded_by_its_revision(folder, tmp_path):
    """From the hub's cache, as it lies on the disk after a download."""
    (tmp_path / "hub" / "models--org--name" / "refs").mkdir(parents=True)
    (tmp_path / "hub" / "models--org--name" / "refs" / "v1").write_text("a" * 40, encoding="utf-8")
    shutil.copytree(folder, tmp_path / "hub" / "models--org--name" / "snapshots" / ("a" * 40))
    shutil.copytree(tmp_path / "hub" / "models--org--name" / "refs", tmp_path / "hub" / "models--org--adapter" / "refs")
    adapter = tmp_path / "hub" / "models--org--adapter" / "snapshots" / ("a" * 40)
    adapter.mkdir(parents=True)
    settings = {"base_model_name_or_path": "org/base", "peft_type": "LORA"}  # a base that would have to be downloaded
    (adapter / "adapter_config.json").write_text(json.dumps(settings), encoding="utf-8")
    code = (
        "from moe_unlearn.model.loading import load_model, load_tokenizer\n"
        "print(load_model('org/name@v1')[0].config.num_experts, len(load_tokenizer('org/name@v1')))\n"
        "for name in ('org/name', 'org/adapter@v1'):\n"
        "    try: load_model(name)\n"
        "    except ValueError as error: print(error)\n"
    )
    environment = {"HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1", "PATH": "", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=tmp_path, capture_output=True, text=True, check=True
    )
    first, second, third = done.stdout.splitlines()
    assert first.startswith("8 ")
    assert second.startswith("cannot load a causal language model with its tokenizer from org/name: ")
    assert third.endswith("an adapter on the hub: download that to a folder")


def test_a_folder_needs_no_network(folder, monkeypatch):
    def refuse(*_):
        raise AssertionError("the network was asked")

    monkeypatch.setattr("socket.socket.connect", refuse)
    monkeypatch.setattr("socket.getaddrinfo", refuse)
    model, tokenizer = load_model(folder)
    assert model.vocab_size == len(tokenizer) == len(load_tokenizer(folder)) and not model.training


@pytest.mark.parametrize("model_type", ["olmoe_of_its_own", "olmoe"])
def test_code_that_comes_with_a_model_is_not_run(copied, tmp_path, monkeypatch, model_type):
    """transformers asks on the terminal, where `yes |` would answer."""
    monkeypatch.setattr("builtins.input", lambda *_: "yes")
    add_own_code(copied, tmp_path / "trace", model_type)
    if model_type == "olmoe":  # transformers has the class, and takes its own
        assert type(load_model(copied)[0]) is OlmoeForCausalLM
    else:
        told = "contains custom code .* It is run with --trust-remote-code alone"
        for load in (load_model, loading.meta_model):
            with pytest.raises(ValueError, match=told if load is load_model else "custom code"):
                load(copied)
        with pytest.raises(ValueError, match=told):
            benchmark.unlearning(copied, ["a text to forget"], ["a text to keep"], ["ga"])
    assert not (tmp_path / "trace").exists()


def test_code_that_is_trusted_is_run(copied, tmp_path):
    add_own_code(copied, tmp_path / "trace")
    model, _ = load_model(copied, Loading(trust_remote_code=True))
    assert type(model).__name__ == "OwnForCausalLM" and (tmp_path / "trace").exists()


def test_code_of_a_tokenizer_is_not_run(copied, tmp_path, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: "yes")
    (copied / "own.py").write_text(f"open({str(tmp_path / 'trace')!r}, 'w').close()\n", encoding="utf-8")
    settings = {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", None]}}
    (copied / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    assert len(load_tokenizer(copied)) == load_model(copied)[0].vocab_size  # as transformers reads tokenizer.json
    assert not (tmp_path / "trace").exists()


def without(*parts):
    return lambda weights: [weights.pop(name) for name in list(weights) if any(part in name for part in parts)]


DAMAGE = {
    "half the experts": (
        without(*(f"experts.{i}." for i in range(4, 8))),
        "it has another shape of model.layers.0.mlp.experts.down_proj, .* and 1 more",
    ),
    "one projection": (without(f"{EXPERTS}.2.up_proj"), f"it lacks parts of {EXPERTS}.gate_up_proj"),
    "a layer of experts": (without(EXPERTS), f"it lacks {EXPERTS}.down_proj, {EXPERTS}.gate_up_proj"),
    "a weight": (without("layers.0.self_attn.q_proj"), r"it lacks model.layers.0.self_attn.q_proj.weight"),
    "the head": (without("lm_head"), r"it lacks lm_head.weight \(--allow-weights REGEX lets weights by\)"),
    "a shape": (
        lambda weights: weights.update({"model.norm.weight": torch.ones(3)}),
        "it has another shape of model.norm.weight",
    ),
    "a number": (
        lambda weights: weights[f"{EXPERTS}.2.up_proj.weight"][0].fill_(torch.nan),
        f"expected finite weights in .*; NaN or infinite: {EXPERTS}.gate_up_proj",
    ),
    "one more": (
        lambda weights: weights.update({"v_head.weight": torch.ones(3)}),
        "it has what this model has not: v_head.weight",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_checkpoint_that_is_not_whole_is_refused(copied, capfd, damage):
    """transformers makes random numbers of what is missing, and says so in a table."""
    change, told = DAMAGE[damage]
    weights = load_file(copied / "model.safetensors")
    change(weights)
    save_file(weights, copied / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=told) as caught:
        load_model(copied)
    assert str(copied) in str(caught.value) and "LOAD REPORT" not in capfd.readouterr().err
    if damage in ("the head", "one more"):
        assert load_model(copied, Loading(allow_weights="head"))[0].lm_head.weight.isfinite().all()


def test_an_index_that_leads_out_of_its_folder_is_refused(copied, tmp_path):
    names = load_file(copied / "model.safetensors").keys()
    (copied / "model.safetensors").rename(tmp_path / "outside.safetensors")
    index = copied / "model.safetensors.index.json"
    for place in ("../outside.safetensors", str(tmp_path / "outside.safetensors")):
        index.write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(names, place)}), encoding="utf-8")
        with pytest.raises(ValueError, match="index.json: expected names of files beside it; got '.*outside.safetens"):
            load_model(copied)
    index.write_text("[" * 100_000, encoding="utf-8")
    with pytest.raises(ValueError, match="index.json: expected the index of a model's files"):
        load_model(copied)


def test_more_experts_a_token_than_there_are_is_refused(copied):
    config = json.loads((copied / "config.json").read_text(encoding="utf-8")) | {"num_experts_per_tok": 9}
    (copied / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(ValueError, match=r"num_experts_per_tok of at most num_experts \(8\) in .*; got 9"):
        load_model(copied)


def test_loading_holds_the_weights_once(folder, tmp_path):
    """Beside them there are the experts of one layer while they are put together."""
    sizes = {"hidden_size": 512, "intermediate_size": 256, "num_experts": 16, "num_hidden_layers": 24}
    more = {"num_attention_heads": 4, "num_key_value_heads": 4, "vocab_size": 512, "eos_token_id": 1}
    large = tmp_path / "large"
    OlmoeForCausalLM(OlmoeConfig(**sizes, **more)).to(torch.bfloat16).save_pretrained(large)
    for file in folder.glob("*token*"):
        shutil.copy(file, large)
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.loading_child", str(folder), str(large)],
        capture_output=True,
        text=True,
        check=True,
    )
    found = json.loads(done.stdout)
    assert found["weights"] > 300 * 2**20
    # parts, stacks and the whole of one weight; holes between what is still in use would be a third of the weights
    assert found["weights"] <= found["peak"] <= found["weights"] + 4 * found["largest"], found
    assert not found["mapped"]


def test_how_transformers_reads_is_its_own_again(folder, copied):
    before = modeling_utils.safe_open, dict(os.environ)
    load_model(folder)
    (copied / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(ValueError, match="cannot load"):
        load_model(copied)
    assert (modeling_utils.safe_open, dict(os.environ)) == before


@pytest.fixture
def adapter(copied, tmp_path):
    """A folder with an adapter of the model in `copied`, whose second half is not zero."""
    model, _ = load_model(copied)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    wrapped.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def test_an_adapter_is_put_on_its_base(adapter, copied):
    model, tokenizer = load_model(adapter)
    assert isinstance(model, peft.PeftModel) and not model.training
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trained and all("lora_" in name for name in trained)
    saved_ones = load_file(adapter / "adapter_model.safetensors")
    assert all(
        torch.equal(p, saved_ones[name.replace(".default", "")])
        for name, p in model.named_parameters()
        if p.requires_grad
    )
    assert len(load_tokenizer(adapter)) == len(tokenizer) == len(load_tokenizer(copied))
    ids = torch.arange(6)[None]
    base = load_model(copied)[0](ids).logits
    assert not torch.equal(model(ids).logits, base)
    with model.disable_adapter():
        assert torch.equal(model(ids).logits, base)


def test_a_base_of_the_hub_comes_from_its_cache(adapter, copied, monkeypatch):
    settings = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    settings |= {"base_model_name_or_path": "org/base", "revision": "v1"}
    (adapter / "adapter_config.json").write_text(json.dumps(settings), encoding="utf-8")
    cached = {("org/base", "config.json", "v1"): str(copied / "config.json")}
    monkeypatch.setattr(
        loading, "try_to_load_from_cache", lambda name, file, revision: cached.get((name, file, revision))
    )
    assert isinstance(load_model(adapter)[0], peft.PeftModel)


def test_what_is_wrong_with_an_adapter_is_named(adapter, copied, monkeypatch):
    def named(told, source=adapter, how=None):
        with pytest.raises(ValueError, match=told):
            load_model(source, how)

    named("an adapter trains on whole weights", how=Loading(fsdp=2))
    with monkeypatch.context() as patch:
        patch.setattr(adapters, "find_spec", lambda name: None)
        named("needs the library 'peft', which is missing: pip install peft")
    whole = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    wrong = {
        "": "expected base_model_name_or_path",
        "org/base": "is an adapter of org/base, which is not in the hub's cache: download it first",
        "/no/base": "/no/base is not",
    }
    with monkeypatch.context() as patch:
        patch.setattr("socket.getaddrinfo", lambda *_: pytest.fail("the network was asked"))
        for base, told in wrong.items():
            text = json.dumps(whole | {"base_model_name_or_path": base})
            (adapter / "adapter_config.json").write_text(text, encoding="utf-8")
            named(told)
    (adapter / "adapter_config.json").write_text(json.dumps(whole), encoding="utf-8")
    weights = load_file(adapter / "adapter_model.safetensors")
    weights.pop(sorted(weights)[0])
    save_file(weights, adapter / "adapter_model.safetensors")
    named("cannot load the adapter from .*: Found missing adapter keys")
    for file in adapter.iterdir():
        shutil.copy(file, copied)
    named("is a model with an adapter", copied)
