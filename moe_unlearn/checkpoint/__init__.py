"""Checkpoints that are either complete, with the bits that were written, or not used at all.

    states     of one process: `commit(root, step, states)`, `load`, `latest`
    sharded    of any number of ranks: `save(folder, tree)`, `load`, `commit`; imported by itself, since it needs
               torch.distributed

Both write a manifest of sizes and SHA-256 digests beside their files, and one whole folder (`files`). Nothing is
pickled: tensors are stored as safetensors, everything else as JSON.
"""

from moe_unlearn.checkpoint.manifest import FORMAT, CheckpointError, latest, remove_old, verify
from moe_unlearn.checkpoint.states import commit, load, load_state, random_state, save_state, set_random_state

__all__ = [
    "FORMAT",
    "CheckpointError",
    "commit",
    "latest",
    "load",
    "load_state",
    "random_state",
    "remove_old",
    "save_state",
    "set_random_state",
    "verify",
]
