"""Write what an audit found: AUDIT.md, AUDIT.html, one page that needs nothing else, and AUDIT.json for machines.

None of them holds a text of the documents. The JSON has every comparison, the page and the Markdown a table that says
in a row an attack what was tried and what came of it.
"""

from pathlib import Path

from moe_unlearn.audit.page import page
from moe_unlearn.audit.run import Report
from moe_unlearn.files import finite, make_private, write_json, write_text
from moe_unlearn.ranks import on_first

NAMES = ("AUDIT.md", "AUDIT.html", "AUDIT.json")


def write(folder: Path, report: Report) -> list[Path]:
    """Write the report into a folder, which is made private if it is new; return the paths written."""
    made = page(report)
    content = {"AUDIT.md": made.markdown(), "AUDIT.html": made.html()}
    on_first(lambda: _write(folder, content, report))
    return [folder / name for name in NAMES]


def _write(folder: Path, content: dict[str, str], report: Report) -> None:
    make_private(folder)
    for name, text in content.items():
        write_text(folder / name, text)
    write_json(folder / "AUDIT.json", finite(report.to_dict()))
