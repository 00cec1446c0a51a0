"""Train a copy of the model for a few steps and watch how fast documents come back, against ones it never saw.

Of the forget and of the holdout documents one half is trained on and the other only watched. The attacker is that of
`metrics.relearning_attack`: AdamW at a constant rate on all weights. Of every document the score is the area under its
curve of log-likelihood, the mean over the measured steps after the first:

    area_i = mean over steps k > 0 of loglik_i(k)

    forget       half of the forget documents are trained on; the null learns half of the holdout documents instead
    retain text  retain documents are trained on: what comes back was never shown to the attacker
    holdout text half of the holdout documents are trained on, and the null are the other half

A document that comes back faster than one that was never seen is learned was hidden. `trained` are the documents of the
half that was trained on, `watched` those of the other half.
"""

from collections.abc import Sequence

from torch import nn

from moe_unlearn.audit.attack import Attack, Outcome, Sides, Target, Values, Variant, mean, reading
from moe_unlearn.data import Example
from moe_unlearn.metrics.relearning import relearning_attack
from moe_unlearn.metrics.scoring import token_scores
from moe_unlearn.metrics.workers import check_whole

_MEASURES = 4  # how often along an attack, beside its beginning


def _run(target: Target) -> Outcome:
    check_whole(target.model, "the attack by relearning")
    rows = target.rows
    of_forget = _Curve(target, rows["forget"][::2], ("forget", "retain"))
    of_holdout = _Curve(target, rows["holdout"][::2], ("forget", "holdout"))
    of_retain = _Curve(target, rows["retain"], ("forget", "retain", "holdout"))
    halves = {"trained": slice(0, None, 2), "watched": slice(1, None, 2)}
    variants = {}
    for name, half in halves.items():
        sides = {
            "forget": of_forget.areas("forget")[half],
            "retain": of_forget.areas("retain"),
            "holdout": of_holdout.areas("holdout")[half],
        }
        variants[f"forget, {name}"] = Variant(f"relearning half of the documents: those {name}", {"loglik": sides})
    variants["retain text"] = Variant("training on retain text", {"loglik": of_retain.sides()})
    sides = {"forget": of_holdout.areas("forget"), "holdout": of_holdout.areas("holdout")[halves["watched"]]}
    variants["holdout text"] = Variant("training on unseen text of the kind", {"loglik": sides})
    curves = {
        "forget documents, half of them trained on": of_forget.means("forget"),
        "unseen documents, half of them trained on": of_holdout.means("holdout"),
        "forget documents, retain text trained on": of_retain.means("forget"),
        "unseen documents, retain text trained on": of_retain.means("holdout"),
    }
    return Outcome(variants, {"curves": curves})


class _Curve:
    """The log-likelihoods of the documents of some sides along one attack."""

    def __init__(self, target: Target, trained: Sequence[Example], sides: Sequence[str]):
        self.values: dict[str, list[Values]] = {side: [] for side in sides}
        settings = target.settings

        def measure(attacked: nn.Module) -> dict[str, float]:
            for side, values in self.values.items():
                scored = token_scores(attacked, target.rows[side], batch_size=target.batch_size, pad_id=target.pad_id)
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


ATTACK = Attack(
    "relearning",
    "Relearning",
    "A copy is trained for a few steps: hidden documents come back faster than unseen ones are learned.",
    _run,
)
