"""Writes and checks the manifest of a checkpoint, and finds the newest checkpoint that is complete.

The manifest names the files beside it with their sizes and SHA-256 digests. It is sealed with its own digest, so that a
flipped bit in the manifest is noticed too.
"""

import hashlib
import json
import shutil
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from moe_unlearn.files import read_sealed, write_sealed

FORMAT = "moe-unlearn checkpoint 1"
SHARDED = "moe-unlearn sharded checkpoint 1"
_MANIFEST = "manifest"


class CheckpointError(ValueError):
    """A checkpoint differs from what was written; the message names the file and the difference."""


def write_manifest(folder: Path, about: Mapping[str, Any], files: Mapping[str, dict]) -> None:
    """Write the manifest of `files` (name -> what `describe` returns); `about` has its format and its step."""
    write_sealed(folder / _MANIFEST, json.dumps({**about, "files": files}, indent=1).encode())


def read_manifest(folder: str | Path) -> dict[str, Any]:
    """Return the manifest of a checkpoint of either format; raise CheckpointError if there is none that can be read."""
    folder = Path(folder)
    try:
        manifest: dict[str, Any] = json.loads(read_sealed(folder / _MANIFEST))
        if manifest["format"] not in (FORMAT, SHARDED):
            raise CheckpointError(f"{folder}: expected format {FORMAT!r} or {SHARDED!r}; got {manifest['format']!r}")
        for described in manifest["files"].values():
            if not (isinstance(described["size"], int) and isinstance(described["sha256"], str)):
                raise TypeError(f"a file is described by {described!r}")
    except CheckpointError:
        raise
    except (OSError, KeyError, TypeError, AttributeError, ValueError) as error:
        raise CheckpointError(f"{folder}: no readable manifest: {error!r}") from error
    return manifest


def verify(folder: str | Path) -> dict[str, Any]:
    """Check the files of a checkpoint against their recorded sizes and digests; return its manifest.

    Raises CheckpointError if they differ.
    """
    manifest = read_manifest(folder)
    verify_files(folder, manifest["files"])
    return manifest


def verify_files(folder: str | Path, files: Mapping[str, dict], digests_of: Iterable[str] | None = None) -> None:
    """Check the sizes of `files`, and the digests of those in `digests_of` (None: of all); errors as `verify`."""
    folder = Path(folder)
    for name, described in files.items():
        path, size = folder / name, described["size"]
        if Path(name).name != name or path.is_symlink() or not path.is_file():
            raise CheckpointError(f"{folder}: file {name!r} is missing or not a plain file")
        if path.stat().st_size != size:
            raise CheckpointError(f"{path}: expected {size} bytes; got {path.stat().st_size}")
    for name in files if digests_of is None else digests_of:
        if describe(folder / name)["sha256"] != files[name]["sha256"]:
            raise CheckpointError(f"{folder / name}: content does not match its recorded SHA-256")


def describe(path: Path) -> dict[str, Any]:
    """Return the size and the SHA-256 of a file."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"size": path.stat().st_size, "sha256": digest}


def latest(root: str | Path) -> Path | None:
    """Return the newest complete checkpoint under `root`; skip broken ones with a warning, without removing them."""
    for folder in _checkpoints(Path(root)):
        try:
            verify(folder)
            return folder
        except CheckpointError as error:
            warnings.warn(f"skipping a broken checkpoint: {error}", stacklevel=2)
    return None


def folder_of(root: Path, step: int) -> Path:
    """Return the folder of the checkpoint of a step."""
    return root / f"step-{step:08d}"


def remove_old(root: Path, *, keep: int) -> None:
    """Remove all but the newest `keep` checkpoints under `root`."""
    for old in _checkpoints(root)[keep:]:
        shutil.rmtree(old)


def _checkpoints(root: Path) -> list[Path]:
    return sorted((p for p in root.glob("step-*") if p.is_dir()), reverse=True)
