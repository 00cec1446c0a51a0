"""Cache of trained models on disk; each is complete and checked against its checksums, or not there at all."""

import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

from moe_unlearn.files import DAY, remove_unfinished, whole_folder, write_json

MANIFEST = "manifest.json"


def cache_folder(cache_dir: str | Path | None = None) -> Path:
    """Return the folder of trained models: `cache_dir`, else $MOE_UNLEARN_CACHE, else ~/.cache/moe-unlearn."""
    return Path(cache_dir or os.environ.get("MOE_UNLEARN_CACHE") or Path.home() / ".cache" / "moe-unlearn")


def clean_cache(cache_dir: str | Path | None = None) -> int:
    """Remove the cached models and unfinished ones, and nothing else; return how many finished ones there were."""
    remove_unfinished(cache_folder(cache_dir), former=".building-")
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
    remove_unfinished(entry.parent, seconds=DAY, former=".building-")
    # another process may be faster; its model stays
    with whole_folder(entry, stays=lambda: damage(entry) is None) as folder:
        build(folder)
        write_json(folder / MANIFEST, _checksums(folder))


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
