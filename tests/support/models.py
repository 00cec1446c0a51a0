"""Tiny random models of every supported family, and a synthetic experts module for each layout flag."""

from functools import partial

import torch
from transformers import (
    DeepseekV2ForCausalLM,
    DeepseekV3ForCausalLM,
    GptOssForCausalLM,
    GraniteMoeForCausalLM,
    MixtralForCausalLM,
    NemotronHConfig,
    OlmoeForCausalLM,
    PhimoeForCausalLM,
    Qwen2MoeForCausalLM,
    Qwen3MoeForCausalLM,
)
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHExperts

SIZE = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_EXPERTS = {"intermediate_size": 24, "num_experts_per_tok": 2}
# experts that are smaller than the dense layers beside them
_SMALLER = {"intermediate_size": 48, "moe_intermediate_size": 24}
# a dense first layer, latent attention, a shared expert
_DEEPSEEK = {
    **_SMALLER,
    "num_hidden_layers": 3,
    "num_key_value_heads": 4,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "topk_group": 1,
}
# what each family has otherwise than SIZE and _EXPERTS
FAMILIES = {
    "olmoe": (OlmoeForCausalLM, {"num_experts": 8}),
    # a shared expert beside the routed ones
    "qwen2_moe": (Qwen2MoeForCausalLM, {**_SMALLER, "num_experts": 8, "shared_expert_intermediate_size": 32}),
    # normalised routing weights
    "qwen3_moe": (
        Qwen3MoeForCausalLM,
        {**_SMALLER, "num_experts": 8, "num_experts_per_tok": 3, "norm_topk_prob": True, "head_dim": 8},
    ),
    # float32 routing weights
    "mixtral": (MixtralForCausalLM, {"num_local_experts": 4}),
    "deepseek_v2": (DeepseekV2ForCausalLM, {**_DEEPSEEK, "q_lora_rank": None, "topk_method": "greedy", "n_group": 1}),
    # grouped sigmoid routing with scaling
    "deepseek_v3": (DeepseekV3ForCausalLM, {**_DEEPSEEK, "q_lora_rank": 16, "n_group": 2}),
    # transposed, interleaved, biased experts with a clamped gate of their own
    "gpt_oss": (GptOssForCausalLM, {"num_local_experts": 4, "head_dim": 8, "sliding_window": 16}),
    # scaled logits, embeddings and residuals
    "granite_moe": (
        GraniteMoeForCausalLM,
        {"num_local_experts": 4, "logits_scaling": 2.0, "embedding_multiplier": 3.0, "residual_multiplier": 0.7},
    ),
    # a head with a bias
    "phimoe": (PhimoeForCausalLM, {"num_local_experts": 4, "lm_head_bias": True}),
}


def tiny_model(family, vocab_size=64, implementation="eager", **changes):
    """A random model of a family, its config `changes` from the family's in FAMILIES."""
    model_class, own = FAMILIES[family]
    config = model_class.config_class(**{**SIZE, **_EXPERTS, "vocab_size": vocab_size, **own, **changes})
    model = model_class._from_config(config, experts_implementation=implementation)
    with torch.no_grad():
        for name, p in model.named_parameters():
            # default initialisation leaves biases 0 and routers flat: neither would show a mistake
            if p.dim() == 1 and "norm" not in name:
                p.normal_(0, 0.3)
            elif p.dim() > 1:
                p.normal_(0, 0.2)
    return model


TINY_MODELS = {family: partial(tiny_model, family) for family in FAMILIES}
tiny_olmoe, tiny_qwen2_moe, tiny_qwen3_moe, tiny_mixtral, *_others = TINY_MODELS.values()
tiny_deepseek_v2, tiny_deepseek_v3, tiny_gpt_oss, tiny_granite_moe, tiny_phimoe = _others

# Changes that send every token to every expert: rounding cannot then send it elsewhere.
ALL_EXPERTS = {
    **dict.fromkeys(("olmoe", "qwen2_moe", "qwen3_moe"), {"num_experts_per_tok": 8}),
    **dict.fromkeys(("mixtral", "gpt_oss", "granite_moe"), {"num_experts_per_tok": 4}),
    "deepseek_v2": {"num_experts_per_tok": 8},
    "deepseek_v3": {"num_experts_per_tok": 8, "n_group": 1},
    "phimoe": {"num_local_experts": 2},
}


def nemotron_h_experts(implementation="eager"):
    """An experts module without gate: up, squared relu, down."""
    config = NemotronHConfig(
        n_routed_experts=4, hidden_size=32, moe_intermediate_size=24, moe_latent_size=None, mlp_hidden_act="relu2"
    )
    config._experts_implementation = implementation
    module = NemotronHExperts(config)
    with torch.no_grad():
        for p in module.parameters():
            p.normal_(0, 0.2)
    return module
