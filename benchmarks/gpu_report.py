"""Write tables of what came back from a GPU: make gpu-report DIR=<folder with the runs>

Merges the runs below a folder (`journal`) that measured the kernels of the newest one on the same device; if several
runs have a test or case, the newest counts. Under benchmarks/results/<device>/ it writes correctness.json and one
record in the suite's form (<date>-<commit>.json). It also updates moe_unlearn/choices.json, which says which
implementation `auto` takes first, and the tables of README and RESULTS.md. The exit status is that of `tests.gpu_run`
(0: all passed, 1: something failed, 3: something was not run), or 2 where there is nothing to report.
"""

import argparse
import datetime
import json
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from benchmarks import gpu_summary, journal, readme, record, stamp
from benchmarks.gpu_summary import Finding
from benchmarks.journal import of_kind
from benchmarks.model import design, gpus
from moe_unlearn import choices
from moe_unlearn.files import write_json, write_text

# an implementation must be faster by this factor to take another's place
MARGIN = 1.03
CONTENDERS = {"triton": "ours, triton", "cuda": "ours, cuda"}


def chosen(folder: Path) -> tuple[dict[str, list[dict]], list[str]]:
    """Return the runs to merge, and why others are left out; no run is merged without a stamp."""
    runs, kept, left = journal.runs(folder), {}, []
    stamps = {name: _stamp(lines) for name, lines in runs.items()}
    stamped = [found for found in stamps.values() if found is not None]
    for name, lines in runs.items():
        found = stamps[name]
        if found is None:
            left.append(f"{name}: it ended before it knew its device")
        elif any(found[key] != stamped[-1][key] for key in ("device", "kernel_sources")):
            left.append(f"{name}: another device or other kernels than the newest run's")
        else:
            kept[name] = lines
    return kept, left


def _stamp(lines: Sequence[Mapping]) -> dict | None:
    return next((line["stamp"] for line in of_kind(lines, "stamp")), None)


def completed(found: Mapping, root: Path = stamp.ROOT) -> dict:
    """Return a stamp that takes a missing commit from this checkout, if the checkout has the same kernels."""
    if found["commit"] is None and found["kernel_sources"] == stamp.kernel_sources_hash(root):
        here = stamp.stamp()
        return {**found, **{key: here[key] for key in ("commit", "uncommitted_changes")}}
    return dict(found)


def recorded(runs: Mapping[str, list[dict]], where: Mapping) -> dict | None:
    """Return the runs' measurements in the form of the suite's record, or None if nothing was measured."""
    heads = [line["head"] for lines in runs.values() for line in of_kind(lines, "environment")]
    rows = gpu_summary.cases(list(runs.values()))
    if not heads or not rows:
        return None
    ends = [line for lines in runs.values() for line in of_kind(lines, "stage") if line["state"] == "ended"]
    seconds = sum(line["seconds"] for line in ends)
    measuring = {line["stage"] for lines in runs.values() for line in of_kind(lines, "case")}
    stages = gpu_summary.stages(list(runs.values()))
    unfinished = sorted(name for name in measuring if not stages.get(name) or stages[name]["cut"])
    state = record.state_of(rows)
    if unfinished and state == record.COMPLETE:
        state = f"partial: stopped in {', '.join(unfinished)}"
    return {
        **heads[0],
        "stamp": dict(where),
        "runs": sorted(runs),
        "state": state,
        "seconds": round(seconds, 1),
        "rows": rows,
    }


def path_of(content: Mapping, results: Path) -> Path:
    """Return the path of a record: that of an older record with some of the same runs, else a new path."""
    folder = results / stamp.folder_of(content["stamp"]["device"])
    for path in sorted(folder.glob("*-*.json")):
        known = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(known, dict) and set(known.get("runs", ())) & set(content["runs"]):
            return path
    date = datetime.date.fromtimestamp(content["started"]).isoformat()
    return record.new_path(content["stamp"]["device"], content["stamp"]["commit"], date, results)


def choice(rows: Iterable[Mapping], before: Mapping[str, list[dict]]) -> dict[str, list[dict]]:
    """Return choices.json's entries for a GPU: whether CUDA or Triton was faster, by kernel and number of elements.

    Rows of one size are combined by their geometric mean. Between sizes with different winners the limit is the
    geometric mean of the sizes. Where neither is faster by MARGIN, the present choice stays, as for kernels without
    rows.
    """
    logs: dict[str, dict[int, list[float]]] = {}
    for row in rows:
        times = row.get("milliseconds", {})
        if "choice" in row and all(name in times for name in CONTENDERS.values()):
            name, elements = row["choice"]
            ratio = math.log(times[CONTENDERS["triton"]] / times[CONTENDERS["cuda"]])
            logs.setdefault(name, {}).setdefault(elements, []).append(ratio)
    found = dict(before)
    for name, sizes in logs.items():
        entries, previous = [], None
        for elements, ratios in sorted(sizes.items()):
            mean = math.exp(sum(ratios) / len(ratios))
            winner = "cuda" if mean > MARGIN else "triton" if mean < 1 / MARGIN else _now(before, name, elements)
            if not entries:
                entries.append({"elements": 0, "first": winner})
            elif winner != entries[-1]["first"]:
                entries.append({"elements": round(math.sqrt(previous * elements)), "first": winner})
            previous = elements
        found[name] = entries
    return dict(sorted(found.items()))


def _now(before: Mapping[str, list[dict]], name: str, elements: int) -> str:
    own = [entry["first"] for entry in before.get(name, ()) if entry["elements"] <= elements]
    return own[-1] if own else "cuda"  # the order of `backend`


def choices_text(content: Mapping) -> str:
    """Return the text of choices.json, with one line for each kernel."""
    kernels = ",\n".join(f"    {json.dumps(name)}: {json.dumps(es)}" for name, es in content["cuda"].items())
    return f'{{\n  "measured": {json.dumps(content["measured"])},\n  "cuda": {{\n{kernels}\n  }}\n}}'


def report(
    folder: Path, *, results: Path = stamp.RESULTS, choices_file: Path = choices.FILE
) -> tuple[list[str], list[Finding]] | None:
    """Write the results of all runs below a folder; return lines about them and the findings, or None without runs."""
    runs, left = chosen(folder)
    if not runs:
        return None
    where, all_lines = completed(_stamp(list(runs.values())[-1])), list(runs.values())
    lines = [gpu_summary.table(all_lines), *(f"left out: {why}" for why in left)]
    if gpu_summary.tests(all_lines):
        found = {"stamp": where, "runs": sorted(runs)}
        found |= gpu_summary.correctness(all_lines)
        path = results / stamp.folder_of(where["device"]) / "correctness.json"
        write_json(path, found)
        lines.append(f"{path}")
    content = recorded(runs, where)
    if content is not None:
        path = path_of(content, results)
        write_json(path, content)
        lines.append(f"{path}: {content['state']}")
        gpu = gpus.named(where["device"])
        lines += map(str, design.beside(content["rows"], gpu) if gpu else ())
        before = json.loads(choices_file.read_text(encoding="utf-8"))
        entries = choice(content["rows"], before["cuda"])
        if entries != before["cuda"]:
            measured = {key: where[key] for key in ("device", "commit", "kernel_sources")}
            write_text(choices_file, choices_text({"measured": measured, "cuda": entries}) + "\n")
            lines.append(f"{choices_file}")
    return lines, gpu_summary.findings(all_lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="where the runs lie")
    options = parser.parse_args(arguments)
    made = report(options.folder)
    if made is None:
        print(f"no run of a GPU that knew its device lies below {options.folder}", file=sys.stderr)
        return 2
    lines, found = made
    print(*lines, *found, sep="\n")
    readme.main()
    return gpu_summary.status_of(found)


if __name__ == "__main__":
    sys.exit(main())
