"""Turn the scores of all attacks into findings: shares of the original memory, intervals, verdicts.

What the null is: with a retrained model its scores of the same documents, pair by pair; else the holdout documents'
scores under the same attack on the same model. The original memory is that of the model before, asked as it is: its
scores of the forget documents minus those of the null, the holdout's of the same model where there is no reference. A
score by which the model before shows no such memory can show no forgetting either, and is listed as not tested.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from moe_unlearn.audit import verdict
from moe_unlearn.audit.attack import CONTENT, MEMBERSHIP, SCORES, Outcome, Sides, Values
from moe_unlearn.audit.verdict import Documents, Share

PLAIN = "plain"
MARGINS = {CONTENT: 0.1, MEMBERSHIP: 0.2}  # the same for an area as 0.1 about 1/2
NO_QUESTION = "it shows where knowledge lies, which is no question of forgotten or not"


@dataclass(frozen=True)
class Finding:
    """One comparison: means of a score, the share of the original memory that is there, and the verdict.

    Without a share `verdict` is "" and `why` says why there is none.
    """

    attack: str
    variant: str
    label: str
    score: str
    means: dict[str, float | None]  # of forget, retain and null documents; areas of membership scores
    share: float | None = None
    low: float | None = None
    high: float | None = None
    p: float | None = None
    verdict: str = ""
    why: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return asdict(self)

    @property
    def weight(self) -> tuple[int, float]:
        """Return what sorts findings, the gravest first."""
        return verdict.WORST.index(self.verdict) if self.verdict else len(verdict.WORST), -abs(self.share or 0.0)


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """Outcomes by attack, of the model and of the retrained one, and those of the model before as it is.

    `texts_differ` says that forget and holdout texts can be told apart without any model. `margins` are by kind.
    """

    after: Mapping[str, Outcome]
    before: Outcome
    null: Mapping[str, Outcome] | None = None
    texts_differ: bool = False
    margins: Mapping[str, float] | None = None
    resamples: int = verdict.RESAMPLES
    seed: int = 0

    def findings(self) -> list[Finding]:
        """Return a finding for each score of each variant of each attack, verdicts corrected over all of them."""
        drawn: list[tuple[Finding, Share | None]] = [
            self._drawn(attack, name, score)
            for attack, outcome in self.after.items()
            for name, variant in outcome.variants.items()
            for score in variant.scores
        ]
        shares = {i: own for i, (_, own) in enumerate(drawn) if own is not None}
        named = verdict.verdicts(shares, [i for i in shares if drawn[i][0].attack == PLAIN])
        return [replace(finding, verdict=named.get(i, "")) for i, (finding, _) in enumerate(drawn)]

    def _drawn(self, attack: str, name: str, score: str) -> tuple[Finding, Share | None]:
        variant, kind = self.after[attack].variants[name], SCORES[score].kind
        sides = variant.scores[score]
        null = None if self.null is None else self.null[attack].variants[name].scores.get(score)
        finding = Finding(attack, name, variant.label, score, _means(sides, null, kind))
        why = self._why_not(variant.judged, score, null)
        whole = None if why else self._whole(score, attack, name)
        if whole is not None and whole < SCORES[score].least:
            why = "the model before shows no more of these documents by this score than the null does"
        if why or whole is None:
            return replace(finding, why=why), None
        margins = MARGINS | dict(self.margins or {})
        try:
            own = verdict.share(
                _documents(sides, null, kind), whole, margins[kind], resamples=self.resamples, seed=self.seed
            )
        except ValueError as error:
            return replace(finding, why=f"{error}"), None
        return replace(finding, share=own.value, low=own.low, high=own.high, p=own.p), own

    def _why_not(self, judged: bool, score: str, null: Sides | None) -> str:
        if not judged:
            return NO_QUESTION
        if null is None and score in ("probe", "lens"):
            return "what is inside differs by more than what was trained on: give --reference"
        if null is None and SCORES[score].kind == MEMBERSHIP and self.texts_differ:
            return "texts alone tell forget from holdout documents: give --reference"
        return ""

    def _whole(self, score: str, attack: str, name: str) -> float | None:
        """Return the original memory in the unit of a score."""
        if score == "probe":
            return 0.5  # as much as an area can say
        known = self.before.variants["as it is"].scores.get(score)
        if known is None:
            return None
        null = None if self.null is None else self.null[PLAIN].variants["as it is"].scores.get(score)
        if score == "lens" and self.null is not None:
            null = self.null[attack].variants[name].scores[score]
        return _documents(known, null, SCORES[score].kind).difference


def _documents(sides: Sides, null: Sides | None, kind: str) -> Documents:
    """Return the documents of a comparison, without those that cannot be measured."""
    if kind == MEMBERSHIP:
        if null is None:
            return Documents(_known(sides["forget"]), areas=True, others=_known(sides["holdout"]))
        own = [_both(sides[side], null[side]) for side in ("forget", "holdout")]
        (forget, former), (others, null_others) = own
        return Documents(forget, former, areas=True, others=others, null_others=null_others)
    if null is None:
        return Documents(_known(sides["forget"]), _known(sides["holdout"]))
    return Documents(*_both(sides["forget"], null["forget"]), paired=True)


def _means(sides: Sides, null: Sides | None, kind: str) -> dict[str, float | None]:
    """Return what a report shows of a comparison: means of documents, or areas."""
    if kind == MEMBERSHIP:
        area = _documents(sides, None, kind).difference + 0.5
        known = 0.5 if null is None else _documents(null, None, kind).difference + 0.5
        return {"forget": area, "retain": None, "null": known}
    other = sides.get("holdout") if null is None else null.get("forget")
    return {"forget": _mean(sides["forget"]), "retain": _mean(sides.get("retain")), "null": _mean(other)}


def _known(values: Values) -> Tensor:
    return torch.tensor([value for value in values if value is not None], dtype=torch.float64)


def _both(one: Values, other: Values) -> tuple[Tensor, Tensor]:
    pairs = [(a, b) for a, b in zip(one, other, strict=True) if a is not None and b is not None]
    table = torch.tensor(pairs, dtype=torch.float64).reshape(-1, 2)
    return table[:, 0], table[:, 1]


def _mean(values: Values | None) -> float | None:
    known = _known(values or [])
    return known.mean().item() if len(known) else None
