"""Summarise the lines of GPU runs: outcomes, what failed, and what was not run (`journal` describes their form)."""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from benchmarks import journal
from benchmarks.journal import of_kind

Runs = Sequence[Sequence[Mapping]]
# a GPU cannot run these; any other test that is skipped there was forgotten, and counts as a failure
SKIPS_ALLOWED = re.compile(
    r"only the interpreter gets this wrong|records what the interpreter loads and stores|"
    r"the checkers observe the interpreter|a GPU has no lazily committed memory|"
    r"tiles for sm_\d+ do not fit this GPU|the tiny tiles have fewer rows than threads|"
    r"less than 24 GB of the GPU are free|needs Hopper|needs two GPUs|without a GPU",
    re.IGNORECASE,
)
# pytest's status 1, "some tests failed", is reported by the failed tests' own lines
_TOLD = (0, 1)


class Finding(NamedTuple):
    """Reason why a run is no pass: something failed, or was not run."""

    text: str
    failed: bool

    def __str__(self) -> str:
        return ("FAILED: " if self.failed else "not run: ") + self.text


def tests(runs: Runs) -> dict[tuple[str, str], dict]:
    """Return the newest outcome of each test by stage and name."""
    lines = sorted((line for run in runs for line in _under_way(run, "test")), key=lambda line: line["time"])
    return {(line["stage"], line["name"]): line for line in lines}


def _under_way(run: Sequence[Mapping], kind: str, stage: str | None = None) -> list[dict]:
    """Return the lines of a kind.

    Where memcheck refused the device, the sanitizer's lines are left out: its tests failed for that and say nothing.
    """
    refused = any("unavailable" in (line.get("sanitizer") or ()) for line in of_kind(run, "note"))
    return [line for line in of_kind(run, kind, stage) if not (refused and line["stage"] == "sanitizer")]


def cases(runs: Runs) -> list[dict]:
    """Return the rows of measurements in the order they were taken; of repeated ones, the newest that has times."""
    found: dict[str, dict] = {}
    for line in sorted((line for run in runs for line in of_kind(run, "case")), key=lambda line: line["time"]):
        row = line["row"]
        title = f"{row['op']}: {row['name']}"
        if title not in found or not _empty(row) or _empty(found[title]):
            found[title] = row
    return list(found.values())


def done(folder: Path, kernel_sources: str) -> tuple[set[tuple[str, str]], set[str]]:
    """Return the passed tests (stage, name) and the titles of the measured cases, of runs with these kernels."""
    known = [
        run
        for run in journal.runs(folder).values()
        if any(line["stamp"]["kernel_sources"] == kernel_sources for line in of_kind(run, "stamp"))
    ]
    passed = {key for key, line in tests(known).items() if line["outcome"] == "passed"}
    return passed, {f"{row['op']}: {row['name']}" for row in cases(known) if not _empty(row)}


def _empty(row: Mapping) -> bool:
    return "skipped" in row or "error" in row or "cut" in row


def stages(runs: Runs) -> dict[str, dict]:
    """Return, for each stage that a run meant to run, its best end, or {} where it never ended."""
    found: dict[str, dict] = {}
    for run in runs:
        for begin in of_kind(run, "begin"):
            for name in begin["stages"]:
                found.setdefault(name, {})
        for line in of_kind(run, "stage"):
            if line["state"] == "ended" and (not found.get(line["stage"]) or not line["cut"]):
                found[line["stage"]] = dict(line)
    return found


def findings(runs: Runs) -> list[Finding]:
    """Return everything that keeps the runs, taken together, from being a pass."""
    found = []
    outcomes = tests(runs)
    for (stage, name), line in outcomes.items():
        if line["outcome"] == "failed":
            last = line["why"].strip().splitlines()[-1:] or [""]
            found.append(Finding(f"{stage}: {name}: {last[0][:200]}", True))
    nameless = Counter(
        (stage, line["why"])
        for (stage, _), line in outcomes.items()
        if line["outcome"] == "skipped" and not SKIPS_ALLOWED.search(line["why"])
    )
    found += [Finding(f"{stage}: {n} tests skipped: {why}", True) for (stage, why), n in nameless.items()]
    for name, end in stages(runs).items():
        found += _of_stage(name, end, runs, outcomes)
    for row in cases(runs):
        title = f"{row['op']}: {row['name']}"
        if "error" in row:
            found.append(Finding(f"{title}: {row['error']}", True))
        elif "skipped" in row or "cut" in row:
            found.append(Finding(f"{title}: {row.get('skipped') or row['cut']}", False))
    return found


def status_of(found: Sequence[Finding]) -> int:
    """Return the exit status of the findings: 1 if something failed, 3 if something was not run, 0 otherwise."""
    if any(finding.failed for finding in found):
        return 1
    return 3 if found else 0


def _of_stage(name: str, end: Mapping, runs: Runs, outcomes: Mapping[tuple[str, str], Mapping]) -> Iterable[Finding]:
    done = sum(stage == name for stage, _ in outcomes)
    expected = max((line["tests"] for run in runs for line in _under_way(run, "collected", name)), default=0)
    part = f"; {done} of {expected} tests" if expected else ""
    # several runs together may have done what none did alone
    if expected and done >= expected:
        return
    if not end:
        yield Finding(f"{name}: the run ended before it did{part}", False)
    elif end["cut"]:
        yield Finding(f"{name}: stopped after {end['seconds']:.0f} s{part}", False)
    elif end["status"] not in _TOLD or (end["status"] and not _told(name, runs)):
        yield Finding(f"{name}: ended with status {end['status']}{part}; its log says why", True)
    elif expected:
        yield Finding(f"{name}: {done} of {expected} tests gave a result", False)


def _told(name: str, runs: Runs) -> bool:
    """Return whether a line of the stage explains its status 1."""
    lines = [line for run in runs for line in run if line.get("stage") == name]
    return any(line.get("outcome") == "failed" or "error" in line.get("row", ()) for line in lines)


def correctness(runs: Runs) -> dict:
    """Return the record of the tests: counts by stage, memcheck's result, and what keeps it from being a pass."""
    outcomes = tests(runs)
    counts: dict[str, Counter] = {}
    skips: Counter = Counter()
    for (stage, _), line in outcomes.items():
        counts.setdefault(stage, Counter())[line["outcome"]] += 1
        if line["outcome"] == "skipped":
            skips[line["why"]] += 1
    ends = stages(runs)
    return {
        "tests": {stage: dict(sorted(counted.items())) for stage, counted in counts.items()},
        "skipped": dict(skips.most_common()),
        "sanitizer": next((n["sanitizer"] for n in reversed(notes(runs)) if "sanitizer" in n), None),
        "triton": {"found": _triton(outcomes.values(), 0), "compiled": _triton(outcomes.values(), 1)},
        "seconds": {name: end.get("seconds") for name, end in ends.items()},
        "complaints": list(map(str, findings(runs))),
    }


def notes(runs: Runs) -> list[dict]:
    """Return everything else that the runs noted, oldest first."""
    return sorted((line for run in runs for line in of_kind(run, "note")), key=lambda line: line["time"])


def _triton(lines: Iterable[Mapping], which: int) -> int:
    return sum(line["triton"][which] for line in lines if "triton" in line)


def table(runs: Runs) -> str:
    """Return a table with one line for each stage: how it ended and what it gave."""
    outcomes, ends = tests(runs), stages(runs)
    lines = []
    for name, end in ends.items():
        counted = Counter(line["outcome"] for (stage, _), line in outcomes.items() if stage == name)
        measured = sum("row" in line and not _empty(line["row"]) for run in runs for line in of_kind(run, "case", name))
        parts = [f"{n} {outcome}" for outcome, n in sorted(counted.items())]
        parts += [f"{measured} cases measured"] if measured else []
        how = "never ended" if not end else "cut" if end["cut"] else f"status {end['status']}"
        seconds = f"{end['seconds']:.0f} s" if end else "?"
        lines.append(f"{name:<10} {how:<11} {seconds:>6}  {', '.join(parts)}".rstrip())
    for note in notes(runs):
        known = {key: value for key, value in note.items() if key not in ("kind", "stage", "time")}
        lines += [f"{note['stage'] or 'run':<10} {key}: {value}" for key, value in known.items()]
    return "\n".join(lines)
