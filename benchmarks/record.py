"""Record each run in one file, benchmarks/results/<device>/<date>-<commit>.json, written anew after every row.

    {"stamp": ..., "fingerprint": ..., "ceilings": ..., "kernels": hash, "state": "running" | "complete" | why partial,
     "seconds": ..., "rows": [...]}

A run that is stopped keeps all that it measured, and its file says that it is not whole.
"""

import datetime
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks import stamp
from benchmarks.journal import Journal

COMPLETE, RUNNING = "complete", "partial: the run was stopped"


class Record:
    """Record file of a run under way."""

    def __init__(self, path: Path, head: Mapping):
        self.path = path
        self.content = {**head, "state": RUNNING, "seconds": 0.0, "rows": []}
        self.save()

    def add(self, row: Mapping, seconds: float) -> None:
        """Keep a row; `seconds` is how long the run has taken by now."""
        self.content["rows"].append(dict(row))
        self.content["seconds"] = round(seconds, 1)
        self.save()

    def finish(self) -> str:
        """Store and return the state of the run: whole, or why not."""
        self.content["state"] = state_of(self.content["rows"], self.content.get("only", ""))
        self.save()
        return self.content["state"]

    def save(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_suffix(".partial")
        partial.write_text(json.dumps(self.content, indent=1) + "\n", encoding="utf-8")
        os.replace(partial, self.path)


class Lines:
    """Record of a run as lines of a GPU run's journal, each written once as it comes."""

    def __init__(self, journal: Journal, head: Mapping):
        self.journal, self.path = journal, journal.path
        self.content: dict = {**head, "rows": []}
        journal.write("environment", head=dict(head))

    def add(self, row: Mapping, seconds: float) -> None:
        """Keep a row; `seconds` is how long the run has taken by now."""
        self.content["rows"].append(dict(row))
        self.journal.write("case", row=dict(row), so_far=round(seconds, 1))

    def finish(self) -> str:
        """Return the state of the run: whole, or why not."""
        return state_of(self.content["rows"], self.content.get("only", ""))


def state_of(rows: Sequence[Mapping], only: str = "") -> str:
    """Return "complete", or why a run with these rows is partial."""
    skipped, cut, failed = (sum(what in row for row in rows) for what in ("skipped", "cut", "error"))
    parts = [f"only {only!r}"] if only else []
    parts += [f"{skipped} of {len(rows)} cases left out for lack of time"] if skipped else []
    parts += [f"{cut} of {len(rows)} cases not to their end"] if cut else []
    parts += [f"{failed} of {len(rows)} cases failed"] if failed else []
    return f"partial: {', '.join(parts)}" if parts else COMPLETE


def new_path(device: str, commit: str | None, date: str | None = None, results: Path = stamp.RESULTS) -> Path:
    """Return the path for a run on `device` ("cpu", or the name of a GPU); it overwrites no earlier run."""
    name = f"{date or datetime.date.today().isoformat()}-{(commit or 'unknown')[:9]}"
    folder = results / stamp.folder_of(device)
    taken = {path.stem for path in folder.glob(f"{name}*.json")}
    names = (name if n == 1 else f"{name}-{n}" for n in range(1, len(taken) + 2))
    return folder / f"{next(n for n in names if n not in taken)}.json"


def runs(results: Path = stamp.RESULTS) -> dict[str, list[Path]]:
    """Return the files of runs by device folder, oldest first."""
    found: dict[str, list[Path]] = {}
    for path in sorted(results.glob("*/[0-9][0-9][0-9][0-9]-[0-9][0-9]-[0-9][0-9]-*.json"), key=_order):
        found.setdefault(path.parent.name, []).append(path)
    return found


def _order(path: Path) -> tuple[str, float]:
    # runs of one day are ordered by the time they began
    return path.name[:10], json.loads(path.read_text(encoding="utf-8")).get("started", 0.0)


def kinds(device: str, results: Path = stamp.RESULTS) -> list[tuple[Path, dict]]:
    """Return the newest run of each kind of processor or GPU in a device folder, a complete one if there is any.

    The newest comes first, and those whose products were held to what another kind has come last.
    """
    found: dict[tuple, list[tuple[Path, dict]]] = {}
    for path in runs(results).get(device, []):
        run = json.loads(path.read_text(encoding="utf-8"))
        kind = run["fingerprint"].get("cpu") if device == "cpu" else run["stamp"]["device"], held_to(run)
        found.setdefault(kind, []).append((path, run))
    newest = [([p for p in pairs if p[1]["state"] == COMPLETE] or pairs)[-1] for pairs in found.values()]
    newest.sort(key=lambda pair: _order(pair[0]), reverse=True)
    return sorted(newest, key=lambda pair: bool(held_to(pair[1])))


def held_to(run: Mapping) -> str:
    """Return the instruction set that torch's products were held to in a run, "" if they were not."""
    return str(run.get("onednn_held_to", ""))


def latest(device: str, results: Path = stamp.RESULTS) -> tuple[Path, dict] | None:
    """Return the first of `kinds`, or None without runs."""
    return next(iter(kinds(device, results)), None)
