"""Conversations as rows, and rows of any kind in memory: lists, `datasets.Dataset`, tokens."""

import pytest
import torch
from transformers import TrainingArguments

from moe_unlearn.benchmark import unlearning
from moe_unlearn.config import Recipe
from moe_unlearn.data import Chat, Document, Example, check_rows, encode, encode_rows, load, train_tokenizer
from moe_unlearn.trainer import UnlearnTrainer
from tests.support.models import tiny_olmoe

datasets = pytest.importorskip("datasets", reason="rows of datasets need the extra [data], which [dev] has")
TOKENIZER = train_tokenizer(["the quick brown fox asks: who? he. Question: Answer:"] * 3, 300)
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TURNS = [
    ("system", "be brief"),
    ("user", "who?"),
    ("assistant", "a fox"),
    ("user", "which?"),
    ("assistant", "the quick"),
]
MESSAGES = [{"role": role, "content": content} for role, content in TURNS]
SHAREGPT = [{"from": {"user": "human", "assistant": "gpt"}.get(r, r), "value": c} for r, c in TURNS]
FORMS = {
    "messages": {"messages": MESSAGES},
    "conversations": {"conversations": SHAREGPT},
    "prompt and completion": {"prompt": MESSAGES[:-1], "completion": MESSAGES[-1:]},
    "preferences": {
        "prompt": MESSAGES[:-1],
        "chosen": [{"role": "assistant", "content": "no"}],
        "rejected": MESSAGES[-1:],
    },
    "parts": {"messages": [m | {"content": [{"type": "text", "text": m["content"]}]} for m in MESSAGES]},
    "a question more": {"messages": [*MESSAGES, {"role": "user", "content": "why?"}]},
}


@pytest.fixture(scope="module")
def chatting():
    made = train_tokenizer(["the quick brown fox asks: who? he."] * 3, 300)
    made.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    made.chat_template = CHATML
    return made


@pytest.mark.parametrize("row", FORMS.values(), ids=FORMS)
def test_the_last_answer_is_the_text_and_all_before_it_the_prompt(write, chatting, row):
    [document] = load(write("a.jsonl", [row]), side="forget")
    assert document.text == " the quick" and document.question == "which?"
    assert document.prompt == "be brief\n\nQuestion: who?\nAnswer: a fox\n\nQuestion: which?\nAnswer:"
    [example] = encode([document], chatting, 299, chat=True)
    whole = chatting.apply_chat_template(MESSAGES, return_dict=False)
    labelled = [label for label in example.labels if label != -100]
    assert example.input_ids == whole and chatting.decode(labelled) == "the quick<|im_end|>"
    # a row's own system message is not followed by another
    assert encode([document], chatting, 299, chat=Chat(system="other")) == [example]
    [plain] = encode([document], chatting, 299)
    assert chatting.decode(plain.input_ids[plain.prefix : -1]) == " the quick"


def test_what_is_no_conversation_says_where(write):
    def read(record):
        return load(write("a.jsonl", [record]))

    with pytest.raises(ValueError, match="line 1: expected a message of the assistant; got system, user"):
        read({"messages": MESSAGES[:2]})
    with pytest.raises(ValueError, match="line 1, message 1: expected a role of system, .*; got 'robot'"):
        read({"conversations": [{"from": "robot", "value": "hm"}]})
    with pytest.raises(ValueError, match="message 1: expected its content to be text; got NoneType"):
        read({"messages": [{"role": "user"}]})
    with pytest.raises(ValueError, match="line 1: expected a list of messages; got a string"):
        read({"messages": "hello"})
    [alone] = read({"messages": MESSAGES[-1:]})
    assert alone == Document("", "the quick")


def test_a_special_token_in_any_turn_is_refused(chatting):
    turns = ({"role": "user", "content": "<|im_end|>"}, {"role": "assistant", "content": "x"})
    with pytest.raises(ValueError, match="spells the special token"):
        encode([Document("", " he", "who?", "who?", messages=turns)], chatting, 99, chat=True)


def test_rows_of_any_kind_give_the_same_examples():
    texts = [f"the fox {i}" for i in range(3)]
    expected = encode([Document("", text) for text in texts], TOKENIZER, 99)
    kinds = [
        texts,
        [{"text": text} for text in texts],
        [Document("", text) for text in texts],
        expected,
        datasets.Dataset.from_dict({"text": texts}),
        datasets.Dataset.from_list([{"input_ids": e.input_ids} for e in expected]),
        datasets.Dataset.from_list([{"input_ids": e.input_ids, "labels": e.labels} for e in expected]),
    ]
    for rows in kinds:
        check_rows("forget", rows)
        assert encode_rows(rows, TOKENIZER, 99, side="forget") == expected
    masked = {"input_ids": [1, 5, 6], "labels": [-100, -100, 6]}
    assert encode_rows([masked, "", " "], TOKENIZER, 99, side="forget") == [Example([1, 5, 6], [-100, -100, 6], 2)]
    for wrong, kind, message in (
        ("text", TypeError, "forget: expected a list of texts, records"),
        ({"text": texts}, TypeError, "forget: expected a list of texts, records"),
        ([], ValueError, "the set is empty"),
    ):
        with pytest.raises(kind, match=message):
            check_rows("forget", wrong)
    with pytest.raises(ValueError, match="forget, row 1: expected a field 'text'"):
        encode_rows([{"text": "a"}, {"body": "b"}], TOKENIZER, 99, side="forget")
    with pytest.raises(ValueError, match="retain, row 0: expected as many labels"):
        encode_rows([{"input_ids": [1], "labels": []}], TOKENIZER, 99, side="retain")
    with pytest.raises(ValueError, match="forget, row 1: its prompt takes .* no room"):
        encode_rows(["a", Document("", "a", "q" * 99)], TOKENIZER, 20, side="forget")


@pytest.mark.parametrize(
    "given",
    [
        {"attention_mask": [1, 1, 1]},
        {"position_ids": [0, 1, 2]},
        {"pads": (0, 2), "attention_mask": [1, 1, 1, 0, 0], "position_ids": [0, 1, 2, 0, 0]},
        {"pads": (1, 1), "attention_mask": [0, 1, 1, 1, 0], "position_ids": [0, 0, 1, 2, 0]},
        {"pads": (1, 0), "attention_mask": [0, 1, 1, 1], "position_ids": [0, 1, 2, 3]},
    ],
)
def test_padding_of_tokens_is_no_text(given):
    """A tokenizer that pads has made these rows; tokens that are not attended are not learned."""
    before, behind = given.get("pads", (0, 0))
    ids = [0] * before + [1, 5, 6] + [0] * behind
    row = {"input_ids": ids, **{key: value for key, value in given.items() if key != "pads"}}
    labelled = row | {"labels": [-100] * (before + 2) + [6] + [-100] * behind}
    for made in (row, {key: torch.tensor(value) for key, value in row.items()}):
        assert encode_rows([made], TOKENIZER, 99, side="retain") == [Example([1, 5, 6], [1, 5, 6], 0)]
    assert encode_rows([labelled], TOKENIZER, 99, side="retain") == [Example([1, 5, 6], [-100, -100, 6], 2)]


@pytest.mark.parametrize(
    "given, message",
    [
        ({"attention_mask": [1, 0, 1]}, r"expected an attention_mask of 3 tokens, ones in one piece; got \[1, 0, 1\]"),
        ({"attention_mask": [0, 0, 0]}, r"ones in one piece; got \[0, 0, 0\]"),
        ({"attention_mask": [1, 1]}, r"an attention_mask of 3 tokens"),
        ({"position_ids": [0, 1, 0]}, r"count the tokens; got \[0, 1, 0\]: give each example as a row"),
        ({"position_ids": [0, 1]}, r"position_ids that count the tokens; got \[0, 1\]"),
    ],
)
def test_tokens_that_are_no_row_of_one_example(given, message):
    with pytest.raises(ValueError, match=f"forget, row 1: .*{message}"):
        encode_rows(["a", {"input_ids": [1, 5, 6], **given}], TOKENIZER, 99, side="forget")


def test_a_comparison_takes_data_sets_of_rows():
    def measured(forget, retain):
        torch.manual_seed(0)
        model = tiny_olmoe(vocab_size=len(TOKENIZER))
        return unlearning(model, forget, retain, [], ["nll"], tokenizer=TOKENIZER, max_length=32).results

    chats = [{"messages": MESSAGES[1:3]}, {"messages": MESSAGES[3:]}]
    asked = {"who?": " a fox", "which?": " the quick"}
    documents = [Document("", answer, f"Question: {question}\nAnswer:") for question, answer in asked.items()]
    found = measured(datasets.Dataset.from_list(chats), datasets.Dataset.from_dict({"text": ["the fox", "who?"]}))
    expected = measured(documents, ["the fox", "who?"])
    for results in (found, expected):
        for runs in results.values():
            runs["target"].pop("seconds", None)
    assert found == expected and found


def test_the_trainer_takes_data_sets_of_rows(tmp_path):
    rows = datasets.DatasetDict(
        forget=datasets.Dataset.from_list([{"messages": MESSAGES[1:3]}, {"messages": MESSAGES[3:]}]),
        retain=datasets.Dataset.from_dict({"text": ["the fox", "a quick fox asks", "who?"]}),
    )
    torch.manual_seed(0)
    model = tiny_olmoe(vocab_size=len(TOKENIZER))
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=2,
        per_device_train_batch_size=2,
        report_to="none",
        save_strategy="no",
        learning_rate=1e-3,
        disable_tqdm=True,
        use_cpu=True,
    )
    recipe = Recipe.load("npo", ["data.max_length=32", "retain_per_forget=1.5"])
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trainer = UnlearnTrainer(model, arguments, recipe, rows, processing_class=TOKENIZER)
    forget = [
        Document("", " a fox", "Question: who?\nAnswer:"),
        Document("", " the quick", "Question: which?\nAnswer:"),
    ]
    assert trainer.train_dataset.forget == encode(forget, TOKENIZER, 32)
    assert [len(pair["retain"]) for pair in trainer.train_dataset] == [1, 2]
    trainer.train()
    assert trainer.state.global_step == 2
    assert any(not torch.equal(before[name], value) for name, value in model.state_dict().items())
    drawing = Recipe.load("npo", ["data.max_length=32", "data.forget_rows=1", "data.retain_rows=2"])
    drawn = UnlearnTrainer(model, arguments, drawing, rows, processing_class=TOKENIZER).train_dataset
    assert (len(drawn.forget), len(drawn.retain)) == (1, 2)
    with pytest.raises(ValueError, match="rows need processing_class"):
        UnlearnTrainer(model, arguments, "npo", rows)
    with pytest.raises(ValueError, match="to have forget and retain, and perhaps unseen; got forget"):
        UnlearnTrainer(model, arguments, "npo", {"forget": rows["forget"]}, processing_class=TOKENIZER)
    same = {"forget": rows["retain"], "retain": rows["retain"]}
    with pytest.raises(ValueError, match="the forget and retain sets overlap: 3 of 3 forget examples"):
        UnlearnTrainer(model, arguments, "npo", same, processing_class=TOKENIZER)
