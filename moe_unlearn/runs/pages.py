"""Page of a run's report: what came of it, what was done, texts before and after, figures, cost."""

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from moe_unlearn.page import (
    Block,
    Code,
    Compared,
    Details,
    Document,
    Heading,
    Inline,
    Items,
    Paragraph,
    Table,
    Text,
    code,
    link,
    mark,
    strong,
)
from moe_unlearn.runs import figures
from moe_unlearn.runs.summary import GOALS, RUNS, UNITS, Summary, cell, columns, heading, meanings, ordered
from moe_unlearn.runs.verdict import verdict

if TYPE_CHECKING:
    from moe_unlearn.runs.report import Content

# as in moe_unlearn.audit, whose import brings transformers, which a report does without
_AUDIT_COLUMNS = ("attack", "what was done", "gravest sign", "verdict")
_TEXTS = {"truth": "true continuation", "before": "before", "after": "after"}
_FEW = 3  # runs that stand beside each other; more stand below each other


def of(content: "Content") -> Document:
    """Return the page of a report."""
    summary = content.summary
    results = {seed: own for seed, own in content.results.items() if own}
    name = content.corpus or next((RUNS.get(run, run) for run in summary if run not in ("target", "retrain")), "")
    blocks: list[Block] = []
    if len(results) > 1:
        blocks.append(Paragraph(f"Mean ± sample standard deviation over seeds {', '.join(map(str, results))}."))
    elif results:
        blocks.append(Paragraph(f"One seed ({next(iter(results))}): no spread is known."))
    blocks += metrics(summary)
    blocks += [Heading("Verdict"), *verdict(summary, results, content.audit)]
    if content.routing:
        blocks.append(_selection(content.routing))
    blocks += _samples(content.samples)
    drawn = figures.frontier(summary) + figures.trajectories(content.trajectories, summary)
    drawn += figures.experts(content.routing, content.routes)
    if drawn:
        blocks.append(Heading("Figures"))
        if results:
            blocks.append(Paragraph(f"Trajectories and routing are those of seed {next(iter(results))}."))
        blocks += drawn
    if content.audit:
        blocks += _audit(content.audit)
    blocks += _done(content) + _cost(content.cost)
    if content.recipe:
        blocks.append(Details("Recipe", [Code(content.recipe)]))
    return Document(f"Unlearning report{': ' + name if name else ''}", blocks)


def metrics(summary: Summary, *, below: bool = False) -> list[Block]:
    """Return the table of metrics and what it says; many runs stand below each other, few only if asked to."""
    keys = columns(summary)
    runs = ordered(summary)
    names = [RUNS.get(run, run) for run in runs]
    if len(runs) <= _FEW and not below:
        rows = [[heading(key), *(cell(summary[run], key) for run in runs), UNITS[key]] for key in keys]
        shown = Table(["metric", *names, "unit"], rows)
    else:
        body = [[name, *(cell(summary[run], key) for key in keys)] for name, run in zip(names, runs, strict=True)]
        shown = Table(["run", *map(heading, keys)], body)
    told: list[Text] = [[strong(name), f": {meaning}"] for name, meaning in meanings(keys)]
    blocks: list[Block] = [shown, Paragraph(GOALS), Items(told)]
    if any(f"{key}_low" in own for own in summary.values() for key in keys):
        blocks.append(Paragraph("Brackets hold the 95 % interval over documents (percentile bootstrap)."))
    return blocks if keys else []


def _done(content: "Content") -> list[Block]:
    """Return what was done: a table of facts, and one of the data."""
    facts: list[tuple[Text, Text]] = []
    about, loaded, batch = content.about, content.loaded, content.batch
    if loaded:
        own: list[Inline] = [f"{loaded['model']}, {loaded['dtype']} on {loaded['device']}"]
        if loaded["trust_remote_code"]:
            own += ["; ", strong("its own code was run"), " (", code("--trust-remote-code"), ")"]
        facts.append(("model", own))
    if batch:
        factors = [batch[name] for name in ("ranks", "batch_size", "accumulate")]
        shown = "{} (ranks) x {} (batch_size) x {} (accumulate)".format(*factors)
        facts.append(("a step", f"{math.prod(factors)} forget rows with their retain rows: {shown}"))
        held_out = any("nll_s" in metrics for metrics in content.summary.values())
        taken = "of rows that training did not see" if held_out else "of the rows that training took, none held out"
        facts.append(("retain metrics", f"{taken} (data.retain_eval)"))
    steps = {run: len(own) for run, own in content.trajectories.items() if own and "forget_loss" in own[0]}
    if steps and about:
        facts.append(("steps", ", ".join(f"{count:,}" for count in steps.values())))
    if about:
        facts += [("seed", str(about["seed"])), ("started", about["started"]), ("machine", about["machine"])]
        facts.append(("versions", ", ".join(f"{name} {version}" for name, version in about["versions"].items())))
        if about["command"]:
            facts.append(("command", code(about["command"])))
    blocks: list[Block] = [Heading("What was done"), Table(("what", "value"), facts)] if facts else []
    if content.data:
        head = ("data", "source", "documents read", "kept", "cut at max_length", "rows trained on", "dropped")
        blocks += [
            *([] if facts else [Heading("What was done")]),
            Table(head, [_data(*own) for own in content.data.items()]),
        ]
    return blocks


def _data(side: str, own: Mapping[str, Any]) -> list[str]:
    counts = [f"{own[key]:,}" if key in own else "–" for key in ("read", "kept", "truncated", "rows")]
    dropped = ", ".join(f"{count:,} {reason}" for reason, count in own.get("dropped", {}).items())
    return [side, own.get("source", ""), *counts, dropped or "none"]


def _samples(samples: Mapping[str, Any]) -> list[Block]:
    """Return texts of a few rows before and after, side by side."""
    blocks: list[Block] = []
    for side in samples:
        rows = [row for row in samples[side] if {"prompt", *_TEXTS} <= row.keys()]
        made = [
            Compared(f"{side} {number}: prompt", row["prompt"], {name: row[key] for key, name in _TEXTS.items()})
            for number, row in enumerate(rows, 1)
        ]
        blocks += [Heading(f"{side.capitalize()} rows", 3), *made] if made else []
    return [Heading("Before and after"), *blocks] if blocks else []


def _cost(cost: Mapping[str, Any]) -> list[Block]:
    if not cost:
        return []
    rows: list[tuple[str, str]] = [
        (f"{phase}, seconds", f"{value:.1f}") for phase, value in cost["seconds"].items() if value is not None
    ]
    planned, measured = cost["planned"], cost["measured"]
    if planned is not None:
        rows.append(("memory of a step as planned, GiB", f"{planned / 2**30:.3f}"))
    if measured is not None:
        rows.append((f"memory measured ({cost['how']}), GiB", f"{measured / 2**30:.3f}"))
    return [Heading("Cost"), Table(("what", "value"), rows)]


def _audit(audit: Mapping[str, Any]) -> list[Block]:
    """Return what the quick audit of one run found, as paragraphs and a table."""
    name = RUNS.get(audit["run"], audit["run"])
    whole = link("The whole report", "audit/AUDIT.md")
    rows = [[*row[:-1], mark(row[-1])] for row in audit["rows"] if len(row) == len(_AUDIT_COLUMNS)]
    return [
        Heading([f"Audit of {name}: ", mark(audit["verdict"])]),
        Paragraph([f"{audit['summary']} ", whole, " has every comparison."]),
        Table(_AUDIT_COLUMNS, rows),
    ]


def _selection(routing: Mapping[str, Any]) -> Block:
    chosen = [
        f"layer {layer} expert {expert} ({f:.3f} of forget, {r:.3f} of retain tokens)"
        for layer, (marks, forget, retain) in enumerate(
            zip(routing["selected"], routing["forget"], routing["retain"], strict=True)
        )
        for expert, (own, f, r) in enumerate(zip(marks, forget, retain, strict=True))
        if own
    ]
    if not chosen:
        return Paragraph([strong("TRACE inactive"), f": {routing.get('inactive', 'no forget-critical expert')}."])
    return Paragraph(f"TRACE's forget-critical experts ({len(chosen)}): {'; '.join(chosen)}.")
