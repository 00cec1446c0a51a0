"""Runs mutants in forked children, judges them, and says and records what became of each."""

import contextlib
import json
import os
import random
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.mutants.equivalent import EQUIVALENT
from tests.mutants.mutant import ROOT, DoesNotBuild, Family, Mutant, Stage

VERDICTS = ("killed", "timed out", "equivalent", "survived", "does not build")
TEST_SECONDS = 90  # of one test
SAME_CODE = "the compiler makes the same code of it"


def run(
    family: Family, mutant: Mutant | None, stages: list[Stage], limit: int = TEST_SECONDS
) -> tuple[str, list[float]]:
    """Return the verdict on a mutant, or on the kernels as they are, and the seconds of each stage."""
    seconds, differs = [], False
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        family.copy(folder, mutant)
        for stage in stages:
            begun = time.monotonic()
            status = "passed"
            try:
                if family.build(folder, stage) or mutant is None:
                    differs = True
                    status = _in_child(lambda stage=stage: _pytest(family, folder, stage, limit))
            except DoesNotBuild:
                status = "does not build"
            seconds.append(round(time.monotonic() - begun, 1))
            if status != "passed":
                return status, seconds
    return "survived" if differs else "equivalent", seconds


def _in_child(function: Callable[[], int]) -> str:
    child = os.fork()
    if child == 0:
        status = 70
        try:
            os.setsid()
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            status = function()
        finally:
            os._exit(status)
    _, status = os.waitpid(child, 0)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)  # what it left behind
    if os.WIFSIGNALED(status):
        return "timed out" if os.WTERMSIG(status) == signal.SIGALRM else "killed"
    code = os.WEXITSTATUS(status)
    # pytest: 0 passed, 1 failed, 2 a module could not be imported, 5 nothing collected
    if code not in (0, 1, 2, 5):
        raise RuntimeError(f"the tests could not be run: exit status {code}")
    return "passed" if code in (0, 5) else "killed"


class _Alarm:
    """Each test has so many seconds: a loop without end is one slow test, a slow machine many."""

    def __init__(self, seconds: int):
        self.seconds = seconds

    def pytest_runtest_logstart(self):
        signal.alarm(self.seconds)


def _pytest(family: Family, folder: Path, stage: Stage, limit: int) -> int:
    """Run pytest with the kernels of the folder."""
    import pytest

    family.enter(folder, stage)
    with open(os.devnull, "w", encoding="utf-8") as null:
        os.dup2(null.fileno(), 1)
        os.dup2(null.fileno(), 2)
    options = ["-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", f"--rootdir={ROOT}"]
    return int(pytest.main([*options, *stage.arguments], plugins=[_Alarm(limit)]))


def identity(family: Family, mutant: Mutant) -> tuple[str, str, str, str]:
    """Return a mutant's key in EQUIVALENT, which survives edits elsewhere in the file."""
    return mutant.file, mutant.kernel, *mutant.diff(family.path_of(mutant.file).read_text(encoding="utf-8"))


def verdict(family: Family, mutant: Mutant) -> dict:
    """Run a mutant and return what became of it, as it is recorded."""
    *_, before, after = key = identity(family, mutant)
    result, seconds = run(family, mutant, family.stages(mutant.file))
    reason = EQUIVALENT.get(key) if result == "survived" else SAME_CODE if result == "equivalent" else None
    if reason:
        result = "equivalent"
    return {
        "file": mutant.file,
        "kernel": mutant.kernel,
        "line": mutant.line,
        "kind": mutant.kind,
        "before": before,
        "after": after,
        "result": result,
        "stage": len(seconds),
        "seconds": round(sum(seconds), 1),
    } | ({"reason": reason} if reason else {})


def verdicts(family: Family, mutants: list[Mutant], jobs: int = 1, unmutated: bool = True) -> list[dict]:
    """Run the mutants in `jobs` processes; if `unmutated`, what may kill one must let the kernels pass as they are."""
    family.prepare()  # once: every mutant's process is a fork of this one
    for stage in sorted({s for m in mutants for s in family.stages(m.file)}) if unmutated else ():
        result, seconds = run(family, None, [stage])
        print(f"{' '.join(stage.arguments)}, as it is: {result} {seconds[0]} s", flush=True)
        if result != "survived":
            raise RuntimeError(f"the kernels fail these tests unmutated: {result}")
    return sorted(_shared(family, mutants, jobs), key=lambda r: (r["file"], r["line"], r["kind"], r["after"]))


def _shared(family: Family, mutants: list[Mutant], jobs: int) -> Iterator[dict]:
    """Yield the verdicts as they come from `jobs` forked workers."""
    read, write = os.pipe()
    workers = []
    for job in range(jobs):
        workers.append(os.fork())
        if workers[-1] == 0:
            try:
                os.close(read)
                for mutant in mutants[job::jobs]:
                    # one write below PIPE_BUF is atomic
                    os.write(write, json.dumps(verdict(family, mutant)).encode()[:4000] + b"\n")
            finally:
                os._exit(0)
    os.close(write)
    count = 0
    with os.fdopen(read, encoding="utf-8") as lines:
        for count, line in enumerate(lines, 1):
            result = json.loads(line)
            print(f"{count}/{len(mutants)} {line_of(result)}", flush=True)
            yield result
    for worker in workers:
        os.waitpid(worker, 0)
    if count < len(mutants):
        raise RuntimeError(f"{len(mutants) - count} mutants have no verdict: a worker died")


# ------------------------------------------------------------------------------------------------------ report


def line_of(result: dict) -> str:
    """Describe one verdict for people."""
    return f"{result['result']:10} {result['seconds']:5.1f} s  {name_of(result)}"


def name_of(result: dict) -> str:
    """Name a mutant: file, line and rule, then what it does."""
    where = f" {result['kernel']}" if result["kernel"] else ""
    return f"{result['file']}:{result['line']}:{result['kind']}{where}: {result['before']}  ->  {result['after']}"


def summary(results: list[dict]) -> dict[str, dict[str, int]]:
    """Count the verdicts of each file."""
    counts: dict[str, dict[str, int]] = {}
    for result in results:
        counts.setdefault(result["file"], dict.fromkeys(VERDICTS, 0))[result["result"]] += 1
    return counts


def record(results: list[dict], seconds: float) -> dict:
    """Return what is recorded of a whole run."""
    return {
        "mutants": len(results),
        "seconds": round(seconds),
        "counts": summary(results),
        "survivors": [r for r in results if r["result"] == "survived"],
        "equivalent": [r for r in results if r["result"] == "equivalent"],
    }


def again(recorded: dict, results: list[dict]) -> dict:
    """Return a record in which these verdicts replace those of its survivors."""
    for result in results:
        of_file = recorded["counts"][result["file"]]
        of_file["survived"] -= 1
        of_file[result["result"]] += 1
    new = record(results, 0)
    return recorded | {"survivors": new["survivors"], "equivalent": recorded["equivalent"] + new["equivalent"]}


def rotation() -> int:
    """Return a seed from the commit, or from the day where there is no git: a sample covers all in time."""
    try:
        git = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return int(time.time() // 86400)
    return int(git.stdout[:8], 16)


def sample(family: Family, mutants: list[Mutant], count: int, seed: int) -> list[Mutant]:
    """Return some of the mutants that are not known to change nothing."""
    mutants = [mutant for mutant in mutants if identity(family, mutant) not in EQUIVALENT]
    return random.Random(seed).sample(mutants, min(count, len(mutants)))
