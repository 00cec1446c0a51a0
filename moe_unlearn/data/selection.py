"""Which documents stay, and the account of those that do not."""

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field

from moe_unlearn.data.corpus import Document, runs, words

EXAMPLES = 3  # places named for each reason


@dataclass
class DataReport:
    """What was read, and what was dropped or cut and why.

    `dropped` counts documents by reason: "empty", "too short", "duplicate", "overlaps with the forget set",
    "of another subject", "without such an answer" (a record of PKU-SafeRLHF whose responses are all of the other kind),
    "prompt leaves no room", "shorter than prompt_tokens", "spells a special token". `places` names the first three of
    each. `truncated` counts documents whose end, or their alternate's, did not fit and is in no example. `rows` is how
    many examples a run takes of all those that the documents gave. `straddled` counts answers whose first token began
    in their prompt.
    `special_tokens` are those that were added, of `special.Added`.
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
        """Count a document that goes."""
        self.dropped[reason] = self.dropped.get(reason, 0) + 1
        places = self.places.setdefault(reason, [])
        if len(places) < EXAMPLES:
            places.append(where)

    def restart(self, source: str) -> None:
        """Forget what was counted: `source` is read from its beginning."""
        self.source, self.read, self.kept, self.truncated, self.straddled = source, 0, 0, 0, 0
        self.dropped.clear()
        self.places.clear()

    def to_dict(self) -> dict:
        """As JSON has it."""
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
    """The documents that stay, with their places and in their order; each that goes is counted in `report`.

    Always without the empty ones. `min_words` counts words of prompt, title and text. `deduplicate` keeps the
    first of those with the same words. `subject` keeps records whose `subject` or `target` it is. A document
    overlaps with `exclude` if it shares a run of 12 words with one of these, or all of its words.
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
    """16 bytes of the words: a corpus larger than memory still has its duplicates found."""
    return hashlib.blake2b(" ".join(words(document)).encode(), digest_size=16).digest()
