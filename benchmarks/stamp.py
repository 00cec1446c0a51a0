"""Stamp a result with where and from what it was measured, and tell whether it still stands.

    python -m benchmarks.stamp      every stamped result under benchmarks/results/, fresh or stale

A result measured on a GPU is a JSON file with the stamp under "stamp". It is stale once any kernel source differs
from those that were measured.
"""

import hashlib
import json
import platform
import subprocess
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
_SOURCES = {"triton_kernels": (".py",), "csrc": (".cpp", ".cu", ".cuh", ".h", ".hpp")}
_ON_GPUS_ALONE = ("triton_kernels/", "csrc/cuda/")


def kernel_sources_hash(
    root: Path = ROOT, *, device: str = "cuda", folders: Sequence[str] = ("triton_kernels", "csrc")
) -> str:
    """Return the sha256 over path and content of every kernel source in `folders`.

    For "cpu", sources that never run there are left out: triton_kernels/ and csrc/cuda/.
    """
    digest = hashlib.sha256()
    for folder in folders:
        for path in sorted(p for p in (root / folder).rglob("*") if p.suffix in _SOURCES[folder]):
            name = path.relative_to(root).as_posix()
            if device == "cpu" and name.startswith(_ON_GPUS_ALONE):
                continue
            content = path.read_bytes()
            digest.update(f"{name}\0{len(content)}\0".encode())
            digest.update(content)
    return digest.hexdigest()


def stamp() -> dict[str, Any]:
    """Return device, driver, versions, commit and the hash of the kernel sources, as this process sees them."""
    import torch

    on_gpu = torch.cuda.is_available()
    return {
        "device": torch.cuda.get_device_name() if on_gpu else platform.processor() or platform.machine(),
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") if on_gpu else None,
        "cuda": torch.version.cuda if on_gpu else None,
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in ("torch", "triton", "transformers", "moe-unlearn")},
        "commit": _output("git", "-C", str(ROOT), "rev-parse", "HEAD"),
        "uncommitted_changes": bool(_output("git", "-C", str(ROOT), "status", "--porcelain")),
        "kernel_sources": kernel_sources_hash(),
    }


def folder_of(device: str) -> str:
    """Return the folder's name for a device: "NVIDIA H200" gives "nvidia-h200"."""
    return "-".join(device.lower().replace("/", " ").split())


def stale(result: dict[str, Any], root: Path = ROOT) -> bool:
    """Return whether the kernel sources differ from those the result was measured with."""
    return result["stamp"]["kernel_sources"] != kernel_sources_hash(root)


def stamped_results(results: Path = RESULTS) -> dict[Path, dict[str, Any]]:
    """Return every result that carries a stamp, by path."""
    contents = {path: json.loads(path.read_text(encoding="utf-8")) for path in sorted(results.rglob("*.json"))}
    return {path: c for path, c in contents.items() if isinstance(c, dict) and "stamp" in c}


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _output(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def main() -> int:
    found = stamped_results()
    for path, result in found.items():
        measured = result["stamp"]
        state = "STALE" if stale(result) else "fresh"
        print(f"{state}  {path.relative_to(ROOT)}  {measured['device']}, commit {measured['commit']}")
    if not found:
        print("no stamped results")
    return int(any(map(stale, found.values())))


if __name__ == "__main__":
    sys.exit(main())
