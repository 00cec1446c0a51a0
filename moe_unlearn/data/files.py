"""Read local files record by record: JSON lines, JSON and text, plain or compressed."""

import gzip
import json
import lzma
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

from moe_unlearn.data.records import kind

SUFFIXES = (".jsonl", ".json", ".txt")
OPENERS: dict[str, Callable] = {".gz": gzip.open, ".xz": lzma.open}
ENCODINGS = ("utf-8", "latin-1", "cp1252")  # the byte 0x0a ends a line in each of them, so lines can be decoded singly
RECORD_BYTES = 64 << 20  # the longest record that a stream holds in memory
_BOM = b"\xef\xbb\xbf"


def file_format(path: Path) -> str:
    """Return the suffix that tells the format: `.jsonl` for `a.jsonl`, and also for the compressed `a.jsonl.gz`."""
    inner = path.with_suffix("") if path.suffix.lower() in OPENERS else path
    return inner.suffix.lower()


def records(
    path: Path, *, encoding: str = "utf-8", lines_as_text: bool = False, limit: int | None = None
) -> Iterator[tuple[object, str]]:
    """Yield the pairs (record, where it stands) of a file.

    Only one record is in memory at a time, unless the file is one JSON list. `.jsonl` holds one JSON value a line,
    `.json` a list or JSON lines (TOFU's files), `.txt` texts between blank lines, whose line ends become \\n. A byte
    order mark is dropped. `lines_as_text` gives the lines of a JSON file undecoded. A record (or list) of more than
    `limit` bytes is an error.

    Raises FileNotFoundError, and ValueError naming the file, the line and what was expected.
    """
    format = file_format(path)
    if format not in SUFFIXES:
        endings = f"{', '.join(SUFFIXES)}, perhaps followed by {' or '.join(OPENERS)}"
        raise ValueError(f"{path}: expected a file ending in {endings}; got {path.suffix!r}")
    if encoding not in ENCODINGS:
        raise ValueError(f"expected encoding {', '.join(ENCODINGS)}; got {encoding!r}")
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; expected documents in {', '.join(SUFFIXES)}")
    lines = _lines(path, encoding, limit)
    if format == ".txt":
        return _paragraphs(path, lines, limit)
    if lines_as_text:
        return ((line.rstrip("\r\n"), f"{path}, line {number}") for number, line in lines if line.strip())
    if format == ".json" and not _first_line_is_object(path, encoding, limit):
        return _json_list(path, encoding, limit)
    return _json_lines(path, lines)


def _lines(path: Path, encoding: str, limit: int | None) -> Iterator[tuple[int, str]]:
    """Yield the numbered lines of a file, with their line ends."""
    opened = OPENERS.get(path.suffix.lower(), open)
    try:
        with opened(path, "rb") as file:
            number = 0
            # only the byte 0x0a ends a line: JSON strings may hold U+2028 and the like unescaped
            while line := file.readline(-1 if limit is None else limit + 1):
                number += 1
                _check_size(len(line), limit, f"{path}, line {number}")
                yield number, _decoded(line.removeprefix(_BOM) if number == 1 else line, encoding, path, number)
    except (gzip.BadGzipFile, lzma.LZMAError, zlib.error, EOFError) as error:
        raise ValueError(f"{path}: expected {path.suffix.lower()} data; {error}") from None


def _decoded(line: bytes, encoding: str, path: Path, number: int) -> str:
    try:
        return line.decode(encoding)
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path}, line {number}: expected {encoding.upper()} text; got byte {line[error.start]:#04x} "
            f"(other encodings: {', '.join(e for e in ENCODINGS if e != encoding)})"
        ) from None


def _check_size(size: int, limit: int | None, where: str) -> None:
    if limit is not None and size > limit:
        raise ValueError(f"{where}: expected records of at most {limit} bytes in a stream; this one is longer")


def _json_lines(path: Path, lines: Iterator[tuple[int, str]]) -> Iterator[tuple[object, str]]:
    for number, line in lines:
        if line.strip():
            where = f"{path}, line {number}"
            yield _parse(line, where, number), where


def _first_line_is_object(path: Path, encoding: str, limit: int | None) -> bool:
    for _, line in _lines(path, encoding, limit):
        if line.strip():
            try:
                return isinstance(json.loads(line), dict)
            except (json.JSONDecodeError, RecursionError):
                return False
    return False


def _json_list(path: Path, encoding: str, limit: int | None) -> Iterator[tuple[object, str]]:
    content, size = [], 0
    for _, line in _lines(path, encoding, limit):
        content.append(line)
        size += len(line)
        _check_size(size, limit, f"{path} (one JSON list; JSON lines can be longer)")
    if not any(line.strip() for line in content):
        return
    items = _parse("".join(content), str(path))
    if not isinstance(items, list):
        raise ValueError(f"{path}, line 1: expected a JSON list of strings or objects; got {kind(items)}")
    for number, item in enumerate(items, 1):
        yield item, f"{path}, item {number}"


def _paragraphs(path: Path, lines: Iterator[tuple[int, str]], limit: int | None) -> Iterator[tuple[str, str]]:
    paragraph: list[str] = []
    start, size = 1, 0
    for number, line in lines:
        for part in line.replace("\r\n", "\n").replace("\r", "\n").removesuffix("\n").split("\n"):
            if part.strip():
                start = start if paragraph else number
                paragraph.append(part)
                size += len(part)
                _check_size(size, limit, f"{path}, line {start}")
            elif paragraph:
                yield "\n".join(paragraph).strip(), f"{path}, line {start}"
                paragraph, size = [], 0
    if paragraph:
        yield "\n".join(paragraph).strip(), f"{path}, line {start}"


def _parse(text: str, where: str, line: int | None = None) -> object:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        where = where if line else f"{where}, line {error.lineno}"
        raise ValueError(f"{where}, column {error.colno}: expected valid JSON; {error.msg}") from None
    except RecursionError:
        raise ValueError(f"{where}: expected a JSON object; got one nested too deeply") from None
