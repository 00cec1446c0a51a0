"""Measure every op and the whole step against their rivals within a time: one command, one file.

    OMP_NUM_THREADS=1 python -m benchmarks.suite              the CPU, 15 minutes (make bench)
    python -m benchmarks.suite --device cuda                  this machine's GPU, 9 minutes
    python -m benchmarks.suite --only token_loss --list       lists cases whose title contains this, runs none
    python -m benchmarks.suite --device cuda --part steps --journal FILE      a stage of `make bench-gpu`

Cases on which a target depends come first, then the gate shapes, then those that are only reported. A case that is
not expected to end in time is left out and reported as such. Cases run in a worker process, so one that breaks the
device or hangs costs only itself. The exit status is 0, even where something was left out, 1 where one of our kernels
failed, and 2 for bad usage.
"""

import argparse
import collections
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

from benchmarks import gpu_summary, processes, stamp
from benchmarks import record as records
from benchmarks.harness import Case
from benchmarks.journal import Journal

OPS = (
    "expert_layer",
    "masked_update",
    "weight_score",
    "route",
    "expert_mlp",
    "token_loss",
    "expert_wgrad",
    "retain_weights",
    "gram",
)
# less than the 15 and 9 minutes, since pictures and table come after
SECONDS = {"cpu": 870.0, "cuda": 530.0}
# kept for ending the worker and for writing
RESERVE = 5.0
ENVIRONMENT, PARTIAL = "environment", "partial"
PARTS = ("all", "ops", "steps")
TRACE = 2000  # characters that a record keeps of what a failure printed
Ask = Callable[[str, float], dict]


class Broken(Exception):
    """Error of a worker that died or did not answer in time.

    The text says how; `row` is what the worker had measured by then, `trace` the end of what it printed.
    """

    row: dict | None = None
    trace: str = ""


def cases(device: str, only: str = "", *, part: str = "all", tiers: Sequence[int] = ()) -> list[Case]:
    """Return the cases of a part and of the given tiers (of all tiers if none is given), the most important first."""
    from benchmarks import step_short

    modules = [importlib.import_module(f"benchmarks.bench_{op}") for op in OPS]
    found = [case for module in modules for case in module.cases(device)] + step_short.cases(device)
    # on a GPU the ops' cases take seconds, and the steps' cases most of the time
    step_first = device == "cpu"
    chosen = (case for case in found if only in case.title and (not tiers or case.tier in tiers))
    if part != "all":
        chosen = (case for case in chosen if (case.op == "step") == (part == "steps"))
    return sorted(chosen, key=lambda case: (case.tier, (case.op == "step") != step_first))


def conduct(
    chosen: Sequence[Case],
    ask: Ask,
    record: records.Record | records.Lines,
    *,
    seconds: float,
    clock: Callable[[], float],
    start: float,
    say: Callable[[str], None] = lambda line: print(line, flush=True),
) -> None:
    """Measure the cases in turn until `seconds` after `start`; `ask(title, seconds)` measures one within that time.

    Where the cases of an op have so far taken longer than expected, its later ones are expected to take longer by the
    same factor.
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
                # a case is not to blame for the end of the run
                late = clock() - start >= seconds
                if late and error.row:
                    row = {**error.row, "cut": str(error)}
                else:
                    row["skipped" if late else "error"] = str(error)
                if not late and error.trace:
                    row["trace"] = error.trace
            row["seconds"] = round(clock() - now, 1)
            expected[case.op] += case.seconds
            spent[case.op] += clock() - now
        record.add(row, clock() - start)
        say(line(row))
    say(record.finish())


def line(row: dict) -> str:
    """Return a row as text: results, targets hit and missed, missing contenders and the reasons."""
    title = f"{row['op']}: {row['name']}"
    for what in ("skipped", "error"):
        if what in row:
            return f"{title}\n    {what.upper()}: {row[what]}"
    lines = [
        f"{title}{' (not to its end)' if 'cut' in row else ''}",
        "    " + ", ".join(f"{name} {value:.4g} ms" for name, value in row.get("milliseconds", {}).items()),
    ]
    for found in row.get("verdicts", ()):
        limits = f" [{found['low']:.2f}, {found['high']:.2f}]" if "low" in found else ""
        asked = "" if found["target"] is None else f"   target {found['target']:.3g}: {_mark(found['hit'])}"
        lines.append(f"    {found['what']:<60} {found['value']:7.2f}{limits}{asked}")
    return "\n".join(lines + [f"    not measured: {name}: {why}" for name, why in row.get("missing", {}).items()])


def _mark(hit: bool) -> str:
    return "hit" if hit else "MISSED"


class Worker:
    """Measures cases by title in a process of its own, which is started again after a case that broke it.

    `command` answers each line on its stdin with one line of JSON on its stdout; its other output goes to `log`.
    """

    def __init__(self, command: Sequence[str], log: TextIO):
        self.command, self.log = command, log
        self.process: subprocess.Popen | None = None
        self.partial: dict | None = None

    def ask(self, title: str, seconds: float) -> dict:
        """Return the row of a case; raise Broken where the worker dies or takes longer."""
        self.partial = None
        if self.process is None or self.process.poll() is not None:
            self._start()
        try:
            self.process.stdin.write(title + "\n")
            self.process.stdin.flush()
            answer = self._answer(time.monotonic() + max(seconds, 0))
        except queue.Empty:
            self.stop()
            raise self._broken(f"no end within {seconds:.0f} s") from None
        except BrokenPipeError:
            answer = {}
        if not answer:
            status = self.process.wait()
            self.stop()
            raise self._broken(f"its process ended with status {status}: {self._last_words()}")
        return answer

    def _answer(self, deadline: float) -> dict:
        """Return the next whole answer, {} at the end of the process; keep earlier parts in `partial`."""
        while text := self.answers.get(timeout=max(deadline - time.monotonic(), 0)):
            answer = json.loads(text)
            if PARTIAL not in answer:
                return answer
            self.partial = answer[PARTIAL]
        return {}

    def _broken(self, how: str) -> Broken:
        error = Broken(how)
        error.row, error.trace = self.partial, self._printed()[-TRACE:]
        return error

    def stop(self) -> None:
        """End the worker and what it started."""
        if self.process is not None:
            processes.stop(self.process)
            self.process = None

    def _start(self) -> None:
        self.process = processes.start(
            self.command, cwd=stamp.ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log, text=True
        )
        self.answers: queue.Queue[str] = queue.Queue()
        threading.Thread(target=_forward, args=(self.process.stdout, self.answers), daemon=True).start()

    def _printed(self) -> str:
        self.log.flush()
        self.log.seek(0)
        return self.log.read()

    def _last_words(self) -> str:
        lines = [text.strip() for text in self._printed().splitlines() if text.strip()]
        return lines[-1][:200] if lines else "without a word"


def _forward(source: TextIO, answers: queue.Queue) -> None:
    for answer in source:
        answers.put(answer)
    answers.put("")  # the end of the process


def work(device: str) -> None:
    """Answer titles on stdin with rows on stdout until stdin ends."""
    from benchmarks import harness, step_short

    # other output, as from libraries, goes to the log
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def answer(row: dict) -> None:
        answers.write(json.dumps(row) + "\n")
        answers.flush()

    harness.progress = lambda row: answer({PARTIAL: row})
    known = {case.title: case for case in cases(device)}
    ceilings: dict = {}
    for title in map(str.strip, sys.stdin):
        if title == ENVIRONMENT:
            row = environment(device)
            ceilings = row["ceilings"]
        else:
            ceilings = ceilings or harness.measure_ceilings(device)
            if known[title].op != "step":
                step_short.forget()
            row = measured(known[title], device, ceilings)
            harness.collect(device)
        answer(row)


def measured(case: Case, device: str, ceilings: Mapping) -> dict:
    """Return the row of a case, with its error if it fails; raise an error that leaves a GPU unusable."""
    from benchmarks import harness

    try:
        return harness.run(case, device, ceilings)
    except Exception as error:
        harness.still_usable(device, case.title, error)
        row = {"op": case.op, "name": case.name, **case.facts, "error": harness.brief(error)}
        return row | {"trace": traceback.format_exc()[-TRACE:]}


def environment(device: str) -> dict:
    """Return what a record begins with."""
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
        "onednn_held_to": os.environ.get("ONEDNN_MAX_CPU_ISA", ""),
        "time": "CUDA events" if device == "cuda" else "processor" if torch.get_num_threads() == 1 else "wall",
        "ceilings": harness.measure_ceilings(device),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=tuple(SECONDS), default="cpu")
    parser.add_argument("--seconds", type=float, help="when to end; default 870 on a CPU, 530 on a GPU")
    parser.add_argument("--only", default="", help="cases whose title holds this")
    parser.add_argument("--part", choices=PARTS, default="all", help="the ops, the whole steps, or both")
    parser.add_argument("--tiers", default="", help="0: targets depend on it, 1: gate shapes, 2: report; with commas")
    parser.add_argument("--left", type=Path, metavar="DIR", help="only what GPU runs below DIR have not measured")
    parser.add_argument("--list", action="store_true", help="print the cases in their order and end")
    parser.add_argument("--journal", type=Path, help="append lines to this file instead (`benchmarks.journal`)")
    parser.add_argument("--stage", default="bench", help="the stage that these lines belong to")
    parser.add_argument("--out", help="the file to write instead of one under benchmarks/results")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        work(arguments.device)
        return 0
    tiers = [int(tier) for tier in arguments.tiers.split(",") if tier]
    chosen = cases(arguments.device, arguments.only, part=arguments.part, tiers=tiers)
    if arguments.left:
        _, known = gpu_summary.done(arguments.left, stamp.kernel_sources_hash())
        chosen = [case for case in chosen if case.title not in known]
        if not chosen:
            print(f"all of it is measured below {arguments.left}")
            return 0
    if arguments.list or not chosen:
        print("\n".join(f"{case.tier} {case.seconds:5.0f} s  {case.title}" for case in chosen) or "no such case")
        return 0 if chosen else 2
    return conducted(arguments, chosen)


def restriction(only: str, tiers: str) -> str:
    """Return what a run was restricted to, "" if it has all cases; a restricted run is not a complete one."""
    return " ".join(filter(None, [only, f"tier {tiers}" if tiers else ""]))


def conducted(arguments: argparse.Namespace, chosen: Sequence[Case]) -> int:
    """Conduct a run from its environment to its record; return the exit status."""
    start, clock = time.monotonic(), time.monotonic
    # ends through `finally`, so that the worker is ended too
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    seconds = arguments.seconds or SECONDS[arguments.device]
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as log:
        worker = Worker([sys.executable, "-m", "benchmarks.suite", "--worker", "--device", arguments.device], log)
        try:
            head = worker.ask(ENVIRONMENT, seconds)
            head |= {"only": restriction(arguments.only, arguments.tiers), "started": time.time(), "budget": seconds}
            record = _record(arguments, head)
            conduct(chosen, worker.ask, record, seconds=seconds - RESERVE, clock=clock, start=start)
        except Broken as error:
            print(f"nothing measured: {error}", file=sys.stderr)
            return 1
        finally:
            worker.stop()
    path, rows = record.path, record.content["rows"]
    shown = path.relative_to(stamp.ROOT) if path.is_relative_to(stamp.ROOT) else path
    print(f"{shown}: {len(rows)} cases in {clock() - start:.0f} s")
    return int(any("error" in row for row in rows))


def _record(arguments: argparse.Namespace, head: Mapping) -> records.Record | records.Lines:
    """Return the record of this run: lines for the journal of a GPU run, or a file of its own."""
    if arguments.journal:
        return records.Lines(Journal(arguments.journal, arguments.stage), head)
    where = head["stamp"]
    path = Path(arguments.out) if arguments.out else records.new_path(where["device"], where["commit"])
    return records.Record(path, head)


if __name__ == "__main__":
    sys.exit(main())
