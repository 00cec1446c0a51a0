"""Stores the state of several ranks for torch.distributed.checkpoint, without its pickled metadata.

torch's planners say which rank writes and which reads which part of which tensor; here are the planners for `Slices`,
a writer, of one safetensors file for each rank, and a reader. The index says where each part is (`index`).

torch exchanges plans between ranks as pickles, over its own connections; no file holds one.
"""

import dataclasses
import hashlib
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.distributed.checkpoint.default_planner import (
    DefaultLoadPlanner,
    DefaultSavePlanner,
    create_default_global_save_plan,
)
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorProperties, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, SavePlan, SavePlanner, WriteItem
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.distributed.checkpoint.utils import find_tensor_shard
from torch.distributed.tensor import DTensor
from torch.futures import Future

from moe_unlearn.checkpoint import tree
from moe_unlearn.checkpoint.index import STATE, Index, check_chunks, chunks_of
from moe_unlearn.checkpoint.manifest import SHARDED, CheckpointError, describe, verify_files, write_manifest
from moe_unlearn.checkpoint.slices import Slices
from moe_unlearn.checkpoint.tensor_file import DTYPES, Kind, bytes_of, dtype_name, kind_of, tensor_file
from moe_unlearn.files import write_text


class SaveSlices(DefaultSavePlanner):
    """A planner of tensors, DTensors and `Slices`; the plans also carry the tree and what each rank knows of a leaf.

    Equal parts are written once. Raises ValueError, naming the tensor, if ranks differ in its dtype, shape or, for a
    plain tensor, bits, or if the parts of one that is no `Slices` are not the whole: torch would write one of them.
    """

    def __init__(self, parts: Any):
        super().__init__(flatten_state_dict=False)
        self._parts = parts

    def create_local_plan(self) -> SavePlan:
        """Plan what this rank would write."""
        facts = {name: _facts(tree.readable(name), value) for name, value in self.state_dict.items()}
        return dataclasses.replace(super().create_local_plan(), planner_data=(self._parts, facts))

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        """Share the parts out over the ranks, and merge their trees and what they know of leaves."""
        facts: dict[str, tuple] = {}
        for name, known in (item for plan in all_plans for item in plan.planner_data[1].items()):
            if facts.setdefault(name, known) != known:
                raise ValueError(
                    f"expected {tree.readable(name)} to be the same tensor on all ranks; they differ: if each has "
                    "its own, pass a DTensor, or Slices with the ids of the whole"
                )
        plans, metadata = create_default_global_save_plan(self._dedup_save_plans(all_plans))
        for name, known in facts.items():
            stored = metadata.state_dict_metadata.get(name)  # none of Slices without a slice
            chunks = stored.chunks if isinstance(stored, TensorStorageMetadata) else []
            check_chunks(tree.readable(name), known[1], known[2] == "slices", chunks)
        merged = tree.merged([plan.planner_data[0] for plan in all_plans])
        return plans, dataclasses.replace(metadata, planner_data=(merged, facts))

    def lookup_object(self, index: MetadataIndex) -> Any:
        """Return the part of a value that an index names."""
        return find_tensor_shard(self.state_dict[index.fqn], index)


class LoadSlices(DefaultLoadPlanner):
    """A planner that fills tensors, DTensors and `Slices` that are there."""

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False)

    def set_up_planner(self, state_dict: dict, metadata: Metadata | None = None, is_coordinator: bool = False) -> None:
        """Take what is to be filled."""
        self.state_dict, self.metadata, self.is_coordinator = state_dict, metadata, is_coordinator

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        """Return the part of a value that an index names."""
        return find_tensor_shard(self.state_dict[index.fqn], index)


@dataclasses.dataclass(frozen=True)
class _Place:
    """Where a chunk was written, and the file's size and digest."""

    file: str
    name: str
    sizes: tuple[int, ...]
    described: tuple[int, str]


class Writer(StorageWriter):
    """Writes one file for each rank, and on the first rank the tree, the index and the manifest.

    `unfinished` is the folder on the first rank, None on others; `commit` gives it its name, as the last act.
    """

    def __init__(self, unfinished: Path | None, step: int | None, commit: Callable[[], None]):
        self._unfinished, self._step, self._commit = unfinished, step, commit

    def reset(self, checkpoint_id: object = None) -> None:
        """Do nothing: a writer writes once."""

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Do nothing: the folder is there."""

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """Return the plan."""
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Tell each rank the folder and the name of its file."""
        return [
            # the trees need not travel back
            dataclasses.replace(plan, storage_data=(self._unfinished, f"rank-{i:05d}.safetensors"), planner_data=None)
            for i, plan in enumerate(plans)
        ]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write this rank's file, one tensor at a time; none without a tensor."""
        folder, file = plan.storage_data
        if not folder.is_dir():
            raise CheckpointError(f"{folder}: all ranks must see one file system; this one does not see the folder")
        items: dict[str, WriteItem] = {}
        for item in plan.items:
            assert item.index.offset is not None
            items[f"{item.index.fqn}@{','.join(map(str, item.index.offset))}"] = item
        kinds = {name: _kind(item) for name, item in items.items()}
        results = []
        if items:
            with tensor_file(folder / file, kinds) as write:
                for name, item in items.items():
                    part = planner.resolve_data(item)
                    assert isinstance(part, Tensor)
                    write(name, part)
            described = describe(folder / file)
            facts = described["size"], described["sha256"]
            for name, item in items.items():
                place = _Place(file, name, kinds[name].shape, facts)
                results.append(WriteResult(item.index, kinds[name].size, place))
        done: Future[list[WriteResult]] = Future()
        done.set_result(results)
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Write what describes the ranks' files, and commit."""
        assert self._unfinished is not None
        parts, facts = metadata.planner_data
        index: Index = {
            name: {"dtype": dtype, "shape": shape, "slices": kind == "slices", "chunks": []}
            for name, (dtype, shape, kind, *_) in facts.items()
        }
        files: dict[str, dict] = {}
        for result in (result for written in results for result in written):
            place: _Place = result.storage_data
            chunk = {"file": place.file, "name": place.name, "offsets": result.index.offset, "sizes": place.sizes}
            index[result.index.fqn]["chunks"].append(chunk)
            files[place.file] = dict(zip(("size", "sha256"), place.described, strict=True))
        write_text(self._unfinished / STATE, json.dumps({"tree": parts, "index": index}))
        files[STATE] = describe(self._unfinished / STATE)
        verify_files(self._unfinished, files, digests_of=())  # what other machines wrote must be seen here
        write_manifest(self._unfinished, {"format": SHARDED, "step": self._step}, files)
        self._commit()

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: object) -> bool:
        """Return False: torch never chooses this writer by itself."""
        return False


class Reader(StorageReader):
    """Reads what an index describes, of a folder whose files have been verified."""

    def __init__(self, folder: Path, index: Index):
        self._folder, self._index = folder, index
        self._places = {
            MetadataIndex(name, chunk["offsets"]): (chunk["file"], chunk["name"])
            for name, entry in index.items()
            for chunk in entry["chunks"]
        }

    def reset(self, checkpoint_id: object = None) -> None:
        """Do nothing: a reader reads once."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Return the index as torch has it."""
        return Metadata(
            {
                name: TensorStorageMetadata(
                    TensorProperties(dtype=DTYPES[entry["dtype"]]), torch.Size(entry["shape"]), chunks_of(entry)
                )
                for name, entry in self._index.items()
            }
        )

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Do nothing: the files are there."""

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """Return the plan."""
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """Return the plans."""
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Copy the parts of the plan to where they belong, file by file; raise CheckpointError naming the file."""
        by_file: dict[str, list] = {}
        for item in plan.items:
            file, name = self._places[item.storage_index]
            by_file.setdefault(file, []).append((name, item))
        for file, items in by_file.items():
            try:
                with safe_open(self._folder / file, framework="pt") as opened:
                    for name, item in items:
                        box = tuple(slice(a, a + n) for a, n in zip(item.storage_offsets, item.lengths, strict=True))
                        part = opened.get_slice(name)[box] if box else opened.get_tensor(name)
                        target = planner.resolve_tensor(item).detach()
                        if kind_of(part) != kind_of(target):
                            raise CheckpointError(f"{name}: expected {kind_of(target)}; got {kind_of(part)}")
                        target.copy_(part)
                        planner.commit_tensor(item, target)
            except (OSError, SafetensorError, CheckpointError) as error:
                raise CheckpointError(f"{self._folder / file}: {error}") from error
        done: Future[None] = Future()
        done.set_result(None)
        return done

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: object) -> bool:
        """Return False: torch never chooses this reader by itself."""
        return False


def _facts(name: str, value: Any) -> tuple:
    """Return what all ranks that have a leaf must agree on."""
    kind = value.kind if isinstance(value, Slices) else kind_of(value)
    known = dtype_name(kind.dtype, name), kind.shape
    if isinstance(value, Slices):
        return *known, "slices"
    if isinstance(value, DTensor):
        _check_contiguous(value)
        return *known, "sharded"
    return *known, "plain", hashlib.sha256(bytes_of(value).data).hexdigest()


def _check_contiguous(value: DTensor) -> None:
    """Raise ValueError for a tensor of which a rank holds rows that are not one block: torch would misplace them.

    Two dimensions of the mesh may shard the same dimension if the first is strided by the ranks of those after it.
    """
    for i, placement in enumerate(value.placements):
        stride = getattr(placement, "split_factor", None)
        after = [
            value.device_mesh.size(j)
            for j, other in enumerate(value.placements)
            if j > i and getattr(other, "dim", None) == getattr(placement, "dim", None)
        ]
        if stride is not None and stride != math.prod(after):
            raise ValueError(f"expected each rank to hold one block of a tensor; got placements {value.placements}")


def _kind(item: WriteItem) -> Kind:
    assert item.tensor_data is not None
    return Kind(item.tensor_data.properties.dtype, tuple(item.tensor_data.chunk.sizes))
