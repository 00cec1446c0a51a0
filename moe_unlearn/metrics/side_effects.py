"""Measure the side effects of unlearning: changed routing, gibberish, and how fast it is undone."""

from collections.abc import Sequence
from functools import cached_property

from torch import nn
from transformers import PreTrainedTokenizerBase as Tokenizer

from moe_unlearn.data import Example, pad_token_id, special_ids
from moe_unlearn.metrics.generation import greedy
from moe_unlearn.metrics.gibberish import gibberish_rate
from moe_unlearn.metrics.memorization import with_prompts
from moe_unlearn.metrics.privacy import nll
from moe_unlearn.metrics.relearning import RelearningCurve, relearning_attack
from moe_unlearn.metrics.routing import Routes, routes, routing_change
from moe_unlearn.metrics.scoring import token_scores


def side_effects(
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
    observed = SideEffects(
        tokenizer,
        forget=forget,
        retain=retain,
        relearn_steps=relearn_steps,
        relearn_lr=relearn_lr,
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        batch_size=batch_size,
        seed=seed,
    )
    observed.observe(model, compared=before is not None)
    return observed.findings(before)


class SideEffects:
    """`side_effects` of models that need not be in memory together: `observe` one, then compare it (`findings`)."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        forget: Sequence[Example],
        retain: Sequence[Example],
        relearn_steps: int = 0,
        relearn_lr: float = 1e-4,
        prompt_tokens: int = 16,
        new_tokens: int = 64,
        batch_size: int = 8,
        seed: int = 0,
    ):
        self.forget, self.retain, self.batch_size, self.seed = forget, retain, batch_size, seed
        self.relearn_steps, self.relearn_lr, self.new_tokens = relearn_steps, relearn_lr, new_tokens
        self._prompt_tokens = prompt_tokens
        self._pad, self._stop = pad_token_id(tokenizer), special_ids(tokenizer)
        self._after: tuple[Routes, list[list[int]]] | None = None
        self._curve: RelearningCurve | None = None

    @cached_property
    def _prompts(self) -> list[list[int]]:
        """Return the prompts of the forget documents, which an attack alone does not need."""
        return [prompt for _, _, prompt in with_prompts(self.forget, self._prompt_tokens)]

    def observe(self, model: nn.Module, *, compared: bool = True) -> None:
        """Take of the unlearned model all that is needed: the attack, and with `compared` routes and answers."""
        if compared:
            self._after = self._taken(model)
        if self.relearn_steps:
            self._curve = relearning_attack(
                model,
                self.forget,
                steps=self.relearn_steps,
                lr=self.relearn_lr,
                batch_size=self.batch_size,
                pad_id=self._pad,
                seed=self.seed,
            )

    def findings(self, before: nn.Module | None = None) -> dict[str, float | dict | None]:
        """Return what `side_effects` returns, compared with `before` if it is given."""
        found: dict[str, float | dict | None] = {}
        if before is not None:
            if self._after is None:
                raise ValueError("expected a model that was observed to be compared; observe(model) comes first")
            (routed, typical), (routed_after, generated) = self._taken(before), self._after
            rate = gibberish_rate(
                before, self._prompts, generated, typical, batch_size=self.batch_size, pad_id=self._pad
            ).rate
            found |= {**routing_change(routed, routed_after).means(), "gibberish": rate}
        if self._curve is not None:
            found["relearning"] = self._curve.to_dict()
            if before is not None:
                known = nll(token_scores(before, self.forget, batch_size=self.batch_size, pad_id=self._pad))
                found["relearn_half"] = self._curve.steps_until("nll", (self._curve.values[0]["nll"] + known) / 2)
        return found

    def _taken(self, model: nn.Module) -> tuple[Routes, list[list[int]]]:
        """Return the routes of the retain documents, and what the model says after the prompts."""
        routed = routes(model, self.retain, batch_size=self.batch_size, pad_id=self._pad)
        return routed, greedy(model, self._prompts, self.new_tokens, pad_id=self._pad, stop=self._stop)
