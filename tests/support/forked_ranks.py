"""Forked processes that are the ranks of a gloo group: they import nothing again.

A fork has what its process has read and made so far, without its threads. That is safe where torch has no GPU:
autograd's engine then has no threads, and ranks compute with one. What a fresh interpreter reads when it starts is for
tests that start one, as those of torchrun do.
"""

import datetime
import json
import os
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate.state import AcceleratorState
from torch import distributed

from moe_unlearn import backend


def found_on(count: int, folder: Path, act: Callable[[int], object]) -> list:
    """Return what `act(rank)` returns on each of `count` ranks, as JSON has it; all must end well.

    They meet in `folder`, which is made if it is not there; see `run_forked`.
    """

    def kept(rank: int) -> None:
        (folder / f"rank{rank}.json").write_text(json.dumps(act(rank)), encoding="utf-8")

    folder.mkdir(exist_ok=True)
    ended = run_forked(count, folder, kept)
    assert ended == [0] * count, "\n".join(path.read_text(encoding="utf-8") for path in folder.glob("error*"))
    return [json.loads((folder / f"rank{rank}.json").read_text(encoding="utf-8")) for rank in range(count)]


def run_forked(count: int, folder: Path, act: Callable[[int], object], patience: float = 300) -> list[int]:
    """Return how `act(rank)` ended on each of `count` ranks of a group: 0, 1 after an exception, or minus a signal.

    An exception is written to `folder/error{rank}`. The ranks meet in `folder`, which no other group may use, and wait
    `patience` seconds for one another.
    """

    def joined(rank: int) -> None:
        # a store rather than a file:// URL, which ends at a "?" or "#" of the folder's name
        store = distributed.FileStore(str(folder / "meet"), count)
        timeout = datetime.timedelta(seconds=patience)
        distributed.init_process_group("gloo", store=store, rank=rank, world_size=count, timeout=timeout)
        act(rank)
        distributed.barrier()

    return launched(count, folder, joined)


def launched(count: int, folder: Path, act: Callable[[int], object]) -> list[int]:
    """Return how `act(rank)` ended, as `run_forked` does, in processes that no group has joined yet."""
    backend.unusable("cpu")  # imports the kernels, which every fork would do for itself
    children = [os.fork() or _live(rank, count, folder, act) for rank in range(count)]
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def _live(rank: int, count: int, folder: Path, act: Callable[[int], object]) -> int:
    status = 1
    try:
        torch.set_num_threads(1)  # the threads of an OpenMP pool do not survive a fork
        # what torchrun sets, and what accelerate keeps of it
        launch = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
        os.environ.update({key: str(value) for key, value in launch.items()})
        AcceleratorState._reset_state(reset_partial_state=True)
        act(rank)
        status = 0
    except BaseException:
        (folder / f"error{rank}").write_text(traceback.format_exc(), encoding="utf-8")
    finally:
        os._exit(status)
