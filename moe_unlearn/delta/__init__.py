"""Deltas: what a run changed in the bits of a model, as a file that is written, applied and taken back.

    change     `write(base, model, out)`, `apply(base, delta, out)` and `revert(model, delta, out)`
    file       the format: `read(path)`, `Delta`
    folder     models' folders in hub layout, read without loading them: `ModelFolder`

The page beside this file says who can undo what with a delta.
"""

from moe_unlearn.delta.change import Applied, apply, revert, write
from moe_unlearn.delta.file import FORMAT, Delta, read
from moe_unlearn.delta.folder import ModelFolder

__all__ = ["FORMAT", "Applied", "Delta", "ModelFolder", "apply", "read", "revert", "write"]
