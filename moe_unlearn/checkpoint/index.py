"""Reads which part of which tensor is where in the files of a checkpoint, and checks that it can be.

A part, or chunk, is a box in a whole tensor; its place in a file is in the index, which is JSON:

    {name: {"dtype": "F32", "shape": [64, 24, 32], "slices": false,
            "chunks": [{"file": "rank-00000.safetensors", "name": "...", "offsets": [0, 0, 0], "sizes": [32, 24, 32]}]}}
"""

import dataclasses
import json
import math
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata

from moe_unlearn.checkpoint import tree
from moe_unlearn.checkpoint.manifest import FORMAT, CheckpointError
from moe_unlearn.checkpoint.tensor_file import DTYPES

STATE = "state.json"
Index = dict[str, dict[str, Any]]


def read_state(folder: Path, manifest: dict) -> tuple[Any, Index]:
    """Return the tree and the index of a verified checkpoint of either format.

    Raises CheckpointError if the index does not describe whole tensors in files of the manifest.
    """
    try:
        if manifest["format"] == FORMAT:
            return _of_one_process(folder, manifest)
        state = json.loads((folder / STATE).read_text(encoding="utf-8"))
        for name, entry in state["index"].items():
            check_chunks(tree.readable(name), entry["shape"], entry["slices"], chunks_of(entry))
            if entry["dtype"] not in DTYPES or any(chunk["file"] not in manifest["files"] for chunk in entry["chunks"]):
                raise ValueError(f"{tree.readable(name)}: its dtype or a file of it is not known")
        names: set[str] = set()
        tree.join(state["tree"], lambda name, _: names.add(name))
        if names != state["index"].keys():
            raise ValueError("its tree and its index are of other tensors")
        return state["tree"], state["index"]
    except (OSError, KeyError, TypeError, AttributeError, ValueError, RecursionError, SafetensorError) as error:
        raise CheckpointError(f"{folder}: no readable state: {error!r}") from error


def check_chunks(name: str, shape: Sequence[int], slices: bool, chunks: list[ChunkStorageMetadata]) -> None:
    """Raise ValueError, with `name`, unless the chunks of a tensor lie in it, are as many as it is, or are slices."""
    volume = 0
    for chunk in chunks:
        ends = [a + n for a, n in zip(chunk.offsets, chunk.sizes, strict=True)]
        if len(ends) != len(shape) or any(a < 0 or b > n for a, b, n in zip(chunk.offsets, ends, shape, strict=True)):
            raise ValueError(f"{name}: a part {chunk} is not in its shape {list(shape)}")
        if slices and list(chunk.sizes[1:]) != list(shape[1:]):
            raise ValueError(f"{name}: a part {chunk} is not of whole slices")
        volume += math.prod(chunk.sizes)
    runs = sorted((chunk.offsets[0], chunk.offsets[0] + chunk.sizes[0]) for chunk in chunks) if slices else []
    if any(stop > start for (_, stop), (start, _) in pairwise(runs)):
        raise ValueError(f"{name}: ranks have different runs of the same slices")
    if not slices and volume != math.prod(shape):
        raise ValueError(f"{name}: its parts have {volume} elements, its shape {list(shape)} has {math.prod(shape)}")


def chunks_of(entry: dict[str, Any]) -> list[ChunkStorageMetadata]:
    """Return the chunks of an entry of an index."""
    return [ChunkStorageMetadata(torch.Size(c["offsets"]), torch.Size(c["sizes"])) for c in entry["chunks"]]


@dataclasses.dataclass(frozen=True)
class _Stored:
    """A tensor in the file of a state of one process."""

    file: str
    name: str


def _of_one_process(folder: Path, manifest: dict) -> tuple[Any, Index]:
    """Return tree and index of the states that `states.commit` wrote: each tensor is one chunk."""
    index: Index = {}

    def read(state: str) -> Any:
        parts = json.loads((folder / f"{state}.json").read_text(encoding="utf-8"))
        return tree.join(parts, lambda name, _: _Stored(f"{state}.safetensors", name))

    def add(path: tree.Path, stored: _Stored) -> str:
        with safe_open(folder / stored.file, framework="pt") as opened:
            part = opened.get_slice(stored.name)
            shape = part.get_shape()
            chunk = {"file": stored.file, "name": stored.name, "offsets": [0] * len(shape), "sizes": shape}
            entry = {"dtype": part.get_dtype(), "shape": shape, "slices": False, "chunks": [chunk]}
        index[tree.name_of(path)] = entry
        return tree.name_of(path)

    return tree.split({state: read(state) for state in manifest["states"]}, add), index
