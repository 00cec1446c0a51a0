"""Summary of runs' metrics over seeds, and the table that shows it."""

import math
import statistics
from collections.abc import Sequence

RUNS = {  # in the order of every table and legend
    "target": "target (to unlearn)",
    "retrain": "retrain (gold)",
    "graddiff": "GradDiff",
    "npo": "NPO",
    "trace": "TRACE",
    "wagle": "WAGLE",
    "mollm": "MOLLM",
    "combined": "three levers",
}

LEVERS = {
    "trace": "TRACE (where in the data)",
    "wagle": "WAGLE (where in the model)",
    "mollm": "MOLLM (which way)",
    "combined": "all three",
}

BASELINE = "npo"  # the forget objective the levers are added to

COLUMNS = {  # key: heading, digits
    "verbmem_f": ("VerbMem forget ↓", 3),
    "knowmem_f": ("KnowMem forget ↓", 3),
    "extraction_f": ("extracted ↓", 3),
    "verbmem_r": ("VerbMem retain ↑", 3),
    "knowmem_r": ("KnowMem retain ↑", 3),
    "privleak": ("PrivLeak % →0", 1),
    "nll_f": ("NLL forget →R", 2),
    "nll_r": ("NLL retain ↓", 2),
    "routing_drift": ("routing drift", 3),
    "seconds": ("seconds", 1),
}

LEGEND = """\
↓ lower and ↑ higher is better; →0 should be zero; →R should come close to the retrained model's value. \
A forgotten text scores like one never seen: below the retrained model there is nothing left to gain.

* **VerbMem**: ROUGE-L F1 (0 to 1) of the greedy continuation against the true one.
* **KnowMem**: a cloze form, the fraction (0 to 1) of a document's longest words filled in given what \
precedes them; not MUSE's question answering.
* **extracted**: fraction of forget documents whose first tokens come back exactly, given their title.
* **PrivLeak**: 100 (AUC - AUC of retrain) / AUC of retrain, in percent, of Min-40 % scores, forget against \
unseen documents; negative is under-unlearned, positive over-unlearned.
* **NLL**: nats a token.
* **routing drift**: total variation (0 to 1) of the experts' frequencies on forget text, before and after.
* **retain** is measured on retain documents that unlearning did not see, where the run has such.
* **seconds**: training for target and retrain (loading, if cached); preparation and steps for the others.
"""

# the goal: forget VerbMem at most WITHIN away from retrain's, and the share KEEP or more of the target's retain VerbMem
WITHIN, KEEP = 0.10, 0.95
# key: name, and how far it may be away from retrain's; of NLL a share of what lies between target and retrain
FORGOTTEN = {
    "verbmem_f": ("VerbMem", WITHIN),
    "knowmem_f": ("KnowMem", 0.10),
    "extraction_f": ("extraction", 0.10),
    "privleak": ("PrivLeak", 10.0),
    "nll_f": ("NLL", 0.10),
}
CLEAR = 0.01  # the smallest difference that counts

Summary = dict[str, dict[str, float]]


def check_name(recipe: str) -> None:
    """Raise ValueError for a recipe whose row of a summary would take the place of another."""
    if recipe in ("target", "retrain"):
        raise ValueError(f"name {recipe!r} is that of another row of the report; give the recipe a name of its own")


def summarise(results: dict[int, Summary]) -> Summary:
    """Return the mean over seeds of every metric that all seeds have and, with two seeds or more, `<key>_sd`."""
    runs = list(dict.fromkeys(run for summary in results.values() for run in summary))
    summary: Summary = {}
    for run in runs:
        each = [s[run] for s in results.values() if run in s]
        keys = [key for key in each[0] if all(key in metrics for metrics in each)]
        summary[run] = {key: statistics.fmean(m[key] for m in each) for key in keys}
        if len(each) > 1:
            summary[run] |= {f"{key}_sd": statistics.stdev(m[key] for m in each) for key in keys}
    return summary


def ordered(summary: dict) -> list[str]:
    """Return the run names in the order of `RUNS`, unknown ones last."""
    return [r for r in RUNS if r in summary] + [r for r in summary if r not in RUNS]


def table(summary: Summary, *, markdown: bool = False, keys: Sequence[str] = ()) -> str:
    """Return the metrics as an aligned text or Markdown table; `keys` are the columns, by default the usual ones."""
    keys = keys or [key for key in COLUMNS if any(key in metrics for metrics in summary.values())]
    rows = [["run", *(COLUMNS.get(key, (key,))[0] for key in keys)]]
    for run in ordered(summary):
        rows.append([RUNS.get(run, run), *(_cell(summary[run], key) for key in keys)])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    padded = [
        [cell.rjust(w) if i else cell.ljust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))]
        for row in rows
    ]
    if not markdown:
        return "\n".join("  ".join(row).rstrip() for row in padded)
    rule = ["-" * w if not i else "-" * (w - 1) + ":" for i, w in enumerate(widths)]
    return "\n".join(f"| {' | '.join(row)} |" for row in [padded[0], rule, *padded[1:]])


def _cell(metrics: dict[str, float], key: str) -> str:
    value, digits = metrics.get(key), COLUMNS.get(key, (key, 3))[1]
    if value is None or math.isnan(value):
        return "–"
    spread = metrics.get(f"{key}_sd")
    return f"{value:.{digits}f}" + (f" ± {spread:.{digits}f}" if spread is not None else "")
