"""Put the numbers of a study into sentences."""

import math
import statistics
from collections.abc import Iterable, Sequence

from scipy import stats

GOAL = 9  # percent of relative utility


def paired(differences: Iterable[float]) -> dict:
    """Return the mean, the half-width of the 95 % t interval (None below two values) and the number of values."""
    values = list(differences)
    if not values:
        return {"mean": None, "half": None, "n": 0}
    half = None
    if len(values) > 1:
        half = float(stats.t.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / math.sqrt(len(values))
    return {"mean": statistics.fmean(values), "half": half, "n": len(values)}


def reading(data: dict) -> list[str]:
    """Return the sentences on the goal of TRACE's paper and on its premise, from the content of `study.json`."""
    cases = dict.fromkeys(row["case"] for row in data["main"])
    found = [f"{case}: {goal([r for r in data['main'] if r['case'] == case])}" for case in cases]
    return [*found, *_premise(data["mismatch"])]


def goal(rows: list[dict]) -> str:
    """Return a sentence that sets the claim of TRACE's paper beside the rows of one corpus at both levels."""
    found = []
    for key, where in (("against_strongest", ""), ("against_strongest_near", " at the looser level")):
        tried = [r for r in rows if r["variant"] == "TRACE" and r.get(key, {"n": 0})["n"]]
        if not tried:
            found.append(f"no run with TRACE alone reached the level{where}")
            continue
        best = max(tried, key=lambda r: r[key]["mean"])
        verdict = "reached" if best[key]["mean"] >= GOAL else "not reached"
        found.append(
            f"{verdict}{where}, where the best baseline with TRACE alone is {best['baseline']}, "
            f"{interval(best[key], 1)} % ({best[key]['n']} seeds)"
        )
    return f"Goal from the paper, TRACE at least {GOAL} % above the strongest plain baseline: {'; '.join(found)}."


def _premise(rows: list[dict]) -> list[str]:
    """Return sentences on TRACE's effect against the measures of its premise; each paired run is a point."""
    found = []
    for metric, of in (("nll_c", "on tokens of critical experts"), ("nll_r", "on all")):
        points = [r for r in rows if f"{metric} near" in r]
        if len(points) < 3:
            continue
        effects = [math.log(after / before) for before, after in (r[f"{metric} near"] for r in points)]
        lower = sum(effect < 0 for effect in effects)
        change = 100 * math.expm1(statistics.fmean(effects))
        found.append(
            f"At the looser level TRACE changes the NLL of retain tokens by {change:+.0f} % {of} (geometric "
            f"mean of {len(points)} paired runs, lower in {lower}); its rank correlation is "
            f"{_spearman([r['ratio'] for r in points], effects)} with f^F/f^R of the selected experts and "
            f"{_spearman([r['ess'] for r in points], effects)} with the effective sample size."
        )
    points = sorted((r for r in rows if "verbmem_r near" in r), key=lambda r: r["ratio"])
    if len(points) > 3:
        changes = [100 * (after / before - 1) for before, after in (r["verbmem_r near"] for r in points)]
        half = len(points) // 2
        found.append(
            f"There TRACE changes VerbMem retain by {interval(paired(changes[half:]), 1)} % in the half of these runs "
            f"with the stronger mismatch (f^F/f^R from {points[half]['ratio']:.1f} on), by "
            f"{interval(paired(changes[:half]), 1)} % in the other (runs of one seed are not independent)."
        )
    known = [r["target"] for r in rows if all("weighted" in (r[where] or {}) for where in ("target", "gradients"))]
    if known:
        critical, others = (
            statistics.fmean(g["weighted"][kind] / g["uniform"][kind] for g in known) for kind in ("critical", "others")
        )
        found.append(
            f"TRACE's weights multiply the retain-gradient norm of a critical expert by {critical:.2f} and that of "
            f"another by {others:.2f} in the unchanged model (means over {len(known)} runs)."
        )
    return found


def _spearman(first: Sequence[float], second: Sequence[float]) -> str:
    if len(set(first)) == 1 or len(set(second)) == 1:
        return "not defined"
    found = stats.spearmanr(first, second)
    return f"{found.statistic:+.2f} (p {found.pvalue:.2g})"


def clear(value: dict) -> bool:
    """Return whether the interval of a `paired` value leaves out 0."""
    return value["half"] is not None and abs(value["mean"]) > value["half"]


def interval(value: dict | None, digits: int = 3) -> str:
    if value is None or value["mean"] is None:
        return "–"
    half = "" if value["half"] is None else f" ± {value['half']:.{digits}f}"
    return f"{value['mean']:+.{digits}f}{half}"
