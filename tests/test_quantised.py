"""Base weights of 8 or 4 bits under an adapter: what they compute, what they take, and what refuses them."""

import importlib
import json
import shutil
from importlib.util import find_spec

import pytest
import torch

from moe_unlearn import UnlearnStep
from moe_unlearn.cli import main
from moe_unlearn.config import Recipe
from moe_unlearn.expert_state import is_quantised, whole
from moe_unlearn.experts import experts_modules, weights_of
from moe_unlearn.model import adapters, loading, quantised
from moe_unlearn.model.adapters import adapted
from moe_unlearn.plan.known import WHOLE, held_at_rest
from tests.support.batches import random_batch
from tests.support.command_line import arguments, saved
from tests.support.models import tiny_model

QUICK = ["--set", "steps=2", "batch_size=4", "data.max_length=48", "optimizer.lr=1e-2", "data.retain_eval=0"]
GIVEN = ["--adapter", "r=2,bits=8"]
EACH = [
    pytest.param(bits, marks=pytest.mark.skipif(find_spec(library) is None, reason=f"{library} is not installed"))
    for bits, library in quantised.LIBRARIES.items()
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder whose model is of bfloat16, and wide enough for blocks of 64 weights."""
    root = tmp_path_factory.mktemp("quantised")
    tokenizer = saved(root)
    torch.manual_seed(0)
    tiny_model("olmoe", vocab_size=len(tokenizer), hidden_size=64).bfloat16().save_pretrained(root / "model")
    return root


@pytest.fixture
def stored(folder, tmp_path):
    """A model folder that says it is quantised by GPTQ."""
    made = tmp_path / "stored"
    shutil.copytree(folder / "model", made)
    config = json.loads((made / "config.json").read_text(encoding="utf-8"))
    (made / "config.json").write_text(
        json.dumps(config | {"quantization_config": {"quant_method": "gptq", "bits": 4}}), encoding="utf-8"
    )
    return made


def recipe(*overrides):
    return Recipe.load("npo", ["adapter=true", "optimizer.lr=1e-2", *overrides])


def error_of(capsys):
    error = capsys.readouterr().err
    lines = [line for line in error.strip().splitlines() if "error: " in line]
    assert "Traceback" not in error and len(lines) == 1
    return lines[0]


@pytest.mark.quick
@pytest.mark.parametrize(
    "override, message",
    {
        "adapter.bits=5": "adapter.bits must be one of 8, 4; got 5",
        "adapter.merge=true": "adapter.merge adds the adapter to whole weights, and adapter.bits=8 rounds them",
        "wagle=true": "wagle scores whole weights, and adapter.bits=8 rounds them: wagle=null, or adapter.bits=null",
        "scope.kind=seuf": "adapter trains adapters alone",
    }.items(),
)
def test_a_recipe_that_rewrites_rounded_weights_is_refused(override, message):
    with pytest.raises(ValueError, match=message):
        recipe("adapter.bits=8", override)


@pytest.mark.quick
@pytest.mark.parametrize(("bits", "library"), quantised.LIBRARIES.items())
def test_a_missing_library_is_named_before_anything_is_loaded(bits, library, folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(quantised, "find_spec", lambda name: None)
    out = tmp_path / "out"
    assert main(["run", "npo", *arguments(folder), "--adapter", f"bits={bits}", "--out", str(out)]) == 2
    said = error_of(capsys)
    assert f"{bits} bits a weight need the library '{library}', which is missing: pip install {library}" in said
    assert not (out / "recipe.yaml").exists()


@pytest.mark.quick
@pytest.mark.parametrize(
    "given, message",
    {
        (): "are quantised (gptq) and cannot be moved: give --adapter r=8, which trains beside them",
        ("--adapter", "r=2", "--merge"): "--merge adds an adapter to whole weights, and those of",
        ("--adapter", "bits=8"): "expected whole weights to round to 8 bits; those of",
    }.items(),
)
def test_what_a_quantised_folder_cannot_is_refused_before_it_is_loaded(
    given, message, folder, stored, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(quantised, "find_spec", lambda name: True)
    run = ["run", "npo", *arguments(folder, model=stored), "--out", str(tmp_path / "out"), *given]
    assert main(run) == 2
    assert message in error_of(capsys)


@pytest.mark.quick
def test_verbs_that_read_weights_one_by_one_refuse_a_quantised_folder(folder, stored, tmp_path, capsys):
    sides = ["--forget", str(folder / "forget.jsonl"), "--retain", str(folder / "retain.jsonl")]
    verbs = {
        "mask": ["--model", str(stored), *sides, "--out", str(tmp_path / "mask.safetensors")],
        "audit": ["--model", str(stored), "--before", str(folder / "model"), *sides, "--out", str(tmp_path / "audit")],
        "delta": [str(stored), str(folder / "model"), "--out", str(tmp_path / "delta.safetensors")],
    }
    verbs["audit"] += ["--holdout", str(folder / "holdout.jsonl")]
    for verb, given in verbs.items():
        assert main([verb, *given]) == 2, verb
        assert "quantised (gptq)" in error_of(capsys), verb


@pytest.mark.quick
def test_a_step_refuses_quantised_weights_without_an_adapter_and_whole_ones_with_bits(folder):
    model = tiny_model("olmoe")
    model.hf_quantizer = object()
    with pytest.raises(ValueError, match="a step without an adapter moves the weights of the model, and those of this"):
        UnlearnStep(model, "npo")
    with pytest.raises(ValueError, match=r"adapter.bits=8 is for a model with such weights: .*Loading\(bits=8\)"):
        quantised.check_rounded(tiny_model("olmoe"), recipe("adapter.bits=8"))


@pytest.mark.quick
def test_adapters_on_experts_of_8_bits_ask_for_a_peft_that_gives_factors(monkeypatch):
    monkeypatch.setattr(adapters, "has_factors", lambda module: False)
    adapted(tiny_model("olmoe"), recipe("adapter.bits=4", "adapter.targets=experts"))
    with pytest.raises(ValueError, match="adapters on experts of 8 bits need a PEFT that gives their factors; this is"):
        adapted(tiny_model("olmoe"), recipe("adapter.bits=8", "adapter.targets=experts"))


@pytest.mark.quick
@pytest.mark.parametrize(("bits", "least", "most"), [(8, 1.0, 1.1), (4, 0.5, 0.57)])
def test_what_is_held_at_rest_has_rounded_weights_and_one_layer_of_whole_experts(folder, bits, least, most):
    model = adapted(loading.meta_model(folder / "model"), recipe())
    rounded = [weight for _, weight in quantised.rounded_weights(model)]
    count = sum(weight.numel() for weight in rounded)
    assert len(rounded) == 2 * (4 + 2)  # of each layer the four projections of attention, and the experts' two
    steps = (UnlearnStep(model, given) for given in (recipe(), recipe(f"adapter.bits={bits}")))
    plain, own = (held_at_rest(step.view(), step.prepared, 0, None) for step in steps)
    assert least * count <= 2 * count - (plain["weights"] - own["weights"]) <= most * count
    assert own[WHOLE] == 2 * 8 * 3 * 64 * 24 and WHOLE not in plain


@pytest.mark.slow
def test_a_plan_rehearses_rounded_weights(folder, capsys):
    assert main(["run", "npo", *arguments(folder), *GIVEN, "--dry-run", "--json"]) == 0
    made = json.loads(capsys.readouterr().out)
    given = recipe("adapter.bits=8", "adapter.r=2")
    model = adapted(loading.meta_model(folder / "model"), given)
    step = UnlearnStep(model, given)
    assert made["memory"][WHOLE] == 2 * 8 * 3 * 64 * 24
    known = held_at_rest(step.view(), step.prepared, 0, None)["weights"]
    assert made["memory"]["weights"] - known == sum(buffer.nbytes for buffer in model.buffers())
    assert any("checkpointing is on" in note for note in made["notes"])


@pytest.mark.parametrize("targets", ["experts", pytest.param("attention", marks=pytest.mark.nightly)])
@pytest.mark.parametrize("bits", EACH)
def test_a_step_computes_what_it_does_with_the_rounded_weights(folder, bits, targets):
    rounded, _ = loading.load_model(folder / "model", loading.Loading(bits=bits, dtype="float32"))
    plain, _ = loading.load_model(folder / "model", loading.Loading(dtype="float32"))
    for own, other in zip(experts_modules(rounded).values(), experts_modules(plain).values(), strict=True):
        for name in weights_of(own):
            weight, before = getattr(own, name), getattr(other, name)
            assert is_quantised(weight) and weight.shape == before.shape and not weight.requires_grad
            error = (whole(weight).float() - before.float()).norm() / before.float().norm()
            assert 0 < error < {8: 0.01, 4: 0.12}[bits]
            before.data.copy_(whole(weight))
    for name, _ in quantised.rounded_weights(plain):
        if ".experts." not in name:
            weight = rounded.get_parameter(name)
            if bits == 4:
                weight = importlib.import_module("bitsandbytes").functional.dequantize_4bit(
                    weight.data, weight.quant_state
                )
            plain.get_parameter(name).data.copy_(whole(weight))
    given, trained = recipe(f"adapter.targets={targets}"), []
    batches = [random_batch(rounded.config.vocab_size, seed=seed) for seed in (0, 1)]
    for model in (rounded, plain):
        step = UnlearnStep(adapted(model, given), given)
        step.prepare(batches[:1], batches[1:])
        losses = [step(*batches) for _ in range(2)]
        named = {name: p.detach().float() for name, p in step.model.named_parameters() if "lora_" in name}
        trained.append((losses, named))
    (first, own), (second, other) = trained
    for one, two in zip(first, second, strict=True):
        assert one == pytest.approx(two, rel=1e-3)
    moved = sum(float(p.norm()) for name, p in own.items() if "lora_B" in name)
    apart = sum(float((p - other[name]).norm()) for name, p in own.items() if "lora_B" in name)
    assert moved > 0 and apart < 0.01 * moved


@pytest.mark.slow
@pytest.mark.parametrize("bits", EACH)
def test_a_run_on_rounded_weights_saves_an_adapter_and_resumes(folder, tmp_path, bits):
    out = tmp_path / "out"
    given = [*arguments(folder), "--adapter", f"r=2,targets=all,bits={bits}", *QUICK, "--out", str(out), "--no-eval"]
    assert main(["run", "npo", *given]) == 0
    assert {"adapter_config.json", "adapter_model.safetensors"} <= {path.name for path in (out / "model").iterdir()}
    assert not (out / "model" / "model.safetensors").exists()
    assert main(["run", "npo", *given, "--resume", "--set", "steps=3"]) == 0
    (steps,) = json.loads((out / "trajectory.json").read_text(encoding="utf-8")).values()
    assert [entry["step"] for entry in steps] == [1, 2, 3]


@pytest.mark.nightly
@pytest.mark.parametrize("bits", EACH)
def test_a_report_says_what_a_step_on_rounded_weights_was_planned_to_take(folder, tmp_path, bits):
    out = tmp_path / "out"
    given = [*arguments(folder), "--adapter", f"r=2,bits={bits}", *QUICK, "--out", str(out), "--no-samples"]
    assert main(["run", "npo", *given]) == 0
    assert json.loads((out / "cost.json").read_text(encoding="utf-8"))["planned"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("bits", EACH[1:])
def test_a_folder_of_rounded_linear_layers_trains_an_adapter(folder, tmp_path, bits):
    """One that bitsandbytes itself has rounded, whose experts are whole."""
    transformers = importlib.import_module("transformers")
    config = transformers.BitsAndBytesConfig(load_in_4bit=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "model", quantization_config=config)
    shutil.copytree(folder / "model", tmp_path / "stored", ignore=shutil.ignore_patterns("*.safetensors"))
    model.save_pretrained(tmp_path / "stored")
    given = [*arguments(folder, model=tmp_path / "stored"), *QUICK, "--out", str(tmp_path / "out"), "--no-eval"]
    assert main(["run", "npo", *given, "--adapter", "r=2"]) == 0
    assert (tmp_path / "out" / "model" / "adapter_model.safetensors").exists()
