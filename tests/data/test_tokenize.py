"""Tokenizer, examples and batches."""

import pytest
import torch

from moe_unlearn.data import DataReport, Document, batches, encode, pad_token_id, train_tokenizer
from moe_unlearn.data.tokenize import Example

pytestmark = pytest.mark.quick
TEXTS = ["the quick brown fox jumps over the lazy dog", "a fox and a dog and the end"] * 3


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXTS, 290)


def examples(*lengths):
    return [Example([10 + i] * n, [10 + i] * n, 1) for i, n in enumerate(lengths)]


@pytest.mark.parametrize("text", ["fox", "  two  spaces\n\ttab ", "ünïcödé 漢字 🦊", "\x00\x7f", "don't , stop ."])
def test_any_text_comes_back(tokenizer, text):
    assert tokenizer.decode(encode([Document("", text)], tokenizer, 999)[0].input_ids[1:-1]) == text


def test_the_tokenizer_is_deterministic_and_survives_saving(tokenizer, tmp_path):
    from transformers import AutoTokenizer

    assert len(tokenizer) == 290
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)
    assert train_tokenizer(TEXTS, 290).get_vocab() == tokenizer.get_vocab()
    tokenizer.save_pretrained(tmp_path)
    document = [Document("t", "a quick dog <s>")]
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert encode(document, loaded, 99) == encode(document, tokenizer, 99)


def test_special_tokens_in_the_text_stay_text(tokenizer):
    ids = encode([Document("", "a</s>b<pad>")], tokenizer, 99)[0].input_ids
    assert ids[0] == 1 and ids[-1] == 2 and not {0, 1, 2} & set(ids[1:-1])
    assert tokenizer.decode(ids[1:-1]) == "a</s>b<pad>"


def test_titles_carry_loss_and_prompts_do_not(tokenizer):
    titled, asked = encode([Document("fox", "a dog"), Document("", " a dog", "the fox")], tokenizer, 99)
    assert titled.labels == titled.input_ids
    assert tokenizer.decode(titled.input_ids[1 : titled.prefix]) == "fox\n"
    assert tokenizer.decode(titled.input_ids[titled.prefix : -1]) == "a dog"
    assert asked.labels == [-100] * asked.prefix + asked.input_ids[asked.prefix :]
    assert tokenizer.decode(asked.input_ids[1 : asked.prefix]) == "the fox"


def test_splitting_loses_nothing_and_truncation_cuts(tokenizer):
    text = " ".join(TEXTS)
    whole = encode([Document("title", text)], tokenizer, 10_000)[0]
    pieces = encode([Document("title", text)], tokenizer, 16)
    assert [t for piece in pieces for t in piece.input_ids[1:]] == whole.input_ids[1:]
    assert all(len(piece) <= 16 and piece.input_ids[0] == 1 for piece in pieces)
    assert [piece.prefix for piece in pieces[1:]] == [0] * (len(pieces) - 1)
    cut = encode([Document("title", text)], tokenizer, 16, overflow="truncate")
    assert cut == pieces[:1]
    answer = encode([Document("", text, "why")], tokenizer, 16)
    assert len(answer) == 1 and len(answer[0]) == 16 and answer[0].labels[-1] != -100


def test_the_head_of_a_text_serves_as_its_prompt(tokenizer):
    documents = [Document("", "fox " * 20), Document("", " a dog", "the fox"), Document("", "dog")]
    report = DataReport()
    plain = encode(documents, tokenizer, 16)
    made = encode(documents, tokenizer, 16, prompt_tokens=6, report=report)
    book = [example for example in plain[:-2] if len(example) > 6]
    assert [e.input_ids for e in made[:-1]] == [e.input_ids for e in book] and len(book) > 1
    assert all(e.labels == [-100] * 6 + e.input_ids[6:] and e.prefix == 6 for e in made[:-1])
    assert made[-1] == plain[-2]  # it has a prompt of its own
    assert report.dropped == {"shorter than prompt_tokens": 1} and report.truncated == (len(book) < len(plain[:-2]))
    with pytest.raises(ValueError, match="document 0: it has 4 tokens, none behind the 6 of its prompt"):
        encode(documents[2:], tokenizer, 16, prompt_tokens=6)
    for wrong in (-1, 16):
        with pytest.raises(ValueError, match=f"prompt_tokens of at least 0 and below max_length 16; got {wrong}"):
            encode(documents, tokenizer, 16, prompt_tokens=wrong)


def test_bad_arguments_are_named(tokenizer):
    with pytest.raises(ValueError, match="max_length of at least 2; got 1"):
        encode([], tokenizer, 1)
    with pytest.raises(ValueError, match="'split' or 'truncate'; got 'wrap'"):
        encode([], tokenizer, 9, overflow="wrap")
    with pytest.raises(ValueError, match="document 1: its prompt takes .* max_length 8"):
        encode([Document("", "a"), Document("", "b", "the quick brown fox " * 3)], tokenizer, 8)
    with pytest.raises(ValueError, match="259"):
        train_tokenizer(["a"], 258)
    with pytest.raises(ValueError, match="some text"):
        train_tokenizer(["", ""], 300)
    with pytest.raises(ValueError, match="at least one example"):
        batches([], 4)
    with pytest.raises(ValueError, match="batch_size of at least 1; got 0"):
        batches(examples(3), 0)


def test_batches_are_padded_on_the_right():
    first, second = batches(examples(3, 5, 2), 2, pad_id=7)
    assert first["input_ids"].tolist() == [[10, 10, 10, 7, 7], [11] * 5]
    assert first["labels"].tolist() == [[10, 10, 10, -100, -100], [11] * 5]
    assert first["attention_mask"].tolist() == [[1, 1, 1, 0, 0], [1] * 5]
    assert second["input_ids"].shape == (1, 2) and second["index"].tolist() == [2]
    assert all(tensor.dtype == torch.int64 for tensor in first.values())


def test_shuffling_depends_on_seed_and_epoch_alone():
    rows = examples(*range(1, 31))

    def order(**keywords):
        return torch.cat([b["index"] for b in batches(rows, 4, **keywords)]).tolist()

    assert order() == list(range(30))
    torch.manual_seed(5)
    first = order(seed=3, epoch=1)
    torch.manual_seed(6)
    assert order(seed=3, epoch=1) == first and sorted(first) == list(range(30))
    assert len({tuple(order(seed=s, epoch=e)) for s in range(3) for e in range(3)}) == 9
    for batch in batches(rows, 4, seed=1):  # index names the row, whatever its place
        assert (batch["input_ids"][:, 0] - 10 == batch["index"]).all()


def test_padding_id_falls_back():
    class Tokenizer:
        pad_token_id, eos_token_id = None, 5

    assert pad_token_id(Tokenizer) == 5
    Tokenizer.eos_token_id = None
    assert pad_token_id(Tokenizer) == 0
    Tokenizer.pad_token_id = 0
    assert pad_token_id(Tokenizer) == 0
