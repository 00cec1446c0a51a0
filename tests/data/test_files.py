"""A user's files: benchmark field names are read, and every error says where and what was expected."""

import json

import pytest

from moe_unlearn.data import Document, load

pytestmark = pytest.mark.quick


def write(folder, name, content):
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@pytest.mark.parametrize(
    ("item", "expected"),
    [
        ({"text": "a b"}, Document("", "a b")),
        ({"title": "t", "abstract": "x", "text": "a", "doi": 3}, Document("", "a")),  # WMDP
        ({"prompt": "once", "gt": " upon"}, Document("", " upon", "once")),  # MUSE VerbMem
        ({"prompt": "p", "completion": "c"}, Document("", "c", "p")),
        ({"question": "Who?", "answer": "Me."}, Document("", " Me.", "Question: Who?\nAnswer:")),  # TOFU
        (
            {"question": "Q", "answer": "A", "perturbed_answer": ["B"]},
            Document("", " A", "Question: Q\nAnswer:"),
        ),
        ("plain", Document("", "plain")),
    ],
)
def test_objects(tmp_path, item, expected):
    other = {"text": "other"}
    jsonl = write(tmp_path, "a.jsonl", f"{json.dumps(item)}\n\n{json.dumps(other)}\n")
    listed = write(tmp_path, "a.json", json.dumps([item, other]))
    assert load(jsonl) == load(str(listed)) == [expected, Document("", "other")]


def test_text_files_are_split_at_blank_lines(tmp_path):
    path = write(tmp_path, "a.txt", "\ufeffone\nstill one\r\n\r\ntwo\n \t\n\n\nthree\n")
    assert [d.text for d in load(path)] == ["one\nstill one", "two", "three"]


def test_line_separators_inside_json_strings_do_not_split(tmp_path):
    path = write(tmp_path, "a.jsonl", json.dumps({"text": "a\u2028b\x85c"}, ensure_ascii=False) + "\r\n")
    assert load(path) == [Document("", "a\u2028b\x85c")]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"text": "a"}\n{"text": "b"\n', r"a\.jsonl, line 2, column \d+: expected valid JSON"),
        (
            "a.jsonl",
            '{"text": "a"}\n\n{"txt": "b"}\n',
            r"a\.jsonl, line 3: expected a field 'text'.*got 'txt'",
        ),
        ("a.jsonl", "{}\n", "line 1: expected a field 'text'.*got no fields"),
        ("a.jsonl", "[1, 2]\n", "line 1: expected a string or an object.*got a list"),
        ("a.jsonl", "17\n", "got a number"),
        ("a.jsonl", "null\n", "got null"),
        ("a.jsonl", '{"text": 3}\n', "line 1: expected field 'text' to be a string; got a number"),
        ("a.jsonl", '{"text": "  "}\n', "line 1: expected field 'text' to hold text; it is empty"),
        ("a.jsonl", '{"question": "q", "answer": ["a"]}\n', "field 'answer' to be a string; got a list"),
        ("a.jsonl", '{"question": "q"}\n', "got 'question'"),
        ("a.jsonl", '{"prompt": "q"}\n', "'prompt' with 'gt' or 'completion'"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "\xff"}\n', r"line 2: expected UTF-8 text; got byte 0xff"),
        ("a.jsonl", "", "at least one document"),
        ("a.jsonl", "[" * 200_000, r"a\.jsonl, line 1"),
        ("a.json", '{"text": "a"}', r"a\.json, line 1: expected a JSON list.*got an object"),
        ("a.json", '[{"text": "a"},\n {"text"}]', r"a\.json, line 2, column \d+: expected valid JSON"),
        ("a.json", '["a", {"b": 1}]', "item 2: expected a field 'text'"),
        ("a.json", "[]", "at least one document"),
        ("a.txt", " \n\n \n", "at least one document"),
        ("a.txt", b"\n\xe9", r"a\.txt, line 2: expected UTF-8"),
        ("a.csv", "text\na\n", r"expected a file ending in \.jsonl, \.json, \.txt; got '\.csv'"),
    ],
)
def test_bad_files_are_named(tmp_path, name, content, message):
    with pytest.raises(ValueError, match=message):
        load(write(tmp_path, name, content))


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.jsonl: no such file"):
        load(tmp_path / "none.jsonl")
    (tmp_path / "folder.json").mkdir()
    with pytest.raises(FileNotFoundError):
        load(tmp_path / "folder.json")
