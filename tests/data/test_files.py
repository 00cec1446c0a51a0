"""A user's files: every known record is read, and every error says where and what was expected."""

import gzip
import json
import lzma

import pytest

from moe_unlearn.data import DataReport, Document, ExampleStream, load, train_tokenizer
from moe_unlearn.data import files as reader

pytestmark = pytest.mark.quick


def question(text):
    return f"Question: {text}\nAnswer:"


@pytest.mark.parametrize(
    ("item", "expected"),
    [
        ({"text": "a b"}, Document("", "a b")),
        ({"title": "t", "abstract": "x", "text": "a", "doi": 3}, Document("", "a")),  # WMDP
        ({"prompt": "once", "gt": " upon"}, Document("", " upon", "once")),  # MUSE VerbMem
        ({"prompt": "p", "completion": "c"}, Document("", "c", "p")),
        ({"question": "Who?", "answer": "Me."}, Document("", " Me.", question("Who?"))),  # TOFU
        ({"question": "Q", "answer": "A", "perturbed_answer": ["B"]}, Document("", " A", question("Q"))),
        ({"query": "___?", "answer": "A", "subject": "S", "level": "1"}, Document("", " A", question("___?"))),  # RWKU
        ({"instruction": "Do", "input": "it", "output": "No."}, Document("", " No.", question("Do\nit"))),
        ({"instruction": "Do", "input": "", "output": "No."}, Document("", " No.", question("Do"))),
        ({"prompt": "Q", "response": "A", "is_safe": True}, Document("", " A", question("Q"))),
        ({"target": "Ann", "intro": "Ann is."}, Document("Ann", "Ann is.")),
        ("plain", Document("", "plain")),
    ],
)
def test_records(write, item, expected):
    other = {"text": "other"}
    jsonl = write("a.jsonl", f"{json.dumps(item)}\n\n{json.dumps(other)}\n")
    listed = write("a.json", [item, other])
    assert load(jsonl) == load(str(listed)) == [expected, Document("", "other")]
    if isinstance(item, dict):
        assert load(jsonl)[0].fields == item


def test_a_question_is_kept_for_chat_templates(write):
    asked, continued = load(write("a.jsonl", [{"question": " Q? ", "answer": "A"}, {"prompt": "P", "gt": "g"}]))
    assert (asked.question, continued.question) == ("Q?", "")


def test_text_files_are_split_at_blank_lines(write):
    path = write("a.txt", "\ufeffone\nstill one\r\n\r\ntwo\n \t\n\n\nthree\n")
    assert [d.text for d in load(path)] == ["one\nstill one", "two", "three"]
    assert [d.text for d in load(write("b.txt", "a\r\nb\r\n\r\nc"))] == ["a\nb", "c"]
    assert [d.text for d in load(write("mac.txt", "a\rb\r\rc\r"))] == ["a\nb", "c"]


@pytest.mark.parametrize("pack, ending", [(gzip.compress, ".gz"), (lzma.compress, ".xz")])
def test_compressed_files(write, pack, ending):
    path = write(f"a.jsonl{ending}", pack(b'{"text": "a"}\n{"text": 1}\n'))
    with pytest.raises(ValueError, match=r"line 2: expected field 'text' to be a string"):
        load(path)
    assert load(write(f"b.TXT{ending}", pack(b"a\n\nb"))) == [Document("", "a"), Document("", "b")]
    for number, broken in enumerate((b"plain text", pack(b"a\n\nb" * 99)[:-9])):
        with pytest.raises(ValueError, match=rf"{number}\.txt\{ending}: expected \{ending} data"):
            load(write(f"{number}.txt{ending}", broken))


def test_line_separators_inside_json_strings_do_not_split(write):
    path = write("a.jsonl", json.dumps({"text": "a\u2028b\x85c"}, ensure_ascii=False) + "\r\n")
    assert load(path) == [Document("", "a\u2028b\x85c")]


def test_a_byte_order_mark_is_dropped_from_json(write):
    assert load(write("a.jsonl", "\ufeff" + '{"text": "a"}')) == [Document("", "a")]
    assert load(write("a.json", "\ufeff" + '["a"]')) == [Document("", "a")]


def test_json_lines_under_the_name_json(write):  # as TOFU's files are
    path = write("forget01.json", '{"question": "Q", "answer": "A"}\n{"question": "R", "answer": "B"}\n')
    assert [d.text for d in load(path)] == [" A", " B"]
    with pytest.raises(ValueError, match=r"b\.json, line 2, column"):
        load(write("b.json", '{"text": "a"}\n{"text": \n'))


def test_other_encodings_are_read_when_named(write):
    path = write("a.txt", "caf\xe9".encode("latin-1"))
    with pytest.raises(ValueError, match=r"line 1: expected UTF-8 text; got byte 0xe9 \(other encodings: latin-1"):
        load(path)
    assert load(path, encoding="latin-1") == load(f"{path}?encoding=latin-1") == [Document("", "caf\xe9")]
    with pytest.raises(ValueError, match="expected encoding utf-8, latin-1, cp1252; got 'utf-16'"):
        load(path, encoding="utf-16")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"text": "a"}\n{"text": "b"\n', r"a\.jsonl, line 2, column \d+: expected valid JSON"),
        ("a.jsonl", '{"text": "a"}\n\n{"txt": "b"}\n', r"a\.jsonl, line 3: expected a field 'text'.*got 'txt'"),
        ("a.jsonl", "{}\n", "line 1: expected a field 'text'.*got no fields"),
        ("a.jsonl", "[1, 2]\n", "line 1: expected a string or an object.*got a list"),
        ("a.jsonl", "17\n", "got a number"),
        ("a.jsonl", "null\n", "got null"),
        ("a.jsonl", '{"text": 3}\n', "line 1: expected field 'text' to be a string; got a number"),
        ("a.jsonl", '{"text": "  "}\n', "at least one document; 1 empty"),
        ("a.jsonl", '{"text": "a\\ud800"}\n', "line 1: expected field 'text' to be Unicode.* surrogate 0xd800"),
        ("a.jsonl", '{"question": "q", "answer": ["a"]}\n', "field 'answer' to be a string; got a list"),
        ("a.jsonl", '{"question": "q"}\n', "got 'question'"),
        ("a.jsonl", '{"prompt": "q"}\n', "'prompt' with 'gt', 'completion', 'response' or 'answer'.*got 'prompt'"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "\xff"}\n', r"line 2: expected UTF-8 text; got byte 0xff"),
        ("a.jsonl", "", "at least one document"),
        ("a.jsonl", "[" * 200_000, r"a\.jsonl, line 1"),
        ("a.json", "[" * 200_000, r"a\.json: expected a JSON object; got one nested too deeply"),
        ("a.json", '{\n"text": "a"}', r"a\.json, line 1: expected a JSON list.*got an object"),
        ("a.json", '[{"text": "a"},\n {"text"}]', r"a\.json, line 2, column \d+: expected valid JSON"),
        ("a.json", '["a", {"b": 1}]', "item 2: expected a field 'text'"),
        ("a.json", "[]", "at least one document"),
        ("a.json", "", "at least one document"),
        ("a.txt", " \n\n \n", "at least one document"),
        ("a.txt", b"\n\xe9", r"a\.txt, line 2: expected UTF-8"),
        ("a.csv", "text\na\n", r"expected a file ending in \.jsonl, \.json, \.txt, .*got '\.csv'"),
    ],
)
def test_bad_files_are_named(write, name, content, message):
    with pytest.raises(ValueError, match=message):
        load(write(name, content))


def test_missing_files(tmp_path, write):
    with pytest.raises(FileNotFoundError, match=r"none\.jsonl: no such file"):
        load(tmp_path / "none.jsonl")
    (tmp_path / "dangling.jsonl").symlink_to(tmp_path / "none.jsonl")
    with pytest.raises(FileNotFoundError, match=r"dangling\.jsonl: no such file"):
        load(tmp_path / "dangling.jsonl")
    (tmp_path / "linked.txt").symlink_to(write("real.txt", "a"))
    assert load(tmp_path / "linked.txt") == [Document("", "a")]


def test_files_with_the_signs_of_a_source_string_in_their_name(write, monkeypatch, tmp_path):
    path = write("a:b?join=true.txt", "a\n\nb")
    assert len(load(path)) == 2
    monkeypatch.setenv("HOME", str(tmp_path))
    write("home.txt", "a")
    assert load("~/home.txt") == [Document("", "a")]


def test_a_record_has_a_longest_length_and_a_stream_holds_one_at_a_time(write, monkeypatch):
    """A line of a gigabyte took a hundred of them when it was encoded."""
    monkeypatch.setattr(reader, "RECORD_BYTES", 1000)
    long = "x" * 2000
    for name, content, place in (
        ("a.jsonl", f'{{"text": "a"}}\n{{"text": "{long}"}}\n', r"a\.jsonl, line 2"),
        ("a.txt", "a\n\n" + "word word\n" * 200, r"a\.txt, line 3"),
        ("a.json", json.dumps(["a"] * 1000), r"a\.json"),
        ("b.jsonl.gz", gzip.compress(b"\0" * 10**8), r"b\.jsonl\.gz, line 1"),  # 100 MB in one line
    ):
        path = write(name, content)
        for streaming in (True, False):
            if name == "a.json" and not streaming:  # a list is asked for, and each of its records is short
                assert len(load(path)) == 1000
                continue
            with pytest.raises(ValueError, match=f"{place}.*expected a record of at most 1,000 bytes.*: cut it into"):
                list(load(f"{path}?max_bytes=1000000000", streaming=streaming))


def test_a_stream_reads_lazily_and_again(write):
    path = write("a.jsonl", '{"text": "a"}\n{"text": ""}\n{"text": "b"}\nbroken\n')
    report = DataReport()
    stream = load(path, streaming=True, report=report)
    for _ in range(2):
        documents = iter(stream)
        assert [next(documents).text, next(documents).text] == ["a", "b"]
        assert (report.read, report.kept, report.dropped) == (3, 2, {"empty": 1})
        with pytest.raises(ValueError, match="line 4, column 1"):
            next(documents)
    tokenizer = train_tokenizer(["a b"], 260)
    with pytest.raises(ValueError, match="line 4"):
        list(ExampleStream(stream, tokenizer, 8))
