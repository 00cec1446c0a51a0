"""Drawings as SVG in the colours of the page around them, or, in a file of its own, in those of the screen."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from moe_unlearn.page.style import COLOURS, DRAWING
from moe_unlearn.page.text import escape

STYLES = 8  # classes s0 ... of the style sheet: a colour and a dash each, with the marker of the same number
LETTER = 7.2  # pixels that a letter of 12 px takes on average


@dataclass(frozen=True)
class Drawing:
    """A drawing of a size in pixels, made of elements of SVG."""

    width: float
    height: float
    parts: Sequence[str]

    def inline(self) -> str:
        """Return the drawing for a page: never wider than it is, narrower where the screen is."""
        size = f'viewBox="0 0 {self.width:g} {self.height:g}" style="max-width:{self.width:g}px"'
        return f'<svg {size} role="img">\n{self._inside()}\n</svg>'

    def placed(self, x: float) -> str:
        """Return the drawing for a place in another one."""
        return f'<svg x="{x:g}" width="{self.width:g}" height="{self.height:g}">\n{self._inside()}\n</svg>'

    def _inside(self) -> str:
        return "\n".join(self.parts)


def side_by_side(drawings: Sequence[Drawing]) -> str:
    """Return the text of an SVG file with drawings in one row."""
    gap = 24
    width = sum(own.width + gap for own in drawings) - gap
    height = max(own.height for own in drawings)
    places = [sum(own.width + gap for own in drawings[:i]) for i in range(len(drawings))]
    inside = "\n".join(own.placed(x) for own, x in zip(drawings, places, strict=True))
    size = f'viewBox="0 0 {width:g} {height:g}" width="{width:g}" height="{height:g}"'
    style = f"{COLOURS}{DRAWING}.point {{ fill: none }}"
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size}>\n<style>{style}</style>\n{inside}\n</svg>\n'


@dataclass(frozen=True)
class Axis:
    """An axis: what it shows, from where to where; `log` for a logarithmic one."""

    title: str
    low: float
    high: float
    log: bool = False

    @classmethod
    def of(cls, title: str, values: Iterable[float], *, log: bool = False, room: float = 0.04) -> "Axis":
        """Return an axis on which finite values have room; a logarithmic one if all of them are above 0."""
        known = [value for value in values if math.isfinite(value)] or [0.0]
        log = log and min(known) > 0
        known = [math.log10(value) for value in known] if log else known
        low, high = min(known), max(known)
        half = 0.5 if log or not low else abs(low) / 2
        low, high = (low, high) if high > low else (low - half, high + half)
        return cls(title, low - room * (high - low), high + room * (high - low), log)

    def share(self, value: float) -> float:
        """Return where a value stands, 0 at the low end and 1 at the high one."""
        placed = math.log10(value) if self.log else value
        return (placed - self.low) / (self.high - self.low)

    def ticks(self, *, whole: bool = False) -> list[float]:
        """Return about five round numbers on the axis, whole ones if asked for."""
        if not self.log:
            return _round(self.low, self.high, 1.0 if whole else 0.0)
        found = [
            float(f"{factor}e{power}")
            for power in range(math.floor(self.low), math.ceil(self.high) + 1)
            for factor in (1, 2, 5)
            if self.low <= power + math.log10(factor) <= self.high
        ]
        if len(found) < 2:  # less than a decade, where these could show a single number
            return _round(10**self.low, 10**self.high)
        return found if len(found) <= 7 else [tick for tick in found if f"{tick:e}"[0] == "1"]


@dataclass
class Frame:
    """The rectangle between two axes, with what is drawn in it so far."""

    across: Axis
    up: Axis
    title: str = ""
    width: float = 352.0
    height: float = 210.0
    left: float = 52.0
    top: float = 30.0
    right: float = 12.0
    whole: bool = False  # whether the ticks across are whole numbers
    parts: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        bottom = self.top + self.height
        self.parts.append(f'<text x="0" y="14" font-weight="bold">{escape(self.title)}</text>')
        for mark in self.up.ticks():
            y = self.y(mark)
            self.parts.append(grid_line(self.left, self.width - self.right, y, y))
            self.parts.append(tick(self.left - 6, y + 4, f"{mark:g}", "end"))
        for mark in self.across.ticks(whole=self.whole):
            x = self.x(mark)
            self.parts.append(grid_line(x, x, self.top, bottom))
            self.parts.append(tick(x, bottom + 16, f"{mark:g}", "middle"))
        self.parts.append(tick((self.left + self.width - self.right) / 2, bottom + 34, self.across.title, "middle"))
        self.parts.append(tick(self.width - self.right, 14, self.up.title, "end"))

    def x(self, value: float) -> float:
        """Return the pixel of a value across."""
        return self.left + (self.width - self.left - self.right) * self.across.share(value)

    def y(self, value: float) -> float:
        """Return the pixel of a value up."""
        return self.top + self.height * (1 - self.up.share(value))

    def inside(self, at: tuple[float, float]) -> bool:
        """Return whether a point lies in the frame."""
        return 0 <= self.across.share(at[0]) <= 1 and 0 <= self.up.share(at[1]) <= 1

    def drawing(self, styles: Mapping[str, int], markers: bool) -> Drawing:
        """Return the drawing, with a legend of these names below."""
        bottom = self.top + self.height + 44
        rows = _legend(styles, self.width, bottom, markers)
        return Drawing(self.width, bottom + 18 * len(rows), [*self.parts, *(part for row in rows for part in row)])


def interval(
    spread: tuple[float, float], axis: Axis, place: Callable[[float], float], at: tuple[float, float], across: bool
) -> list[str]:
    """Return the bar of an interval along an axis, with an arrow where it leaves the frame."""
    low, high = spread
    if not low < high:
        return []
    ends = [place(within(value, axis)) for value in (low, high)]
    x, y = at
    line = f'x1="{ends[0]:.1f}" x2="{ends[1]:.1f}" y1="{y:.1f}" y2="{y:.1f}"'
    if not across:
        line = f'x1="{x:.1f}" x2="{x:.1f}" y1="{ends[0]:.1f}" y2="{ends[1]:.1f}"'
    parts = [f'<line class="bar" {line}/>']
    for leaves, end, sign in ((axis.share(low) < 0, ends[0], -1), (axis.share(high) > 1, ends[1], 1)):
        if leaves:
            tips = ((end, y), (end - 7 * sign, y - 4), (end - 7 * sign, y + 4))
            if not across:  # pixels count downward
                tips = ((x, end), (x - 4, end + 7 * sign), (x + 4, end + 7 * sign))
            points = " ".join(f"{a:.1f},{b:.1f}" for a, b in tips)
            parts.append(f'<polygon class="arrow" points="{points}"/>')
    return parts


def within(value: float, axis: Axis) -> float:
    """Return the value of the axis that is nearest."""
    low, high = (10**axis.low, 10**axis.high) if axis.log else (axis.low, axis.high)
    return min(max(value, low), high)


def _legend(styles: Mapping[str, int], width: float, top: float, markers: bool) -> list[list[str]]:
    """Return the rows of a legend; one name alone needs none."""
    rows: list[list[str]] = []
    x = width
    for name, style in styles.items() if len(styles) > 1 else ():
        long = 26 + len(name) * LETTER + 12
        if x + long > width:
            rows.append([])
            x = 4.0
        y = top + 18 * (len(rows) - 1) + 10
        stroke = f'<polyline points="{x},{y - 4} {x + 20},{y - 4}"/>'
        sign = marker(style, x + 10, y - 4, 4.5) if markers else ""
        rows[-1].append(f'<g class="s{style % STYLES}">{stroke}{sign}</g>')
        rows[-1].append(f'<text x="{x + 26}" y="{y}">{escape(name)}</text>')
        x += long
    return rows


def marker(style: int, x: float, y: float, r: float) -> str:
    """Return a hollow marker of a shape of its own at a point."""
    kind = style % STYLES
    if kind == 0:
        return f'<circle class="point" cx="{x:.1f}" cy="{y:.1f}" r="{r}"/>'
    shapes: dict[int, Sequence[tuple[float, float]]] = {
        1: ((-1, -1), (1, -1), (1, 1), (-1, 1)),
        2: ((0, -1.3), (1.2, 0.9), (-1.2, 0.9)),
        3: ((0, 1.3), (1.2, -0.9), (-1.2, -0.9)),
        4: ((0, -1.4), (1.4, 0), (0, 1.4), (-1.4, 0)),
        5: ((-0.4, -1.3), (0.4, -1.3), (0.4, -0.4), (1.3, -0.4), (1.3, 0.4), (0.4, 0.4), (0.4, 1.3), (-0.4, 1.3),
            (-0.4, 0.4), (-1.3, 0.4), (-1.3, -0.4), (-0.4, -0.4)),
        6: [(1.6 * f * math.sin(math.pi * i / 5), -1.6 * f * math.cos(math.pi * i / 5))
            for i in range(10) for f in ((1, 0.42)[i % 2],)],
        7: [(1.3 * math.cos(math.pi * i / 3), 1.3 * math.sin(math.pi * i / 3)) for i in range(6)],
    }  # fmt: skip
    points = " ".join(f"{x + r * dx:.1f},{y + r * dy:.1f}" for dx, dy in shapes[kind])
    return f'<polygon class="point" points="{points}"/>'


def grid_line(x1: float, x2: float, y1: float, y2: float) -> str:
    return f'<line class="grid" x1="{x1:.1f}" x2="{x2:.1f}" y1="{y1:.1f}" y2="{y2:.1f}"/>'


def tick(x: float, y: float, told: str, anchor: str) -> str:
    return f'<text class="tick" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(told)}</text>'


def _round(low: float, high: float, least: float = 0.0) -> list[float]:
    """Return about five round numbers within a range, at least `least` apart."""
    power = 10.0 ** math.floor(math.log10((high - low) / 5))
    step = next(power * factor for factor in (1, 2, 5, 10) if (high - low) / (power * factor) <= 6)
    step = max(step, least)
    return [round(i * step, 10) for i in range(math.ceil(low / step), math.floor(high / step) + 1)]
