"""The verb `sweep`: runs of one recipe over a grid of settings and seeds, and their table."""

import argparse
import sys
from pathlib import Path
from typing import Any

from moe_unlearn.cli.arguments import writable
from moe_unlearn.config import Recipe, models
from moe_unlearn.files import make_private
from moe_unlearn.page import grid
from moe_unlearn.runs.lock import locked
from moe_unlearn.runs.names import SWEEP
from moe_unlearn.runs.sweep import Row, Sweep, grid_of, rows_of

#: options that every run gets as they are given
_SHARED = (
    *("model", "model_config", "forget", "retain", "retain_eval", "unseen", "holdout", "reference"),
    *("device", "dtype", "allow_weights", "trust_remote_code", "no_samples", "no_eval"),
)


def run(options: argparse.Namespace) -> int:
    """Run a recipe over a grid of settings and seeds, each run in its own folder, and compare them in one table."""
    out = Path(options.out)
    shared = {name: getattr(options, name) for name in _SHARED}
    known = options.model_config if options.model_config in models() else None

    def recipe_of(overrides: list[str]) -> Recipe:
        return Recipe.load(options.recipe, [*options.set, *overrides], model=known)

    def command(row: Row, folder: Path) -> list[str]:
        cache = options.cache or str(out / "cache")
        existing = ["--resume"] if folder.exists() else []
        return [
            *(sys.executable, "-m", "moe_unlearn", "run", options.recipe, "--out", str(folder), "--cache", cache),
            *(*_given(shared), *existing, "--set", *options.set, *row.overrides),
        ]

    base = Recipe.load(options.recipe, options.set, model=known)
    rows = rows_of(grid_of(options.grid), range(base.seed, base.seed + options.seeds))
    of = {"recipe": options.recipe, "set": options.set, **{name: value for name, value in shared.items() if value}}
    of["values"] = base.to_dict()  # the file may be another one when the sweep goes on
    wanted = ("trajectory.json",) if options.no_eval else ("trajectory.json", "summary.json")
    writable(out, folder=True)
    with locked(out):
        sweep = Sweep(out, rows, of, recipe_of, command, wanted)
        make_private(out)
        forms = [form for form in ("csv", "latex") if getattr(options, form)]
        sweep.run(options.jobs, forms=forms)
    print(*grid(*sweep.table()), sep="\n")
    print(*(out / name for name in SWEEP if (out / name).exists()), sep="\n")
    return 1 if sweep.failed else 0


def _given(shared: dict[str, Any]) -> list[str]:
    """Return the options of a run that are given."""
    words: list[str] = []
    for name, value in shared.items():
        if value:
            words += [f"--{name.replace('_', '-')}", *([] if value is True else [str(value)])]
    return words
