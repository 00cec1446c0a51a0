"""Writes what changed between two models as a delta, applies it and takes it back, in a few blocks of memory.

    write("base", "runs/mine/model", "delta.safetensors")
    apply("base", "delta.safetensors", "unlearned")          # has the tensors of runs/mine/model
    revert("unlearned", "delta.safetensors", "restored")     # has the tensors of base

A delta holds the XOR of the bit patterns of both models, so that it leads from each to the other, exactly. Models are
folders in hub layout; they are read in blocks of rows, several tensors at a time, and no tensor is whole in memory.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from moe_unlearn.checkpoint.tensor_file import MODEL_FILES, Kind, Rows, Stored, digest_of
from moe_unlearn.delta.file import UNSIGNED, Change, Delta, delta_files, metadata, pack, read, rows_of, xor_of
from moe_unlearn.delta.folder import INDEX, ModelFolder, check_same
from moe_unlearn.files import check_output, stream_of, whole_files

BLOCK = 1 << 20  # bytes of a tensor that are read at once; a row is never divided
FILE_SIZE = 50 * 10**9  # bytes of tensors in a file of a delta at most, as in those of models
THREADS = 4  # tensors that are read at the same time: their digests take most of the time

T = TypeVar("T")


class Applied(NamedTuple):
    """The digest of the model that was written, and the files of weights in another form that it does not have."""

    digest: str
    left_out: list[str]


class _Digests:
    """The SHA-256 of two sequences of bytes, side by side: what both begin with is hashed once."""

    def __init__(self) -> None:
        self._one = self._other = hashlib.sha256()

    def update(self, one: np.ndarray, other: np.ndarray) -> None:
        """Go on with the next bytes of each, which are one array where they are equal."""
        if other is not one and self._other is self._one:
            self._other = self._one.copy()
        self._one.update(one.data)
        if self._other is not self._one:
            self._other.update(other.data)

    def pair(self) -> tuple[str, str]:
        """Return both digests."""
        return self._one.hexdigest(), self._other.hexdigest()


def write(
    base: str | Path, model: str | Path, out: str | Path, *, recipe: str | None = None, max_file_size: int = FILE_SIZE
) -> Delta:
    """Write the delta from the model in the folder `base` to that in the folder `model`, as the file `out`.

    Where its tensors have more than `max_file_size` bytes, they are in several files beside `out` (see `file`), with
    one tensor at least in each. `recipe` is a digest that the delta carries. Returns the delta. Raises ValueError for
    folders that are no models in safetensors files, for models that differ in the names, dtypes or shapes of their
    tensors, and for an `out` that overlaps one of them; OSError for what cannot be read or written. What fails leaves
    `out` as it was. The bytes written depend on the tensors, `recipe` and `max_file_size` alone.
    """
    if stream_of(out):
        raise ValueError(f"expected a file to write; got {out}")
    before, after = ModelFolder(base), ModelFolder(model)
    check_output(out, (*before.inputs, *after.inputs))
    check_same(before.kinds, after.kinds, after.path, before.path)
    names = sorted(before.tensors)
    compared = _each(lambda name: _compare(before.tensors[name], after.tensors[name]), names)
    digests = _of_models(before.kinds, names, [pair for pair, _ in compared])
    differ = {name: rows for name, (_, rows) in zip(names, compared, strict=True) if rows is not None}
    counts = {name: int(rows.sum()) for name, rows in differ.items()}
    changes = {name: Change(before.kinds[name], counts.get(name, 0)) for name in names}
    kinds = {stored: kind for name, change in changes.items() for stored, kind in change.stored(name).items()}
    with delta_files(Path(out), kinds, metadata(*digests, recipe, changes), max_file_size) as put:
        for name, rows in differ.items():
            for part in _xor(before.tensors[name], after.tensors[name], rows):
                put(xor_of(name), part)
            if rows_of(name) in kinds:
                put(rows_of(name), pack(rows))
    return read(out)


def apply(base: str | Path, delta: str | Path, out: str | Path) -> Applied:
    """Write to the folder `out` the model that a delta leads to from its base, which is in the folder `base`.

    The folder gets the files of `base`, with the tensors of the result in their places. What else is there stays, but
    for the weights of an earlier model. Raises ValueError, and leaves `out` as it was: for a `base` whose tensors or
    digest are not those of the delta's base, for a delta that is not as it was written, and for an `out` that overlaps
    an input.
    """
    return _change(base, delta, out, back=False)


def revert(model: str | Path, delta: str | Path, out: str | Path) -> Applied:
    """Write to the folder `out` the base of a delta, from its result, which is in the folder `model`; see `apply`."""
    return _change(model, delta, out, back=True)


def _change(folder: str | Path, path: str | Path, out: str | Path, *, back: bool) -> Applied:
    model, delta = ModelFolder(folder), read(path)
    check_output(out, (*model.inputs, *delta.inputs))
    kinds = {name: change.kind for name, change in delta.changes.items()}
    check_same(kinds, model.kinds, model.path, delta.path)
    roles = [("base", delta.base), ("result", delta.result)]
    (source, expected), (target, promised) = reversed(roles) if back else roles
    with whole_files(out, last=(INDEX, "config.json"), stale=MODEL_FILES.fullmatch) as unfinished:
        left_out = model.copy_others(unfinished)
        for name, contents in model.files.items():
            with (model.path / name).open("rb") as given, (unfinished / name).open("xb") as made:
                made.write(given.read(contents.start))
        names = list(model.tensors)
        pairs = _each(lambda name: _write_changed(name, model.tensors[name], delta, unfinished), names)
        got, makes = _of_models(kinds, names, pairs)
        if got != expected:
            hint = f", which is its {target}" if got == promised else ""
            raise ValueError(
                f"expected {model.path} to be the {source} of {delta.path}, with the digest {expected}; got {got}{hint}"
            )
        if makes != promised:
            raise ValueError(
                f"{delta.path}: damaged: expected it to make its {target}, with the digest {promised}; got {makes}"
            )
    return Applied(promised, left_out)


def _compare(base: Stored, model: Stored) -> tuple[tuple[str, str], np.ndarray | None]:
    """Return the digests of a tensor in both models, and which of its rows differ, bool [rows]; None if none does."""
    digests, differ = _Digests(), np.zeros(base.kind.rows, bool)
    with Rows(base) as one, Rows(model) as other:
        for block in _blocks(base.kind):
            before, after = (rows.read(block.stop - block.start) for rows in (one, other))
            differ[block] = (before != after).any(axis=1)
            digests.update(before, after if differ[block].any() else before)
    return digests.pair(), differ if differ.any() else None


def _xor(base: Stored, model: Stored, differ: np.ndarray) -> Iterator[Tensor]:
    """Yield the XOR of the rows that differ, as a delta stores them, block by block."""
    unsigned = UNSIGNED[base.kind.dtype.itemsize]
    with Rows(base) as one, Rows(model) as other:
        for block in _blocks(base.kind):
            before, after = (rows.read(block.stop - block.start)[differ[block]] for rows in (one, other))
            if len(before):
                yield torch.from_numpy(before ^ after).view(unsigned)


def _write_changed(name: str, given: Stored, delta: Delta, folder: Path) -> tuple[str, str]:
    """Write a tensor, its rows changed by the delta, to its place in a file; return the digests before and after."""
    digests, differ = _Digests(), delta.which_rows(name)
    with ExitStack() as opened:
        rows = opened.enter_context(Rows(given))
        xor = opened.enter_context(Rows(delta.stored[xor_of(name)])) if delta.changes[name].rows else None
        made = opened.enter_context((folder / given.path.name).open("r+b"))
        made.seek(given.start)
        for block in _blocks(given.kind):
            after = before = rows.read(block.stop - block.start)
            changed = int(differ[block].sum())
            if xor is not None and changed:
                after = before.copy()
                after[differ[block]] ^= xor.read(changed)
            digests.update(before, after)
            made.write(after.data)
    return digests.pair()


def _blocks(kind: Kind) -> Iterator[slice]:
    """Yield the rows of a tensor in blocks, none if it has no bytes."""
    if kind.size:
        step = max(1, BLOCK // kind.row_size)
        for first in range(0, kind.rows, step):
            yield slice(first, min(first + step, kind.rows))


def _of_models(kinds: dict[str, Kind], names: list[str], pairs: list[tuple[str, str]]) -> tuple[str, str]:
    """Return the digests of two models from those of their tensors."""
    of = [{name: (kinds[name], pair[i]) for name, pair in zip(names, pairs, strict=True)} for i in (0, 1)]
    return digest_of(of[0]), digest_of(of[1])


def _each(act: Callable[[str], T], names: Iterable[str]) -> list[T]:
    """Return what `act` makes of each name, several at a time."""
    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(act, names))
