"""Every op and the whole step against what else there is, within a time: one command, one file.

    OMP_NUM_THREADS=1 python -m benchmarks.suite              the CPU, 15 minutes (make bench)
    python -m benchmarks.suite --device cuda                  this machine's GPU, 9 minutes (make bench-gpu)
    python -m benchmarks.suite --only token_loss --list       the cases whose title holds this, not run

What a target depends on comes first, then the gate shapes, then what is only reported. A case that is not expected to
end in time is left out and said to be. Cases run in a worker process: one that breaks the device, or hangs, costs
itself and no other. Exit status: 0, also where something was left out; 1 where one of our kernels failed; 2 bad usage.
"""

import argparse
import collections
import contextlib
import importlib
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TextIO

from benchmarks import record as records
from benchmarks import stamp
from benchmarks.harness import Case

OPS = ("expert_layer", "masked_update", "weight_score", "route", "expert_mlp", "token_loss", "expert_wgrad",
       "retain_weights", "gram")  # fmt: skip
# of the 15 and 9 minutes; pictures and table come after
SECONDS = {"cpu": 870.0, "cuda": 530.0}
# kept for ending the worker and writing
RESERVE = 5.0
ENVIRONMENT = "environment"
Ask = Callable[[str, float], dict]


class Broken(Exception):
    """The worker died or did not answer in time; the text says how."""


def cases(device: str, only: str = "") -> list[Case]:
    """All cases, what matters first."""
    from benchmarks import step_short

    modules = [importlib.import_module(f"benchmarks.bench_{op}") for op in OPS]
    found = [case for module in modules for case in module.cases(device)] + step_short.cases(device)
    # on a GPU the ops' cases take seconds, the steps' most of the time
    step_first = device == "cpu"
    chosen = (case for case in found if only in case.title)
    return sorted(chosen, key=lambda case: (case.tier, (case.op == "step") != step_first))


def conduct(
    chosen: Sequence[Case],
    ask: Ask,
    record: records.Record,
    *,
    seconds: float,
    clock: Callable[[], float],
    start: float,
    say: Callable[[str], None] = lambda line: print(line, flush=True),
) -> None:
    """Measure the cases in turn until `seconds` after `start`; `ask(title, seconds)` measures one within that time.

    Where cases of an op have taken longer than expected so far, its later ones are expected to, by as much.
    """
    expected, spent = collections.Counter(), collections.Counter()
    for case in chosen:
        now = clock()
        left = seconds - (now - start)
        needed = case.seconds * max(1.0, spent[case.op] / expected[case.op] if expected[case.op] else 1.0)
        row = {"op": case.op, "name": case.name, **case.facts}
        if needed > left:
            row["skipped"] = f"{max(left, 0):.0f} s of {seconds:.0f} were left; it takes about {needed:.0f}"
        else:
            try:
                row = ask(case.title, left)
            except Broken as error:
                # the end of the run is no fault of the case
                row["error" if clock() - start < seconds else "skipped"] = str(error)
            row["seconds"] = round(clock() - now, 1)
            expected[case.op] += case.seconds
            spent[case.op] += clock() - now
        record.add(row, clock() - start)
        say(line(row))
    say(record.finish())


def line(row: dict) -> str:
    """A row for people: results, targets hit and missed, who is missing and why."""
    title = f"{row['op']}: {row['name']}"
    for what in ("skipped", "error"):
        if what in row:
            return f"{title}\n    {what.upper()}: {row[what]}"
    lines = [title, "    " + ", ".join(f"{name} {value:.4g} ms" for name, value in row.get("milliseconds", {}).items())]
    for found in row.get("verdicts", ()):
        limits = f" [{found['low']:.2f}, {found['high']:.2f}]" if "low" in found else ""
        asked = "" if found["target"] is None else f"   target {found['target']:.3g}: {_mark(found['hit'])}"
        lines.append(f"    {found['what']:<60} {found['value']:7.2f}{limits}{asked}")
    return "\n".join(lines + [f"    not measured: {name}: {why}" for name, why in row.get("missing", {}).items()])


def _mark(hit: bool) -> str:
    return "hit" if hit else "MISSED"


class Worker:
    """A process that measures cases by their title, started again after one that broke it.

    `command` answers each line on its stdin with one line of JSON on its stdout; what it prints goes to `log`.
    """

    def __init__(self, command: Sequence[str], log: TextIO):
        self.command, self.log = command, log
        self.process: subprocess.Popen | None = None

    def ask(self, title: str, seconds: float) -> dict:
        """The row of a case. Raises Broken where the worker dies or takes longer."""
        if self.process is None or self.process.poll() is not None:
            self._start()
        try:
            self.process.stdin.write(title + "\n")
            self.process.stdin.flush()
            answer = self.answers.get(timeout=max(seconds, 0))
        except queue.Empty:
            self.stop()
            raise Broken(f"no end within {seconds:.0f} s") from None
        except BrokenPipeError:
            answer = ""
        if not answer:
            status = self.process.wait()
            self.stop()
            raise Broken(f"its process ended with status {status}: {self._last_words()}")
        return json.loads(answer)

    def stop(self) -> None:
        """End the worker and what it started."""
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.process = None

    def _start(self) -> None:
        self.process = subprocess.Popen(
            self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log, text=True, cwd=stamp.ROOT,
            start_new_session=True,
        )  # fmt: skip
        self.answers: queue.Queue[str] = queue.Queue()
        threading.Thread(target=_forward, args=(self.process.stdout, self.answers), daemon=True).start()

    def _last_words(self) -> str:
        self.log.flush()
        self.log.seek(0)
        lines = [text.strip() for text in self.log.read().splitlines() if text.strip()]
        return lines[-1][:200] if lines else "without a word"


def _forward(source: TextIO, answers: queue.Queue) -> None:
    for answer in source:
        answers.put(answer)
    answers.put("")  # the end of the process


def work(device: str) -> None:
    """Answer titles on stdin with rows on stdout until stdin ends."""
    from benchmarks import harness

    # whatever libraries print goes to the log
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    known = {case.title: case for case in cases(device)}
    ceilings: dict = {}
    for title in map(str.strip, sys.stdin):
        if title == ENVIRONMENT:
            row = environment(device)
            ceilings = row["ceilings"]
        else:
            ceilings = ceilings or harness.measure_ceilings(device)
            row = measured(known[title], device, ceilings)
            harness.collect(device)
        answers.write(json.dumps(row) + "\n")
        answers.flush()


def measured(case: Case, device: str, ceilings: Mapping) -> dict:
    """The row of a case, an error of it in the row; one that leaves a GPU unusable is raised."""
    from benchmarks import harness

    try:
        return harness.run(case, device, ceilings)
    except Exception as error:
        harness.still_usable(device, case.title, error)
        traceback.print_exc()
        return {"op": case.op, "name": case.name, **case.facts, "error": harness.brief(error)}


def environment(device: str) -> dict:
    """What a record begins with."""
    import torch

    from benchmarks import harness
    from moe_unlearn.regress.fingerprint import fingerprint

    where = stamp.stamp()
    if device == "cpu":
        where["device"] = "cpu"
    return {
        "stamp": where,
        "fingerprint": fingerprint(device),
        "kernels": stamp.kernel_sources_hash(device=device),
        "time": "CUDA events" if device == "cuda" else "processor" if torch.get_num_threads() == 1 else "wall",
        "ceilings": harness.measure_ceilings(device),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=tuple(SECONDS), default="cpu")
    parser.add_argument("--seconds", type=float, help="when to end; default 870 on a CPU, 530 on a GPU")
    parser.add_argument("--only", default="", help="cases whose title holds this")
    parser.add_argument("--list", action="store_true", help="print the cases in their order and end")
    parser.add_argument("--out", help="the file to write instead of one under benchmarks/results")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        work(arguments.device)
        return 0
    chosen = cases(arguments.device, arguments.only)
    if arguments.list or not chosen:
        print("\n".join(f"{case.tier} {case.seconds:5.0f} s  {case.title}" for case in chosen) or "no such case")
        return 0 if chosen else 2
    return conducted(arguments, chosen)


def conducted(arguments: argparse.Namespace, chosen: Sequence[Case]) -> int:
    """A run from its environment to its record."""
    start, clock = time.monotonic(), time.monotonic
    seconds = arguments.seconds or SECONDS[arguments.device]
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as log:
        worker = Worker([sys.executable, "-m", "benchmarks.suite", "--worker", "--device", arguments.device], log)
        try:
            head = worker.ask(ENVIRONMENT, seconds)
            where = head["stamp"]
            path = Path(arguments.out) if arguments.out else records.new_path(where["device"], where["commit"])
            record = records.Record(path, {**head, "only": arguments.only, "started": time.time(), "budget": seconds})
            conduct(chosen, worker.ask, record, seconds=seconds - RESERVE, clock=clock, start=start)
        except Broken as error:
            print(f"nothing measured: {error}", file=sys.stderr)
            return 1
        finally:
            worker.stop()
    shown = path.relative_to(stamp.ROOT) if path.is_relative_to(stamp.ROOT) else path
    print(f"{shown}: {len(record.content['rows'])} cases in {clock() - start:.0f} s")
    return int(any("error" in row for row in record.content["rows"]))


if __name__ == "__main__":
    sys.exit(main())
