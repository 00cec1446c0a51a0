"""Decide whether forgotten documents look like unseen ones, from one score a document and with known error rates.

A score is larger the more a model shows of a document. Judged is the share of the original memory that is there:

    share = (forget - null) / (before - null before)

a difference of means over documents, or of areas under ROC curves, in units of what the model before unlearning knew
beyond unseen text: 0 is a document like an unseen one, 1 is one known as before. It is the mean U of a kernel
h(forget_i, null_j), and its interval comes from resampling documents: forget and null documents apart, or pairs where
the null is a retrained model's score of the same document. Of means it is the bootstrap-t interval, of areas, which
cannot pass 1, the percentile interval (Efron and Tibshirani 1993, ch. 12 and 13):

    means   [U - q_{1-a/2}(t*) se, U - q_{a/2}(t*) se],     P(t* >= (U - d) / se),     t* = (U* - U) / max(se*, se / 2)
    areas   [q_{a/2}(U*), q_{1-a/2}(U*)],                   P(U* <= d)

with se^2 = var_i(mean_j h) / n + var_j(mean_i h) / m, Welch's; behind the interval stands the p-value of "share <= d".

With a margin d a share is called

    gone       if the whole interval lies in (-d, d), and n documents cannot have missed a share d of documents that are
               known in whole: (1 - d)^n <= a / 2, 36 documents for d = 0.1
    present    if it is above d: the p-value of "share <= d" is small enough
    hidden     the same, where an attack was needed for it: the text comes back
    overshot   if it is below -d in the same sense: more conspicuous than unseen text
    undecided  otherwise; more documents would tell

Two errors of a whole audit are bounded. *False alarm*, any of present, hidden and overshot where the share lies within
the margin: Holm's step-down over all comparisons of all attacks, at most `ALPHA`, whatever their dependence. *False
clearance*, an audit called gone although some share lies outside: at most `ALPHA` / 2, since every comparison has to
be gone (an intersection-union test), so that no correction is needed. The gone of a single row has that rate by itself.
"""

from collections.abc import Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar

import torch
from torch import Tensor

from moe_unlearn.data import generator

ALPHA = 0.05
RESAMPLES = 9999
LEAST = 8  # documents a side; fewer say nothing about others
_Name = TypeVar("_Name", bound=Hashable)
_CHUNK = 2**22  # numbers of a table of resamples that is in memory

GONE, HIDDEN, PRESENT, OVERSHOT, UNDECIDED = VERDICTS = ("gone", "hidden", "present", "overshot", "undecided")
#: the worst first: an audit is called what its worst attack is
WORST = (PRESENT, HIDDEN, OVERSHOT, UNDECIDED, GONE)


@dataclass(frozen=True)
class Documents:
    """Scores of forget documents and of their null, float64 [n] and [m]; larger where a model shows more of a text.

    `paired` says that null i is of forget document i. With `areas` the comparison is of areas under ROC curves: the
    chance that a forget document scores above one of `others`, documents that neither model saw, minus the same chance
    under the null's scores: `null` and `null_others` of a retrained model, or 1/2 where these are missing.
    """

    forget: Tensor
    null: Tensor | None = None
    paired: bool = False
    areas: bool = False
    others: Tensor | None = None
    null_others: Tensor | None = None

    @cached_property
    def kernel(self) -> tuple[Tensor, bool]:
        """Return h [n, m], or [n, 1] for pairs, and whether the columns are documents that are resampled."""
        if self.areas:
            assert self.others is not None
            own = _above(self.forget, self.others)
            if self.null is None or self.null_others is None:
                return own - 0.5, True
            return own - _above(self.null, self.null_others), True
        assert self.null is not None
        if self.paired:
            return (self.forget - self.null)[:, None], False
        return self.forget[:, None] - self.null[None, :], True

    @property
    def difference(self) -> float:
        """Return forget minus null, in the unit of the score."""
        return self.kernel[0].mean().item()


@dataclass(frozen=True)
class Share:
    """A share of the original memory: value, interval, and p-values that it is within the margin from either side.

    `missed` is the share of documents of another kind that as many documents as there are may all have missed.
    """

    value: float
    low: float
    high: float
    margin: float
    p_above: float
    p_below: float
    missed: float

    @property
    def p(self) -> float:
        """Return the p-value, of both sides, that the share lies within the margin."""
        return min(1.0, 2 * min(self.p_above, self.p_below))

    @property
    def gone(self) -> bool:
        """Return whether the whole interval lies within the margin, and no such share can have been missed."""
        return -self.margin < self.low and self.high < self.margin and self.missed <= self.margin


def share(
    documents: Documents,
    whole: float,
    margin: float,
    *,
    alpha: float = ALPHA,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Share:
    """Return the share of the memory `whole` (in the unit of the score) that documents show, with its interval.

    Where all documents agree to the last bit no spread is known: then the interval is value +- (1 - (a/2)^(1/n)), what
    documents of another kind, which are known in whole, add if as many as can be are among those not seen. Raises
    ValueError for fewer than `LEAST` documents a side, scores that are not finite, or a `whole` that is not above 0.
    """
    kernel, columns = documents.kernel
    _check(kernel, columns, whole)
    kernel = kernel / whole
    n, m = kernel.shape
    once = [torch.ones(1, size, dtype=torch.float64) for size in (n, m)]
    value, error = (own.item() for own in _studentised(kernel, once[0], once[1], columns))
    count = min(n, m) if columns else n
    missed = 1 - (alpha / 2) ** (1 / count)
    if error <= 1e-12 * max(1.0, abs(value)):
        return _without_spread(value, count, margin, missed)
    drawn, errors = _resampled(kernel, columns, resamples, seed)
    if documents.areas:
        ordered, below, above = drawn.sort().values, drawn <= margin, drawn >= -margin
    else:
        # few of many documents may differ at all; resamples that miss them are no reason to think that anything may be
        t = (drawn - value) / errors.clamp_min(error / 2)
        ordered = value - t.sort(descending=True).values * error
        below, above = t >= (value - margin) / error, t <= (value + margin) / error
    cut = max(1, int((resamples + 1) * alpha / 2 + 1e-9))  # the order statistics that leave so many outside
    p_above, p_below = ((1 + int(own.sum())) / (resamples + 1) for own in (below, above))
    return Share(value, ordered[cut - 1].item(), ordered[-cut].item(), margin, p_above, p_below, missed)


def holm(p_values: Sequence[float], alpha: float = ALPHA) -> list[bool]:
    """Return which hypotheses Holm's step-down rejects with a familywise error of at most `alpha` (Holm 1979)."""
    rejected = [False] * len(p_values)
    for step, i in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        if p_values[i] > alpha / (len(p_values) - step):
            break
        rejected[i] = True
    return rejected


def verdicts(shares: Mapping[_Name, Share], plain: Collection[_Name] = (), alpha: float = ALPHA) -> dict[_Name, str]:
    """Return the verdict of each comparison of a whole audit; those named in `plain` took no attack to show a text.

    Where one of these is present, no other is hidden: it took no attack to show the text.
    """
    rejected = dict(zip(shares, holm([own.p for own in shares.values()], alpha), strict=True))
    above = {name for name, own in shares.items() if rejected[name] and own.p_above < own.p_below}
    shown = PRESENT if above & set(plain) else HIDDEN
    found = {}
    for name, own in shares.items():
        if rejected[name]:
            found[name] = shown if name in above else OVERSHOT
        else:
            found[name] = GONE if own.gone else UNDECIDED
    return found


def worst(found: Sequence[str]) -> str:
    """Return the worst of several verdicts; none at all is undecided."""
    return min(found, key=WORST.index) if found else UNDECIDED


def _above(forget: Tensor, others: Tensor) -> Tensor:
    """Return [n, m]: 1 where a forget document scores above another, 1/2 at ties, else 0."""
    return (forget[:, None] > others).double() + 0.5 * (forget[:, None] == others).double()


def _check(kernel: Tensor, columns: bool, whole: float) -> None:
    n, m = kernel.shape
    if n < LEAST or columns and m < LEAST:
        sides = f"{n} forget and {m} null" if columns else f"{n}"
        raise ValueError(f"expected at least {LEAST} documents a side to resample; got {sides}")
    if not kernel.isfinite().all():
        raise ValueError("expected finite scores; got some that are not")
    if not whole > 0:
        raise ValueError(f"expected an original memory above 0 to take a share of; got {whole:g}")


def _without_spread(value: float, n: int, margin: float, missed: float) -> Share:
    def p(beyond: float) -> float:
        return 1.0 if beyond <= 0 else max(0.0, 1 - beyond) ** n

    return Share(value, value - missed, value + missed, margin, p(value - margin), p(-margin - value), missed)


def _studentised(kernel: Tensor, rows: Tensor, columns: Tensor, both: bool) -> tuple[Tensor, Tensor]:
    """Return U and its standard error [B] for resamples with `rows` [B, n] and `columns` [B, m] copies of documents."""
    n, m = kernel.shape
    by_row = columns @ kernel.T / m  # [B, n], the mean over null documents
    value = (rows * by_row).sum(1) / n
    variance = (rows * (by_row - value[:, None]) ** 2).sum(1) / (n * (n - 1))
    if both:
        by_column = rows @ kernel / n
        variance = variance + (columns * (by_column - value[:, None]) ** 2).sum(1) / (m * (m - 1))
    return value, variance.sqrt()


def _resampled(kernel: Tensor, columns: bool, resamples: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return U* and its standard errors, [resamples] each."""
    n, m = kernel.shape
    draw, parts, left = generator(seed, 0), [], resamples
    while left:
        count = min(left, max(1, _CHUNK // (n + m)))
        left -= count
        rows = _copies(count, n, draw)
        own = _copies(count, m, draw) if columns else torch.ones(count, m, dtype=torch.float64)
        parts.append(_studentised(kernel, rows, own, columns))
    drawn, errors = zip(*parts, strict=True)
    return torch.cat(drawn), torch.cat(errors)


def _copies(count: int, n: int, draw: torch.Generator) -> Tensor:
    """Return how often each of n documents is drawn in `count` resamples of n, float64 [count, n]."""
    drawn = torch.randint(n, (count, n), generator=draw)
    return torch.zeros(count, n, dtype=torch.float64).scatter_add_(1, drawn, torch.ones(count, n, dtype=torch.float64))
