"""Make the page of an audit: what was tried, what came of it, and every comparison."""

from moe_unlearn.audit import figures
from moe_unlearn.audit.attack import CONTENT
from moe_unlearn.audit.run import ATTACKS, Report
from moe_unlearn.audit.summary import ATTACK_COLUMNS, COLUMNS, MEANINGS, cells, more, reading, rows, summary, untested
from moe_unlearn.page import Block, Details, Document, Heading, Inline, Items, OnPage, Paragraph, Table, mark


def page(report: Report) -> Document:
    """Return the page of AUDIT.md and AUDIT.html, of which the latter alone has figures."""
    table = Table(ATTACK_COLUMNS, [[*row[:-1], _marked(row[-1])] for row in rows(report)])
    blocks: list[Block] = [Paragraph(summary(report)), table, *map(Paragraph, reading(report))]
    drawn: list[Block] = []
    for name, outcome in report.outcomes.items():
        own = [finding for finding in report.findings if finding.attack == name]
        drawn += [Heading(ATTACKS[name].title), Paragraph(ATTACKS[name].about)]
        drawn += figures.shares(own, report.margins[CONTENT]) + figures.of(name, outcome)
    blocks.append(OnPage(drawn))
    blocks += [Heading("Verdicts"), Items([[mark(name), f": {text}"] for name, text in MEANINGS.items()])]
    if left := untested(report):
        blocks += [Heading("Not tested"), Items([f"{what}: {why}." for what, why in left])]
    found = [[*row[:-1], _marked(row[-1])] for row in map(cells, report.findings)]
    details: list[Block] = [Table(COLUMNS, found)]
    for title, head, body in more(report):
        details += [Heading(title), Table(head, body)]
    return Document(["Audit of forgetting: ", mark(report.verdict)], [*blocks, Details("Every comparison", details)])


def _marked(word: str) -> Inline:
    """Return a verdict in its colour, or why there is none as it is."""
    return mark(word) if word in (*MEANINGS, "not tested") else word
