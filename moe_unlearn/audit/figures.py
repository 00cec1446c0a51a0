"""Drawing of an audit's figures as SVG, in the colours of the page around them, light or dark."""

import math
from collections.abc import Mapping, Sequence
from html import escape

from moe_unlearn.audit.attack import SCORES, Outcome, mean
from moe_unlearn.audit.judge import Finding

_ROW, _LEFT, _WIDE = 22, 370, 360  # of the forest of shares: a row, its labels, its axis
_LIMIT = (-1.0, 1.5)  # shares that the axis shows
_STYLES = ("s0", "s1", "s2", "s3", "s4", "s5")  # classes of the page's style sheet: a colour and a dash each


def forest(findings: Sequence[Finding], margin: float) -> str:
    """Draw shares of the original memory with their intervals, a row each, and the margin as a band."""
    rows = [own for own in findings if own.share is not None]
    if not rows:
        return ""

    def x(share: float) -> float:
        low, high = _LIMIT
        return _LEFT + _WIDE * (min(max(share, low), high) - low) / (high - low)

    height = _ROW * len(rows) + 50
    parts = [
        f'<rect class="band" x="{x(-margin):.1f}" y="10" width="{x(margin) - x(-margin):.1f}" height="{height - 44}"/>'
    ]
    for tick in (-1, -0.5, 0, 0.5, 1, 1.5):
        parts.append(f'<line class="grid" x1="{x(tick):.1f}" x2="{x(tick):.1f}" y1="10" y2="{height - 34}"/>')
        parts.append(f'<text class="tick" x="{x(tick):.1f}" y="{height - 18}" text-anchor="middle">{tick:.0%}</text>')
    for number, own in enumerate(rows):
        y = 10 + _ROW * (number + 0.5)
        assert own.share is not None and own.low is not None and own.high is not None
        name = escape(f"{own.label}: {SCORES[own.score].title}")
        parts.append(f'<text x="{_LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{name}</text>')
        parts.append(f'<g class="{own.verdict}"><title>{name}: {own.share:.0%} ({own.verdict})</title>')
        parts.append(f'<line class="bar" x1="{x(own.low):.1f}" x2="{x(own.high):.1f}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<circle cx="{x(own.share):.1f}" cy="{y:.1f}" r="4.5"/></g>')
    parts.append(
        f'<text class="tick" x="{_LEFT + _WIDE / 2}" y="{height - 3}" text-anchor="middle">'
        "share of the original memory (0: like unseen text)</text>"
    )
    return _svg(_LEFT + _WIDE + 20, height, parts)


def curves(lines: Mapping[str, Sequence[tuple[float, float]]], across: str, up: str) -> str:
    """Draw lines, name -> points (x, y), with their names beside their ends."""
    points = [point for line in lines.values() for point in line if all(map(math.isfinite, point))]
    if not points:
        return ""
    width, height, left, right = 720, 300, 60, 190
    (low_x, high_x), (low_y, high_y) = (_range([point[axis] for point in points]) for axis in (0, 1))

    def place(point: tuple[float, float]) -> tuple[float, float]:
        x = left + (width - left - right) * (point[0] - low_x) / (high_x - low_x)
        return x, 20 + (height - 70) * (high_y - point[1]) / (high_y - low_y)

    parts = []
    for tick in _ticks(low_y, high_y):
        _, y = place((low_x, tick))
        parts.append(f'<line class="grid" x1="{left}" x2="{width - right}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="tick" x="{left - 6}" y="{y + 4:.1f}" text-anchor="end">{tick:g}</text>')
    whole = all(float(point[0]).is_integer() for point in points)
    for tick in _ticks(low_x, high_x, 1.0 if whole else 0.0):
        x, _ = place((tick, low_y))
        parts.append(f'<text class="tick" x="{x:.1f}" y="{height - 32}" text-anchor="middle">{tick:g}</text>')
    ends = _apart([place(line[-1])[1] for line in lines.values()], 16)
    for number, (name, line) in enumerate(lines.items()):
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in map(place, line))
        style = _STYLES[number % len(_STYLES)]
        parts.append(f'<g class="{style}"><polyline points="{path}"/>')
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3"/>' for x, y in map(place, line)]
        parts.append(f'<text x="{width - right + 10}" y="{ends[number] + 4:.1f}">{escape(name)}</text></g>')
    middle = (left + width - right) / 2
    parts.append(f'<text class="tick" x="{middle}" y="{height - 10}" text-anchor="middle">{escape(across)}</text>')
    parts.append(f'<text class="tick" x="{left}" y="12">{escape(up)}</text>')
    return _svg(width, height, parts)


def heat(table: Sequence[Sequence[float | None]], rows: Sequence[str], columns: Sequence[str]) -> str:
    """Draw a table as cells, darker where the value is larger; what has no value is hatched."""
    known = [value for row in table for value in row if value is not None]
    if not known:
        return ""
    largest = max(*known, 1e-9)
    size, left = max(10, min(26, 700 // max(1, len(columns)))), 70
    parts = []
    for i, (name, row) in enumerate(zip(rows, table, strict=True)):
        y = 10 + size * i
        parts.append(f'<text x="{left - 8}" y="{y + size / 2 + 4:.1f}" text-anchor="end">{escape(name)}</text>')
        for j, value in enumerate(row):
            where = f'x="{left + size * j}" y="{y}" width="{size - 1}" height="{size - 1}"'
            if value is None:
                parts.append(f'<rect class="empty" {where}/>')
                continue
            told = f"{escape(name)}, {escape(columns[j])}: {value:.2f}"
            parts.append(
                f'<rect class="cell" fill-opacity="{max(value, 0) / largest:.3f}" {where}><title>{told}</title></rect>'
            )
    bottom = 10 + size * len(rows) + 16
    every = max(1, 30 // size)
    for j in range(0, len(columns), every):
        x = left + size * (j + 0.5)
        parts.append(f'<text class="tick" x="{x:.1f}" y="{bottom}" text-anchor="middle">{j}</text>')
    return _svg(left + size * len(columns) + 20, bottom + 10, parts)


def _svg(width: float, height: float, parts: Sequence[str]) -> str:
    inside = "\n".join(parts)
    return f'<svg viewBox="0 0 {width:g} {height:g}" style="max-width:{width:g}px" role="img">\n{inside}\n</svg>'


def _range(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def _ticks(low: float, high: float, least: float = 0.0) -> list[float]:
    """Return about five round numbers within a range, at least `least` apart."""
    power = 10.0 ** math.floor(math.log10((high - low) / 5))
    step = next(power * factor for factor in (1, 2, 5, 10) if (high - low) / (power * factor) <= 6)
    step = max(step, least)
    return [round(i * step, 10) for i in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _apart(places: Sequence[float], least: float) -> list[float]:
    """Return the places moved down where they are closer than `least`, so that their labels can be read."""
    moved, last = list(places), -math.inf
    for i in sorted(range(len(places)), key=places.__getitem__):
        moved[i] = last = max(places[i], last + least)
    return moved


def of(name: str, outcome: Outcome) -> list[tuple[str, str]]:
    """Return the figures of an attack beside its shares: captions and drawings."""
    more = outcome.more
    if name == "interpolation":
        first = next(iter(outcome.variants.values())).scores["loglik"]
        lines = {
            side: [(float(a), mean(own.scores["loglik"][side])) for a, own in outcome.variants.items()]
            for side in first
        }
        return [("Log-likelihood along the update", curves(lines, "a: 0 before, 1 after", "nats a token"))]
    if name == "relearning":
        lines = {side: [(step, value) for step, value in line] for side, line in more["curves"].items()}
        return [("Log-likelihood while relearning", curves(lines, "steps", "nats a token"))]
    if name == "routing":
        table = more["recovered"]
        layers, experts = (
            [f"{what} {i}" for i in range(n)] for what, n in (("layer", len(table)), ("expert", len(table[0])))
        )
        return [("What the former self of one expert brings back, nats a token", heat(table, layers, experts))]
    if name == "inside":
        drawn = {side: [*enumerate(line)] for side, line in more["ranks"].items()}
        found = [("Minus log rank of the true token, through the former head", curves(drawn, "layer", "nats"))]
        if "probes" in more:
            lines = {
                "forget against holdout": [*enumerate(more["probes"])],
                "chance": [(0, 0.5), (len(more["probes"]) - 1, 0.5)],
            }
            found.append(("Area under ROC of a probe of each layer", curves(lines, "layer", "area")))
        return found
    return []
