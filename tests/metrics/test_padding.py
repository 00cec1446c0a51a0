"""Left padding changes no token, in any family: positions, masks, caches, sliding windows."""

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from moe_unlearn.metrics import continuation_logprobs, greedy
from tests.support.models import TINY_MODELS


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


def test_positions_are_places_in_the_row_not_in_the_batch():
    """Rotary positions are relative and would forgive a shift of a whole row; learned ones do not."""
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_positions=40, n_embd=16, n_layer=2, n_head=2)).eval()
    with torch.no_grad():
        model.transformer.wpe.weight.normal_(0, 2)
    prompts = [torch.randint(3, 64, (n,)).tolist() for n in (2, 21, 9)]
    for prompt, continuation in zip(prompts, greedy(model, prompts, 8), strict=True):
        assert [continuation] == greedy(model, [prompt], 8)
        tokens = torch.tensor([prompt + continuation])
        with torch.no_grad():
            logits = model(input_ids=tokens).logits[0].log_softmax(-1)
        assert logits[len(prompt) - 1 : -1].argmax(-1).tolist() == continuation
        expected = logits[len(prompt) - 1, continuation[0]].item()
        padded = continuation_logprobs(model, [(prompt, continuation[:1]), (list(range(3, 30)), [5])])
        assert padded[0] == pytest.approx(expected, abs=1e-4)
