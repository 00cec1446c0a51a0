"""The project's sources without anything built, for builds that leave the checkout as it is."""

import shutil
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def copy_sources(folder: Path) -> Path:
    """Copy them into `folder`, which exists and is returned."""
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    for name in ("csrc", "moe_unlearn", "triton_kernels"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("_C_*", "__pycache__"))
    return folder
