"""The reference that a recipe compares with, its identity, and its values on disk; there is never a second model.

The reference is the model as it was at `prepare`, adapters included, both PEFT's and those of transformers'
`add_adapter`: a trained adapter is part of what is to be unlearned. A recipe with `reference: base` compares with the
base model instead. Its weights do not change, so its values can be computed at any time, with the adapters disabled.

On disk, values are kept in one folder for each kind, model and settings (`open_store`), and inside it by the content of
a row (`rows.RowStore`). A model is identified by the content of everything that its forward pass reads; see
`model_digest`.
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moe_unlearn import native
from moe_unlearn.backend import ENVIRONMENT_VARIABLE
from moe_unlearn.model.batches import Batch, attended_mask, take
from moe_unlearn.model.digest import tensor_digest
from moe_unlearn.model.head import unwrapped
from moe_unlearn.ops import Head
from moe_unlearn.prepare.rows import Row, RowCache, RowStore, StoredRow, content_keys, rows_of
from moe_unlearn.progress import Bar
from moe_unlearn.ranks import Ranks, gather, gathered, local, shared_work, together
from moe_unlearn.sharding import is_sharded, whole
from moe_unlearn.wagle import Resume

# entries of an adapter's config that tell its origin, not its function
_NOT_THE_ADAPTER = ("auto_mapping", "base_model_name_or_path", "inference_mode", "peft_version", "revision")
# entries of a model's config that its class and tensors tell already, or that saving changes. Entries that begin with
# an underscore are left out too: they choose how the same function is computed (attention, experts) or tell its origin
_NOT_THE_FUNCTION = ("architectures", "dtype")


def reference_model(model: nn.Module, kind: str) -> contextlib.AbstractContextManager[None]:
    """Make the model compute a recipe's `reference` inside: "prepared" as it is, "base" without its adapters."""
    return base_model(model) if kind == "base" else contextlib.nullcontext()


@contextlib.contextmanager
def base_model(model: nn.Module) -> Iterator[None]:
    """Disable the model's adapters inside, so that it computes what its base model does; without any, do nothing.

    Afterwards, and after an exception, adapters and `requires_grad` flags are as before. Raises ValueError if
    adapters are merged into the weights, which then are not the base model's.
    """
    wrapper: Any = local(model)
    layers = _adapters(wrapper)
    merged = [name for name, layer in layers.items() if getattr(layer, "merged", False) is True]
    if merged:
        raise ValueError(f"adapters are merged into the weights of {merged[0]}: call unmerge_adapter() first")
    flags = [(p, p.requires_grad) for p in wrapper.parameters()] if layers else []
    try:
        with wrapper.disable_adapter() if hasattr(wrapper, "disable_adapter") else _disabled(layers.values()):
            yield
    finally:
        # PEFT lets every active adapter train when it enables them again
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


def model_digest(model: nn.Module, *, adapters: bool = True, ranks: Ranks | None = None) -> str:
    """Return the SHA-256 over class, config, and the name, dtype, shape and bytes of every parameter and buffer.

    Adapters enter with their tensors, configs and states (active, merged, disabled, scaling); with `adapters=False`
    a model has the digest of its base model. Weights are read in place, 16 MiB at a time in each of torch's threads,
    and never copied as a whole; sharded ones are put together one at a time, for which all ranks have to call this.
    `ranks`, whose models are equal, read as many weights each, and all get the digest.
    Measured on one thread of a CPU with SHA instructions: 0.6 to 0.9 s per GiB, 1.4 s where strides force copies.
    Raises ValueError for weights that are not in memory (meta device).
    """
    base = unwrapped(model)
    tensors = dict(_tensors(base, adapters=adapters))
    absent = [name for name, tensor in tensors.items() if tensor.is_meta]
    if absent:
        raise ValueError(f"a cache of references needs the model's weights; {absent[0]} is on the meta device")
    unique = list(dict.fromkeys(tensors.values()))  # tied weights are read once
    digests = dict(zip(unique, _digests(unique, ranks), strict=True))
    config = {
        key: value
        for key, value in base.config.to_dict().items()
        if not key.startswith("_") and key not in _NOT_THE_FUNCTION
    }
    content: list = [
        f"{type(base).__module__}.{type(base).__qualname__}",
        config,
        {name: digests[tensor] for name, tensor in tensors.items()},
    ]
    if adapters and (layers := _adapters(base)):
        content.append([_adapter_configs(model), {name: _adapter_state(layer) for name, layer in layers.items()}])
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=_plain).encode()).hexdigest()


def _digests(tensors: list[Tensor], ranks: Ranks | None) -> list[str]:
    """Return the `tensor_digest` of each tensor; `ranks` take turns at them."""
    mine = range(len(tensors)) if ranks is None else range(ranks.rank, len(tensors), ranks.count)
    if any(map(is_sharded, tensors)):
        own = []
        for i, tensor in enumerate(tensors):
            values = whole(tensor)  # all ranks put the same tensor together at one time
            if i in mine:
                own.append(tensor_digest(values))
            del values
    else:
        with ThreadPoolExecutor(torch.get_num_threads()) as pool:
            own = list(pool.map(tensor_digest, [tensors[i] for i in mine]))
    if ranks is None:
        return own
    parts = gather(own, ranks.group)
    return [parts[i % ranks.count][i // ranks.count] for i in range(len(tensors))]


def head_to_keep(trained: Head, reference: Head) -> tuple[Tensor | None, Tensor | None]:
    """Return the reference's weight and bias, each None where the model's own is and stays the same tensor.

    An adapter may bring its own head, which is not the reference's even where it is frozen.
    """
    pairs = (trained.weight, reference.weight), (trained.bias, reference.bias)
    weight, bias = (
        theirs if own is not theirs or (own is not None and own.requires_grad) else None for own, theirs in pairs
    )
    return weight, bias


def autocast_dtypes() -> list[str]:
    """Return the dtypes in which autocast has the model compute here, a part of its function that no weight shows."""
    return [str(torch.get_autocast_dtype(d)) for d in ("cpu", "cuda") if torch.is_autocast_enabled(d)]


def resume_of(model: nn.Module, folder: Path, *, alone: bool = False, ranks: Ranks | None = None) -> Resume:
    """Return what lets a WAGLE mask of a model go on where the same code on the same machine was interrupted."""

    def digest() -> str:
        config = unwrapped(model).config
        chosen = [getattr(config, f"_{part}_implementation", None) for part in ("experts", "attn")]
        used = [torch.__version__, torch.get_num_threads(), native.report(), os.environ.get(ENVIRONMENT_VARIABLE)]
        return json.dumps([model_digest(model, ranks=ranks), *autocast_dtypes(), *chosen, *used])

    return Resume(folder, digest, alone=alone)


def open_store(
    folder: Path, named: Path, kind: str, digest: str, dtype: torch.dtype, shape: tuple[int, ...], **settings: int | str
) -> RowStore:
    """Open the store in `folder` for one kind of value, the model with this digest and these settings.

    A state names the folder `named`, the same on all ranks.
    """
    identity = json.dumps([digest, str(dtype), list(shape), autocast_dtypes(), settings], sort_keys=True)
    name = f"{kind}-{hashlib.sha256(identity.encode()).hexdigest()[:32]}"
    return RowStore(folder / name, dtype, shape, named / name)


def fill(
    cache: RowCache,
    batches: Sequence[Batch],
    compute: Callable[[Batch], Tensor],
    store: RowStore | None = None,
    ranks: Ranks | None = None,
) -> RowCache:
    """Fill `cache` with the values of all rows of `batches`, read from `store` or computed and stored; return it.

    `compute(batch)` returns values [B, S, ...]. It sees each content once, in its batch without the rows that
    are known already. Its values are on disk before the next batch; with a `store` they stay there, and the cache knows
    their places. With `ranks`, all of which have a store or none, rows that any rank has stored are read, and the ranks
    share the batches: each computes some, and all get all rows, on disk in each rank's store. An error of one rank's
    disk ends all, with a RankError on the others.
    """
    keys = [content_keys(batch) for batch in batches]
    lengths: dict[str, int] = {}
    for batch, own in zip(batches, keys, strict=True):
        lengths.update(zip(own, attended_mask(batch).sum(1).tolist(), strict=True))
    found: dict[str, Row] = {} if store is None else {**_found(store, lengths, ranks)}
    missing, known = [], set(found)
    for number, own in enumerate(keys):
        if rows := {key: i for i, key in enumerate(own) if key not in known}:
            missing.append((number, rows))
            known |= rows.keys()
    sizes = [[lengths[key] for key in rows] for _, rows in missing]

    def computed(i: int) -> Tensor:
        number, rows = missing[i]
        part = take(batches[number], list(rows.values()))
        return torch.cat(rows_of(part, compute(part)))

    with Bar("preparation", len(missing)) as bar:
        for i, values in shared_work(computed, [*map(sum, sizes)], ranks):
            new = dict(zip(missing[i][1], values.split(sizes[i]), strict=True))
            found |= new if store is None else _stored(store, new, ranks)
            bar.advance()
    for batch, own in zip(batches, keys, strict=True):
        cache.put_rows(batch, [found[key] for key in own])
    return cache


def _found(store: RowStore, lengths: dict[str, int], ranks: Ranks | None) -> dict[str, StoredRow]:
    """Return the rows that this rank has in its store, which gets those that any other has in its own."""
    if ranks is None:
        return store.read(lengths)
    own, told = gathered(partial(store.read, lengths), _by_file, ranks.group)
    held = [{key for keys in files for key in keys} for files in told]
    everywhere = set.intersection(*held)
    for rank, files in enumerate(told):
        for keys in files:
            # those that an earlier rank has told to all are everywhere
            if not (keys := [key for key in keys if key not in everywhere]):
                continue
            everywhere.update(keys)
            sizes = [lengths[key] for key in keys]
            rows = torch.empty(sum(sizes), *store.shape, dtype=store.dtype)
            if rank == ranks.rank:
                torch.cat([own[key].read() for key in keys], out=rows)
            ranks.share_([rows], rank)
            new = {key: row for key, row in zip(keys, rows.split(sizes), strict=True) if key not in own}
            own |= together(partial(store.add, new), ranks.group)
    return own


def _by_file(rows: dict[str, StoredRow]) -> list[list[str]]:
    """Return the keys of rows, those of one file together."""
    files: dict[Path, list[str]] = {}
    for key, row in rows.items():
        files.setdefault(row.path, []).append(key)
    return list(files.values())


def _stored(store: RowStore, rows: dict[str, Tensor], ranks: Ranks | None) -> dict[str, StoredRow]:
    """Store rows on every rank's disk, which may be one for all; an error of one ends all."""
    if ranks is None:
        return store.write(rows)
    written = together(lambda: store.write(rows) if ranks.first else {}, ranks.group)
    return together(lambda: written if ranks.first else store.add(rows), ranks.group)


def _adapters(model: nn.Module) -> dict[str, nn.Module]:
    """Return the layers by which PEFT has wrapped layers of a model, by name."""
    return {name: module for name, module in model.named_modules() if hasattr(module, "adapter_layer_names")}


@contextlib.contextmanager
def _disabled(layers: Iterable[nn.Module]) -> Iterator[None]:
    enabled: list[Any] = [layer for layer in layers if not layer.disable_adapters]
    try:
        for layer in enabled:
            layer.enable_adapters(enabled=False)
        yield
    finally:
        for layer in enabled:
            layer.enable_adapters(enabled=True)


def _adapter_configs(model: nn.Module) -> dict[str, dict]:
    model = local(model)
    # transformers keeps the configs of its own adapters on the causal language model
    configs = getattr(model, "peft_config", None) or getattr(unwrapped(model), "peft_config", {})
    return {
        name: {key: value for key, value in config.to_dict().items() if key not in _NOT_THE_ADAPTER}
        for name, config in configs.items()
    }


def _adapter_state(layer: nn.Module) -> list:
    """Return what determines the function of an adapter's layer besides its tensors."""
    attributes = ("active_adapters", "merged_adapters", "disable_adapters", "scaling")
    return [type(layer).__qualname__, *(getattr(layer, name, None) for name in attributes)]


def _plain(value: object) -> object:
    """Convert a value for which JSON has no form; sets are sorted, so that the process's hash seed plays no role."""
    return sorted(value, key=str) if isinstance(value, set | frozenset) else repr(value)


def _tensors(module: nn.Module, prefix: str = "", *, adapters: bool) -> Iterator[tuple[str, Tensor]]:
    """Yield parameters and buffers by name; without adapters, those of the wrapped layers, named as unwrapped."""
    if not adapters and hasattr(module, "adapter_layer_names"):
        for name in ("base_layer", "original_module"):
            if name in module._modules:
                yield from _tensors(module.get_submodule(name), prefix, adapters=False)
                return
    for name, tensor in (*module._parameters.items(), *module._buffers.items()):
        if tensor is not None:
            yield prefix + name, tensor
    for name, child in module.named_children():
        yield from _tensors(child, f"{prefix}{name}.", adapters=adapters)
