"""List kernels that others measured, with tile and shape, beside what the model says of them.

FITTED are those on which the constants of `gpus` were fitted, CHECKED the others, which were left out of that; the form
of the model, that memory and products hide each other in part, was chosen with both in view. [F] marks what was read
off a figure (3 TFLOP/s either way). A figure whose tile is not known is not here.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.model.gpus import A100, H100, Gpu
from benchmarks.model.times import Kernel, Problem, Product, Stream, Tile, together

WITHIN = 0.15
COOPERATIVE = Tile(128, 256, cluster=2)
PING_PONG = Tile(128, 192, cluster=2, in_flight=2)
ALONE = Tile(128, 256)
SQUARE = Tile(192, 192)
# those beyond WITHIN, and why; a test holds this list
MISSES = {
    "nvjet 128x256x64 2x1": "a depth of 512: stores by TMA run beside the next tile, which the model counts for none",
    "Triton, persistent, TMA": "a depth of 512: as nvjet's",
}


@dataclass(frozen=True)
class Figure:
    """One published rate, in TFLOP/s, and the launches that reached it."""

    name: str
    gpu: Gpu
    measured: float
    flops: float
    kernels: Sequence[Kernel]
    source: str

    @property
    def predicted(self) -> float:
        """Return the model's TFLOP/s."""
        return self.flops / together(self.kernels, self.gpu).total / 1e12

    @property
    def error(self) -> float:
        """Return how far the model is above the measurement, as a part of it."""
        return self.predicted / self.measured - 1


def dense(
    name: str, size: tuple[int, int, int], tile: Tile, measured: float, source: str, *, gpu=H100, programs=None
) -> Figure:
    """Return the figure of one product of rows x depth by depth x columns, (rows, columns, depth)."""
    rows, columns, depth = size
    moved = 2.0 * (rows * depth + columns * depth + rows * columns)
    kernel = Product(name, tile, [Problem(*size)], 2, moved, programs)
    return Figure(name, gpu, measured, kernel.flops, [kernel], source)


def sonic(model: str, tokens: int, hidden: int, rows: Sequence[tuple[int, int, int, int, int]]) -> list[Figure]:
    """Return SonicMoE's figures of one model; rows: (inner, experts, top_k, TFLOP/s forward, backward)."""
    found = []
    for inner, experts, top_k, forward, backward in rows:
        n, weights = tokens * top_k, 2.0 * experts * hidden * inner
        x, a, y = 2.0 * tokens * hidden, 2.0 * n * inner, 2.0 * n * hidden
        each, sums = n // experts, Stream("sum over k", y + x)
        by_inner = [Problem(each, inner, hidden, experts)]
        down = COOPERATIVE if inner >= 1024 else PING_PONG
        up = [Problem(each, 2 * inner, hidden, experts)]
        passes = {
            "forward": [
                Product("up", COOPERATIVE, up, 3, x + 2 * weights + 3 * a, special=1),
                Product("down", down, [Problem(each, hidden, inner, experts)], 2, a + weights + y),
                sums,
            ],
            "backward": [
                Product("dH", Tile(128, 128, cluster=2, in_flight=2), by_inner, 10, x + weights + 5 * a),
                Product("dW2", COOPERATIVE, [Problem(hidden, inner, each, experts)], 2, x + a + weights),
                Product(
                    "dX",
                    COOPERATIVE if inner >= 512 else PING_PONG,
                    [Problem(each, hidden, 2 * inner, experts)],
                    2,
                    2 * a + 2 * weights + y,
                ),
                Product("dW1", COOPERATIVE, [Problem(2 * inner, hidden, each, experts)], 2, x + 2 * a + 2 * weights),
                sums,
            ],
        }
        flops, name = 6.0 * n * hidden * inner, f"SonicMoE {model}, n {inner}"
        found.append(Figure(f"{name}, forward", H100, forward, flops, passes["forward"], _SONIC))
        found.append(Figure(f"{name}, backward", H100, backward, 2 * flops, passes["backward"], _SONIC))
    return found


_SONIC = "SonicMoE, arXiv 2512.14080 [F]; tiles: Dao-AILab/sonic-moe, functional/moe_config.py"
_FAST = "pranjalssh/fast.cu, README.md, H100 SXM, bfloat16"
_TLX = "facebookexperimental/triton#1038, H100; tile: tutorials/hopper_gemm_ws.py"
_TUTORIAL = "triton-lang/triton, tutorial 09-persistent-matmul.py, float16, as a user printed it of an H100"
_FIRST = (8192, 8192, 512)

FITTED = (
    *sonic("1.4B", 40960, 768, [(256, 128, 8, 336, 363), (512, 64, 4, 396, 396), (1024, 32, 2, 404, 434)]),
    *sonic("7B", 24576, 1536, [(256, 128, 8, 363, 404), (512, 64, 4, 432, 438), (1024, 32, 2, 464, 466)]),
    dense("TLX", (65536, 1024, 1024), Tile(128, 256, persistent=False), 502.3, _TLX),
    dense("TLX, persistent", (65536, 1024, 1024), ALONE, 564.3, _TLX),
)
CHECKED = (
    *sonic("30B", 32768, 4096, [(256, 256, 16, 427, 459), (512, 128, 8, 502, 510), (1024, 64, 4, 551, 553)]),
    *sonic("120B", 32768, 4096, [(512, 256, 16, 517, 525), (1024, 128, 8, 557, 566), (2048, 64, 4, 594, 585)]),
    dense("nvjet 128x256x64 2x1", _FIRST, COOPERATIVE, 553.3, _TUTORIAL),
    dense("Triton", _FIRST, Tile(128, 256, persistent=False), 449.9, _TUTORIAL),
    dense("Triton, persistent", _FIRST, ALONE, 490.2, _TUTORIAL),
    dense("Triton, persistent, TMA", _FIRST, ALONE, 527.4, _TUTORIAL),
    *(
        dense(f"fast.cu {kernel}, {n}", (n, n, n), tile, rate, _FAST, programs=programs)
        for kernel, tile, programs, rates in (
            (4, Tile(192, 192, persistent=False), None, {8192: 635.4, 6144: 651.2}),
            (5, SQUARE, 128, {8192: 658.4, 6144: 625.8}),
            (6, SQUARE, 128, {8192: 777.5, 6144: 766.3}),
            (7, COOPERATIVE, 128, {8192: 799.1, 6144: 774.4}),
            (11, COOPERATIVE, 128, {8192: 807.7, 6144: 794.5}),
        )
        for n, rate in rates.items()
    ),
    dense("Triton, A100", _FIRST, Tile(128, 256, persistent=False), 167.2, _TUTORIAL.replace("H100", "A100"), gpu=A100),
)
FIGURES = (*FITTED, *CHECKED)
