"""Forked processes that are the ranks of a gloo group: many short lives, which import nothing again."""

import datetime
import os
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
from torch import distributed


def run_forked(count: int, folder: Path, act: Callable[[int], None], patience: float = 60) -> list[int]:
    """Return how `act(rank)` ended on each of `count` ranks: 0, 1 after an exception, or minus a signal.

    An exception is written to `folder/error{rank}`. The ranks meet in `folder`, which no other group may use, and wait
    `patience` seconds for one another.
    """
    children = [os.fork() or _live(rank, count, folder, act, patience) for rank in range(count)]
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def _live(rank: int, count: int, folder: Path, act: Callable[[int], None], patience: float) -> int:
    status = 1
    try:
        torch.set_num_threads(1)  # the threads of an OpenMP pool do not survive a fork
        store = distributed.FileStore(str(folder / "meet"), count)
        timeout = datetime.timedelta(seconds=patience)
        distributed.init_process_group("gloo", store=store, rank=rank, world_size=count, timeout=timeout)
        act(rank)
        distributed.barrier()
        status = 0
    except BaseException:
        (folder / f"error{rank}").write_text(traceback.format_exc(), encoding="utf-8")
    finally:
        os._exit(status)
