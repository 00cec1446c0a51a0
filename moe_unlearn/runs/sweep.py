"""A sweep: runs of one recipe over a grid of settings and seeds, each in a process and a folder of its own.

The folder of a sweep has the runs' folders, named by their settings, what each has printed beside it (`NAME.log`), and

    sweep.json     what the sweep is of, and a row of each run: settings, seed, state, error, metrics
    sweep.md       the table: a row of each point of the grid, the mean over its seeds and their standard deviation
    sweep.csv      every number of every run, if it is asked for
    sweep.tex      the table of sweep.md for LaTeX (booktabs), if it is asked for

They are written after every run. A run that fails is a row with its error; the others go on. The same sweep goes on
where it was interrupted: runs that are finished are kept, and others resumed.
"""

import dataclasses
import hashlib
import itertools
import json
import re
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moe_unlearn.config import Recipe
from moe_unlearn.files import write_json, write_text
from moe_unlearn.page import Document, Paragraph, Table, code
from moe_unlearn.page.exports import comma_separated, latex
from moe_unlearn.runs import folder as folders
from moe_unlearn.runs.compare import flat
from moe_unlearn.runs.names import SWEEP
from moe_unlearn.runs.summary import COLUMNS, RUNS, cell, summarise

FINISHED, FAILED, WAITING = "finished", "failed", "waiting"
_SECTIONS = ("forget", "retain")  # whose name alone means their objective
_LONGEST = 120  # characters of a folder's name


@dataclass
class Row:
    """One run of a sweep: a point of the grid (key -> value as it was given) with a seed, and what became of it."""

    settings: dict[str, str]
    seed: int
    state: str = WAITING
    error: str = ""
    metrics: dict[str, float | None] = field(default_factory=dict)
    target: dict[str, float | None] = field(default_factory=dict)  # those of the model before

    @property
    def overrides(self) -> list[str]:
        """Return the overrides of the recipe that make this run."""
        return [*(f"{key}={value}" for key, value in self.settings.items()), f"seed={self.seed}"]

    @property
    def name(self) -> str:
        """Return the name of the run's folder, which says its settings, or ends in their digest where they are long."""
        plain = re.sub(r"[^\w.,=+-]", "_", ",".join(self.overrides))
        if plain == ",".join(self.overrides) and len(plain) <= _LONGEST:
            return plain
        return f"{plain[:_LONGEST]}-{hashlib.sha256(','.join(self.overrides).encode()).hexdigest()[:8]}"


def grid_of(texts: Sequence[str]) -> dict[str, list[str]]:
    """Read KEY=VALUE,VALUE,... of each text; a comma inside brackets parts nothing, and forget=npo is its objective.

    Raises ValueError for another form, and for a key that is given twice or is the seed.
    """
    grid: dict[str, list[str]] = {}
    for given in texts:
        key, equals, values = given.partition("=")
        key = f"{key}.objective" if key in _SECTIONS else key
        found = re.split(r",(?![^\[{]*[\]}])", values)
        if not key or not equals or not all(found):
            raise ValueError(f"--grid takes KEY=VALUE,VALUE,... such as optimizer.lr=1e-5,3e-5; got {given!r}")
        if key == "seed":
            raise ValueError("--grid takes no seed: --seeds N takes N of them, from the recipe's on")
        if key in grid or len({*found}) < len(found):
            raise ValueError(f"--grid has {key} twice, or a value of it: give each once; got {given!r}")
        grid[key] = found
    return grid


def rows_of(grid: Mapping[str, Sequence[str]], seeds: Sequence[int]) -> list[Row]:
    """Return a row of each point of the grid and each seed."""
    points = [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]
    return [Row(point, seed) for point in points for seed in seeds]


class Sweep:
    """The runs of a sweep in the folder `out`.

    `of` says what all runs share, in JSON values. `recipe_of(overrides)` is the recipe of a run, and
    `command(row, folder)` the command that makes it; `wanted` are the files that a finished one has.

    Raises ValueError if the folder has a sweep of something else, and if the recipe refuses every point.
    """

    def __init__(
        self,
        out: Path,
        rows: Sequence[Row],
        of: dict[str, Any],
        recipe_of: Callable[[list[str]], Recipe],
        command: Callable[[Row, Path], list[str]],
        wanted: Sequence[str] = ("summary.json",),
    ):
        self.out, self.rows, self.of, self._command, self._wanted = out, list(rows), of, command, wanted
        self._check_same()
        self._recipes: dict[str, Recipe] = {}
        for row in self.rows:
            try:
                self._recipes[row.name] = recipe_of(row.overrides)
            except ValueError as error:
                row.state, row.error = FAILED, str(error)
        if not self._recipes:
            raise ValueError(self.rows[0].error)

    @property
    def failed(self) -> list[Row]:
        """Return the rows of runs that failed."""
        return [row for row in self.rows if row.state == FAILED]

    def run(self, jobs: int, *, forms: Sequence[str] = ()) -> None:
        """Make all runs that are not finished, `jobs` at a time; write the tables of these `forms` ("csv", "latex")."""
        waiting = [row for row in self.rows if row.state == WAITING and not self._kept(row)]
        _say(f"{len(self.rows)} runs: {len(waiting)} to make, {len(self.rows) - len(waiting)} finished or refused")
        running: list[tuple[Row, subprocess.Popen, float]] = []
        try:
            self.write(forms)
            while waiting or running:
                while waiting and len(running) < jobs:
                    row = waiting.pop(0)
                    running.append((row, self._started(row), time.monotonic()))
                    _say(f"{row.name}: begun")
                ended = [entry for entry in running if entry[1].poll() is not None]
                for row, process, since in ended:
                    running.remove((row, process, since))
                    self._note(row, process.returncode)
                    done = sum(each.state != WAITING for each in self.rows)
                    why = f": {row.error}" if row.error else ""
                    _say(f"{row.name}: {row.state}{why} ({time.monotonic() - since:.0f} s; {done} of {len(self.rows)})")
                    self.write(forms)
                if not ended:
                    time.sleep(0.1)
        finally:
            for _, process, _ in running:  # an interruption ends them; each keeps its checkpoints
                process.terminate()
            for _, process, _ in running:
                process.wait()

    def write(self, forms: Sequence[str] = ()) -> None:
        """Write `sweep.json`, `sweep.md` and, by `forms`, `sweep.csv` and `sweep.tex`."""
        write_json(self.out / SWEEP[0], {"of": self.of, "rows": [dataclasses.asdict(row) for row in self.rows]})
        count = {state: sum(row.state == state for row in self.rows) for state in (FINISHED, FAILED, WAITING)}
        said = ", ".join(f"{number} {state}" for state, number in count.items() if number)
        about = Paragraph(["Recipe ", code(str(self.of.get("recipe", ""))), f"; {len(self.rows)} runs: {said}."])
        write_text(self.out / SWEEP[1], Document("Sweep", [about, Table(*self.table())]).markdown())
        if "csv" in forms:
            write_text(self.out / SWEEP[2], comma_separated(*self.numbers()))
        if "latex" in forms:
            write_text(self.out / SWEEP[3], latex(*self.table()))

    def table(self) -> tuple[list[str], list[list[str]]]:
        """Return head and rows: of each point mean and deviation over its seeds, how many ended well, and errors."""
        points: dict[str, list[Row]] = {}
        for row in self.rows:
            points.setdefault(json.dumps(row.settings), []).append(row)
        before = next((row.target for row in self.rows if row.target), {})
        entries = [
            ({key: RUNS["target"] if not i else "" for i, key in enumerate(self._keys)}, _means([before]), "", "")
        ]
        for own in points.values():
            ended = [row for row in own if row.state == FINISHED]
            errors = "; ".join(f"seed {row.seed}: {row.error}" for row in own if row.error)
            entries.append(
                (own[0].settings, _means([row.metrics for row in ended]), f"{len(ended)}/{len(own)}", errors)
            )
        entries = entries if before else entries[1:]
        keys = [key for key in COLUMNS if any(key in metrics for _, metrics, _, _ in entries)]
        head = [*self._keys, *(COLUMNS[key][0] for key in keys), "runs"]
        made = [[*s.values(), *(cell(metrics, key) for key in keys), count] for s, metrics, count, _ in entries]
        if not any(errors for *_, errors in entries):
            return head, made
        return [*head, "failed"], [[*row, entry[3]] for row, entry in zip(made, entries, strict=True)]

    def numbers(self) -> tuple[list[str], list[list[str]]]:
        """Return head and rows, one of each run with every metric in full."""
        metrics = list(dict.fromkeys(key for row in self.rows for key in row.metrics))
        head = [*self._keys, "seed", "state", *metrics, "error"]
        return head, [
            [
                *row.settings.values(),
                str(row.seed),
                row.state,
                *(_number(row.metrics.get(m)) for m in metrics),
                row.error,
            ]
            for row in self.rows
        ]

    @property
    def _keys(self) -> list[str]:
        return list(self.rows[0].settings)

    def _check_same(self) -> None:
        """Raise ValueError, which names what differs, if the folder has a sweep with other things in common."""
        path = self.out / SWEEP[0]
        if not path.exists():
            return
        try:
            former, own = flat(json.loads(path.read_text(encoding="utf-8"))["of"]), flat(self.of)
            different = [key for key in {**former, **own} if former.get(key) != own.get(key)]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} is not what a sweep writes: {error!r}; give another --out") from None
        if different:
            told = [f"{key} (was {former.get(key)!r}, is {own.get(key)!r})" for key in different]
            raise ValueError(f"{self.out} has a sweep of something else: {', '.join(told)}; give another --out")

    def _kept(self, row: Row) -> bool:
        """Return whether a run is finished, and take up its metrics."""
        recipe = self._recipes[row.name]
        if not folders.finished(self.out / row.name, recipe.steps, self._wanted):
            return False
        row.state, row.error = FINISHED, ""
        path = self.out / row.name / "summary.json"
        summary = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        row.metrics, row.target = summary.get(recipe.name, {}), summary.get("target", {})
        return True

    def _started(self, row: Row) -> subprocess.Popen:
        folder = self.out / row.name
        with open(self.out / f"{row.name}.log", "wb") as log:
            return subprocess.Popen(self._command(row, folder), stdout=log, stderr=subprocess.STDOUT)

    def _note(self, row: Row, code: int) -> None:
        """Note what became of a run whose process has ended."""
        if code == 0 and self._kept(row):
            return
        log = (self.out / f"{row.name}.log").read_text(encoding="utf-8", errors="replace")
        lines = [line.strip() for line in re.split(r"[\r\n]+", log) if line.strip()]
        said = next((line for line in reversed(lines) if "error: " in line), lines[-1] if lines else "")
        ended = f"ended by signal {-code}" if code < 0 else f"exit code {code}"
        row.state, row.error = FAILED, f"{said.partition('error: ')[2] or said} ({ended})".strip()


def _means(metrics: Sequence[Mapping[str, float | None]]) -> dict[str, float]:
    """Return means, and with several runs standard deviations, of the metrics that all of them have."""
    known = [{"run": {key: value for key, value in each.items() if value is not None}} for each in metrics]
    return summarise(dict(enumerate(known))).get("run", {})


def _number(value: float | None) -> str:
    return "" if value is None else repr(value)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
