"""Measure the expert layer, forward and backward (dgrad, routing weights, all weight gradients), against its peers.

The backward pass is timed alone, over a graph that is kept. On a CPU the layers are narrow copies: all experts, a
quarter of the widths. The floating-point operations are those of useful rows, 6 T K H I forward and twice as many
backward.
"""

import functools
from collections.abc import Callable

import torch

from benchmarks import rivals, shapes
from benchmarks.harness import OURS, Case, Work
from benchmarks.layers import Layer
from benchmarks.shapes import Geometry
from moe_unlearn.ops.costs import expert_mlp as costs

NARROW = 4
EAGER = "transformers eager"
# the speed that DESIGN asks of the layer of Qwen3-30B-A3B at 8192 tokens on an H200
TERAFLOPS = {"forward": 450.0, "backward": 430.0}


def cases(device: str) -> list[Case]:
    if device == "cpu":
        gate = [g.narrow(NARROW) for g in shapes.GATE]
        rows = [(g, t, "uniform", 1) for g in gate for t in shapes.CPU_TOKENS]
        rows += [(gate[1], shapes.CPU_TOKENS[-1], r, 1) for r in list(shapes.ROUTINGS)[1:]]
        rows += [(g.narrow(NARROW), shapes.CPU_TOKENS[0], "uniform", 2) for g in shapes.REPORT]
    else:
        rows = [(shapes.QWEN3, 8192, "uniform", 0)]
        rows += [(g, 8192, "uniform", 1) for g in shapes.GATE[1:]]
        rows += [(shapes.QWEN3, t, "uniform", 1) for t in shapes.GPU_TOKENS if t != 8192]
        rows += [(shapes.QWEN3, 8192, r, 1) for r in list(shapes.ROUTINGS)[1:]]
        rows += [(g, t, "uniform", 2) for g in shapes.GATE[1:] for t in (2048, 32768)]
        rows += [(g, 8192, "uniform", 2) for g in shapes.REPORT]
    return [case(*row, direction, device) for row in rows for direction in ("forward", "backward")]


def case(geometry: Geometry, tokens: int, routing: str, tier: int, direction: str, device: str) -> Case:
    return Case(
        "expert_mlp",
        f"{geometry.name}, {tokens} tokens, {routing}, {direction}",
        (OURS, *rivals.EXPERTS),
        functools.partial(work, geometry, tokens, routing, direction, device),
        tier,
        seconds=4,
        facts={"geometry": geometry.name, "tokens": tokens, "routing": routing, "direction": direction},
    )


def work(geometry: Geometry, tokens: int, routing: str, direction: str, device: str) -> Work:
    layer = Layer(geometry, tokens, routing=routing, device=device)
    peers, missing = rivals.collected(rivals.EXPERTS, layer)
    if device == "cpu" and direction == "backward":
        missing[EAGER] = "takes a minute: it adds the gradient of each expert to one of all"
        del peers[EAGER]
    make = forward if direction == "forward" else backward
    asked = device == "cuda" and geometry is shapes.QWEN3 and (tokens, routing) == (8192, "uniform")
    moved = costs.forward_bytes if direction == "forward" else costs.backward_bytes
    return Work(
        {name: make(function, layer) for name, function in {OURS: layer.ours, **peers}.items()},
        missing,
        teraflops_target=TERAFLOPS[direction] if asked else None,
        flops=costs.flops(tokens * geometry.top_k, geometry.expert_weights) * (1 if direction == "forward" else 2),
        bytes=moved(*geometry.layer(tokens)),
        memory=direction == "forward",
    )


def forward(function: rivals.Experts, layer: Layer) -> Callable[[], object]:
    return torch.no_grad()(lambda: function(layer.hidden, layer.index, layer.weights))


def backward(function: rivals.Experts, layer: Layer) -> Callable[[], object]:
    """Return a call of the backward pass.

    Its first call makes the graph, so that a rival that fails there counts as failed.
    """
    held: list[torch.Tensor] = []

    def run() -> object:
        if not held:
            held.append(function(layer.hidden, layer.index, layer.weights))
        leaves = [layer.hidden, layer.weights, *layer.parameters()]
        return torch.autograd.grad(held[0], leaves, layer.upstream, retain_graph=True)

    return run
