"""Pages: texts, tables and drawings that are written as Markdown, and as one HTML file that loads nothing."""

from moe_unlearn.page.blocks import (
    Block,
    Code,
    Compared,
    Details,
    Figure,
    Heading,
    Items,
    OnPage,
    Paragraph,
    Table,
    grid,
)
from moe_unlearn.page.document import Document
from moe_unlearn.page.text import Inline, Span, Text, code, joined, link, mark, strong

__all__ = [
    "Block",
    "Code",
    "Compared",
    "Details",
    "Document",
    "Figure",
    "Heading",
    "Inline",
    "Items",
    "OnPage",
    "Paragraph",
    "Span",
    "Table",
    "Text",
    "code",
    "grid",
    "joined",
    "link",
    "mark",
    "strong",
]
