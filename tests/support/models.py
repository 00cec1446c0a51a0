"""Tiny random models of every supported family, and a synthetic experts module for each layout flag."""

import torch
from transformers import (
    DeepseekV2Config,
    DeepseekV2ForCausalLM,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    GraniteMoeConfig,
    GraniteMoeForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    NemotronHConfig,
    OlmoeConfig,
    OlmoeForCausalLM,
    PhimoeConfig,
    PhimoeForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3MoeConfig,
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


def _build(model_class, config_class, vocab_size, experts_implementation, changes, **keywords):
    config = config_class(**{**SIZE, "vocab_size": vocab_size, **keywords, **changes})
    model = model_class._from_config(config, experts_implementation=experts_implementation)
    with torch.no_grad():
        for name, p in model.named_parameters():
            # default initialisation leaves biases 0 and routers flat: neither would show a mistake
            if p.dim() == 1 and "norm" not in name:
                p.normal_(0, 0.3)
            elif p.dim() > 1:
                p.normal_(0, 0.2)
    return model


def tiny_olmoe(vocab_size=64, implementation="eager", **changes):
    """8 experts, 2 per token."""
    return _build(
        OlmoeForCausalLM,
        OlmoeConfig,
        vocab_size,
        implementation,
        changes,
        intermediate_size=24,
        num_experts=8,
        num_experts_per_tok=2,
    )


def tiny_qwen2_moe(vocab_size=64, implementation="eager", **changes):
    """A shared expert beside the routed ones."""
    return _build(
        Qwen2MoeForCausalLM,
        Qwen2MoeConfig,
        vocab_size,
        implementation,
        changes,
        intermediate_size=48,
        moe_intermediate_size=24,
        shared_expert_intermediate_size=32,
        num_experts=8,
        num_experts_per_tok=2,
    )


def tiny_qwen3_moe(vocab_size=64, implementation="eager", **changes):
    """Normalised routing weights."""
    return _build(
        Qwen3MoeForCausalLM,
        Qwen3MoeConfig,
        vocab_size,
        implementation,
        changes,
        intermediate_size=48,
        moe_intermediate_size=24,
        num_experts=8,
        num_experts_per_tok=3,
        norm_topk_prob=True,
        head_dim=8,
    )


def tiny_mixtral(vocab_size=64, implementation="eager", **changes):
    """float32 routing weights."""
    return _build(
        MixtralForCausalLM,
        MixtralConfig,
        vocab_size,
        implementation,
        changes,
        intermediate_size=24,
        num_local_experts=4,
        num_experts_per_tok=2,
    )


def tiny_deepseek_v2(vocab_size=64, implementation="eager", **changes):
    """A dense first layer, latent attention, a shared expert."""
    return _build(DeepseekV2ForCausalLM, DeepseekV2Config, vocab_size, implementation, changes, intermediate_size=48,
                  moe_intermediate_size=24, n_routed_experts=8, num_experts_per_tok=2, n_shared_experts=1,
                  first_k_dense_replace=1, kv_lora_rank=16, q_lora_rank=None, qk_nope_head_dim=8,
                  qk_rope_head_dim=8, v_head_dim=8, num_key_value_heads=4, num_hidden_layers=3,
                  topk_method="greedy", n_group=1, topk_group=1)  # fmt: skip


def tiny_deepseek_v3(vocab_size=64, implementation="eager", **changes):
    """Grouped sigmoid routing with scaling."""
    return _build(DeepseekV3ForCausalLM, DeepseekV3Config, vocab_size, implementation, changes, intermediate_size=48,
                  moe_intermediate_size=24, n_routed_experts=8, num_experts_per_tok=2, n_shared_experts=1,
                  first_k_dense_replace=1, kv_lora_rank=16, q_lora_rank=16, qk_nope_head_dim=8,
                  qk_rope_head_dim=8, v_head_dim=8, num_key_value_heads=4, n_group=2, topk_group=1,
                  num_hidden_layers=3)  # fmt: skip


def tiny_gpt_oss(vocab_size=64, implementation="eager", **changes):
    """Transposed, interleaved, biased experts with a clamped gate of their own."""
    return _build(
        GptOssForCausalLM,
        GptOssConfig,
        vocab_size,
        implementation,
        changes,
        intermediate_size=24,
        num_local_experts=4,
        num_experts_per_tok=2,
        head_dim=8,
        sliding_window=16,
    )


def tiny_granite_moe(vocab_size=64, implementation="eager", **changes):
    """Scaled logits, embeddings and residuals."""
    return _build(
        GraniteMoeForCausalLM,
        GraniteMoeConfig,
        vocab_size,
        implementation,
        changes,
        intermediate_size=24,
        num_local_experts=4,
        num_experts_per_tok=2,
        logits_scaling=2.0,
        embedding_multiplier=3.0,
        residual_multiplier=0.7,
    )


def tiny_phimoe(vocab_size=64, implementation="eager", **changes):
    """A head with a bias."""
    return _build(
        PhimoeForCausalLM,
        PhimoeConfig,
        vocab_size,
        implementation,
        changes,
        intermediate_size=24,
        num_local_experts=4,
        num_experts_per_tok=2,
        lm_head_bias=True,
    )


TINY_MODELS = {
    "olmoe": tiny_olmoe,
    "qwen2_moe": tiny_qwen2_moe,
    "qwen3_moe": tiny_qwen3_moe,
    "mixtral": tiny_mixtral,
    "deepseek_v2": tiny_deepseek_v2,
    "deepseek_v3": tiny_deepseek_v3,
    "gpt_oss": tiny_gpt_oss,
    "granite_moe": tiny_granite_moe,
    "phimoe": tiny_phimoe,
}

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
