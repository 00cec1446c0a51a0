"""How much memory a mask may take beside the weights: gradients of a group, and room for remembered scores.

On ranks the budget is that of each, and all have the least of what each of them has.
"""

import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from moe_unlearn.config.values import bytes_of
from moe_unlearn.ranks import Ranks, gathered
from moe_unlearn.wagle.pieces import Piece, smallest_group
from moe_unlearn.wagle.threshold import ENTRY

SHARE = 0.75  # of what is free, by default: activations take memory too
_SAMPLE = 32  # bytes of a budget for each score of a sample
_LARGEST_SAMPLE = 1 << 22
_SMALLEST_SAMPLE = 256
_ROOM = 8  # a part in so many of a budget is room, where no sample says how much is needed


@dataclass(frozen=True)
class Budget:
    """Says what of `size` bytes is for the gradients of a group, of both sides, and for remembered scores.

    `gradients` is None where those of all weights fit, so that there is one group and nothing to remember.
    """

    size: int
    least: int = 0  # the bytes of the smallest group
    gradients: int | None = None
    room: int = 0

    @property
    def sample(self) -> int:
        """Return how many scores to sample; 0 for none."""
        count = min(self.size // _SAMPLE, _LARGEST_SAMPLE)
        return count if self.gradients is not None and count >= _SMALLEST_SAMPLE else 0

    def with_room(self, scores: float) -> "Budget | None":
        """Return the budget with room for about so many scores, None if that is more than half of what may vary."""
        room = int(1.25 * scores + 64) * ENTRY
        if room > (self.size - self.least) // 2:
            return None
        return replace(self, gradients=self.size - room, room=room)


def budget_of(pieces: Sequence[Piece], memory: str | float | None, ranks: Ranks | None = None) -> Budget:
    """Return the budget of a mask of whole parameters: `memory`, in bytes or as "512MiB", or most of what is free.

    Raises ValueError, on all ranks, if `memory` is less than the smallest group takes or is no amount.
    """
    size, which = _size(pieces, memory, ranks), "free are" if memory is None else "got"
    needed = sum(piece.nbytes for piece in pieces)
    if needed <= size:
        return Budget(size)
    name, least = smallest_group(pieces)
    if size < least:
        what = "one row" if ranks is None else "a rank's rows"
        raise ValueError(
            f"memory must be at least {least} bytes, which the gradients of {what} of {name} take; {which} {size}"
        )
    room = min(size // _ROOM, size - least)
    return Budget(size, least, size - room, room)


def _size(pieces: Sequence[Piece], memory: str | float | None, ranks: Ranks | None) -> int:
    if ranks is not None:
        sizes: list[int] = gathered(partial(_size, pieces, memory, None), lambda size: size, ranks.group)[1]
        return min(sizes)
    if memory is not None:
        return bytes_of("memory", memory)
    if not pieces:
        return 0
    device = pieces[0].own.device
    here = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if device.type == "cpu" else 1  # ranks that share what is free
    return int(SHARE * free_memory(device)) // max(here, 1)


def free_memory(device: torch.device) -> int:
    """Return the bytes that a device has free, or on the CPU those that this process may still take."""
    if device.type == "cuda":
        held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + held
    if device.type != "cpu":
        return 1 << 62
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    with suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        limits.append(1024 * int(next(line for line in lines if line.startswith("MemAvailable:")).split()[1]))
    limits += left_in_groups(Path("/sys/fs/cgroup"))
    with suppress(ImportError, OSError, ValueError):
        import resource  # not on every platform

        most = resource.getrlimit(resource.RLIMIT_AS)[0]
        if most != resource.RLIM_INFINITY:
            pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
            limits.append(most - pages * os.sysconf("SC_PAGE_SIZE"))
    return max(min(limits), 0)


def left_in_groups(root: Path) -> list[int]:
    """Return the bytes that control groups leave, of version 2 and version 1, as a container sees its own."""
    left = []
    for limit, used, of in (
        ("memory.max", "memory.current", "memory.stat"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat"),
    ):
        with suppress(OSError, ValueError):  # "max" is no limit
            counts = dict(line.split() for line in (root / of).read_text(encoding="ascii").splitlines())
            # what files have left in memory counts as used, and goes as soon as memory is needed
            files = int(counts.get("total_inactive_file", counts.get("inactive_file", 0)))
            most, now = (int((root / name).read_text(encoding="ascii")) for name in (limit, used))
            left.append(most - now + files)
    return left
