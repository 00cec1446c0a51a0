"""A model unlearned here, on disk: plain transformers with no trace of us, experts one by one as on the hub."""

import json

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from moe_unlearn import masks
from moe_unlearn.experts import NAME, enable
from moe_unlearn.step import UnlearnStep
from tests.support import models
from tests.support.batches import random_batch
from tests.support.steps import recipe

FAMILIES = ["tiny_olmoe", "tiny_qwen2_moe", "tiny_qwen3_moe", "tiny_mixtral", "tiny_deepseek_v2"]


def unlearned(family, dtype=torch.float32):
    torch.manual_seed(0)
    model = getattr(models, family)().to(dtype)
    forget, retain = random_batch(64, seed=1), random_batch(64, seed=2)
    step = UnlearnStep(model, recipe("graddiff"))
    step.prepare([forget], [retain])
    step(forget, retain)
    return model, step


@pytest.mark.parametrize("family", FAMILIES)
def test_saved_during_a_run_it_has_the_hubs_layout_and_no_trace_of_us(family, tmp_path):
    model, step = unlearned(family, torch.bfloat16)
    assert model.config._experts_implementation == NAME  # still switched: nobody called close()
    model.save_pretrained(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {"config.json", "generation_config.json", "model.safetensors"}
    assert "moe_unlearn" not in (tmp_path / "config.json").read_text(encoding="utf-8").replace("-", "_")
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        names, metadata = set(file.keys()), file.metadata()
    assert metadata == {"format": "pt"}
    single = {name for name in names if ".experts." in name}
    assert not any("gate_up_proj" in name for name in names) and len(single) % (3 * 8) == 0 and single
    assert names == masks.to_hub(model, dict(model.named_parameters())).keys()

    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto")
    assert loaded.config._experts_implementation != NAME
    own = dict(model.named_parameters())
    assert own.keys() == dict(loaded.named_parameters()).keys()
    for name, p in loaded.named_parameters():
        assert p.dtype == torch.bfloat16 and torch.equal(p.view(torch.int16), own[name].view(torch.int16)), name


def test_closed_the_model_is_as_it_came(tmp_path):
    model, step = unlearned("tiny_olmoe")
    step.close()
    fresh = models.tiny_olmoe()
    assert model.config.to_dict() == fresh.config.to_dict()
    assert model.config._experts_implementation == fresh.config._experts_implementation == "eager"
    assert all(p.requires_grad for p in model.parameters())


def test_asked_for_by_name_it_is_not_saved_either(tmp_path):
    model = models.tiny_olmoe(implementation="moe_unlearn")
    enable(model)
    model.save_pretrained(tmp_path)
    assert NAME not in json.dumps(json.loads((tmp_path / "config.json").read_text(encoding="utf-8")))
