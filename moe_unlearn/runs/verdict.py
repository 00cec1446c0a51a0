"""Verdict of a run, in words: is what was to be forgotten gone, and does a lever help?"""

import math
import statistics
from collections.abc import Mapping
from typing import Any

from moe_unlearn.page import Block, Inline, Items, Paragraph, code, mark, strong
from moe_unlearn.page.text import plain
from moe_unlearn.runs.summary import BASELINE, CLEAR, FORGOTTEN, KEEP, LEVERS, RUNS, WITHIN, Summary, ordered

_GONE, _PRESENT, _OVERSHOT = "gone", "present", "overshot"
_REACHED, _MISSED = mark("reached"), mark("not reached")


def verdict(summary: Summary, results: Mapping[Any, Summary], audit: Mapping[str, Any]) -> list[Block]:
    """Return for each run whether it reached the goal, and for each lever whether it helps, paired by seed.

    `results` are the summaries by seed, `audit` what an attack on one run found. Without the retrained model there is
    no goal, and that is said.
    """
    if "retrain" not in summary:
        return [
            Paragraph(
                [
                    "The reference run is missing: without a model retrained on the retain documents alone there is "
                    "no PrivLeak, and nobody knows how low the forget metrics should go. Give it as ",
                    code("data.reference"),
                    ".",
                ]
            )
        ]
    gold, target = summary["retrain"], summary.get("target")
    goal = Paragraph(
        [
            "The goal is the retrained model, which never saw the forget documents: VerbMem, KnowMem and extraction at "
            f"most {WITHIN:.2f} away from its own, PrivLeak at most {FORGOTTEN['privleak'][1]:g} away from 0, NLL at "
            f"most {FORGOTTEN['nll_f'][1]:.0%} of the way from it to the target, and at least {KEEP:.0%} of the "
            "target's retain VerbMem. ",
            strong(_PRESENT),
            " is above that, ",
            strong(_OVERSHOT),
            " below.",
        ]
    )
    goals: list[list[Inline]] = []
    for run in ordered(summary):
        if run in ("target", "retrain"):
            continue
        words = _words(summary[run], gold, target)
        reached = set(words.values()) == {_GONE}
        text = ", ".join(f"{FORGOTTEN[key][0]} {word}" for key, word in words.items())
        if target and target["verbmem_r"]:
            kept = summary[run]["verbmem_r"] / target["verbmem_r"]
            text += f"; {kept:.1%} of retain VerbMem kept"
            reached = reached and kept >= KEEP
        if audit.get("run") == run:
            text += f"; audit {audit['verdict']}"
            reached = reached and audit["verdict"] == _GONE
        goals.append([f"{RUNS.get(run, run)}: {text}: ", _REACHED if reached else _MISSED, "."])
    blocks: list[Block] = [goal, Items(goals)]
    levers = [_lever(lever, summary, results) for lever in LEVERS if lever in summary and BASELINE in summary]
    if levers:
        told = (
            f"Does a lever help over {RUNS[BASELINE]} here? The distance is that to retrain in the plane of "
            "forget and retain VerbMem, paired by seed."
        )
        blocks += [Paragraph(told), Items(levers)]
    return blocks


def sentences(summary: Summary, results: Mapping[Any, Summary], audit: Mapping[str, Any]) -> list[str]:
    """Return what `verdict` says of each run and each lever, one line of plain text for each."""
    lists = [block for block in verdict(summary, results, audit) if isinstance(block, Items)]
    return [plain(item) for block in lists for item in block.items]


def _words(metrics: dict[str, float], gold: dict[str, float], target: dict[str, float] | None) -> dict[str, str]:
    """Return for each forget metric that there is whether what was to be forgotten is gone, present or overshot."""
    words = {}
    for key, (_, margin) in FORGOTTEN.items():
        values = [each.get(key) for each in (metrics, gold, target or {})]
        own, wanted, former = (math.nan if value is None else value for value in values)
        more = own - wanted
        if key == "privleak":
            more = -own  # negative where a model knows more than retrain
        elif key == "nll_f":
            more = (wanted - own) / (wanted - former) if wanted > former else math.nan
        if not math.isnan(more):
            words[key] = _PRESENT if more > margin else _OVERSHOT if more < -margin else _GONE
    return words


def _lever(lever: str, summary: Summary, results: Mapping[Any, Summary]) -> list[Inline]:
    complete = [s for s in results.values() if {lever, BASELINE, "retrain"} <= s.keys()] or [summary]
    gains = [_distance(s, BASELINE) - _distance(s, lever) for s in complete]
    gain = statistics.fmean(gains)
    spread = statistics.stdev(gains) if len(gains) > 1 else 0.0
    shown = f"{gain:+.3f}" + (f" ± {spread:.3f}" if len(gains) > 1 else "")
    threshold = max(CLEAR, spread)
    if gain > threshold:
        word = [mark("helps")]
    elif gain < -threshold:
        word = [mark("hurts")]
    else:
        word = [strong("does not help on this data (no difference beyond the spread)")]
    return [f"{LEVERS[lever]} ", *word, f": distance shorter by {shown}."]


def _distance(summary: Summary, run: str) -> float:
    gold = summary["retrain"]
    return math.hypot(*(summary[run][key] - gold[key] for key in ("verbmem_f", "verbmem_r")))
