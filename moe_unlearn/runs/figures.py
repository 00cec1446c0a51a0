"""Drawing of a report's figures."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_unlearn.files import whole_file
from moe_unlearn.runs.summary import KEEP, RUNS, WITHIN, Summary, ordered

if TYPE_CHECKING:  # the figures are drawn where the library is installed
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Drawn = tuple["Figure", str]  # a figure and its caption

# Okabe and Ito's colours, which colour-blind readers can tell apart, and a marker of its own for every run
STYLES = {
    "target": ("#000000", "X"),
    "retrain": ("#000000", "*"),
    "graddiff": ("#E69F00", "o"),
    "npo": ("#56B4E9", "s"),
    "trace": ("#009E73", "^"),
    "wagle": ("#0072B2", "v"),
    "mollm": ("#D55E00", "D"),
    "combined": ("#CC79A7", "P"),
}


def draw(folder: Path, summary: Summary, trajectory: dict, routing: dict) -> dict[str, str]:
    """Draw the figures for which there is data into `folder`; return their file names and captions."""
    made: dict[str, str] = {}
    drawings: tuple[tuple[str, Callable[..., Drawn | None], tuple], ...] = (
        ("pareto.png", pareto, (summary,)),
        ("trajectories.png", trajectory_curves, (trajectory, summary)),
        ("experts.png", expert_frequencies, (routing,)),
    )
    for name, drawing, arguments in drawings:
        if drawn := drawing(*arguments):
            figure, made[name] = drawn
            with whole_file(folder / name) as unfinished:
                figure.savefig(unfinished, dpi=150, format="png")
    return made


def _new(width: float, height: float, rows: int = 1, columns: int = 1, **keywords: Any) -> tuple["Figure", Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure  # instead of pyplot, which keeps global state and figures to close

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, squeeze=False, **keywords)


def pareto(summary: Summary) -> Drawn | None:
    keys = ("verbmem_f", "verbmem_r")
    runs = [r for r in ordered(summary) if set(keys) <= summary[r].keys()]
    if len(runs) < 2:
        return None
    corner = {"xlim": (-0.02, 0.4), "ylim": (0.75, 1.02)}
    enlarge = any(
        all(low <= summary[r][k] <= high for k, (low, high) in zip(keys, corner.values(), strict=True))
        for r in runs
        if r not in ("target", "retrain")
    )
    figure, (panels,) = _new(10 if enlarge else 6, 4.8, 1, 2 if enlarge else 1)
    caption = "Forgetting against utility; up and left is better"
    for axes in panels:
        for run in runs:
            colour, marker = STYLES.get(run, ("#888888", "h"))
            x, y = (summary[run][key] for key in keys)
            spread = [[summary[run].get(f"{key}_sd", 0.0)] for key in keys]
            axes.errorbar(x, y, spread[1], spread[0], color=colour, lw=1, zorder=3)
            if run == "retrain":  # hollow and large, because other runs should land on it
                axes.scatter(x, y, 420, color="none", marker=marker, ec=colour, lw=1.5, zorder=5, label=RUNS[run])
            else:
                axes.scatter(x, y, 70, color=colour, marker=marker, ec="white", zorder=4, label=RUNS.get(run, run))
        if {"retrain", "target"} <= set(runs):
            gold, floor = summary["retrain"]["verbmem_f"], KEEP * summary["target"]["verbmem_r"]
            axes.fill_between([gold - WITHIN, gold + WITHIN], floor, 2, color="#009E73", alpha=0.12, lw=0)
        axes.set(xlabel="VerbMem forget (ROUGE-L F1)", ylabel="VerbMem retain (ROUGE-L F1)")
        axes.grid(alpha=0.3)
    panels[0].set(xlim=(-0.04, 1.06), ylim=(-0.04, 1.06))
    if enlarge:
        panels[1].set(**corner)
        caption += ". Right: the upper left corner, enlarged"
    if {"retrain", "target"} <= set(runs):
        caption += f". Shaded: the goal, within {WITHIN:.2f} of retrain and {KEEP:.0%} of the target's utility"
    if any("verbmem_f_sd" in summary[run] for run in runs):
        caption += ". Bars: sample standard deviation over seeds"
    _shared_legend(figure, panels[0])
    return figure, caption + "."


def _shared_legend(figure: "Figure", axes: "Axes") -> None:
    handles, labels = axes.get_legend_handles_labels()
    columns = min(round(figure.get_figwidth() * 0.8), len(labels))
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False, columnspacing=1.2)


def trajectory_curves(trajectory: dict, summary: Summary) -> Drawn | None:
    keys = ("nll_f", "nll_r")
    series = {
        run: [s for s in trajectory[run] if all(isinstance(s.get(k), int | float) for k in ("step", *keys))]
        for run in ordered(trajectory)
    }
    series = {run: steps for run, steps in series.items() if steps}
    if not series:
        return None
    from matplotlib.ticker import LogLocator

    figure, ((left, right),) = _new(10, 4.2, 1, 2)
    for axes, key, text in ((left, keys[0], "forget"), (right, keys[1], "retain")):
        for run, steps in series.items():
            colour, marker = STYLES.get(run, ("#888888", "h"))
            x, y = [s["step"] for s in steps], [s[key] for s in steps]
            axes.plot(x, y, color=colour, marker=marker, ms=4, lw=1.5, label=RUNS.get(run, run))
        if key in summary.get("retrain", {}):
            axes.axhline(summary["retrain"][key], color="black", ls="--", lw=1, label="retrain (gold)")
        axes.set(title=f"{text} documents", xlabel="step", ylabel="NLL (nats a token, log scale)", yscale="log")
        # without these ticks an axis of less than a decade could show a single number
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3, which="both")
    _shared_legend(figure, left)
    return figure, "NLL while unlearning: left should rise to the dashed line, right should stay on it."


def expert_frequencies(routing: dict) -> Drawn | None:
    if not routing:
        return None
    import numpy
    from matplotlib.patches import Rectangle

    forget, retain = (numpy.asarray(routing[side], dtype=float) for side in ("forget", "retain"))
    layers, experts = forget.shape
    smallest = 1e-4  # without it unused experts would have no finite ratio
    ratio = numpy.log2(numpy.maximum(forget, smallest) / numpy.maximum(retain, smallest)).clip(-3, 3)
    top, far = max(forget.max(), retain.max()), max(1.0, numpy.abs(ratio).max())
    figure, axes = _new(max(6, 1.8 + 0.24 * experts), 3 * (0.75 + 0.26 * layers), 3, 1, sharex=True)
    panels = (
        ("forget: fraction of tokens", forget, {"cmap": "cividis", "vmin": 0, "vmax": top}),
        ("retain: fraction of tokens", retain, {"cmap": "cividis", "vmin": 0, "vmax": top}),
        ("log2 (forget / retain), cut at ±3", ratio, {"cmap": "PuOr", "vmin": -far, "vmax": far}),
    )
    for (title, values, colours), (panel,) in zip(panels, axes, strict=True):
        image = panel.imshow(values, aspect="auto", **colours)
        figure.colorbar(image, ax=panel, pad=0.01, aspect=8)
        panel.set_title(title, fontsize=10, loc="left")
        panel.set(ylabel="layer", yticks=range(0, layers, max(1, layers // 8)))
        for layer, expert in numpy.argwhere(numpy.asarray(routing["selected"], dtype=bool)):
            corner = (expert - 0.5, layer - 0.5)
            panel.add_patch(Rectangle(corner, 1, 1, fill=False, ec="white", lw=4, clip_on=False, zorder=3))
            panel.add_patch(Rectangle(corner, 1, 1, fill=False, ec="#D40000", lw=2, clip_on=False, zorder=4))
    axes[2][0].set(xlabel="expert", xticks=range(0, experts, max(1, experts // 16)))
    caption = "How often forget and retain tokens visit each expert; red frames: experts TRACE selected."
    return figure, caption
