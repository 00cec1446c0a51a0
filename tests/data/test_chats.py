"""Chat templates: the question as the user asks it, the answer and its end with loss, the rest without."""

import pytest

from moe_unlearn.data import DataReport, Document, ExampleStream, encode, load, train_tokenizer

pytestmark = pytest.mark.quick
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
INST = (  # Mixtral's manner: no role words, the answer ends the sequence
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]"
    "{% else %} {{ m['content'] }}{{ eos_token }}{% endif %}{% endfor %}"
)


def tokenizer_with(template):
    made = train_tokenizer(["the quick brown fox asks: who? he."] * 3, 300)
    made.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    made.chat_template = template
    return made


@pytest.mark.parametrize(
    ("template", "before", "after"),
    [
        (CHATML, "<|im_start|>user\nWho?<|im_end|>\n<|im_start|>assistant\n", "He.<|im_end|>\n"),
        (INST, "<s>[INST] Who? [/INST]", " He.</s>"),
    ],
)
def test_the_answer_alone_carries_loss(write, template, before, after):
    tokenizer = tokenizer_with(template)
    [document] = load(write("a.jsonl", [{"question": "Who?", "answer": "He."}]))
    [example] = encode([document], tokenizer, 99, chat=True)
    cut = example.prefix
    assert tokenizer.decode(example.input_ids[:cut]) == before and tokenizer.decode(example.input_ids[cut:]) == after
    assert example.labels == [-100] * cut + example.input_ids[cut:]
    messages = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "He."}]
    assert example.input_ids == tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)


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
