"""Pack several examples into one row, each computed as if it were alone, for models where that is exact.

A packed row carries `position_ids` that start again at 0 with each example, and no `attention_mask`. From this
transformers recognises packing and keeps attention within an example: sdpa, eager and flex attention by a mask,
flash attention by lengths, for one row only. State-space and linear-attention layers carry their state on
from one example to the next unless told otherwise, so `check_packing` measures whether examples stay apart.
"""

import bisect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from moe_unlearn.data.tokenize import Example
from moe_unlearn.model.head import decoder_of, unwrapped
from moe_unlearn.ops.token_loss import IGNORED
from moe_unlearn.sharding import as_forward

PROBE = (5, 4, 3)  # lengths of the examples in the row that `check_packing` runs


def pack(lengths: Sequence[int], max_length: int) -> list[list[int]]:
    """Choose which examples share a row of at most `max_length` tokens; return the rows as positions in `lengths`.

    Every position stands in exactly one row. The choice is best fit, longest first, ties by position, hence
    deterministic. Raises ValueError for a length above `max_length` or below 1.
    """
    for i, length in enumerate(lengths):
        if not 1 <= length <= max_length:
            raise ValueError(f"example {i}: expected 1 to {max_length} tokens; got {length}")
    rows: list[list[int]] = []
    free: list[tuple[int, int]] = []  # sorted pairs (room, row): the first with enough room fits best
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        place = bisect.bisect_left(free, (lengths[i], -1))
        if place < len(free):
            room, row = free.pop(place)
        else:
            room, row = max_length, len(rows)
            rows.append([])
        rows[row].append(i)
        if room > lengths[i]:
            bisect.insort(free, (room - lengths[i], row))
    return rows


def packed_batches(
    examples: Sequence[Example], max_length: int, *, model: nn.Module, batch_size: int = 1, pad_id: int = 0
) -> list[dict[str, Tensor]]:
    """Return batches of packed rows for `model`: `input_ids`, `labels`, `position_ids`, `index` [B, S], all int64.

    `index` is each token's position in `examples`, -1 for padding. The first token of an example carries no loss, as
    in a row of its own. Padding carries none either and counts as an example by itself in attention. Losses that sum
    over a sequence (NPO, SimNPO, DPO) take `index`, not the row, to identify the sequence; without `index`, examples
    that carry no label cannot be told from padding and are left out. `UnlearnStep` also takes
    these batches and computes each example in a row of its own (`batches.padded`). That is right for any model but
    costs padding, which `batches` of examples of similar length keep small.

    Raises ValueError where packing is not exact (`check_packing`; flash attention with batch_size above 1), or
    as `pack` does.
    """
    if batch_size < 1:
        raise ValueError(f"expected a batch_size of at least 1; got {batch_size}")
    if not examples:
        raise ValueError("expected at least one example to make batches of; got none")
    check_packing(model)
    if batch_size > 1 and "flash" in _attention(model):
        raise ValueError(
            f"{_attention(model)} keeps packed examples apart in a batch of one row only; got batch_size {batch_size}: "
            "use 1 (with a longer max_length), sdpa, or padding (`batches`)"
        )
    rows = pack([len(e) for e in examples], max_length)
    return [_collate(examples, rows[i : i + batch_size], pad_id) for i in range(0, len(rows), batch_size)]


def check_packing(model: nn.Module, *, rows: int = 1) -> None:
    """Raise ValueError unless `model` keeps packed examples apart, in a batch of that many rows.

    The last example of a packed row must not depend on the others: where attention is masked, the gradient of its
    final hidden states with respect to the others' embeddings is exactly 0. The check runs 12 tokens of each row
    forward and backward; weights, gradients and mode stay as they are. All ranks of a sharded model make it together.
    """
    causal: Any = unwrapped(model)
    embedding = causal.get_input_embeddings()
    device = embedding.weight.device
    positions = torch.cat([torch.arange(n, device=device) for n in PROBE]).expand(rows, -1)
    ids = torch.arange(positions.shape[1], device=device).expand(rows, -1) % embedding.num_embeddings

    def run() -> tuple[Tensor, Tensor]:
        embedded = embedding(ids).detach().requires_grad_()
        return embedded, decoder_of(model)(
            inputs_embeds=embedded, position_ids=positions, attention_mask=None, use_cache=False
        ).last_hidden_state

    with torch.enable_grad():
        embedded, states = as_forward(model, run)()
        last = states[:, -PROBE[-1] :]
        # one fixed direction, because a sum of normalised states may have no gradient at all
        direction = torch.linspace(-1, 1, last.numel(), device=device, dtype=last.dtype).view_as(last)
        (gradient,) = torch.autograd.grad((last * direction).sum(), embedded)
    foreign, own = gradient[:, : -PROBE[-1]], gradient[:, -PROBE[-1] :]
    if not own.any():
        raise ValueError(f"{type(model).__name__}: packing cannot be checked, its gradient is 0; use padding")
    if foreign.any():
        raise ValueError(
            f"{type(model).__name__} with {_attention(model) or 'its'} attention mixes packed examples: the last of a "
            f"row depends on those before it (gradient {foreign.abs().max():.1e} instead of 0); use padding "
            "(`batches`; data.packing=false in a recipe)"
        )


def _attention(model: nn.Module) -> str:
    return str(getattr(model.config, "_attn_implementation", None) or "")


def _collate(examples: Sequence[Example], rows: Sequence[Sequence[int]], pad_id: int) -> dict[str, Tensor]:
    width = max(sum(len(examples[i]) for i in row) for row in rows)
    names = ("input_ids", "labels", "position_ids", "index")
    batch: dict[str, list[list[int]]] = {name: [] for name in names}
    for row in rows:
        tokens = [
            (token, IGNORED if position == 0 else label, position, i)
            for i in row
            for position, (token, label) in enumerate(zip(examples[i].input_ids, examples[i].labels, strict=True))
        ]
        tokens += [(pad_id, IGNORED, position, -1) for position in range(width - len(tokens))]
        for name, values in zip(names, zip(*tokens, strict=True), strict=True):
            batch[name].append(list(values))
    return {name: torch.tensor(values, dtype=torch.int64) for name, values in batch.items()}
