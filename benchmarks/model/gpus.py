"""Hold the constants of the model: what a GPU sustains, and what its tiles pay beside their products.

No constant belongs to one figure. Rates come from data sheets and measurements, as `sources` says. The three constants
below them were fitted together, on `published.FITTED` alone: of UNHIDDEN in 0.4, 0.5 ... 0.8, FIRST_LOAD in 0.2, 0.5,
0.8, 1.2 us and BLOCK_START in 0.5, 1, 1.5, 2 us those with the least greatest error (12 %; BLOCK_START hardly matters
there). `published.CHECKED` was left out of it. A change here is a commit of its own, without a kernel.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

# the part of the shorter of two times, of products and of memory, that the longer one does not hide
UNHIDDEN = 0.7
# seconds from the start of a tile until its first operands are there
FIRST_LOAD = 0.5e-6
# seconds that a block which computes a single tile takes to start and to end
BLOCK_START = 1.0e-6
# seconds of a load whose address another load brings: between a hit in L2 (0.15 us on Hopper) and a miss (0.35 us)
DEPENDENT_LOAD = 0.3e-6
# seconds between two kernels of one stream or graph on the GPU: 1 to 2 us are usual
LAUNCH = 2.0e-6
# seconds of the host for a launch by torch: ten eager launches of routing take about 100 us
HOST_LAUNCH = 10.0e-6


@dataclass(frozen=True)
class Gpu:
    """Describes what one GPU sustains.

    flops: FLOP/s of dense bfloat16 products at the clock that its power allows; memory: bytes/s that a copy reads and
    writes; supply: bytes/s from L2 into one multiprocessor; special: exponentials or divisions a second of one
    multiprocessor; shared_bytes: of one multiprocessor.
    """

    name: str
    architecture: str  # as the ledger has it
    multiprocessors: int
    flops: float
    memory: float
    supply: float
    special: float
    shared_bytes: int
    sources: Mapping[str, str]
    registers: int = 65_536

    @property
    def tensor(self) -> float:
        """Return the FLOP/s of one multiprocessor."""
        return self.flops / self.multiprocessors


# measured of the data sheet's bandwidth, by a copy on an H200: 4.3 of 4.8 TB/s
_COPY = 4.3 / 4.8
_SPECIAL = "16 a clock: CUDA C++ programming guide, throughput of arithmetic instructions"

H200 = Gpu(
    "H200",
    "sm_90",
    multiprocessors=132,
    flops=790e12,
    memory=4.3e12,
    supply=38 * 1.755e9,
    special=16 * 1.755e9,
    shared_bytes=228 * 1024,
    sources={
        "flops": "measured on an H200, of 989 TFLOP/s of the data sheet; Liger's products there: 788 to 791",
        "memory": "measured on an H200, of 4.8 TB/s of the data sheet",
        "supply": "38 bytes a clock at 1.755 GHz, the upper end of the 28 to 38 that microbenchmarks of this chip "
        "found: a published product that shares nothing between blocks needs 35 (fast.cu, kernel 6)",
        "special": _SPECIAL,
    },
)
H100 = replace(
    H200,
    name="H100",
    memory=3.35e12 * _COPY,
    sources={
        **H200.sources,
        "flops": "as of the H200, whose chip and power limit it has (SXM); cuBLAS there: 741 to 798 (fast.cu)",
        "memory": "3.35 TB/s of the data sheet, and the H200's part of it",
    },
)
A100 = Gpu(
    "A100",
    "sm_80",
    multiprocessors=108,
    flops=270e12,
    memory=2.039e12 * _COPY,
    supply=5.414e12 / 108,
    special=16 * 1.41e9,
    shared_bytes=164 * 1024,
    sources={
        "flops": "cuBLAS, float16, 8192 x 8192 x 8192: 273 (triton-lang/triton#743), of 312 TFLOP/s of the data sheet",
        "memory": "2.039 TB/s of the data sheet (SXM, 80 GB), and the H200's part of it",
        "supply": "3840 bytes a clock of all at 1.41 GHz, by cp.async (smallscientist1/cuda_microbenchmark)",
        "special": _SPECIAL,
    },
)
GPUS = {gpu.name.lower(): gpu for gpu in (H200, H100, A100)}
# what is asked for and not there
UNKNOWN = {"b200": "no published figure of what its L2 supplies to a multiprocessor was found"}


def named(device: str) -> Gpu | None:
    """Return the GPU that a driver's name means, such as "NVIDIA H200", or None where it is not known here."""
    words = re.split(r"[^a-z0-9]+", device.lower())
    return next((gpu for name, gpu in GPUS.items() if name in words), None)
