"""Checkpoints of one process: named states, each a pair of files.

A commit writes its files and their manifest into one whole folder, `step-00000042`; older checkpoints are removed only
after that. Reading verifies sizes, then digests; the newest complete checkpoint is used, and a broken one is reported.
"""

import hashlib
import json
import random
from pathlib import Path

import numpy as np
import torch

from moe_unlearn.checkpoint import tree
from moe_unlearn.checkpoint.manifest import (
    FORMAT,
    CheckpointError,
    describe,
    folder_of,
    remove_old,
    verify,
    write_manifest,
)
from moe_unlearn.checkpoint.sealed import read_sealed
from moe_unlearn.checkpoint.tensor_file import kind_of, tensor_file
from moe_unlearn.files import remove_unfinished, whole_folder, write_text

_STATE = "moe-unlearn state 2"


def save_state(folder: Path, name: str, state: object) -> None:
    """Write nested dicts, lists, tensors and JSON values as `name.safetensors` and `name.json`, each of them whole.

    The first has a digest of its tensors and of the second.
    """
    tensors: dict[str, torch.Tensor] = {}

    def add(path: tree.Path, value: object) -> str:
        if not isinstance(value, torch.Tensor):
            raise TypeError(f"a checkpoint holds dicts, lists, tensors and JSON values; got {type(value).__name__}")
        key = str(len(tensors))
        tensors[key] = value
        return key

    parts = json.dumps(tree.split(state, add))
    kinds = {key: kind_of(tensor) for key, tensor in tensors.items()}
    about = {"format": _STATE, "json": hashlib.sha256(parts.encode()).hexdigest()}
    with tensor_file(folder / f"{name}.safetensors", kinds, about, sealed=True) as write:
        for key, tensor in tensors.items():
            write(key, tensor)
    write_text(folder / f"{name}.json", parts)


def load_state(folder: Path, name: str) -> object:
    """Read what `save_state` wrote; raise CheckpointError if a file is missing, malformed or not what was written."""
    remedy = "a checkpoint that is saved from now on has one"
    try:
        parts = (folder / f"{name}.json").read_bytes()
        tensors, about = read_sealed(folder / f"{name}.safetensors", _STATE, former=None, remedy=remedy)
        digest = hashlib.sha256(parts).hexdigest()
        if about.get("json", digest) != digest:  # earlier versions have none
            raise ValueError(f"damaged: {name}.json does not match its SHA-256")
        return tree.join(json.loads(parts), lambda key, _: tensors[key])
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{folder / name}: not a saved state: {error}") from error


def commit(root: str | Path, step: int, states: dict[str, object], *, keep: int = 2) -> Path:
    """Write `states` (name -> a state for `save_state`) as the checkpoint of `step`; keep the newest `keep`.

    Nothing is visible under the final name before every byte is on disk; what an interrupted commit leaves, the next
    one removes.
    """
    root = Path(root)
    remove_unfinished(root, former=".tmp-")
    final = folder_of(root, step)
    with whole_folder(final) as folder:
        for name, state in states.items():
            save_state(folder, name, state)
        files = {path.name: describe(path) for path in sorted(folder.iterdir())}
        write_manifest(folder, {"format": FORMAT, "step": step, "states": sorted(states)}, files)
    remove_old(root, keep=keep)
    return final


def load(folder: str | Path) -> tuple[int, dict[str, object]]:
    """Verify a checkpoint and return its (step, states); one of ranks is read by `sharded.load`."""
    folder = Path(folder)
    manifest = verify(folder)
    if manifest["format"] != FORMAT:
        raise CheckpointError(f"{folder}: expected format {FORMAT!r}; got {manifest['format']!r}: see `sharded.load`")
    return manifest["step"], {name: load_state(folder, name) for name in manifest["states"]}


def random_state() -> dict:
    """Return the states of the default generators of Python, NumPy and torch as JSON values, for a bitwise resume."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    kind, keys, *rest = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": [kind, np.asarray(keys).tolist(), *rest],
        "cpu": torch.get_rng_state().tolist(),
        "cuda": [state.tolist() for state in cuda],
    }


def set_random_state(state: dict) -> None:
    """Restore a state that `random_state` returned; of another number of GPUs, that of those that are here."""
    version, inside, gauss = state["python"]
    random.setstate((version, tuple(inside), gauss))
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, np.array(keys, np.uint32), *rest))
    torch.set_rng_state(torch.tensor(state["cpu"], dtype=torch.uint8))
    devices = torch.cuda.device_count() if torch.cuda.is_available() else 0
    for device, values in enumerate(state["cuda"][:devices]):
        torch.cuda.set_rng_state(torch.tensor(values, dtype=torch.uint8), device)
