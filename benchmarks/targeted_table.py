"""What the targeted study of TRACE says, from the record of `benchmarks.study --targeted`."""

import json
from pathlib import Path

from benchmarks.stamp import RESULTS
from benchmarks.study_reading import GOAL, interval

FOLDER = RESULTS / "study" / "targeted"
PRIMARY = {"verbmem_r": "VerbMem, documents", "accuracy_c": "next token, critical tokens"}
SECONDARY = {"accuracy_r": "next token, all tokens", "nll_c": "NLL, critical tokens", "nll_r": "NLL, all tokens"}


def generated(folder: Path = FOLDER) -> str:
    """Return the section of RESULTS.md."""
    data = json.loads((folder / "study.json").read_text(encoding="utf-8"))
    return "\n".join(line for case, found in data.items() for line in (f"### {case}", "", *section(found))).rstrip()


def section(found: dict) -> list[str]:
    """Return what is said of one K: how many runs there are and, once there are all, the analysis."""
    lines = [f"{found['runs']} of {found['of']} runs.", ""]
    if found["runs"] < found["of"]:
        told = "No effect is computed before all of them are there: the stop rule of `benchmarks/NOTES.md`."
        return [*lines, told, ""]
    return [*lines, *_analysis(found)]


def _analysis(found: dict) -> list[str]:
    """Return the analysis of one K in sentences and a table."""
    reached = ", ".join(f"{name.replace(', ', ' ')} {count}" for name, count in found["reached"].items())
    lines = [
        f"In {found['qualified']} seeds an expert has f^F/f^R >= 3. Runs that reached the level: {reached}. Effects in "
        "percent, ± 95 % t intervals.",
        "",
    ]
    for metric, value in found["primary"].items():
        if value["half"] is None:
            lines += [f"{PRIMARY[metric]}: {value['n']} seeds have an effect, too few for an interval.", ""]
            continue
        inside = "inside" if abs(GOAL - value["mean"]) <= value["half"] else "outside"
        clear = "clear" if value["rejected"] else "not clear"
        lines += [
            f"{PRIMARY[metric]}, TRACE against plain: {interval(value, 2)} in {value['n']} seeds "
            f"(p {value['p']:.3g}, {clear} of 0 by Holm); the paper's {GOAL} % is {inside}.",
            "",
        ]
    named = PRIMARY | SECONDARY
    lines += ["| contrast | " + " | ".join(named.values()) + " |", "|---" * (len(named) + 1) + "|"]
    rows = {**found["contrasts"], **{f"TRACE - plain, {b}": v for b, v in found["baselines"].items()}}
    rows["TRACE - plain, at the retrained model's level"] = found["at the retrained model's level"]
    made = {name: row for name, row in rows.items() if any(value["n"] for value in row.values())}
    lines += [f"| {name} | " + " | ".join(interval(row[m], 2) for m in named) + " |" for name, row in made.items()]
    return [*lines, ""]
