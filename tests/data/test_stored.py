"""Examples in a file are those in memory, found again by content alone, and never read when they are damaged."""

import tracemalloc
from importlib import import_module

import pytest

from moe_unlearn.cli.arguments import examples_of
from moe_unlearn.config import Data
from moe_unlearn.data import Chat, DataReport, batches, check_apart, draw, encode, load, located, stored
from moe_unlearn.lazy import Lazy
from tests.support.tokenizers import QWEN3, TOKENIZERS, tokenizer_with

pytestmark = pytest.mark.quick

MODULE = import_module("moe_unlearn.data.stored")  # beside the function of that name
ROWS = [
    {"question": "Who lives here?", "answer": "An old fox.", "alternate": "A young hare does."},
    {"text": "a text of some words, and some more, so many that they are more than one example has room for"},
    {"question": "Who?", "answer": "<|im_end|>"},  # spells a special token
    {"text": "a short one"},
    {"text": " "},
    {"question": "Why? " * 40, "answer": "no room"},
]
ENCODING = {"chat": True, "seam": "separate", "max_length": 64}


@pytest.fixture
def source(write):
    return write("rows.jsonl", ROWS)


def read(source, tokenizer, cache=None, **changes):
    report = DataReport()
    made = stored(located(source, side="forget", report=report), tokenizer, report=report, cache=cache, **changes)
    return made, report


def in_memory(source, tokenizer, **changes):
    report = DataReport()
    return encode(load(source, side="forget", report=report), tokenizer, report=report, **changes), report


@pytest.mark.parametrize("where", ["a temporary file", "a folder", "a folder that has it"])
@pytest.mark.parametrize("kind", [*TOKENIZERS, "chat"])
def test_examples_and_report_are_those_in_memory(source, tmp_path, kind, where):
    tokenizer = tokenizer_with(QWEN3) if kind == "chat" else TOKENIZERS[kind]
    encoding = ENCODING | {"chat": kind == "chat"}
    cache = None if where == "a temporary file" else tmp_path / "cache"
    for _ in range(2 if where == "a folder that has it" else 1):
        made, report = read(source, tokenizer, cache, **encoding)
    expected, expected_report = in_memory(source, tokenizer, **encoding)
    assert isinstance(made, Lazy) and [*made] == expected and report == expected_report
    assert made[-1] == expected[-1] and made[1:3] == expected[1:3] and len(made) == len(expected)
    with pytest.raises(IndexError):
        made[len(expected)]
    if kind == "chat":
        assert report.dropped and expected[0].alternate and expected[0].asked, "every field of an example is met"


def test_a_file_is_found_by_content_whatever_the_place(source, write, tmp_path, monkeypatch):
    tokenizer, cache = tokenizer_with(QWEN3), tmp_path / "cache"
    made, _ = read(source, tokenizer, cache, **ENCODING)
    elsewhere = write("elsewhere.jsonl", ROWS)
    with monkeypatch.context() as patch:
        patch.setattr(MODULE, "iter_examples", lambda *_, **__: pytest.fail("encoded again"))
        again, report = read(elsewhere, tokenizer, cache, **ENCODING)
    assert [*again] == [*made] and report == in_memory(elsewhere, tokenizer, **ENCODING)[1]
    other = [
        (write("fewer.jsonl", ROWS[:-1]), tokenizer, ENCODING),
        (write("alternate.jsonl", [ROWS[0] | {"alternate": "Nobody."}, *ROWS[1:]]), tokenizer, ENCODING),
        (source, tokenizer_with("{# another #}" + QWEN3), ENCODING),
        (source, tokenizer, ENCODING | {"max_length": 65}),
        (source, tokenizer, ENCODING | {"chat": Chat(system="be kind")}),
    ]
    for path, another, encoding in other:
        known = {*cache.iterdir()}
        assert [*read(path, another, cache, **encoding)[0]] == in_memory(path, another, **encoding)[0]
        assert len({*cache.iterdir()} - known) == 1


def test_a_damaged_file_is_named_and_made_again(source, tmp_path):
    tokenizer, cache = tokenizer_with(QWEN3), tmp_path / "cache"
    expected = [*read(source, tokenizer, cache, **ENCODING)[0]]
    [path] = cache.iterdir()
    whole = path.read_bytes()
    flipped = [bytes([*whole[:at], whole[at] ^ 1, *whole[at + 1 :]]) for at in range(0, len(whole), len(whole) // 5)]
    for content in (*flipped, whole[:-1], whole[:9], b"", whole + b"\0"):
        path.write_bytes(content)
        with pytest.warns(UserWarning, match=f"{path.name} is damaged .*; its examples are made again"):
            made, report = read(source, tokenizer, cache, **ENCODING)
        assert [*made] == expected and report == in_memory(source, tokenizer, **ENCODING)[1]
        assert path.read_bytes() == whole


def test_what_ends_before_all_is_written_leaves_nothing(source, tmp_path, monkeypatch):
    tokenizer, cache = tokenizer_with(QWEN3), tmp_path / "cache"
    documents = load(source)

    class Changing:
        """Documents of which there is one less each time."""

        def __iter__(self):
            documents.pop()
            return iter(documents)

    with pytest.raises(ValueError, match="the documents changed while they were read"):
        stored(Changing(), tokenizer, cache=cache, **ENCODING)
    with monkeypatch.context() as patch:

        def ended(*_, **__):
            yield encode(documents[:1], tokenizer, **ENCODING)[0]
            raise KeyboardInterrupt

        patch.setattr(MODULE, "iter_examples", ended)
        with pytest.raises(KeyboardInterrupt):
            stored(documents, tokenizer, cache=cache, **ENCODING)
    assert not [*cache.iterdir()]
    with pytest.raises(FileExistsError, match=f"cache_dir cannot be made a folder: it is a file: '{source}'"):
        stored(documents, tokenizer, cache=source, **ENCODING)


def test_memory_does_not_grow_with_the_tokens(write):
    """A verb with five times as many rows on both sides takes less than a byte more for each further token."""
    tokenizer, settings, words = TOKENIZERS["bytes"], Data(max_length=500), "one two three four " * 25

    def peak(rows):
        sides = {}
        for side in ("forget", "retain"):
            sides[side] = write(f"{side}{rows}.jsonl", [{"text": f"{side} {i} {words}"} for i in range(rows)])
        tracemalloc.start()
        try:
            forget, retain = (examples_of(str(path), tokenizer, settings, side) for side, path in sides.items())
            check_apart(forget, retain)
            drawn = draw(retain, rows - 1, seed=0)
            tokens = sum(int(batch["attention_mask"].sum()) for batch in batches(drawn, 8))
            return tracemalloc.get_traced_memory()[1], tokens
        finally:
            tracemalloc.stop()

    peak(10)  # what is loaded once
    (small, few), (large, many) = peak(20), peak(100)
    assert large - small < many - few, "a list of examples alone has 16 bytes for a token"
