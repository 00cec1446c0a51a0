"""Read local files record by record: JSON lines, JSON and text, plain or compressed."""

import gzip
import json
import lzma
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from moe_unlearn.data.records import kind

SUFFIXES = (".jsonl", ".json", ".txt")
OPENERS: dict[str, Callable] = {".gz": gzip.open, ".xz": lzma.open}
ENCODINGS = ("utf-8", "latin-1", "cp1252")  # the byte 0x0a ends a line in each of them, so lines can be decoded singly
RECORD_BYTES = 64 << 20  # the longest record; a tokenizer takes some hundred bytes of memory for a byte of it
UNPACKED = 100  # bytes that a byte of a compressed file may become, unless `max_bytes` says how many all may be
SMALL = 1 << 20  # bytes that any compressed file may hold
_BOM = b"\xef\xbb\xbf"


def file_format(path: Path) -> str:
    """Return the suffix that tells the format: `.jsonl` for `a.jsonl`, and also for the compressed `a.jsonl.gz`."""
    inner = path.with_suffix("") if path.suffix.lower() in OPENERS else path
    return inner.suffix.lower()


def records(
    path: Path,
    *,
    encoding: str = "utf-8",
    lines_as_text: bool = False,
    limit: int | None = None,
    max_bytes: int = 0,
) -> Iterator[tuple[object, str]]:
    """Yield the pairs (record, where it stands) of a file.

    Only one record is in memory at a time, unless the file is one JSON list. `.jsonl` holds one JSON value a line,
    `.json` a list or JSON lines (TOFU's files), `.txt` texts between blank lines, whose line ends become \\n. A byte
    order mark is dropped. `lines_as_text` gives the lines of a JSON file undecoded.

    A record of more than `RECORD_BYTES` is an error, and so is a JSON list of more than `limit` bytes. So is a file of
    more than `max_bytes`; if that is 0, a compressed one that holds more than `UNPACKED` times its size, and more than
    1 MiB.

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
    size = _Size(limit, max_bytes or _unpacked(path))
    lines = _lines(path, encoding, size._replace(record=RECORD_BYTES))
    if format == ".txt":
        return _paragraphs(path, lines)
    if lines_as_text:
        return ((line.rstrip("\r\n"), f"{path}, line {number}") for number, line in lines if line.strip())
    if format == ".json" and not _first_line_is_object(path, encoding, size):
        return _json_list(path, encoding, size)
    return _json_lines(path, lines)


class _Size(NamedTuple):
    """How many bytes a record may have, and how many a whole file; None: any number."""

    record: int | None
    file: int | None


def _unpacked(path: Path) -> int | None:
    """Return how many bytes a compressed file may hold, None for one that is not compressed."""
    compressed = path.suffix.lower() in OPENERS
    return max(UNPACKED * path.stat().st_size, SMALL) if compressed else None


def _lines(path: Path, encoding: str, size: _Size) -> Iterator[tuple[int, str]]:
    """Yield the numbered lines of a file, with their line ends."""
    opened = OPENERS.get(path.suffix.lower(), open)
    try:
        with opened(path, "rb") as file:
            number = read = 0
            while True:
                left = None if size.file is None else size.file - read
                # only the byte 0x0a ends a line: JSON strings may hold U+2028 and the like unescaped
                line = file.readline(min((n + 1 for n in (size.record, left) if n is not None), default=-1))
                if not line:
                    return
                number += 1
                read += len(line)
                if left is not None and len(line) > left:
                    raise ValueError(
                        f"{path}: expected at most {size.file:,} bytes of text; it holds more ({path.stat().st_size:,} "
                        f"are on the disk): {path.name}?max_bytes=N lets it have N"
                    )
                _check_size(len(line), size.record, f"{path}, line {number}")
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
        raise ValueError(
            f"{where}: expected a record of at most {limit:,} bytes; this one is longer: cut it into several, such as "
            "one for each chapter"
        )


def _json_lines(path: Path, lines: Iterator[tuple[int, str]]) -> Iterator[tuple[object, str]]:
    for number, line in lines:
        if line.strip():
            where = f"{path}, line {number}"
            yield _parse(line, where, number), where


def _first_line_is_object(path: Path, encoding: str, size: _Size) -> bool:
    for _, line in _lines(path, encoding, size):
        if line.strip():
            try:
                return isinstance(json.loads(line), dict)
            except (json.JSONDecodeError, RecursionError):
                return False
    return False


def _json_list(path: Path, encoding: str, size: _Size) -> Iterator[tuple[object, str]]:
    content, read = [], 0
    for _, line in _lines(path, encoding, size):
        content.append(line)
        read += len(line)
        _check_size(read, size.record, f"{path} (one JSON list; JSON lines can be longer)")
    if not any(line.strip() for line in content):
        return
    items = _parse("".join(content), str(path))
    if not isinstance(items, list):
        raise ValueError(f"{path}, line 1: expected a JSON list of strings or objects; got {kind(items)}")
    for number, item in enumerate(items, 1):
        yield item, f"{path}, item {number}"


def _paragraphs(path: Path, lines: Iterator[tuple[int, str]]) -> Iterator[tuple[str, str]]:
    paragraph: list[str] = []
    start, size = 1, 0
    for number, line in lines:
        for part in line.replace("\r\n", "\n").replace("\r", "\n").removesuffix("\n").split("\n"):
            if part.strip():
                start = start if paragraph else number
                paragraph.append(part)
                size += len(part)
                _check_size(size, RECORD_BYTES, f"{path}, line {start}")
            elif paragraph:
                yield "\n".join(paragraph).strip(), f"{path}, line {start}"
                paragraph, size = [], 0
    if paragraph:
        yield "\n".join(paragraph).strip(), f"{path}, line {start}"


class _DuplicateError(ValueError):
    """Error for an object with a key twice, of which JSON keeps the last one without a word."""


def _once(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """Return an object of JSON, no key of which may be there twice."""
    made = dict(pairs)
    if len(made) < len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise _DuplicateError(f"expected each key of an object once; got {twice!r} twice")
    return made


def _parse(text: str, where: str, line: int | None = None) -> object:
    try:
        return json.loads(text, object_pairs_hook=_once)
    except json.JSONDecodeError as error:
        where = where if line else f"{where}, line {error.lineno}"
        raise ValueError(f"{where}, column {error.colno}: expected valid JSON; {error.msg}") from None
    except _DuplicateError as error:
        raise ValueError(f"{where}: {error}") from None
    except RecursionError:
        raise ValueError(f"{where}: expected a JSON object; got one nested too deeply") from None
