"""Summary of runs' metrics over seeds, and the table that shows it."""

import math
import statistics
from collections.abc import Collection, Sequence

from moe_unlearn.page import grid
from moe_unlearn.page.blocks import NOTHING

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
    "verbmem_s": ("VerbMem seen ↑", 3),
    "knowmem_s": ("KnowMem seen ↑", 3),
    "privleak": ("PrivLeak % →0", 1),
    "nll_f": ("NLL forget →R", 2),
    "nll_r": ("NLL retain ↓", 2),
    "nll_s": ("NLL seen ↓", 2),
    "routing_drift": ("routing drift", 3),
    "seconds": ("seconds", 1),
}

UNITS = {  # of a column; a share lies between 0 and 1
    "verbmem_f": "share",
    "knowmem_f": "share",
    "extraction_f": "share",
    "verbmem_r": "share",
    "knowmem_r": "share",
    "verbmem_s": "share",
    "knowmem_s": "share",
    "privleak": "percent",
    "nll_f": "nats per token",
    "nll_r": "nats per token",
    "nll_s": "nats per token",
    "routing_drift": "share",
    "seconds": "seconds",
}

GOALS = (
    "↓ lower and ↑ higher is better; →0 should be zero; →R should come close to the retrained model's value. "
    "A forgotten text scores like one never seen: below the retrained model there is nothing left to gain."
)
MEANINGS = {  # of one column or more: what they are called, and what they say
    ("verbmem_f", "verbmem_r", "verbmem_s"): (
        "VerbMem",
        "ROUGE-L F1 (0 to 1) of the greedy continuation against the true one.",
    ),
    ("knowmem_f", "knowmem_r", "knowmem_s"): (
        "KnowMem",
        "a cloze form, the fraction (0 to 1) of a document's longest words filled in given what precedes them; not "
        "MUSE's question answering.",
    ),
    ("extraction_f",): (
        "extracted",
        "fraction of forget documents whose first tokens come back exactly, given their title.",
    ),
    ("privleak",): (
        "PrivLeak",
        "100 (AUC - AUC of retrain) / AUC of retrain, in percent, of Min-40 % scores, forget against unseen documents; "
        "negative is under-unlearned, positive over-unlearned.",
    ),
    ("nll_f", "nll_r", "nll_s"): ("NLL", "mean negative log-likelihood of the true text, in nats per token."),
    ("routing_drift",): (
        "routing drift",
        "total variation (0 to 1) of the experts' frequencies on forget text, before and after.",
    ),
    ("verbmem_r", "knowmem_r", "nll_r"): (
        "retain",
        "measured on retain documents that unlearning did not see, where the run has such.",
    ),
    ("verbmem_s", "knowmem_s", "nll_s"): (
        "seen",
        "measured on the retain documents that unlearning took, where others were held out (data.retain_eval).",
    ),
    ("seconds",): (
        "seconds",
        "training for target and retrain (loading, if cached); preparation and steps for the others.",
    ),
}

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


def columns(summary: Summary) -> list[str]:
    """Return the usual columns that some run has."""
    return [key for key in COLUMNS if any(metrics.get(key) is not None for metrics in summary.values())]


def meanings(keys: Collection[str]) -> list[tuple[str, str]]:
    """Return what columns are called and what they say, of those there are."""
    return [meaning for own, meaning in MEANINGS.items() if not set(own).isdisjoint(keys)]


def table(summary: Summary, *, markdown: bool = False, keys: Sequence[str] = ()) -> str:
    """Return the metrics as an aligned text or Markdown table; `keys` are the columns, by default the usual ones."""
    keys = keys or columns(summary)
    head = ["run", *(heading(key) for key in keys)]
    rows = [[RUNS.get(run, run), *(cell(summary[run], key) for key in keys)] for run in ordered(summary)]
    return "\n".join(grid(head, rows, markdown=markdown))


def heading(key: str) -> str:
    """Return the heading of a column."""
    return COLUMNS.get(key, (key,))[0]


def cell(metrics: dict[str, float], key: str) -> str:
    """Return a value with its spread over seeds, or the interval over documents, where there is one."""
    value, digits = metrics.get(key), COLUMNS.get(key, (key, 3))[1]
    if value is None or math.isnan(value):
        return NOTHING
    spread, low, high = (metrics.get(f"{key}_{kind}") for kind in ("sd", "low", "high"))
    if spread is not None:
        return f"{value:.{digits}f} ± {spread:.{digits}f}"
    between = "" if low is None or high is None else f" [{low:.{digits}f}, {high:.{digits}f}]"
    return f"{value:.{digits}f}{between}"
