"""Store what each case gave, in files that are only ever added.

    entries/<case>-<sha256>.json     one record: case, seed, sizes, SHA-256 of each input, digests and errors of the
                                     outputs, the environment, the source, the yardstick that measured it (records
                                     from before it was kept have none), and the entry it supersedes
    arrays/<sha256>.safetensors      the outputs

Every file is named by the SHA-256 of its bytes and is there whole or not at all. An entry names the one it supersedes,
so a former entry that disappeared is noticed. The newest entry of a case is the one that no other supersedes. There is
no pickle; nothing in a store is ever imported or run. Entries of different cases never share a file, so a store lives
well in git.

Source: our specification.
"""

import datetime
import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from moe_unlearn.files import write_bytes, write_text

FORMAT = "moe-unlearn kernels 1"
_NAME = re.compile(r"(?P<slug>.*)-(?P<sha>[0-9a-f]{64})\.json")
_FIELDS: dict[str, Any] = {
    "format": str,
    "case": str,
    "origin": str,
    "seed": int,
    "sizes": dict,
    "routing": str,
    "inputs": dict,
    "outputs": dict,
    "arrays": str,
    "environment": dict,
    "source": dict,
    "seconds": list,
    "supersedes": (str, type(None)),
    "reason": str,
    "recorded": str,
}


class StoreError(Exception):
    """Error for a store that does not hold what was written; the message names the file and what is wrong."""


class UnwritableError(OSError):
    """Error for a store that cannot be written to: no fault of the case that was to be recorded."""


@dataclass(frozen=True)
class Entry:
    """One record as in its file; `sha256` is the digest of the file."""

    sha256: str
    content: Mapping[str, Any]

    @property
    def case(self) -> str:
        return str(self.content["case"])


class Store:
    """Folder of records, which need not exist before the first one is added.

    It is read once: a record that another process adds later is seen only by a new `Store`.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        if self.folder.exists() and not self.folder.is_dir():
            raise ValueError(f"--store expects a folder; got the file {str(self.folder)!r}")
        self._entries: list[Entry] | None = None

    def entries(self) -> list[Entry]:
        """Return every record, verified; raise StoreError naming a broken, missing or doubled one."""
        if self._entries is None:
            self._entries = self._verified()
        return self._entries

    def _verified(self) -> list[Entry]:
        found = [self._read(path) for path in sorted((self.folder / "entries").glob("*.json"))]
        known = {entry.sha256: entry for entry in found}
        successors: dict[str, Entry] = {}
        for entry in found:
            former = entry.content["supersedes"]
            if former is None:
                continue
            if former not in known or known[former].case != entry.case:
                raise StoreError(
                    f"{self.folder}: {entry.sha256} of {entry.case!r} supersedes {former}, which is missing"
                )
            if former in successors:
                raise StoreError(
                    f"{self.folder}: two entries of {entry.case!r} supersede {former}: {successors[former].sha256} and "
                    f"{entry.sha256}; keep one of them"
                )
            successors[former] = entry
        return found

    def current(self) -> dict[str, Entry]:
        """Return the newest entry of each case."""
        found = self.entries()
        superseded = {entry.content["supersedes"] for entry in found}
        current: dict[str, Entry] = {}
        for entry in found:
            if entry.sha256 in superseded:
                continue
            if entry.case in current:
                raise StoreError(
                    f"{self.folder}: two first entries of {entry.case!r}: {current[entry.case].sha256} and "
                    f"{entry.sha256}; keep one of them"
                )
            current[entry.case] = entry
        return current

    def history(self, case: str) -> list[Entry]:
        """Return the entries of a case, the newest first."""
        known = {entry.sha256: entry for entry in self.entries()}
        entry, chain = self.current().get(case), []
        while entry is not None:
            chain.append(entry)
            entry = known.get(entry.content["supersedes"])
        return chain

    def arrays(self, entry: Entry) -> dict[str, Tensor]:
        """Return the recorded outputs of an entry, verified; raise StoreError if they are not what was written."""
        path = self.arrays_path(entry)
        data = _bytes(path)
        if hashlib.sha256(data).hexdigest() != entry.content["arrays"]:
            raise StoreError(f"{path}: content does not match its SHA-256")
        try:
            arrays = safetensors.torch.load(data)
        except SafetensorError as error:
            raise StoreError(f"{path}: not a safetensors file: {error}") from error
        if set(arrays) != set(entry.content["outputs"]):
            raise StoreError(f"{path}: expected outputs {sorted(entry.content['outputs'])}; got {sorted(arrays)}")
        return {name: arrays[name] for name in entry.content["outputs"]}

    def arrays_path(self, entry: Entry) -> Path:
        """Return the path of the file with an entry's outputs."""
        return self.folder / "arrays" / f"{entry.content['arrays']}.safetensors"

    def add(self, content: Mapping[str, Any], arrays: Mapping[str, Tensor]) -> Entry:
        """Write one record and its outputs and return its entry; `content` lacks `format`, `arrays` and `recorded`.

        The entry it supersedes must be the newest of its case (None where there is none yet). Raises UnwritableError,
        with the store as it was, where the disk is full or may not be written to.
        """
        self._entries = None
        entries = self.entries()
        newest = self.current().get(content["case"])
        if content["supersedes"] != (None if newest is None else newest.sha256):
            raise ValueError(
                f"{content['case']!r} is recorded as {newest and newest.sha256}; an entry that supersedes "
                f"{content['supersedes']} cannot be added"
            )
        data = safetensors.torch.save({name: value.contiguous() for name, value in arrays.items()})
        digest = self._write("arrays", "{sha}.safetensors", data)
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        whole = {"format": FORMAT, **content, "arrays": digest, "recorded": now}
        body = json.dumps(whole, indent=1, allow_nan=False).encode() + b"\n"
        sha = self._write("entries", f"{_slug(content['case'])}-{{sha}}.json", body)
        entry = Entry(sha, json.loads(body))
        entries.append(entry)
        return entry

    def _read(self, path: Path) -> Entry:
        data, named = _bytes(path), _NAME.fullmatch(path.name)
        sha = hashlib.sha256(data).hexdigest()
        if named is None or named["sha"] != sha:
            raise StoreError(f"{path}: content does not match the SHA-256 in its name")
        try:
            content = json.loads(data)
            if content["format"] != FORMAT:
                raise StoreError(f"{path}: expected format {FORMAT!r}; got {content['format']!r}")
            wrong = [key for key, kind in _FIELDS.items() if not isinstance(content[key], kind)]
            wrong += [] if isinstance(content.get("yardstick", {}), dict) else ["yardstick"]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise StoreError(f"{path}: not an entry: {error!r}") from error
        if wrong or named["slug"] != _slug(content["case"]):
            raise StoreError(f"{path}: not an entry: {', '.join(wrong) or 'its name is of another case'}")
        return Entry(sha, content)

    def _write(self, folder: str, name: str, data: bytes) -> str:
        """Write `data`, whole or not at all, under the name its digest gives; an equal file is left as it is."""
        sha = hashlib.sha256(data).hexdigest()
        target = self.folder / folder / name.format(sha=sha)
        try:
            self._keep_bytes()
            if not target.exists() or target.read_bytes() != data:
                write_bytes(target, data)
        except OSError as error:
            raise UnwritableError(error.errno, error.strerror or str(error), str(target)) from error
        return sha

    def _keep_bytes(self) -> None:
        """Have git keep the bytes, since a checkout with other line ends would not match the digests."""
        attributes = self.folder / ".gitattributes"
        if not attributes.exists():
            write_text(attributes, "* -text\n")


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise StoreError(f"{path}: cannot be read: {error.strerror}") from error


def _slug(case: str) -> str:
    return re.sub(r"[^A-Za-z0-9_.]+", "-", case)[:100]
