"""Run a program under a limit on its memory, and say how much it took at its peak.

A process's memory is what is resident of it: anonymous pages, those of files that it maps, such as libraries and
memory-mapped weights, and shared ones. Its parent looks every `INTERVAL` and kills it where that exceeds the limit; the
peak is the one that the system itself keeps, to which nothing between two looks is lost.
"""

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks import processes, stamp

INTERVAL = 0.005  # seconds


@dataclass(frozen=True)
class Taken:
    """Says what a process took: bytes at its peak, of them those of no file, when most of these were seen, and seconds.

    `status` is its exit status, None where it was killed because it exceeded the limit.
    """

    peak: int
    anonymous: int
    seconds: float
    status: int | None


def run(command: Sequence[str], limit: float, log: Path) -> Taken:
    """Run a command whose process may have `limit` bytes; its output goes to the file `log`."""
    began, most, killed = time.monotonic(), {"VmRSS": 0, "RssAnon": 0}, False
    with log.open("wb") as output:
        process = processes.start(command, cwd=stamp.ROOT, output=output)
        try:
            while not (ended := os.wait4(process.pid, os.WNOHANG))[0]:
                now = resident(process.pid)
                most = {what: max(size, now.get(what, 0)) for what, size in most.items()}
                if most["VmRSS"] > limit and not killed:
                    killed = True
                    process.kill()
                time.sleep(INTERVAL)
        except BaseException:
            processes.stop(process)
            raise
    _, status, usage = ended
    process.returncode = os.waitstatus_to_exitcode(status)
    # the system's own number is at least what this process had when it started the other one
    peak = max(most["VmRSS"], 1024 * usage.ru_maxrss)
    return Taken(peak, most["RssAnon"], time.monotonic() - began, None if killed else process.returncode)


def resident(pid: int | str) -> dict[str, int]:
    """Return the bytes that are resident of a process, by the names of /proc; nothing of one that has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text(encoding="ascii").splitlines()
    except OSError:
        return {}
    fields = (line.split() for line in lines if line.endswith(" kB"))
    return {name.rstrip(":"): 1024 * int(size) for name, size, _ in fields}
