"""Print ours against every peer in one table: python -m benchmarks.peers_table

A line is of one case of the newest run of a device, or of the performance model for an H200, and says which of the two.
A peer that was not measured is in no measured line.
"""

import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from benchmarks import record, stamp
from benchmarks.model import design, gpus

MEASURED, PREDICTED = "measured", "predicted"
_OURS = "ours"


class Line(NamedTuple):
    """One case: where it ran or would run, our milliseconds, and how many times as fast ours is as each peer."""

    kind: str  # MEASURED or PREDICTED
    where: str
    case: str
    milliseconds: float
    times: dict[str, float]

    def __str__(self) -> str:
        peers = ", ".join(f"{value:.2f} x {name}" for name, value in self.times.items())
        return f"{self.kind:<9}  {self.where:<12}  {self.case}: {self.milliseconds:.4g} ms; {peers}"


def measured(results: Path = stamp.RESULTS) -> Iterator[Line]:
    """Return a line for each case of the newest run of each device that measured ours and a peer."""
    for device in sorted(record.runs(results)):
        _, run = record.latest(device, results)
        for row in run["rows"]:
            line = _line(MEASURED, _short(run["stamp"]["device"]), f"{row['op']}: {row['name']}", row)
            if line:
                yield line


def predicted(gpu: gpus.Gpu) -> Iterator[Line]:
    """Return a line for each case that the performance model predicts for a GPU."""
    for case, times in design.by_case(gpu).items():
        line = _line(PREDICTED, gpu.name, case, {"milliseconds": times})
        if line:
            yield line


def table(results: Path = stamp.RESULTS) -> str:
    """Return the table: what was measured, then what is predicted."""
    lines = [*measured(results), *predicted(gpus.H200)]
    head = f"{'figures':<9}  {'where':<12}  case: ours; times as fast as each peer"
    error = f"{PREDICTED}: by benchmarks.model, good for some {design.WITHIN:.0%}; never measured"
    return "\n".join([head, *map(str, lines), error])


def _line(kind: str, where: str, case: str, row: Mapping) -> Line | None:
    times = row.get("milliseconds", {})
    ours = next((times[name] for name in times if name.startswith(_OURS)), None)
    peers = {name: value / ours for name, value in times.items() if ours and not name.startswith(_OURS)}
    return Line(kind, where, case, ours, peers) if peers else None


def _short(device: str) -> str:
    gpu = gpus.named(device)
    return gpu.name if gpu else device


def main() -> int:
    print(table())
    return 0


if __name__ == "__main__":
    sys.exit(main())
