"""Continue prompts by transformers' own `generate`, greedily or by samples that no batch changes.

Rows of several lengths go together in batches, and all ranks of torch.distributed share the rows (`workers`).
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from moe_unlearn.data import generator
from moe_unlearn.metrics.scoring import check_rows, evaluating
from moe_unlearn.metrics.workers import everywhere, share
from moe_unlearn.model.saving import has_adapters
from moe_unlearn.ranks import local


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

    Raises ValueError on an empty prompt, or one that with `new_tokens` exceeds the model's context, and for a model
    without `generate`.
    """
    return _continued(model, prompts, new_tokens, lambda rows: [], batch_size, pad_id, stop)


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

    def drawn(rows: Sequence[int]) -> list[LogitsProcessor]:
        return [_Drawn([torch.rand(new_tokens, generator=generator(seed, row)) for row in rows], temperature)]

    return _continued(model, prompts, new_tokens, drawn, batch_size, pad_id, stop)


class _Drawn(LogitsProcessor):
    """Leaves of each row's tokens the one at its drawn point, one point a token, on the line of all shares."""

    def __init__(self, points: Sequence[Tensor], temperature: float):
        self._points = iter(torch.stack([*points]).double().unbind(1))
        self._temperature = temperature

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        below = (scores.float() / self._temperature).softmax(-1).double().cumsum(-1)
        point = next(self._points).to(scores.device)[:, None]
        # take the first token whose cumulative share exceeds the drawn point, so never one of probability 0
        ids = torch.searchsorted(below, point * below[:, -1:], right=True)
        ids = ids.clamp_max(scores.shape[-1] - 1)  # NaN logits have no shares
        return torch.full_like(scores, -torch.inf).scatter(1, ids, 0.0)


class _AllEnded(StoppingCriteria):
    """Ends all rows together when each has had a token in `stop`, on all ranks where they share weights out."""

    def __init__(self, model: nn.Module, rows: int, stop: Collection[int]):
        device = next(model.parameters()).device
        self._stops = torch.tensor(sorted(stop), dtype=torch.int64, device=device)
        self._ended = torch.zeros(rows, dtype=torch.bool, device=device)
        self._finished = everywhere(model)

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Any:
        self._ended |= torch.isin(input_ids[:, -1], self._stops)
        return torch.full_like(self._ended, self._finished(self._ended))


def _continued(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    new_tokens: int,
    processors: Callable[[Sequence[int]], list[LogitsProcessor]],
    batch_size: int,
    pad_id: int,
    stop: Collection[int],
) -> list[list[int]]:
    """Return the continuations of all prompts; `processors` are those of the prompts of these numbers."""
    check_rows(model, prompts, "prompt", new_tokens)
    stop = frozenset(stop)
    if not new_tokens:
        return [[] for _ in prompts]
    plain = local(model)
    settings = GenerationConfig(max_new_tokens=new_tokens, do_sample=False, num_beams=1, pad_token_id=pad_id)

    def compute(rows: list[tuple[int, Sequence[int]]]) -> list:
        numbers, own = zip(*rows, strict=True)
        ended = _AllEnded(plain, len(own), stop)
        decoded = _generated(generating, own, settings, LogitsProcessorList(processors(numbers)), ended)
        ends = [next((at for at, token in enumerate(tokens) if token in stop), len(tokens)) for tokens in decoded]
        return [tokens[:end] for tokens, end in zip(decoded, ends, strict=True)]

    with evaluating(plain), _alone(plain, settings) as generating:
        rows = list(enumerate(prompts))
        return share(plain, rows, compute, batch_size=batch_size, key=lambda row: -len(row[1]), what="generation")


def _generated(
    model: Any,
    prompts: Sequence[Sequence[int]],
    settings: GenerationConfig,
    processors: LogitsProcessorList,
    ended: StoppingCriteria,
) -> list[list[int]]:
    """Return what `generate` puts behind each of the prompts, which it gets padded on the left."""
    longest, device = max(map(len, prompts)), next(model.parameters()).device
    made: Tensor = model.generate(
        torch.tensor([[settings.pad_token_id] * (longest - len(p)) + list(p) for p in prompts], device=device),
        attention_mask=torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=device),
        generation_config=settings,
        logits_processor=processors,
        stopping_criteria=StoppingCriteriaList([ended]),
        synced_gpus=False,  # what has ended ends on all ranks
    )
    return made[:, longest:].tolist()


@contextmanager
def _alone(model: nn.Module, settings: GenerationConfig) -> Iterator[Any]:
    """Yield what generates, to which `settings` apply alone: it fills those left open from the model's own.

    Raises ValueError for a model without `generate`.
    """
    own: Any = model.get_base_model() if has_adapters(model) else model  # type: ignore[operator]  # PEFT has no types
    if not hasattr(own, "generate"):
        raise ValueError(f"expected a model with `generate`, as those of transformers; got {type(own).__name__}")
    former, own.generation_config = own.generation_config, settings
    try:
        yield own
    finally:
        own.generation_config = former
