"""Compute what every metric reads, the log-probability of each token.

Rows of several lengths go together in batches, and all ranks of torch.distributed share the rows (`workers`).
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moe_unlearn.data import Example, batches
from moe_unlearn.lazy import each
from moe_unlearn.metrics.workers import share
from moe_unlearn.model.modes import evaluation_mode
from moe_unlearn.ranks import local, sharded
from moe_unlearn.sharding import reshard


@dataclass(frozen=True)
class TokenScores:
    """Teacher-forced scores of one example; entry i is about predicting `input_ids[i + 1]`.

    `logprobs` [S-1] float32 in nats, `correct` [S-1] bool (the token was the most likely one), `counted` [S-1] bool
    (the token carries a label). `standard` [S-1] float32, if asked for: (log p - mu) / sigma, where mu and sigma are
    mean and standard deviation of log p over the vocabulary weighted by p, with sigma^2 at least 1e-6.
    """

    logprobs: Tensor
    correct: Tensor
    counted: Tensor
    standard: Tensor | None = None


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Switch to evaluation mode without gradients inside, and restore every submodule's own mode, whatever happens."""
    # FSDP2 keeps what it makes in its first pass, and what inference mode has made could not be trained later
    with evaluation_mode(model), torch.no_grad() if sharded(model) else torch.inference_mode():
        try:
            yield
        finally:
            reshard(model)


def context_length(model: nn.Module) -> int | None:
    """Return how many tokens the model's positions reach (`max_position_embeddings`), None if it does not say."""
    config: Any = getattr(local(model), "config", None)
    if hasattr(config, "get_text_config"):
        config = config.get_text_config()
    length: int | None = getattr(config, "max_position_embeddings", None)
    return length


def token_scores(
    model: nn.Module, examples: Sequence[Example], *, batch_size: int = 32, pad_id: int = 0, standard: bool = False
) -> list[TokenScores]:
    """Return the scores of every example, in order, from one forward pass; `standard` fills that field too.

    Raises ValueError if there are no examples, or one is empty, longer than the model's context or has a token id that
    the model does not have.
    """
    if not examples:
        raise ValueError("expected at least one example to score; got none")
    check_rows(model, each(examples, lambda e: e.input_ids), "example")

    def compute(rows: list[Example]) -> list:
        scored: list = []
        (batch,) = batches(rows, len(rows), pad_id=pad_id)
        ids, mask = batch["input_ids"].to(device), batch["attention_mask"].to(device)
        logits = plain(input_ids=ids, attention_mask=mask, use_cache=False).logits
        for row, example in enumerate(rows):
            predicted, target = logits[row, : len(example) - 1].float(), ids[row, 1 : len(example)]
            chosen = predicted.gather(1, target[:, None])[:, 0]
            correct = predicted.argmax(1) == target
            logprobs = chosen - predicted.logsumexp(1)
            spread = _standard(predicted, logprobs).tolist() if standard else None
            scored.append([logprobs.tolist(), correct.tolist(), spread])
        return scored

    plain = local(model)
    device = next(plain.parameters()).device
    with evaluating(plain):
        # similar lengths go together, so that little is padded
        scored = share(plain, examples, compute, batch_size=batch_size, key=len)
    return [
        TokenScores(
            torch.tensor(logprobs, dtype=torch.float32),
            torch.tensor(correct, dtype=torch.bool),
            torch.tensor(example.labels[1:], dtype=torch.int64) != -100,
            None if spread is None else torch.tensor(spread, dtype=torch.float32),
        )
        for (logprobs, correct, spread), example in zip(scored, examples, strict=True)
    ]


def _standard(logits: Tensor, logprobs: Tensor) -> Tensor:
    every = logits.log_softmax(1)
    # a token of probability 0 must add 0, not 0 times minus infinity
    p, every = every.exp(), every.clamp_min(torch.finfo(every.dtype).min / 2)
    mean = (p * every).sum(1)
    # not E[x^2] - E[x]^2, which cancels where one token is nearly certain
    variance = (p * (every - mean[:, None]) ** 2).nan_to_num(0.0).sum(1)
    return (logprobs - mean) / variance.clamp_min(1e-6).sqrt()


def check_rows(model: nn.Module, rows: Sequence[Sequence[int]], what: str, more: int = 0) -> None:
    """Check that the model can take rows of token ids, each with `more` new ones behind it; ValueError otherwise."""
    context, embeddings = context_length(model), getattr(local(model), "get_input_embeddings", lambda: None)()
    known = getattr(embeddings, "num_embeddings", None)
    for number, ids in enumerate(rows):
        length = len(ids)
        if length and known is not None and max(ids) >= known:
            raise ValueError(
                f"{what} {number}: its token id {max(ids)} is none of the {known} of a {type(local(model)).__name__}: "
                "expected a model with the vocabulary of the tokenizer"
            )
        if not length:
            raise ValueError(f"{what} {number}: expected at least one token; got none")
        if context is not None and length + more > context:
            new = f" and {more} new ones" if more else ""
            raise ValueError(
                f"{what} {number}: its {length} tokens{new} exceed the model's context of {context}: encode texts with "
                "a smaller max_length (--max-length)"
            )
