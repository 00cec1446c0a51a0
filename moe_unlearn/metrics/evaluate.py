"""Compute all metrics of one model as one flat dictionary."""

from collections.abc import Collection, Sequence
from contextlib import suppress
from functools import partial

from torch import nn
from transformers import PreTrainedTokenizerBase as Tokenizer

from moe_unlearn.data import DocumentError, Example, pad_token_id
from moe_unlearn.metrics.intervals import interval
from moe_unlearn.metrics.left_out import keep
from moe_unlearn.metrics.memorization import NothingToMeasureError, extraction_each, knowmem_each, mean_of, verbmem_each
from moe_unlearn.metrics.privacy import membership_auc, nll, privleak
from moe_unlearn.metrics.results import report_left_out
from moe_unlearn.metrics.scoring import TokenScores, token_scores

NAMES = ("nll", "verbmem", "knowmem", "extraction", "minkauc", "privleak")


def evaluate(
    model: nn.Module,
    tokenizer: Tokenizer,
    *,
    forget: Sequence[Example],
    retain: Sequence[Example],
    seen: Sequence[Example] = (),
    holdout: Sequence[Example] = (),
    reference: nn.Module | None = None,
    reference_auc: float | None = None,
    prompt_tokens: int = 16,
    new_tokens: int = 128,
    batch_size: int = 32,
    only: Collection[str] = NAMES,
    intervals: bool = False,
) -> dict[str, float]:
    """Return metrics of a causal language model; the suffix names the documents: `_f` forget, `_r` retain.

    Where `retain` are rows that training did not see, `seen` may give those that it took: `_s`.

    `verbmem_*`, `knowmem_*` (cloze), `extraction_*` are fractions in [0, 1] (MUSE prints the first two times
    100); `nll_*` are nats a token. With `holdout` documents there are also `nll_h` and `minkauc`, and with
    the retrained model as `reference`, or its `minkauc` as `reference_auc`, also `privleak` in percent. Keys
    that cannot be computed are absent. Examples without a labelled token, such as a last piece of one token, are left
    out of `minkauc`; `minkauc_left_out` counts them and stderr names them. `only` chooses among `NAMES`, without
    suffix; privleak includes minkauc. With `intervals` every mean over documents KEY also has KEY_low and KEY_high, the
    ends of its 95 % interval (`intervals.interval`).

    The model is left as found: its mode is restored, and nothing keeps a gradient.
    """
    wanted = {*only, *(["minkauc"] if "privleak" in only else [])}
    pad = pad_token_id(tokenizer)
    results, scored = {}, {}
    each: dict[str, tuple[Sequence[float | None], Sequence[float] | None]] = {}
    for suffix, examples in (("f", forget), ("r", retain), *([("s", seen)] if seen else [])):
        if wanted & ({"nll", "knowmem", "minkauc"} if suffix == "f" else {"nll", "knowmem"}):
            scored[suffix] = token_scores(model, examples, batch_size=batch_size, pad_id=pad)
        if "nll" in wanted:
            results[f"nll_{suffix}"] = nll(scored[suffix])
            counts = [len(own.logprobs[own.counted]) for own in scored[suffix]]
            each_nll: list[float | None] = [
                nll([own]) if n else None for own, n in zip(scored[suffix], counts, strict=True)
            ]
            each[f"nll_{suffix}"] = (each_nll, counts)
        asked = {"prompt_tokens": prompt_tokens, "new_tokens": new_tokens}
        verbatim = partial(verbmem_each, model, tokenizer, examples, **asked)
        cloze = partial(knowmem_each, tokenizer, examples, scored.get(suffix, ()))
        extracted = partial(extraction_each, model, examples, prompt_tokens=prompt_tokens)
        for name, metric in (("verbmem", verbatim), ("knowmem", cloze), ("extraction", extracted)):
            if name in wanted:
                with suppress(NothingToMeasureError):  # documents too short for it
                    values = metric()
                    results[f"{name}_{suffix}"] = mean_of(values)
                    each[f"{name}_{suffix}"] = (values, None)
    if holdout and wanted & {"nll", "minkauc"}:
        unseen = token_scores(model, holdout, batch_size=batch_size, pad_id=pad)
        if "nll" in wanted:
            results["nll_h"] = nll(unseen)
        if "minkauc" in wanted:
            results["minkauc"], left_out = _min_k_auc(scored["f"], unseen)
            report_left_out(left_out)
            if left_out:
                results["minkauc_left_out"] = len(left_out)
        if "privleak" in wanted and reference_auc is None and reference is not None:
            reference_auc = min_k_auc(reference, tokenizer, forget, holdout, batch_size=batch_size)
        if "privleak" in wanted and reference_auc is not None:
            results["privleak"] = privleak(results["minkauc"], reference_auc)
    for key, (measured, weights) in each.items() if intervals else ():
        if ends := interval(measured, weights):
            results[f"{key}_low"], results[f"{key}_high"] = ends
    return results


def min_k_auc(
    model: nn.Module,
    tokenizer: Tokenizer,
    forget: Sequence[Example],
    holdout: Sequence[Example],
    *,
    batch_size: int = 32,
) -> float:
    """Return the `minkauc` of a model alone: of a retrained one it is the `reference_auc` of `evaluate`."""
    pad = pad_token_id(tokenizer)
    known, new = (token_scores(model, examples, batch_size=batch_size, pad_id=pad) for examples in (forget, holdout))
    return _min_k_auc(known, new)[0]


def _min_k_auc(forget: Sequence[TokenScores], holdout: Sequence[TokenScores]) -> tuple[float, list[dict]]:
    """Return `membership_auc` of the examples with a labelled token, and a record of each of the others."""
    sides = [keep(name, scores, _labelled) for name, scores in (("forget", forget), ("holdout", holdout))]
    return membership_auc(*(side.values for side in sides)), [record for side in sides for record in side.records]


def _labelled(score: TokenScores) -> TokenScores:
    if not score.counted.any():
        raise DocumentError("no token of the example carries a label that Min-40 % could count")
    return score
