"""Write the table, figures and one JSON of the study from the parts that are there.

Comparisons are paired: the difference between two runs on the same models and documents, its mean over seeds, and a
95 % interval by Student's t (a bootstrap of five values would be too narrow). A run that never reaches the level of
forgetting is counted as not reached and enters no comparison.
"""

import json
import math
import statistics
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

import matplotlib

from benchmarks import stamp
from benchmarks.study import Entry, load, record
from benchmarks.study_reading import clear, goal, interval, paired, reading
from benchmarks.study_run import NEAR

matplotlib.use("Agg")
from matplotlib import pyplot, ticker  # noqa: E402 -- after the choice of a backend without a display

LEVEL = "retrain"
BLUE, ORANGE, GREY = "#1f5fa8", "#c2682a", "#8a8a8a"
#: metric -> its name; utilities are of retain documents held out
UTILITIES = {
    "verbmem_r": "VerbMem",
    "knowmem_r": "KnowMem",
    "nll_r": "NLL",
    "nll_c": "NLL, critical tokens",
}


class Found:
    """Results that are there, by table, case, baseline and variant."""

    def __init__(self, entries: list[Entry], parts: Path):
        self.cells: dict[tuple, dict[int, dict]] = defaultdict(dict)
        self.models: dict[tuple, dict[int, dict]] = defaultdict(dict)
        self.wanted = len({e.spec for e in entries})
        self.runs: dict[str, dict] = {}  # key -> result, of runs and of the models they start from
        there = set()
        for e in entries:
            result, models = load(parts, e.spec), load(parts, e.spec.models)
            if models is not None:
                self.models[e.group, e.case][e.spec.seed] = self.runs[e.spec.models.key] = models
            if result is not None:
                there.add(e.spec)
                self.cells[e.group, e.case, e.baseline, e.variant][e.spec.seed] = self.runs[e.spec.key] = result
        self.there = len(there)
        self.seconds = sum(r["seconds"] for r in self.runs.values())

    def at(self, key: tuple, metric: str, level: str = LEVEL) -> dict[int, float]:
        """Return seed -> value at the level of forgetting, for the seeds that reached it."""
        matched = {seed: result["matched"][level] for seed, result in self.cells.get(key, {}).items()}
        return {seed: m[metric] for seed, m in matched.items() if m is not None and metric in m}

    def difference(self, key: tuple, other: tuple, metric: str, level: str = LEVEL) -> dict:
        """Return the `paired` differences key - other over the seeds that both have."""
        ours, theirs = self.at(key, metric, level), self.at(other, metric, level)
        return paired(ours[seed] - theirs[seed] for seed in sorted(ours.keys() & theirs.keys()))

    def relative(self, key: tuple, other: tuple, metric: str, level: str = LEVEL) -> dict:
        """Return the `paired` differences key / other - 1, in percent."""
        ours, theirs = self.at(key, metric, level), self.at(other, metric, level)
        return paired(100 * (ours[s] / theirs[s] - 1) for s in sorted(ours.keys() & theirs.keys()) if theirs[s])

    def cases(self, group: str) -> list[str]:
        """Return the cases of a table, in the order of the study."""
        return list(dict.fromkeys(case for g, case, *_ in self.cells if g == group))

    def keys(self, group: str, case: str) -> list[tuple]:
        """Return baseline and variant of the cells of one case."""
        return list(dict.fromkeys(key[2:] for key in self.cells if key[:2] == (group, case)))


def write(out: Path, entries: list[Entry], parts: Path, name: str) -> str:
    """Write `study.md`, `study.json`, the figures and `runs.jsonl` into `out`; return the table's text."""
    found = Found(entries, parts)
    out.mkdir(parents=True, exist_ok=True)
    command = "python -m benchmarks.study" + (" --small" if name == "small" else "")
    lines = [
        "# What each lever buys",
        "",
        f"Made by `{command}` and the same with `--report`; {found.there} of {found.wanted} runs, "
        f"{found.seconds / 60:.0f} minutes of one thread. Every run ends where "
        "VerbMem of the forget documents falls to the retrained model's; utility is of retain documents that "
        "unlearning never saw. ± is a 95 % t interval over seeds, of paired differences to the plain baseline; "
        f'"at +{NEAR}" compares so far above that level, on the way there.',
        "",
    ]
    data = {"command": command, "runs": found.there, "of": found.wanted, "near": NEAR, "made_with": _made_with()}
    for title, section in (("main", _main), ("mismatch", _mismatch), ("ablation", _ablation)):
        text, data[title] = section(found)
        lines += text
    lines += ["## Reading", "", *(f"* {sentence}" for sentence in reading(data)), ""]
    data["figures"] = {}
    for file, caption, draw in FIGURES:
        figure = draw(data)
        if figure is not None:
            lines += [f"![{caption}]({file})", "", caption, ""]
            data["figures"][file] = caption
            figure.savefig(out / file, dpi=160)
            pyplot.close(figure)
    text = "\n".join(lines)
    (out / "study.md").write_text(text, encoding="utf-8")
    (out / "study.json").write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    record(out, found.runs)
    return text


def _made_with() -> dict:
    """Return versions, commit and processor; this is no stamp, which a change of kernels would make stale."""
    keep = ("python", "versions", "commit", "uncommitted_changes")
    return {key: value for key, value in stamp.stamp().items() if key in keep} | {"device": "cpu"}


def _main(found: Found) -> tuple[list[str], list[dict]]:
    lines, rows = [], []
    for case in found.cases("main"):
        strongest = {level: _strongest(found, case, level) for level in (LEVEL, "near")}
        models = found.models["main", case].values()
        target, retrain = (
            {k: statistics.fmean(m["models"][which][k] for m in models) for k in ("verbmem_f", "verbmem_r", "nll_r")}
            for which in ("target", "retrain")
        )
        lines += [
            f"## {case}", "", *_matrix(found, case), "",
            f"VerbMem forget / retain: target {target['verbmem_f']:.3f} / {target['verbmem_r']:.3f}, retrained "
            f"{retrain['verbmem_f']:.3f} / {retrain['verbmem_r']:.3f}. Strongest plain baseline: {strongest[LEVEL]}, "
            f"at +{NEAR} {strongest['near']}.", "",
            "| baseline | variant | reached | steps | VerbMem | Δ | against strongest, % | Δ at +0.1 | KnowMem | NLL | "
            "NLL critical tokens | Δ | PrivLeak |",
            "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
        ]  # fmt: skip
        for baseline, variant in found.keys("main", case):
            key, base = ("main", case, baseline, variant), ("main", case, baseline, "plain")
            row = {"case": case, "baseline": baseline, "variant": variant, "runs": len(found.cells[key])}
            row["reached"] = len(found.at(key, "step"))
            row |= {m: paired(found.at(key, m).values()) for m in ("step", *UTILITIES, "privleak")}
            row["verbmem_r_near"] = paired(found.at(key, "verbmem_r", "near").values())
            row["difference"] = {m: found.difference(key, base, m) for m in UTILITIES}
            row["difference_near"] = {m: found.difference(key, base, m, "near") for m in UTILITIES}
            for level, best in strongest.items():
                if best is not None:
                    against = found.relative(key, ("main", case, best, "plain"), "verbmem_r", level)
                    row["against_strongest" + ("" if level == LEVEL else "_near")] = against
            rows.append(row)
            lines.append(_row(row))
        lines += ["", goal([r for r in rows if r["case"] == case]), ""]
    return lines, rows


def _strongest(found: Found, case: str, level: str) -> str | None:
    """Return the plain baseline that keeps the most VerbMem at a level."""
    plain = {b: found.at(("main", case, b, v), "verbmem_r", level) for b, v in found.keys("main", case) if v == "plain"}
    reached = {b: statistics.fmean(values.values()) for b, values in plain.items() if values}
    return max(reached, key=reached.get) if reached else None


def _matrix(found: Found, case: str) -> list[str]:
    """Return VerbMem retain at the level, baselines down and levers across, with the count of seeds that reached it."""
    keys = found.keys("main", case)
    baselines, variants = (list(dict.fromkeys(k[i] for k in keys)) for i in (0, 1))
    lines = ["| VerbMem retain | " + " | ".join(variants) + " |", "|---" * (len(variants) + 1) + "|"]
    for baseline in baselines:
        values = [paired(found.at(("main", case, baseline, v), "verbmem_r").values()) for v in variants]
        lines.append(f"| {baseline} | " + " | ".join(f"{_mean(v)} ({v['n']})" for v in values) + " |")
    return lines


def _row(row: dict) -> str:
    plain = row["variant"] == "plain"
    cells = [
        row["baseline"], row["variant"], f"{row['reached']}/{row['runs']}", _mean(row["step"], 0),
        _mean(row["verbmem_r"]), "" if plain else interval(row["difference"]["verbmem_r"]),
        interval(row.get("against_strongest"), 1), "" if plain else interval(row["difference_near"]["verbmem_r"]),
        _mean(row["knowmem_r"]), _mean(row["nll_r"]), _mean(row["nll_c"]),
        "" if plain else interval(row["difference"]["nll_c"]), _mean(row["privleak"], 0),
    ]  # fmt: skip
    return "| " + " | ".join(cells) + " |"


def _mismatch(found: Found) -> tuple[list[str], list[dict]]:
    """Compare TRACE with plain, seed by seed, and list the measures of its premise."""
    rows, lines = [], []
    if found.cases("mismatch"):
        lines = [
            "## Mismatch: what TRACE changes",
            "",
            "Differences TRACE - plain. Seeds: those in which an expert qualified, of all. f^F/f^R is the mean over "
            "the experts selected, ESS the effective sample size of the token weights over the number of tokens; "
            '"seldom": unlearning sees the retain documents that use the forget-critical experts least. Gradient '
            "norms are those of one expert of the unchanged model: retain over forget, in critical experts / in "
            "others, and the factor TRACE's weights put on the retain gradient of critical experts.",
            "",
            "| case | baseline | seeds | selected | f^F/f^R | ESS | retain / forget gradient | factor | Δ VerbMem | "
            "Δ VerbMem at +0.1 | Δ NLL | Δ NLL critical tokens |",
            "|---|---|---|---|---|---|---|---|---|---|---|---|",
        ]
    for case in found.cases("mismatch"):
        for baseline in dict.fromkeys(b for b, _ in found.keys("mismatch", case)):
            results = found.cells.get(("mismatch", case, baseline, "TRACE"), {})
            own = [_mismatch_row(found, case, baseline, seed) for seed in results if results[seed]["trace"]]
            selected, ratio, ess = (paired(r[k] for r in own) for k in ("selected", "ratio", "ess"))
            known = [(r["target"], r["forget_gradient"]) for r in own if r["forget_gradient"]]
            critical, others = (
                paired(retain["uniform"][kind] / forget[kind] for retain, forget in known)
                for kind in ("critical", "others")
            )
            factor = paired(g["weighted"]["critical"] / g["uniform"]["critical"] for g, _ in known)
            cells = [
                case, baseline, f"{len(own)}/{len(results)}", _mean(selected, 1), _mean(ratio, 2), _mean(ess, 2),
                f"{_mean(critical, 2)} / {_mean(others, 2)}", _mean(factor, 2),
            ]  # fmt: skip
            for metric in ("verbmem_r " + LEVEL, "verbmem_r near", "nll_r " + LEVEL, "nll_c " + LEVEL):
                cells.append(interval(paired(r[metric][1] - r[metric][0] for r in own if metric in r)))
            lines.append("| " + " | ".join(cells) + " |")
            rows += own
    return [*lines, ""], rows


def _mismatch_row(found: Found, case: str, baseline: str, seed: int) -> dict:
    """Return one seed's [plain, TRACE] values for each metric and level, its mismatch and its gradient norms."""
    key, base = (("mismatch", case, baseline, variant) for variant in ("TRACE", "plain"))
    result, models = found.cells[key][seed], found.models["mismatch", case][seed]
    row = {"case": case, "baseline": baseline, "seed": seed, **result["trace"]}
    for level in ("near", LEVEL):
        for metric in UTILITIES:
            ours, theirs = found.at(key, metric, level), found.at(base, metric, level)
            if seed in ours and seed in theirs:
                row[f"{metric} {level}"] = [theirs[seed], ours[seed]]
    row |= {"gradients": result.get("retain_gradient"), "target": models.get("retain_gradient")}
    row["forget_gradient"] = None
    if models["forget_gradient"]:
        mean = statistics.fmean(models["forget_gradient"])
        row["forget_gradient"] = {"critical": mean, "others": models["forget_gradient_others"]}
    return row


def _ablation(found: Found) -> tuple[list[str], list[dict]]:
    lines, rows = [], []
    for case in found.cases("ablation"):
        lines += [
            f"## Ablations, {case}",
            "",
            "Δ against the same baseline plain; uniform token weights are that baseline.",
            "",
            "| baseline | variant | reached | VerbMem | Δ | Δ at +0.1 | Δ NLL critical tokens | Δ at +0.1 | ESS |",
            "|---|---|---|---|---|---|---|---|---|",
        ]
        for baseline, variant in found.keys("ablation", case):
            key = ("ablation", case, baseline, variant)
            seldom = variant.startswith("TRACE") or variant.endswith("seldom")
            base = ("ablation", case, baseline, "plain, seldom") if seldom else ("main", case, baseline, "plain")
            row = {"case": case, "baseline": baseline, "variant": variant, "runs": len(found.cells[key])}
            row |= {"reached": len(found.at(key, "step")), "verbmem_r": paired(found.at(key, "verbmem_r").values())}
            row["difference"] = {m: found.difference(key, base, m) for m in UTILITIES}
            row["difference_near"] = {m: found.difference(key, base, m, "near") for m in UTILITIES}
            row["ess"] = paired(r["trace"]["ess"] for r in found.cells[key].values() if r.get("trace"))
            rows.append(row)
            deltas = [row[of][m] for m in ("verbmem_r", "nll_c") for of in ("difference", "difference_near")]
            lines.append(
                f"| {baseline} | {variant} | {row['reached']}/{row['runs']} | {_mean(row['verbmem_r'])} | "
                + " | ".join("" if key == base else interval(d) for d in deltas)
                + f" | {_mean(row['ess'], 2)} |"
            )
        lines.append("")
    return lines, rows


def _mean(value: dict, digits: int = 3) -> str:
    return "–" if value["mean"] is None else f"{value['mean']:.{digits}f}"


def _draw_levers(data: dict):
    """Draw paired differences in VerbMem at both levels, a panel for each corpus."""
    levels = {
        "difference_near": (0.16, f"{NEAR} above the retrained model's", "o"),
        "difference": (-0.16, "at the retrained model's", "s"),
    }
    rows = [r for r in data["main"] if r["variant"] != "plain" and any(r[k]["verbmem_r"]["n"] for k in levels)]
    cases = list(dict.fromkeys(r["case"] for r in rows))
    if not cases:
        return None
    figure, panels = _panels(len(cases), height=max(3.0, 0.26 * len(rows) / len(cases) + 1))
    for axes, case in zip(panels, cases, strict=True):
        own = [r for r in rows if r["case"] == case][::-1]
        for key, (shift, _, marker) in levels.items():
            for y, r in enumerate(own):
                value = r[key]["verbmem_r"]
                if value["n"]:
                    color, inside = BLUE if clear(value) else GREY, None if marker == "o" else "white"
                    axes.errorbar(
                        value["mean"], y + shift, xerr=value["half"], fmt=marker, markersize=4, color=color, mfc=inside
                    )
        axes.set_yticks(range(len(own)), [f"{r['baseline']} + {r['variant']}" for r in own], fontsize=7)
        axes.axvline(0, color="black", linewidth=0.8)
        axes.set_ylim(-0.7, len(own) - 0.3)
        axes.set_xlim(*_around(r[key]["verbmem_r"] for r in own for key in levels))
        axes.set(xlabel="VerbMem retain, with lever - without", title=case)
    for _, name, marker in levels.values():
        panels[0].plot([], [], marker, color=GREY, mfc=None if marker == "o" else "white", markersize=4, label=name)
    figure.legend(frameon=False, fontsize=8, loc="outside lower center", ncols=2)
    return figure


def _around(values: Iterable[dict]) -> tuple[float, float]:
    """Return limits that hold every mean; an interval of two seeds may be cut."""
    means = [v["mean"] for v in values if v["n"]]
    return min(0, *means) - 0.1, max(0, *means) + 0.1


def _draw_mismatch(data: dict):
    """Draw TRACE's effect on NLL over mismatch and over effective sample size; below 0 it helps."""
    rows = [r for r in data["mismatch"] if "nll_c near" in r]
    if not rows:
        return None
    figure, panels = _panels(2)
    for axes, (x, label) in zip(
        panels, (("ratio", "f^F / f^R of the selected experts"), ("ess", "ESS / tokens")), strict=True
    ):
        for metric, color, name in (("nll_r", GREY, "all tokens"), ("nll_c", BLUE, "tokens of critical experts")):
            effects = [math.log(b / a) for a, b in (r[f"{metric} near"] for r in rows)]
            axes.plot([r[x] for r in rows], effects, "o", color=color, markersize=4, alpha=0.7, label=name)
        axes.axhline(0, color="black", linewidth=0.8)
        axes.set(xlabel=label, ylabel="log of retain NLL, TRACE / plain")
    panels[0].legend(frameon=False, fontsize=8)
    return figure


def _draw_norms(data: dict):
    """Draw the mean retain-gradient norm per expert, critical and other, without and with TRACE's weights."""
    panels_of = {"target": "unchanged model", "gradients": "end of the TRACE run"}
    rows = {k: [r[k] for r in data["mismatch"] if r.get(k) and "weighted" in r[k]] for k in panels_of}
    if not any(rows.values()):
        return None
    figure, panels = _panels(2)
    for axes, (where, title) in zip(panels, panels_of.items(), strict=True):
        for kind, color in (("others", GREY), ("critical", ORANGE)):
            points = [(r["uniform"][kind], r["weighted"][kind]) for r in rows[where]]
            axes.loglog(
                *zip(*points, strict=True),
                "o",
                color=color,
                markersize=4,
                alpha=0.7,
                label={"others": "other", "critical": "critical"}[kind] + " experts",
            )
        low, high = min(axes.get_xlim()[0], axes.get_ylim()[0]), max(axes.get_xlim()[1], axes.get_ylim()[1])
        axes.plot([low, high], [low, high], color="black", linewidth=0.8)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(ticker.LogLocator(subs=(1,)))
            axis.set_major_formatter(ticker.FormatStrFormatter("%g"))
            axis.set_minor_locator(ticker.NullLocator())
        axes.set(xlabel="retain-gradient norm, uniform weights", ylabel="with TRACE's weights", title=title)
    panels[0].legend(frameon=False, fontsize=8)
    return figure


def _panels(count: int, height: float = 3.2):
    figure, panels = pyplot.subplots(1, count, figsize=(4.2 * count, height), layout="constrained", squeeze=False)
    for axes in panels[0]:
        axes.spines[["top", "right"]].set_visible(False)
    return figure, list(panels[0])


FIGURES = (
    (
        "levers.png",
        "Paired differences with 95 % intervals; blue where they are clear of 0.",
        _draw_levers,
    ),
    (
        "mismatch.png",
        "TRACE's effect over measured mismatch and effective sample size, at the looser level; below 0 it helps.",
        _draw_mismatch,
    ),
    ("gradients.png", "Mean retain-gradient norm of an expert, without and with TRACE's weights.", _draw_norms),
)
