"""What every metric reads: the log-probability of each token, and greedy continuations."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from moe_unlearn.data import Example, batches


@dataclass(frozen=True)
class TokenScores:
    """Teacher-forced scores of one example; entry i is about predicting `input_ids[i + 1]`.

    `logprobs` [S-1] float32 in nats, `correct` [S-1] bool (the token was the most likely one), `counted`
    [S-1] bool (the token carries a label).
    """

    logprobs: Tensor
    correct: Tensor
    counted: Tensor


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; every submodule's own mode is restored, whatever happens."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        for module, training in modes:
            module.training = training


def token_scores(
    model: nn.Module, examples: Sequence[Example], *, batch_size: int = 32, pad_id: int = 0
) -> list[TokenScores]:
    """Scores of every example, in order; one forward pass. Raises ValueError if there are no examples."""
    scores: list[TokenScores] = [None] * len(examples)
    # similar lengths together, so that little is padded
    by_length = sorted(range(len(examples)), key=lambda i: (len(examples[i]), i))
    device = next(model.parameters()).device
    with evaluating(model):
        for batch in batches([examples[i] for i in by_length], batch_size, pad_id=pad_id):
            ids, mask = batch["input_ids"].to(device), batch["attention_mask"].to(device)
            logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
            for row, position in enumerate(batch["index"].tolist()):
                example = examples[by_length[position]]
                predicted = logits[row, : len(example) - 1].float()
                target = ids[row, 1 : len(example)]
                chosen = predicted.gather(1, target[:, None])[:, 0]
                scores[by_length[position]] = TokenScores(
                    (chosen - predicted.logsumexp(1)).cpu(),
                    (predicted.argmax(1) == target).cpu(),
                    torch.tensor(example.labels[1:]) != -100,
                )
    return scores


def greedy(
    model: nn.Module, prompts: Sequence[Sequence[int]], new_tokens: int, *, batch_size: int = 128
) -> list[list[int]]:
    """The `new_tokens` most likely tokens after each prompt, one after the other, in order of the prompts.

    Prompts of one length are decoded together with a key-value cache and without padding. Nothing stops
    early: tokens after an end-of-sequence are the caller's to cut. Raises ValueError on an empty prompt.
    """
    if any(not prompt for prompt in prompts):
        raise ValueError("expected prompts of at least one token; got an empty one")
    by_length: dict[int, list[int]] = {}
    for i, prompt in enumerate(prompts):
        by_length.setdefault(len(prompt), []).append(i)
    groups = [rows[i : i + batch_size] for rows in by_length.values() for i in range(0, len(rows), batch_size)]
    device = next(model.parameters()).device
    continuations: list[list[int]] = [[] for _ in prompts]
    with evaluating(model):
        for rows in groups if new_tokens else []:
            ids = torch.tensor([list(prompts[i]) for i in rows], device=device)
            mask, cache, generated = torch.ones_like(ids), None, []
            while True:
                out = model(input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True)
                ids, cache = out.logits[:, -1:].argmax(-1), out.past_key_values
                generated.append(ids)
                if len(generated) == new_tokens:
                    break
                mask = torch.cat([mask, torch.ones_like(ids)], 1)
            for i, tokens in zip(rows, torch.cat(generated, 1).tolist(), strict=True):
                continuations[i] = tokens
    return continuations
