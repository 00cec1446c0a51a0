"""Writes and reads safetensors files in parts, so that no whole tensor need be in memory.

A file that is written has the bytes that `safetensors.torch.save_file` writes of the same tensors: 8 bytes with the
length of the header, the header in JSON, and the tensors, sorted by their dtype and then by name. What is read may have
them in any order.

A sealed file has a digest in its metadata, under `sha256`: the SHA-256 of a JSON list of `digest_of` the tensors and
the other metadata as sorted pairs. Each tensor is hashed where it is while it is written or read, without a copy.
"""

import hashlib
import json
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from torch import Tensor

from moe_unlearn.files import whole_file

# in the order in which safetensors sorts them, from the last to the first
DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I16": torch.int16,
    "U16": torch.uint16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "F32": torch.float32,
    "F64": torch.float64,
    "I64": torch.int64,
    "U64": torch.uint64,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
DIGEST = "sha256"
#: the names of a model's files in hub layout, and an adapter's: readers would take some that an earlier save has left
MODEL_FILES = re.compile(
    r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?|adapter_model\.(safetensors|bin)|(adapter_)?config\.json"
)
_HEADER = 100_000_000  # bytes of a header that safetensors reads at most


class Kind(NamedTuple):
    """The dtype and the shape of a tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    def __str__(self) -> str:
        return f"{str(self.dtype).removeprefix('torch.')} {list(self.shape)}"

    @property
    def size(self) -> int:
        """Return the bytes of such a tensor."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def rows(self) -> int:
        """Return how many vectors along the last dimension such a tensor has; one with a single number has one."""
        return math.prod(self.shape[:-1])

    @property
    def row_size(self) -> int:
        """Return the bytes of a vector along the last dimension."""
        return math.prod(self.shape[-1:]) * self.dtype.itemsize


class Stored(NamedTuple):
    """The place of a tensor: the file, where its bytes begin there, and its kind."""

    path: Path
    start: int
    kind: Kind


class Contents(NamedTuple):
    """The tensors of a safetensors file, in the order of their bytes, its metadata, and the bytes before the first."""

    tensors: dict[str, Stored]
    about: dict[str, str]
    start: int


class Indexed(NamedTuple):
    """The files that an index names, by name, where the tensors are that they hold together, and its metadata."""

    files: dict[str, Contents]
    tensors: dict[str, Stored]
    about: dict[str, Any]


class Rows:
    """Reads the bytes of a stored tensor, row after row; a row is a vector along the last dimension."""

    def __init__(self, stored: Stored):
        self._stored = stored
        self._file = stored.path.open("rb")
        self._file.seek(stored.start)

    def read(self, count: int) -> np.ndarray:
        """Return the next rows, uint8 [count, bytes of a row]; ValueError if the file ends before."""
        rows = np.empty((count, self._stored.kind.row_size), np.uint8)
        if self._file.readinto(rows.data) != rows.nbytes:
            raise ValueError(f"{self._stored.path}: the file ends within a tensor")
        return rows

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


class Seal:
    """Adds up the digest of tensors, which may come in parts along their first dimension, and of metadata."""

    def __init__(self) -> None:
        self._hashes: dict[str, Any] = {}

    def add(self, name: str, octets: np.ndarray) -> None:
        """Take in the next bytes of a tensor."""
        self._hashes.setdefault(name, hashlib.sha256()).update(octets.data)

    def of(self, kinds: Mapping[str, Kind], about: Mapping[str, str]) -> str:
        """Return the digest of the tensors, of these kinds, and of the metadata but for a digest that it has."""
        tensors = digest_of({name: (kind, self._hashes[name].hexdigest()) for name, kind in kinds.items()})
        others = sorted([key, value] for key, value in about.items() if key != DIGEST)
        return hashlib.sha256(json.dumps([tensors, others]).encode()).hexdigest()


def kind_of(tensor: Tensor) -> Kind:
    """Return the kind of a tensor; of one that is shared out over ranks, that of the whole."""
    return Kind(tensor.dtype, tuple(tensor.shape))


def digest_of(tensors: Mapping[str, tuple[Kind, str]]) -> str:
    """Return the digest of tensors by name from kind and SHA-256 of each, however files share them out.

    It is the SHA-256 of one line for each tensor, sorted by name: `["name","BF16",[2,3],"SHA-256 of its bytes"]`.
    """
    whole = hashlib.sha256()
    for name, (kind, digest) in sorted(tensors.items()):
        line = json.dumps([name, NAMES[kind.dtype], list(kind.shape), digest], separators=(",", ":"))
        whole.update(line.encode() + b"\n")
    return whole.hexdigest()


def dtype_name(dtype: torch.dtype, tensor: str) -> str:
    """Return how safetensors call a dtype; raise TypeError, naming the tensor, for one that they do not have."""
    if dtype not in NAMES:
        raise TypeError(f"{tensor}: safetensors files hold no {dtype}")
    return NAMES[dtype]


@contextmanager
def tensor_file(
    path: Path, kinds: Mapping[str, Kind], about: Mapping[str, str] | None = None, *, sealed: bool = False
) -> Iterator[Callable[[str, Tensor], None]]:
    """Yield `write(name, tensor)`, which writes each tensor of `kinds` to the safetensors file `path`, in any order.

    A tensor may also come in parts along its first dimension, one after the other. The file appears when the block
    ends, as `whole_file` does; `about` is its metadata, with a digest if it is `sealed`. Raises TypeError for a dtype
    that safetensors does not have, and ValueError for a tensor of another kind, if one was not written, and for a
    header that safetensors cannot read.
    """
    order = {dtype: i for i, dtype in enumerate(NAMES)}
    names = sorted(kinds, key=lambda name: (-order.get(kinds[name].dtype, 0), name))
    # the digest takes the place of as many zeros, once all is known
    metadata = dict(about or {}) | ({DIGEST: "0" * 64} if sealed else {})
    header: dict[str, object] = {} if about is None and not sealed else {"__metadata__": metadata}
    places, end = {}, 0
    for name in names:
        kind, places[name] = kinds[name], end
        end += kind.size
        header[name] = {
            "dtype": dtype_name(kind.dtype, name),
            "shape": list(kind.shape),
            "data_offsets": [places[name], end],
        }
    head = _head(header)
    start, size = len(head), len(head) - 8
    if size > _HEADER:
        raise ValueError(f"{path.name}: expected a header of at most {_HEADER:,} bytes; got {size:,}")
    missing, seal = {name: kinds[name].size for name in names}, Seal()
    with whole_file(path) as unfinished, unfinished.open("r+b") as file:
        file.write(head)
        file.truncate(start + end)

        def write(name: str, tensor: Tensor) -> None:
            whole, part = kinds[name], kind_of(tensor)
            alike = (part.dtype, part.shape[1:]) == (whole.dtype, whole.shape[1:])
            left = missing.pop(name, 0)
            if part != whole and not (alike and part.shape) or part.size > left:
                raise ValueError(f"{path.name}: expected {name} to be {whole}; got {part}")
            file.seek(start + places[name] + whole.size - left)
            octets = bytes_of(tensor)
            file.write(octets.data)
            if sealed:
                seal.add(name, octets)
            if part.size < left:
                missing[name] = left - part.size

        yield write
        if missing:
            raise ValueError(f"{path.name}: {', '.join(missing)} not written")
        if sealed:
            metadata[DIGEST] = seal.of(kinds, metadata)
            file.seek(0)
            file.write(_head(header))


def _head(header: Mapping[str, object]) -> bytes:
    """Return what stands before the tensors: the length of the header and the header."""
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def bytes_of(tensor: Tensor) -> np.ndarray:
    """Return the bytes of a tensor, in the order of its elements; those of one on the CPU are shared if they can be."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    octets: np.ndarray = flat.view(torch.uint8).numpy()
    return octets


def stored_in(path: Path) -> Contents:
    """Return what a safetensors file holds, without reading a tensor.

    Raises ValueError, naming the file, unless its tensors fill it without a gap and have dtypes of `DTYPES`.
    """
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        size = os.fstat(file.fileno()).st_size
        if not 2 <= length <= min(_HEADER, size - 8):
            raise ValueError(f"{path}: expected a whole safetensors file; its header does not fit in")
        text = file.read(length)
    tensors: dict[str, Stored] = {}
    end = 8 + length
    try:
        header = json.loads(text)
        about = header.pop("__metadata__", {})
        if not all(isinstance(value, str) for value in about.values()):
            raise TypeError("metadata that is no text")
        "".join([*header, *about.values()]).encode()  # fails for half a character, which JSON can spell
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            kind = kind_from(entry["dtype"], entry["shape"])
            start, end = end, end + kind.size
            if entry["data_offsets"] != [start - 8 - length, end - 8 - length]:
                raise ValueError(f"the bytes of {name!r} are not where they should be")
            tensors[name] = Stored(path, start, kind)
        if end != size:
            raise ValueError(f"expected {end:,} bytes; got {size:,}")
    # what is no header may be JSON of any form and depth
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path}: expected a whole safetensors file: {error}") from error
    return Contents(tensors, about, 8 + length)


def stored_by(index: Path, of: str) -> Indexed:
    """Return what the safetensors files hold that an index names, without reading a tensor; `of` says whose they are.

    Raises ValueError, naming the file: for what is no index, for one that names what is not there, and for a tensor
    that is in two files.
    """
    try:
        content = json.loads(index.read_bytes())
        places: dict[str, str] = content["weight_map"]
        names, about = {*places.values()}, dict(content.get("metadata") or {})
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{index}: expected the index of {of} files: {error!r}") from error
    for name in names:
        if not (isinstance(name, str) and name.endswith(".safetensors") and Path(name).name == name):
            raise ValueError(f"{index}: expected names of safetensors files beside it; got {name!r}")
        if not index.with_name(name).is_file():
            raise ValueError(f"{index} names {name}, which is not there")
    if not names:
        raise ValueError(f"{index} names no file")
    files = {name: stored_in(index.with_name(name)) for name in sorted(names)}
    tensors: dict[str, Stored] = {}
    for path, contents in files.items():
        for name, stored in contents.tensors.items():
            if name in tensors:
                raise ValueError(f"{index.parent}: {name!r} is in {tensors[name].path.name} and in {path}")
            tensors[name] = stored
    if absent := sorted(places.keys() - tensors.keys()):
        raise ValueError(f"{index} names {absent[0]!r}, which no file of the folder has")
    return Indexed(files, tensors, about)


def kind_from(dtype: str, shape: list[int]) -> Kind:
    """Return the kind of the names that safetensors use; ValueError for an unknown dtype or what is no shape."""
    if dtype not in DTYPES or not all(type(n) is int and n >= 0 for n in shape):
        raise ValueError(f"{dtype!r} {shape!r} is no kind of tensor that is known")
    return Kind(DTYPES[dtype], tuple(shape))
