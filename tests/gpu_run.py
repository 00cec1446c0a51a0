"""Fifteen minutes on a GPU: `make gpu` proves the kernels there, `make bench-gpu` measures them.

    python -m tests.gpu_run 1            at most 5 minutes: install, smoke, the device matrix, memcheck
    python -m tests.gpu_run 2            at most 4 minutes, useful without the first: ops, whole steps, gate shapes
    python -m tests.gpu_run 2 --left benchmarks/results    only what earlier runs of these kernels have not done
    python -m tests.gpu_run --dry-run    the stages of both with their limits; starts nothing
    python -m tests.gpu_run --list-tests what the device matrix gives to pytest, one argument a line

Every result is a line of <out>/gpu-<command>-<time>.jsonl as soon as it is known, beside one log a stage; `--out` is
benchmarks/results/<device>/ where it is not given. A run that is stopped has lost one line: `make gpu-report
DIR=<out>` makes tables of what is there, of one run or of several.

Exit status: 0 all passed, 1 something failed, or was skipped without a reason that holds on a GPU, 2 no GPU, 3 nothing
failed but not all of it was run.
"""

import argparse
import datetime
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks import processes, stamp
from benchmarks.gpu_summary import SKIPS_ALLOWED, findings, status_of, table
from benchmarks.journal import SUFFIX, Journal, of_kind, read
from tests.gpu_stages import MATRIX, ROOT, TOTAL, TRITON_CACHE, Stage, commands

__all__ = ["SKIPS_ALLOWED"]
# between asking a stage to end and ending it
GRACE = 3.0
_DEVICE = "import torch; print(torch.cuda.get_device_name() if torch.cuda.is_available() else '')"


class Stopped(Exception):
    """Somebody asked this run to end."""


def dry_run() -> str:
    """Both commands with their stages and limits."""
    lines = []
    for number, stages in commands().items():
        lines.append(f"command {number}: python -m tests.gpu_run {number}; at most {TOTAL[number]:.0f} s")
        for stage in stages:
            lines.append(f"  {stage.name:<10} {stage.seconds:4.0f} s  {stage.what}")
            lines.append(f"             {shlex.join(['python', *stage.arguments])}")
    return "\n".join(lines)


def conduct(stages: Sequence[Stage], journal: Path, *, seconds: float, environment: dict[str, str]) -> None:
    """Run the stages in turn; each has its seconds and what those before it left, within `seconds` in all."""
    start, planned = time.monotonic(), 0.0
    for stage in stages:
        planned += stage.seconds
        limit = min(planned, seconds) - (time.monotonic() - start)
        own = Journal(journal, stage.name)
        if limit <= 1:
            own.write("stage", state="ended", status=None, cut=True, seconds=0.0, limit=round(max(limit, 0.0), 1))
            continue
        own.write("stage", state="started", limit=round(limit, 1))
        began = time.monotonic()
        status = run(stage.command(journal, limit), limit, journal.with_suffix(f".{stage.name}.log"), environment)
        took = round(time.monotonic() - began, 1)
        own.write("stage", state="ended", status=status, cut=status is None, seconds=took, limit=round(limit, 1))


def run(command: Sequence[str], seconds: float, log: Path, environment: dict[str, str]) -> int | None:
    """The exit status of a command, its output in `log`; None where it was ended for taking longer."""
    with log.open("ab") as output:
        process = processes.start(command, cwd=ROOT, environment=environment, output=output)
        try:
            return process.wait(max(seconds - GRACE, 0.1))
        except subprocess.TimeoutExpired:
            return None
        finally:
            processes.stop(process, GRACE)


def variables() -> dict[str, str]:
    """The environment of the stages: no interpreter, a Triton cache that was packed, output as it is made."""
    own = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    if TRITON_CACHE.is_dir():
        own.setdefault("TRITON_CACHE_DIR", str(TRITON_CACHE))
    return own | {"PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": own.get("OMP_NUM_THREADS", "1")}


def device_folder() -> Path | None:
    """benchmarks/results/<device>, or None, with a reason on stderr, where there is no GPU."""
    # not in this process: it would hold memory of the device for as long as it lives
    asked = subprocess.run([sys.executable, "-c", _DEVICE], capture_output=True, text=True)
    if asked.returncode:
        last = asked.stderr.strip().splitlines()[-1:]
        print("this Python has no usable torch (PYTHON=... chooses another):", *last, file=sys.stderr)
        return None
    name = asked.stdout.strip()
    if not name:
        print("no CUDA GPU here; nothing was run and nothing recorded", file=sys.stderr)
        return None
    return stamp.RESULTS / stamp.folder_of(name)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("command", type=int, nargs="?", choices=tuple(TOTAL), default=1)
    parser.add_argument("--out", type=Path, help="the folder to write to; default benchmarks/results/<device>")
    parser.add_argument("--only", default="", help="the stages to run, with commas; their limits stay")
    parser.add_argument("--seconds", type=float, help="for all stages together")
    parser.add_argument(
        "--left", type=Path, metavar="DIR", help="only what the runs below DIR have not done or measured"
    )
    parser.add_argument("--dry-run", action="store_true", help="print the stages and their limits")
    parser.add_argument("--list-tests", action="store_true", help="print what the device matrix gives to pytest")
    parser.add_argument("--stub", type=float, metavar="SECONDS", help="stages without a device: lines this far apart")
    options = parser.parse_args(arguments)
    if options.dry_run or options.list_tests:
        print(dry_run() if options.dry_run else "\n".join(MATRIX))
        return 0
    stages = commands()[options.command]
    wanted = [name for name in options.only.split(",") if name]
    if unknown := set(wanted) - {stage.name for stage in stages}:
        parser.error(f"--only: command {options.command} has no stage {', '.join(sorted(unknown))}")
    stages = tuple(stage for stage in stages if not wanted or stage.name in wanted)
    if options.left:
        stages = tuple(stage.without(options.left.resolve()) for stage in stages)
    if options.stub is not None:
        from tests.gpu_stub import stubbed

        stages, folder = tuple(stubbed(stage, options.stub) for stage in stages), options.out
        if folder is None:
            parser.error("--stub: --out says where its lines go")
    else:
        folder = device_folder()
        if folder is None:
            return 2
        folder = options.out or folder
    return report(options.command, stages, folder.resolve(), options.seconds or TOTAL[options.command])


def report(command: int, stages: Sequence[Stage], folder: Path, seconds: float) -> int:
    """Conduct a command and print what its file says; returns the exit status."""
    now = datetime.datetime.now(datetime.UTC).strftime("%Y%m%dT%H%M%S%f")[:-3]
    path = folder / f"gpu-{command}-{now}{SUFFIX}"
    signal.signal(signal.SIGTERM, _stop)
    Journal(path).write("begin", command=command, stages={stage.name: stage.seconds for stage in stages})
    print(f"{path}", flush=True)
    try:
        conduct(stages, path, seconds=seconds, environment=variables())
    except (Stopped, KeyboardInterrupt):
        Journal(path).write("note", stopped=True)
    lines = read(path)
    found = findings([lines])
    print(table([lines]), *found, sep="\n  ", flush=True)
    return status_of(found) if of_kind(lines, "begin") else 1


def _stop(number: int, frame: object) -> None:
    raise Stopped


if __name__ == "__main__":
    sys.exit(main())
