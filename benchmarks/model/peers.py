"""Build what ours is held against, as its authors describe it; what no source says is named an assumption.

transformers' `grouped_mm` and torch's are CUTLASS products of 128 x 256 x 64 with clusters of two, between copies and
element-wise kernels that each read and write memory.
"""

from benchmarks.model.kernels import Layer
from benchmarks.model.published import COOPERATIVE, PING_PONG
from benchmarks.model.times import Kernel, Problem, Product, Stream, Tile

# bytes a weight of torch's AdamW over lists (foreach) with moments in bfloat16: seven passes, 19 operands of 2 bytes
FOREACH = 38.0
# bytes a weight of torch's fused AdamW: weight and moments in and out, the gradient in
FUSED = 14.0
# bytes a weight of multiplying a gradient by a mask of booleans
MASKED = 5.0
# bytes a weight of taking trained experts' gradients out and of writing their weights back
COMPACT = 8.0
# Liger cuts the rows so that a chunk of logits is as large as the hidden states: a power of two of rows
LIGER_CHUNK = 128
# assumption: Cut Cross-Entropy's tiles on Hopper are those of Triton's autotuner, and nothing is filtered
CCE_TILE = Tile(128, 128, 32, persistent=False, in_flight=2)


def grouped_mm_forward(layer: Layer) -> list[Kernel]:
    """Return the launches of transformers' grouped_mm experts, forward."""
    g, x, a, y, weights = layer.geometry, layer.x, layer.a, layer.y, layer.weights
    return [
        *_sorting(layer),
        Stream("gather", x + y),
        Product("up", COOPERATIVE, layer.by_rows(2 * g.inner, g.hidden), 2, y + 2 * weights + 2 * a),
        Stream("act(gate)", 2 * a),
        Stream("times up", 3 * a),
        Product("down", COOPERATIVE, layer.by_rows(g.hidden, g.inner), 2, a + weights + y),
        Stream("times routing weights", 2 * y),
        Stream("back in order", 2 * y),
        Stream("sum over k", y + x),
    ]


def grouped_mm_backward(layer: Layer) -> list[Kernel]:
    """Return the launches of autograd through it, with both weight gradients of all experts."""
    g, x, a, y, weights = layer.geometry, layer.x, layer.a, layer.y, layer.weights
    return [
        Stream("back in order", x + y),
        Stream("gradient of the routing weights", 4 * y),
        Stream("times routing weights", 2 * y),
        Product("d_a", COOPERATIVE, layer.by_rows(g.inner, g.hidden), 2, y + weights + a),
        Product("dW of down", COOPERATIVE, layer.by_depth(g.hidden, g.inner), 2, y + a + weights),
        Stream("products of the gate", 6 * a),
        Stream("act'", 3 * a),
        Stream("both halves side by side", 4 * a),
        Product("d_rows", COOPERATIVE, layer.by_rows(g.hidden, 2 * g.inner), 2, 2 * a + 2 * weights + y),
        Product("dW of gate_up", COOPERATIVE, layer.by_depth(2 * g.inner, g.hidden), 2, y + 2 * a + 2 * weights),
        Stream("scatter", 2 * y + x),
    ]


def sonic_forward(layer: Layer) -> list[Kernel]:
    """Return SonicMoE's launches forward, with the tiles of its configuration."""
    g, x, a, y, weights = layer.geometry, layer.x, layer.a, layer.y, layer.weights
    down = COOPERATIVE if g.inner >= 1024 else PING_PONG
    return [
        *_sorting(layer),
        Product("up", COOPERATIVE, layer.by_rows(2 * g.inner, g.hidden), 3, x + 2 * weights + 3 * a, special=1),
        Product("down", down, layer.by_rows(g.hidden, g.inner), 2, a + weights + y),
        Stream("sum over k", y + x),
    ]


def sonic_backward(layer: Layer) -> list[Kernel]:
    """Return SonicMoE's launches backward, with both weight gradients of all experts."""
    g, x, a, y, weights = layer.geometry, layer.x, layer.a, layer.y, layer.weights
    dh, dx = Tile(128, 128, cluster=2, in_flight=2), COOPERATIVE if g.inner >= 512 else PING_PONG
    return [
        Product("dH", dh, layer.by_rows(g.inner, g.hidden), 10, x + weights + 5 * a, special=2),
        Product("dW2", COOPERATIVE, layer.by_depth(g.hidden, g.inner), 2, x + a + weights),
        Product("dX", dx, layer.by_rows(g.hidden, 2 * g.inner), 2, 2 * a + 2 * weights + y),
        Product("dW1", COOPERATIVE, layer.by_depth(2 * g.inner, g.hidden), 2, x + 2 * a + 2 * weights),
        Stream("sum over k", y + x),
    ]


def update(layer: Layer, share: float, *, compact: bool) -> list[Kernel]:
    """Return mask and AdamW: of every weight as lists, or fused over copies of the trained experts."""
    weights = 1.5 * layer.weights  # elements of all three matrices
    if compact:
        return [Stream("mask and fused AdamW over copies", share * weights * (COMPACT + MASKED + FUSED))]
    return [Stream("mask and AdamW", weights * (MASKED + FOREACH))]


def liger_loss(tokens: int, hidden: int, vocabulary: int) -> list[Kernel]:
    """Return Liger's fused linear CE, no reduction, frozen head: logits twice and the gradient once, in chunks."""
    rows, head = LIGER_CHUNK, 2.0 * vocabulary * hidden
    h, logits = 2.0 * rows * hidden, 2.0 * rows * vocabulary
    forward: list[Kernel] = [
        Product("logits", COOPERATIVE, [Problem(rows, vocabulary, hidden)], 2, h + head + logits),
        Stream("softmax", 3 * logits),
    ]
    # one row of tiles cannot fill the GPU: the depth is cut into as many parts as there are free multiprocessors
    split = Problem(rows, hidden, -(-vocabulary // 16), 16)
    backward = [*forward, Product("d_hidden", COOPERATIVE, [split], 4, logits + head + 32 * h)]
    return [*forward, *backward] * (tokens // rows)


def cut_cross_entropy(tokens: int, hidden: int, vocabulary: int) -> list[Kernel]:
    """Return Cut Cross-Entropy's launches with a frozen head: logits, and in one kernel logits and their gradient."""
    h, head = 2.0 * tokens * hidden, 2.0 * vocabulary * hidden
    logits = Problem(tokens, vocabulary, hidden)
    return [
        Product("logits", CCE_TILE, [logits], 0, h + head, special=1),
        Product("logits again", CCE_TILE, [logits], 0, h + head, special=1),
        Product("d_hidden", CCE_TILE, [Problem(tokens, hidden, vocabulary)], 8, h + head),
    ]


def eager_route(layer: Layer) -> list[Kernel]:
    """Return the torch calls that `route` stands for: sort, counts and sums, about ten launches."""
    return [Stream("torch call", 8.0 * layer.slots, loads=2)] * 10


def _sorting(layer: Layer) -> list[Kernel]:
    return [Stream("sort", 8.0 * layer.slots, loads=8)] * 3
