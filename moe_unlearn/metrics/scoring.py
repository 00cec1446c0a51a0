"""Compute what every metric reads: the log-probability of each token, and greedy or sampled continuations.

Both process batches of rows of several lengths, and all ranks of torch.distributed share the rows (`workers`).
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moe_unlearn.data import Example, batches, generator
from moe_unlearn.lazy import each
from moe_unlearn.metrics.workers import everywhere, share
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
    _check(model, each(examples, lambda e: e.input_ids), "example")

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


def greedy(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    new_tokens: int,
    *,
    batch_size: int = 128,
    pad_id: int = 0,
    stop: Collection[int] = (),
) -> list[list[int]]:
    """Return the most likely tokens after each prompt, one after the other, in order of the prompts.

    A continuation has `new_tokens` tokens, or those before its first token in `stop`. Nothing else ends or
    changes it: the model's `generation_config` (penalties, forced tokens) is not read. Prompts of several
    lengths are padded on the left and decoded together with a key-value cache. A row gets the tokens it would get
    alone, up to ties within the rounding of the model's dtype.

    Raises ValueError on an empty prompt, or one that with `new_tokens` exceeds the model's context.
    """

    def choices(rows: list[int], device: torch.device) -> Callable[[Tensor, int], Tensor]:
        return lambda logits, step: logits.argmax(-1, keepdim=True)

    return _continued(model, prompts, new_tokens, choices, batch_size, pad_id, stop)


def sampled(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    new_tokens: int,
    *,
    seed: int = 0,
    temperature: float = 1.0,
    batch_size: int = 128,
    pad_id: int = 0,
    stop: Collection[int] = (),
) -> list[list[int]]:
    """Return tokens after each prompt drawn from softmax(logits / temperature); all else is as in `greedy`.

    The tokens for prompt i depend on `seed`, i and the model alone, whatever the batches and ranks, up to the
    rounding of the model's dtype. Raises ValueError also for a temperature that is not above 0.
    """
    if not temperature > 0:
        raise ValueError(f"expected a temperature above 0; got {temperature}")

    def choices(rows: list[int], device: torch.device) -> Callable[[Tensor, int], Tensor]:
        drawn = torch.stack([torch.rand(new_tokens, generator=generator(seed, row)) for row in rows])
        drawn = drawn.to(device, torch.float64)

        def choose(logits: Tensor, step: int) -> Tensor:
            below = (logits.float() / temperature).softmax(-1).double().cumsum(-1)
            # take the first token whose cumulative share exceeds the drawn point, so never one of probability 0
            ids = torch.searchsorted(below, drawn[:, step, None] * below[:, -1:], right=True)
            return ids.clamp_max(logits.shape[-1] - 1)  # NaN logits have no shares

        return choose

    return _continued(model, prompts, new_tokens, choices, batch_size, pad_id, stop)


def _continued(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    new_tokens: int,
    choices: Callable,
    batch_size: int,
    pad_id: int,
    stop: Iterable[int],
) -> list[list]:
    """Return the continuations of all prompts.

    `choices`, given the numbers of a batch's prompts, returns a function that chooses ids [B, 1] from logits [B, V].
    """
    _check(model, prompts, "prompt", new_tokens)
    stop = frozenset(stop)

    def compute(rows: list[tuple[int, Sequence[int]]]) -> list:
        numbers, own = zip(*rows, strict=True)
        decoded = _decode(plain, own, new_tokens, choices(numbers, device), pad_id, stop)
        ends = [next((at for at, token in enumerate(tokens) if token in stop), len(tokens)) for tokens in decoded]
        return [tokens[:end] for tokens, end in zip(decoded, ends, strict=True)]

    plain = local(model)
    device = next(plain.parameters()).device
    with evaluating(plain):
        if not new_tokens:
            return [[] for _ in prompts]
        rows = list(enumerate(prompts))
        return share(plain, rows, compute, batch_size=batch_size, key=lambda row: -len(row[1]), what="generation")


def _decode(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    new_tokens: int,
    choose: Callable,
    pad_id: int,
    stop: frozenset[int],
) -> list[list[int]]:
    longest, device = max(map(len, prompts)), next(model.parameters()).device
    ids = torch.tensor([[pad_id] * (longest - len(p)) + list(p) for p in prompts], device=device)
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=device)
    # a token's position counts from the start of its own row, without the padding to its left
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    stops = torch.tensor(sorted(stop), dtype=torch.int64, device=device)
    ended = torch.zeros(len(prompts), dtype=torch.bool, device=device)
    finished = everywhere(model)  # ranks that share weights out end together
    cache: Any = None
    generated: list[Tensor] = []
    while True:
        out = model(input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True)
        ids, cache = choose(out.logits[:, -1], len(generated)), out.past_key_values
        generated.append(ids)
        ended |= torch.isin(ids[:, 0], stops)
        if len(generated) == new_tokens or finished(ended):
            return torch.cat(generated, 1).tolist()
        mask = torch.cat([mask, torch.ones_like(ids)], 1)
        positions = positions[:, -1:] + 1


def _check(model: nn.Module, rows: Sequence[Sequence[int]], what: str, more: int = 0) -> None:
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
