"""Draw pictures from recorded results alone: python -m benchmarks.plots [RUN.json ...]

Beside each named run, or else the newest run of each device, it writes:
    speedup.png     how many times as fast as each rival ours is, with interval and target
    roofline.png    FLOP/s over FLOP per byte, under the two ceilings of the same run
    growth.png      time and extra memory of the expert layer, over tokens and over the share of experts that train
From results/cpu/step.json it draws how the whole step grows:
    step_time.png             time over tokens                       linear
    step_memory_trained.png   extra memory over trained experts      linear
    step_memory_all.png       extra memory over all experts          flat, where the same number trains
From results/cpu/size.json it draws size.png: what each verb takes of a model's size, beside what is planned.
"""

import collections
import itertools
import json
import sys
from collections.abc import Callable
from pathlib import Path

import matplotlib

from benchmarks import record, size_table
from benchmarks.harness import OURS, RESULTS

matplotlib.use("Agg")
from matplotlib import pyplot  # noqa: E402 -- after the choice of a backend without a display

BLUE, GREY = "#1f5fa8", "#8a8a8a"
RIVALS = ("#8a8a8a", "#c2a15a", "#6f9e6e", "#a86f8f", "#4fa3d9", "#b5651d")
STYLES = {
    "ours": ("ours, guard strict", BLUE, "o-"),
    "ours, guard loss": ("ours, guard loss", "#4fa3d9", "s--"),
    "dense": ("transformers + torch", GREY, "^-"),
    "restricted": ("the same, restricted", "#c2a15a", "v--"),
}
PLOTS: dict[str, tuple[str, str, str, str, float, Callable[[dict], float]]] = {
    "time over tokens": (
        "step_time.png",
        "tokens of a step",
        "processor time (s)",
        "milliseconds",
        1e-3,
        lambda row: 2 * row["rows"] * row["length"],
    ),
    "memory over trained experts": (
        "step_memory_trained.png",
        "trained experts of 64",
        "extra memory (GiB)",
        "extra_mib",
        1 / 1024,
        lambda row: row["experts"],
    ),
    "memory over all experts": (
        "step_memory_all.png",
        "experts, 8 of them trained",
        "extra memory (GiB)",
        "extra_mib",
        1 / 1024,
        lambda row: row["changes"]["num_experts"],
    ),
}


def plot(rows: list[dict], growth: str) -> None:
    """Write the picture of one kind of growth of the whole step."""
    file, x_label, y_label, values, unit, x = PLOTS[growth]
    points = sorted((row for row in rows if row["growth"] == growth), key=x)
    figure, axes = pyplot.subplots(figsize=(4.2, 3.0), layout="constrained")
    for name, (label, color, style) in STYLES.items():
        held = [(x(row), row[values][name] * unit) for row in points if name in row[values]]
        if held:
            axes.plot(*zip(*held, strict=True), style, color=color, label=label, markersize=4, linewidth=1.4)
    axes.set(xlabel=x_label, ylabel=y_label, xlim=(0, None), ylim=(0, None))
    _finish(figure, [axes], RESULTS / file)


def draw(path: Path) -> list[Path]:
    """Write the pictures of a run beside it, except those it has no figures for; return their paths."""
    run = json.loads(path.read_text(encoding="utf-8"))
    pictures = {"speedup.png": speedup, "roofline.png": roofline, "growth.png": growth}
    return [path.with_name(file) for file, function in pictures.items() if function(run, path.with_name(file))]


def speedup(run: dict, file: Path) -> bool:
    """Draw bars of each rival's time over ours, for the rows that have a target; return whether there are any."""
    bars = []
    for row in run["rows"]:
        found = [v for v in row.get("verdicts", ()) if "as fast as" in v["what"] or "speed-up" in v["what"]]
        if any(v["target"] for v in found):
            bars += [(f"{row['op']}: {row['name']}", v) for v in found]
    if not bars:
        return False
    figure, axes = pyplot.subplots(figsize=(9.5, 0.9 + 0.24 * len(bars)), layout="constrained")
    labels, previous = [], None
    for i, (title, v) in enumerate(bars):
        what = v["what"].removeprefix("times as fast as ").replace(": speed-up over ", " / ")
        labels.append(f"{title}   {what}" if title != previous else what)
        previous = title
        # bars begin at 1, since the axis is logarithmic
        axes.barh(i, v["value"] - 1, left=1, color=BLUE if v["value"] >= 1 else GREY, height=0.7, alpha=0.85)
        if "low" in v:
            axes.plot([v["low"], v["high"]], [i, i], color="black", linewidth=0.8)
        if v["target"] is not None:
            axes.plot([v["target"]] * 2, [i - 0.45, i + 0.45], color="#c0392b", linewidth=2)
        end = max(1, v["value"], v.get("high", 0), v["target"] or 0)
        axes.text(end * 1.04, i, f"{v['value']:.2f}", va="center", fontsize=7)
    axes.set_yticks(range(len(bars)), labels, fontsize=7)
    axes.invert_yaxis()
    axes.set(xscale="log", xlabel="times as fast as the rival (red: what is asked for)")
    axes.margins(y=0.01)
    low, high = axes.get_xlim()
    axes.set_xlim(min(low, 0.8), high * 1.5)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.xaxis.set_major_locator(matplotlib.ticker.LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(matplotlib.ticker.FormatStrFormatter("%g"))
    axes.xaxis.set_minor_formatter(matplotlib.ticker.NullFormatter())
    _finish(figure, [axes], file, legend=False)
    return True


def roofline(run: dict, file: Path) -> bool:
    """Draw ours and the rivals under the ceilings, one panel for each dtype; return whether there is any."""
    rows = [row for row in run["rows"] if row.get("flops") and row.get("bytes") and "milliseconds" in row]
    dtypes = [d for d in run.get("ceilings", {}).get("flops", {}) if any(row["dtype"] == d for row in rows)]
    if not dtypes:
        return False
    figure, panels = pyplot.subplots(
        1, len(dtypes), figsize=(5.2 * len(dtypes), 4.0), layout="constrained", squeeze=False
    )
    markers = dict(zip(dict.fromkeys(row["op"] for row in rows), itertools.cycle("os^DvP"), strict=False))
    for axes, dtype in zip(panels[0], dtypes, strict=True):
        own = [row for row in rows if row["dtype"] == dtype]
        peak, bandwidth = run["ceilings"]["flops"][dtype], run["ceilings"]["bytes"]
        intensities = [row["flops"] / row["bytes"] for row in own]
        grid = [min(*intensities, peak / bandwidth) / 2, peak / bandwidth, 2 * max(*intensities, peak / bandwidth)]
        axes.plot(grid, [min(peak, bandwidth * x) for x in grid], color="black", linewidth=1.2)
        for op in dict.fromkeys(row["op"] for row in own):
            of_op = [row for row in own if row["op"] == op]
            for ours in (False, True):
                points = [
                    (row["flops"] / row["bytes"], 1e3 * row["flops"] / ms)
                    for row in of_op
                    for name, ms in row["milliseconds"].items()
                    if name.startswith(OURS) == ours
                ]
                if points:
                    style = {"s": 26, "zorder": 3} if ours else {"s": 12, "facecolors": "none", "zorder": 2}
                    axes.scatter(
                        *zip(*points, strict=True),
                        marker=markers[op],
                        edgecolors=BLUE if ours else GREY,
                        **({"color": BLUE} if ours else {}),
                        label=f"{op}: {'ours' if ours else 'rivals'}",
                        **style,
                    )
        axes.set(xscale="log", yscale="log", xlabel="useful FLOP per byte that must move", ylabel="FLOP/s", title=dtype)
    _finish(figure, panels[0], file)
    return True


def growth(run: dict, file: Path) -> bool:
    """Draw the expert layer over tokens and over the trained share, with time above and memory below.

    Returns whether there is anything to draw.
    """
    rows = [row for row in run["rows"] if row["op"] == "expert_layer" and "milliseconds" in row and "share" in row]
    geometries = collections.Counter(row["geometry"] for row in rows)
    if not geometries or max(geometries.values()) < 3:
        return False
    geometry = geometries.most_common(1)[0][0]
    own = [row for row in rows if row["geometry"] == geometry]
    share = collections.Counter(row["share"] for row in own).most_common(1)[0][0]
    tokens = collections.Counter(row["tokens"] for row in own).most_common(1)[0][0]
    columns = (
        ("tokens", f"tokens, {share:.0%} of the experts train", [r for r in own if r["share"] == share]),
        ("share", f"share of the experts that train, {tokens} tokens", [r for r in own if r["tokens"] == tokens]),
    )
    figure, panels = pyplot.subplots(2, 2, figsize=(9.0, 6.0), layout="constrained", sharey="row")
    names = list(dict.fromkeys(name for row in own for name in row["milliseconds"]))
    colors = {name: BLUE if name == OURS else RIVALS[i % len(RIVALS)] for i, name in enumerate(names)}
    for i, (key, label, points) in enumerate(columns):
        for j, (values, what) in enumerate((("milliseconds", "time (ms)"), ("extra_mib", "extra memory (MiB)"))):
            axes = panels[j][i]
            for name in names:
                held = sorted((row[key], row[values][name]) for row in points if name in row.get(values, {}))
                if held:
                    axes.plot(
                        *zip(*held, strict=True),
                        "o-" if name == OURS else "^-",
                        color=colors[name],
                        label=name,
                        markersize=4,
                        linewidth=1.4,
                    )
            axes.set(xlim=(0, None), ylim=(0, None), xlabel=label, ylabel="" if i else what)
    figure.suptitle(f"expert layer, {geometry}: forward, backward and masked AdamW", fontsize=10)
    _finish(figure, panels.flat, file, legend=panels[0][0])
    return True


def size(run: dict, file: Path) -> None:
    """Draw what was measured of each stage, what is planned for it, and its limit."""
    rows, gib = size_table.stages(run), 1 << 30
    figure, axes = pyplot.subplots(figsize=(6.4, 0.9 + 0.4 * len(rows)), layout="constrained")
    for i, row in enumerate(rows):
        axes.barh(i + 0.2, row["planned"] / gib, height=0.35, color=GREY, label="" if i else "planned")
        axes.barh(i - 0.2, row["peak"] / gib, height=0.35, color=BLUE, label="" if i else "measured, with libraries")
        axes.plot([row["limit"] / gib] * 2, [i - 0.42, i + 0.42], color="#c0392b", label="" if i else "limit")
    axes.set_yticks(range(len(rows)), [row["stage"] for row in rows], fontsize=8)
    axes.invert_yaxis()
    axes.set(xlabel="GiB resident", xlim=(0, 1.45 * max(row["limit"] for row in rows) / gib))
    _finish(figure, [axes], file)


def _finish(figure, all_axes, file: Path, *, legend: object = True) -> None:
    for axes in all_axes:
        axes.spines[["top", "right"]].set_visible(False)
        if legend is True or legend is axes:
            axes.legend(frameon=False, fontsize=7)
    figure.savefig(file, dpi=130)
    pyplot.close(figure)


def main(*named: str) -> None:
    newest = [record.latest(device)[0] for device in record.runs()]
    for path in map(Path, named) if named else newest:
        print(*draw(path), sep="\n")
    step = RESULTS / "step.json"
    if step.exists() and not named:
        rows = json.loads(step.read_text(encoding="utf-8"))["results"]
        for kind in PLOTS:
            if any(row["growth"] == kind for row in rows):
                plot(rows, kind)
    if not named and (run := size_table.read()) is not None:
        size(run, RESULTS / size_table.FIGURE)


if __name__ == "__main__":
    main(*sys.argv[1:])
