"""Checkpoints that are either complete, with the bits that were written, or not used at all.

A commit writes its files and a manifest of their sizes and SHA-256 digests into one whole folder, `step-00000042`;
older checkpoints are removed only after that. Reading verifies sizes, then digests; the newest complete checkpoint is
used, and a broken one is reported. Nothing is pickled: tensors are stored as safetensors, everything else as JSON.
"""

import hashlib
import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from moe_unlearn.files import read_sealed, remove_unfinished, whole_file, whole_folder, write_sealed, write_text

FORMAT = "moe-unlearn checkpoint 1"
_MANIFEST = "manifest"
_TENSOR = "__tensor__"


class CheckpointError(ValueError):
    """A checkpoint differs from what was written; the message names the file and the difference."""


def save_state(folder: Path, name: str, state: object) -> None:
    """Write nested dicts, lists, tensors and JSON values as `name.safetensors` and `name.json`, each of them whole."""
    tensors: dict[str, torch.Tensor] = {}
    tree = _split(state, tensors)
    with whole_file(folder / f"{name}.safetensors") as unfinished:
        save_file(tensors, unfinished)
    write_text(folder / f"{name}.json", json.dumps(tree))


def load_state(folder: Path, name: str) -> object:
    """Read what `save_state` wrote; raise CheckpointError if a file is missing or malformed."""
    try:
        tree = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
        tensors = load_file(folder / f"{name}.safetensors")
        return _join(tree, tensors)
    except (OSError, ValueError, KeyError, RecursionError, SafetensorError) as error:
        raise CheckpointError(f"{folder / name}: not a saved state: {error}") from error


def commit(root: str | Path, step: int, states: dict[str, object], *, keep: int = 2) -> Path:
    """Write `states` (name -> a state for `save_state`) as the checkpoint of `step`; keep the newest `keep`.

    Nothing is visible under the final name before every byte is on disk; what an interrupted commit leaves, the next
    one removes.
    """
    root = Path(root)
    remove_unfinished(root, former=".tmp-")
    final = root / f"step-{step:08d}"
    with whole_folder(final) as folder:
        for name, state in states.items():
            save_state(folder, name, state)
        files = {path.name: _describe(path) for path in sorted(folder.iterdir())}
        manifest = {"format": FORMAT, "step": step, "states": sorted(states), "files": files}
        # sealed, so that a flipped bit in the manifest is noticed too
        write_sealed(folder / _MANIFEST, json.dumps(manifest, indent=1).encode())
    for old in _checkpoints(root)[keep:]:
        shutil.rmtree(old)
    return final


def verify(folder: str | Path) -> dict[str, Any]:
    """Check the files of a checkpoint against their recorded sizes and digests; return its manifest.

    Raises CheckpointError if they differ.
    """
    folder = Path(folder)
    try:
        manifest: dict[str, Any] = json.loads(read_sealed(folder / _MANIFEST))
        if manifest["format"] != FORMAT:
            raise CheckpointError(f"{folder}: expected format {FORMAT!r}; got {manifest['format']!r}")
        for name, described in manifest["files"].items():
            _verify_file(folder, name, described["size"], described["sha256"])
    except CheckpointError:
        raise
    except (OSError, KeyError, TypeError, AttributeError, ValueError) as error:
        raise CheckpointError(f"{folder}: no readable manifest: {error!r}") from error
    return manifest


def load(folder: str | Path) -> tuple[int, dict[str, object]]:
    """Verify a checkpoint and return its (step, states)."""
    folder = Path(folder)
    manifest = verify(folder)
    return manifest["step"], {name: load_state(folder, name) for name in manifest["states"]}


def latest(root: str | Path) -> Path | None:
    """Return the newest complete checkpoint under `root`; skip broken ones with a warning, without removing them."""
    for folder in _checkpoints(Path(root)):
        try:
            verify(folder)
            return folder
        except CheckpointError as error:
            warnings.warn(f"skipping a broken checkpoint: {error}", stacklevel=2)
    return None


def random_state() -> dict:
    """Return the state of torch's default CPU and CUDA generators, for a bitwise resume."""
    cuda = [t for t in torch.cuda.get_rng_state_all()] if torch.cuda.is_available() else []
    return {"cpu": torch.get_rng_state(), "cuda": cuda}


def set_random_state(state: dict) -> None:
    """Restore a state that `random_state` returned."""
    torch.set_rng_state(state["cpu"])
    if state["cuda"]:
        torch.cuda.set_rng_state_all(state["cuda"])


def _checkpoints(root: Path) -> list[Path]:
    return sorted((p for p in root.glob("step-*") if p.is_dir()), reverse=True)


def _verify_file(folder: Path, name: str, size: int, sha256: str) -> None:
    path = folder / name
    if Path(name).name != name or path.is_symlink() or not path.is_file():
        raise CheckpointError(f"{folder}: file {name!r} is missing or not a plain file")
    if path.stat().st_size != size:
        raise CheckpointError(f"{path}: expected {size} bytes; got {path.stat().st_size}")
    if _describe(path)["sha256"] != sha256:
        raise CheckpointError(f"{path}: content does not match its recorded SHA-256")


def _describe(path: Path) -> dict:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"size": path.stat().st_size, "sha256": digest}


def _split(value: object, tensors: dict[str, torch.Tensor]) -> object:
    """Replace tensors by names; dicts become lists of pairs, so that integer keys, which optimizers use, survive."""
    if isinstance(value, torch.Tensor):
        name = str(len(tensors))
        tensors[name] = value.detach().cpu().clone(memory_format=torch.contiguous_format)
        return {_TENSOR: name}
    if isinstance(value, dict):
        return {"__dict__": [[key, _split(item, tensors)] for key, item in value.items()]}
    if isinstance(value, tuple):
        return {"__tuple__": [_split(item, tensors) for item in value]}
    if isinstance(value, list):
        return [_split(item, tensors) for item in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"a checkpoint holds dicts, lists, tensors and JSON values; got {type(value).__name__}")


def _join(tree: object, tensors: dict[str, torch.Tensor]) -> object:
    if isinstance(tree, list):
        return [_join(item, tensors) for item in tree]
    if not isinstance(tree, dict):
        return tree
    if _TENSOR in tree:
        return tensors[tree[_TENSOR]]
    if "__tuple__" in tree:
        return tuple(_join(item, tensors) for item in tree["__tuple__"])
    return {key: _join(item, tensors) for key, item in tree["__dict__"]}
