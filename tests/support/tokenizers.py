"""Tokenizers and chat templates of the kinds that models have."""

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from moe_unlearn.data import train_tokenizer
from moe_unlearn.data.pairs import REFUSALS

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ["<|im_start|>", "<|im_end|>", "<|channel|>", "<|message|>", "<|return|>"]


def tokenizer_with(template):
    made = train_tokenizer(["the quick brown fox asks: who? he."] * 3, 280)
    made.add_special_tokens({"additional_special_tokens": SPECIAL})
    made.chat_template = template
    return made


QWEN3 = (  # its answer is preceded by an empty thought, and what stands before `</think>` is read as one
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' %}"
    "{% if '</think>' in m['content'] %}<think>\n{{ m['content'].split('</think>')[0].strip() }}\n</think>\n\n"
    "{{ m['content'].split('</think>')[-1].strip() }}"
    "{% else %}<think>\n\n</think>\n\n{{ m['content'] }}{% endif %}"
    "{% else %}{{ m['content'] }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
TEXT = "The harbour is quiet. Answer: x y"


def sentencepiece(normalizer=None):
    """Make a tokenizer like SentencePiece's: each word begins with its space, and a text with one it does not have."""
    made = Tokenizer(models.BPE(unk_token="<unk>"))
    made.pre_tokenizer, made.decoder = pre_tokenizers.Metaspace(prepend_scheme="first"), decoders.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=120, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False)
    made.train_from_iterator([TEXT, *REFUSALS] * 3, trainer)
    if normalizer is not None:
        made.normalizer = normalizer
        made.pre_tokenizer = None
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


PREPEND = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
TRIMMED = train_tokenizer([TEXT] * 3, 300)
TRIMMED.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)


class Offsetless:
    """A tokenizer that knows no offsets, as those written in Python."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer

    def __getattr__(self, name):
        return getattr(self.tokenizer, name)

    is_fast = False

    def __call__(self, *texts, return_offsets_mapping=False, **keywords):
        assert not return_offsets_mapping
        return self.tokenizer(*texts, **keywords)


TOKENIZERS = {
    "metaspace": sentencepiece(),
    "prepend": sentencepiece(PREPEND),
    "bytes": train_tokenizer([TEXT] * 3, 300),
    "bytes, trimmed offsets": TRIMMED,
    "without offsets": Offsetless(train_tokenizer([TEXT] * 3, 300)),
}
TEXTS = [
    "the wandering merchant carried lanterns across seventeen frozen valleys before sunrise",
    "every lighthouse keeper remembers an evening when thunder silenced the harbour bells",
    "granite mountains shelter orchards whose blossoms travel southward during autumn storms",
]
