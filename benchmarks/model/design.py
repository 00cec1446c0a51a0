"""Predict the speeds that the design asks of a GPU, beside their targets and peers, with what decides each.

`rows` holds ours against the targets; `by_case` names the same predictions by the titles of the benchmarks' cases, so
that they stand beside a measurement once there is one. All figures are predictions: `published` says how good.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from benchmarks.model import kernels, peers
from benchmarks.model.gpus import Gpu
from benchmarks.model.kernels import Layer
from benchmarks.model.published import WITHIN
from benchmarks.model.times import Kernel, Seconds, together
from benchmarks.shapes import QWEN3

TOKENS = 8192
# what a part of a predicted time is called in a reason
_PARTS = {
    "padding": "rows of tiles that are padding",
    "supply": "waiting for L2's supply of operands",
    "exposed": "the ends of tiles, which nothing hides",
    "tail": "multiprocessors without a tile",
    "memory": "memory that products do not hide",
    "launch": "launches",
}


class Row(NamedTuple):
    """One target: `predicted` of ours and, where a peer is part of it, what its assumption is."""

    work: str
    unit: str
    predicted: float
    target: float
    at_most: bool
    peer: str
    why: str

    @property
    def hit(self) -> bool:
        """Return whether the prediction reaches the target."""
        return self.predicted <= self.target if self.at_most else self.predicted >= self.target

    @property
    def verdict(self) -> str:
        """Return what the prediction says of the target, and whether it is nearer to it than the model's error."""
        close = abs(self.predicted / self.target - 1) <= WITHIN
        return ("predicted hit" if self.hit else "PREDICTED MISS") + (", within the model's error" if close else "")


def reason(found: Seconds) -> str:
    """Return the two parts of a time that keep it longest from the products alone, as shares of it."""
    parts = sorted(_PARTS, key=lambda part: -getattr(found, part))[:2]
    return ", ".join(f"{_PARTS[part]} {getattr(found, part) / found.total:.0%}" for part in parts)


def rows(gpu: Gpu) -> list[Row]:
    """Return the design's rows for a GPU that were set as times; its targets are meant for an H200."""
    layer = Layer.routed(QWEN3, TOKENS)
    forward, dgrad = kernels.expert_forward(layer, gpu), kernels.expert_dgrad(layer, gpu)
    impl = fastest_update(layer, gpu)
    stores = [kernels.expert_wgrad(layer, gpu, name, False) for name in implementations(gpu)]
    backward = dgrad + min(stores, key=lambda made: together(made, gpu).total)
    found = [
        _rate("expert_mlp forward", forward, gpu, 450, "LigerCute 345, torch grouped_mm 242 (published)"),
        _rate("expert_mlp dgrad + wgrad", backward, gpu, 430, "LigerCute 194 (published)"),
    ]
    grouped = peers.grouped_mm_forward(layer) + peers.grouped_mm_backward(layer)
    sonic = peers.sonic_forward(layer) + peers.sonic_backward(layer)
    for share, dense, best in ((1.0, 2.3, 1.4), (0.05, 4.4, 2.7)):
        ours = forward + dgrad + kernels.expert_wgrad(layer, gpu, impl, True, share)
        work = f"layer step with AdamW, {share:.0%} of the experts"
        for name, theirs, target in (
            ("grouped_mm, dense mask", grouped + peers.update(layer, share, compact=False), dense),
            ("SonicMoE, compact AdamW", sonic + peers.update(layer, share, compact=True), best),
        ):
            found.append(_ratio(f"{work} vs {name.partition(',')[0]}", ours, theirs, gpu, target, name))
    routes = kernels.route(layer)
    taken = together(routes, gpu)
    eager = together(peers.eager_route(layer), gpu, graph=False).total
    found.append(
        Row(
            "route in a graph",
            "us",
            1e6 * taken.total,
            20,
            True,
            f"eager calls, predicted {1e6 * eager:.0f} us",
            reason(taken),
        )
    )
    found.append(_ratio("route vs eager calls", routes, eager, gpu, 5, "ten launches of the host"))
    loss = kernels.token_loss(TOKENS, QWEN3.hidden, QWEN3.vocabulary, gpu)
    size = TOKENS, QWEN3.hidden, QWEN3.vocabulary
    found.append(_ratio("token_loss vs Liger", loss, peers.liger_loss(*size), gpu, 1.33, "none, 128 rows a chunk"))
    unfiltered = "nothing filtered, its tiles assumed"
    found.append(_ratio("token_loss vs CCE", loss, peers.cut_cross_entropy(*size), gpu, 1.33, unfiltered))
    return found


def implementations(gpu: Gpu) -> tuple[str, ...]:
    """Return the implementations of `expert_wgrad` on a GPU: CUDA's is for Hopper."""
    return ("cuda", "triton") if gpu.architecture == "sm_90" else ("triton",)


def fastest_update(layer: Layer, gpu: Gpu) -> str:
    """Return the implementation whose update of all experts is predicted to be the fastest."""
    return min(
        implementations(gpu),
        key=lambda impl: together(kernels.expert_wgrad(layer, gpu, impl, True), gpu).total,
    )


def by_case(gpu: Gpu) -> dict[str, dict[str, float]]:
    """Return predicted milliseconds by the title of a case of the benchmarks, and by its contenders there."""
    layer = Layer.routed(QWEN3, TOKENS)
    forward, dgrad = kernels.expert_forward(layer, gpu), kernels.expert_dgrad(layer, gpu)
    impl, title = fastest_update(layer, gpu), f"{QWEN3.name}, {TOKENS} tokens"
    size = TOKENS, QWEN3.hidden, QWEN3.vocabulary
    grouped = "transformers grouped_mm"
    stored = min(
        (kernels.expert_wgrad(layer, gpu, name, False) for name in implementations(gpu)),
        key=lambda made: together(made, gpu).total,
    )
    found: dict[str, dict[str, Sequence[Kernel]]] = {
        f"expert_mlp: {title}, uniform, forward": {
            "ours": forward,
            grouped: peers.grouped_mm_forward(layer),
            "sonic-moe": peers.sonic_forward(layer),
        },
        f"expert_mlp: {title}, uniform, backward": {
            "ours": dgrad + stored,
            grouped: peers.grouped_mm_backward(layer),
            "sonic-moe": peers.sonic_backward(layer),
        },
        f"token_loss: {QWEN3.name} head, {TOKENS} tokens, V {QWEN3.vocabulary}, frozen head, bfloat16": {
            "ours": kernels.token_loss(*size, gpu),
            "liger fused linear CE": peers.liger_loss(*size),
            "cut-cross-entropy": peers.cut_cross_entropy(*size),
        },
        f"route: T {TOKENS}, E {QWEN3.experts}, K {QWEN3.top_k}": {"ours, triton, graph": kernels.route(layer)},
    }
    whole = peers.grouped_mm_forward(layer) + peers.grouped_mm_backward(layer)
    sonic = peers.sonic_forward(layer) + peers.sonic_backward(layer)
    for share in (1.0, 0.2, 0.05):
        found[f"expert_layer: {title}, {share:.0%} trained"] = {
            "ours": forward + dgrad + kernels.expert_wgrad(layer, gpu, impl, True, share),
            f"{grouped} + mask + AdamW": whole + peers.update(layer, share, compact=False),
            f"{grouped} + compact AdamW": whole + peers.update(layer, share, compact=True),
            "sonic-moe + compact AdamW": sonic + peers.update(layer, share, compact=True),
        }
    return {
        case: {name: round(1e3 * together(made, gpu).total, 4) for name, made in contenders.items()}
        for case, contenders in found.items()
    }


class Pair(NamedTuple):
    """Milliseconds of one contender of one case, as predicted and as measured."""

    case: str
    contender: str
    predicted: float
    measured: float

    def __str__(self) -> str:
        error = self.predicted / self.measured - 1
        figures = f"predicted {self.predicted:.4g} ms, measured {self.measured:.4g} ms"
        return f"{self.case}, {self.contender}: {figures}: the prediction is {error:+.0%} off"


def beside(recorded: Iterable[Mapping], gpu: Gpu) -> list[Pair]:
    """Return the predictions of cases that a run on this GPU measured, each beside its measurement."""
    known = by_case(gpu)
    found = []
    for row in recorded:
        case, times = f"{row['op']}: {row['name']}", row.get("milliseconds", {})
        shared = [name for name in known.get(case, ()) if name in times]
        found += [Pair(case, name, known[case][name], times[name]) for name in shared]
    return found


def _rate(work: str, made: Sequence[Kernel], gpu: Gpu, target: float, peer: str) -> Row:
    taken = together(made, gpu)
    return Row(work, "TFLOP/s", kernels.flops(made) / taken.total / 1e12, target, False, peer, reason(taken))


def _ratio(
    work: str, ours: Sequence[Kernel], theirs: Sequence[Kernel] | float, gpu: Gpu, target: float, peer: str
) -> Row:
    taken = together(ours, gpu)
    against = theirs if isinstance(theirs, float) else together(theirs, gpu).total
    shown = f"{peer}, predicted {1e3 * against:.3g} ms to {1e3 * taken.total:.3g}"
    return Row(work, "times", against / taken.total, target, False, shown, reason(taken))
