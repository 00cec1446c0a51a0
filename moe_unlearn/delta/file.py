"""Reads and describes a delta, a safetensors file of the bits in which two models differ.

A tensor is taken as rows, vectors along its last dimension. Of a tensor `NAME` that differs in n of its rows there are

    xor/NAME     [n, last dimension], unsigned integers as wide as its dtype: the XOR of the bit patterns of both models
    rows/NAME    [ceil(rows / 32)], int32: bit i % 32 of word i // 32 is 1 if row i differs; absent if all rows do

The metadata has `format`, `about` and `sha256`, the digest of `about`. That is JSON: the digests of `base` and `result`
(`tensor_file.digest_of`), the SHA-256 of the file of the `recipe` or null, and of each tensor of the model, changed or
not, its dtype, its shape and n.

A delta that is too large for one file has several, such as `delta-00001-of-00003.safetensors`, each with that `sha256`,
and an index, `delta.safetensors.index.json`: JSON with the metadata of the delta, and with `weight_map`, which says
which file has which tensor.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from moe_unlearn.checkpoint.tensor_file import NAMES, Kind, Rows, Stored, kind_from, stored_by, stored_in, tensor_file
from moe_unlearn.files import whole_files, write_json

FORMAT = "moe-unlearn delta 1"
INDEX = ".index.json"  # how the name of the index of a delta in several files ends, after that of the delta
_OF, _SUFFIX = "a delta's", ".safetensors"
UNSIGNED = {1: torch.uint8, 2: torch.uint16, 4: torch.uint32, 8: torch.uint64}


class Change(NamedTuple):
    """A tensor of both models, and the number of its rows that differ."""

    kind: Kind
    rows: int

    def stored(self, name: str) -> dict[str, Kind]:
        """Return the names and kinds of what a delta stores of the tensor `name`."""
        if not self.rows:
            return {}
        width = self.kind.row_size // self.kind.dtype.itemsize
        kinds = {xor_of(name): Kind(UNSIGNED[self.kind.dtype.itemsize], (self.rows, width))}
        if self.rows < self.kind.rows:
            kinds[rows_of(name)] = Kind(torch.int32, (-(-self.kind.rows // 32),))
        return kinds


class Delta(NamedTuple):
    """Holds what a delta says about itself; `stored` says where its tensors are, `size` counts the bytes of these.

    `path` is its file, or the index of several.
    """

    path: Path
    base: str
    result: str
    recipe: str | None
    changes: dict[str, Change]
    stored: dict[str, Stored]

    @property
    def inputs(self) -> set[Path]:
        """Return the paths of its files."""
        return {self.path, *(stored.path for stored in self.stored.values())}

    @property
    def size(self) -> int:
        """Return the bytes of what is stored."""
        return sum(stored.kind.size for stored in self.stored.values())

    @property
    def model_size(self) -> int:
        """Return the bytes of the model's tensors."""
        return sum(change.kind.size for change in self.changes.values())

    @property
    def changed(self) -> list[str]:
        """Return the names of the tensors that differ."""
        return [name for name, change in self.changes.items() if change.rows]

    def which_rows(self, name: str) -> np.ndarray:
        """Return which rows of a tensor differ, bool [rows]; ValueError if they are not as many as recorded."""
        change = self.changes[name]
        if change.rows in (0, change.kind.rows):
            return np.full(change.kind.rows, change.rows > 0)
        stored = self.stored[rows_of(name)]
        with Rows(stored) as file:
            differ = np.unpackbits(file.read(1)[0], bitorder="little").astype(bool)
        if differ.sum() != change.rows or differ[change.kind.rows :].any():
            raise ValueError(f"{self.path}: damaged: {name!r} does not have the rows that its metadata says")
        return differ[: change.kind.rows]


def xor_of(name: str) -> str:
    """Return the name under which a delta stores the bits of a tensor's rows."""
    return f"xor/{name}"


def rows_of(name: str) -> str:
    """Return the name under which a delta stores which rows of a tensor differ."""
    return f"rows/{name}"


def pack(differ: np.ndarray) -> torch.Tensor:
    """Return which rows differ as a delta stores them, from bool [rows]."""
    words = np.zeros(-(-len(differ) // 32), np.int32)
    words.view(np.uint8)[: -(-len(differ) // 8)] = np.packbits(differ, bitorder="little")
    return torch.from_numpy(words)


def metadata(base: str, result: str, recipe: str | None, changes: dict[str, Change]) -> dict[str, str]:
    """Return the metadata of a delta."""
    tensors = {name: [NAMES[c.kind.dtype], list(c.kind.shape), c.rows] for name, c in changes.items()}
    about = json.dumps({"base": base, "result": result, "recipe": recipe, "tensors": tensors}, separators=(",", ":"))
    return {"format": FORMAT, "about": about, "sha256": _seal(about)}


@contextmanager
def delta_files(
    out: Path, kinds: Mapping[str, Kind], about: dict[str, str], limit: int
) -> Iterator[Callable[[str, Tensor], None]]:
    """Yield what writes the tensors of a delta, as `tensor_file` does, to the file `out`, or to several with an index.

    Each of several has at most `limit` bytes of tensors, or a single tensor. They take the place of a delta that is
    there under that name; if anything fails, that stays.
    """
    groups: list[list[str]] = [[]]
    left = limit
    for name in sorted(kinds):
        if groups[-1] and kinds[name].size > left:
            groups.append([])
            left = limit
        groups[-1].append(name)
        left -= kinds[name].size
    former = _files_of(out)
    if len(groups) == 1:
        with tensor_file(out, kinds, about) as write:
            yield write
        for name in former - {out.name}:
            out.with_name(name).unlink()
        return
    index, seal = out.name + INDEX, {"format": FORMAT, "sha256": about["sha256"]}
    names = [f"{out.stem}-{i + 1:05d}-of-{len(groups):05d}{_SUFFIX}" for i in range(len(groups))]
    with (
        whole_files(out.parent, last=(index,), stale=former.__contains__) as unfinished,
        ExitStack() as opened,
    ):
        writers: dict[str, Callable[[str, Tensor], None]] = {}
        for file, group in zip(names, groups, strict=True):
            own = {name: kinds[name] for name in group}
            writers |= dict.fromkeys(group, opened.enter_context(tensor_file(unfinished / file, own, seal)))
        places = {name: file for file, group in zip(names, groups, strict=True) for name in group}
        write_json(unfinished / index, {"metadata": about, "weight_map": places})
        yield lambda name, tensor: writers[name](name, tensor)


def _files_of(out: Path) -> set[str]:
    """Return the names of `out` itself and, if it is a delta in several files, of these and of their index."""
    index = out.with_name(out.name + INDEX)
    try:
        found = stored_by(index, _OF)
    except (OSError, ValueError):
        return {out.name}
    return {out.name, index.name, *found.files} if found.about.get("format") == FORMAT else {out.name}


def read(path: str | Path) -> Delta:
    """Read what a delta says about itself, from its file or, if `path` is not there, from its index.

    Raises ValueError, naming the file: it is not whole, of another format or version, differs from what was written, or
    lacks a tensor or has one too many. Whether its bits are those that were written shows once they are applied.
    """
    path = Path(path)
    parts: dict[str, dict[str, str]] = {}
    if not path.exists() and path.with_name(path.name + INDEX).is_file():
        path = path.with_name(path.name + INDEX)
    if path.name.endswith(INDEX):
        files, stored, about = stored_by(path, _OF)
        parts = {name: contents.about for name, contents in files.items()}
    else:
        stored, about, _ = stored_in(path)
    if about.get("format") != FORMAT:
        raise ValueError(f"{path}: expected a file of the format {FORMAT!r}; got {about.get('format')!r}")
    if about.get("sha256") != _seal(str(about.get("about", ""))):
        raise ValueError(f"{path}: damaged: its metadata does not match its SHA-256")
    for name, own in parts.items():
        if own.get("sha256") != about["sha256"]:
            raise ValueError(f"{path}: damaged: {name} belongs to another delta")
    try:
        content: dict[str, Any] = json.loads(about["about"])
        changes = {
            name: Change(kind_from(dtype, shape), rows) for name, (dtype, shape, rows) in content["tensors"].items()
        }
        delta = Delta(path, content["base"], content["result"], content["recipe"], changes, stored)
        for name, change in changes.items():
            if type(change.rows) is not int or not 0 <= change.rows <= change.kind.rows:
                raise ValueError(f"{name!r} cannot differ in {change.rows!r} rows")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path}: no readable metadata of a delta: {error!r}") from error
    expected = {name: kind for own, change in changes.items() for name, kind in change.stored(own).items()}
    for name in sorted(expected.keys() | stored.keys()):
        got = stored[name].kind if name in stored else "nothing"
        if expected.get(name) != got:
            raise ValueError(f"{path}: damaged: expected {name!r} to be {expected.get(name, 'absent')}; got {got}")
    return delta


def _seal(about: str) -> str:
    return hashlib.sha256(about.encode()).hexdigest()
