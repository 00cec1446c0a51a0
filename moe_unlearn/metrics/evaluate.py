"""All metrics of one model as one flat dictionary."""

from collections.abc import Sequence
from contextlib import suppress
from functools import partial

from torch import nn

from moe_unlearn.data import Example, pad_token_id
from moe_unlearn.metrics.memorization import NothingToMeasureError, extraction, knowmem, verbmem
from moe_unlearn.metrics.privacy import membership_auc, nll, privleak
from moe_unlearn.metrics.scoring import token_scores


def evaluate(
    model: nn.Module,
    tokenizer,
    *,
    forget: Sequence[Example],
    retain: Sequence[Example],
    holdout: Sequence[Example] = (),
    reference: nn.Module | None = None,
    reference_auc: float | None = None,
    prompt_tokens: int = 16,
    new_tokens: int = 128,
    batch_size: int = 32,
) -> dict[str, float]:
    """Metrics of a causal language model; the suffix says on which documents: `_f` forget, `_r` retain.

    `verbmem_*`, `knowmem_*` (cloze), `extraction_*` are fractions in [0, 1] (MUSE prints the first two times
    100); `nll_*` are nats a token. With `holdout` documents there are also `nll_h` and `minkauc`, and with
    the retrained model as `reference`, or its `minkauc` as `reference_auc`, also `privleak` in percent; keys
    that cannot be computed are absent.

    The model is left as found: evaluation mode is restored, nothing keeps a gradient.
    """
    pad = pad_token_id(tokenizer)
    results, scored = {}, {}
    for suffix, examples in (("f", forget), ("r", retain)):
        scored[suffix] = scores = token_scores(model, examples, batch_size=batch_size, pad_id=pad)
        results[f"nll_{suffix}"] = nll(scores)
        verbatim = partial(verbmem, model, tokenizer, examples, prompt_tokens=prompt_tokens, new_tokens=new_tokens)
        cloze = partial(knowmem, model, tokenizer, examples, scores=scores)
        extracted = partial(extraction, model, examples, prompt_tokens=prompt_tokens)
        for name, metric in (("verbmem", verbatim), ("knowmem", cloze), ("extraction", extracted)):
            with suppress(NothingToMeasureError):  # documents too short for it
                results[f"{name}_{suffix}"] = metric()
    if holdout:
        unseen = token_scores(model, holdout, batch_size=batch_size, pad_id=pad)
        results["nll_h"] = nll(unseen)
        results["minkauc"] = membership_auc(scored["f"], unseen)
        if reference_auc is None and reference is not None:
            known, new = (
                token_scores(reference, examples, batch_size=batch_size, pad_id=pad) for examples in (forget, holdout)
            )
            reference_auc = membership_auc(known, new)
        if reference_auc is not None:
            results["privleak"] = privleak(results["minkauc"], reference_auc)
    return results
