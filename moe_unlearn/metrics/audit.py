"""Audit the side effects of unlearning: changed routing, gibberish, and how fast it is undone."""

from collections.abc import Sequence

from torch import nn
from transformers import PreTrainedTokenizerBase as Tokenizer

from moe_unlearn.data import Example, pad_token_id, special_ids
from moe_unlearn.metrics.gibberish import gibberish_rate
from moe_unlearn.metrics.memorization import with_prompts
from moe_unlearn.metrics.privacy import nll
from moe_unlearn.metrics.relearning import relearning_attack
from moe_unlearn.metrics.routing import routes, routing_change
from moe_unlearn.metrics.scoring import greedy, token_scores


def audit(
    model: nn.Module,
    tokenizer: Tokenizer,
    *,
    forget: Sequence[Example],
    retain: Sequence[Example],
    before: nn.Module | None = None,
    relearn_steps: int = 0,
    relearn_lr: float = 1e-4,
    prompt_tokens: int = 16,
    new_tokens: int = 64,
    batch_size: int = 8,
    seed: int = 0,
) -> dict[str, float | dict | None]:
    """Compare `model` with `before`, the model as it was, and attack it for `relearn_steps` steps; return the findings.

    With `before` there are `routing_kl`, `routing_l1` and `routing_overlap` on the retain documents
    (`RoutingChange`), and `gibberish`, the rate in [0, 1] among greedy continuations of the forget documents'
    prompts, judged against those of `before` (`gibberish_rate`). With `relearn_steps` there is `relearning`, the
    curve of the forget NLL as a dictionary. With both there is `relearn_half`, the first measured step at which half
    of the rise in forget NLL is undone, or None if it never is. Prompts are those of `verbmem`, and so are the tokens
    that end an answer. The models are left as they were; deterministic given `seed`.

    Raises ValueError if neither is asked for, and as the four metrics do.
    """
    if before is None and not relearn_steps:
        raise ValueError("expected the model before, relearn_steps of at least 1, or both; got neither")
    pad = pad_token_id(tokenizer)
    found: dict[str, float | dict | None] = {}
    if before is not None:
        change = routing_change(*(routes(m, retain, batch_size=batch_size, pad_id=pad) for m in (before, model)))
        prompts = [prompt for _, _, prompt in with_prompts(forget, prompt_tokens)]
        stop = special_ids(tokenizer)
        typical, generated = (greedy(m, prompts, new_tokens, pad_id=pad, stop=stop) for m in (before, model))
        rate = gibberish_rate(before, prompts, generated, typical, batch_size=batch_size, pad_id=pad).rate
        found |= {**change.means(), "gibberish": rate}
    if relearn_steps:
        curve = relearning_attack(
            model, forget, steps=relearn_steps, lr=relearn_lr, batch_size=batch_size, pad_id=pad, seed=seed
        )
        found["relearning"] = curve.to_dict()
        if before is not None:
            known = nll(token_scores(before, forget, batch_size=batch_size, pad_id=pad))
            found["relearn_half"] = curve.steps_until("nll", (curve.values[0]["nll"] + known) / 2)
    return found
