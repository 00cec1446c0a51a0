"""Write checkpoints of random weights as the hub has them, one tensor at a time: no model is ever in memory."""

import json
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from torch import Tensor
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedTokenizerBase

from moe_unlearn.checkpoint.tensor_file import Kind, tensor_file
from moe_unlearn.files import write_text
from moe_unlearn.model.saving import saved_kinds

INDEX = "model.safetensors.index.json"


def write(
    folder: Path,
    config: PretrainedConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    dtype: torch.dtype = torch.bfloat16,
    shard: int = 1 << 30,
) -> int:
    """Write a causal LM of this config, its experts each by a name of its own, in files of about `shard` bytes.

    Vectors are 1, and matrices normally distributed with a standard deviation of 0.02. Returns the bytes of all
    tensors. The same config gives the same bytes.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    kinds = saved_kinds(model)
    empty = {name: torch.empty(kind.shape, dtype=kind.dtype, device="meta") for name, kind in kinds.items()}
    split = split_torch_state_dict_into_shards(
        empty, filename_pattern="model{suffix}.safetensors", max_shard_size=shard
    )
    generator = torch.Generator().manual_seed(0)
    for file, names in split.filename_to_tensors.items():
        with tensor_file(folder / file, {name: kinds[name] for name in names}, {"format": "pt"}) as put:
            for name in names:
                put(name, _random(kinds[name], generator))
    size = sum(kind.size for kind in kinds.values())
    if split.is_sharded:
        index = {"metadata": {"total_size": size}, "weight_map": split.tensor_to_filename}
        write_text(folder / INDEX, json.dumps(index, indent=2) + "\n")
    config.dtype, config.architectures = str(dtype).removeprefix("torch."), [type(model).__name__]
    config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return size


def _random(kind: Kind, generator: torch.Generator) -> Tensor:
    if len(kind.shape) == 1:
        return torch.ones(kind.shape, dtype=kind.dtype)
    return torch.randn(kind.shape, generator=generator).mul_(0.02).to(kind.dtype)
