"""Mutants of the kernels: small wrong versions of them, each of which some test must notice.

Every file is mutated mechanically, one edit at a time. A seed draws a few mutants of each file, evenly over the kinds
of edit; `tests/mutants/breakages.py` names what no edit expresses. Each runs in a forked child on a copy of the
kernels, up to the first failing test. One that no compiler accepts counts for nothing; one that changes nothing stands
in `tests/mutants/equivalent.py`, with the reason.

    python -m tests.mutants                        all, recorded in benchmarks/results/mutants.json
    python -m tests.mutants --family cuda          those of CUDA in emulated threads, and named breakages of Hopper's
    python -m tests.mutants --family native        those of C++, recorded beside the Triton kernels'
    python -m tests.mutants --again                the recorded survivors, after a test was added
    python -m tests.mutants --sample 10 --seed 7   ten of each language
    python -m tests.mutants --only gram --list     those of the files of this name, not run
"""

import argparse
import json
import os
import subprocess
import sys
import time

from tests.mutants import cuda, native, runs, triton
from tests.mutants.mutant import ROOT, Family, Mutant

FAMILIES: dict[str, Family] = {"triton": triton, "native": native, "cuda": cuda}
RESULTS = ROOT / "benchmarks" / "results" / "mutants.json"


def chosen(name: str, recorded: dict, options: argparse.Namespace) -> list[Mutant]:
    """Return the mutants of a family that the options ask for."""
    family = FAMILIES[name]
    mutants = [mutant for mutant in family.drawn() if options.only in (None, family.path_of(mutant.file).stem)]
    if options.again:
        survived = [(r["file"], r["kernel"], r["before"], r["after"]) for r in recorded.get("survivors", [])]
        mutants = [mutant for mutant in mutants if runs.identity(family, mutant) in survived]
    if options.sample:
        mutants = runs.sample(family, mutants, options.sample, options.seed)
        print(
            f"{len(mutants)} mutants drawn by seed {options.seed}; again with: python -m tests.mutants "
            f"--family {name} --sample {options.sample} --seed {options.seed}"
        )
    return mutants


def judge(name: str, recorded: dict, options: argparse.Namespace) -> tuple[list[dict], dict]:
    """Run the mutants of a family; return the survivors and what is to be recorded."""
    family, mutants, begun = FAMILIES[name], chosen(name, recorded, options), time.monotonic()
    if options.list:
        for mutant in mutants:
            *_, before, after = runs.identity(family, mutant)
            print(runs.name_of(mutant._asdict() | {"before": before, "after": after}))
        return [], recorded
    # a sample is drawn in `make test`, which runs the same tests on the kernels as they are
    results = runs.verdicts(family, mutants, options.jobs, unmutated=not options.sample) if mutants else []
    for file, count in runs.summary(results).items():
        print(f"{file}: {', '.join(f'{n} {what}' for what, n in count.items() if n)}")
    new = runs.record(results, time.monotonic() - begun)
    survivors = new["survivors"]
    if options.again:
        return survivors, runs.again(recorded, results) if results else recorded
    return survivors, recorded if options.sample or options.only else new


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description=__doc__.splitlines()[0])
    parser.add_argument("--family", choices=FAMILIES, help="the kernels of one language")
    parser.add_argument("--sample", type=int, help="run so many of each language, drawn by --seed, and record nothing")
    parser.add_argument("--seed", type=int, help="default: from the commit")
    parser.add_argument("--only", help="mutate the files of this name only, e.g. gram, and record nothing")
    parser.add_argument("--again", action="store_true", help="run the recorded survivors again and record what changed")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--list", action="store_true", help="show the mutants, run nothing")
    options = parser.parse_args(arguments)
    if options.family is None:  # each in a process of its own, since each loads the kernels in its own way
        again = [sys.executable, "-m", "tests.mutants", *(sys.argv[1:] if arguments is None else arguments)]
        return max(subprocess.run([*again, "--family", name], cwd=ROOT).returncode for name in FAMILIES)
    if options.seed is None:
        options.seed = runs.rotation()
    name, recorded = options.family, json.loads(RESULTS.read_text(encoding="utf-8"))
    survivors, new = judge(name, recorded.get(name, {}), options)
    if new and new != recorded.get(name):
        recorded[name] = new
        RESULTS.write_text(json.dumps(recorded, indent=1) + "\n", encoding="utf-8")
    for survivor in survivors:
        print("SURVIVED", runs.line_of(survivor))
    return 1 if survivors else 0


if __name__ == "__main__":
    # the interpreter is chosen when a kernel is decorated
    os.environ |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    sys.exit(main())
