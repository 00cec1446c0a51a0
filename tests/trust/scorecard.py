"""The scorecard of trust: faults and damage in a drawn order, as many as the time allows; `make scorecard`.

    python -m tests.trust.scorecard [--minutes M] [--jobs N] [--out benchmarks/results/trust.json]

Faults are all calls by which each verb changes files, times the kinds of a fault; those that kill come first, since
counts of crashes are what others publish. Damage is that of files which commands read again, and of masks and states as
their readers meet them. Each trial of a commit is appended to `build/trust/COMMIT.jsonl` (`benchmarks.journal`) as it
ends, and the same command goes on where it was stopped; with changes that are not committed it begins anew. The record
says how many were tried and what became of them. The exit code is 1 if one was silent, lost something or ended in a
traceback.
"""

import argparse
import functools
import itertools
import os
import random
import resource
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports Triton

from benchmarks.journal import Journal, of_kind, read
from benchmarks.pool import Pool
from benchmarks.stamp import RESULTS, ROOT, stamp
from moe_unlearn.files import write_json
from moe_unlearn.regress.fingerprint import cpu
from tests.support.damage import FORMS
from tests.trust import sealed
from tests.trust.commands import KINDS, VERBS, Commands
from tests.trust.faults import CRASHES, ERRORS, Fault

DRAWS = 40  # places of a file for each form of damage
READ = 3000  # times that each file of a mask, and of a state, is damaged for its reader


@functools.cache
def commands(root: Path) -> Commands:
    """Return the verbs of this process, in a folder of its own."""
    folder = root / str(os.getpid())
    folder.mkdir()
    return Commands(folder)


def ended(root: Path, until: float, what: str, name: str, *more: object) -> dict[str, Any] | None:
    """Return what became of one trial, how many it stands for and its processor time; None past `until` (epoch)."""
    if time.time() > until:
        return None
    began = _processor_seconds()
    try:
        number, outcome = _tried(root, what, name, *more)
        found = {"number": number, "ended": outcome}
    except Exception as error:
        found = {"number": 1, "ended": "failed", "why": f"{type(error).__name__}: {error}"}
    return found | {"seconds": round(_processor_seconds() - began, 2)}


def _tried(root: Path, what: str, name: str, *more: object) -> tuple[int, str]:
    if what == "read":
        with tempfile.TemporaryDirectory() as folder:
            return sealed.damage(name, READ, Path(folder)), "refused"
    if what == "fault":
        kind, at = more
        return 1, commands(root).meets(name, Fault(str(kind), int(str(at))))
    file, form, draw = map(str, more)
    return 1, commands(root).reads(name, file, form, f"{form} {draw}")


def _processor_seconds() -> float:
    used = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(one.ru_utime + one.ru_stime for one in used)


def main() -> int:
    """Try what the time allows, print and write what became of it; return 1 if anything failed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--out", type=Path, default=RESULTS / "trust.json")
    options = parser.parse_args()
    until = time.time() + 60 * options.minutes
    about = stamp()
    journal = Journal(ROOT / "build" / "trust" / f"{about['commit']}.jsonl")
    if about["uncommitted_changes"]:
        journal.path.unlink(missing_ok=True)
    known = {tuple(line["trial"]) for line in _trials(journal)}
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
        trials.sort(key=lambda trial: (trial[2] not in CRASHES, trial[1] == "run"))  # a run takes longest
        tasks = [*(("read", kind) for kind in sealed.KINDS), *trials]
        for (_, _, *trial), found in pool.outcomes(
            ended, [(root, until, *task) for task in tasks if task not in known]
        ):
            if isinstance(found, Exception):
                raise found
            if found is not None:
                journal.write("trial", trial=trial, **found)
    lines = _trials(journal)
    counts: dict[str, Counter] = {}
    for line in lines:
        what, name, *more = line["trial"]
        counts.setdefault(f"{what}: {more[0] if what == 'fault' else name}", Counter())[line["ended"]] += line["number"]
    record = {
        "stamp": about,
        "processor": cpu(),
        "possible": {"faults": len(faults), "damage": len(damage)},
        "processor_minutes": round(sum(line["seconds"] for line in lines) / 60, 1),
        "tried": {name: dict(sorted(row.items())) for name, row in sorted(counts.items())},
        "failed": sorted(f"{line['trial']}: {line['why']}" for line in lines if line["ended"] == "failed"),
    }
    write_json(options.out, record)
    for name, row in record["tried"].items():
        print(f"{name:<32} {row}")
    print(*record["failed"], sep="\n")
    return 1 if record["failed"] else 0


def _trials(journal: Journal) -> list[dict]:
    return of_kind(read(journal.path), "trial") if journal.path.exists() else []


if __name__ == "__main__":
    sys.exit(main())
