"""Ask the model as it is: what it says, what it would fill in, and whether it shows which documents it was trained on.

`verbmem`, `knowmem` and `extraction` are those of `metrics.memorization`, one number a document; `loss`, `min_k`,
`min_k_plus_plus`, `zlib` and `reference` are the scores of `metrics.attacks` with the sign turned, so that a member
scores high. `loss` is the log-likelihood once more, compared by ranks instead of by means.
"""

from collections.abc import Callable, Sequence
from contextlib import suppress

from torch import Tensor

from moe_unlearn.audit.attack import Attack, Outcome, Sides, Target, Values, Variant, by_score, reading
from moe_unlearn.data import Example
from moe_unlearn.metrics.attacks import compressed
from moe_unlearn.metrics.memorization import NothingToMeasureError, extraction_each, knowmem_each, verbmem_each
from moe_unlearn.metrics.privacy import lowest, min_k


def _run(target: Target) -> Outcome:
    sides = {side: _side(target, side, rows) for side, rows in target.rows.items()}
    return Outcome({"as it is": Variant("asked as it is", by_score(sides))})


def _side(target: Target, side: str, rows: Sequence[Example]) -> dict[str, Values]:
    settings, tokenizer = target.settings, target.tokenizer
    scored = target.scored(rows, standard=True)
    found = reading(scored)
    loglik = found["loglik"]
    prompt = {"prompt_tokens": settings.prompt_tokens}
    measures: dict[str, Callable[[], Values]] = {
        "verbmem": lambda: verbmem_each(target.model, tokenizer, rows, new_tokens=settings.new_tokens, **prompt),
        "knowmem": lambda: knowmem_each(tokenizer, rows, scored),
        "extraction": lambda: extraction_each(target.model, rows, **prompt),
    }
    for name, measure in measures.items():
        with suppress(NothingToMeasureError):  # documents too short for it
            found[name] = measure()
    if side == "retain":
        return found
    standard: list[Tensor] = [own.standard[own.counted] for own in scored if own.standard is not None]
    sizes = [compressed(row, tokenizer) for row in rows]
    found["loss"] = loglik
    found["min_k"] = min_k(scored).tolist()
    found["min_k_plus_plus"] = lowest(standard, 0.4).tolist()
    found["zlib"] = [None if own is None else own / size for own, size in zip(loglik, sizes, strict=True)]
    if target.reference is not None:
        found["reference"] = against({side: loglik}, target.reference)[side]
    return found


def against(loglik: Sides, reference: Sides) -> Sides:
    """Return log-likelihoods minus those of a retrained model, the score `reference`."""
    return {
        side: [None if a is None or b is None else a - b for a, b in zip(own, reference[side], strict=True)]
        for side, own in loglik.items()
    }


ATTACK = Attack(
    "plain",
    "Asked as it is",
    "The model continues and fills in the documents, and membership attacks ask which of them it was trained on.",
    _run,
    whole=False,
)
