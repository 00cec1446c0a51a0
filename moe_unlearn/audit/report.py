"""Write what an audit found: AUDIT.md, AUDIT.html, one page that needs nothing else, and AUDIT.json for machines.

None of them holds a text of the documents. The JSON has every comparison, the page and the Markdown a table that says
in a row an attack what was tried and what came of it.
"""

from pathlib import Path

from moe_unlearn.audit.page import page
from moe_unlearn.audit.run import Report
from moe_unlearn.audit.summary import ATTACK_COLUMNS, COLUMNS, MEANINGS, cells, more, reading, rows, summary, untested
from moe_unlearn.files import finite, make_private, write_json, write_text
from moe_unlearn.ranks import on_first

NAMES = ("AUDIT.md", "AUDIT.html", "AUDIT.json")


def write(folder: Path, report: Report) -> list[Path]:
    """Write the report into a folder, which is made private if it is new; return the paths written."""
    content = {"AUDIT.md": markdown(report), "AUDIT.html": page(report)}
    on_first(lambda: _write(folder, content, report))
    return [folder / name for name in NAMES]


def _write(folder: Path, content: dict[str, str], report: Report) -> None:
    make_private(folder)
    for name, text in content.items():
        write_text(folder / name, text)
    write_json(folder / "AUDIT.json", finite(report.to_dict()))


def markdown(report: Report) -> str:
    """Return the text of AUDIT.md."""
    parts = [f"# Audit of forgetting: {report.verdict}", summary(report), "## Attacks"]
    parts.append(_table(ATTACK_COLUMNS, [_bold(row) for row in rows(report)]))
    parts += reading(report)
    parts.append("## Verdicts\n\n" + "\n".join(f"* **{name}**: {text}" for name, text in MEANINGS.items()))
    if left := untested(report):
        lines = [f"* {what}: {why}." for what, why in left]
        parts.append("## Not tested\n\n" + "\n".join(lines))
    parts += ["## Every comparison", _table(COLUMNS, [cells(own) for own in report.findings])]
    parts += [f"## {name}\n\n{_table(head, body)}" for name, head, body in more(report)]
    return "\n\n".join(parts) + "\n"


def _bold(row: tuple[str, str, str, str]) -> list[str]:
    return [*row[:3], f"**{row[3]}**"]


def _table(head: tuple[str, ...], body: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *body]
    return "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |" for line in lines)
