"""A table as text that is no wider than a terminal."""

import itertools
import shutil
import textwrap
from collections.abc import Iterator, Sequence

from moe_unlearn.page.blocks import grid

WIDTH = 100  # characters of a line where there is no terminal
_GAP = 2  # characters between two columns of a grid


def fitted(head: Sequence[str], rows: Sequence[Sequence[str]], *, keys: int = 1, width: int | None = None) -> list[str]:
    """Return the lines of a table, none wider than `width`, by default the terminal's, or WIDTH where there is none.

    A table that is too wide, and whose rows have one name, the first of their `keys` columns, is turned on its side.
    What is still too wide is cut into tables below each other, each with the `keys` columns; there a cell that is
    wider than all the room ends in "…".
    """
    width = width or shutil.get_terminal_size((WIDTH, 0)).columns
    lines = grid(head, rows)
    if keys == 1 and not _fits(lines, width):
        names, *columns = zip(head, *rows, strict=True)
        lines = grid(names, columns)
    return lines if _fits(lines, width) else [*_cut([head, *rows], keys, width)]


def wrapped(rows: Sequence[Sequence[str]], *, widest: int = 36, width: int | None = None) -> list[str]:
    """Return the lines of a table whose cells go on in further lines; `width` is as of `fitted`.

    No column but the last is wider than `widest`, or than its share of the width.
    """
    width = width or shutil.get_terminal_size((WIDTH, 0)).columns
    columns = [*zip(*rows, strict=True)]
    share = max(width // len(columns) - _GAP, 1)
    widths = [min(max(map(len, own)), widest, share) for own in columns[:-1]]
    widths.append(max(width - sum(widths) - _GAP * len(widths), 1))
    lines = []
    for row in rows:
        parts = [textwrap.wrap(cell, room) or [""] for cell, room in zip(row, widths, strict=True)]
        for cells in itertools.zip_longest(*parts, fillvalue=""):
            padded = (cell.ljust(room) for cell, room in zip(cells, widths, strict=True))
            lines.append((" " * _GAP).join(padded).rstrip())
    return lines


def _fits(lines: Sequence[str], width: int) -> bool:
    return max(map(len, lines)) <= width


def _cut(table: Sequence[Sequence[str]], keys: int, width: int) -> Iterator[str]:
    """Yield the lines of a table, head first, in parts of as many columns as there is room for."""
    named = [[_shortened(cell, width // (2 * keys) - _GAP) for cell in row[:keys]] for row in table]
    room = width - sum(_GAP + max(3, *map(len, own)) for own in zip(*named, strict=True))
    columns = [[_shortened(cell, room) for cell in own] for own in zip(*(row[keys:] for row in table), strict=True)]
    while columns:
        count, used = 0, -_GAP
        while count < len(columns) and (not count or used + _width(columns[count]) <= room):
            used += _width(columns[count])
            count += 1
        part, columns = columns[:count], columns[count:]
        head, *rows = ([*own, *cells] for own, cells in zip(named, zip(*part, strict=True), strict=True))
        yield from grid(head, rows)
        if columns:
            yield ""


def _width(column: Sequence[str]) -> int:
    return _GAP + max(3, *map(len, column))


def _shortened(cell: str, room: int) -> str:
    return cell if len(cell) <= room else f"{cell[: max(room, 1) - 1]}…"
