"""`moe-unlearn report`: the report of a run once more, or several runs beside each other."""

import argparse
from pathlib import Path

from moe_unlearn.page import grid
from moe_unlearn.runs import report
from moe_unlearn.runs.compare import FORMATS, Comparison


def run(options: argparse.Namespace) -> None:
    """Write the report of a run again from its JSON files; of several, print a table and write what is asked."""
    folders = [Path(folder) for folder in options.folders]
    if twice := [str(folder) for i, folder in enumerate(folders) if folder.resolve() in map(Path.resolve, folders[:i])]:
        raise ValueError(f"expected each run once; got {twice[0]} twice: leave it out")
    wanted = {kind: Path(path) for kind in FORMATS if (path := getattr(options, kind))}
    compared = Comparison(folders) if len(folders) > 1 or wanted else None
    if len(folders) == 1:
        print(*report.write(folders[0], report.read(folders[0])), sep="\n")
    elif compared is not None:
        print(*grid(*compared.table()), sep="\n")
    for kind, path in wanted.items():
        assert compared is not None
        compared.write(kind, path)
        print(path)
