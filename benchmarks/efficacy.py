"""Write the section of RESULTS.md on what each lever buys; `python -m benchmarks.readme` puts it there.

The whole study counts if its report exists, else the small one.
"""

import json
from pathlib import Path

from benchmarks.stamp import RESULTS, ROOT
from benchmarks.study_reading import clear, interval, reading

STUDIES = ("whole", "small")
_ABLATIONS = """| ablation of | | Δ at the retrained model's level | Δ at the looser level | seeds |
|---|---|---|---|---|"""
LEVERS = ("TRACE", "WAGLE", "MOLLM", "all three")


def generated(results: Path = RESULTS, root: Path = ROOT) -> str:
    """Return the section's text."""
    folder = next((f for f in (results / "study" / name for name in STUDIES) if (f / "study.json").exists()), None)
    if folder is None:
        return "No study is recorded yet."
    study, where = json.loads((folder / "study.json").read_text("utf-8")), folder.relative_to(root).as_posix()
    parts = [
        f"`{study['command']}`: {study['runs']} of {study['of']} runs on models trained here (3 layers, 32 experts). "
        "A run is judged where it first forgets as much as the retrained model (VerbMem of the forget documents), and, "
        f"behind the stroke, {study['near']} above that, where the curve is still steep and the result less a matter "
        "of chance. Utility is VerbMem of retain documents that unlearning never saw; the target's is 1. The levers' "
        "columns are paired differences to the plain baseline, means over seeds, **bold** where the 95 % interval "
        "leaves out 0; (n/m): no more of the runs got there."
    ]
    for case in dict.fromkeys(row["case"] for row in study["main"]):
        rows = [row for row in study["main"] if row["case"] == case]
        parts.append("\n".join([_header(case, rows), *_lines(rows)]))
    parts.append("\n".join(f"* {sentence}" for sentence in reading(study)))
    if study["ablation"]:
        rows = [row for row in study["ablation"] if not row["variant"].startswith("plain")]
        parts.append(
            "Ablations, against the plain baseline; those of TRACE where unlearning sees the retain documents that use "
            "the forget-critical experts least."
        )
        parts.append("\n".join([_ABLATIONS, *map(_ablation, rows)]))
    beside = folder.relative_to(results.parent).as_posix()
    parts += [f"![{caption}]({beside}/{file})" for file, caption in study["figures"].items()]
    parts.append(f"Intervals, other metrics and every run: `{where}/`. What was tried before: `benchmarks/NOTES.md`.")
    return "\n\n".join(parts)


def _ablation(row: dict) -> str:
    """Return a table row: the replacement of one of the library's decisions, or a setting of TRACE, and its effect."""
    both = (interval(row[key]["verbmem_r"]) for key in ("difference", "difference_near"))
    return f"| {row['case']}, {row['baseline']} | {row['variant']} | {' | '.join(both)} | {row['runs']} |"


def _header(case: str, rows: list[dict]) -> str:
    seeds = max(row["runs"] for row in rows)
    return f"| {case}, {seeds} seeds | plain | {' | '.join(LEVERS)} |\n{'|---' * (len(LEVERS) + 2)}|"


def _lines(rows: list[dict]) -> list[str]:
    found = {(row["baseline"], row["variant"]): row for row in rows}
    lines = []
    for baseline in dict.fromkeys(row["baseline"] for row in rows):
        plain = found[baseline, "plain"]
        values = [_value(plain["verbmem_r"]), _value(plain["verbmem_r_near"])]
        cells = [" / ".join(values) + _short_of(plain)]
        cells += [_cell(found.get((baseline, lever))) for lever in LEVERS]
        lines.append(f"| {baseline} | {' | '.join(cells)} |")
    return lines


def _cell(row: dict | None) -> str:
    if row is None:
        return "–"
    both = (row[key]["verbmem_r"] for key in ("difference", "difference_near"))
    return " / ".join(map(_difference, both)) + _short_of(row)


def _short_of(row: dict) -> str:
    return "" if row["reached"] == row["runs"] else f" ({row['reached']}/{row['runs']})"


def _value(value: dict) -> str:
    return "–" if value["mean"] is None else f"{value['mean']:.2f}"


def _difference(value: dict) -> str:
    if value["mean"] is None:
        return "–"
    text = f"{value['mean']:+.2f}"
    return f"**{text}**" if clear(value) else text
