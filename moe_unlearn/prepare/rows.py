"""Caches of values for each row of the data: reference log-probs and hidden states, token weights.

In memory (`RowCache`) a row is found by its `index` or, without one, by its content, so that the same
document is found whatever its batch and padding. An index may be used again for other data; therefore the
content that it named is kept too and compared. On disk (`RowStore`) rows are found by content alone, and a cache of
them knows their places and reads them when they are asked for. Values are stored for the attended positions only.
"""

import hashlib
import itertools
import json
import math
import re
import warnings
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from moe_unlearn.files import remove_unfinished, write_bytes
from moe_unlearn.model.batches import ROW, attended_mask
from moe_unlearn.model.digest import tensor_digest
from moe_unlearn.ops.token_loss import IGNORED

FORMAT = "moe-unlearn rows 1"
_ABANDONED = 3600  # seconds after which an unfinished file counts as abandoned; writing takes far less


def content_keys(batch: dict[str, Tensor]) -> list[str]:
    """Compute a 128-bit hash for each row of a batch, of its ids and labels where attended; padding does not enter.

    The label of the row's first token, which nothing predicts, does not enter either: packed rows have lost it.
    Position ids that simply count, from the row's first attended token or from the beginning of the padded row, do not
    enter either, since a model uses these by default. Other position ids do.
    """
    # a batch on a GPU is read once; numpy does the rest, which takes a microsecond where torch takes several
    names = [name for name in ROW if name in batch]
    given = batch | {"attention_mask": attended_mask(batch)}
    read = torch.stack([given[name].long() for name in names]).cpu().numpy()
    return [_content_key(**dict(zip(names, row, strict=True))) for row in zip(*read, strict=True)]


def _content_key(
    input_ids: np.ndarray, attention_mask: np.ndarray, labels: np.ndarray, position_ids: np.ndarray | None = None
) -> str:
    ids, mask = input_ids, attention_mask
    (where,) = mask.nonzero()
    start, end = (int(where[0]), int(where[-1]) + 1) if len(where) else (0, 0)
    labels = np.where(np.arange(len(labels)) == start, IGNORED, labels)
    if end - start == len(where) and (end in (0, len(labels)) or labels[end] == IGNORED):
        content, person = [ids[start:end], labels[start:end]], b""
    else:
        # gaps shift positions, and a label on the padding after an attended token is predicted by that token
        following = np.append(labels[1:], IGNORED)[where]
        content, person = [ids[where], labels[where], where - start, following], b"irregular"
    if position_ids is not None and len(where):
        positions = position_ids[where]
        if not np.array_equal(positions, where) and not np.array_equal(positions, where - start):
            content, person = [*content, positions], b"placed " + person
    return hashlib.blake2b(np.concatenate(content).tobytes(), digest_size=16, person=person).hexdigest()


def row_keys(batch: dict[str, Tensor], contents: list[str]) -> list[str]:
    """Return a key for each row of a batch with these `content_keys`: its `index` if there is one, else its content."""
    return [f"index {i}" for i in batch["index"].tolist()] if "index" in batch else contents


def rows_of(batch: dict[str, Tensor], values: Tensor) -> list[Tensor]:
    """Return the attended positions of `values` [B, S, ...]: B tensors [length, ...] on the CPU."""
    mask = attended_mask(batch)
    return [row[attended].detach().cpu() for row, attended in zip(values, mask, strict=True)]


@dataclass(frozen=True, slots=True)
class StoredRow:
    """The place of a row on disk: `length` entries of what the `store` holds, behind `begin` bytes of a file."""

    store: "RowStore"
    path: Path
    begin: int
    length: int

    def __len__(self) -> int:
        return self.length

    def read(self) -> Tensor:
        """Return the row, [length, *shape] on the CPU; OSError for a file that has gone or was cut meanwhile."""
        dtype, shape = self.store.dtype, self.store.shape
        buffer = bytearray(self.length * math.prod(shape) * dtype.itemsize)
        with open(self.path, "rb", buffering=0) as file:
            file.seek(self.begin)
            if file.readinto(buffer) != len(buffer):
                raise OSError(f"{self.path} was cut; prepare again")
        values = torch.frombuffer(buffer, dtype=dtype) if buffer else torch.empty(0, dtype=dtype)
        return values.view(self.length, *shape)


Row = Tensor | StoredRow


def values_of(row: Row) -> Tensor:
    """Return the values of a row, [length, ...] on the CPU."""
    return row.read() if isinstance(row, StoredRow) else row


class RowCache:
    """Rows [length, ...] on the CPU or on disk, under the keys of `row_keys` and with the row's content."""

    def __init__(self, what: str):
        self.what = what
        self._rows: dict[str, Row] = {}
        self._contents: dict[str, str] = {}
        #: of a state that was loaded: the store that has its rows, and their lengths by key
        self._awaited: tuple[RowStore, dict[str, int]] | None = None

    def __len__(self) -> int:
        return len(self._contents)

    @property
    def nbytes(self) -> int:
        """Return the number of bytes that the rows take in memory."""
        return sum(row.nbytes for row in self._rows.values() if isinstance(row, Tensor))

    def put(self, batch: dict[str, Tensor], values: Tensor) -> None:
        """Store the `values` [B, S, ...] of a batch.

        Raises ValueError and stores none of them if an index names a row of other content already.
        """
        self.put_rows(batch, rows_of(batch, values))

    def put_rows(self, batch: dict[str, Tensor], rows: Sequence[Row]) -> None:
        """Store rows as `rows_of` returns them, or their places, like `put`; the rows are kept, not copied."""
        contents = content_keys(batch)
        keys = row_keys(batch, contents)
        named = {key: self._contents.get(key) for key in keys}
        for i, (key, content) in enumerate(zip(keys, contents, strict=True)):
            if named[key] not in (None, content):
                raise ValueError(
                    f"{self.what}: row {i} of this batch has the {key} of another row; `index` must name each row once"
                )
            named[key] = content
        self._contents.update(zip(keys, contents, strict=True))
        self._rows.update(zip(keys, rows, strict=True))

    def known_keys(self, batch: dict[str, Tensor]) -> list[str]:
        """Return the keys of a batch's rows after checking that all are stored with their present content.

        Raises ValueError for rows that were never put and for a row whose key was put with other content.
        """
        contents = content_keys(batch)
        keys = row_keys(batch, contents)
        missing = [i for i, key in enumerate(keys) if key not in self._contents]
        if missing:
            raise ValueError(
                f"{self.what}: rows {missing} of this batch were not seen by prepare(), which saw {len(self)} rows; "
                "prepare on every document the step will meet, or resume with the rows that the run began with"
            )
        for i, (key, content) in enumerate(zip(keys, contents, strict=True)):
            if self._contents[key] != content:
                raise ValueError(
                    f"{self.what}: row {i} of this batch has the {key}, under which prepare() saw another row: its "
                    "tokens or labels differ; prepare on the rows the step will meet"
                )
        return keys

    def get(self, batch: dict[str, Tensor]) -> Tensor:
        """Return values [B, S, ...] on the batch's device, 0 at unattended positions.

        Errors are as of `known_keys` and `find`, and OSError for a file that has gone.
        """
        keys = self.known_keys(batch)
        self.find()
        attended = attended_mask(batch).cpu()  # a batch on a GPU is read once, not several times for each row
        rows = torch.cat([values_of(self._rows[key]) for key in keys])
        out = rows.new_zeros(*attended.shape, *rows.shape[1:])
        out[attended] = rows
        return out.to(batch["attention_mask"].device)

    def state_dict(self) -> dict:
        """Return keys, contents, lengths and one tensor of all rows concatenated, or the store of those on disk."""
        if self._awaited is None:
            lengths = [len(row) for row in self._rows.values()]
            stored = next((row.store for row in self._rows.values() if isinstance(row, StoredRow)), None)
        else:
            stored, lengths = self._awaited[0], list(self._awaited[1].values())
        values = [values_of(row) for row in self._rows.values()] if stored is None else []
        return {
            "keys": list(self._contents),
            "contents": list(self._contents.values()),
            "lengths": lengths,
            **({"values": torch.cat(values) if values else torch.empty(0)} if stored is None else stored.described()),
        }

    def load_state_dict(self, state: dict) -> None:
        """Replace the rows by those of a `state_dict`; those on disk are found (`find`) when they are asked for.

        Raises ValueError if it lacks the contents of its rows.
        """
        if "contents" not in state:
            raise ValueError(f"{self.what}: expected a state with the contents of its rows; it has none: prepare again")
        self._contents = dict(zip(state["keys"], state["contents"], strict=True))
        if "folder" in state:
            self._rows, self._awaited = (
                {},
                (RowStore.of(state), dict(zip(state["keys"], state["lengths"], strict=True))),
            )
            return
        rows = state["values"].split(state["lengths"]) if state["lengths"] else []
        self._rows, self._awaited = dict(zip(state["keys"], (row.clone() for row in rows), strict=True)), None

    def find(self, cache_dir: Path | None = None) -> int:
        """Find and check the rows on disk of a state that was loaded: in `cache_dir`, or else where they were then.

        Returns the number of rows. Raises ValueError, which names the folder, if one is missing or damaged.
        """
        if self._awaited is None:
            return len(self)
        store, lengths = self._awaited
        if cache_dir is not None and (cache_dir / store.folder.name).is_dir():
            store = RowStore(cache_dir / store.folder.name, store.dtype, store.shape)
        found = store.read({self._contents[key]: length for key, length in lengths.items()})
        if missing := sum(self._contents[key] not in found for key in lengths):
            raise ValueError(
                f"{self.what}: {missing} of {len(self)} rows are not in {store.folder}, where prepare() kept them: "
                "give prepare() the cache_dir that has this folder, or prepare again from the original model"
            )
        self._rows, self._awaited = {key: found[self._contents[key]] for key in lengths}, None
        return len(self)


class RowStore:
    """Rows on disk: a folder of safetensors files, each written whole and checked when its rows are found.

    A file holds the rows of one `write`: their values [tokens, ...] end to end and, in its header, their
    keys, their lengths, the name of the folder and a SHA-256 over all of that. Any number of processes may
    read and write one folder: files appear by renaming and are never changed. Other files in the folder are left
    alone.

    Args:
        folder: made by the first `write`. Its name must say what the values are and what they depend on: a
            file that was written under another name is not read.
        dtype, shape: of every row, [length, *shape].
        named: the folder that a state names, the same on all ranks; by default it is this one.
    """

    def __init__(self, folder: Path, dtype: torch.dtype, shape: tuple[int, ...] = (), named: Path | None = None):
        self.folder, self.dtype, self.shape = folder, dtype, shape
        self._named = folder if named is None else named

    @classmethod
    def of(cls, described: dict[str, Any]) -> "RowStore":
        """Return the store that `described` says."""
        dtype: torch.dtype = getattr(torch, described["dtype"])
        return cls(Path(described["folder"]), dtype, tuple(described["shape"]))

    def described(self) -> dict[str, Any]:
        """Return folder, dtype and shape as plain values."""
        dtype = str(self.dtype).removeprefix("torch.")
        return {"folder": str(self._named.absolute()), "dtype": dtype, "shape": list(self.shape)}

    def read(self, lengths: dict[str, int]) -> dict[str, StoredRow]:
        """Return where those of the rows `lengths` (content key -> tokens) are that are stored, complete and unchanged.

        A damaged file that holds any of them is named in a warning and not used.
        """
        found: dict[str, StoredRow] = {}
        wanted = dict(lengths)
        for path in sorted(self.folder.glob("*.safetensors")) if lengths else ():
            if not re.fullmatch(r"[0-9a-f]{32}\.safetensors", path.name) or not path.is_file():
                continue
            try:
                rows = self._read_file(path, wanted)
            except Exception as error:  # the file may hold any bytes, for which parsers raise many kinds of errors
                problem = f"{type(error).__name__}: {error}"
                warnings.warn(f"{path} is damaged ({problem}); its rows are computed again", stacklevel=2)
                continue
            found |= rows
            for key in rows:
                del wanted[key]
        return found

    def write(self, rows: dict[str, Tensor]) -> dict[str, StoredRow]:
        """Add rows (content key -> [length, *shape]) as one file, or raise OSError and leave nothing; return places."""
        if not rows:
            return {}
        values = torch.cat(list(rows.values()))
        lengths = {key: len(row) for key, row in rows.items()}
        header = {"format": FORMAT, "of": self.folder.name, "keys": list(lengths), "lengths": list(lengths.values())}
        described = json.dumps(header)
        body = save({"values": values}, {"rows": described, "sha256": _checksum(described, values)})
        path = self._path(rows)
        remove_unfinished(self.folder, seconds=_ABANDONED, former=".rows-")
        try:
            write_bytes(path, body)
        except OSError as error:
            raise OSError(error.errno, f"cannot write to the cache: {error.strerror}", str(path)) from error
        return self._places(path, lengths, len(body))

    def add(self, rows: dict[str, Tensor]) -> dict[str, StoredRow]:
        """Write rows as `write` does, unless another process has just done so; return their places."""
        with suppress(Exception):  # as in `read`; what is damaged is written again
            found = self._read_file(self._path(rows), {key: len(row) for key, row in rows.items()})
            if found.keys() == rows.keys():
                return found
        return self.write(rows)

    def _path(self, keys: Iterable[str]) -> Path:
        return self.folder / f"{hashlib.sha256(''.join(keys).encode()).hexdigest()[:32]}.safetensors"

    def _places(self, path: Path, lengths: dict[str, int], size: int) -> dict[str, StoredRow]:
        """Return the places of all rows of a file of `size` bytes, which ends with their values."""
        ends = [*itertools.accumulate(lengths.values(), initial=0)]
        entry = math.prod(self.shape) * self.dtype.itemsize
        begin = size - ends[-1] * entry
        return {
            key: StoredRow(self, path, begin + at * entry, length)
            for (key, length), at in zip(lengths.items(), ends, strict=False)
        }

    def _read_file(self, path: Path, wanted: dict[str, int]) -> dict[str, StoredRow]:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            header = json.loads(metadata["rows"])
            if header["format"] != FORMAT or header["of"] != self.folder.name:
                raise ValueError(f"expected rows of {self.folder.name}; got {header['format']!r} of {header['of']}")
            here = dict(zip(header["keys"], header["lengths"], strict=True))
            if not here.keys() & wanted.keys():
                return {}
            values = file.get_tensor("values")
        if _checksum(metadata["rows"], values) != metadata["sha256"]:
            raise ValueError("its content does not match its SHA-256")
        if values.dtype != self.dtype or values.shape[1:] != self.shape:
            raise ValueError(f"expected {self.dtype} [tokens, *{self.shape}]; got {values.dtype} {list(values.shape)}")
        if sum(here.values()) != len(values) or any(length < 0 for length in here.values()):
            raise ValueError(f"expected rows of {len(values)} tokens together; got {list(here.values())}")
        found = {key: row for key, row in self._places(path, here, path.stat().st_size).items() if key in wanted}
        wrong = [key for key, row in found.items() if len(row) != wanted[key]]
        if wrong:
            raise ValueError(f"row {wrong[0]} has {wanted[wrong[0]]} tokens; got {len(found[wrong[0]])}")
        return found


def _checksum(described: str, values: Tensor) -> str:
    return tensor_digest(values, described.encode())
