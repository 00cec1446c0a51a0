"""`moe-unlearn report`, which writes the report of a run anew."""

import argparse
from pathlib import Path

from moe_unlearn.runs import report


def run(options: argparse.Namespace) -> None:
    """Rebuild report.md and the figures of a run folder from its summary.json."""
    folder = Path(options.folder)
    print(*report.write(folder, report.read(folder)), sep="\n")
