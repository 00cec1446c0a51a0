"""make soak: the full matrix of `tests.exactness`, as far as the time given goes; the result is recorded.

    python -m tests.soak [--minutes M] [--steps 100] [--out benchmarks/results/soak.json]

Each case: verified steps re-synchronised to the plain path, a free run, a second run and a resume at every
boundary, all of `--steps` steps. Cases come in a drawn, fixed order, so that a short soak is a fair sample; the
record says how many of them were run. The exit code is 1 if one failed.
"""

import argparse
import json
import os
import sys
import time
import traceback
from pathlib import Path

import torch

from benchmarks.stamp import RESULTS, stamp
from tests import exactness
from tests.exactness import Subject, check_bits, check_free_running, check_steps, named


def run(case: dict, steps: int) -> dict:
    """What became of one case."""
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


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no case after this long")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--out", type=Path, default=RESULTS / "soak.json")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    cases, done, started = list(exactness.full_matrix()), [], time.monotonic()
    for case in cases:
        if time.monotonic() - started > 60 * options.minutes:
            break
        done.append(run(case, options.steps))
        print(f"{len(done)}/{len(cases)} {json.dumps(done[-1])}", flush=True)
        summary = {
            "stamp": stamp(),
            "steps_per_check": options.steps,
            "cases_run": len(done),
            "cases": len(cases),
            "failed": sum("failed" in entry for entry in done),
            "largest_difference": max(
                (e["steps"]["largest_difference"] for e in done if isinstance(e["steps"], dict)), default=None
            ),
            "minutes": round((time.monotonic() - started) / 60, 1),
            "results": done,
        }
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    return int(any("failed" in entry for entry in done))


if __name__ == "__main__":
    sys.exit(main())
