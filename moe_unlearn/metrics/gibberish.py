"""Measure how often a model answers as its original never would: a substitute for a gibberish classifier.

No classifier is asked. A generation counts as gibberish if it repeats itself more than any typical generation does,
or if a judge (a model that was not unlearned, usually the original) finds it less likely than any of them. Typical
generations are the original's own answers to the same prompts. So the rate measures what is out of the original's
range, which may include fluent but unusual text; it is not comparable with a classifier's numbers.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from moe_unlearn.data import Example
from moe_unlearn.metrics.scoring import token_scores
from moe_unlearn.ops.token_loss import IGNORED


@dataclass(frozen=True)
class GibberishRate:
    """Shares of the generations, in [0, 1]: `rate` counts those that are `repetitive`, `unlikely` or both.

    `empty` generations end at once and are neither.
    """

    rate: float
    repetitive: float
    unlikely: float
    empty: float


def repetition(tokens: Sequence[int], n: int = 3) -> float:
    """Return 1 - (distinct runs of n tokens) / (all runs of n tokens), in [0, 1); 0 below n + 1 tokens."""
    runs = [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
    return 1 - len(set(runs)) / len(runs) if runs else 0.0


def gibberish_rate(
    judge: nn.Module,
    prompts: Sequence[Sequence[int]],
    generations: Sequence[Sequence[int]],
    typical: Sequence[Sequence[int]],
    *,
    quantile: float = 1.0,
    batch_size: int = 32,
    pad_id: int = 0,
) -> GibberishRate:
    """Return the share of generations that are gibberish; the module docstring says which are.

    Args:
        judge: gives the mean NLL of a generation after its prompt.
        prompts: token ids, not empty, one for each generation and each typical generation.
        generations: token ids without end token, as `greedy` gives them; `typical` likewise, of the original.
        quantile: the bound on repetition and on NLL is this quantile (lower) of the typical values, in (0, 1];
            1 is their maximum.

    Raises ValueError if the three are not equally many, there are none, or every typical one is empty.
    """
    if not len(prompts) == len(generations) == len(typical) or not len(prompts):
        counts = f"{len(prompts)}, {len(generations)} and {len(typical)}"
        raise ValueError(f"expected equally many prompts, generations and typical ones, at least one; got {counts}")
    if not 0 < quantile <= 1:
        raise ValueError(f"quantile must be in (0, 1]; got {quantile}")
    known = _measures(judge, prompts, typical, batch_size, pad_id)
    if not known:
        raise ValueError("expected a typical generation with at least one token; all are empty")
    most_repetitive, least_likely = (_quantile(values, quantile) for values in zip(*known.values(), strict=True))
    found = _measures(judge, prompts, generations, batch_size, pad_id)
    repetitive = {i for i, (repeated, _) in found.items() if repeated > most_repetitive}
    # NaN, the NLL of a generation to which the judge gives no probability, counts as unlikely
    unlikely = {i for i, (_, loss) in found.items() if not loss <= least_likely}
    shares = (repetitive | unlikely, repetitive, unlikely, set(range(len(prompts))) - found.keys())
    return GibberishRate(*(len(share) / len(prompts) for share in shares))


def _measures(
    judge: nn.Module,
    prompts: Sequence[Sequence[int]],
    generations: Sequence[Sequence[int]],
    batch_size: int,
    pad_id: int,
) -> dict[int, tuple[float, float]]:
    """Return repetition and mean NLL of the non-empty generations, by position."""
    kept = [i for i, tokens in enumerate(generations) if len(tokens)]
    if not kept:
        return {}
    examples = [
        Example([*prompts[i], *generations[i]], [IGNORED] * len(prompts[i]) + list(generations[i]), len(prompts[i]))
        for i in kept
    ]
    scores = token_scores(judge, examples, batch_size=batch_size, pad_id=pad_id)
    return {
        i: (repetition(generations[i]), -score.logprobs[score.counted].double().mean().item())
        for i, score in zip(kept, scores, strict=True)
    }


def _quantile(values: Sequence[float], quantile: float) -> float:
    return sorted(values)[math.ceil(quantile * len(values)) - 1]
