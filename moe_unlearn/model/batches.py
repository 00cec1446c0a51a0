"""Defines and checks what a batch may hold, and unpacks packed rows into one row for each example.

    input_ids, attention_mask, labels       [B, S], as in transformers: a token is attended where the mask is not 0, and
                                            a label of -100 carries no loss
    position_ids                            [B, S], or [1, S] for all rows; they are passed to the model
    index                                   [B], the number that identifies each row in the caches of `prepare`
    packing                                 [B], the tokens of a row that this row may share with others in the model's
                                            calls; without it each row is one of the call (`model.packing`)
    state_mask                              bool [B, S], the hidden states that RMU steers and keeps; padding has none
    token_weights, ref_logprobs [B, S], ref_hidden_states [B, S, H]      replace prepared ones

A label is what the attended token before predicts. Where there is none, as at the first token of a row or of a packed
example, a label means nothing: it carries no loss, and its token counts as one without a label (`predicted`).

The first four keys and `index`, with `idk_` before them, describe the companion of each row, a refusal, an alternate
answer or, for `level`, an unseen text: the one whose `idk_index` is the row's `index` (its place, if rows have none),
or without `idk_index` the one in the row's place.

All of these are tensors; `max_length_q` and `max_length_k` of packed rows are numbers. A key with None counts as not
given. Any other tensor is an error: a model might read it, so that leaving it out in silence would change the forward
pass.

With an `attention_mask`, `position_ids` only say where tokens stand, as in transformers (except its flash attention,
which takes a single row without padding for packed if its positions start again). Without an `attention_mask`, a token
whose position does not follow that of the token before begins another example of a packed row. The offsets
`cu_seq_lens_q` and `cu_seq_lens_k`, and `seq_idx`, also mark where examples begin. The step computes with each example
in a row of its own (`padded`): then no model mixes examples, whatever its attention, and sequence losses and row caches
can tell them apart. That takes the time and memory of padded rows.

Sources: transformers' masks and its `DataCollatorWithFlattening`, whose keys these are; the rest is our specification.
"""

import warnings
from collections.abc import Mapping
from numbers import Number

import torch
from torch import Tensor, nn

from moe_unlearn.config import Recipe
from moe_unlearn.ops.token_loss import IGNORED

Batch = dict[str, Tensor]
#: the number of units that a mean loss divides by, for each unit (positions of a side, or its sequences)
Sizes = Mapping[str, float]

INPUTS = ("input_ids", "attention_mask", "position_ids")  # the arguments of a model
ROW = (*INPUTS, "labels")
_OF_ROWS = ("index", "packing")
_GIVEN = ("state_mask", "token_weights", "ref_logprobs", "ref_hidden_states")
_OFFSETS = ("cu_seq_lens_q", "cu_seq_lens_k")
_LONGEST = ("max_length_q", "max_length_k")  # plain numbers
_PACKED = (*_OFFSETS, *_LONGEST, "seq_idx")
_REFUSAL = "idk_"
_NUMBERS = (*_LONGEST, *(f"{_REFUSAL}{key}" for key in _LONGEST))
KNOWN = (*ROW, *_OF_ROWS, *_GIVEN, *_PACKED, *(f"{_REFUSAL}{key}" for key in (*ROW, "index", *_PACKED)))


def beside(batch: Mapping[str, Tensor], model: nn.Module) -> Batch:
    """Return the batch on the device of the model's first weight, where its input goes."""
    device = next(model.parameters()).device
    return {key: value.to(device) for key, value in batch.items()}


def checked(batch: Batch, side: str) -> Batch:
    """Check the tensors of `batch` and return them, packed rows `padded`; a checked batch comes back unchanged.

    `side`, forget or retain, is named in the errors: TypeError for what is no mapping; ValueError for an unknown tensor
    and a known key that is none (a list, an array), for shapes that do not fit together, for a batch without rows, for
    refusals whose index is not that of the rows, and as `padded` raises.
    """
    if not isinstance(batch, Mapping):
        raise TypeError(
            f"the {side} batch must be a mapping of tensors, as a collator makes; got {type(batch).__name__}"
        )
    unknown = [str(key) for key, value in batch.items() if isinstance(value, Tensor) and key not in KNOWN]
    if unknown:
        raise ValueError(
            f"the {side} batch has {', '.join(unknown)}, which nothing here reads; known are {', '.join(KNOWN)}: "
            "take out what is not for the model"
        )
    given = {key: value for key, value in batch.items() if key in KNOWN + _NUMBERS and value is not None}
    for key, value in given.items():
        if not isinstance(value, Number | Tensor if key in _NUMBERS else Tensor):
            expected = "a number" if key in _NUMBERS else f"a tensor (torch.as_tensor({key}))"
            raise ValueError(f"the {side} batch: {key} must be {expected}; got {type(value).__name__}")
    refused = {key.removeprefix(_REFUSAL): given.pop(key) for key in list(given) if key.startswith(_REFUSAL)}
    rows = _checked(given, f"the {side} batch")
    if not refused:
        return rows
    refused = _checked(refused, f"the {side} batch of refusals", _REFUSAL)
    if len(refused["input_ids"]) != len(rows["input_ids"]):
        raise ValueError(
            f"the {side} batch has {len(rows['input_ids'])} rows and {len(refused['input_ids'])} refusals; expected "
            "one for each row"
        )
    if "index" in refused:
        order = _paired(rows, refused["index"], side)
        refused = {key: value[order] for key, value in refused.items()}
    return rows | {f"{_REFUSAL}{key}": refused[key] for key in ROW if key in refused}


def inputs(batch: Batch) -> Batch:
    """Return the arguments with which a model is called for a padded batch."""
    attention_mask(batch)
    return {key: batch[key] for key in INPUTS if key in batch}


def attention_mask(batch: Batch) -> Tensor:
    """Return the mask [B, S] of a padded batch; ValueError for a packed one."""
    if "attention_mask" not in batch:
        raise ValueError(
            "expected padded rows, with an attention_mask; `batches.padded` makes them of packed ones. Got "
            f"{_listed(batch)}"
        )
    return batch["attention_mask"]


def attended_mask(batch: Batch) -> Tensor:
    """Return the tokens of a padded batch that a model attends to, bool [B, S]: where the attention mask is not 0."""
    return attention_mask(batch).bool()


def take(batch: Batch, rows: list[int] | Tensor) -> Batch:
    """Return some rows of a padded batch: model inputs, labels and `packing` only."""
    return {key: batch[key][rows] for key in (*ROW, "packing") if key in batch}


def stack(parts: list[Batch]) -> tuple[Batch, list[slice]]:
    """Join the rows of all parts into one call of a model, padded on the right to the longest.

    Returns the arguments of the call, with the `packing` that all parts allow, and the slice of rows of each part.
    """
    length = max(part["input_ids"].shape[1] for part in parts)
    calls = [inputs(part) for part in parts]
    if any("position_ids" in call for call in calls):
        # transformers' default
        calls = [{"position_ids": _following(call["input_ids"]), **call} for call in calls]
    stacked = {
        key: torch.cat([torch.nn.functional.pad(call[key], (0, length - call[key].shape[1])) for call in calls])
        for key in calls[0]
    }
    if all("packing" in part for part in parts):
        stacked["packing"] = torch.cat([part["packing"] for part in parts])
    ends = torch.tensor([len(part["input_ids"]) for part in parts]).cumsum(0).tolist()
    return stacked, [slice(start, end) for start, end in zip([0, *ends], ends, strict=False)]


def padded(batch: Batch, what: str = "the batch") -> Batch:
    """Put each example of a packed batch into a row of its own, padded on the right; return other batches unchanged.

    An example keeps its first label, which nothing predicts. `index` has one number for each token [B, S] or for each
    example. An example with a negative index is padding and is left out; without an index [B, S], an example without
    a label is left out too, since it looks like padding, with a warning: in rows of their own such examples count as
    sequences in NPO, SimNPO and DPO, and their tokens in SEUF's anchor and the load-balancing loss.

    Raises ValueError unless positions, offsets and `seq_idx`, as far as they are given, begin examples at the same
    tokens: positions start at 0, offsets belong to one row, rise from 0 to its end and are the same in both keys.
    Raises it also for an attention mask that leaves tokens out, a `max_length` below the longest example, and an
    `index` that does not name each example once.
    """
    if not _is_packed(batch):
        return batch
    shape = batch["input_ids"].shape
    read, begins = _beginnings(batch, shape, what)
    starts = begins.flatten().nonzero().flatten()
    lengths = torch.cat([starts[1:], starts.new_tensor([begins.numel()])]) - starts
    example = begins.flatten().cumsum(0) - 1
    if "index" in read:
        index = read["index"].flatten()
        if not torch.equal(index, index[starts][example]):
            raise ValueError(f"{what}: index must be the same for all tokens of a packed example")
        real = index[starts] >= 0
    else:
        real = torch.bincount(example[read["labels"].flatten() != IGNORED], minlength=len(starts)) > 0
        if real.any() and not real.all():
            warnings.warn(
                f"{what}: examples of packed rows that carry no label are taken for padding and left out; where they "
                "are examples, give index [B, S], each token's example (-1 for padding)",
                stacklevel=2,
            )
    starts, lengths = starts[real], lengths[real]
    if not len(starts):
        raise ValueError(f"{what} has no rows: none of its packed examples has a label")
    if "index" in batch and "index" not in read and batch["index"].shape != starts.shape:
        raise ValueError(
            f"{what}: index must be [B, S] = {list(shape)} or one number for each of {len(starts)} packed examples; "
            f"got {list(batch['index'].shape)}"
        )
    longest = int(lengths.max())
    for key in _LONGEST:
        if key in batch and batch[key] < longest:
            raise ValueError(f"{what}: {key} is {batch[key]}, but an example has {longest} tokens")
    columns = torch.arange(longest)
    kept = columns < lengths[:, None]
    source = torch.where(kept, starts[:, None] + columns, 0)
    device = batch["input_ids"].device
    kept, source, starts = kept.to(device), source.to(device), starts.to(device)
    out = {"attention_mask": kept.long()}
    for key in ("input_ids", "labels", *_GIVEN):
        if key in batch:
            rows = batch[key].flatten(0, 1)[source]
            away = ~kept.view(*kept.shape, *[1] * (rows.dim() - 2))
            out[key] = rows.masked_fill(away, IGNORED if key == "labels" else 0)
    if "index" in batch:
        out["index"] = batch["index"].flatten()[starts] if "index" in read else batch["index"]
    return out


def _checked(batch: Batch, what: str, prefix: str = "") -> Batch:
    """Check one side's rows, or its refusals, whose keys in the caller's batch begin with `prefix`."""
    for key in ("input_ids", "labels"):
        _require(key, batch, what, prefix)
    _check_kinds(batch, what, prefix)
    shape = batch["input_ids"].shape
    for key in (*ROW, "seq_idx", *_GIVEN):
        if key not in batch:
            continue
        got = batch[key].shape
        as_rows = got[:2] == shape if key in _GIVEN else got == shape
        for_all = key == "position_ids" and got == (1, *shape[1:])
        if len(shape) != 2 or not (as_rows or for_all):
            raise ValueError(f"{what}: {prefix}{key} must be [B, S] = {list(shape)}; got {list(got)}")
    rows = padded(batch, what)
    _require("attention_mask", rows, what, prefix)
    if len(rows["input_ids"]) == 0:
        raise ValueError(f"{what} has no rows")
    count = rows["input_ids"].shape[:1]
    for key in _OF_ROWS:
        if key in rows and rows[key].shape != count:
            raise ValueError(f"{what}: {prefix}{key} must be [B] = {list(count)}; got {list(rows[key].shape)}")
    rows = {key: value for key, value in rows.items() if key not in _PACKED}
    if "position_ids" in rows:
        rows["position_ids"] = rows["position_ids"].expand(shape)
    return rows


def _check_kinds(batch: Batch, what: str, prefix: str) -> None:
    """Raise ValueError for a dtype that does not fit the key, and for tensors that are sparse or on several devices."""
    device = batch["input_ids"].device
    for key, value in batch.items():
        if key in _NUMBERS:
            continue
        fits, expected = not value.is_complex(), "bool, integers or floating point"
        if key == "state_mask":
            fits, expected = value.dtype == torch.bool, "bool (state_mask.bool())"
        elif key in _GIVEN:
            fits, expected = value.is_floating_point(), "floating point"
        elif key != "attention_mask":
            fits, expected = value.dtype in (torch.int32, torch.int64), f"int64 ({prefix}{key}.long())"
        if not fits:
            raise ValueError(f"{what}: {prefix}{key} must be {expected}; got {value.dtype}")
        if value.layout != torch.strided or value.device != device or value.is_meta:
            raise ValueError(
                f"{what}: {prefix}{key} must be dense and on {device}, as input_ids; got {value.layout}, {value.device}"
            )


def _paired(rows: Batch, index: Tensor, side: str) -> list[int]:
    """Return the place of each row's refusal among refusals with this `index` [B]; ValueError if they do not match."""
    own = rows["index"].tolist() if "index" in rows else list(range(len(rows["input_ids"])))
    theirs = index.tolist()
    if sorted(own) != sorted(theirs):
        what = "the rows of index" if "index" in rows else "the rows, which have no index, by their places"
        raise ValueError(f"the {side} batch: idk_index must name {what}, {own}; got {theirs}")
    # an index that comes twice names one row, whose refusals may stand in either order
    places: dict[int, list[int]] = {}
    for place, number in enumerate(theirs):
        places.setdefault(number, []).append(place)
    return [places[number].pop(0) for number in own]


def _require(key: str, batch: Batch, what: str, prefix: str) -> None:
    if key not in batch:
        raise ValueError(f"{what} has no '{prefix}{key}'; got {_listed(batch, prefix)}")


def _listed(batch: Batch, prefix: str = "") -> str:
    return ", ".join(f"{prefix}{key}" for key in batch) or "nothing"


def _following(ids: Tensor) -> Tensor:
    """Return the positions [B, S] of rows without gaps."""
    return torch.arange(ids.shape[1], device=ids.device).expand(ids.shape)


def _is_packed(batch: Batch) -> bool:
    told = any(key in batch for key in (*_OFFSETS, "seq_idx"))
    return told or ("position_ids" in batch and "attention_mask" not in batch)


def _beginnings(batch: Batch, shape: torch.Size, what: str) -> tuple[dict[str, Tensor], Tensor]:
    """Return a packed batch's tensors on the CPU, int64 [B, S], and where its examples begin, bool [B, S]."""
    names = [key for key in ("labels", "attention_mask", "position_ids", "seq_idx", "index") if key in batch]
    names = [key for key in names if key != "index" or batch[key].shape == shape]
    # stacked, so that a batch on a GPU is read in one transfer
    read = dict(zip(names, torch.stack([batch[key].expand(shape).long() for key in names]).cpu(), strict=True))
    if "attention_mask" in read and not read["attention_mask"].all():
        raise ValueError(f"{what}: attention_mask leaves out tokens of packed rows; expected ones, or no mask")
    found = {}
    for key in ("position_ids", "seq_idx"):
        if key in read:
            apart = read[key].diff(dim=1) != (1 if key == "position_ids" else 0)
            found[key] = torch.nn.functional.pad(apart, (1, 0), value=True)
    for key in _OFFSETS:
        if key in batch:
            found[key] = _from_offsets(batch[key].tolist(), shape, f"{what}: {key}")
    (first, begins), *others = found.items()
    for key, other in others:
        if not torch.equal(begins, other):
            row, column = (begins != other).nonzero()[0].tolist()
            raise ValueError(f"{what}: {first} and {key} do not part row {row} at the same tokens (first at {column})")
    if "position_ids" in read and (where := begins & (read["position_ids"] != 0)).any():
        row, column = where.nonzero()[0].tolist()
        raise ValueError(
            f"{what}: position_ids of a packed row must be 0 where an example begins; got "
            f"{int(read['position_ids'][row, column])} at row {row}, token {column} (a row that is one example with "
            "positions of its own needs an attention_mask)"
        )
    return read, begins


def _from_offsets(offsets: list[int], shape: torch.Size, name: str) -> Tensor:
    rows, length = shape
    rising = all(a < b for a, b in zip(offsets, offsets[1:], strict=False))
    if rows != 1 or not rising or offsets[:1] != [0] or offsets[-1] != length:
        raise ValueError(
            f"{name} must rise from 0 to the length of the one row that it is of, {length}; got {offsets} for "
            f"{rows} row{'s' if rows > 1 else ''}"
        )
    begins = torch.zeros(shape, dtype=torch.bool)
    begins[0, offsets[:-1]] = True
    return begins


def refusal(batch: Batch) -> Batch:
    """Return the refusals of a batch, or what else goes with its rows, as a batch of their own."""
    missing = [k for k in ("idk_input_ids", "idk_attention_mask", "idk_labels") if k not in batch]
    if missing:
        raise ValueError(
            f"a forget.objective with refusals (idk_dpo, idk_nll) or unseen texts (level) needs the batch keys "
            f"{', '.join(missing)}"
        )
    rows = {k: batch[f"idk_{k}"] for k in ROW if f"idk_{k}" in batch}
    return rows | {key: batch[key] for key in _OF_ROWS if key in batch}


def forgotten(recipe: Recipe, batch: Batch) -> Batch:
    """Return the rows that carry the forget loss.

    `idk_nll` takes the refusals; `ceu` drops the first labels of each row that are `predicted`.
    """
    if recipe.forget.objective == "ceu":
        counted = predicted(batch)
        first = counted & (counted.cumsum(1) <= recipe.forget.ignore_first_n_answer_tokens)
        return {**batch, "labels": batch["labels"].masked_fill(first, IGNORED)}
    return refusal(batch) if recipe.forget.objective == "idk_nll" else batch


def target_mask(batch: Batch) -> Tensor:
    """Return the positions that carry a loss, bool [B, S]: attended, with a label at the next position.

    The last position never carries one.
    """
    attended = attended_mask(batch)
    mask = torch.zeros_like(attended)
    mask[:, :-1] = attended[:, :-1] & (batch["labels"][:, 1:] != IGNORED)
    return mask


def predicted(batch: Batch) -> Tensor:
    """Return the tokens whose label counts, bool [B, S]: those one behind `target_mask`, so never a row's first."""
    return torch.nn.functional.pad(target_mask(batch)[:, :-1], (1, 0))


def state_mask(batch: Batch) -> Tensor:
    """Return the positions whose hidden states count, bool [B, S].

    They are the attended tokens of the batch's `state_mask` or, without one, those with a label that is `predicted`.
    """
    given = batch.get("state_mask")
    return attended_mask(batch) & (predicted(batch) if given is None else given)
