"""Train a copy of the model for a few steps and watch how fast documents come back, against ones it never saw.

The documents of a side are two halves: one is trained on and the other only watched, then the other way round. The
attacker is that of `metrics.relearning_attack`: AdamW at a constant rate on all weights. Of every document the score is
the area under its curve of log-likelihood, the mean over the measured steps after the first:

    area_i = mean over steps k > 0 of loglik_i(k)

    trained on    documents while their own half is trained on; unseen documents learn theirs in the same way
    watched       documents while the other half of their side is trained on
    retain text   documents while retain text is trained on: what comes back was never shown to the attacker
    unseen text   documents while half of the unseen documents is trained on; the null are the other half's

A document that comes back faster than one that was never seen is learned was hidden.
"""

from collections.abc import Sequence

from torch import nn

from moe_unlearn.audit.attack import Attack, Outcome, Sides, Target, Values, Variant, mean, reading
from moe_unlearn.data import Example
from moe_unlearn.metrics.relearning import relearning_attack
from moe_unlearn.metrics.scoring import token_scores

_MEASURES = 4  # how often along an attack, beside its beginning
_HALVES = (0, 1)  # of a side: the documents with even and with odd numbers


def _run(target: Target) -> Outcome:
    rows = target.rows
    of_forget = [_Curve(target, rows["forget"][half::2], ("forget", "retain")) for half in _HALVES]
    of_holdout = [_Curve(target, rows["holdout"][half::2], ("forget", "holdout")) for half in _HALVES]
    of_retain = _Curve(target, rows["retain"], ("forget", "retain", "holdout"))
    variants = {}
    for name, away in (("trained on", 0), ("watched", 1)):
        sides: Sides = {
            "forget": _crossed(of_forget, "forget", away),
            "retain": _together(of_forget, "retain"),
            "holdout": _crossed(of_holdout, "holdout", away),
        }
        variants[name] = Variant(f"relearning half of them, documents {name}", {"loglik": sides})
    variants["retain text"] = Variant("training on retain text", {"loglik": of_retain.sides()})
    sides = {"forget": _together(of_holdout, "forget"), "holdout": _crossed(of_holdout, "holdout", 1)}
    variants["unseen text"] = Variant("training on unseen text of the kind", {"loglik": sides})
    curves = {
        "forget, half trained on": of_forget[0].means("forget"),
        "unseen, half trained on": of_holdout[0].means("holdout"),
        "forget, retain trained on": of_retain.means("forget"),
        "unseen, retain trained on": of_retain.means("holdout"),
    }
    return Outcome(variants, {"curves": curves})


class _Curve:
    """The log-likelihoods of the documents of some sides along one attack."""

    def __init__(self, target: Target, trained: Sequence[Example], sides: Sequence[str]):
        self.values: dict[str, list[Values]] = {side: [] for side in sides}
        settings = target.settings

        def measure(attacked: nn.Module) -> dict[str, float]:
            for side, values in self.values.items():
                rows = target.rows[side]
                scored = token_scores(attacked, rows, batch_size=target.batch_size, pad_id=target.pad_id)
                values.append(reading(scored)["loglik"])
            return {}

        self.steps = relearning_attack(
            target.model,
            trained,
            steps=settings.relearn_steps,
            lr=settings.relearn_lr,
            batch_size=settings.relearn_batch,
            every=max(1, settings.relearn_steps // _MEASURES),
            pad_id=target.pad_id,
            seed=settings.seed,
            measure=measure,
        ).steps

    def areas(self, side: str) -> Values:
        """Return each document's mean over the measured steps after the first."""
        return [mean(list(own)) for own in zip(*self.values[side][1:], strict=True)]

    def sides(self) -> Sides:
        """Return the areas of all sides."""
        return {side: self.areas(side) for side in self.values}

    def means(self, side: str) -> list[list[float]]:
        """Return [step, mean log-likelihood] of the documents of a side."""
        return [[step, mean(own)] for step, own in zip(self.steps, self.values[side], strict=True)]


def _crossed(curves: Sequence[_Curve], side: str, away: int) -> Values:
    """Return the areas of all documents of a side, each from the curve of its own half, or of the half `away` from it.

    Curve h is of an attack that trains on the documents of number h, h + 2, ...
    """
    areas = [curve.areas(side) for curve in curves]
    return [areas[(number + away) % 2][number] for number in range(len(areas[0]))]


def _together(curves: Sequence[_Curve], side: str) -> Values:
    """Return the mean areas of the documents of a side over several attacks."""
    return [mean(list(own)) for own in zip(*(curve.areas(side) for curve in curves), strict=True)]


ATTACK = Attack(
    "relearning",
    "Relearning",
    "A copy is trained for a few steps: hidden documents come back faster than unseen ones are learned.",
    _run,
)
