"""make soak: the full matrix of `tests.support.exactness`, as far as the time given goes; the result is recorded.

    python -m tests.soak [--jobs N] [--minutes M] [--steps 100] [--out benchmarks/results/soak.json] [--fresh]

Each case: verified steps re-synchronised to the plain path, a free run, a second run and a resume at every
boundary, all of `--steps` steps. Cases come in a drawn, fixed order, so that a short soak is a fair sample; the
record says how many of them were run, and at which commit each. `--jobs` processes share them, each of one thread,
so that the bits of a case do not depend on how many there are. A soak goes on where one of as many steps ended,
with the cases that failed again; `--fresh` begins anew. The exit code is 1 if a case failed.
"""

import argparse
import gc
import json
import os
import sys
import time
import traceback
from pathlib import Path

from benchmarks.pool import Pool
from benchmarks.stamp import RESULTS, stamp
from moe_unlearn.files import write_text
from tests.support import exactness
from tests.support.exactness import Subject, check_bits, check_free_running, check_steps, named


def run(case: dict, steps: int, until: float) -> dict | None:
    """Return what became of one case; None if it is past `until`, in seconds since the epoch."""
    if time.time() > until:
        return None
    gc.set_threshold(50_000)  # what the imports made stays: to look through it so often takes a tenth of the time
    os.environ["MOE_UNLEARN_IMPL"] = case["impl"]
    started, found = time.process_time(), {"case": named(case)}
    checks = {
        "steps": lambda: check_steps(Subject(case), steps),
        "free": lambda: check_free_running(Subject(case), steps),
        "bits": lambda: check_bits(Subject(case), steps),
    }
    for name, check in checks.items():
        try:
            found[name] = check() or "passed"
        except Exception as error:  # whatever it is, it is the result of this case
            found[name] = f"{type(error).__name__}: {error}"
            found.setdefault("failed", []).append(name)
            traceback.print_exc()
    return found | {"cpu_seconds": round(time.process_time() - started, 1)}


def recorded(path: Path, steps: int) -> list[dict]:
    """The cases that passed with as many steps, as an earlier soak left them."""
    if not path.exists():
        return []
    found = json.loads(path.read_text(encoding="utf-8"))
    if found["steps_per_check"] != steps:
        return []
    return [entry for entry in found["results"] if "failed" not in entry]


def summary(done: list[dict], cases: list[dict], steps: int, here: dict) -> dict:
    """The record of the cases done so far."""
    return {
        "stamp": here,
        "steps_per_check": steps,
        "cases_run": len(done),
        "cases": len(cases),
        "failed": sum("failed" in entry for entry in done),
        "largest_difference": max(
            (e["steps"]["largest_difference"] for e in done if isinstance(e["steps"], dict)), default=None
        ),
        "cpu_minutes": round(sum(e["cpu_seconds"] for e in done) / 60, 1),
        "results": done,
    }


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--jobs", type=int, default=1, help="processes side by side")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no case after this long")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--out", type=Path, default=RESULTS / "soak.json")
    parser.add_argument("--fresh", action="store_true", help="forget what has been recorded")
    options = parser.parse_args(arguments)
    cases, here = list(exactness.full_matrix()), stamp()
    done = [] if options.fresh else recorded(options.out, options.steps)
    known, until = {entry["case"] for entry in done}, time.time() + 60 * options.minutes
    left = [(case, options.steps, until) for case in cases if named(case) not in known]
    with Pool(options.jobs) as pool:
        for _, entry in pool.outcomes(run, left):
            if isinstance(entry, Exception):
                raise entry
            if entry is None:
                continue
            done.append(entry | {"commit": here["commit"]})
            print(f"{len(done)}/{len(cases)} {json.dumps(done[-1])}", flush=True)
            write_text(options.out, json.dumps(summary(done, cases, options.steps, here), indent=1) + "\n")
    return int(any("failed" in entry for entry in done))


if __name__ == "__main__":
    sys.exit(main())
