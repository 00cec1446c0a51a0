"""A saved model that comes with code of its own, which leaves a trace where it runs."""

import json

from safetensors.torch import save_file
from transformers import OlmoeForCausalLM

CODE = """
from pathlib import Path

from transformers import OlmoeConfig, OlmoeForCausalLM

Path({trace!r}).write_text("ran")


class OwnConfig(OlmoeConfig):
    pass


class OwnForCausalLM(OlmoeForCausalLM):
    config_class = OwnConfig
"""


def add_own_code(folder, trace, model_type="olmoe_of_its_own"):
    """Let the config of the OLMoE in `folder` name code beside it, which writes the file `trace` when it runs."""
    if model_type != "olmoe":  # transformers does not know then how the hub's weights become the model's
        weights = OlmoeForCausalLM.from_pretrained(folder).state_dict()
        save_file(weights, folder / "model.safetensors", {"format": "pt"})
    (folder / "own.py").write_text(CODE.format(trace=str(trace)), encoding="utf-8")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config |= {
        "model_type": model_type,
        "architectures": ["OwnForCausalLM"],
        "auto_map": {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnForCausalLM"},
    }
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
