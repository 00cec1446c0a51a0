"""From the numbers of a run folder to report.md and its figures.

A folder holds `summary.json` (run name -> flat metrics; with several seeds the mean, and `<key>_sd` the
sample standard deviation) and, where there are any, `seeds.json` (`corpus`; `results`: seed -> run name ->
metrics), `trajectory.json` (run name -> list of {"step", ...}) and `routing.json` (`forget`, `retain`
frequencies and `selected`, all [L, E]; `inactive` says why TRACE selected none).
"""

import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

RUNS = {  # in the order of every table and legend
    "target": "target (to unlearn)",
    "retrain": "retrain (gold)",
    "graddiff": "GradDiff",
    "npo": "NPO",
    "trace": "TRACE",
    "wagle": "WAGLE",
    "mollm": "MOLLM",
    "combined": "three levers",
}
LEVERS = {
    "trace": "TRACE (where in the data)",
    "wagle": "WAGLE (where in the model)",
    "mollm": "MOLLM (which way)",
    "combined": "all three",
}
BASELINE = "npo"  # the forget objective the levers are added to
COLUMNS = {  # key: heading, digits
    "verbmem_f": ("VerbMem forget ↓", 3),
    "knowmem_f": ("KnowMem forget ↓", 3),
    "extraction_f": ("extracted ↓", 3),
    "verbmem_r": ("VerbMem retain ↑", 3),
    "knowmem_r": ("KnowMem retain ↑", 3),
    "privleak": ("PrivLeak % →0", 1),
    "nll_f": ("NLL forget →R", 2),
    "nll_r": ("NLL retain ↓", 2),
    "routing_drift": ("routing drift", 3),
    "seconds": ("seconds", 1),
}
LEGEND = """\
↓ lower and ↑ higher is better; →0 should be zero; →R should come close to the retrained model's value. \
A forgotten text scores like one never seen: below the retrained model there is nothing left to gain.

* **VerbMem**: ROUGE-L F1 (0 to 1) of the greedy continuation against the true one.
* **KnowMem**: a cloze form, the fraction (0 to 1) of a document's longest words filled in given what \
precedes them; not MUSE's question answering.
* **extracted**: fraction of forget documents whose first tokens come back exactly, given their title.
* **PrivLeak**: 100 (AUC - AUC of retrain) / AUC of retrain, in percent, of Min-40 % scores, forget against \
unseen documents; negative is under-unlearned, positive over-unlearned.
* **NLL**: nats a token.
* **routing drift**: total variation (0 to 1) of the experts' frequencies on forget text, before and after.
* **retain** is measured on retain documents that unlearning did not see, where the run has such.
* **seconds**: training for target and retrain (loading, if cached); preparation and steps for the others.
"""
WITHIN, KEEP, CLEAR = (
    0.10,
    0.95,
    0.01,
)  # the goal on forget and retain VerbMem; the least difference that counts

Summary = dict[str, dict[str, float]]


@dataclass(frozen=True)
class Content:
    """What the embedded experiment found: metrics by seed and run; trajectories and routing of one seed."""

    corpus: str
    results: dict[int, Summary]
    trajectories: dict[str, list[dict]] = field(default_factory=dict)
    routing: dict = field(default_factory=dict)


def write_demo(folder: str | Path, content: Content) -> Summary:
    """Write the JSON files, report.md and the figures of `content` into `folder`; the summary over seeds."""
    folder = Path(folder)
    summary = summarise(content.results)
    seeds = {"corpus": content.corpus, "results": content.results}
    routing = {key: as_list(table) for key, table in content.routing.items()}
    files = {"summary": summary, "seeds": seeds, "trajectory": content.trajectories, "routing": routing}
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in files.items():
        (folder / f"{name}.json").write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    write(folder)
    return summary


def write(folder: str | Path) -> str:
    """Build report.md and the figures of a run folder from its JSON files; the paths written, one a line.

    Raises ValueError naming the file if `summary.json` is missing or a file is not what it should be.
    """
    folder = Path(folder)
    summary = _read(folder / "summary.json")
    if not summary or not all(isinstance(metrics, dict) for metrics in summary.values()):
        raise ValueError(f"{folder / 'summary.json'}: expected an object of run name -> metrics")
    seeds, trajectory, routing = (
        _read(folder / f"{name}.json", optional=True) for name in ("seeds", "trajectory", "routing")
    )
    made = _figures(folder / "figures", summary, trajectory, routing)
    path = folder / "report.md"
    path.write_text(markdown(summary, seeds, routing, made), encoding="utf-8")
    return "\n".join(str(p) for p in (path, *(folder / "figures" / name for name in made)))


def summarise(results: dict[int, Summary]) -> Summary:
    """Mean over seeds of every metric that all have and, with two seeds or more, `<key>_sd`."""
    runs = list(dict.fromkeys(run for summary in results.values() for run in summary))
    summary: Summary = {}
    for run in runs:
        each = [s[run] for s in results.values() if run in s]
        keys = [key for key in each[0] if all(key in metrics for metrics in each)]
        summary[run] = {key: statistics.fmean(m[key] for m in each) for key in keys}
        if len(each) > 1:
            summary[run] |= {f"{key}_sd": statistics.stdev(m[key] for m in each) for key in keys}
    return summary


def ordered(summary: dict) -> list[str]:
    """Run names in the order of `RUNS`, unknown ones last."""
    return [r for r in RUNS if r in summary] + [r for r in summary if r not in RUNS]


def table(summary: Summary, *, markdown: bool = False, keys: Sequence[str] = ()) -> str:
    """The metrics as a text table, columns aligned; as Markdown if asked. `keys` are the columns, if not the usual."""
    keys = keys or [key for key in COLUMNS if any(key in metrics for metrics in summary.values())]
    rows = [["run", *(COLUMNS.get(key, (key,))[0] for key in keys)]]
    for run in ordered(summary):
        rows.append([RUNS.get(run, run), *(_cell(summary[run], key) for key in keys)])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    padded = [
        [cell.rjust(w) if i else cell.ljust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))]
        for row in rows
    ]
    if not markdown:
        return "\n".join("  ".join(row).rstrip() for row in padded)
    rule = ["-" * w if not i else "-" * (w - 1) + ":" for i, w in enumerate(widths)]
    return "\n".join(f"| {' | '.join(row)} |" for row in [padded[0], rule, *padded[1:]])


def markdown(summary: Summary, seeds: dict, routing: dict, made: dict[str, str]) -> str:
    """The text of report.md; `made` maps figure files to captions."""
    results = {seed: s for seed, s in seeds.get("results", {}).items() if s}
    parts = [f"# Unlearning report{': ' + seeds['corpus'] if seeds.get('corpus') else ''}"]
    if len(results) > 1:
        parts.append(f"Mean ± sample standard deviation over seeds {', '.join(map(str, results))}.")
    elif results:
        parts.append(f"One seed ({next(iter(results))}): no spread is known.")
    parts += [table(summary, markdown=True), LEGEND.rstrip(), "## Verdict", *_verdict(summary, results)]
    if routing:
        parts.append(_selection(routing))
    if made:
        first = f"Trajectories and routing are those of seed {next(iter(results))}." if results else ""
        parts += ["## Figures", *([first] if first else [])]
        parts += [f"![{caption}](figures/{name})\n\n{caption}" for name, caption in made.items()]
    return "\n\n".join(parts) + "\n"


def _verdict(summary: Summary, results: dict[str, Summary]) -> list[str]:
    lines = []
    if "retrain" not in summary:
        return [
            "The reference run is missing: without a model retrained on the retain documents alone there is "
            "no PrivLeak, and nobody knows how low the forget metrics should go. Give it with `reference`."
        ]
    gold, target = summary["retrain"], summary.get("target")
    lines.append(
        f"Retrain, the reference, has forget VerbMem {gold['verbmem_f']:.3f} and retain VerbMem "
        f"{gold['verbmem_r']:.3f}. The goal: forget VerbMem at most {WITHIN:.2f} away from that, and at "
        f"least {KEEP:.0%} of the target's retain VerbMem."
    )
    goals = []
    for run in ordered(summary):
        if run in ("target", "retrain"):
            continue
        away = abs(summary[run]["verbmem_f"] - gold["verbmem_f"])
        text, reached = f"forget VerbMem {away:.3f} away from retrain's", away <= WITHIN
        if target and target["verbmem_r"]:
            kept = summary[run]["verbmem_r"] / target["verbmem_r"]
            text += f", {kept:.1%} of retain VerbMem kept"
            reached = reached and kept >= KEEP
        goals.append(f"* {RUNS.get(run, run)}: {text}: **{'reached' if reached else 'not reached'}**.")
    lines.append("\n".join(goals))
    levers = [_lever(lever, summary, results) for lever in LEVERS if lever in summary and BASELINE in summary]
    if levers:
        lines.append(
            f"Does a lever help over {RUNS[BASELINE]} here? The distance is that to retrain in the plane of "
            "forget and retain VerbMem, paired by seed.\n\n" + "\n".join(levers)
        )
    return lines


def _lever(lever: str, summary: Summary, results: dict[str, Summary]) -> str:
    complete = [s for s in results.values() if {lever, BASELINE, "retrain"} <= s.keys()] or [summary]
    gains = [_distance(s, BASELINE) - _distance(s, lever) for s in complete]
    gain = statistics.fmean(gains)
    spread = statistics.stdev(gains) if len(gains) > 1 else 0.0
    shown = f"{gain:+.3f}" + (f" ± {spread:.3f}" if len(gains) > 1 else "")
    threshold = max(CLEAR, spread)
    if gain > threshold:
        word = "helps"
    elif gain < -threshold:
        word = "hurts"
    else:
        word = "does not help on this data (no difference beyond the spread)"
    return f"* {LEVERS[lever]} **{word}**: distance shorter by {shown}."


def _distance(summary: Summary, run: str) -> float:
    gold = summary["retrain"]
    return math.hypot(*(summary[run][key] - gold[key] for key in ("verbmem_f", "verbmem_r")))


def _selection(routing: dict) -> str:
    chosen = [
        f"layer {layer} expert {expert} ({f:.3f} of forget, {r:.3f} of retain tokens)"
        for layer, (marks, forget, retain) in enumerate(
            zip(routing["selected"], routing["forget"], routing["retain"], strict=True)
        )
        for expert, (mark, f, r) in enumerate(zip(marks, forget, retain, strict=True))
        if mark
    ]
    if not chosen:
        return f"**TRACE inactive**: {routing.get('inactive', 'no forget-critical expert')}."
    return f"TRACE's forget-critical experts ({len(chosen)}): {'; '.join(chosen)}."


def _cell(metrics: dict[str, float], key: str) -> str:
    value, digits = metrics.get(key), COLUMNS.get(key, (key, 3))[1]
    if value is None or math.isnan(value):
        return "–"
    spread = metrics.get(f"{key}_sd")
    return f"{value:.{digits}f}" + (f" ± {spread:.{digits}f}" if spread is not None else "")


def as_list(table) -> object:
    """Plain values of a tensor; anything else as it is."""
    return table.tolist() if hasattr(table, "tolist") else table


def _read(path: Path, *, optional: bool = False) -> dict:
    if not path.is_file():
        if optional:
            return {}
        raise ValueError(f"{path}: no such file; expected the metrics of a run")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: expected JSON; {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a JSON object; got {type(content).__name__}")
    return content


# Figures. Okabe and Ito's colours, told apart by the colour-blind, and a marker of its own for every run.

STYLES = {
    "target": ("#000000", "X"), "retrain": ("#000000", "*"), "graddiff": ("#E69F00", "o"),
    "npo": ("#56B4E9", "s"), "trace": ("#009E73", "^"), "wagle": ("#0072B2", "v"), "mollm": ("#D55E00", "D"),
    "combined": ("#CC79A7", "P"),
}  # fmt: skip


def _figures(folder: Path, summary: Summary, trajectory: dict, routing: dict) -> dict[str, str]:
    """Draw what there is data for into `folder`; file names and captions."""
    made = {}
    drawings = (
        ("pareto.png", _pareto, (summary,)),
        ("trajectories.png", _trajectories, (trajectory, summary)),
        ("experts.png", _experts, (routing,)),
    )
    for name, draw, arguments in drawings:
        if drawn := draw(*arguments):
            figure, made[name] = drawn
            folder.mkdir(parents=True, exist_ok=True)
            figure.savefig(folder / name, dpi=150)
    return made


def _new(width: float, height: float, rows: int = 1, columns: int = 1, **keywords):
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure  # not pyplot: nothing global, nothing to close

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, squeeze=False, **keywords)


def _pareto(summary: Summary):
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
            if run == "retrain":  # hollow and large: other runs should land on it
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


def _shared_legend(figure, axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    columns = min(round(figure.get_figwidth() * 0.8), len(labels))
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False, columnspacing=1.2)


def _trajectories(trajectory: dict, summary: Summary):
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
        # less than a decade would show a single number
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3, which="both")
    _shared_legend(figure, left)
    return figure, "NLL while unlearning: left should rise to the dashed line, right should stay on it."


def _experts(routing: dict):
    if not routing:
        return None
    import numpy
    from matplotlib.patches import Rectangle

    forget, retain = (numpy.asarray(routing[side], dtype=float) for side in ("forget", "retain"))
    layers, experts = forget.shape
    smallest = 1e-4  # unused experts have no finite ratio
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
