"""Processes that are the ranks of a gloo group."""

import os
import subprocess
import sys
from pathlib import Path

from torch import distributed

ROOT = Path(__file__).resolve().parents[2]


def run_two(module: str, folder: Path) -> None:
    """Run `python -m module RANK FOLDER` as ranks 0 and 1; both must end well."""
    run_ranks(module, folder, 2)


def run_ranks(module: str, folder: Path, count: int) -> None:
    """Run `python -m module RANK FOLDER` as `count` ranks; all must end well."""
    # what torchrun sets, for accelerate
    size = str(count)
    launch = {"WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}
    common = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **launch}
    children = []
    for rank in range(count):
        environment = common | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        command = [sys.executable, "-m", module, str(rank), str(folder)]
        children.append(subprocess.Popen(command, cwd=ROOT, env=environment))
    try:
        assert not any(child.wait(timeout=600) for child in children)
    finally:
        for child in children:
            child.kill()


def join(rank: int, folder: Path) -> None:
    """Make this process one of the ranks."""
    # a store rather than a file:// URL, which ends at a "?" or "#" of the folder's name
    count = int(os.environ["WORLD_SIZE"])
    store = distributed.FileStore(str(folder / "meet"), count)
    distributed.init_process_group("gloo", store=store, rank=rank, world_size=count)
