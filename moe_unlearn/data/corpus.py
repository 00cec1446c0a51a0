"""What a corpus is, and the rule that its parts share no run of tokens."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from moe_unlearn.data.scripts import spaceless

RUN = 12  # a run this long in two parts of a corpus is a leak


@dataclass(frozen=True)
class Document:
    """One piece of text.

    `title` opens the text and is trained on like the rest; metrics may prompt with it. `prompt` (a question,
    a completion prompt) precedes the text and carries no loss. `question` is what a chat template asks in place
    of `prompt`, `messages` all turns before the answer where there are several (`conversations`); `fields` are those of
    the record it was read from (TOFU's `perturbed_answer`, RWKU's `subject`). None of these counts when documents are
    compared.
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
    """Lower-cased words between white space of prompt, title and text; characters where a script writes no spaces."""
    text = f"{document.prompt} {document.title} {document.text}".lower()
    if not text.isascii():
        text = "".join(f" {character} " if spaceless(character) else character for character in text)
    return text.split()


def runs(tokens: Sequence, length: int = RUN) -> set[tuple]:
    """All runs of `length` consecutive tokens; a shorter sequence has none."""
    return {tuple(tokens[i : i + length]) for i in range(len(tokens) - length + 1)}


def drop_shared_runs(corpus: Corpus, tokens: Callable[[Document], Sequence] = words, length: int = RUN) -> Corpus:
    """The corpus without the documents that share a run of `length` tokens with another part.

    Retain documents all stay, a forget document goes if retain has one of its runs, a holdout document if
    retain or the forget documents that stay have. The order is kept and nothing is random.
    """
    seen = _all_runs(corpus.retain, tokens, length)
    forget = [d for d in corpus.forget if seen.isdisjoint(runs(tokens(d), length))]
    seen |= _all_runs(forget, tokens, length)
    holdout = [d for d in corpus.holdout if seen.isdisjoint(runs(tokens(d), length))]
    return replace(corpus, forget=forget, holdout=holdout)


def _all_runs(documents: Iterable[Document], tokens: Callable, length: int) -> set[tuple]:
    return set().union(*(runs(tokens(d), length) for d in documents))
