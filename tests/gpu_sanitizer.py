"""memcheck over one case of each CUDA test, where compute-sanitizer attaches to this device.

    python -m tests.gpu_sanitizer --journal FILE

It refuses some virtual machines: that is noted, and no failure. Tests write their own lines as they end, and errors are
counted in what the tool has printed by the time that this stage is over.
"""

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks import processes
from benchmarks.journal import Journal
from tests.gpu_stages import ROOT, SANITIZED, pytest_arguments

TOOL = "memcheck"
_SUMMARY = re.compile(r"ERROR SUMMARY: (\d+) error")
_REFUSED = re.compile(r"Device not supported|Failed to initialize|not supported on this")
_FOUND = re.compile(r"========= (?:Invalid|Uninitialized|Misaligned|Program hit|Leaked|Race)")


def program() -> str | None:
    """Where compute-sanitizer is, or None."""
    found = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    return found if Path(found).exists() else None


def verdict(output: str, status: int | None) -> dict:
    """{"errors": n, "complete": whether it came to its end}, or {"unavailable": why}."""
    if _REFUSED.search(output):
        return {"unavailable": "compute-sanitizer refuses this device"}
    summaries = _SUMMARY.findall(output)
    if not summaries and "=========" not in output:
        last = " | ".join(output.strip().splitlines()[-3:])
        return {"unavailable": f"it did not attach: {last[:300]}"}
    errors = sum(map(int, summaries)) if summaries else len(_FOUND.findall(output))
    result = {"errors": errors, "complete": bool(summaries) and status is not None}
    if errors:
        result["first"] = [line for line in output.splitlines() if line.startswith("=========")][:40]
    return result


def conduct(journal: Journal, command: Sequence[str]) -> int:
    """Run the tests under the tool; returns 1 where it found an error. Being asked to end, it still counts."""
    # without torch's caching allocator every tensor is an allocation of its own, with bounds to check
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    lines: list[str] = []
    process = processes.start(
        command,
        cwd=ROOT,
        environment=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    signal.signal(signal.SIGTERM, lambda *_: processes.stop(process))
    for line in process.stdout:
        print(line, end="", flush=True)
        lines.append(line)
    status = process.wait()
    found = verdict("".join(lines), status if status >= 0 else None)
    journal.write("note", sanitizer={"tool": TOOL, **found})
    if found.get("errors"):
        why = "\n".join(found["first"])
        journal.write("test", name=TOOL, outcome="failed", seconds=0.0, why=f"{why}\n{found['errors']} errors")
    return int(bool(found.get("errors")))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--journal", required=True)
    options = parser.parse_args()
    journal, found = Journal(options.journal, "sanitizer"), program()
    if found is None:
        journal.write("note", sanitizer={"unavailable": "compute-sanitizer is not installed"})
        return 0
    arguments = (a.format(journal=options.journal) for a in pytest_arguments("sanitizer", SANITIZED))
    return conduct(journal, [found, f"--tool={TOOL}", "--error-exitcode=0", sys.executable, *arguments])


if __name__ == "__main__":
    sys.exit(main())
