"""Keep examples in a file, for corpora larger than memory: written while they are made, read one at a time.

A file has the examples of one side:

    records     int32, one of each example: the numbers of its tokens, of its prefix and of the tokens it is asked with
                (-1 for none), whether it is straddled, whether it has an alternate and whether it continues a document;
                then `input_ids`, `labels`, `asked`, and the record of the alternate
    places      int64, the byte where each record begins, and where the last one ends
    report      JSON: what was dropped and cut
    end         int64, the byte where the places begin and the one where the report begins; the SHA-256 of all before

In a folder of the user's, files are named by the content of documents, tokenizer, settings and code (`stored`). Such a
file is written whole, verified whenever it is opened, and never changed; any number of processes may share the folder.
"""

import hashlib
import itertools
import json
import os
import tempfile
import warnings
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

import numpy as np
from transformers import PreTrainedTokenizerBase as Tokenizer

from moe_unlearn.data.chats import Chat
from moe_unlearn.data.corpus import Document
from moe_unlearn.data.selection import DataReport
from moe_unlearn.data.tokenize import Example, iter_examples
from moe_unlearn.files import make_folder, whole_file
from moe_unlearn.lazy import Lazy

_HEADER = 6  # numbers before the tokens of a record
_CHUNK = 1 << 16
_END = 16 + hashlib.sha256().digest_size


def stored(
    documents: Iterable[Document],
    tokenizer: Tokenizer,
    *,
    report: DataReport | None = None,
    cache: str | Path | None = None,
    **encoding: Any,
) -> Lazy[Example]:
    """Return the examples that `iter_examples` makes of all documents, read from a file when they are asked for.

    `encoding` holds further keywords of `iter_examples`; documents of which no example can be made are dropped and
    counted in the `report`. The file takes 8 bytes a token. It is a temporary one, where the environment variable
    TMPDIR says, and gone with the examples; or it stays in the folder `cache`, where it is found again by the content
    of all documents, which are then read twice, of tokenizer and encoding, and of this package's code for data. A
    damaged file there is named in a warning and made again.

    Raises ValueError as `iter_examples` does, and if documents change between the two readings, and OSError for a
    folder or a disk that cannot be written to.
    """
    report = DataReport() if report is None else report
    own = DataReport()  # of the encoding alone, which is the same wherever the documents stand
    if cache is None:
        file: IO[bytes] = tempfile.TemporaryFile()
        _write(file, iter_examples(documents, tokenizer, report=own, **encoding), own)
        return _opened(file, report)
    identity = _identity(tokenizer, encoding)
    digest = _digest(documents, identity)
    path = make_folder(cache) / f"examples-{digest[:32]}"
    if path.is_file():
        try:
            return _opened(path.open("rb"), report)
        except (OSError, ValueError) as error:
            warnings.warn(f"{path} is damaged ({error}); its examples are made again", stacklevel=2)
    seen = _Digested(documents, identity)
    with whole_file(path) as unfinished, unfinished.open("wb") as written:
        _write(written, iter_examples(seen, tokenizer, report=own, **encoding), own)
        if seen.digest != digest:
            raise ValueError(f"{report.source or 'the documents'} changed while they were read; read them again")
    return _opened(path.open("rb"), report)


class _Digested:
    """Documents whose content enters a digest while they are read."""

    def __init__(self, documents: Iterable[Document], identity: str):
        self._documents, self._identity, self.digest = documents, identity, ""

    def __iter__(self) -> Iterator[Document]:
        digest = hashlib.sha256(self._identity.encode())
        for document in self._documents:
            parts = [document.title, document.text, document.prompt, document.question, document.messages]
            alternate = document.fields.get("alternate")  # no other field is read
            digest.update(json.dumps([*parts, alternate], default=repr).encode() + b"\n")
            yield document
        self.digest = digest.hexdigest()


def _digest(documents: Iterable[Document], identity: str) -> str:
    seen = _Digested(documents, identity)
    for _ in seen:
        pass
    return seen.digest


def _identity(tokenizer: Tokenizer, encoding: dict[str, Any]) -> str:
    """Return what examples depend on beside their documents, as text."""
    code = hashlib.sha256(b"".join(path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.py"))))
    settings = {key: asdict(value) if isinstance(value, Chat) else value for key, value in encoding.items()}
    return json.dumps([code.hexdigest(), tokenizer_digest(tokenizer), settings], sort_keys=True)


def tokenizer_digest(tokenizer: Tokenizer) -> str:
    """Return the SHA-256 of vocabulary and rules, special tokens and chat template."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    content = tokenizer.get_vocab() if backend is None else backend.to_str()
    special = {k: str(v) for k, v in tokenizer.special_tokens_map.items()}
    described = json.dumps([content, special, getattr(tokenizer, "chat_template", None)], sort_keys=True, default=vars)
    return hashlib.sha256(described.encode()).hexdigest()


def _write(file: IO[bytes], examples: Iterable[Example], report: DataReport) -> None:
    """Write the file of all examples, whose `report` is complete when they have been made."""
    digest = hashlib.sha256()

    def write(part: bytes) -> int:
        digest.update(part)
        return file.write(part)

    places = array("q", [0])
    for example in examples:
        places.append(places[-1] + write(_record(example).tobytes()))
    described = write(places.tobytes()) + places[-1]
    write(json.dumps(asdict(report)).encode())
    write(np.array([places[-1], described], np.int64).tobytes())
    file.write(digest.digest())
    file.flush()


def _opened(file: IO[bytes], report: DataReport) -> Lazy[Example]:
    """Return the examples of a file, and add what was dropped and cut to the report; ValueError for other content."""
    file.seek(0)
    size = os.fstat(file.fileno()).st_size - _END
    if size < 0:
        raise ValueError("it is too short")
    digest = hashlib.sha256()
    for start in range(0, size + 16, _CHUNK):
        digest.update(file.read(min(_CHUNK, size + 16 - start)))
    if file.read() != digest.digest():
        raise ValueError("its content does not match its SHA-256")
    places, described = np.frombuffer(_read(file, size, size + 16), np.int64).tolist()
    report.add(DataReport(**json.loads(_read(file, described, size))))

    def example(i: int) -> Example:
        begin, end = np.frombuffer(_read(file, places + 8 * i, places + 8 * i + 16), np.int64).tolist()
        return _example(np.frombuffer(_read(file, begin, end), np.int32).tolist())

    return Lazy((described - places) // 8 - 1, example)


def _read(file: IO[bytes], begin: int, end: int) -> bytes:
    # not through a map of the file, whose pages would count as memory of the process; threads share no position
    return os.pread(file.fileno(), end - begin, begin)


def _record(example: Example) -> np.ndarray:
    asked, alternate = example.asked, example.alternate
    flags = [example.straddled, bool(alternate), example.continues]
    header = [len(example), example.prefix, -1 if asked is None else len(asked), *flags]
    parts = [*header, *example.input_ids, *example.labels, *(asked or ())]
    made = np.array(parts, np.int32)
    return made if alternate is None else np.concatenate([made, _record(alternate)])


def _example(record: list[int]) -> Example:
    (length, prefix, asked, straddled, alternate, continues), parts = record[:_HEADER], iter(record[_HEADER:])
    ids, labels, question = (list(itertools.islice(parts, count)) for count in (length, length, max(asked, 0)))
    return Example(
        ids,
        labels,
        prefix,
        None if asked < 0 else question,
        bool(straddled),
        _example(list(parts)) if alternate else None,
        bool(continues),
    )
