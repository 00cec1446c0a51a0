"""Say what an audit found in words and tables, of which the report's pages are made."""

from moe_unlearn.audit import verdict
from moe_unlearn.audit.attack import CONTENT, MEMBERSHIP, SCORES
from moe_unlearn.audit.judge import NO_QUESTION, Finding
from moe_unlearn.audit.run import ATTACKS, Report

Table = tuple[str, tuple[str, ...], list[list[str]]]  # title, head and rows
MEANINGS = {
    verdict.PRESENT: "The model shows the documents without any attack.",
    verdict.HIDDEN: "The documents come back under an attack: they were covered, not removed.",
    verdict.OVERSHOT: "The documents are more conspicuous than unseen text: that shows what was to be forgotten.",
    verdict.UNDECIDED: "The interval is too wide, or the documents are too few; more documents would tell.",
    verdict.GONE: "The documents look like documents that the model never saw, within the margin.",
}
ATTACK_COLUMNS = ("attack", "what was done", "gravest sign", "verdict")
COLUMNS = ("attack", "asked", "score", "forget", "retain", "null", "share of the original memory", "verdict")


def summary(report: Report) -> str:
    """Return what an audit found in one paragraph."""
    found = {name: report.of(name) for name in report.outcomes}
    worst = report.verdict
    titles = [ATTACKS[name].title.lower() for name, own in found.items() if own == worst]
    text = MEANINGS[worst]
    if not titles:
        text = f"No score could be judged: {next((own.why for own in report.findings if own.why), 'there is none')}."
    elif worst != verdict.GONE:
        text += f" Attacks with this verdict: {', '.join(titles)}."
    else:
        text += f" This held under every attack that was made: {', '.join(titles)}."
    if left := untested(report):
        text += f" Not tested: {'; '.join(dict.fromkeys(what.lower() for what, _ in left))}."
    return text


def untested(report: Report) -> list[tuple[str, str]]:
    """Return what got no verdict and why: attacks, and scores of attacks that were made."""
    found = {title(name): why for name, why in report.not_tested.items()}
    for own in report.findings:
        if not own.verdict and own.why != NO_QUESTION:
            found[f"{title(own.attack)}, {SCORES[own.score].title}"] = own.why
    return list(found.items())


def rows(report: Report) -> list[tuple[str, str, str, str]]:
    """Return a row for each attack: its title, what it does, the gravest share with what shows it, the verdict."""
    made = []
    for name, attack in ATTACKS.items():
        own = sorted((f for f in report.findings if f.attack == name and f.verdict), key=lambda f: f.weight)
        if own:
            sign = f"{shown(own[0])} by {SCORES[own[0].score].title}, {own[0].label}"
            made.append((attack.title, attack.about, sign, report.of(name)))
        else:
            reasons = [f.why for f in report.findings if f.attack == name and f.why != NO_QUESTION]
            why = report.not_tested.get(name) or next(iter(reasons), "it had nothing to judge")
            made.append((attack.title, attack.about, f"not tested: {why}", "not tested"))
    return made


def shown(finding: Finding) -> str:
    """Return a share with its interval as text."""
    if finding.share is None or finding.low is None or finding.high is None:
        return "-"
    low, share, high = (round(100 * number) for number in (finding.low, finding.share, finding.high))
    return f"{share} % [{low}, {high}]"


def null_of(report: Report) -> str:
    """Return in a sentence what forget documents are compared with."""
    if report.reference:
        return "The null is the retrained model's score of the same documents, under the same attack."
    return "The null is the score of the holdout documents in the same model, under the same attack."


def reading(report: Report) -> list[str]:
    """Return what a reader has to know to read the tables, a paragraph each."""
    counts = ", ".join(f"{count} {side}" for side, count in report.documents.items())
    content, membership = (report.margins[kind] for kind in (CONTENT, MEMBERSHIP))
    paragraphs = [
        f"Documents: {counts}. {null_of(report)} A share of 0 % is a document like an unseen one, 100 % one that is "
        f"known as before unlearning; brackets hold the 95 % interval over documents. Gone means an interval within "
        f"{100 * content:g} % of 0 on both sides ({100 * membership:g} % for membership, where areas are compared).",
        f"The chance of an alarm (present, hidden or overshot) although every share lies within its margin is at most "
        f"{100 * verdict.ALPHA:g} %, over all attacks together (Holm); the chance that the audit says gone although "
        f"some share lies outside is at most {50 * verdict.ALPHA:g} %.",
    ]
    if report.told_apart is not None:
        area = 0.5 + report.told_apart.value / 2
        told = "can" if report.told_apart.low > 0 else "cannot"
        paragraphs.append(
            f"A classifier of the texts alone {told} tell forget from holdout documents (area under ROC {area:.2f})."
        )
        if report.told_apart.low > 0 and not report.reference:
            paragraphs.append(
                "So membership has no verdict, and other shares may be the texts' difference: a retrained model "
                "(--reference) would tell."
            )
    paragraphs += [f"Left out: {line}." for line in report.left_out]
    return paragraphs


def more(report: Report) -> list[Table]:
    """Return further tables: title, head and rows."""
    found: list[Table] = []
    survives = report.outcomes["rounding"].more["survives"] if "rounding" in report.outcomes else {}
    if survives:
        body = [
            [grid, f"{own['changed']:,}", "-" if own["survive"] is None else f"{own['survive']:.1%}"]
            for grid, own in survives.items()
        ]
        found.append(("What survives rounding", ("grid", "weights that unlearning changed", "survive"), body))
    return found


def cells(own: Finding) -> list[str]:
    means = ["-" if (value := own.means.get(side)) is None else f"{value:.3g}" for side in ("forget", "retain", "null")]
    return [ATTACKS[own.attack].title, own.label, SCORES[own.score].title, *means, shown(own), own.verdict or own.why]


def title(name: str) -> str:
    return ATTACKS[name].title if name in ATTACKS else name
