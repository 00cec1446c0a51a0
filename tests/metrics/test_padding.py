"""Left padding changes no token, in any family: positions, masks, caches, sliding windows."""

import pytest
import torch

from moe_unlearn.metrics import greedy
from tests.models import TINY_MODELS


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "deepseek_v2", "gpt_oss", "granite_moe"])
def test_greedy_with_left_padding_equals_each_prompt_alone(family):
    torch.manual_seed(1)
    model = TINY_MODELS[family]().eval()
    prompts = [torch.randint(3, 64, (n,)).tolist() for n in (2, 21, 9, 9, 1)]
    together = greedy(model, prompts, 12, pad_id=7)
    for prompt, continuation in zip(prompts, together, strict=True):
        tokens = torch.tensor([prompt])
        for _ in range(12):
            with torch.no_grad():
                tokens = torch.cat([tokens, model(input_ids=tokens).logits[:, -1:].argmax(-1)], 1)
        assert continuation == tokens[0, len(prompt) :].tolist()
