"""Three small plots of how the step grows, from results/cpu/step.json: python -m benchmarks.plots

step_time.png             time over tokens                       linear
step_memory_trained.png   extra memory over trained experts      linear
step_memory_all.png       extra memory over all experts          flat, where the same number trains
"""

import json
from collections.abc import Callable

import matplotlib

from benchmarks.harness import RESULTS

matplotlib.use("Agg")
from matplotlib import pyplot  # noqa: E402 -- after the choice of a backend without a display

GREY = "#8a8a8a"
STYLES = {
    "ours": ("ours, guard strict", "#1f5fa8", "o-"),
    "ours, guard loss": ("ours, guard loss", "#4fa3d9", "s--"),
    "dense": ("transformers + torch", GREY, "^-"),
    "restricted": ("the same, restricted", "#c2a15a", "v--"),
}
PLOTS: dict[str, tuple[str, str, str, str, float, Callable[[dict], float]]] = {
    "time over tokens": (
        "step_time.png", "tokens of a step", "processor time (s)", "milliseconds", 1e-3,
        lambda row: 2 * row["rows"] * row["length"],
    ),
    "memory over trained experts": (
        "step_memory_trained.png", "trained experts of 64", "extra memory (GiB)", "extra_mib", 1 / 1024,
        lambda row: row["experts"],
    ),
    "memory over all experts": (
        "step_memory_all.png", "experts, 8 of them trained", "extra memory (GiB)", "extra_mib", 1 / 1024,
        lambda row: row["changes"]["num_experts"],
    ),
}  # fmt: skip


def plot(rows: list[dict], growth: str) -> None:
    """Write the picture of one kind of growth."""
    file, x_label, y_label, values, unit, x = PLOTS[growth]
    points = sorted((row for row in rows if row["growth"] == growth), key=x)
    figure, axes = pyplot.subplots(figsize=(4.2, 3.0), layout="constrained")
    for name, (label, color, style) in STYLES.items():
        held = [(x(row), row[values][name] * unit) for row in points if name in row[values]]
        if held:
            axes.plot(*zip(*held, strict=True), style, color=color, label=label, markersize=4, linewidth=1.4)
    axes.set(xlabel=x_label, ylabel=y_label, xlim=(0, None), ylim=(0, None))
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(RESULTS / file, dpi=160)
    pyplot.close(figure)


def main() -> None:
    rows = json.loads((RESULTS / "step.json").read_text())["results"]
    for growth in PLOTS:
        if any(row["growth"] == growth for row in rows):
            plot(rows, growth)


if __name__ == "__main__":
    main()
