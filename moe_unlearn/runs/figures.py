"""Drawing of a report's figures."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from moe_unlearn.page import Figure
from moe_unlearn.page.charts import Line, Spot, curves, heat, scatter
from moe_unlearn.page.svg import Axis, Drawing
from moe_unlearn.runs.summary import KEEP, RUNS, WITHIN, Summary, heading, ordered

# a colour and a marker of its own for every run that has a name of ours; others take those that are left
_STYLES = {"target": 7, "retrain": 6, "graddiff": 4, "npo": 0, "trace": 2, "wagle": 1, "mollm": 5, "combined": 3}
_PLANE = ("verbmem_f", "verbmem_r")
_WEIGHTS = {  # of a step's metrics: what a panel of it is called
    "lambda_forget": "λ of the forget gradient",
    "lambda_retain": "λ of the retain gradient",
    "lambda_kl": "λ of the KL gradient",
    "retain_alpha": "λ of the retain loss",
    "descent_forget": "forget: gradient · update",
    "descent_retain": "retain: gradient · update",
    "descent_kl": "KL: gradient · update",
    "grad_norm": "norm of the gradient",
    "lr": "learning rate",
}
Trajectories = Mapping[str, Sequence[Mapping[str, Any]]]


def frontier(summary: Summary, styles: Mapping[str, int] | None = None) -> list[Figure]:
    """Draw forgetting against utility if two unlearned runs or more can be compared; a close view of them too."""
    styles = _styles(summary) if styles is None else styles
    shown = {run: m for run in ordered(summary) if all(_number((m := summary[run]).get(key)) for key in _PLANE)}
    unlearned = [run for run in shown if run not in ("target", "retrain")]
    if len(unlearned) < 2:
        return []
    spots = [
        Spot(RUNS.get(run, run), (m[_PLANE[0]], m[_PLANE[1]]), _spread(m), styles[run]) for run, m in shown.items()
    ]
    goal: tuple[float, ...] = ()
    caption = "Forgetting against utility; up and left is better"
    if {"retrain", "target"} <= shown.keys():
        gold, floor = shown["retrain"]["verbmem_f"], KEEP * shown["target"]["verbmem_r"]
        goal = (gold - WITHIN, gold + WITHIN, floor, 2)
        caption += f". Shaded: the goal, within {WITHIN:.2f} of retrain and {KEEP:.0%} of the target's utility"
    if any("verbmem_f_sd" in m for m in shown.values()):
        caption += ". Bars: sample standard deviation over seeds; an arrow leads out of the frame"
    elif any("verbmem_f_low" in m for m in shown.values()):
        caption += ". Bars: 95 % intervals over documents; an arrow leads out of the frame"
    titles = [heading(key) for key in _PLANE]

    def axes(runs: Sequence[str]) -> tuple[Axis, Axis]:
        across, up = (
            Axis.of(t, [shown[run][key] for run in runs], room=0.12) for t, key in zip(titles, _PLANE, strict=True)
        )
        return across, up

    drawings = [scatter("All runs", spots, axes(list(shown)), goal)]
    if "target" in shown:
        others = {run: spot for run, spot in zip(shown, spots, strict=True) if run != "target"}
        drawings.append(scatter("Without the target", [*others.values()], axes([*others]), goal))
    return [Figure(f"{caption}.", drawings, "pareto")]


def trajectories(trajectory: Trajectories, summary: Summary) -> list[Figure]:
    """Draw what was measured or trained on over steps: NLL, losses by side, λ, guards."""
    styles = _styles({**summary, **{run: {} for run in trajectory}})
    figures = []
    nll = [_panel(trajectory, styles, f"nll_{side[0]}", f"{side} documents", summary) for side in ("forget", "retain")]
    if drawn := [panel for panel in nll if panel]:
        told = "NLL while unlearning, in nats per token"
        told += ": forget should rise to the dashed line, retain should stay on it." if "retrain" in summary else "."
        figures.append(Figure(told, drawn, "trajectories"))
    losses = [_panel(trajectory, styles, f"{side}_loss", f"{side} loss") for side in ("forget", "retain")]
    if drawn := [panel for panel in losses if panel]:
        figures.append(Figure("The losses that were trained on, of each step.", drawn, "losses"))
    weights = [_panel(trajectory, styles, key, title) for key, title in _WEIGHTS.items()]
    if drawn := [panel for panel in weights if panel]:
        told = (
            "Weights of the two sides, guards, norm of the gradient and learning rate over steps, where there are any."
        )
        figures.append(Figure(told, drawn, "weights"))
    return figures


def experts(routing: Mapping[str, Any], routes: Mapping[str, Any]) -> list[Figure]:
    """Draw how often tokens visit each expert, and how that moved, or without `routes` the ratio of both sides."""
    tables = routes or routing
    if not tables:
        return []
    forget, retain, chosen = tables["forget"], tables["retain"], routing.get("selected", ())
    top = max(value for table in (forget, retain) for row in table for value in row)
    panels = [
        heat("Forget: share of tokens", forget, largest=top, chosen=chosen),
        heat("Retain: share of tokens", retain, largest=top, chosen=chosen),
    ]
    told = "How often forget and retain tokens visit each expert"
    if routes:
        change = [[b - a for a, b in zip(*rows, strict=True)] for rows in zip(forget, routes["after"], strict=True)]
        most = max(abs(value) for row in change for value in row)
        panels.append(heat(f"Moved: at most {most:.2g}", change, chosen=chosen))
        told += " before unlearning, and where it moved the forget tokens (blue: there, orange: away)"
    else:
        ratio = [[_ratio(f, r) for f, r in zip(*rows, strict=True)] for rows in zip(forget, retain, strict=True)]
        panels.append(heat("log2 (forget / retain), cut at ±3", ratio, largest=3, chosen=chosen))
        told += "; their ratio is blue where forget tokens are more, orange where retain tokens are"
    if any(any(row) for row in chosen):
        told += "; frames: experts that TRACE selected"
    return [Figure(f"{told}.", [panel for panel in panels if panel], "experts")]


def _panel(
    trajectory: Trajectories, styles: Mapping[str, int], key: str, title: str, summary: Summary | None = None
) -> Drawing | None:
    """Draw one metric of all runs that have it; None if none has."""
    series = {
        run: [(s["step"], s[key]) for s in trajectory[run] if _number(s.get(key)) and _number(s.get("step"))]
        for run in ordered(dict(trajectory))
    }
    lines = [Line(RUNS.get(run, run), points, styles[run]) for run, points in series.items() if points]
    if not lines:
        return None
    gold = (summary or {}).get("retrain", {}).get(key)
    goal = ("retrain", gold) if gold is not None else None
    heights = [y for line in lines for _, y in line.points] + ([gold] if gold is not None else [])
    across = Axis.of("step", [x for line in lines for x, _ in line.points], room=0.02)
    up = Axis.of("log scale" if summary is not None else "", heights, log=summary is not None, room=0.08)
    return curves(title, lines, (across, up), goal)


def _styles(runs: Mapping[str, Any]) -> dict[str, int]:
    free = iter(range(1000))
    return {run: _STYLES[run] if run in _STYLES else next(free) for run in ordered(dict(runs))}


def _spread(metrics: Mapping[str, float]) -> tuple[tuple[float, float], tuple[float, float]]:
    found = []
    for key in _PLANE:
        sd = metrics.get(f"{key}_sd", 0.0)
        low, high = (metrics.get(f"{key}_{end}", metrics[key] + sign * sd) for end, sign in (("low", -1), ("high", 1)))
        found.append((low, high))
    return found[0], found[1]


def _ratio(forget: float, retain: float) -> float:
    smallest = 1e-4  # without it unused experts would have no finite ratio
    return min(max(math.log2(max(forget, smallest) / max(retain, smallest)), -3.0), 3.0)


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
