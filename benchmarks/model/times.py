"""Predict the time of a kernel from its tile, its shapes and the bytes that it moves.

A tile of a product takes, for each step through its depth, the longer of two times: that of its FLOP on the tensor
cores of a multiprocessor, and that of its operands on the way from L2. Blocks of a cluster share the operand of their
columns. Before the first step it waits for its first operands, after the last it stores its results; neither is
hidden, unless another tile is in flight on the multiprocessor. Tiles are given to whichever place is free first, and
the last ones leave others idle. The kernel takes the longer of that time and of memory's, and a part of the shorter.

    tile    = steps max(flop / tensor, bytes / supply) + FIRST_LOAD + dependent loads
              + max(stored / supply, special functions / special)
    kernel  = LAUNCH + max(tiles, memory) + UNHIDDEN min(tiles, memory)
"""

import heapq
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from benchmarks.model.gpus import BLOCK_START, DEPENDENT_LOAD, FIRST_LOAD, HOST_LAUNCH, LAUNCH, UNHIDDEN, Gpu

BFLOAT16 = 2
# of wgmma's rate, where a compiler multiplies by mma.sync: 62 % on Hopper (arXiv 2402.13499)
MMA_ON_HOPPER = 0.62


class Seconds(NamedTuple):
    """Parts of a predicted time, which add up to it.

    useful: of the FLOP that count on all tensor cores; padding: of those that do not; supply: waiting for L2; exposed:
    before the first and after the last step of tiles; tail: multiprocessors without a tile; memory: not hidden.
    """

    useful: float = 0.0
    padding: float = 0.0
    supply: float = 0.0
    exposed: float = 0.0
    tail: float = 0.0
    memory: float = 0.0
    launch: float = 0.0

    @property
    def total(self) -> float:
        """Return the seconds of the kernel."""
        return math.fsum(self)


class Kernel(Protocol):
    """One launch."""

    def seconds(self, gpu: Gpu) -> Seconds:
        """Predict its time."""


class Problem(NamedTuple):
    """`count` products of rows x depth by depth x columns."""

    rows: int
    columns: int
    depth: int
    count: int = 1


@dataclass(frozen=True)
class Tile:
    """How a kernel cuts its products.

    in_flight: tiles that a multiprocessor works at, by blocks that fit or by warp groups that take turns; cluster:
    blocks that share the operand of their columns; alone: whether the row tiles of a problem that fill no cluster share
    nothing; persistent: whether a block computes tile after tile; loads: those that follow one another before the first
    operands can be asked for; rate: part of the tensor cores' rate.
    """

    rows: int
    columns: int
    depth: int = 64
    in_flight: int = 1
    cluster: int = 1
    alone: bool = False
    persistent: bool = True
    loads: int = 0
    rate: float = 1.0

    def step(self, gpu: Gpu, *, shared: bool = True) -> tuple[float, float]:
        """Return the seconds of a step through the depth: of the tensor cores alone, and with L2's supply."""
        tensor = 2 * self.rows * self.columns * self.depth / (gpu.tensor * self.rate)
        operands = BFLOAT16 * self.depth * (self.rows + self.columns / (self.cluster if shared else 1))
        return tensor, max(tensor, operands / gpu.supply)

    def cut(self, problem: Problem) -> list[tuple[int, bool]]:
        """Return how many tiles a problem has whose blocks share an operand, and how many whose blocks do not."""
        down, across = math.ceil(problem.rows / self.rows), math.ceil(problem.columns / self.columns) * problem.count
        over = down % self.cluster if self.alone else 0
        return [((down - over) * across, True), (over * across, False)]

    def exposed(self, gpu: Gpu, stored: float, special: float) -> float:
        """Return the seconds of a tile outside its steps; stored, special: bytes and functions for each element."""
        start = FIRST_LOAD + self.loads * DEPENDENT_LOAD + (0 if self.persistent else BLOCK_START)
        return start + self.rows * self.columns * max(stored / gpu.supply, special / gpu.special)


@dataclass(frozen=True)
class Product:
    """A launch that multiplies.

    stored: bytes of an epilogue for each element of a tile; moved: bytes between memory and the GPU; programs: those
    of a persistent kernel, where they are fewer than the multiprocessors; special: exponentials and divisions of an
    epilogue for each element of a tile.
    """

    name: str
    tile: Tile
    problems: Sequence[Problem]
    stored: float
    moved: float
    programs: int | None = None
    special: float = 0.0

    @property
    def flops(self) -> float:
        """Return the FLOP that count."""
        return sum(2.0 * p.rows * p.columns * p.depth * p.count for p in self.problems)

    def seconds(self, gpu: Gpu) -> Seconds:
        """Predict the time of the launch; its parts are means over all multiprocessors."""
        tile, places = self.tile, (self.programs or gpu.multiprocessors) * self.tile.in_flight
        exposed = tile.exposed(gpu, self.stored, self.special)
        padded = loops = 0.0
        tiles: list[tuple[int, float]] = []
        for problem in self.problems:
            steps = math.ceil(problem.depth / tile.depth)
            for count, shared in tile.cut(problem):
                tensor, supplied = tile.step(gpu, shared=shared)
                padded += count * steps * tensor
                loops += count * steps * supplied
                tiles += [(count, steps * supplied)] if count else []
        if sum(count for count, _ in tiles) <= places // tile.in_flight:
            tiles = [(count, loop + exposed) for count, loop in tiles]  # each has a multiprocessor for itself
        else:
            tiles = [(count, max(tile.in_flight * loop, loop + exposed)) for count, loop in tiles]
        busy = sum(count * taken for count, taken in tiles) / (gpu.multiprocessors * tile.in_flight)
        useful = self.flops / gpu.flops
        padded, loops = padded / gpu.multiprocessors, loops / gpu.multiprocessors
        span, memory = makespan(tiles, places), self.moved / gpu.memory
        whole = max(span, memory) + UNHIDDEN * min(span, memory)
        return Seconds(useful, padded - useful, loops - padded, busy - loops, span - busy, whole - span, LAUNCH)


@dataclass(frozen=True)
class Stream:
    """A launch that only moves bytes, and waits for loads that follow one another."""

    name: str
    moved: float
    loads: int = 0

    def seconds(self, gpu: Gpu) -> Seconds:
        """Predict the time of the launch."""
        return Seconds(exposed=self.loads * DEPENDENT_LOAD, memory=self.moved / gpu.memory, launch=LAUNCH)


def makespan(tiles: Sequence[tuple[int, float]], places: int) -> float:
    """Return when the last of the tiles (how many, seconds of each) ends; each goes to the place that is free first."""
    if len(tiles) == 1:
        count, seconds = tiles[0]
        return math.ceil(count / places) * seconds
    ends = [0.0] * places
    for count, seconds in tiles:
        for _ in range(count):
            heapq.heapreplace(ends, ends[0] + seconds)
    return max(ends)


def together(kernels: Iterable[Kernel], gpu: Gpu, *, graph: bool = True) -> Seconds:
    """Predict the time of kernels one after the other; without a graph the host's launches may take longer."""
    times = [kernel.seconds(gpu) for kernel in kernels]
    found = Seconds(*map(math.fsum, zip(*times, strict=True)))
    waiting = 0.0 if graph else max(0.0, len(times) * HOST_LAUNCH - found.total)
    return found._replace(launch=found.launch + waiting)
