"""A rank of `moe-unlearn` whose last collective ends while its process does.

torchrun --nproc-per-node 2 -m tests.support.ending_child COMMAND...

The first rank leaves a sum behind, which the second joins a second later. Then a thread of gloo drops the sum's tensor,
for which it needs the interpreter's lock, and the main thread keeps that until all exit functions have run.
"""

import atexit
import contextlib
import ctypes
import os
import runpy
import time

if __name__ == "__main__":
    # the first that is registered is the last to run; PyDLL's functions keep the lock
    atexit.register(ctypes.PyDLL(None).usleep, 3_000_000)
    atexit.register(print, "exit functions run")

import torch
from torch import distributed

destroy = distributed.destroy_process_group


def leave_a_sum():
    """Start a sum on the first rank and end its group; take part in the sum on the second."""
    if os.environ["RANK"] == "0":
        distributed.all_reduce(torch.ones(1), async_op=True)
    else:
        time.sleep(1)
        with contextlib.suppress(RuntimeError):  # the first rank may have ended
            distributed.all_reduce(torch.ones(1))
    destroy()


if __name__ == "__main__":
    distributed.destroy_process_group = leave_a_sum
    runpy.run_module("moe_unlearn", run_name="__main__")
