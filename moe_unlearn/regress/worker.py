"""Run one side of a comparison of two revisions: the kernels of one tree in the harness of another.

    python -P worker.py TREE PACKAGE HARNESS

`revision` starts it by its path. `moe_unlearn` is imported from the folder PACKAGE and the Triton kernels from TREE,
if it has them. `moe_unlearn.regress`, `moe_unlearn.testing` and `moe_unlearn.files`, which they write with, come from
the package folder HARNESS, so that both sides measure the same cases in the same way. TREE and TREE/src come first in
the search path. Requests and answers are JSON, one a line, on standard input and output; what kernels print goes to
standard error.
"""

import importlib.abc
import importlib.util
import json
import os
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType


class Overlay(importlib.abc.MetaPathFinder):
    """Finder of modules of some names in given folders or files, whatever is installed."""

    def __init__(self, places: dict[str, Path]):
        self.places = places

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        place = self.places.get(name)
        if place is None:
            return None
        if place.is_dir():
            folder = [str(place)]
            return importlib.util.spec_from_file_location(
                name, place / "__init__.py", submodule_search_locations=folder
            )
        return importlib.util.spec_from_file_location(name, place)


class Side:
    """Methods that a request calls by name."""

    def __init__(self, tree: Path):
        self.tree = tree

    def load(
        self,
        modules: list[str],
        patterns: list[str],
        tags: list[str],
        impl: str,
        device: str | None,
        threads: int,
        start: int,
    ) -> dict:
        """Register the cases and bind to a core, another at each start; return the cases' names and the fingerprint."""
        import torch

        from moe_unlearn.regress import case as registry
        from moe_unlearn.regress import ours
        from moe_unlearn.regress.fingerprint import fingerprint

        torch.set_num_threads(threads)
        # set only now, because modules that libraries probe for at import must not be found here
        sys.path[:0] = [str(self.tree), str(self.tree / "src")]
        known = None
        if modules:
            known = {case.name for path in modules for case in registry.load(path)}
        else:
            ours.register_all(impl)
        chosen = [case for case in registry.cases(patterns, tags=tags) if known is None or case.name in known]
        self.cases = {case.name: registry.on(case, device) for case in chosen}
        answer = {"cases": list(self.cases), "fingerprint": fingerprint(device or "cpu")}
        if threads == 1 and hasattr(os, "sched_setaffinity"):
            cores = sorted(os.sched_getaffinity(0))
            os.sched_setaffinity(0, {cores[start % len(cores)]})
        return answer

    def evaluate(self, case: str, seed: int, out: str) -> dict:
        """Write results and truth to the safetensors file `out`; return the digests of the inputs."""
        from safetensors.torch import save_file

        from moe_unlearn.regress import numeric

        self.made = made = numeric.evaluate(self.cases[case], seed)
        parts = {"actual": made.actual, "gold": made.gold}
        save_file({f"{part} {k}": v.clone() for part, values in parts.items() for k, v in values.items()}, out)
        return {"inputs": made.inputs}

    def rounded(self, output: str, out: str) -> dict:
        """Write one output of the last evaluation's reference, with random roundings, to the file `out`."""
        from safetensors.torch import save_file

        save_file({"rounded": self.made.baseline[output].rounded()}, out)
        return {}

    def prepare(self, case: str, seed: int) -> dict:
        """Make the inputs and warm up; return how many calls a round needs."""
        from moe_unlearn.regress import timing, verbs

        chosen = self.cases[case]
        self.call = verbs.timed_call(chosen, seed)
        self.watch = timing.stopwatch(chosen.device or "cpu")
        return {"calls": timing.warm(self.call, self.watch)}

    def reading(self, calls: int) -> dict:
        """Return the seconds of one call, averaged over `calls` calls."""
        return {"seconds": self.watch(self.call, calls) / calls}


def serve(tree: Path, package: Path, harness: Path) -> None:
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    places = {"moe_unlearn": package, "moe_unlearn.files": harness / "files.py"}
    places |= {f"moe_unlearn.{name}": harness / name for name in ("regress", "testing")}
    if (tree / "triton_kernels").is_dir() and package.parent == tree:
        places["moe_unlearn.triton_kernels"] = tree / "triton_kernels"
    sys.meta_path.insert(0, Overlay(places))
    side = Side(tree)
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = getattr(side, request.pop("do"))(**request)
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    serve(*map(Path, sys.argv[1:]))
