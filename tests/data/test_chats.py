"""Chat templates: the question as the user asks it, the answer and its end with loss, the rest without."""

import datetime

import pytest
import torch
from transformers.modeling_outputs import CausalLMOutput

from moe_unlearn.data import Chat, DataReport, Document, ExampleStream, encode, load, refusals
from moe_unlearn.metrics import MuseData, MuseSettings, evaluate_muse
from moe_unlearn.metrics.conventions import prompt_of, without_end
from tests.support.scripted import Scripted
from tests.support.tokenizers import CHATML, QWEN3, tokenizer_with

pytestmark = pytest.mark.quick
INST = (  # Mixtral's manner: no role words, the answer ends the sequence
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]"
    "{% else %} {{ m['content'] }}{{ eos_token }}{% endif %}{% endfor %}"
)


GPT_OSS = (
    "<|im_start|>system<|message|>Today: {{ strftime_now('%Y-%m-%d') }}"
    "{% if date_string is defined %}, {{ date_string }}{% endif %}<|im_end|>"
    "{% for m in messages %}<|im_start|>{{ m['role'] }}"
    "{% if m['role'] == 'assistant' %}<|channel|>final{% endif %}<|message|>{{ m['content'] | trim }}"
    "{% if loop.last and m['role'] == 'assistant' %}<|return|>{% else %}<|im_end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant{% endif %}"
)
PLAIN = (  # no special token ends an answer
    "{% for m in messages %}{% if m['role'] == 'user' %}### Q: {{ m['content'] }}\n"
    "### A:{% else %} {{ m['content'] }}\n\n{% endif %}{% endfor %}"
)
OPENED = "<|im_start|>user\nWho?<|im_end|>\n<|im_start|>assistant\n"
FORMS = {
    "chatml": (CHATML, OPENED, "He.<|im_end|>", "\n"),
    "mixtral": (INST, "<s>[INST] Who? [/INST] ", "He.</s>", ""),
    "qwen3": (QWEN3, OPENED + "<think>\n\n</think>\n\n", "He.<|im_end|>", "\n"),
    "gpt-oss": (
        GPT_OSS,
        "<|im_start|>system<|message|>Today: 2024-07-26<|im_end|><|im_start|>user<|message|>Who?<|im_end|>"
        "<|im_start|>assistant<|channel|>final<|message|>",
        "He.<|return|>",
        "",
    ),
    "plain": (PLAIN, "### Q: Who?\n### A: ", "He.", "\n\n"),
}


@pytest.fixture()
def oracle_of():
    """A model that knows one row and gives its next token to whoever shows its beginning."""

    class Oracle(Scripted):
        def __init__(self, row, tokenizer):
            super().__init__(len(tokenizer))
            self.row, self.size = row, len(tokenizer)

        def forward(self, input_ids, **keywords):
            logits = torch.zeros(1, input_ids.shape[1], self.size)
            known = input_ids[0].tolist()
            following = self.row[len(known)] if self.row[: len(known)] == known and len(known) < len(self.row) else 0
            logits[0, -1, following] = 1
            return CausalLMOutput(logits=logits)

    return Oracle


@pytest.mark.parametrize(("template", "before", "answer", "behind"), FORMS.values(), ids=FORMS)
def test_the_answer_and_its_end_alone_carry_loss(write, template, before, answer, behind):
    tokenizer = tokenizer_with(template)
    [document] = load(write("a.jsonl", [{"question": "Who?", "answer": "He."}]))
    [example] = encode([document], tokenizer, 299, chat=True)
    labelled = [i for i, label in enumerate(example.labels) if label != -100]
    start, stop = labelled[0], labelled[-1] + 1
    assert labelled == list(range(start, stop)) and example.prefix == start
    assert [example.labels[i] for i in labelled] == example.input_ids[start:stop]
    pieces = (example.input_ids[:start], example.input_ids[start:stop], example.input_ids[stop:])
    assert tuple(map(tokenizer.decode, pieces)) == (before, answer, behind)
    messages = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "He."}]
    whole = tokenizer.apply_chat_template(messages, tokenize=False)
    whole = whole.replace(datetime.date.today().isoformat(), "2024-07-26")
    assert example.input_ids == tokenizer(whole, add_special_tokens=False)["input_ids"]
    # a model is asked behind what the template writes; nothing but its answer is judged
    assert prompt_of(example) == example.input_ids[:start]
    kept = without_end(example, tokenizer)
    assert tokenizer.decode(kept.input_ids[start:]) == "He."
    [refused] = refusals([example], tokenizer)
    assert refused.input_ids[:start] == example.input_ids[:start]
    ends = [] if answer == "He." else example.input_ids[stop - 1 : stop]
    assert refused.input_ids[-1:] == (ends or [tokenizer.eos_token_id])


def test_a_model_that_answers_exactly_scores_one_behind_the_fixed_part(oracle_of):
    tokenizer = tokenizer_with(QWEN3)
    row = {"question": "Who?", "answer": "the quick brown fox"}
    [example] = encode([Document("", row["answer"], "Who?")], tokenizer, 299, chat=True)
    model = oracle_of(example.input_ids, tokenizer)
    settings = MuseSettings(chat=True, knowmem_tokens=40)
    found = evaluate_muse(model, tokenizer, MuseData(forget_qa=[row]), settings=settings)
    assert found["forget_knowmem_ROUGE"] == 1
    thoughtful = Chat(enable_thinking=False)
    found = evaluate_muse(model, tokenizer, MuseData(forget_qa=[row]), settings=MuseSettings(chat=thoughtful))
    assert found["forget_knowmem_ROUGE"] == 1


def test_the_template_s_options(tmp_path):
    tokenizer, asked = tokenizer_with(QWEN3), [Document("", " he", "who?")]
    plain, quiet = (encode(asked, tokenizer, 299, chat=chat)[0] for chat in (True, Chat(enable_thinking=False)))
    assert plain == quiet  # what the generation prompt has and what the conversation has are the same text
    [told] = encode(asked, tokenizer, 299, chat=Chat(system="be brief"))
    assert tokenizer.decode(told.input_ids).startswith("<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user")
    tokenizer = tokenizer_with(GPT_OSS)
    [dated] = encode(asked, tokenizer, 299, chat=Chat(date="2026-11-29"))
    assert "Today: 2026-11-29, 29 Nov 2026<" in tokenizer.decode(dated.input_ids)
    [undated] = encode(asked, tokenizer, 299, chat=True)
    assert "Today: 2024-07-26<" in tokenizer.decode(undated.input_ids)  # whatever day it is
    odd = tokenizer_with("{% set form = '%Y' %}{{ strftime_now(form) }}" + CHATML)
    with pytest.raises(ValueError, match="a chat template that writes the form of its date"):
        encode(asked, odd, 299, chat=True)
    with pytest.raises(ValueError, match="a date as 2026-11-29; got 'today'"):
        Chat(date="today")


def test_an_answer_that_the_template_reads_is_the_answer_from_the_generation_prompt_on():
    tokenizer = tokenizer_with(QWEN3)
    [example] = encode([Document("", " hm</think> he", "Who?")], tokenizer, 299, chat=True)
    labelled = [label for label in example.labels if label != -100]
    assert tokenizer.decode(labelled) == "<think>\nhm\n</think>\n\nhe<|im_end|>"


def test_open_unlearning_s_form():
    """Everything behind the generation prompt carries a loss, and the end token stands at the end."""
    tokenizer = tokenizer_with(QWEN3)
    [example] = encode([Document("", " he", "Who?")], tokenizer, 299, chat=True, seam="separate")
    messages = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "he"}]
    whole = tokenizer.apply_chat_template(messages, return_dict=False) + [tokenizer.eos_token_id]
    asked = tokenizer.apply_chat_template(messages[:1], add_generation_prompt=True, return_dict=False)
    assert example.input_ids == whole and example.asked == asked
    assert example.labels == [-100] * len(asked) + whole[len(asked) :]


def test_texts_without_a_prompt_stay_texts():
    tokenizer = tokenizer_with(CHATML)
    text = [Document("fox", "the quick")]
    assert encode(text, tokenizer, 99, chat=True) == encode(text, tokenizer, 99)
    assert list(ExampleStream(text, tokenizer, 99, chat=True)) == [(encode(text, tokenizer, 99)[0], 0)]


def test_completion_prompts_are_asked_as_they_stand():
    tokenizer = tokenizer_with(CHATML)
    [example] = encode([Document("", " a fox", "the quick")], tokenizer, 99, chat=True)
    assert "user\nthe quick<|im_end|>" in tokenizer.decode(example.input_ids)


def test_a_text_that_spells_a_special_token_is_no_turn_of_its_own():
    tokenizer = tokenizer_with(CHATML)
    documents = [Document("", " he.", "who?"), Document("", " he.<|im_end|>\n<|im_start|>user\nwho", "who?")]
    with pytest.raises(ValueError, match=r"document 1: its text spells the special token '<\|im_end\|>'"):
        encode(documents, tokenizer, 99, chat=True)
    report = DataReport(kept=2)
    assert len(encode(documents, tokenizer, 99, chat=True, report=report)) == 1
    assert report.dropped == {"spells a special token": 1} and report.kept == 1
    assert len(encode(documents, tokenizer, 99)) == 2  # without a template it stays text


def test_added_tokens_that_are_text_drop_no_row():
    tokenizer = tokenizer_with(CHATML)
    tokenizer.add_tokens(["  ", "    ", "</think>"])  # as NeoX and OLMo have runs of spaces
    spaced = [Document("", " def f():\n    return  1", "who?"), Document("", " he</think> he", "is    </think> it?")]
    report = DataReport(kept=2)
    made = encode(spaced, tokenizer, 99, chat=True, report=report)
    assert len(made) == 2 and not report.dropped
    assert "    return  1<|im_end|>" in tokenizer.decode(made[0].input_ids)
    added = set(tokenizer.convert_tokens_to_ids(["    ", "</think>"]))
    assert added & set(made[0].input_ids) and added <= set(made[1].input_ids)
    with pytest.raises(ValueError, match=r"spells the special token '<\|im_end\|>'"):
        encode([Document("", " he    <|im_end|>", "who?")], tokenizer, 99, chat=True)


def test_unfit_templates_are_named():
    document = [Document("", " he.", "who?")]
    with pytest.raises(ValueError, match="chat needs a tokenizer with a chat template"):
        encode(document, tokenizer_with(None), 99, chat=True)
    contrary = CHATML.replace("<|im_start|>assistant", "assistant says:")
    with pytest.raises(ValueError, match="begins with its generation prompt; this tokenizer's does not"):
        encode(document, tokenizer_with(contrary), 99, chat=True)


def test_cut_and_unfit_documents_are_counted():
    tokenizer = tokenizer_with(CHATML)
    documents = [Document("", "he " * 40, "who?"), Document("", "x" * 200), Document("", "he", "q" * 40)]
    report = DataReport(kept=3)
    examples = encode(documents, tokenizer, 24, report=report)
    assert report.truncated == 1 and report.dropped == {"prompt leaves no room": 1} and report.kept == 2
    assert all(len(example) <= 24 for example in examples)
    report = DataReport(kept=3)
    encode(documents, tokenizer, 24, overflow="truncate", report=report)
    assert report.truncated == 2
    with pytest.raises(ValueError, match="document 2: its prompt takes .* no room for text in max_length 24"):
        encode(documents, tokenizer, 24)
