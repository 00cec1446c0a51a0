"""Two processes that are the ranks of a gloo group."""

import os
import subprocess
import sys
from pathlib import Path

from torch import distributed

ROOT = Path(__file__).resolve().parents[2]


def run_two(module: str, folder: Path) -> None:
    """Run `python -m module RANK FOLDER` as ranks 0 and 1; both must end well."""
    # what torchrun sets, for accelerate
    launch = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}
    common = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **launch}
    children = []
    for rank in range(2):
        environment = common | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        command = [sys.executable, "-m", module, str(rank), str(folder)]
        children.append(subprocess.Popen(command, cwd=ROOT, env=environment))
    try:
        assert [child.wait(timeout=300) for child in children] == [0, 0]
    finally:
        for child in children:
            child.kill()


def join(rank: int, folder: Path) -> None:
    """Make this process one of the two."""
    # a store rather than a file:// URL, which ends at a "?" or "#" of the folder's name
    store = distributed.FileStore(str(folder / "meet"), 2)
    distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
