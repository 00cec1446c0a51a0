"""Writes and checks the manifest of a checkpoint, and finds the newest checkpoint that is complete.

The manifest names the files beside it and below with their sizes and SHA-256 digests. It is sealed with its own digest,
so that a flipped bit in the manifest is noticed too.
"""

import hashlib
import json
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from moe_unlearn.files import read_sealed, remove_folder, write_sealed

FORMAT = "moe-unlearn checkpoint 1"
SHARDED = "moe-unlearn sharded checkpoint 1"
FOLDER = "moe-unlearn folder 1"  # files of any kind, such as a Trainer's checkpoint
STEPS = "step-"  # how the names of checkpoints begin that `commit` makes
_MANIFEST = "manifest"


class CheckpointError(ValueError):
    """A checkpoint differs from what was written; the message names the file and the difference."""


def write_manifest(folder: Path, about: Mapping[str, Any], files: Mapping[str, dict]) -> None:
    """Write the manifest of `files` (name -> what `describe` returns); `about` has its format and its step."""
    write_sealed(folder / _MANIFEST, json.dumps({**about, "files": files}, indent=1).encode())


def seal(folder: str | Path, about: Mapping[str, Any], names: Iterable[str] | None = None) -> None:
    """Write the manifest of `names`, by default of all files in and below a folder, whose content is not looked at.

    What a folder below has in a manifest of its own is taken from there, without reading the files again.
    """
    folder = Path(folder)
    if names is None:
        names = [str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()]
    wanted = sorted({*names} - {_MANIFEST})
    known: dict[str, dict] = {}
    for name in wanted:
        if Path(name).name == _MANIFEST:
            inner = read_manifest((folder / name).parent)["files"]
            known |= {str(Path(name).parent / inside): described for inside, described in inner.items()}
    files = {name: known.get(name) or describe(folder / name) for name in wanted}
    write_manifest(folder, {"format": FOLDER, **about}, files)


def read_manifest(folder: str | Path) -> dict[str, Any]:
    """Return the manifest of a checkpoint of any format; raise CheckpointError if there is none that can be read."""
    folder = Path(folder)
    try:
        manifest: dict[str, Any] = json.loads(read_sealed(folder / _MANIFEST))
        if manifest["format"] not in (FORMAT, SHARDED, FOLDER):
            raise CheckpointError(
                f"{folder}: expected format {FORMAT!r}, {SHARDED!r} or {FOLDER!r}; got {manifest['format']!r}"
            )
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
    real = folder.resolve()
    for name, described in files.items():
        path, size = folder / name, described["size"]
        # not through a link, nor out of the folder
        resolved = path.resolve()
        if resolved != real / name or not resolved.is_relative_to(real) or not path.is_file():
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
    return first_whole(checkpoints(Path(root)), verify)


def first_whole(folders: Iterable[Path], verify: Callable[[Path], object]) -> Path | None:
    """Return the first folder that `verify` accepts; warn of those before it."""
    for folder in folders:
        try:
            verify(folder)
            return folder
        except CheckpointError as error:
            warnings.warn(f"skipping a broken checkpoint: {error}", stacklevel=3)
    return None


def folder_of(root: Path, step: int) -> Path:
    """Return the folder of the checkpoint of a step."""
    return root / f"{STEPS}{step:08d}"


def remove_old(root: Path, *, keep: int, prefix: str = STEPS, spare: Collection[Path] = ()) -> None:
    """Remove all but `keep` checkpoints under `root`: the newest, those to `spare`, and of the others the newest.

    Those that lack a file, or have one of another size than the manifest says, count for none and stay.
    """
    whole = [folder for folder in checkpoints(root, prefix) if _has_all(folder)]
    others = [folder for folder in whole[1:] if folder not in spare]
    staying = max(keep - len(whole) + len(others), 0)
    for old in others[staying:]:
        remove_folder(old)


def checkpoints(root: Path, prefix: str = STEPS) -> list[Path]:
    """Return the folders of checkpoints under `root`, the newest first: their names are `prefix` and a number."""
    numbers = {path: path.name.removeprefix(prefix) for path in root.glob(f"{prefix}*") if path.is_dir()}
    return sorted((p for p, n in numbers.items() if n.isdecimal()), key=lambda p: int(numbers[p]), reverse=True)


def _has_all(folder: Path) -> bool:
    """Return whether the files of a checkpoint are there, in their sizes."""
    try:
        verify_files(folder, read_manifest(folder)["files"], ())
    except CheckpointError:
        return False
    return True
