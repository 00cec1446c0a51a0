"""Load corpora that need no download: CPython's own help topics, and two dictionaries packaged by Debian.

This repository holds none of these texts; they are read where they are installed.
"""

import gzip
import re
import string
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

from moe_unlearn.data.corpus import Corpus, Document, drop_shared_runs

PYDOC_FORGET = ("debugger", "formatstrings", "string-methods", "strings", "typesmapping", "typesseq")
PYDOC_RETAIN = (
    "assignment",
    "async",
    "atom-identifiers",
    "attribute-access",
    "binary",
    "calls",
    "class",
    "comparisons",
    "compound",
    "customization",
    "del",
    "exceptions",
    "execmodel",
    "exprlists",
    "function",
    "global",
    "import",
    "lambda",
    "naming",
    "nonlocal",
    "numeric-types",
    "objects",
    "operator-summary",
    "raise",
    "return",
    "sequence-types",
    "shifting",
    "slicings",
    "subscriptions",
    "try",
    "types",
    "unary",
    "with",
    "yield",
)
DICTIONARIES = Path("/usr/share/dictd")
BLOCK_CHARACTERS = 150  # paragraphs are joined until a block is at least this long
SHORTEST = 80  # blocks and entries shorter than this are left out
HOLDOUT_EVERY = 3  # every third block of the forget subjects is never trained on
RULE = r"[-=*~^+]{4,}"  # drawn lines under headings and in tables
BASE64 = {c: i for i, c in enumerate(string.ascii_uppercase + string.ascii_lowercase + string.digits + "+/")}


def load_builtin(name: str) -> Corpus:
    """Return the corpus of a name such as `builtin:pydoc`, `builtin:devil` or `builtin:devil+pydoc`.

    Two names joined by `+` forget the first corpus and retain the second. Forget, retain and holdout share no run of
    12 words. Raises ValueError for another name, and FileNotFoundError naming the packages to install when the
    dictionaries are missing.
    """
    loaders = {"pydoc": pydoc, "devil": devil}
    sources = name.removeprefix("builtin:").split("+")
    if not name.startswith("builtin:") or len(sources) > 2 or not loaders.keys() >= set(sources):
        known = ", ".join(f"builtin:{source}" for source in sorted(loaders))
        raise ValueError(f"unknown corpus {name!r}; expected one of {known}, or two of them as builtin:devil+pydoc")
    first, *others = (loaders[source]() for source in sources)
    return drop_shared_runs(replace(first, name=name, retain=others[0].retain)) if others else first


def pydoc() -> Corpus:
    """Return Python's help topics as a corpus that forgets strings, formatting, containers and the debugger.

    A paragraph of several topics is kept once: in the first retain topic that has it, else in the first
    forget topic.
    """
    from pydoc_data.topics import topics

    seen: set[str] = set()
    retain = paragraph_blocks(topics, PYDOC_RETAIN, seen)
    forget, holdout = _split_holdout(paragraph_blocks(topics, PYDOC_FORGET, seen))
    return drop_shared_runs(Corpus("builtin:pydoc", forget, retain, holdout))


def devil(folder: Path = DICTIONARIES) -> Corpus:
    """Return a corpus that forgets The Devil's Dictionary and retains the Jargon File, both in the public domain.

    An entry is a document.
    """
    files = [folder / f"{name}.{ending}" for name in ("devil", "jargon") for ending in ("index", "dict.dz")]
    if missing := [str(f) for f in files if not f.is_file()]:
        raise FileNotFoundError(
            f"builtin:devil reads the dictionaries of two Debian packages; {', '.join(missing)} not found. "
            "Install them with: apt-get install dict-devil dict-jargon (or use builtin:pydoc)"
        )
    forget, holdout = _split_holdout(read_dictd(folder / "devil"))
    return drop_shared_runs(Corpus("builtin:devil", forget, read_dictd(folder / "jargon"), holdout))


def read_dictd(path: Path) -> list[Document]:
    """Return the entries of the dictd dictionary `path`.dict.dz with its `path`.index, in the order of the text.

    An index line is `headword TAB offset TAB length`, both numbers in base 64. Headwords that point at the same text
    make one entry. The dictionary's description of itself (`00database...`) is left out.
    """
    text = gzip.decompress(path.with_name(path.name + ".dict.dz").read_bytes())
    entries: dict[tuple[int, int], str] = {}
    index = path.with_name(path.name + ".index")
    for number, line in enumerate(index.read_text("utf-8").splitlines(), 1):
        try:
            headword, offset, length = line.split("\t")
            span = (_base64_number(offset), _base64_number(length))
        except (ValueError, KeyError):
            raise ValueError(
                f"{index}, line {number}: expected headword, offset and length in base 64; got {line!r}"
            ) from None
        if sum(span) > len(text):
            raise ValueError(f"{index}, line {number}: the entry ends at byte {sum(span)} of {len(text)}")
        if not headword.startswith(("00database", "00-database")):
            entries.setdefault(span, headword)
    documents = []
    for (start, size), headword in sorted(entries.items()):
        body = _one_line(text[start : start + size].decode("utf-8"))
        if body.lower().startswith(headword.lower()):
            body = body[len(headword) :].lstrip(" ,")
        if len(body) >= SHORTEST:
            documents.append(Document(headword, body))
    return documents


def _base64_number(digits: str) -> int:
    value = 0
    for digit in digits:
        value = value * 64 + BASE64[digit]
    return value


def paragraph_blocks(topics: Mapping[str, str], names: Iterable[str], seen: set[str]) -> list[Document]:
    """Return the paragraphs not in `seen`, joined into blocks numbered within their topic, and add them to `seen`."""
    documents = []
    for name in names:
        blocks, block = [], ""
        for paragraph in map(_one_line, re.split(r"\n\s*\n", topics.get(name, ""))):
            if not paragraph or paragraph in seen:
                continue
            seen.add(paragraph)
            block = f"{block}\n{paragraph}" if block else paragraph
            if len(block) >= BLOCK_CHARACTERS:
                blocks.append(block)
                block = ""
        if len(block) >= SHORTEST:
            blocks.append(block)
        documents += [Document(f"{name} {i}", text) for i, text in enumerate(blocks, 1)]
    return documents


def _split_holdout(documents: list[Document]) -> tuple[list[Document], list[Document]]:
    trained = [d for i, d in enumerate(documents) if i % HOLDOUT_EVERY != HOLDOUT_EVERY - 1]
    return trained, documents[HOLDOUT_EVERY - 1 :: HOLDOUT_EVERY]


def _one_line(text: str) -> str:
    return " ".join(re.sub(RULE, " ", text).split())
