"""Checkpoints of several ranks, that any number of ranks of any engine, or one process, goes on from.

    save(folder, tree)                          # every rank, with what it holds
    tree = load(folder, into)                   # every rank, with what it wants filled; everything without `into`

A tree is nested dicts, lists and tuples of JSON values and of

    DTensor     a tensor that FSDP2 or expert parallelism shares out: each rank writes its part
    Slices      what a rank holds of a state that exists for some slices of a whole, such as the moments of the experts
                that it trains; ids are of the whole
    Tensor      the same on all ranks, which is checked; one of them writes it

Dicts may have other keys on other ranks. A leaf of `into` is a tensor or a DTensor of the shape and dtype of what was
saved, whole or not, which is filled, or a `Part`; so the weights of a model are `{"model": model.state_dict()}`. What
was saved as `Slices` of several ranks is one whole, whichever part of it is asked for.

The first rank makes the folder, all write their files into it, and the first commits (`files`): a rank that dies leaves
what was there before, and the others an error of torch. All ranks must see one file system. A file that is missing,
cut or changed is refused by its name, on all ranks. Each rank computes the digests of its share of the files.
"""

import contextlib
import shutil
import warnings
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException

from moe_unlearn.checkpoint import manifest, tree
from moe_unlearn.checkpoint.index import read_state
from moe_unlearn.checkpoint.manifest import CheckpointError, folder_of, remove_old
from moe_unlearn.checkpoint.slices import Slices
from moe_unlearn.checkpoint.storage import LoadSlices, Reader, SaveSlices, Writer
from moe_unlearn.checkpoint.tensor_file import DTYPES, Kind, kind_of
from moe_unlearn.files import remove_unfinished, whole_folder
from moe_unlearn.ranks import gathered, together
from moe_unlearn.sharding import initialised

__all__ = [
    "CheckpointError",
    "Part",
    "Slices",
    "commit",
    "entries",
    "latest",
    "load",
    "save",
    "sealed_folder",
    "verify",
]

Group = distributed.ProcessGroup | None


@dataclass(frozen=True)
class Part:
    """Asks for the slices [start, stop) of `count` along dimension 0, of every tensor below its place in a tree.

    They come as `Slices` on `device`: all of them, or those that exist. What has no dimension comes whole.
    """

    start: int
    stop: int
    count: int
    device: torch.device | str = "cpu"


def save(folder: str | Path, state: Any, *, step: int | None = None, group: Group = None) -> None:
    """Write `state`, a tree as above, as the one content of `folder`; every rank of `group` calls this.

    A folder that is there is replaced, as by `whole_folder`. Raises CheckpointError on all ranks if one cannot write,
    or if they differ in what must be the same, and TypeError for a leaf of another kind; then nothing has changed.
    """
    leaves: dict[str, Any] = {}

    def add(path: tree.Path, leaf: object) -> str:
        if not isinstance(leaf, Tensor | Slices):
            raise TypeError(f"{tree.readable(path)}: a checkpoint holds no {type(leaf).__name__}")
        leaves[tree.name_of(path)] = leaf
        return tree.name_of(path)

    with contextlib.ExitStack() as opened:

        def begin() -> tuple[Any, Path | None]:
            unfinished = opened.enter_context(whole_folder(folder)) if _rank(group) == 0 else None
            return tree.split(state, add), unfinished

        parts, unfinished = together(begin, group, error=CheckpointError)
        writer = Writer(unfinished, step, opened.close)
        with _torch_errors(folder):
            state_dict_saver.save(leaves, storage_writer=writer, planner=SaveSlices(parts), process_group=group)


def load(folder: str | Path, into: Any = None, *, states: Collection[str] | None = None, group: Group = None) -> Any:
    """Return the tree of a checkpoint, with the leaves of `into` filled; every rank of `group` calls this.

    A tensor for which `into` has no leaf is read whole, to the CPU; so is one of `Slices`, as `Slices`. `states` names
    the entries of the tree to read, None all of them. Checkpoints of one process, of either format, are read too.
    Raises CheckpointError on all ranks, naming the file or the place in the tree: before anything is filled, for a file
    that differs from what was written and a target that does not fit.
    """
    folder = Path(folder)
    wanted: dict[str, Any] = {}

    known = verify(folder, group=group)
    # in a step of its own: the index is in a file that another rank may find damaged
    parts, index = together(lambda: read_state(folder, known), group, error=CheckpointError)

    def targets() -> Any:
        def take(name: str, target: Any) -> Any:
            found = _target(name, index[name], target)
            wanted[name] = found
            return found

        try:
            return tree.join(parts if states is None else tree.chosen(parts, states), take, into)
        except (TypeError, ValueError) as error:
            raise CheckpointError(f"{folder}: {error}") from error

    result = together(targets, group, error=CheckpointError)
    with _torch_errors(folder):
        state_dict_loader.load(wanted, storage_reader=Reader(folder, index), planner=LoadSlices(), process_group=group)
    return result


@contextlib.contextmanager
def sealed_folder(
    folder: str | Path, about: Mapping[str, Any], *, own: Collection[str] = (), group: Group = None
) -> Iterator[Path]:
    """Yield a folder that takes the place of `folder` when the block ends, with a manifest of all that is in it.

    `about` goes into the manifest. Every rank calls this, and gets one path; the first rank makes the folder, and
    commits it when all have ended the block. If anything fails, `folder` stays as it was. What others keep in folders
    there, under names that are not the checkpoint's `own`, is copied, and is not in the manifest.
    """
    with contextlib.ExitStack() as opened:

        def begin() -> str:
            return str(opened.enter_context(whole_folder(folder))) if _rank(group) == 0 else ""

        unfinished = Path(gathered(begin, lambda path: path, group, error=CheckpointError)[1][0])
        yield unfinished

        def commit() -> None:
            if _rank(group) == 0:
                manifest.seal(unfinished, about)
                for other in Path(folder).glob("*/"):
                    if other.name not in own and not (unfinished / other.name).exists():
                        shutil.copytree(other, unfinished / other.name, symlinks=True)
                opened.close()

        together(lambda: None, group, error=CheckpointError)
        together(commit, group, error=CheckpointError)


def entries(folder: str | Path, *, group: Group = None) -> list[str]:
    """Return the keys of the tree of a checkpoint, which is a dict; none if there is no folder. Every rank calls this.

    Files other than that of the tree are not verified. Raises CheckpointError on all ranks if one cannot read it, and
    if they find different ones.
    """
    folder = Path(folder)

    def read() -> list[str]:
        return tree.keys_of(read_state(folder, manifest.read_manifest(folder))[0]) if folder.is_dir() else []

    found, all_found = gathered(read, lambda keys: keys, group, error=CheckpointError)
    if any(other != found for other in all_found):
        raise CheckpointError(f"{folder}: all ranks must see one file system; they find different checkpoints there")
    return found


def commit(root: str | Path, step: int, state: Any, *, keep: int = 2, group: Group = None) -> Path:
    """Write `state` as the checkpoint of `step` under `root`, and then remove all but the newest `keep`.

    Returns the folder, which `latest` finds. What an interrupted commit leaves, the next one removes.
    """
    root = Path(root)
    if _rank(group) == 0:
        remove_unfinished(root)
    save(folder_of(root, step), state, step=step, group=group)
    if _rank(group) == 0:
        remove_old(root, keep=keep)
    return folder_of(root, step)


def latest(root: str | Path, *, prefix: str = manifest.STEPS, group: Group = None) -> Path | None:
    """Return the newest complete checkpoint under `root`, of any format, of those that the first rank finds.

    Broken ones are skipped with a warning, without removing them. Every rank calls this.
    """

    def names() -> list[str]:
        return [folder.name for folder in manifest.checkpoints(Path(root), prefix)] if _rank(group) == 0 else []

    found = gathered(names, lambda found: found, group, error=CheckpointError)[1][0]
    return manifest.first_whole([Path(root, name) for name in found], partial(verify, group=group))


def verify(folder: str | Path, *, group: Group = None) -> dict[str, Any]:
    """Check the files of a checkpoint, of any format, and return its manifest; every rank calls this.

    Each rank computes the digests of its share. Raises CheckpointError on all ranks.
    """

    def shared() -> dict[str, Any]:
        known = manifest.read_manifest(folder)
        count = distributed.get_world_size(group) if initialised() else 1
        manifest.verify_files(folder, known["files"], sorted(known["files"])[_rank(group) :: count])
        return known

    return together(shared, group, error=CheckpointError)


def _rank(group: Group) -> int:
    """Return the rank of this process in a group; 0 of a process that is alone."""
    return distributed.get_rank(group) if initialised() else 0


def _target(name: str, entry: dict[str, Any], target: Any) -> Any:
    """Return what is to be filled with a tensor of the checkpoint: `target`, or what it asks for."""
    saved, place = Kind(DTYPES[entry["dtype"]], tuple(entry["shape"])), tree.readable(name)
    held = [(chunk["offsets"][0], chunk["sizes"][0]) for chunk in entry["chunks"]] if saved.shape else []
    if isinstance(target, Tensor):
        if kind_of(target) != saved:
            raise ValueError(f"{place}: expected {kind_of(target)} here; the checkpoint has {saved}")
        if entry["slices"] and sum(size for _, size in held) != saved.shape[0]:
            raise ValueError(f"{place}: the checkpoint has only some slices; ask for a Part")
        return target
    if target is None and not entry["slices"] or not saved.shape:
        return torch.empty(saved.shape, dtype=saved.dtype, device=getattr(target, "device", "cpu"))
    part = Part(0, saved.shape[0], saved.shape[0]) if target is None else target
    if not isinstance(part, Part):
        raise TypeError(f"{place}: expected a tensor or a Part to fill; got {type(target).__name__}")
    if part.count != saved.shape[0]:
        raise ValueError(f"{place}: expected {part.count} slices here; the checkpoint has {saved.shape[0]}")
    ids = [id for first, size in sorted(held) for id in range(max(first, part.start), min(first + size, part.stop))]
    if not entry["slices"]:  # chunks along another dimension repeat them
        ids = sorted(set(ids))
    values = torch.empty((len(ids), *saved.shape[1:]), dtype=saved.dtype, device=part.device)
    return Slices(torch.tensor(ids, dtype=torch.int64, device=part.device), values, part.count)


@contextlib.contextmanager
def _torch_errors(folder: str | Path) -> Iterator[None]:
    """Raise what torch found on some ranks as CheckpointError, and leave its advice on single processes out."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
            yield
    except CheckpointException as error:
        found = [f"rank {rank}: {failure}" for rank, (failure, _) in sorted(error.failures.items())]
        raise CheckpointError(f"{folder}: {'; '.join(found)}") from error
