"""The scorecard of trust: faults and damage in a drawn order, as many as the time allows; `make scorecard`.

    python -m tests.trust.scorecard [--minutes M] [--jobs N] [--out benchmarks/results/trust.json]

Faults are all calls by which each verb changes files, times the kinds of a fault. Damage is that of files which
commands read again, and of masks and states as their readers meet them. The record says how many were tried and what
became of them. The exit code is 1 if one was silent, lost something or ended in a traceback.
"""

import argparse
import functools
import itertools
import os
import random
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports Triton

from benchmarks.pool import Pool
from benchmarks.stamp import RESULTS, stamp
from moe_unlearn.files import write_json
from moe_unlearn.regress.fingerprint import cpu
from tests.support.damage import FORMS
from tests.trust import sealed
from tests.trust.commands import KINDS, VERBS, Commands
from tests.trust.faults import ERRORS, Fault

DRAWS = 40  # places of a file for each form of damage
READ = 3000  # times that each file of a mask, and of a state, is damaged for its reader


@functools.cache
def commands(root: Path) -> Commands:
    """Return the verbs of this process, in a folder of its own."""
    folder = root / str(os.getpid())
    folder.mkdir()
    return Commands(folder)


def tried(root: Path, until: float, what: str, name: str, *more: object) -> str | None:
    """Return what became of one trial; None past `until`, in seconds since the epoch."""
    if time.time() > until:
        return None
    if what == "fault":
        kind, at = more
        commands(root).meets(name, Fault(str(kind), int(str(at))))
        return "nothing lost"
    if what == "read":
        with tempfile.TemporaryDirectory() as folder:
            return f"{sealed.damage(name, READ, Path(folder))} refused"
    file, form, draw = map(str, more)
    return commands(root).reads(name, file, form, f"{form} {draw}")


def main() -> int:
    """Try what the time allows, print and write what became of it; return 1 if anything failed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--out", type=Path, default=RESULTS / "trust.json")
    options = parser.parse_args()
    until = time.time() + 60 * options.minutes
    found: dict[str, Counter] = {}
    failed = []
    with tempfile.TemporaryDirectory() as folder, Pool(options.jobs) as pool:
        here = commands(root := Path(folder))
        faults = [("fault", verb, kind, at) for verb in VERBS for kind in ERRORS for at in range(here.whole(verb)[0])]
        damage = [
            ("damage", kind, *rest)
            for kind in KINDS
            for rest in itertools.product(here.files(kind), FORMS, range(DRAWS))
        ]
        trials = [*faults, *damage]
        random.Random(0).shuffle(trials)
        tasks = [(root, until, *trial) for trial in (*(("read", kind) for kind in sealed.KINDS), *trials)]
        for (_, _, what, name, *more), ended in pool.outcomes(tried, tasks):
            if ended is None:
                continue
            row = found.setdefault(f"{what}: {name if what != 'fault' else more[0]}", Counter())
            if isinstance(ended, Exception):
                failed.append(f"{what} {name} {more}: {ended}")
                row["failed"] += 1
            else:
                number, _, word = ended.partition(" ") if what == "read" else ("1", "", ended)
                row[word] += int(number)
    counts = {name: dict(sorted(row.items())) for name, row in sorted(found.items())}
    head = {"stamp": stamp(), "processor": cpu(), "possible": {"faults": len(faults), "damage": len(damage)}}
    write_json(options.out, head | {"minutes": options.minutes, "tried": counts, "failed": failed})
    for name, row in counts.items():
        print(f"{name:<32} {row}")
    print(*failed, sep="\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
