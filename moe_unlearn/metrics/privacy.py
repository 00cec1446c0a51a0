"""Measure whether training on a document shows: Min-40 % scores, their AUC, and PrivLeak."""

import math
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from moe_unlearn.metrics.scoring import TokenScores


def nll(scores: Sequence[TokenScores]) -> float:
    """Return the mean negative log-likelihood over all labelled tokens of all examples, in nats a token.

    Raises ValueError if no token carries a label.
    """
    logprobs = torch.cat([s.logprobs[s.counted] for s in scores]) if scores else torch.empty(0)
    if not len(logprobs):
        raise ValueError("expected at least one token with a label; got none")
    return -logprobs.double().mean().item()


def min_k(scores: Sequence[TokenScores], fraction: float = 0.4) -> Tensor:
    """Return the Min-K % score of each example, the mean of its lowest `fraction` of log-probabilities.

    The result is float64 [examples]. At least one token counts. Raises ValueError if an example has no labelled token.
    """
    return lowest([score.logprobs[score.counted] for score in scores], fraction)


def lowest(values: Sequence[Tensor], fraction: float) -> Tensor:
    """Return the mean of the lowest `fraction` of each example's values, at least one of them, float64 [examples].

    Raises ValueError if an example has no values.
    """
    means = []
    for number, own in enumerate(values):
        if not len(own):
            raise ValueError(f"example {number}: expected at least one token with a label; got none")
        means.append(own.double().sort().values[: max(1, int(fraction * len(own)))].mean())
    return torch.stack(means)


def rel_diff(value: float, reference: float) -> float:
    """Return open-unlearning's 100 (value - reference) / reference, in percent; NaN if the reference is 0."""
    return 100 * (value - reference) / reference if reference else math.nan


def auc(negative: Tensor, positive: Tensor) -> float:
    """Return the area under the ROC curve: the chance that a positive scores above a negative, ties counting half.

    Raises ValueError if either side is empty or holds a NaN.
    """
    for name, side in (("negative", negative), ("positive", positive)):
        if side.ndim != 1 or not len(side) or side.isnan().any():
            raise ValueError(f"expected a non-empty vector of {name} scores without NaN; got {side}")
    ordered = negative.sort().values
    below = torch.searchsorted(ordered, positive, right=False)
    up_to = torch.searchsorted(ordered, positive, right=True)
    return (below + up_to).double().mean().item() / (2 * len(negative))


def membership_auc(forget: Sequence[TokenScores], holdout: Sequence[TokenScores]) -> float:
    """Return MUSE's AUC of Min-40 %: the chance that an unseen holdout document is likelier than a forget document.

    It is 0 for a model that knows the forget documents by heart, about 0.5 for one that never saw them, and 1 for one
    that finds them conspicuously unlikely.
    """
    return auc(min_k(forget), min_k(holdout))


def privleak(auc_unlearned: float, auc_retrained: float) -> float:
    """Return 100 (AUC_unlearned - AUC_retrained) / AUC_retrained, in percent, of `membership_auc`.

    It is 0 for a model like the retrained one; negative means under-unlearned (-100 at worst), positive
    over-unlearned. The value is NaN if the retrained model's AUC is 0, since it then knows the forget documents and
    is no reference.
    """
    return rel_diff(auc_unlearned, auc_retrained)


def add_privleak(rows: Iterable[dict[str, float]], retrained: Mapping[str, float]) -> None:
    """Add `privleak` to the metrics of each model that has a `minkauc`, if the retrained model's have one too."""
    for values in rows:
        if "minkauc" in values and "minkauc" in retrained:
            values["privleak"] = privleak(values["minkauc"], retrained["minkauc"])
