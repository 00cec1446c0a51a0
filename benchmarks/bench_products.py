"""Measure what depends on how bfloat16 matrices are multiplied, by torch's mm and widened, in turns in one process.

    OMP_NUM_THREADS=1 python -m benchmarks.bench_products              all; results/cpu/products.json
    OMP_NUM_THREADS=1 python -m benchmarks.bench_products --only layer

`native.narrow_products` has both ways on every processor with AVX2. Where the processor has a matrix unit,
`ONEDNN_MAX_CPU_ISA=AVX512_CORE_BF16` holds torch's mm to what it does on one without; the record says what was held.
Times are of the processor; "user" times leave out what the system takes to hand out memory.
"""

import argparse
import os
import statistics
from collections.abc import Callable, Iterator
from functools import partial

import torch

from benchmarks import bench_expert_layer, harness, rivals, shapes
from benchmarks.bench_expert_layer import DENSE, GROUPED
from benchmarks.bench_step import watched
from benchmarks.bench_token_loss import CPU_SIZE
from benchmarks.layers import Layer
from moe_unlearn import native
from moe_unlearn.ops import Head, token_loss

ROWS = (16, 32, 64, 128, 256)  # of an expert
EXPERTS, HIDDEN, INNER = 6, shapes.OLMOE.hidden, shapes.OLMOE.inner
SILU = ("silu", 1.0, float("inf"), 0.0, False, False, True)
kernels = torch.ops.moe_unlearn_native


def both(step: Callable[[], object]) -> dict[str, Callable[[], None]]:
    """Return the step as two contenders, widened and by torch's mm."""

    def by(way: str) -> Callable[[], None]:
        def run() -> None:
            native.narrow_products(way)
            step()

        return run

    return {f"ours, {way}": by(way) for way in ("widened", "torch")}


def measured(name: str, contenders: dict[str, Callable[[], object]], rounds: int) -> dict:
    """Return medians in milliseconds of the processor and of the program alone."""
    user: dict[str, list[float]] = {key: [] for key in contenders}
    made = {key: watched(step, user[key]) for key, step in contenders.items()}
    row = harness.compare(name, made, rounds=rounds)
    return row | {"user_milliseconds": {key: round(statistics.median(t[1:]), 3) for key, t in user.items()}}


def products() -> Iterator[dict]:
    """Yield the layer's three products by rows of an expert, with their rates."""
    up = torch.randn(EXPERTS, 2 * INNER, HIDDEN).bfloat16()
    down = torch.randn(EXPERTS, HIDDEN, INNER).bfloat16()
    out = torch.empty_like(up)
    for rows in ROWS:
        tokens = EXPERTS * rows
        x, grad = torch.randn(2, tokens, HIDDEN).bfloat16()
        offsets = rows * torch.arange(EXPERTS + 1)
        routed = x, torch.ones(tokens, 1).bfloat16(), torch.arange(tokens).int(), offsets.int()
        z = kernels.expert_mlp(*routed, up, down, None, None, *SILU)[1]
        bounds = torch.stack([offsets[:-1], offsets[1:]], 1)
        backward = grad, *routed, up, down, None, z, *SILU, *[True] * 4
        steps = {
            "forward": (3, partial(kernels.expert_mlp, *routed, up, down, None, None, *SILU)),
            "backward": (3, partial(kernels.expert_mlp_backward, *backward)),
            "wgrad": (2, partial(kernels.expert_wgrad_, out, z, x, bounds, None, None, None, False)),
        }
        for name, (weights, step) in steps.items():
            row = measured(f"products, {name}, {rows} rows", both(step), rounds=5)
            operations = 2 * tokens * HIDDEN * INNER * weights
            yield row | {"gflops": {k: round(operations / ms / 1e6, 1) for k, ms in row["milliseconds"].items()}}


def layers() -> Iterator[dict]:
    """Yield the layer of `bench_expert_layer`, ours in both ways beside the rival with a dense mask and AdamW."""
    for share in (0.2, 1.0):
        layer = Layer(shapes.OLMOE, 1024, share=share)
        peers, _ = rivals.collected({GROUPED: rivals.EXPERTS[GROUPED]}, layer)
        rival = {DENSE: bench_expert_layer.dense(layer, peers[GROUPED], fused=None)}
        yield measured(f"layer, {share:.0%} trained", both(bench_expert_layer.ours(layer)) | rival, rounds=2)


def losses() -> Iterator[dict]:
    """Yield `token_loss` of `bench_token_loss`, forward and backward."""
    tokens, hidden, vocabulary = CPU_SIZE
    labels, token_weights = torch.randint(0, vocabulary, (tokens,)), torch.full((tokens,), 1 / tokens)
    for trained in (False, True):
        h = torch.randn(tokens, hidden).bfloat16().requires_grad_()
        head = torch.randn(vocabulary, hidden).div_(hidden**0.5).bfloat16().requires_grad_(trained)
        wanted = [h, head] if trained else [h]

        def step(h: torch.Tensor = h, head: torch.Tensor = head, wanted: list = wanted) -> None:
            torch.autograd.grad(token_loss(h, Head(head), labels, token_weights=token_weights).sum(), wanted)

        yield measured(f"loss, {'trained' if trained else 'frozen'} head", both(step), rounds=3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="products, layer or loss; nothing is written")
    arguments = parser.parse_args()
    if why := native.load("cpu"):
        raise SystemExit(f"the ways of products are those of the native library cpu, which is {why}")
    torch.manual_seed(0)
    held = os.environ.get("ONEDNN_MAX_CPU_ISA", "")
    kinds = {"products": products, "layer": layers, "loss": losses}
    try:
        rows = [row for kind, of in kinds.items() if kind.startswith(arguments.only) for row in of()]
    finally:
        native.narrow_products("")
    if not arguments.only:
        load = [round(one, 1) for one in os.getloadavg()]
        harness.write("products", [row | {"onednn_held_to": held, "load": load} for row in rows])


if __name__ == "__main__":
    main()
