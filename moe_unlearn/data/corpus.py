"""Define documents and corpora, and keep the parts of a corpus free of shared runs of words."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from moe_unlearn.data.scripts import spaceless

RUN = 12  # a run of this many words that stands in two parts of a corpus is a leak


@dataclass(frozen=True)
class Document:
    """One piece of text.

    `title` opens the text and is trained on like the rest; metrics may prompt with it. `prompt` (a question or a
    completion prompt) precedes the text and carries no loss. A chat template asks `question` in place of `prompt`, or
    `messages`, all turns before the answer, where there are several (`conversations`). `fields` holds the fields of
    the source record (TOFU's `perturbed_answer`, RWKU's `subject`). `question`, `messages` and `fields` do not count
    when documents are compared.
    """

    title: str
    text: str
    prompt: str = ""
    question: str = field(default="", compare=False)
    fields: Mapping[str, object] = field(default_factory=dict, compare=False, repr=False)
    messages: tuple[Mapping[str, str], ...] = field(default=(), compare=False, repr=False)


@dataclass(frozen=True)
class Corpus:
    """Documents to forget, documents to keep, and unseen documents like those to forget."""

    name: str
    forget: list[Document] = field(repr=False)
    retain: list[Document] = field(repr=False)
    holdout: list[Document] = field(repr=False)


def words(document: Document) -> list[str]:
    """Return the lower-cased words of prompt, title and text; in a script without spaces each character is a word."""
    text = f"{document.prompt} {document.title} {document.text}".lower()
    if not text.isascii():
        text = "".join(f" {character} " if spaceless(character) else character for character in text)
    return text.split()


def runs(tokens: Sequence, length: int = RUN) -> set[tuple]:
    """Return all runs of `length` consecutive tokens; a shorter sequence has none."""
    return {tuple(tokens[i : i + length]) for i in range(len(tokens) - length + 1)}


def drop_shared_runs(corpus: Corpus, tokens: Callable[[Document], Sequence] = words, length: int = RUN) -> Corpus:
    """Return the corpus without the documents that share a run of `length` tokens with another part.

    All retain documents stay. A forget document is dropped if it shares a run with the retain documents, and a
    holdout document if it shares one with the retain documents or the remaining forget documents. The order is kept
    and nothing is random.
    """
    seen = _all_runs(corpus.retain, tokens, length)
    forget = [d for d in corpus.forget if seen.isdisjoint(runs(tokens(d), length))]
    seen |= _all_runs(forget, tokens, length)
    holdout = [d for d in corpus.holdout if seen.isdisjoint(runs(tokens(d), length))]
    return replace(corpus, forget=forget, holdout=holdout)


def _all_runs(documents: Iterable[Document], tokens: Callable, length: int) -> set[tuple]:
    return set().union(*(runs(tokens(d), length) for d in documents))
