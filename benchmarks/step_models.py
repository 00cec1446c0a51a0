"""Make models and batches for `bench_step`: published geometries with random weights, made on the device."""

import copy

import torch
from torch import Tensor, nn
from transformers import DeepseekV2Config, OlmoeConfig, Qwen3MoeConfig
from transformers.initialization import no_init_weights

from moe_unlearn.benchmark import tiny_models
from moe_unlearn.ops.bits import num_words, pack_bits

_SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}

OLMOE = {
    "hidden_size": 2048,
    "intermediate_size": 1024,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "num_experts": 64,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 16,
    "vocab_size": 50304,
}
DEEPSEEK_V2_LITE = {
    "hidden_size": 2048,
    "intermediate_size": 10944,
    "moe_intermediate_size": 1408,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "num_hidden_layers": 27,
    "vocab_size": 102400,
    "n_routed_experts": 64,
    "num_experts_per_tok": 6,
    "n_shared_experts": 2,
    "first_k_dense_replace": 1,
    "q_lora_rank": None,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
}
QWEN3_30B_A3B = {
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "num_hidden_layers": 48,
    "vocab_size": 151936,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
}
# two layers of OLMoE with a small vocabulary, so that embeddings and head do not hide the layers
WIDE = {**OLMOE, "num_hidden_layers": 2, "vocab_size": 2048}
_TOY = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "moe_intermediate_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 16,
    "num_hidden_layers": 2,
    "vocab_size": 256,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 16,
}

GEOMETRIES = {
    "wide": (OlmoeConfig, WIDE),
    "OLMoE-1B-7B": (OlmoeConfig, OLMOE),
    "DeepSeek-V2-Lite": (DeepseekV2Config, DEEPSEEK_V2_LITE),
    "Qwen3-30B-A3B": (Qwen3MoeConfig, QWEN3_30B_A3B),
}


def build(geometry: str, device: str = "cpu", *, toy: bool = False, **changes) -> nn.Module:
    """Return a causal LM of this geometry in bf16, or the demo's in float32 ("tiny").

    `toy` shrinks every size but the number of experts; `changes` go to the config.
    """
    if geometry == "tiny":
        return tiny_models.tiny_olmoe(tiny_models.SIZES["demo"].vocab_size).to(device).eval()
    config_class, values = GEOMETRIES[geometry]
    values = {**values, **({k: v for k, v in _TOY.items() if k in values} if toy else {}), **changes, **_SPECIAL}
    model_class = _causal(config_class)
    with no_init_weights(), torch.device(device):
        model = model_class._from_config(
            config_class(**values), dtype=torch.bfloat16, experts_implementation="grouped_mm"
        )
    generator = torch.Generator(device).manual_seed(0)
    for p in model.parameters():
        if p.dim() == 1:
            p.data.fill_(1)
            continue
        # drawn once for all experts, because drawing each would take longer than the measurement
        shape = p.shape[1:] if p.dim() == 3 else p.shape
        p.data.copy_(torch.randn(shape, generator=generator, device=device).mul_(0.02))
    return model.eval()


def _causal(config_class):
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    return MODEL_FOR_CAUSAL_LM_MAPPING[config_class]


def twin(model: nn.Module) -> nn.Module:
    """Return a second model over the same weights in memory, with its own parameters, gradients and config."""
    parameters = {id(p): nn.Parameter(p.data) for p in model.parameters()}
    return copy.deepcopy(model, parameters)


def batch(vocab: int, rows: int, length: int, seed: int, device: str = "cpu") -> dict[str, Tensor]:
    """Return random whole rows: every position is attended and carries a loss."""
    ids = torch.randint(3, vocab, (rows, length), generator=torch.Generator().manual_seed(seed)).to(device)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}


def random_mask(model: nn.Module, keep: float) -> dict:
    """Return the state of a WAGLE mask whose bits are set with probability one half, whatever `keep` says."""
    packed = {}
    for name, p in model.named_parameters():
        words = torch.randint(-(2**31), 2**31, (num_words(p.shape[-1]),), device=p.device).to(torch.int32)
        words &= pack_bits(torch.ones(p.shape[-1], dtype=torch.bool, device=p.device))
        packed[name] = words.expand(*p.shape[:-1], -1).contiguous()
    shapes = [[name, list(p.shape)] for name, p in model.named_parameters()]
    return {"shapes": shapes, "packed": packed, "keep": keep, "gamma": 1.0, "official": False, "magnitudes": {}}
