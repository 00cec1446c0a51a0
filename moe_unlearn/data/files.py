"""A user's own documents: .jsonl, .json and .txt, with the field names of MUSE, WMDP and TOFU."""

import json
import re
from pathlib import Path

from moe_unlearn.data.corpus import Document

PAIRS = (("prompt", "gt"), ("prompt", "completion"), ("question", "answer"))
EXPECTED = "a field 'text', or 'prompt' with 'gt' or 'completion', or 'question' with 'answer'"


def read_documents(path: str | Path) -> list[Document]:
    """The documents of a file.

    `.jsonl`: one JSON object (or string) a line. `.json`: a list of objects or strings. `.txt`: documents
    separated by blank lines. An object has a field `text`; or `prompt` with `gt` or `completion`; or
    `question` with `answer`, read as "Question: ...\\nAnswer: ..."; questions and prompts carry no loss.
    Other fields are ignored.

    Raises FileNotFoundError, or ValueError naming the file, the line (or item) and what was expected.
    """
    path = Path(path)
    readers = {".jsonl": _read_jsonl, ".json": _read_json, ".txt": _read_txt}
    if path.suffix.lower() not in readers:
        raise ValueError(f"{path}: expected a file ending in {', '.join(readers)}; got {path.suffix!r}")
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; expected documents in {', '.join(readers)}")
    try:
        content = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        byte = error.object[error.start]
        raise ValueError(f"{path}, line {line}: expected UTF-8 text; got byte {byte:#04x}") from None
    documents = readers[path.suffix.lower()](path, content)
    if not documents:
        raise ValueError(f"{path}: expected at least one document; the file has none")
    return documents


def _read_jsonl(path: Path, content: str) -> list[Document]:
    documents = []
    # split("\n") rather than splitlines(): JSON strings may hold U+2028 and the like unescaped
    for number, line in enumerate(content.split("\n"), 1):
        if line.strip():
            where = f"{path}, line {number}"
            documents.append(_document(_parse(line, where, number), where))
    return documents


def _read_json(path: Path, content: str) -> list[Document]:
    items = _parse(content, str(path))
    if not isinstance(items, list):
        raise ValueError(f"{path}, line 1: expected a JSON list of strings or objects; got {_kind(items)}")
    return [_document(item, f"{path}, item {number}") for number, item in enumerate(items, 1)]


def _read_txt(path: Path, content: str) -> list[Document]:
    return [Document("", text.strip()) for text in re.split(r"\r?\n[ \t]*\r?\n", content) if text.strip()]


def _parse(text: str, where: str, line: int | None = None) -> object:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        where = where if line else f"{where}, line {error.lineno}"
        raise ValueError(f"{where}, column {error.colno}: expected valid JSON; {error.msg}") from None
    except RecursionError:
        raise ValueError(f"{where}: expected a JSON object; got one nested too deeply") from None


def _document(item: object, where: str) -> Document:
    if isinstance(item, str):
        return Document("", _text({"text": item}, "text", where))
    if not isinstance(item, dict):
        raise ValueError(f"{where}: expected a string or an object with {EXPECTED}; got {_kind(item)}")
    for prompt, text in PAIRS:
        if prompt in item and text in item:
            asked, answer = _text(item, prompt, where), _text(item, text, where)
            if prompt == "question":
                asked, answer = f"Question: {asked}\nAnswer:", f" {answer.lstrip()}"
            return Document("", answer, prompt=asked)
    if "text" in item:
        return Document("", _text(item, "text", where))
    found = ", ".join(map(repr, item)) or "no fields"
    raise ValueError(f"{where}: expected {EXPECTED}; got {found}")


def _text(item: dict, key: str, where: str) -> str:
    value = item[key]
    if not isinstance(value, str):
        raise ValueError(f"{where}: expected field {key!r} to be a string; got {_kind(value)}")
    if not value.strip():
        raise ValueError(f"{where}: expected field {key!r} to hold text; it is empty")
    return value


def _kind(value: object) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")
