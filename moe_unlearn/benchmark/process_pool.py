"""A pool of processes of one thread each, for tasks too small to use several threads well."""

import multiprocessing
import signal
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from typing import Any

import torch

from moe_unlearn.progress import Bar

_STOP = -1
_steps_done: Any = None  # the counter of this worker's pool; set once, when the process starts


class Workers:
    """A pool of `processes` that report the steps they have done; a context manager.

    If the context ends with an exception, running tasks stop at their next `advance`.
    """

    def __init__(self, processes: int):
        # spawned, not forked, since a forked child lacks the caller's threads
        context = multiprocessing.get_context("spawn")
        self._steps = context.Value("q", 0)
        self._pool = ProcessPoolExecutor(processes, context, _start_worker, (self._steps,))

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, *exception: object) -> None:
        if exception[0] is not None:
            self._steps.value = _STOP
        self._pool.shutdown(cancel_futures=True)

    def run(self, title: str, function: Callable, tasks: list[tuple], total: int) -> dict[tuple, Any]:
        """Return task -> function(*task), run in the processes; `progress` shows how many of `total` steps are done."""
        self._steps.value = 0
        futures = {self._pool.submit(function, *task): task for task in tasks}
        pending = set(futures)
        with Bar(title, total, "step") as bar:
            while pending:
                finished, pending = wait(pending, timeout=0.5, return_when=FIRST_COMPLETED)
                bar.advance(self._steps.value - bar.done)
                for future in finished:
                    future.result()
        return {task: future.result() for future, task in futures.items()}


def advance(steps: int = 1) -> None:
    """Report, in a worker, that so many steps are done; raise InterruptedError if the pool has stopped."""
    with _steps_done.get_lock():
        if _steps_done.value == _STOP:
            raise InterruptedError("another run failed, or the caller was interrupted")
        _steps_done.value += steps


def _start_worker(steps: Any) -> None:
    global _steps_done
    _steps_done = steps
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal interrupts all processes; the caller stops the workers
