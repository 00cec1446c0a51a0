"""`moe-unlearn report`, which writes the report of a run anew."""

import argparse
from pathlib import Path

from moe_unlearn.runs import report


def run(options: argparse.Namespace) -> None:
    """Rebuild the report of a run folder, as Markdown, one HTML file and JSON, from its JSON files."""
    folder = Path(options.folder)
    print(*report.write(folder, report.read(folder)), sep="\n")
