"""Blocks of a page, each of which says itself as Markdown and as HTML."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from moe_unlearn.page import text
from moe_unlearn.page.svg import Drawing, side_by_side
from moe_unlearn.page.text import Text

NOTHING = "–"  # a cell where there is no value
_NUMBER = re.compile(r"[+\-−]?\d")


class Block(Protocol):
    """What a page is made of."""

    def markdown(self) -> str:
        """Return the block in Markdown; "" if it stands on the page alone."""

    def html(self) -> str:
        """Return the block in HTML."""


@dataclass(frozen=True)
class Heading:
    """A heading below that of the page, of level 2 or 3."""

    text: Text
    level: int = 2

    def markdown(self) -> str:
        """Return a line of number signs and the text, unmarked."""
        return f"{'#' * self.level} {text.markdown(text.plain(self.text))}"

    def html(self) -> str:
        """Return <h2> or <h3>."""
        return f"<h{self.level}>{text.html(self.text)}</h{self.level}>"


@dataclass(frozen=True)
class Paragraph:
    """A paragraph."""

    text: Text

    def markdown(self) -> str:
        """Return the text."""
        return text.markdown(self.text, line=True)

    def html(self) -> str:
        """Return <p>."""
        return f"<p>{text.html(self.text)}</p>"


@dataclass(frozen=True)
class Items:
    """A list without numbers."""

    items: Sequence[Text]

    def markdown(self) -> str:
        """Return a line an item."""
        return "\n".join(f"* {text.markdown(item, line=True)}" for item in self.items)

    def html(self) -> str:
        """Return <ul>."""
        return f"<ul>{''.join(f'<li>{text.html(item)}</li>' for item in self.items)}</ul>"


@dataclass(frozen=True)
class Code:
    """Lines as they are in a file."""

    lines: str

    def markdown(self) -> str:
        """Return a block whose fence is longer than any inside."""
        longest = max(map(len, re.findall("`+", self.lines)), default=0)
        fence = "`" * max(3, longest + 1)
        return f"{fence}\n{text.clean(self.lines).rstrip()}\n{fence}"

    def html(self) -> str:
        """Return <pre>, which breaks long lines."""
        return f"<pre>{text.escape(self.lines.rstrip())}</pre>"


@dataclass(frozen=True)
class Table:
    """A table that can be sorted on the page by a click on a heading; columns of numbers stand to the right."""

    head: Sequence[Text]
    rows: Sequence[Sequence[Text]]

    def markdown(self) -> str:
        """Return the table of `grid`."""
        made = [[text.markdown(cell) for cell in row] for row in (self.head, *self.rows)]
        return "\n".join(grid(made[0], made[1:], markdown=True))

    def html(self) -> str:
        """Return <table>, in a box of its own that scrolls where it is too wide."""
        right = numeric([[text.plain(cell) for cell in row] for row in self.rows], len(self.head))
        kinds = [' class="n"' if own else "" for own in right]
        top = "".join(f"<th{k}>{text.html(cell)}</th>" for k, cell in zip(kinds, self.head, strict=True))
        lines = "".join(
            f"<tr>{''.join(f'<td{k}>{text.html(cell)}</td>' for k, cell in zip(kinds, row, strict=True))}</tr>"
            for row in self.rows
        )
        return f'<div class="wide"><table><thead><tr>{top}</tr></thead><tbody>{lines}</tbody></table></div>'


@dataclass(frozen=True)
class Figure:
    """Drawings with a caption; Markdown shows the file NAME.svg of a folder `figures`, and nothing without a name."""

    caption: Text
    drawings: Sequence[Drawing]
    name: str = ""

    def markdown(self) -> str:
        """Return an image and its caption."""
        shown = text.markdown(text.plain(self.caption))
        return f"![{shown}](figures/{self.name}.svg)\n\n{text.markdown(self.caption, line=True)}" if self.name else ""

    def html(self) -> str:
        """Return the drawings beside each other, as many as there is room for."""
        drawn = "".join(drawing.inline() for drawing in self.drawings)
        told = f"<figcaption>{text.html(self.caption)}</figcaption>" if self.caption else ""
        return f'<figure><div class="panels">{drawn}</div>{told}</figure>'

    def file(self) -> str:
        """Return the text of the file."""
        return side_by_side(self.drawings)


@dataclass(frozen=True)
class Compared:
    """Texts that belong to one prompt, side by side: {name: text}."""

    title: str
    prompt: str
    texts: Mapping[str, str]

    def markdown(self) -> str:
        """Return a table of one text a row."""
        rows = [("prompt", self.prompt), *self.texts.items()]
        cells = [[text.markdown(name), "<br>".join(map(text.markdown, own.splitlines()))] for name, own in rows]
        return "\n".join(grid([text.markdown(self.title), "text"], cells, markdown=True))

    def html(self) -> str:
        """Return the prompt, and below it a column a text, or a row where the screen is narrow."""
        own = "".join(
            f'<div><h4>{text.escape(name)}</h4><div class="text" dir="auto">{text.escape(told)}</div></div>'
            for name, told in self.texts.items()
        )
        asked = f'<h4>{text.escape(self.title)}</h4><div class="text" dir="auto">{text.escape(self.prompt)}</div>'
        return f'<section class="compared">{asked}<div class="columns">{own}</div></section>'


@dataclass(frozen=True)
class Details:
    """Blocks that the page shows when asked to; in Markdown they follow a heading."""

    title: str
    blocks: Sequence[Block] = field(default_factory=list)

    def markdown(self) -> str:
        """Return heading and blocks."""
        return "\n\n".join([f"## {text.markdown(self.title)}", *written(self.blocks)])

    def html(self) -> str:
        """Return <details>."""
        inside = "".join(block.html() for block in self.blocks)
        return f"<details><summary>{text.escape(self.title)}</summary>{inside}</details>"


@dataclass(frozen=True)
class OnPage:
    """Blocks that stand on the page alone, such as a heading of drawings that have no file."""

    blocks: Sequence[Block]

    def markdown(self) -> str:
        """Return nothing."""
        return ""

    def html(self) -> str:
        """Return the blocks."""
        return "\n".join(block.html() for block in self.blocks)


def written(blocks: Sequence[Block]) -> Iterator[str]:
    """Yield the blocks in Markdown, but for those that stand on the page alone."""
    return filter(None, (block.markdown() for block in blocks))


def grid(head: Sequence[str], rows: Sequence[Sequence[str]], *, markdown: bool = False) -> list[str]:
    """Return the lines of a table in columns of one width, numbers to the right, as text or in Markdown."""
    right = numeric(rows, len(head))
    lines = [head, *rows]
    widths = [max(3, *(len(row[i]) for row in lines)) for i in range(len(head))]
    padded = [
        [cell.rjust(w) if to else cell.ljust(w) for cell, w, to in zip(row, widths, right, strict=True)]
        for row in lines
    ]
    if not markdown:
        return ["  ".join(row).rstrip() for row in padded]
    rule = ["-" * (w - to) + ":" * to for w, to in zip(widths, right, strict=True)]
    return [f"| {' | '.join(row)} |" for row in (padded[0], rule, *padded[1:])]


def numeric(rows: Sequence[Sequence[str]], columns: int) -> list[bool]:
    """Return for each column whether all of its cells begin with a number, or have no value."""
    return [bool(rows) and all(row[i] == NOTHING or _NUMBER.match(row[i]) for row in rows) for i in range(columns)]
