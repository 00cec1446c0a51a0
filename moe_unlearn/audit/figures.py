"""Drawing of an audit's figures."""

from collections.abc import Mapping, Sequence

from moe_unlearn.audit.attack import SCORES, Outcome, mean
from moe_unlearn.audit.judge import Finding
from moe_unlearn.page import Figure
from moe_unlearn.page.charts import Line, curves, forest, heat
from moe_unlearn.page.svg import Axis

_SHARES = Axis("share of the original memory (0: like unseen text)", -1.0, 1.5)


def shares(findings: Sequence[Finding], margin: float) -> list[Figure]:
    """Draw shares of the original memory with their intervals, a row each, and the margin as a band."""
    rows = [
        (f"{own.label}: {SCORES[own.score].title}", own.verdict, (own.low, own.share, own.high))
        for own in findings
        if own.share is not None and own.low is not None and own.high is not None
    ]
    return [Figure("", [forest(rows, margin, _SHARES)])] if rows else []


def of(name: str, outcome: Outcome) -> list[Figure]:
    """Return the figures of an attack beside its shares."""
    more = outcome.more
    if name == "interpolation":
        first = next(iter(outcome.variants.values())).scores["loglik"]
        lines = {
            side: [(float(a), mean(own.scores["loglik"][side])) for a, own in outcome.variants.items()]
            for side in first
        }
        return _curves("Log-likelihood along the update", lines, "a: 0 before, 1 after", "nats per token")
    if name == "relearning":
        return _curves("Log-likelihood while relearning", more["curves"], "steps", "nats per token")
    if name == "routing":
        drawn = heat("What the former self of one expert brings back, nats per token", more["recovered"])
        return [Figure("", [drawn])] if drawn else []
    if name == "inside":
        ranks = {side: [*enumerate(line)] for side, line in more["ranks"].items()}
        title = "Minus log rank of the true token, through the former head"
        found = _curves(title, ranks, "layer", "nats")
        if "probes" in more:
            lines = {
                "forget against holdout": [*enumerate(more["probes"])],
                "chance": [(0, 0.5), (len(more["probes"]) - 1, 0.5)],
            }
            found += _curves("Area under ROC of a probe of each layer", lines, "layer", "area")
        return found
    return []


def _curves(title: str, lines: Mapping[str, Sequence[tuple[float, float]]], across: str, up: str) -> list[Figure]:
    """Return a figure of named lines; none without a point."""
    drawn = [Line(name, points, style) for style, (name, points) in enumerate(lines.items())]
    points = [point for line in drawn for point in line.points]
    if not points:
        return []
    axes = (Axis.of(across, [x for x, _ in points], room=0.02), Axis.of("", [y for _, y in points], room=0.08))
    return [Figure("", [curves(f"{title}, {up}", drawn, axes)])]
