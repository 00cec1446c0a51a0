"""Models that say what a test wants, by transformers' own `generate`."""

import torch
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel


class Scripted(PreTrainedModel, GenerationMixin):
    """A model without a cache, which `generate` shows the whole text at every token; `forward` is the test's."""

    config_class = PretrainedConfig
    main_input_name = "input_ids"

    def __init__(self, vocab_size):
        super().__init__(PretrainedConfig(vocab_size=vocab_size, num_hidden_layers=1))
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def get_input_embeddings(self):
        return None

    def prepare_inputs_for_generation(self, input_ids, attention_mask=None, **_):
        return {"input_ids": input_ids, "attention_mask": attention_mask}
