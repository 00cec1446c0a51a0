"""Stages without a device: they write lines of the form that the real ones do, so that what runs, ends and merges
them can be tried where there is no GPU.

    python -m tests.gpu_stub matrix JOURNAL 0.01      lines 0.01 seconds apart
"""

import dataclasses
import sys
import time
from pathlib import Path

from benchmarks.journal import Journal
from tests.gpu_stages import Stage

TESTS = 6
TIMES = {"ours": 1.0, "ours, triton": 1.0, "ours, cuda": 0.5}


def stubbed(stage: Stage, pause: float) -> Stage:
    """The stage with the same name and limit, run by this file."""
    return dataclasses.replace(stage, arguments=("-m", "tests.gpu_stub", stage.name, "{journal}", str(pause)))


def main(name: str, path: str, pause: float) -> int:
    """Write what a stage of this name would, a line at a time."""
    journal = Journal(Path(path), name)

    def write(kind: str, **values: object) -> None:
        journal.write(kind, **values)
        time.sleep(pause)

    if name == "install":
        write("stamp", stamp={"device": "stub", "commit": None, "kernel_sources": "stub"})
    elif name in ("smoke", "matrix", "sanitizer"):
        write("collected", tests=TESTS)
        for i in range(TESTS):
            write("test", name=f"{name} {i}", outcome="passed", seconds=pause, why="", triton=[1, 2])
    else:
        write("environment", head={"stamp": {"device": "stub"}, "ceilings": {}, "started": time.time()})
        for i in range(TESTS):
            write("case", row={"op": name, "name": f"{i}", "milliseconds": TIMES, "choice": ["route", 10 + i]})
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2], float(sys.argv[3])))
