"""Special tokens are those that the tokenizer adds by itself: in training rows, in metrics, and in the report."""

import copy
import json

import pytest
import torch
from tokenizers import processors
from transformers import OlmoeConfig, OlmoeForCausalLM

from moe_unlearn.data import DataReport, Document, Example, added, encode, refusals, special_ids, train_tokenizer
from moe_unlearn.metrics import (
    CompletionSettings,
    evaluate_choices,
    evaluate_completions,
    extraction,
    multiple_choice,
    verbmem,
)
from moe_unlearn.metrics.answers import pair, text_example
from moe_unlearn.metrics.conventions import without_end

pytestmark = pytest.mark.quick
TEXT = "the quick brown fox jumps over the lazy dog"
KINDS = {"none": ([], []), "BOS": ([1], []), "EOS": ([], [2]), "both": ([1], [2]), "two": ([1, 0], [])}
MADE = train_tokenizer([TEXT] * 3, 300)


def tokenizer_that_adds(kind):
    made, (begin, end) = copy.deepcopy(MADE), KINDS[kind]
    names = {0: "<pad>", 1: "<s>", 2: "</s>"}
    single = " ".join([*(names[i] for i in begin), "$A", *(names[i] for i in end)])
    made.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=single, special_tokens=[(name, i) for i, name in names.items()]
    )
    return made


def bare(text):
    return MADE(text, add_special_tokens=False)["input_ids"]


@pytest.fixture(params=KINDS)
def case(request):
    return tokenizer_that_adds(request.param), *KINDS[request.param]


def model():
    torch.manual_seed(0)
    config = OlmoeConfig(
        vocab_size=300,
        hidden_size=16,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_experts=4,
        num_experts_per_tok=2,
        initializer_range=0.3,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        max_position_embeddings=512,
    )
    return OlmoeForCausalLM(config).eval()


def test_rows_have_the_tokens_that_the_tokenizer_adds(case):
    tokenizer, begin, end = case
    report = DataReport()
    documents = [Document("", TEXT), Document("fox", TEXT), Document("", " a dog", "the fox")]
    text, titled, asked = encode(documents, tokenizer, 99, report=report)
    assert text.input_ids == text.labels == tokenizer(TEXT)["input_ids"] == begin + bare(TEXT) + end
    assert text.prefix == 0 and titled.prefix == len(begin + bare("fox\n"))
    # an answer ends, whatever stands after a text
    assert asked.input_ids == begin + bare("the fox a dog") + [2]
    assert asked.labels == [-100] * asked.prefix + bare(" a dog") + [2] and asked.prefix == len(begin + bare("the fox"))
    names = {0: "<pad>", 1: "<s>", 2: "</s>"}
    told = {"begin": [names[i] for i in begin], "end": [names[i] for i in end], "answer_end": ["</s>"]}
    assert report.to_dict()["special_tokens"] == told == added(tokenizer).describe(tokenizer)
    assert refusals([asked], tokenizer)[0].input_ids[-1] == 2


def watched():
    """Return a model and the list to which each of its calls adds the real tokens of its rows."""
    network, asked = model(), []

    def note(module, args, keywords):
        rows, mask = keywords.get("input_ids", *args), keywords.get("attention_mask")
        real = torch.ones_like(rows) if mask is None else mask[:, -rows.shape[1] :]
        asked.extend(row[kept.bool()].tolist() for row, kept in zip(rows, real, strict=True))

    network.register_forward_pre_hook(note, with_kwargs=True)
    return network, asked


def test_metrics_show_the_model_what_users_send(case, tmp_path):
    tokenizer, begin, end = case
    assert text_example(model(), tokenizer, TEXT, 99).input_ids == begin + bare(TEXT)
    assert without_end(pair(tokenizer, "the fox", " a dog", 99), tokenizer).input_ids == begin + bare("the fox a dog")
    network, asked = watched()
    row = {"question": "who", "choices": ["fox", "dog"], "answer": 0, "subject": "dogs"}
    multiple_choice(network, tokenizer, [row])
    context = "The following are multiple choice questions (with answers) about dogs.\n\nwho\nA. fox\nB. dog\nAnswer:"
    assert asked == [begin + bare(f"{context} A")[:-1]]
    evaluate_choices(network, tokenizer, {"mmlu": [row]}, out=tmp_path)
    written = json.loads((tmp_path / "LMEval_SETTINGS.json").read_text(encoding="utf-8"))
    assert written["special_tokens"] == added(tokenizer).describe(tokenizer)
    asked.clear()
    settings = CompletionSettings(prompt_tokens=3, new_tokens=2)
    evaluate_completions(network, tokenizer, {"seen": [TEXT]}, settings=settings)
    assert asked[0] == begin + bare(TEXT)[:3]


def test_a_beginning_of_several_tokens_is_no_prompt():
    tokenizer, row = tokenizer_that_adds("two"), bare(TEXT * 3)
    [example] = encode([Document("", TEXT * 3)], tokenizer, 99)
    network, asked = watched()
    extraction(network, [example], tokens=4, prompt_tokens=8)
    verbmem(network, tokenizer, [example], prompt_tokens=8, new_tokens=4)
    assert asked[0] == asked[4] == [1, 0, *row[:6]] and example == Example([1, 0, *row], [1, 0, *row], 0)


def test_added_tokens_that_are_text_are_not_special():
    tokenizer = copy.deepcopy(MADE)
    tokenizer.add_tokens(["</think>"])
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|end|>"]})
    spelled = tokenizer.convert_ids_to_tokens(sorted(special_ids(tokenizer)))
    assert spelled == ["<pad>", "<s>", "</s>", "<|end|>"]


def test_a_tokenizer_that_says_nothing_is_an_error():
    class Silent:
        eos_token_id = 2

        def __call__(self, text, add_special_tokens=True):
            return {"input_ids": []}

    with pytest.raises(ValueError, match="adds its special tokens around a text; 'a' is"):
        added(Silent())
