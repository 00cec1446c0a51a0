"""Says for each verb which of its options name what it reads and what it writes; nothing is written over what is read.

What is read are models, data, other runs and files of cases, where an option names a path that is there. A folder that
a verb writes may hold what it reads, such as RUN/forget.jsonl beside the files of a run, but for the names in `inside`.
"""

import argparse
import contextlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from moe_unlearn.files import check_output, stream_of
from moe_unlearn.runs import lock
from moe_unlearn.runs.names import AUDIT, MADE, REPORT, SWEEP


class Paths(NamedTuple):
    """The options of a verb that name what is read and what is written, and what `--out` gets if it is a folder."""

    inputs: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()
    inside: tuple[str, ...] = ()


_FOLDERS = ("cache", "store", "repro")
_DATA = ("forget", "retain", "holdout")
_RUN = ("model", *_DATA, "retain_eval", "unseen", "earlier", "reference")
VERBS = {
    "env": Paths(),
    "recipes": Paths(),
    "show": Paths(),
    "schema": Paths(),
    "completion": Paths(),
    "stats": Paths(("model", *_DATA), ("out", "cache")),
    "mask": Paths(("model", *_DATA), ("out", "cache")),
    "alternates": Paths(("model", "forget"), ("out",)),
    "run": Paths(_RUN, ("out", "cache"), (*MADE, lock.NAME)),
    "sweep": Paths(tuple(name for name in _RUN if name != "earlier"), ("out", "cache"), (*SWEEP, lock.NAME)),
    "eval": Paths(("model", *_DATA, "reference", "before", "data", "reference_run", "classifier"), ("out", "cache")),
    "audit": Paths(("model", *_DATA, "reference", "before"), ("out", "cache"), AUDIT),
    "delta": Paths(("base", "changed", "recipe"), ("out",)),
    "apply": Paths(("base", "delta"), ("out",)),
    "revert": Paths(("changed", "delta"), ("out",)),
    # of one run it writes the folder that it reads, files of other names
    "report": Paths(("folders",), ("markdown", "html", "json", "csv", "latex")),
    "purge": Paths((), ("cache",)),  # it removes from a folder and from this one
    "demo": Paths((), ("out",), REPORT),
    "kernels": Paths(("module", "sides"), ("json", "junit", "store", "repro")),
}


def check(options: argparse.Namespace, more: Iterable[str | None] = ()) -> None:
    """Raise ValueError, before anything is done, if a verb would write over what its options, or `more`, name."""
    paths = VERBS[options.command]
    named = [getattr(options, name, None) for name in paths.inputs]
    inputs = [path for value in (*named, *more) for path in _here(value)]
    for name in paths.outputs:
        out = getattr(options, name, None)
        if not out or out == "-" or stream_of(out) or getattr(options, "dry_run", False):
            continue
        inside = paths.inside if name == "out" else ()
        if getattr(options, "benchmark", None) and name == "out":
            inside = tuple(f"{_named(options.benchmark)}_{kind}.json" for kind in ("EVAL", "SUMMARY", "SETTINGS"))
        elif name in _FOLDERS:
            inside = ("of a name that nothing else has",)
        for made in [Path(out) / each for each in inside] or [Path(out)]:
            check_output(made, inputs)


@contextlib.contextmanager
def undone(options: argparse.Namespace) -> Iterator[None]:
    """Remove again, if what is done inside fails, the folders that it made for its outputs and that hold no file."""
    outs = [getattr(options, name, None) for name in VERBS[options.command].outputs]
    made = [_first_new(Path(out)) for out in outs if out and not Path(out).exists()]
    try:
        yield
    except BaseException:
        for top in made:
            for folder, _, _ in os.walk(top, topdown=False):
                with contextlib.suppress(OSError):  # it holds something
                    os.rmdir(folder)
        raise


def _first_new(path: Path) -> Path:
    """Return the first folder of a path that is not there."""
    return path if path.parent.exists() else _first_new(path.parent)


def _named(benchmark: str) -> str:
    """Return how the names of a benchmark's files begin."""
    return "LMEval" if benchmark == "wmdp" else benchmark.upper()


def _here(value: str | list[str] | None) -> Iterator[Path]:
    """Yield the files and folders that an option names: PATH, NAME=PATH, and PATH[:SPLIT][?OPTIONS] of data."""
    for text in [value] if isinstance(value, str) else value or ():
        for source in (text, text.partition("=")[2]):
            plain = source.partition("?")[0]
            yield from (
                Path(part) for part in {source, plain, plain.rpartition(":")[0]} if part and Path(part).exists()
            )
