"""A tiny MoE, a tokenizer, and a model that has learned its table by heart."""

import pytest
import torch
from transformers import OlmoeConfig, OlmoeForCausalLM
from transformers.modeling_outputs import CausalLMOutput

from moe_unlearn.data import Document, encode, train_tokenizer
from tests.support.scripted import Scripted
from tests.support.threads import torch_threads
from tests.support.tokenizers import TEXTS


@pytest.fixture(scope="package", autouse=True)
def one_thread():
    """Models this small wait for threads longer than they compute, above all on a busy machine."""
    with torch_threads(1):
        yield


@pytest.fixture(scope="session")
def tokenizer():
    return train_tokenizer(TEXTS * 4, 320)


@pytest.fixture(scope="session")
def examples(tokenizer):
    return encode([Document(f"tale {i}", text) for i, text in enumerate(TEXTS)], tokenizer, 128)


@pytest.fixture()
def random_model(tokenizer):
    torch.manual_seed(0)
    config = OlmoeConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_experts=4,
        num_experts_per_tok=2,
        initializer_range=0.3,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return OlmoeForCausalLM(config)


class Oracle(Scripted):
    """Gives the true next token of the known rows probability `sure`; knows a row by its tokens so far."""

    def __init__(self, rows, vocab_size, sure=0.9, wrong_at=()):
        super().__init__(vocab_size)
        self.rows, self.vocab_size, self.sure, self.wrong_at = rows, vocab_size, sure, set(wrong_at)

    def forward(self, input_ids, attention_mask=None, **_):
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        logits = torch.zeros(*input_ids.shape, self.vocab_size)
        rest = (1 - self.sure) / (self.vocab_size - 1)
        for row, tokens in enumerate(input_ids.tolist()):
            for column in range(input_ids.shape[1]):
                seen = attention_mask[row, : column + 1].tolist()
                known = [token for token, attended in zip(tokens, seen, strict=False) if attended]
                following = next((r for r in self.rows if r[: len(known)] == known and len(r) > len(known)), None)
                logits[row, column] = torch.tensor(rest).log()
                if following is not None:
                    # position in the sequence of the token being predicted
                    wrong = len(known) in self.wrong_at
                    chosen = (following[len(known)] + wrong) % self.vocab_size
                    logits[row, column, chosen] = torch.tensor(self.sure).log()
        return CausalLMOutput(logits=logits)


@pytest.fixture()
def oracle(examples, tokenizer):
    def make(**keywords):
        return Oracle([e.input_ids for e in examples], len(tokenizer), **keywords)

    return make
