"""The project's sources: where they lie, a copy without anything built, and those that a step runs."""

import shutil
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
STEP = (
    "step/unlearn",
    "step/checks",
    "step/tally",
    "step/dual",
    "step/gradients",
    "step/factors",
    "step/sinks",
    "step/sharded",
    "sharding/rows",
    "sharding/engine",
    "step/objectives",
    "step/weights",
    "step/routers",
    "routers/kept",
    "view",
    "optim",
    "offload",
    "optim_state",
    "losses",
    "expert_state",
    "experts",
    "model/admissible",
    "model/batch_sets",
    "model/batches",
    "model/head",
    "model/states",
    "ranks",
    "prepare/rows",
    "model/digest",
)
OPS = (
    "route",
    "expert_mlp",
    "expert_wgrad",
    "token_loss",
    "tiled/token_loss",
    "masked_update",
    "moments",
    "gram",
    "bits",
    "checks",
)


def copy_sources(folder: Path) -> Path:
    """Copy what a build needs into `folder`, which exists and is returned."""
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    for name in ("csrc", "moe_unlearn", "triton_kernels"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("_C_*", "__pycache__"))
    return folder


def sources_of_the_step() -> list[Path]:
    """Return the files whose functions a fused step calls."""
    paths = [ROOT / "moe_unlearn" / f"{name}.py" for name in STEP]
    paths += [ROOT / "moe_unlearn" / "ops" / f"{name}.py" for name in OPS]
    return paths + sorted((ROOT / "triton_kernels").glob("*.py"))
