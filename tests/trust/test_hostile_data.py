"""Hostile documents and folders of them are refused in one line that names the place; nothing is read beyond bounds."""

import gzip
import json
import lzma

import pytest

from moe_unlearn import data
from moe_unlearn.data import chats, files
from tests.support.tokenizers import tokenizer_with

pytestmark = pytest.mark.quick
ROW = json.dumps({"text": "a few words"}) + "\n"


def test_home_folders_of_nobody():
    with pytest.raises(ValueError, match="'~nobody-here/a.jsonl': no home folder of ~nobody-here is known"):
        data.load("~nobody-here/a.jsonl")


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "data").mkdir()
    for place in ("data/a.jsonl", "data/b.jsonl", "secret.jsonl"):
        (tmp_path / place).write_text(ROW, encoding="utf-8")
    return tmp_path / "data"


@pytest.mark.parametrize("split", ["../secret", "a+../secret", "a+/etc/passwd", "../data/a"])
def test_a_split_stays_within_its_folder(folder, split):
    assert len(data.load(f"{folder}:a+b")) == 2
    with pytest.raises(ValueError, match="expected a split within the folder; got"):
        data.load(f"{folder}:{split}")


def test_a_link_out_of_a_folder_is_refused(folder, tmp_path):
    (folder / "c.jsonl").symlink_to(tmp_path / "secret.jsonl")
    for source in (folder, f"{folder}:c", f"{folder}:a+c"):
        with pytest.raises(ValueError, match=f"c.jsonl is a link out of it: name {folder}/c.jsonl itself"):
            data.load(source)
    assert len(data.load(folder / "c.jsonl")) == 1
    (folder / "c.jsonl").unlink()
    (folder / "c.jsonl").symlink_to("a.jsonl")
    assert len(data.load(folder)) == 3


def test_links_of_the_hubs_cache_are_followed(folder, tmp_path):
    snapshot = tmp_path / "datasets--org--name" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (folder / "a.jsonl").rename(tmp_path / "datasets--org--name" / "blob")
    (snapshot / "a.jsonl").symlink_to("../../blob")
    assert len(data.load(snapshot)) == 1


BOMBS = {
    "one line": b'{"text": "' + b"a" * 300_000 + b'"}\n',
    "empty lines": b"\n" * 300_000,
    "a list": b"[" + b'"a b c",\n' * 30_000 + b'"d"]',
}


@pytest.mark.parametrize("opened", [gzip.open, lzma.open])
@pytest.mark.parametrize("content", BOMBS.values(), ids=BOMBS)
def test_what_unpacks_to_far_more_is_not_read(tmp_path, monkeypatch, content, opened):
    monkeypatch.setattr(files, "SMALL", 1000)
    format = "json" if content.startswith(b"[") else "jsonl"
    path = tmp_path / f"bomb.{format}{'.gz' if opened is gzip.open else '.xz'}"
    with opened(path, "wb") as file:
        file.write(content)
    assert path.stat().st_size * 150 < len(content)
    told = rf"{path}: expected at most [\d,]+ bytes of text; it holds more .*: {path.name}\?max_bytes=N lets it have N"
    with pytest.raises(ValueError, match=told):
        data.load(path)
    with pytest.raises(ValueError, match="expected at most 1,000 bytes"):
        data.load(f"{path}?max_bytes=1000")
    assert len([*files.records(path, max_bytes=10**6)]) == content.count(b'"a') + content.count(b'"d"')


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("a.jsonl", ROW + '{"text": "a", "text": "b"}', "a.jsonl, line 2: expected each key .*; got 'text' twice"),
        ("a.jsonl", '{"text": "a", "x": {"y": 1, "y": 2}}', "a.jsonl, line 1: expected each key .*; got 'y' twice"),
        ("a.json", '[{"text": "a", "text": "b"}]', "a.json: expected each key of an object once; got 'text' twice"),
        ("a.jsonl", '{"text": ' + "[" * 100_000, "a.jsonl, line 1: expected a JSON object; got one nested too deeply"),
        ("a.json", "[" * 100_000, "a.json: expected a JSON object; got one nested too deeply"),
    ],
)
def test_json_that_says_two_things_or_has_no_end(tmp_path, name, content, told):
    (tmp_path / name).write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=told):
        data.load(tmp_path / name)


TEMPLATES = {
    "{% for message in %}": "TemplateSyntaxError",
    "{{ raise_exception('no such role') }}": "TemplateError: no such role",
    "{{ messages[0].content.parts.text }}": "UndefinedError",
    "{{ 1 / 0 }}": "ZeroDivisionError",
    "{{ 'a' + 1 }}": "TypeError",
    "{{ ''.__class__.__mro__ }}": "(Security|Undefined)Error",
}


@pytest.mark.parametrize("template", TEMPLATES)
def test_a_chat_template_that_fails_is_named(template):
    tokenizer = tokenizer_with(template)
    with pytest.raises(ValueError, match=f"expected a chat template that renders .*fails: .*{TEMPLATES[template]}"):
        chats.turns(tokenizer, chats.Chat())
