"""Write the figures of README.md and benchmarks/RESULTS.md from the recorded results: python -m benchmarks.readme

RESULTS.md has the costs of the newest run of each kind of processor and GPU, the table of the embedded experiment
(`headline`), what each verb takes at a model's size (`size_table`), what faults and damage do (`trust_table`), what the
levers buy (`efficacy`) and TRACE alone (`targeted_table`), what the router lever does (`router_table`), what rounding
leaves of unlearning (`survive_table`) and what deep forgetting costs (`lasting`); README.md has a row for quality, one
for speed and one for memory. The text between two marks is replaced.
`tests/test_bench_readme.py` fails where a page and the run differ, and where a kernel changed since the run and the
page does not say so; another call of this module repairs both.
"""

import json
import sys
from pathlib import Path

from benchmarks import (
    efficacy,
    headline,
    lasting,
    record,
    router_table,
    size_table,
    stamp,
    survive_table,
    targeted_table,
    trust_table,
)
from benchmarks.model import design, gpus

README, RESULTS = stamp.ROOT / "README.md", stamp.ROOT / "benchmarks" / "RESULTS.md"
STALE = "**measured before the kernels changed**"
_FIGURE = "speedup.png"
_RESULTS = {
    "times as fast as ": "times as fast",
    ": speed-up over ": "times as fast",
    ": share of the ": "share of the speed",
    ": extra memory of ": "extra memory, as a part",
    ": time of ": "time, times that",
}
_HEADER = "| work | result | against | measured | target | |\n|---|---|---|---|---|---|"


def generated(results: Path = stamp.RESULTS, root: Path = stamp.ROOT) -> str:
    """Return the tables of costs, for the runs that are there."""
    parts = [
        _kind(path, run, results, root, pictured=i == 0)
        for device in sorted(record.runs(results))
        for i, (path, run) in enumerate(record.kinds(device, results))
    ]
    return "\n\n".join(parts) if parts else "No run of the suite is recorded yet."


def _kind(path: Path, run: dict, results: Path, root: Path, *, pictured: bool) -> str:
    lines = [_where(path, run, root), "", _HEADER]
    lines += [_line(row, found) for row in run["rows"] for found in row.get("verdicts", ()) if _shown(found)]
    lines += ["", *_remarks(run), *_correctness(path.parent / "correctness.json", root), *_beside(run)]
    figure = path.parent / _FIGURE
    if pictured and figure.exists():  # it shows the first kind
        lines += ["", f"![Times as fast as each rival]({figure.relative_to(results.parent).as_posix()})"]
    return "\n".join(lines).rstrip()


def stale(run: dict, root: Path = stamp.ROOT) -> bool:
    """Return whether a kernel that runs on the device of this run has changed since."""
    return run["kernels"] != stamp.kernel_sources_hash(root, device=run["fingerprint"]["device"])


def _where(path: Path, run: dict, root: Path) -> str:
    found, where = run["fingerprint"], run["stamp"]
    on_gpu = found["device"] == "cuda"
    what = where["device"] if on_gpu else f"{found['cpu']} ({found['native']}), {found['threads']} thread"
    parts = [f"{what}, torch {found['torch']}, {run['time']} time, commit {(where['commit'] or 'unknown')[:9]}"]
    if held := record.held_to(run):
        parts.append(f"torch's products held to {held}")
    if run["state"] != record.COMPLETE:
        parts.append(run["state"])
    if stale(run, root):
        parts.append(STALE)
    return f"{'; '.join(parts)} (`{path.relative_to(root).as_posix()}`):"


def _shown(found: dict) -> bool:
    return found["target"] is not None


def _named(what: str) -> tuple[str, str]:
    """Return the result's name and its rival; `bench_step` puts our contender before a colon."""
    for parting, result in _RESULTS.items():
        ours, found, rival = what.partition(parting)
        if found:
            form = f" ({ours.removeprefix('ours, ')})" if ours not in ("", "ours") else ""
            return result + form, rival.removesuffix("'s")
    return what, ""


def _line(row: dict, found: dict) -> str:
    what, of = _named(found["what"])
    limits = f" [{found['low']:.2f}, {found['high']:.2f}]" if "low" in found else ""
    verdict = "hit" if found["hit"] else "**missed**"
    cells = f"{row['op']}: {row['name']}", what, of, f"{found['value']:.2f}{limits}", f"{found['target']:.3g}", verdict
    return f"| {' | '.join(cells)} |"


def _beside(run: dict) -> list[str]:
    """Return lines on what the performance model predicted of a GPU's cases, beside what was measured."""
    gpu = gpus.named(run["stamp"]["device"]) if run["fingerprint"]["device"] == "cuda" else None
    pairs = design.beside(run["rows"], gpu) if gpu else []
    head = ["", "| work | contender | predicted ms | measured ms | predicted over measured |", "|---|---|---|---|---|"]
    lines = [
        f"| {p.case} | {p.contender} | {p.predicted:.3g} | {p.measured:.3g} | {p.predicted / p.measured:.2f} |"
        for p in pairs
    ]
    return [*head, *lines] if lines else []


def _correctness(path: Path, root: Path) -> list[str]:
    """Return lines on what the tests found on this device, where a GPU run left its record."""
    if not path.exists():
        return []
    found = json.loads(path.read_text(encoding="utf-8"))
    counts = [
        f"{name}: {', '.join(f'{n} {outcome}' for outcome, n in tests.items())}"
        for name, tests in found["tests"].items()
    ]
    memcheck = found["sanitizer"] or {"unavailable": "not run"}
    counts.append(f"memcheck: {memcheck.get('unavailable') or str(memcheck['errors']) + ' errors'}")
    old = f"; {STALE}" if stamp.stale(found, root) else ""
    open_ends = f"; {len(found['complaints'])} failures and tests not run" if found["complaints"] else ""
    return ["", f"Tests there (`{path.relative_to(root).as_posix()}`): {'; '.join(counts)}{open_ends}{old}."]


def _remarks(run: dict) -> list[str]:
    """Return lines on the missing rivals and on what was not measured, one for each reason."""
    reasons: dict[str, set[str]] = {}
    for row in run["rows"]:
        for name, why in row.get("missing", {}).items():
            # whatever surrounds a peer's layer, the peer itself is missing
            reasons.setdefault(why, set()).add(name.partition(" + ")[0] if why.startswith("its ") else name)
    lines = [f"Not measured, {why}: {', '.join(sorted(names))}." for why, names in sorted(reasons.items())]
    lines += [f"Failed: {row['op']}: {row['name']}: {row['error']}." for row in run["rows"] if "error" in row]
    skipped = [f"{row['op']}: {row['name']}" for row in run["rows"] if "skipped" in row]
    lines += [f"Left out for lack of time: {'; '.join(skipped)}."] if skipped else []
    return [run["source"], *lines] if "source" in run else lines


def headlines(results: Path = stamp.RESULTS, root: Path = stamp.ROOT) -> str:
    """Return the rows of README.md."""

    def where(run: dict) -> str:
        device = run["stamp"]["device"] if run["fingerprint"]["device"] == "cuda" else run["fingerprint"]["cpu"]
        return f"one step on {device}" + (f", {STALE}" if stale(run, root) else "")

    return headline.rows(results, _named, where)


def replaced(page: str, text: str, section: str) -> str:
    """Return the page with `text` between the two marks of a section. Raises ValueError unless both are there."""
    begin, end = marks(section)
    before, begins, rest = page.partition(begin)
    _, ends, after = rest.partition(end)
    if not begins or not ends:
        raise ValueError(f"expected {begin} and then {end} in the page")
    return f"{before}{begin}\n{text}\n{end}{after}"


def marks(section: str) -> tuple[str, str]:
    """Return what stands before and after a generated section."""
    return f"<!-- benchmarks.{section}: begin -->", f"<!-- benchmarks.{section}: end -->"


SECTIONS = {
    README: {"headline": headlines},
    RESULTS: {
        "demo": headline.table,
        "suite": generated,
        "size": size_table.table,
        "trust": trust_table.table,
        "efficacy": efficacy.generated,
        "targeted": targeted_table.generated,
        "router": router_table.table,
        "survive": survive_table.generated,
        "lasting": lasting.generated,
    },
}


def current(path: Path) -> str:
    """Return a page with every generated section as the recorded results have it."""
    page = path.read_text(encoding="utf-8")
    for section, text in SECTIONS[path].items():
        page = replaced(page, text(), section)
    return page


def main() -> int:
    for path in SECTIONS:
        text = current(path)
        changed = text != path.read_text(encoding="utf-8")
        path.write_text(text, encoding="utf-8")
        print(f"{path.relative_to(stamp.ROOT)} {'written' if changed else 'says so already'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
