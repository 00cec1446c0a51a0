"""Write and read the journal of a run on a rare machine: JSON lines, each appended as soon as it is known.

A process that is killed loses only the line it was about to write. Several processes may append to one file, and the
next writer closes a line that was torn when a machine was lost. Each line is an object with `kind`, `stage` and
`time`; one file is one run.

    {"kind": "begin", "command": 1, "stages": {"smoke": 75.0, ...}}
    {"kind": "stamp", "stamp": {...}}                                       `benchmarks.stamp`
    {"kind": "stage", "state": "started" | "ended", "status": 0, "cut": false, "seconds": 61.2, "limit": 75.0}
    {"kind": "collected", "tests": 580}
    {"kind": "test", "name": ..., "outcome": "passed" | "failed" | "skipped", "seconds": 0.2, "why": ""}
    {"kind": "environment", "head": {...}}                                  of measurements: `benchmarks.suite`
    {"kind": "case", "row": {...}}                                          a measurement, or why there is none
    {"kind": "note", ...}                                                   whatever else is worth keeping
"""

import json
import os
import time
from collections.abc import Iterable, Mapping
from pathlib import Path

SUFFIX = ".jsonl"


class Journal:
    """Appends the lines of one stage to the file of a run."""

    def __init__(self, path: str | Path, stage: str = ""):
        self.path, self.stage = Path(path), stage

    def write(self, kind: str, **values: object) -> None:
        """Append one line and hand it to the system before returning."""
        line = json.dumps({"kind": kind, "stage": self.stage, "time": round(time.time(), 3), **values}) + "\n"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        file = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            size = os.fstat(file).st_size
            torn = size and os.pread(file, 1, size - 1) != b"\n"
            # in one call, so that no other writer's line falls in between
            os.write(file, b"\n" * bool(torn) + line.encode())
        finally:
            os.close(file)


def read(path: str | Path) -> list[dict]:
    """Return the whole lines of a run, in order."""
    found = []
    for text in Path(path).read_bytes().split(b"\n"):
        try:
            line = json.loads(text)
        except ValueError:  # a torn or an empty line
            continue
        if isinstance(line, dict) and "kind" in line:
            found.append(line)
    return found


def runs(folder: str | Path) -> dict[str, list[dict]]:
    """Return the runs below a folder by file name, oldest first; of two copies of a run, the longer one."""
    found: dict[str, list[dict]] = {}
    for path in sorted(Path(folder).rglob(f"*{SUFFIX}")):
        lines = read(path)
        if lines and len(lines) > len(found.get(path.stem, ())):
            found[path.stem] = lines
    return dict(sorted(found.items(), key=lambda run: run[1][0].get("time", 0.0)))


def of_kind(lines: Iterable[Mapping], kind: str, stage: str | None = None) -> list[dict]:
    """Return the lines of a kind, and of one stage if it is given."""
    return [line for line in lines if line["kind"] == kind and stage in (None, line.get("stage"))]
