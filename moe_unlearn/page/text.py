"""Text as Markdown and as HTML: a string is plain and is escaped in both; what is more than plain is a `Span`.

So the texts of documents, names of models and paths, which others have written, can say nothing in either language.
"""

import html as _html
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

# what XML has no character for, halves of a pair, which UTF-8 has no bytes for, and the two overrides of direction,
# which would turn round the numbers and words that follow in the line
_UNWRITABLE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\u202d\u202e\ud800-\udfff\ufffe\uffff]")
_SPECIAL = re.compile(r"([\\`*\[\]<|~]|(?<!\w)_|_(?!\w)|&(?=[\w#]))")
_BEGINS = re.compile(r"^(\s*)([#>+=-]|\d+[.)](?=\s))")  # a heading, a quotation, a list


@dataclass(frozen=True)
class Span:
    """A piece of text that is strong, code, a link to `target`, or a word that is marked in the colour of its class."""

    text: str
    kind: Literal["strong", "code", "link", "mark"]
    target: str = ""


Inline = str | Span
Text = Inline | Sequence[Inline]


def strong(text: str) -> Span:
    """Return bold text."""
    return Span(text, "strong")


def code(text: str) -> Span:
    """Return text as it is typed."""
    return Span(text, "code")


def link(text: str, target: str) -> Span:
    """Return a link to a file beside the page."""
    return Span(text, "link", target)


def mark(word: str) -> Span:
    """Return a verdict: bold, and on the page in the colour of its class, which is the word itself."""
    return Span(word, "mark")


def joined(parts: Iterable[Text], between: str) -> list[Inline]:
    """Return texts as one, with the string `between` them."""
    found: list[Inline] = []
    for part in parts:
        found += [between] if found else []
        found += _pieces(part)
    return found


def plain(text: Text) -> str:
    """Return what a text says, without marks."""
    return "".join(clean(piece if isinstance(piece, str) else piece.text) for piece in _pieces(text))


def clean(text: str) -> str:
    """Return a text whose characters can all be written; others are replaced."""
    return _UNWRITABLE.sub("\ufffd", text)


def markdown(text: Text, *, line: bool = False) -> str:
    """Return a text as one line of Markdown; `line` says that it begins one, where more signs have a meaning."""
    made = " ".join("".join(map(_markdown, _pieces(text))).splitlines())
    first = next(iter(_pieces(text)), "")
    return _BEGINS.sub(_unbegun, made) if line and isinstance(first, str) else made


def html(text: Text) -> str:
    """Return a text in HTML."""
    return "".join(map(_html_of, _pieces(text)))


def escape(text: str) -> str:
    """Return plain text in HTML."""
    return _html.escape(clean(text))


def _pieces(text: Text) -> Sequence[Inline]:
    return [text] if isinstance(text, str | Span) else text


def _unbegun(found: re.Match) -> str:
    return f"{found[1]}{found[2][:-1]}\\{found[2][-1]}"


def _markdown(piece: Inline) -> str:
    if isinstance(piece, str):
        return _SPECIAL.sub(r"\\\1", clean(piece))
    if piece.kind == "code":
        text = " ".join(clean(piece.text).replace("|", "\\|").split("\n"))
        fence = "`" * (1 + max((len(run) for run in re.findall("`+", text)), default=0))
        return f"{fence} {text} {fence}" if "`" in text else f"`{text}`"
    inside = _markdown(piece.text)
    return f"[{inside}]({piece.target})" if piece.kind == "link" else f"**{inside}**"


def _html_of(piece: Inline) -> str:
    if isinstance(piece, str):
        return escape(piece)
    inside = escape(piece.text)
    if piece.kind == "link":
        return f'<a href="{escape(piece.target)}">{inside}</a>'
    if piece.kind == "mark":
        return f'<span class="mark {escape(piece.text.replace(" ", "-"))}">{inside}</span>'
    return f"<{piece.kind}>{inside}</{piece.kind}>"
