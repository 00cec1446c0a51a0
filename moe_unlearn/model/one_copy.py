"""Keeps memory of the CPU to what is in use: weights are loaded without a second copy, and freed blocks given back."""

import ctypes
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from transformers import modeling_utils

from moe_unlearn.sharding import is_sharded

BLOCK = 1 << 22  # elements that are added at a time
# of glibc's mallopt
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_IN_TURN = "HF_DEACTIVATE_ASYNC_LOAD"  # what transformers looks up in the environment


@contextmanager
def read_in_turn() -> Iterator[None]:
    """Have transformers read each weight from its file when its turn comes.

    It maps files otherwise, and a mapping, with the pages of all that was read, stays as long as one weight is a part
    of it: the parts of experts stay resident beside the experts that were put together. Its threads, which read ahead
    as fast as they can, would fill memory with parts. A transformers that names no way of reading keeps its own.
    What is freed meanwhile leaves no holes, since glibc maps each tensor by itself.
    """
    files: Any = modeling_utils
    opened, asked = files.safe_open, os.environ.get(_IN_TURN)

    def reading(*arguments: Any, **options: Any) -> Any:
        if "backend" in options:
            options["backend"] = "pread"
        return opened(*arguments, **options)

    files.safe_open, os.environ[_IN_TURN] = reading, "1"
    _malloc(mapped=1 << 17, kept=1 << 17)
    try:
        yield
    finally:
        files.safe_open = opened
        if asked is None:
            del os.environ[_IN_TURN]
        else:
            os.environ[_IN_TURN] = asked
        # by itself glibc would come to 32 MiB, below which gradients of different sizes leave holes as large
        _malloc(mapped=1 << 22, kept=1 << 23)


def give_back() -> None:
    """Have glibc give back to the system what it keeps of freed blocks, in the heaps of all threads."""
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)


def add_up(total: Tensor, values: Tensor, factor: float = 1.0) -> Tensor:
    """Add `factor` times `values` to `total` in place, and return it; both are of one shape.

    In blocks where their dtypes differ, since such a sum begins with a copy of `values` in that of `total`. Weights
    that ranks share out, and what does not lie in one piece, are added at once.
    """
    flat = [t if t.dim() == 1 else t.view(-1) for t in (total, values) if t.dim() == 1 or t.is_contiguous()]
    if total.dtype == values.dtype or len(flat) < 2 or is_sharded(total):
        return total.add_(values, alpha=factor)
    for own, some in zip(*(t.split(BLOCK) for t in flat), strict=True):
        own.add_(some, alpha=factor)
    return total


def _malloc(*, mapped: int, kept: int) -> None:
    """Have glibc map blocks from so many bytes on, and give back the top of its heap from so many free bytes on."""
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(_MMAP_THRESHOLD, mapped)
        libc.mallopt(_TRIM_THRESHOLD, kept)
