"""Make the page of an audit: one HTML file with its figures, for light and dark screens, that loads nothing."""

from collections.abc import Iterable, Sequence
from html import escape

from moe_unlearn.audit import figures
from moe_unlearn.audit.attack import CONTENT
from moe_unlearn.audit.run import ATTACKS, Report
from moe_unlearn.audit.summary import ATTACK_COLUMNS, COLUMNS, MEANINGS, cells, more, reading, rows, summary, untested

# Okabe and Ito's colours, which colour-blind readers can tell apart
_STYLE = """
:root { --back: #fff; --ink: #1b1b1b; --faint: #6b6b6b; --line: #ddd; --band: #009e73;
  --bad: #d55e00; --warn: #8f6a00; --good: #00795a;
  --c0: #0072b2; --c1: #d55e00; --c2: #009e73; --c3: #cc79a7; --c4: #8f6a00; --c5: #56b4e9 }
@media (prefers-color-scheme: dark) { :root { --back: #15171a; --ink: #e8e8e8; --faint: #a0a0a0; --line: #3a3d42;
  --band: #00c890; --bad: #ff8c42; --warn: #e6c04a; --good: #3ddc9f;
  --c0: #56b4e9; --c1: #ff8c42; --c2: #3ddc9f; --c3: #e79ac6; --c4: #e6c04a; --c5: #9ad4f5 } }
body { background: var(--back); color: var(--ink); font: 16px/1.5 system-ui, sans-serif; max-width: 60rem;
  margin: 2rem auto; padding: 0 1rem }
table { border-collapse: collapse; font-size: .9rem }
td, th { border-bottom: 1px solid var(--line); padding: .35rem .6rem; text-align: left; vertical-align: top }
.wide { overflow-x: auto }
svg { width: 100%; display: block; margin: 1rem 0; font-size: 12px }
svg text { fill: var(--ink) } svg .tick { fill: var(--faint) }
.grid { stroke: var(--line) } .band { fill: var(--band) } .bar { stroke-width: 3 }
.cell { fill: var(--c0) } .empty { fill: none; stroke: var(--line); stroke-dasharray: 2 2 }
polyline { fill: none; stroke-width: 2 } summary { cursor: pointer; margin: 1rem 0 }
td span, h1 span, dt span { font-weight: bold }
.present, .hidden { color: var(--bad) } .overshot, .undecided { color: var(--warn) } .gone { color: var(--good) }
.not-tested { color: var(--faint) }
g.present, g.hidden { stroke: var(--bad); fill: var(--bad) } g.gone { stroke: var(--good); fill: var(--good) }
g.overshot, g.undecided { stroke: var(--warn); fill: var(--warn) }
""" + "".join(
    f".s{i} {{ stroke: var(--c{i}); fill: var(--c{i}) }} .s{i} text {{ stroke: none }} "
    f".s{i} polyline {{ stroke-dasharray: {dash} }}\n"
    for i, dash in enumerate(("none", "6 3", "2 3", "8 3 2 3", "none", "6 3"))
)


def page(report: Report) -> str:
    """Return the text of AUDIT.html."""
    body = [[*map(escape, row[:-1]), _mark(row[-1])] for row in rows(report)]
    parts = [f"<h1>Audit of forgetting: {_mark(report.verdict)}</h1>", _paragraph(summary(report))]
    parts += [_table(ATTACK_COLUMNS, body), *map(_paragraph, reading(report))]
    for name, outcome in report.outcomes.items():
        parts += [f"<h2>{escape(ATTACKS[name].title)}</h2>", _paragraph(ATTACKS[name].about)]
        own = [finding for finding in report.findings if finding.attack == name]
        parts.append(figures.forest(own, report.margins[CONTENT]))
        parts += [f"<h3>{escape(caption)}</h3>{drawn}" for caption, drawn in figures.of(name, outcome) if drawn]
    if left := untested(report):
        lines = "".join(f"<li>{escape(f'{what}: {why}')}</li>" for what, why in left)
        parts.append(f"<h2>Not tested</h2><ul>{lines}</ul>")
    meanings = "".join(f"<dt>{_mark(name)}</dt><dd>{escape(text)}</dd>" for name, text in MEANINGS.items())
    parts += [f"<h2>Verdicts</h2><dl>{meanings}</dl>", f"<details>{_details(report)}</details>"]
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>Audit of forgetting</title>'
    inside = "\n".join(part for part in parts if part)
    return (
        f'<!doctype html>\n<html lang="en"><head>{head}<style>{_STYLE}</style></head>\n'
        f"<body>\n{inside}\n</body></html>\n"
    )


def _details(report: Report) -> str:
    found = [[*map(escape, row[:-1]), _mark(row[-1])] for row in map(cells, report.findings)]
    tables = [_table(COLUMNS, found)]
    for name, head, body in more(report):
        tables.append(f"<h3>{escape(name)}</h3>{_table(head, [map(escape, row) for row in body])}")
    return f"<summary>Every comparison</summary>{''.join(tables)}"


def _mark(word: str) -> str:
    """Return a verdict in its colour, or why there is none as it is."""
    return (
        f'<span class="{word.replace(" ", "-")}">{word}</span>' if word in (*MEANINGS, "not tested") else escape(word)
    )


def _paragraph(text: str) -> str:
    return f"<p>{escape(text)}</p>"


def _table(head: Sequence[str], body: Iterable[Iterable[str]]) -> str:
    """Return a table of cells that are HTML already."""
    top = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    lines = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in body)
    return f'<div class="wide"><table><tr>{top}</tr>{lines}</table></div>'
