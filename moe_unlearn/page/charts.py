"""Charts: lines, points with their intervals, shares in rows, and tables of cells."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from moe_unlearn.page.svg import LETTER, STYLES, Axis, Drawing, Frame, grid_line, interval, marker, tick, within
from moe_unlearn.page.text import escape

_MANY, _MOST = 40, 500  # points of a line: more have no markers, and of still more some are left out


@dataclass(frozen=True)
class Line:
    """A named line through points (x, y), in the style of a number."""

    name: str
    points: Sequence[tuple[float, float]]
    style: int


@dataclass(frozen=True)
class Spot:
    """A named point with its intervals (low, high) on both axes, in the style of a number."""

    name: str
    at: tuple[float, float]
    spread: tuple[tuple[float, float], tuple[float, float]]
    style: int


def curves(
    title: str, lines: Sequence[Line], axes: tuple[Axis, Axis], goal: tuple[str, float] | None = None
) -> Drawing:
    """Draw lines, and a dashed one at a named height, which is to be reached."""
    steps = all(float(x).is_integer() for line in lines for x, _ in line.points)
    frame = Frame(*axes, title=title, whole=steps)
    for line in lines:
        known = [(x, y) for x, y in line.points if math.isfinite(y) and (y > 0 or not axes[1].log)]
        every = max(1, len(known) // _MOST)
        known = [point for i, point in enumerate(known) if i % every == 0 or i == len(known) - 1]
        path = " ".join(f"{frame.x(x):.1f},{frame.y(y):.1f}" for x, y in known)
        frame.parts.append(f'<g class="s{line.style % STYLES}"><title>{escape(line.name)}</title>')
        frame.parts.append(f'<polyline points="{path}"/>')
        if len(known) <= _MANY:
            frame.parts += [marker(line.style, frame.x(x), frame.y(y), 3.5) for x, y in known]
        frame.parts.append("</g>")
    if goal is not None:
        name, height = goal
        y = frame.y(height)
        frame.parts.append(
            f'<line class="goal" x1="{frame.left}" x2="{frame.width - frame.right}" y1="{y:.1f}" y2="{y:.1f}"/>'
        )
        frame.parts.append(
            f'<text x="{frame.width - frame.right - 4}" y="{y - 5:.1f}" text-anchor="end">{escape(name)}</text>'
        )
    named = {line.name: line.style for line in lines if line.name}
    return frame.drawing(named, markers=True)


def scatter(title: str, spots: Sequence[Spot], axes: tuple[Axis, Axis], goal: Sequence[float] = ()) -> Drawing:
    """Draw points with their intervals and names, and the rectangle (low x, high x, low y, high y) of a goal.

    An interval that leaves the frame ends in an arrow. Points are hollow, so that those below can be seen, and names
    stand where nothing else does.
    """
    frame = Frame(*axes, title=title, width=420.0, height=300.0)
    if goal:
        (x0, x1), (y0, y1) = (_held(goal[i : i + 2], axis) for i, axis in ((0, axes[0]), (2, axes[1])))
        if x1 > x0 and y1 > y0:
            left, top = frame.x(x0), frame.y(y1)
            size = f'width="{frame.x(x1) - left:.1f}" height="{frame.y(y0) - top:.1f}"'
            frame.parts.append(f'<rect class="band" x="{left:.1f}" y="{top:.1f}" {size}/>')
    shown = [spot for spot in spots if frame.inside(spot.at)]
    for spot in shown:
        x, y = frame.x(spot.at[0]), frame.y(spot.at[1])
        frame.parts.append(f'<g class="s{spot.style % STYLES}">')
        for axis, place, across in ((axes[0], frame.x, True), (axes[1], frame.y, False)):
            frame.parts += interval(spot.spread[0 if across else 1], axis, place, (x, y), across)
        told = f"{escape(spot.name)}: {spot.at[0]:.3f}, {spot.at[1]:.3f}"
        frame.parts.append(f"<title>{told}</title>{marker(spot.style, x, y, 6)}</g>")
    taken = [box for spot in shown for box in _boxes(spot, frame)]
    for spot in shown:
        frame.parts += _named(spot.name, (frame.x(spot.at[0]), frame.y(spot.at[1])), frame, taken)
    return frame.drawing({spot.name: spot.style for spot in shown}, markers=True)


def forest(rows: Sequence[tuple[str, str, tuple[float, float, float]]], margin: float, axis: Axis) -> Drawing:
    """Draw shares with their intervals, a row each: its name, the class of its verdict, (low, share, high).

    The margin around 0 is a band; what leaves the axis ends in an arrow.
    """
    each, wide = 38, 420
    bottom = each * len(rows) + 4

    def x(share: float) -> float:
        return 8 + (wide - 28) * axis.share(within(share, axis))

    parts = [f'<rect class="band" x="{x(-margin):.1f}" y="4" width="{x(margin) - x(-margin):.1f}" height="{bottom}"/>']
    for share in axis.ticks():
        parts += [grid_line(x(share), x(share), 4, bottom + 4), tick(x(share), bottom + 20, f"{share:.0%}", "middle")]
    parts.append(tick(wide / 2, bottom + 38, axis.title, "middle"))
    for number, (name, verdict, (low, share, high)) in enumerate(rows):
        y = each * number + 31.0
        parts.append(f'<text x="8" y="{y - 11:.1f}">{escape(name)}</text>')
        parts.append(f'<g class="{escape(verdict)}"><title>{escape(name)}: {share:.0%} ({escape(verdict)})</title>')
        parts += interval((low, high), axis, x, (x(share), y), across=True)
        parts.append(f'<circle cx="{x(share):.1f}" cy="{y:.1f}" r="4.5"/></g>')
    return Drawing(wide, bottom + 44, parts)


def heat(
    title: str,
    table: Sequence[Sequence[float | None]],
    *,
    largest: float | None = None,
    chosen: Sequence[Sequence[bool]] = (),
    names: tuple[str, str] = ("layer", "expert"),
) -> Drawing | None:
    """Draw a table as cells, stronger where the value is farther from 0, negative ones in another colour.

    What has no value is hatched, `chosen` cells have a frame. `largest` is the value of the strongest colour, by
    default the largest there is. Returns None for a table without a value.
    """
    known = [abs(value) for row in table for value in row if value is not None]
    if not known:
        return None
    strongest = max(largest if largest is not None else max(known), 1e-9)
    columns = max(map(len, table))
    size = max(3.0, min(22.0, 304 / max(1, columns)))
    left, top = 42.0, 26.0
    parts = [f'<text x="0" y="14" font-weight="bold">{escape(title)}</text>']
    frames = []
    for i, row in enumerate(table):
        y = top + size * i
        if i % max(1, math.ceil(14 / size)) == 0:
            parts.append(tick(left - 6, y + size / 2 + 4, str(i), "end"))
        for j, value in enumerate(row):
            where = f'x="{left + size * j:.1f}" y="{y:.1f}" width="{size - 0.6:.1f}" height="{size - 0.6:.1f}"'
            if value is None:
                parts.append(f'<rect class="empty" {where}/>')
                continue
            strength = min(abs(value) / strongest, 1)
            told = f"{names[0]} {i}, {names[1]} {j}: {value:.3g}"
            kind = "cell" if value >= 0 else "less"
            parts.append(f'<rect class="{kind}" fill-opacity="{strength:.3f}" {where}><title>{told}</title></rect>')
            if chosen and chosen[i][j]:
                frames.append(f'<rect class="chosen" {where}/>')
    bottom = top + size * len(table)
    for j in range(0, columns, max(1, math.ceil(30 / size))):
        parts.append(tick(left + size * (j + 0.5), bottom + 15, str(j), "middle"))
    parts.append(tick(left + size * columns / 2, bottom + 31, f"{names[1]} (a row is a {names[0]})", "middle"))
    return Drawing(max(left + size * columns + 6, 260), bottom + 38, [*parts, *frames])


def _boxes(spot: Spot, frame: Frame) -> list[tuple[float, float, float, float]]:
    """Return the rectangles that the marker of a point and its two intervals take, where no name shall stand."""
    x, y = frame.x(spot.at[0]), frame.y(spot.at[1])
    (left, right), (low, high) = (
        _held(ends, axis) for ends, axis in zip(spot.spread, (frame.across, frame.up), strict=True)
    )
    bars = [(frame.x(left), y - 2, frame.x(right), y + 2), (x - 2, frame.y(high), x + 2, frame.y(low))]
    return [(x - 7, y - 7, x + 7, y + 7), *bars]


def _held(pair: Sequence[float], axis: Axis) -> list[float]:
    return [within(value, axis) for value in pair]


def _named(
    name: str, at: tuple[float, float], frame: Frame, taken: list[tuple[float, float, float, float]]
) -> list[str]:
    """Return a name near its point where it covers nothing, with a line to it if it stands away; it is then taken."""
    long, x, y = len(name) * LETTER, *at
    places = [
        (x + side * (9 + far) - (long if side < 0 else 0), y + 4 + down)
        for far in (0, 16, 34, 60)
        for down in sorted((step * 15 for step in range(-8, 9)), key=abs)
        if abs(down) <= 15 + 3 * far
        for side in (1, -1)
    ]
    limits = (frame.left + 2, frame.top + 10, frame.width - frame.right - 2, frame.top + frame.height - 3)
    for left, base in places:
        box = (left - 1, base - 11, left + long + 1, base + 3)
        fits = box[0] >= limits[0] and base - 11 >= limits[1] - 10 and box[2] <= limits[2] and base + 3 <= limits[3]
        if fits and not any(_overlap(box, other) for other in taken):
            taken.append(box)
            parts = [f'<text x="{left:.1f}" y="{base:.1f}">{escape(name)}</text>']
            near = left if left > x else left + long
            if abs(near - x) > 12 or abs(base - 4 - y) > 12:
                parts.append(f'<line class="lead" x1="{x:.1f}" y1="{y:.1f}" x2="{near:.1f}" y2="{base - 4:.1f}"/>')
            return parts
    return []  # the legend has it


def _overlap(one: tuple[float, float, float, float], other: tuple[float, float, float, float]) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]
