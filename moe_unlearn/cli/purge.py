"""`moe-unlearn purge`: removes from the folder of a run what holds, or gives away, the text that was forgotten.

The model stays, and so do numbers: settings, metrics, trajectories and figures. `REMOVED` says what goes; the report is
written again without it. Of a sweep all runs are purged.
"""

import argparse
import json
import os
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

from moe_unlearn.checkpoint.tensor_file import stored_in
from moe_unlearn.files import UNFINISHED, remove
from moe_unlearn.prepare.preparation import CACHES
from moe_unlearn.runs import report
from moe_unlearn.runs.names import AUDIT, FACTS, MANIFEST, PAGES, RESULTS, SAMPLED, SWEEP
from moe_unlearn.runs.sweep import Row

_CACHED = {f"{kind}-*": what for kind, what in CACHES.items()} | {
    "examples-*": "tokens of documents",
    "result-*.json": "answers and generations of an evaluation",
    "wagle-*": "scores of a mask that was not finished",
}
REMOVED = {
    "cache": "references: values of the original model on each row, and results of an audit",
    "checkpoints": "states of the run, with masks and references",
    "data.json": "where the documents lie and which were dropped",
    SAMPLED: "texts that the original model wrote",
    "samples.json": "texts of a few rows, before and after",
    "delta.safetensors.index.json": "the way back to the original model",
    "*.groups": "scores of a mask that was not finished",
    "*_EVAL.json": "prompts, answers and generations of an evaluation",
    f"{UNFINISHED}*": "what a killed process left",
} | _CACHED
#: what else is removed, by the format in a safetensors file's metadata
FORMATS = {
    "moe-unlearn weight mask": "a mask of the weights",
    "moe-unlearn delta": "the way back to the original model",
}
KEPT = (
    *("model", "figures", "audit"),  # but for what `REMOVED` has inside the audit's folder
    *("recipe.yaml", "verified.txt", "lock", "batch.json", "loaded.json", "about.json"),
    *(FACTS, MANIFEST, *RESULTS, *PAGES),
    *("*_SUMMARY.json", "*_SETTINGS.json"),
    *AUDIT,
    *SWEEP,
)
#: what a folder has to hold, one of these, to be that of an audit, a sweep, a run, a demo or an evaluation
_SIGNS = (
    AUDIT,
    SWEEP[:1],
    ("recipe.yaml", "batch.json"),
    ("seeds.json", "summary.json"),
    ("*_SETTINGS.json", "*_SUMMARY.json"),
)


def run(options: argparse.Namespace) -> None:
    """Remove from a run's folder all but the model and numbers: copies of what was forgotten, and what reveals it."""
    folder = Path(options.folder)
    if not any(all(any(folder.glob(name)) for name in names) for names in _SIGNS):
        raise ValueError(
            f"expected the folder of a run, a sweep, an evaluation or an audit; {folder} is none: name its --out"
        )
    runs = _runs_of(folder)
    folders = [folder, *(folder / name for name in runs if (folder / name).is_dir())]
    inside = [each for own in folders for each in (own, own / "audit") if each.is_dir()]
    removed = [line for each in inside for line in _purged(each, REMOVED)]
    removed += _purged(folder, {f"{name}.log": "what a run has printed" for name in runs})
    if options.cache:
        cache = Path(options.cache)
        if not cache.is_dir():
            raise ValueError(f"expected a folder that was a --cache; {cache} is none: name it, or leave --cache out")
        removed += _purged(cache, _CACHED)
    removed += [line for own in folders for line in _rewritten(own)]
    for line in removed:
        print(f"removed {line}")
    left = [path for own in folders for path in own.iterdir() if path not in folders and not _matching(path, KEPT)]
    for path in sorted(left):
        print(f"left {path}, which no run writes: look at it yourself")
    print(f"{len(removed)} removed; the model and numbers stay in {folder}")


def _runs_of(folder: Path) -> list[str]:
    """Return the names of the runs of a sweep's folder, none for any other; ValueError for a damaged sweep.json."""
    path = folder / SWEEP[0]
    if not path.exists():
        return []
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
        return [Row(row["settings"], row["seed"]).name for row in rows]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not what a sweep writes: {error!r}; purge the folder of each run") from None


def _rewritten(folder: Path) -> Iterator[str]:
    """Write the pages of a report again, without the texts that they had; yield those that cannot be, which go."""
    there = [folder / name for name in PAGES if (folder / name).exists()]
    if not there:
        return
    try:
        report.write(folder, report.read(folder))
    except ValueError as error:
        for path in there:
            remove(path)
            yield f"{path}: it may hold texts, and cannot be made again without them: {error}"


def _purged(folder: Path, what: dict[str, str]) -> Iterator[str]:
    """Remove what stands in a folder and matches, or has one of `FORMATS`; yield what it was.

    Of a link only the link goes.
    """
    for path in sorted(folder.iterdir()):
        reason = next((why for pattern, why in what.items() if fnmatch(path.name, pattern)), "") or _format_of(path)
        if not reason:
            continue
        count, size = _measure(path)
        remove(path)
        yield f"{path}: {reason} ({count:,} files, {size:,} bytes)"


def _format_of(path: Path) -> str:
    """Return why a safetensors file of one of `FORMATS` is removed; "" for any other file or folder."""
    if path.suffix != ".safetensors" or not path.is_file():
        return ""
    try:
        format = stored_in(path).about.get("format", "")
    except ValueError:
        return ""
    return next((why for begin, why in FORMATS.items() if format.startswith(begin)), "")


def _measure(path: Path) -> tuple[int, int]:
    """Return how many files a file or folder is, and their bytes."""
    if path.is_symlink() or not path.is_dir():
        return 1, path.lstat().st_size
    files = [Path(folder) / name for folder, _, names in os.walk(path) for name in names]
    return len(files), sum(file.lstat().st_size for file in files)


def _matching(path: Path, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch(path.name, pattern) for pattern in patterns)
