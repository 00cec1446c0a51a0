"""Share work between processes of one thread each."""

import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import Any

import torch


class Pool:
    """Context manager of `jobs` processes; with one job it works in this process."""

    def __init__(self, jobs: int):
        # not forked, because the caller's threads would be missing in the children
        context = multiprocessing.get_context("spawn")
        self._pool = ProcessPoolExecutor(jobs, context, torch.set_num_threads, (1,)) if jobs > 1 else None

    def __enter__(self) -> "Pool":
        return self

    def __exit__(self, *exception) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def outcomes(self, function: Callable, tasks: list[tuple]) -> Iterator[tuple[tuple, Any]]:
        """Yield (task, function(*task) or its exception) as each task ends; one failure stops no other task."""
        if self._pool is None:
            torch.set_num_threads(1)
            for task in tasks:
                yield task, _outcome(lambda task=task: function(*task))
            return
        futures = {self._pool.submit(function, *task): task for task in tasks}
        for future in as_completed(futures):
            yield futures[future], _outcome(future.result)


def _outcome(result: Callable) -> Any:
    try:
        return result()
    except Exception as error:
        return error
