"""Words of a mask in a file that has no name, so that they take memory only while they are read or written."""

import math
import mmap
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor


class MappedWords:
    """Hands out tensors of int32 zeros, `count` words in all, that lie in a file in `folder`.

    The file has no name: it is gone with the last of the tensors, and if the process is killed. Its place on the disk
    is taken at once. Raises OSError, naming the folder, where there is none.
    """

    def __init__(self, folder: Path, count: int):
        self._taken = 0
        size = max(count, 1) * torch.int32.itemsize  # nothing cannot be mapped
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder) as file:
                os.posix_fallocate(file.fileno(), 0, size)
                self._pages = mmap.mmap(file.fileno(), size)
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(folder)) from error
        self._words = torch.frombuffer(self._pages, dtype=torch.int32)

    def zeros(self, shape: Sequence[int]) -> Tensor:
        """Return the next words, as a tensor of zeros of this shape."""
        first, self._taken = self._taken, self._taken + math.prod(shape)
        return self._words[first : self._taken].view(*shape)

    def release(self) -> None:
        """Leave to the file what of it is resident; whoever reads it gets it back."""
        self._pages.madvise(mmap.MADV_DONTNEED)
