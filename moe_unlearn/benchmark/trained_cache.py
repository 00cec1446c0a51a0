"""Cache of trained models on disk; each is complete and checked against its checksums, or not there at all."""

import hashlib
import json
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

MANIFEST = "manifest.json"
BUILDING = ".building-"


def cache_folder(cache_dir: str | Path | None = None) -> Path:
    """Return the folder of trained models: `cache_dir`, else $MOE_UNLEARN_CACHE, else ~/.cache/moe-unlearn."""
    return Path(cache_dir or os.environ.get("MOE_UNLEARN_CACHE") or Path.home() / ".cache" / "moe-unlearn")


def clean_cache(cache_dir: str | Path | None = None) -> int:
    """Remove the cached models and unfinished ones, and nothing else; return how many finished ones there were."""
    for unfinished in cache_folder(cache_dir).glob(f"{BUILDING}*"):  # left by processes that were killed
        shutil.rmtree(unfinished, ignore_errors=True)
    manifests = list(cache_folder(cache_dir).glob(f"*/{MANIFEST}"))
    for manifest in manifests:
        shutil.rmtree(manifest.parent)
    return len(manifests)


def ensure(entry: Path, build: Callable[[Path], None]) -> None:
    """Make `entry` hold what `build` writes, unless it does already and matches its checksums."""
    problem = damage(entry)
    if problem is None:
        return
    if entry.exists():
        warnings.warn(f"cached model {entry} is damaged ({problem}); it is trained again", stacklevel=4)
    entry.parent.mkdir(parents=True, exist_ok=True)
    # built beside the entry and then renamed, so that a reader never sees half a model
    with tempfile.TemporaryDirectory(dir=entry.parent, prefix=BUILDING) as building:
        folder = Path(building) / entry.name
        folder.mkdir()
        build(folder)
        (folder / MANIFEST).write_text(json.dumps(_checksums(folder), indent=1), encoding="utf-8")
        if damage(entry) is not None:  # unless another process was faster
            shutil.rmtree(entry, ignore_errors=True)
            os.replace(folder, entry)


def damage(entry: Path) -> str | None:
    try:
        recorded = json.loads((entry / MANIFEST).read_text("utf-8"))
    except (OSError, ValueError):
        return f"no readable {MANIFEST}"
    present = _checksums(entry)
    wrong = sorted(file for file in recorded.keys() | present if recorded.get(file) != present.get(file))
    return f"{', '.join(wrong)} differ from {MANIFEST}" if wrong else None


def _checksums(folder: Path) -> dict[str, str]:
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.name != MANIFEST)
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}
