"""Select the documents that stay, and count those that are dropped."""

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field

from moe_unlearn.data.corpus import Document, runs, words

EXAMPLES = 3  # how many places are named for each reason


@dataclass
class DataReport:
    """Counts of the documents that were read, dropped or cut, and the reasons.

    `dropped` counts documents by reason: "empty", "too short", "duplicate", "overlaps with the forget set", "of
    another subject", "without such an answer" (a record of PKU-SafeRLHF whose responses are all of the other kind),
    "prompt leaves no room", "shorter than prompt_tokens", "spells a special token", "its alternate spells a special
    token". `places` names the first three of
    each. `truncated` counts documents whose end, or whose alternate's end, did not fit and is in no example. `rows`
    is how many of the documents' examples a run takes. `straddled` counts answers whose first token began in their
    prompt. `special_tokens` names the tokens that were added (`special.Added`).
    """

    source: str = ""
    read: int = 0
    kept: int = 0
    truncated: int = 0
    straddled: int = 0
    rows: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    places: dict[str, list[str]] = field(default_factory=dict)
    special_tokens: dict[str, list[str]] = field(default_factory=dict)

    def drop(self, reason: str, where: str) -> None:
        """Count a document that is dropped."""
        self.dropped[reason] = self.dropped.get(reason, 0) + 1
        places = self.places.setdefault(reason, [])
        if len(places) < EXAMPLES:
            places.append(where)

    def restart(self, source: str) -> None:
        """Reset the counts because `source` is read again from its beginning."""
        self.source, self.read, self.kept, self.truncated, self.straddled = source, 0, 0, 0, 0
        self.dropped.clear()
        self.places.clear()

    def add(self, other: "DataReport") -> None:
        """Add the counts of another report, of the same documents later on, and take its special tokens."""
        for reason, count in other.dropped.items():
            self.dropped[reason] = self.dropped.get(reason, 0) + count
            places = self.places.setdefault(reason, [])
            places += other.places[reason][: EXAMPLES - len(places)]
        self.kept += other.kept
        self.truncated += other.truncated
        self.straddled += other.straddled
        self.special_tokens = other.special_tokens

    def to_dict(self) -> dict:
        """Return the report as a dictionary for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        lines = [f"{self.source}: {self.kept} of {self.read} documents kept"]
        for reason, count in sorted(self.dropped.items(), key=lambda item: -item[1]):
            more = ", ..." if count > len(self.places[reason]) else ""
            lines.append(f"  {count} dropped, {reason}: {', '.join(self.places[reason])}{more}")
        if self.truncated:
            lines.append(f"  {self.truncated} cut: their end does not fit")
        if self.straddled:
            lines.append(f"  {self.straddled} with a token on both sides of prompt and answer: it is the answer's")
        return "\n".join(lines)


def select(
    located: Iterable[tuple[Document, str]],
    report: DataReport,
    *,
    min_words: int = 0,
    deduplicate: bool = False,
    subject: str | None = None,
    exclude: Iterable[Document] = (),
) -> Iterator[tuple[Document, str]]:
    """Yield the documents that stay, with their places and in their order, and count the others in `report`.

    Empty documents are always dropped. `min_words` counts words of prompt, title and text. `deduplicate` keeps the
    first of the documents with the same words. `subject` keeps records whose `subject` or `target` equals it. A
    document overlaps with `exclude` if it shares with one of these a run of 12 words, or all of its words.
    """
    excluded_runs, excluded = set(), set()
    for document in exclude:
        excluded_runs |= runs(words(document))
        excluded.add(_digest(document))
    seen: set[bytes] = set()
    for document, where in located:
        report.read += 1
        digest = _digest(document) if deduplicate or excluded else b""
        if not document.text.strip():
            report.drop("empty", where)
        elif subject is not None and subject not in (document.fields.get("subject"), document.fields.get("target")):
            report.drop("of another subject", where)
        elif min_words and len(words(document)) < min_words:
            report.drop("too short", where)
        elif deduplicate and digest in seen:
            report.drop("duplicate", where)
        elif digest in excluded or (excluded_runs and not excluded_runs.isdisjoint(runs(words(document)))):
            report.drop("overlaps with the forget set", where)
        else:
            seen.add(digest)
            report.kept += 1
            yield document, where


def _digest(document: Document) -> bytes:
    """Return a digest of the words, 16 bytes, so that duplicates are found even in a corpus larger than memory."""
    return hashlib.blake2b(" ".join(words(document)).encode(), digest_size=16).digest()
