"""Measure what Python takes to launch the kernels of one MoE layer, where no kernel runs.

    python -m benchmarks.bench_launches [--rounds N] [--profile]

The layer is that of Qwen3-30B-A3B: route, forward, and a backward pass that updates both weights by AdamW. Its tensors
lie on the CPU without content, and a launch of Triton's ends where the device would begin, so that the time is that of
this package, of torch's dispatcher and of Triton's host code. Torch's own small operations run; with few tokens that
takes as long as launching them. Missing is what CUDA's driver takes: some 2 to 4 us a launch, and more where a TMA
descriptor is made.
Times are processor time of the one thread, of which the least and the median are printed.
"""

import argparse
import cProfile
import json
import os
import pstats
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.shapes import QWEN3, Geometry
from moe_unlearn import backend
from moe_unlearn.ops.expert_mlp import expert_mlp
from moe_unlearn.ops.gate import ExpertWeights
from moe_unlearn.ops.route import route
from moe_unlearn.optim import MaskedAdamW
from moe_unlearn.step.gradients import GradientStore
from moe_unlearn.step.sinks import UpdateSink

TOKENS = 64
GOAL = 1.0  # milliseconds a layer


class Layer:
    """One layer of a geometry, whose weights have no content, under a step that updates in its backward pass."""

    def __init__(self, geometry: Geometry, tokens: int = TOKENS):
        experts, hidden, inner = geometry.experts, geometry.hidden, geometry.inner
        self.experts = experts
        self.weights = ExpertWeights(
            torch.nn.Parameter(torch.empty(experts, 2 * inner, hidden, dtype=torch.bfloat16)),
            torch.nn.Parameter(torch.empty(experts, hidden, inner, dtype=torch.bfloat16)),
            None,
            None,
        )
        #: the experts of each token, a few of which get none of it
        self.index = torch.arange(tokens * geometry.top_k).view(tokens, geometry.top_k) % (experts - 3)
        self.group = torch.arange(tokens) % 2
        self.x = torch.zeros(tokens, hidden, dtype=torch.bfloat16, requires_grad=True)
        self.scores = torch.full((tokens, geometry.top_k), 0.1, requires_grad=True)
        self.grad = torch.zeros_like(self.x)
        trained = {"gate_up_proj": self.weights.gate_up_proj, "down_proj": self.weights.down_proj}
        self.store = GradientStore(MaskedAdamW(trained.values()))
        self.store.begin([*trained.items()], {})

    def forward(self) -> Tensor:
        """Route the tokens and compute the layer."""
        self.sink = sink = UpdateSink(self.store)
        for weight in self.weights[:2]:
            sink.enter(weight)
        routed = route(self.index, self.experts, group=self.group, num_groups=2)
        rows = routed.sorted_rows, routed.expert_offsets
        return expert_mlp(self.x, self.scores, *rows, self.weights, sink=sink.take, bounded=True)

    def backward(self, out: Tensor) -> None:
        """Compute all gradients and update the weights."""
        out.backward(self.grad)
        self.x.grad = self.scores.grad = None


class Operations(TorchDispatchMode):
    """A mode that counts the operations of torch which launch something on a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(
        self, function: OpOverload, types: Sequence[type], args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        name = function._schema.name
        if function.namespace == "aten" and not function.is_view and "empty" not in name and name != "aten::detach":
            self.counts[name.removeprefix("aten::")] += 1
        return function(*args, **(kwargs or {}))


@contextmanager
def launching(gpu: str = "h200") -> Iterator[list[Any]]:
    """Launch Triton's kernels up to the device inside, as for this GPU, and list them (`triton_private.Stub`)."""
    from moe_unlearn.regress import triton_private
    from moe_unlearn.triton_kernels import configs

    target = configs.GPUS[gpu]
    with ExitStack() as inside:
        inside.enter_context(backend.recording())
        inside.enter_context(configs.compiling_for(target))
        yield inside.enter_context(triton_private.stubbed(target.architecture))


def counted(layer: Layer) -> dict[str, dict[str, int]]:
    """Return the launches of a forward and of a backward pass with its updates, Triton's and torch's by name."""
    layer.backward(layer.forward())  # which makes the state
    with launching() as kernels:
        found = {}
        out = layer.forward()
        layer.backward(out)
        for name, act in (("forward", layer.forward), ("backward", None)):
            kernels.clear()
            operations = Operations()
            with operations:
                out = act() if act is not None else layer.backward(out)
            found[name] = dict(Counter(launch.kernel for launch in kernels))
            found[f"{name}, torch"] = dict(operations.counts)
    return found


def is_fixed(layer: Layer) -> bool:
    """Return whether a round launches the same kernels on the same grids wherever its tokens go.

    Then it may be captured in a CUDA graph, and no choice of experts compiles a kernel anew.
    """
    rounds = []
    with launching() as kernels:
        for index in (layer.index, torch.arange(layer.index.shape[1]).expand_as(layer.index).contiguous()):
            layer.index = index
            kernels.clear()
            layer.backward(layer.forward())
            rounds.append([*kernels])
    return rounds[0] == rounds[1]


def calls(layer: Layer) -> int:
    """Return how many functions, Python's and those it calls in C, a round of the layer runs."""
    found = 0

    def count(frame: object, event: str, argument: object) -> None:
        nonlocal found
        found += event in ("call", "c_call")

    with launching():
        layer.backward(layer.forward())
        sys.setprofile(count)
        try:
            layer.backward(layer.forward())
        finally:
            sys.setprofile(None)
    return found


def timed(layer: Layer, rounds: int) -> dict[str, list[float]]:
    """Return the milliseconds of each round, of a forward and of a backward pass."""
    found: dict[str, list[float]] = {"forward": [], "backward": []}
    with launching():
        for _ in range(3):
            layer.backward(layer.forward())
        for _ in range(rounds):
            start = time.thread_time()
            out = layer.forward()
            middle = time.thread_time()
            layer.backward(out)
            found["forward"].append(1e3 * (middle - start))
            found["backward"].append(1e3 * (time.thread_time() - middle))
    return found


def profiled(layer: Layer, act: Callable[[], None]) -> None:
    """Print where the time of `act` goes."""
    with launching():
        layer.backward(layer.forward())
        profile = cProfile.Profile()
        profile.runcall(act)
    pstats.Stats(profile).sort_stats("tottime").print_stats(45)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--profile", action="store_true", help="print where the time goes")
    parser.add_argument("--json", action="store_true", help="print counts and times as JSON")
    options = parser.parse_args(arguments)
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("expected TRITON_INTERPRET not to be set: interpreted kernels are not launched")
    torch.set_num_threads(1)
    layer = Layer(QWEN3)
    if options.profile:
        profiled(layer, lambda: [layer.backward(layer.forward()) for _ in range(options.rounds)] and None)
        return
    counts, times, fixed = counted(layer), timed(layer, options.rounds), is_fixed(layer)
    functions = calls(layer)
    least = {name: min(own) for name, own in times.items()}
    if options.json:
        print(json.dumps({"counts": counts, "least": least, "fixed": fixed, "calls": functions}))
        return
    for name, own in times.items():
        kernels, operations = counts[name], counts[f"{name}, torch"]
        print(
            f"{name:<9} {least[name]:.3f} ms at least, {statistics.median(own):.3f} in the middle; "
            f"{sum(kernels.values())} of Triton's, {sum(operations.values())} of torch's"
        )
        print("         ", ", ".join(f"{count} {kernel}" for kernel, count in (kernels | operations).items()))
    print(f"the launches are {'the same' if fixed else 'others'} where all tokens have the same experts")
    print(f"a layer   {sum(least.values()):.3f} ms at least (goal {GOAL:g}), {functions} functions; no kernel ran")


if __name__ == "__main__":
    main()
