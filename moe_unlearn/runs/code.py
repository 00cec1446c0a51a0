"""Tells the code of a run apart from other code: two commits may have one version."""

import functools
import hashlib
import importlib.util
import subprocess
from pathlib import Path

from moe_unlearn import __version__

_PACKAGE = Path(__file__).resolve().parent.parent


@functools.cache
def code() -> str:
    """Return the version of this package, and a digest of its Python and Triton sources as they are on the disk.

    Compiled kernels do not count: of the same sources they differ from machine to machine.
    """
    digest = hashlib.sha256()
    for name, path in sorted(_sources().items()):
        content = path.read_bytes()
        digest.update(f"{name}\0{len(content)}\0".encode() + content)
    return f"{__version__}, sources {digest.hexdigest()[:16]}"


def _sources() -> dict[str, Path]:
    """Return the source files by their names in an installed package; in a clone, Triton's kernels lie beside it."""
    kernels = importlib.util.find_spec("moe_unlearn.triton_kernels")  # which are not imported
    folders = {"": _PACKAGE}
    if kernels is not None and kernels.origin is not None:
        folders["triton_kernels/"] = Path(kernels.origin).parent
    return {
        prefix + path.relative_to(root).as_posix(): path
        for prefix, root in folders.items()
        for path in root.rglob("*.py")
    }


def commit() -> str | None:
    """Return the commit where the package lies in a clone of its own repository; None elsewhere."""
    clone = _PACKAGE.parent
    if not (clone / ".git").exists():
        return None
    command = ["git", "-C", str(clone), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
