"""What is kept on an experts module: the gates of many families, and why a module or a weight is not computed here."""

import pytest
import torch
from transformers import PreTrainedConfig

from moe_unlearn.expert_state import not_computable, probe
from moe_unlearn.ops import Gate
from tests.support.models import nemotron_h_experts

pytestmark = pytest.mark.quick


def test_gates_of_other_families():
    """Classes of transformers whose gates share attribute names and differ in formula."""
    from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4Experts
    from transformers.models.minimax_m3_vl.modeling_minimax_m3_vl import MiniMaxM3VLExperts
    from transformers.models.openai_privacy_filter.modeling_openai_privacy_filter import OpenAIPrivacyFilterExperts

    expected = {
        DeepseekV4Experts: Gate("silu", 1.0, 7.0),
        MiniMaxM3VLExperts: Gate("silu", 1.702, 7.0, 1.0),
        OpenAIPrivacyFilterExperts: Gate("silu", 1.702, 7.0, 1.0),
    }
    config = PreTrainedConfig(
        num_local_experts=4,
        n_routed_experts=4,
        num_experts=4,
        hidden_size=32,
        moe_intermediate_size=24,
        intermediate_size=24,
        hidden_act="silu",
        swiglu_limit=7.0,
        swiglu_alpha=1.702,
    )
    for cls, gate in expected.items():
        assert probe(cls(config)).gate == gate, cls.__name__
    assert probe(nemotron_h_experts()).gate == Gate("relu2")


def test_a_module_that_is_not_computed_here_has_a_reason_and_no_gate():
    module = nemotron_h_experts()
    module.has_post_expert_norm = True
    assert probe(module).gate is None and probe(module).reason == "it normalises after each expert"
    module.has_post_expert_norm = False
    module.down_proj.data = module.down_proj.data.to(torch.float8_e4m3fn)
    assert probe(module).reason == not_computable(module.down_proj) == "its weights are torch.float8_e4m3fn"
