"""Caches of values for each row of the data: reference log-probs and hidden states, token weights.

In memory (`RowCache`) a row is found by its `index` or, without one, by its content, so that the same
document is found whatever its batch and padding. An index may be used again for other data; therefore the
content that it named is kept too and compared. On disk (`RowStore`) rows are found by content alone. Values
are stored for the attended positions only.
"""

import hashlib
import json
import re
import warnings
from pathlib import Path

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


class RowCache:
    """Tensors [length, ...] on the CPU, one for each row, under the keys of `row_keys` and with the row's content."""

    def __init__(self, what: str):
        self.what = what
        self._rows: dict[str, Tensor] = {}
        self._contents: dict[str, str] = {}

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def nbytes(self) -> int:
        """Return the number of bytes that the rows take."""
        return sum(row.numel() * row.element_size() for row in self._rows.values())

    def put(self, batch: dict[str, Tensor], values: Tensor) -> None:
        """Store the `values` [B, S, ...] of a batch.

        Raises ValueError and stores none of them if an index names a row of other content already.
        """
        self.put_rows(batch, rows_of(batch, values))

    def put_rows(self, batch: dict[str, Tensor], rows: list[Tensor]) -> None:
        """Store rows as `rows_of` returns them, like `put`; the rows are kept, not copied."""
        contents = content_keys(batch)
        keys = row_keys(batch, contents)
        named = dict(self._contents)
        for i, (key, content) in enumerate(zip(keys, contents, strict=True)):
            if named.setdefault(key, content) != content:
                raise ValueError(
                    f"{self.what}: row {i} of this batch has the {key} of another row; `index` must name each row once"
                )
        self._contents = named
        self._rows.update(zip(keys, rows, strict=True))

    def known_keys(self, batch: dict[str, Tensor]) -> list[str]:
        """Return the keys of a batch's rows after checking that all are stored with their present content.

        Raises ValueError for rows that were never put and for a row whose key was put with other content.
        """
        contents = content_keys(batch)
        keys = row_keys(batch, contents)
        missing = [i for i, key in enumerate(keys) if key not in self._rows]
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
        """Return values [B, S, ...] on the batch's device, 0 at unattended positions; errors are as of `known_keys`."""
        keys = self.known_keys(batch)
        attended = attended_mask(batch).cpu()  # a batch on a GPU is read once, not several times for each row
        rows = torch.cat([self._rows[key] for key in keys])
        out = rows.new_zeros(*attended.shape, *rows.shape[1:])
        out[attended] = rows
        return out.to(batch["attention_mask"].device)

    def state_dict(self) -> dict:
        """Return keys, contents, lengths and one tensor of all rows concatenated."""
        rows = list(self._rows.values())
        return {
            "keys": list(self._rows),
            "contents": [self._contents[key] for key in self._rows],
            "lengths": [len(row) for row in rows],
            "values": torch.cat(rows) if rows else torch.empty(0),
        }

    def load_state_dict(self, state: dict) -> None:
        """Replace the rows by those of a `state_dict`; raise ValueError if it lacks the contents of its rows."""
        if "contents" not in state:
            raise ValueError(f"{self.what}: expected a state with the contents of its rows; it has none: prepare again")
        self._contents = dict(zip(state["keys"], state["contents"], strict=True))
        rows = state["values"].split(state["lengths"]) if state["lengths"] else []
        self._rows = dict(zip(state["keys"], (row.clone() for row in rows), strict=True))


class RowStore:
    """Rows on disk: a folder of safetensors files, each written whole and checked whenever it is read.

    A file holds the rows of one `write`: their values [tokens, ...] end to end and, in its header, their
    keys, their lengths, the name of the folder and a SHA-256 over all of that. Any number of processes may
    read and write one folder: files appear by renaming and are never changed. Other files in the folder are left
    alone.

    Args:
        folder: made by the first `write`. Its name must say what the values are and what they depend on: a
            file that was written under another name is not read.
        dtype, shape: of every row, [length, *shape].
    """

    def __init__(self, folder: Path, dtype: torch.dtype, shape: tuple[int, ...] = ()):
        self.folder, self.dtype, self.shape = folder, dtype, shape

    def read(self, lengths: dict[str, int]) -> dict[str, Tensor]:
        """Return those of the rows `lengths` (content key -> tokens) that are stored, complete and unchanged.

        A damaged file that holds any of them is named in a warning and not used.
        """
        found: dict[str, Tensor] = {}
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

    def write(self, rows: dict[str, Tensor]) -> None:
        """Add rows (content key -> [length, *shape]) as one file, or raise OSError and leave nothing."""
        if not rows:
            return
        values = torch.cat(list(rows.values()))
        header = {
            "format": FORMAT,
            "of": self.folder.name,
            "keys": list(rows),
            "lengths": [len(row) for row in rows.values()],
        }
        described = json.dumps(header)
        body = save({"values": values}, {"rows": described, "sha256": _checksum(described, values)})
        name = hashlib.sha256("".join(rows).encode()).hexdigest()[:32]
        path = self.folder / f"{name}.safetensors"
        remove_unfinished(self.folder, seconds=_ABANDONED, former=".rows-")
        try:
            write_bytes(path, body)
        except OSError as error:
            raise OSError(error.errno, f"cannot write to the cache: {error.strerror}", str(path)) from error

    def _read_file(self, path: Path, wanted: dict[str, int]) -> dict[str, Tensor]:
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
        rows = zip(here, values.split(header["lengths"]), strict=True)
        found = {key: row.clone() for key, row in rows if key in wanted}
        wrong = [key for key, row in found.items() if len(row) != wanted[key]]
        if wrong:
            raise ValueError(f"row {wrong[0]} has {wanted[wrong[0]]} tokens; got {len(found[wrong[0]])}")
        return found


def _checksum(described: str, values: Tensor) -> str:
    return tensor_digest(values, described.encode())
