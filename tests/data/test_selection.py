"""What is dropped is dropped for its reason, counted, and named."""

import json

import pytest

from moe_unlearn.data import DataReport, Document, load, select

pytestmark = pytest.mark.quick


def chosen(documents, **options):
    report = DataReport()
    located = [(document, f"line {i}") for i, document in enumerate(documents, 1)]
    return [document for document, _ in select(located, report, **options)], report


def words(start, count):
    return Document("", " ".join(f"w{i}" for i in range(start, start + count)))


def test_each_reason():
    documents = [
        words(0, 30),
        Document("", " \n", "a prompt"),
        words(100, 2),
        words(0, 30),
        Document("", words(0, 30).text.upper().replace(" ", "\n")),
        words(500, 30),
        words(600, 30),
        words(700, 4),
    ]
    forget = [words(511, 12), words(640, 30), words(700, 4)]
    kept, report = chosen(documents, min_words=3, deduplicate=True, exclude=forget)
    assert kept == [documents[0], documents[6]]
    assert report.dropped == {"empty": 1, "too short": 1, "duplicate": 2, "overlaps with the forget set": 2}
    assert report.places["duplicate"] == ["line 4", "line 5"]
    assert (report.read, report.kept) == (8, 2)


def test_eleven_shared_words_are_no_overlap():
    assert chosen([words(0, 30)], exclude=[words(19, 30)])[0]
    assert not chosen([words(0, 30)], exclude=[words(18, 30)])[0]


def test_nothing_but_the_empty_is_dropped_unasked():
    same = [words(0, 1)] * 3
    assert chosen([*same, Document("title", "")])[0] == same


def test_prompts_make_documents_different():
    asked = [Document("", "yes", "one?"), Document("", "yes", "two?")]
    assert chosen(asked, deduplicate=True)[0] == asked


def test_the_report_is_text_and_json(write):
    rows = [{"text": "a b c"}] * 6 + [{"text": ""}]
    report = DataReport()
    path = write("a.jsonl", rows)
    load(f"{path}?deduplicate=true&min_words=2", report=report)
    assert str(report).splitlines() == [
        f"{path}: 1 of 7 documents kept",
        f"  5 dropped, duplicate: {path}, line 2, {path}, line 3, {path}, line 4, ...",
        f"  1 dropped, empty: {path}, line 7",
    ]
    assert DataReport(**json.loads(json.dumps(report.to_dict()))) == report
