"""Load documents from every kind of source through one function, `load`."""

import itertools
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from moe_unlearn.data import files, hub
from moe_unlearn.data.builtin import load_builtin
from moe_unlearn.data.corpus import Document
from moe_unlearn.data.records import ANSWERS, SIDE_ANSWERS, documents_of
from moe_unlearn.data.selection import DataReport, select

SIDES = ("forget", "retain", "holdout")


@dataclass(frozen=True)
class Benchmark:
    """A published data set.

    `hub` is its name on the hub, `sides` says which part ("config/split") serves as which side, and `local` names the
    files of local copies that are called otherwise.
    """

    hub: str
    sides: dict[str, str]
    local: dict[str, tuple[str, ...]] = field(default_factory=dict)
    note: str = ""

    def files(self, side: str | None) -> list[str]:
        """Return the names, without suffix, that the side's file may have in a folder."""
        part = [self.sides[side], self.sides[side].partition("/")[0]] if side and side in self.sides else []
        return [*(self.local.get(side, ()) if side else ()), *part]


_MUSE = {"forget": "raw/forget", "retain": "raw/retain1", "holdout": "raw/holdout"}
BENCHMARKS = {
    "muse-books": Benchmark("muse-bench/MUSE-Books", _MUSE),
    "muse-news": Benchmark("muse-bench/MUSE-News", _MUSE),
    "tofu": Benchmark("locuslab/TOFU", {"forget": "forget10/train", "retain": "retain90/train"}),
    "wmdp-bio": Benchmark(
        "cais/wmdp-corpora",
        {"retain": "bio-retain-corpus/train"},
        {"forget": ("bio_remove_dataset", "bio-forget-corpus")},
        "the bio forget corpus is given out on request: name its file, bio_remove_dataset.jsonl",
    ),
    "wmdp-cyber": Benchmark(
        "cais/wmdp-corpora", {"forget": "cyber-forget-corpus/train", "retain": "cyber-retain-corpus/train"}
    ),
    "pku-saferlhf": Benchmark(
        "PKU-Alignment/PKU-SafeRLHF",
        {"forget": "default/train", "retain": "default/train", "holdout": "default/test"},
    ),
    "rwku": Benchmark(
        "jinzhuoran/RWKU",
        {"forget": "train_positive_llama3/train"},
        {"forget": ("positive",)},
        "RWKU comes without a retain corpus",
    ),
}
_FORMATS = (*files.SUFFIXES, ".parquet")
_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options that a source string may carry behind its `?`; `load` describes them."""

    answers: str | None = None
    subject: str | None = None
    abstract: bool = False
    lines_as_text: bool = False
    join: bool = False
    encoding: str = "utf-8"
    max_bytes: int = 0
    min_words: int = 0
    deduplicate: bool = False

    def __post_init__(self) -> None:
        if self.answers is not None and self.answers not in ANSWERS:
            raise ValueError(f"expected answers to be one of {', '.join(ANSWERS)}; got {self.answers!r}")
        for name in ("min_words", "max_bytes"):
            if getattr(self, name) < 0:
                raise ValueError(f"expected {name} of at least 0; got {getattr(self, name)}")


def load(
    source: str | Path,
    split: str | None = None,
    *,
    side: str | None = None,
    streaming: bool = False,
    exclude: Iterable[Document] = (),
    report: DataReport | None = None,
    **options: Any,
) -> "list[Document] | DocumentStream":
    """Return the documents of a source in its order, none of them empty.

    `source` is `builtin:NAME`; a file (.jsonl, .json, .txt, also .gz or .xz; .parquet); a folder; or the name of a
    benchmark (`BENCHMARKS`) or of a hub data set. `split` chooses a part of the last three: "config/split", or one of
    the two where that is clear, or for a folder the file without its suffix ("raw/forget"). A+B reads both parts, one
    after the other. A builtin corpus takes a side as its split. `side` ("forget", "retain", "holdout") chooses the
    answers, and the part where `split` does not. The string may say all that by itself, for recipes and the command
    line:

        NAME_OR_PATH[:SPLIT[+SPLIT ...]][?OPTION=VALUE[&OPTION=VALUE ...]]      tofu:forget05      books/?join=true

    Options:
        answers: "unsafe" (or "rejected") or "safe" (or "chosen"), for records with two answers; the default follows
            `side` (forget and holdout: unsafe)
        subject: keep only records whose `subject` or `target` is this (a person of RWKU)
        abstract: put `title` and `abstract` before `text` (WMDP's bio corpus)
        lines_as_text: take each line of a .jsonl as text, braces and all, as open-unlearning trains on WMDP
        join: make one document of all texts, a blank line between them, which `encode` cuts into rows of max_length
            (a book; open-unlearning's pretraining sets). Records with prompts stay as they are
        encoding: "utf-8", "latin-1" or "cp1252", for files
        max_bytes: what a file may hold, unpacked; default: any number, of a compressed one 100 times its size or 1 MiB
        min_words, deduplicate: see `select`, which also describes `exclude`, the documents of the forget set

    `streaming` gives a `DocumentStream` that holds one record at a time (but a whole .json list, of 64 MiB at most).
    Records above 64 MiB are refused. `report` counts what was read and dropped; a stream fills it while it is read.

    Raises OSError for a source that is not there, MissingLibraryError (an ImportError) where `datasets` is needed,
    and ValueError for everything else, naming the place and what was expected, also if no document is left.
    """
    stream = located(source, split, side=side, exclude=exclude, report=report, **options)
    if not streaming:
        return list(stream)
    if stream.options.join:
        raise ValueError("join holds all of a corpus in memory: expected join=False with streaming")
    return replace(stream, limit=files.RECORD_BYTES)


def located(
    source: str | Path,
    split: str | None = None,
    *,
    side: str | None = None,
    exclude: Iterable[Document] = (),
    report: DataReport | None = None,
    **options: Any,
) -> "DocumentStream":
    """Return what `load` would read, to be read one document at a time; records may have any size, and be joined.

    A recipe's side `unseen` is the part of a source that serves as `holdout`, texts that the model never saw.
    """
    side = "holdout" if side == "unseen" else side
    if side is not None and side not in SIDES:
        raise ValueError(f"expected side {', '.join(SIDES)}; got {side!r}")
    name, split, chosen = _parsed(str(source), split, options)
    return DocumentStream(name, split, side, chosen, list(exclude), DataReport() if report is None else report, None)


@dataclass(frozen=True)
class DocumentStream:
    """Documents that are read anew, one at a time, at each iteration; `load` makes it.

    `limit` is the size in bytes of the longest allowed .json list. None allows any, and `datasets` may then use its
    cache on disk.
    """

    name: str
    split: str | None
    side: str | None
    options: Options
    exclude: list[Document] = field(repr=False)
    report: DataReport = field(repr=False)
    limit: int | None

    def __iter__(self) -> Iterator[Document]:
        options, report = self.options, self.report
        report.restart(self.name if self.split is None else f"{self.name}:{self.split}")
        kept = select(
            self._located(),
            report,
            min_words=options.min_words,
            deduplicate=options.deduplicate,
            subject=options.subject,
            exclude=self.exclude,
        )
        yield from _joined(kept) if options.join else (document for document, _ in kept)
        if not report.kept:
            why = ", ".join(f"{count} {reason}" for reason, count in report.dropped.items()) or "there are none"
            raise ValueError(f"{report.source}: expected at least one document; {why}")

    def _located(self) -> Iterator[tuple[Document, str]]:
        """Yield the documents with their places, as they stand in the source."""
        if self.name.startswith("builtin:"):
            documents = getattr(load_builtin(self.name), _builtin_part(self.name, self.split, self.side))
            yield from ((document, f"{self.name}, document {number}") for number, document in enumerate(documents, 1))
            return
        answers = self.options.answers or (SIDE_ANSWERS.get(self.side) if self.side else None)
        for record, where in _records(self.name, self.split, self.side, self.options, self.limit):
            documents = list(documents_of(record, where, answers=answers, abstract=self.options.abstract))
            if not documents:
                self.report.read += 1
                self.report.drop("without such an answer", where)
            yield from ((document, where) for document in documents)


def _parsed(source: str, split: str | None, options: dict) -> tuple[str, str | None, Options]:
    """Return name, split and options of a source string; an existing file or folder is taken as a name in full."""
    name, query = source, ""
    if not _path(source).exists():
        name, _, query = source.partition("?")
    texts: dict[str, Any] = dict(_option(item, source) for item in query.split("&") if item)
    if double := texts.keys() & options.keys():
        raise ValueError(f"{source!r}: option {', '.join(sorted(double))} is given twice")
    if not name.startswith("builtin:") and not _path(name).exists():
        name, colon, part = name.rpartition(":") if ":" in name else (name, "", "")
        if colon and split is not None:
            raise ValueError(f"{source!r} names the split {part!r} and split={split!r} is given too")
        split = part if colon else split
    unknown = [key for key in options if key not in _OPTIONS]
    if unknown:
        raise TypeError(f"load() got an unexpected option {unknown[0]!r}; options: {', '.join(_OPTIONS)}")
    return name, split, Options(**texts, **options)


def _path(name: str) -> Path:
    """Return a path, in which ~ and ~user are home folders; ValueError for a user that is not known."""
    try:
        return Path(name).expanduser()
    except RuntimeError:
        raise ValueError(f"{name!r}: no home folder of {name.partition('/')[0]} is known") from None


_OPTIONS = {f.name: f.type for f in fields(Options)}


def _option(item: str, source: str) -> tuple[str, str | bool | int]:
    key, _, value = item.partition("=")
    if key not in _OPTIONS:
        raise ValueError(f"{source!r}: unknown option {key!r}; expected one of {', '.join(_OPTIONS)}")
    if _OPTIONS[key] is bool:
        if value not in ("true", "false"):
            raise ValueError(f"{source!r}: expected {key}=true or {key}=false; got {value!r}")
        return key, value == "true"
    if _OPTIONS[key] is int:
        if not value.isdecimal():
            raise ValueError(f"{source!r}: expected {key} to be a number; got {value!r}")
        return key, int(value)
    return key, value


def _builtin_part(name: str, split: str | None, side: str | None) -> str:
    part = split or side
    if part not in SIDES:
        raise ValueError(f"{name}: expected a split or side, one of {', '.join(SIDES)}; got {part!r}")
    return part


def _records(name: str, split: str | None, side: str | None, options: Options, limit: int | None) -> Iterator:
    path = _path(name)
    if path.is_dir():
        found = _folder_files(path, split, side)
        if not found:
            yield from hub.records(str(path), split, streaming=limit is not None)
        for file in found:
            _check_within(path, file)
            yield from _file_records(file, options, limit)
    elif path.is_file() or _is_file_name(path):
        if split is not None:
            raise ValueError(f"{path}: a file has no splits; got split {split!r}")
        yield from _file_records(path, options, limit)
    elif name in BENCHMARKS:
        known = BENCHMARKS[name]
        if split is None and side not in known.sides:
            given = f"no part of {name} serves as {side}" if side else "expected a split or a side"
            raise ValueError("; ".join(filter(None, (f"{name}: {given}", known.note))))
        yield from hub.records(known.hub, split or known.sides[str(side)], streaming=limit is not None)
    elif _HUB_NAME.fullmatch(name):
        yield from hub.records(name, split, streaming=limit is not None)
    else:
        raise FileNotFoundError(
            f"{name!r}: no such file or folder; expected a path, builtin:NAME, a hub name OWNER/NAME, or one of "
            f"{', '.join(BENCHMARKS)}"
        )


def _check_within(folder: Path, file: Path) -> None:
    """Raise ValueError for a file that leads out of its folder, as a link may; the hub's cache links within itself."""
    own = folder.resolve()
    if not file.resolve().is_relative_to(own.parents[1] if own.parent.name == "snapshots" else own):
        raise ValueError(f"{folder}: expected files within it; {file.name} is a link out of it: name {file} itself")


def _file_records(path: Path, options: Options, limit: int | None) -> Iterator[tuple[object, str]]:
    if files.file_format(path) == ".parquet":
        return hub.parquet_records(path, streaming=limit is not None)
    return files.records(
        path,
        encoding=options.encoding,
        lines_as_text=options.lines_as_text,
        limit=limit,
        max_bytes=options.max_bytes,
    )


def _folder_files(folder: Path, split: str | None, side: str | None) -> list[Path]:
    """Return the files of a folder to read, or none if `datasets` should read the folder.

    `split` is one file's name without suffix, or several joined by +. Without it, the one file that serves as `side`
    in a known layout is read; if there is none, all files of the folder in the order of their names, unless it is in
    hub layout.
    """
    if split is not None:
        parts = split.split("+")
        for part in map(Path, parts):
            if part.is_absolute() or ".." in part.parts:
                raise ValueError(f"{folder}: expected a split within the folder; got {split!r}")
        own = {part: _file_of(folder, part) for part in parts}
        if any(own.values()):
            split = next((part for part, files in own.items() if not files), split)
    else:
        names = dict.fromkeys(name for known in BENCHMARKS.values() for name in known.files(side))
        own = {name: files for name in names if (files := _file_of(folder, name))}
        if len(own) > 1:
            raise ValueError(
                f"{folder}: several files serve as {side}: {', '.join(own)}; name one, or all: {folder}:{'+'.join(own)}"
            )
    found = [file for files in own.values() for file in files] if all(own.values()) else []
    if found or _in_hub_layout(folder):
        return found
    every = sorted(p for p in folder.iterdir() if _is_file_name(p) and p.is_file())
    if split is None and every:
        return every
    there = ", ".join(sorted(str(p.relative_to(folder)) for p in _within(folder) if _is_file_name(p))[:20])
    raise FileNotFoundError(
        f"{folder}: expected a file {split or 'of documents'} ({', '.join(_FORMATS)}); the folder has {there or 'none'}"
    )


def _in_hub_layout(folder: Path) -> bool:
    """Return whether `datasets` can read the folder, because of its README or because it holds parquet files."""
    readme = folder / "README.md"
    described = readme.is_file() and b"data_files:" in readme.read_bytes()
    return described or any(path.suffix == ".parquet" for path in _within(folder))


def _within(folder: Path) -> Iterator[Path]:
    """Yield what stands in a folder and in its folders, no deeper, because the folder may be a whole disk."""
    return itertools.chain(folder.glob("*"), folder.glob("*/*"))


def _file_of(folder: Path, name: str) -> list[Path]:
    """Return the file `name` with the first suffix that exists, as a list of one, or an empty list."""
    suffixes = [format + packed for format in _FORMATS for packed in ("", *files.OPENERS)]
    return [path for suffix in suffixes if (path := folder / f"{name}{suffix}").is_file()][:1]


def _is_file_name(path: Path) -> bool:
    return files.file_format(path) in _FORMATS


def _joined(kept: Iterable[tuple[Document, str]]) -> Iterator[Document]:
    """Yield one document of all texts of a file or split; documents with a prompt stay as they are."""
    # a place reads "FILE, line 3" or "NAME, row 3"
    for _, group in itertools.groupby(kept, key=lambda pair: pair[1].rpartition(", ")[0]):
        texts = []
        for document, _ in group:
            if document.prompt:
                yield document
            else:
                texts.append(f"{document.title}\n{document.text}" if document.title else document.text)
        if texts:
            yield Document("", "\n\n".join(texts))
