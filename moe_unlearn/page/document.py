"""A whole page: its title and its blocks, as Markdown with drawings in files, or as one HTML file."""

import base64
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from moe_unlearn.page import text
from moe_unlearn.page.blocks import Block, Details, Figure, OnPage, written
from moe_unlearn.page.style import COLOURS, DRAWING, PAGE, SCRIPT
from moe_unlearn.page.text import Text


@dataclass(frozen=True)
class Document:
    """A page with a title."""

    title: Text
    blocks: Sequence[Block]

    def markdown(self) -> str:
        """Return the page in Markdown; its figures are files of the folder `figures` beside it."""
        return "\n\n".join([f"# {text.markdown(text.plain(self.title))}", *written(self.blocks)]) + "\n"

    def html(self) -> str:
        """Return the page in HTML: one file that loads nothing, for light and dark screens and for paper.

        Its policy lets no script run but its own, whatever a text says.
        """
        digest = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
        policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; base-uri 'none'"
        head = [
            '<meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{text.escape(text.plain(self.title))}</title>",
            f"<style>{COLOURS}{DRAWING}{PAGE}</style>",
            f"<script>{SCRIPT}</script>",
        ]
        body = "\n".join([f"<h1>{text.html(self.title)}</h1>", *(block.html() for block in self.blocks)])
        top = "\n".join(head)
        return f'<!doctype html>\n<html lang="en"><head>{top}</head>\n<body>\n{body}\n</body></html>\n'

    def figures(self) -> dict[str, str]:
        """Return the files that the Markdown shows: name -> text."""
        return {f"{own.name}.svg": own.file() for own in _figures(self.blocks) if own.name}


def _figures(blocks: Sequence[Block]) -> Iterator[Figure]:
    for block in blocks:
        if isinstance(block, Figure):
            yield block
        elif isinstance(block, Details | OnPage):
            yield from _figures(block.blocks)
