"""Predict the speeds that the design asks of a GPU, beside their targets and peers, with what decides each.

`rows` holds ours against the targets; `by_case` names the same predictions by the titles of the benchmarks' cases, so
that they stand beside a measurement once there is one. All figures are predictions: `published` says how good.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from benchmarks.model import kernels, peers
from benchmarks.model.gpus import Gpu
from benchmarks.model.kernels import Layer
from benchmarks.model.published import WITHIN
from benchmarks.model.times import Kernel, Seconds, together
from benchmarks.shapes import QWEN3

TOKENS = 8192
_GROUPED, _SONIC = "transformers grouped_mm", "sonic-moe"
_TITLE = f"{QWEN3.name}, {TOKENS} tokens"
_LOSS = f"token_loss: {QWEN3.name} head, {TOKENS} tokens, V {QWEN3.vocabulary}, frozen head, bfloat16"
_ROUTE = f"route: T {TOKENS}, E {QWEN3.experts}, K {QWEN3.top_k}"
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
    """One target: what is predicted of ours, what the peer does, why ours is no faster, and how many launches it is."""

    work: str
    unit: str
    predicted: float
    target: float
    at_most: bool
    peer: str
    why: str
    launches: int

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


def rows(gpu: Gpu, routing: str = "uniform") -> list[Row]:
    """Return the design's rows for a GPU that were set as times; its targets are for an H200 and uniform routing."""
    cases = contenders(gpu, routing)
    forward, backward = (cases[f"expert_mlp: {_TITLE}, {routing}, {way}"] for way in ("forward", "backward"))
    found = [
        _rate("expert_mlp forward", forward, gpu, 450, "LigerCute 345, torch grouped_mm 242 (published)"),
        _rate("expert_mlp dgrad + wgrad", backward, gpu, 430, "LigerCute 194 (published)"),
    ]
    for share, dense, best in ((1.0, 2.3, 1.4), (0.05, 4.4, 2.7)):
        step = cases[_step(share)]
        for peer, target in ((f"{_GROUPED} + mask + AdamW", dense), (f"{_SONIC} + compact AdamW", best)):
            work = f"layer step with AdamW, {share:.0%} of the experts, vs {peer.partition(' +')[0]}"
            found.append(_ratio(work, step, peer, gpu, target))
    route = {**cases[_ROUTE], "eager calls": peers.eager_route(Layer.routed(QWEN3, TOKENS, routing))}
    ours = route["ours, triton, graph"]
    taken = together(ours, gpu)
    found.append(Row("route in a graph", "us", 1e6 * taken.total, 20, True, "", reason(taken), len(ours)))
    eager = together(route["eager calls"], gpu, graph=False).total
    shown = f"predicted {1e6 * eager:.0f} us to {1e6 * taken.total:.2g}, for the host's ten launches"
    found.append(Row("route vs eager calls", "times", eager / taken.total, 5, False, shown, reason(taken), len(ours)))
    assumed = {"liger fused linear CE": "128 rows a chunk", "cut-cross-entropy": "nothing filtered, its tiles assumed"}
    for peer, assumption in assumed.items():
        found.append(_ratio(f"token_loss vs {peer}", cases[_LOSS], peer, gpu, 1.33, f", {assumption}"))
    return found


def implementations(gpu: Gpu) -> tuple[str, ...]:
    """Return the implementations of `expert_mlp` and `expert_wgrad` on a GPU: CUDA's are for Hopper."""
    return ("cuda", "triton") if gpu.architecture == "sm_90" else ("triton",)


def contenders(gpu: Gpu, routing: str = "uniform") -> dict[str, dict[str, Sequence[Kernel]]]:
    """Return the launches of ours and of its peers, by the title of a case of the benchmarks and their names there.

    Of an op's implementations the one that is predicted to be the fastest counts.
    """
    layer, size = Layer.routed(QWEN3, TOKENS, routing), (TOKENS, QWEN3.hidden, QWEN3.vocabulary)

    def fastest(made: Callable[..., list[Kernel]], *more: Any) -> list[Kernel]:
        of_each = [made(layer, gpu, impl, *more) for impl in implementations(gpu)]
        return min(of_each, key=lambda launches: together(launches, gpu).total)

    forward, dgrad = fastest(kernels.expert_forward), fastest(kernels.expert_dgrad)
    theirs = {
        _GROUPED: (peers.grouped_mm_forward(layer), peers.grouped_mm_backward(layer)),
        _SONIC: (peers.sonic_forward(layer), peers.sonic_backward(layer)),
    }
    found: dict[str, dict[str, Sequence[Kernel]]] = {
        f"expert_mlp: {_TITLE}, {routing}, forward": {"ours": forward, **{name: f for name, (f, _) in theirs.items()}},
        f"expert_mlp: {_TITLE}, {routing}, backward": {
            "ours": dgrad + fastest(kernels.expert_wgrad, False),
            **{name: b for name, (_, b) in theirs.items()},
        },
        _LOSS: {
            "ours": kernels.token_loss(*size, gpu),
            "liger fused linear CE": peers.liger_loss(*size),
            "cut-cross-entropy": peers.cut_cross_entropy(*size),
        },
        _ROUTE: {"ours, triton, graph": kernels.route(layer)},
    }
    for share in (1.0, 0.2, 0.05):
        step = {"ours": forward + dgrad + fastest(kernels.expert_wgrad, True, share)}
        step[f"{_GROUPED} + mask + AdamW"] = sum(theirs[_GROUPED], []) + peers.update(layer, share, compact=False)
        for name, passes in theirs.items():
            step[f"{name} + compact AdamW"] = sum(passes, []) + peers.update(layer, share, compact=True)
        found[_step(share)] = step
    return found


def by_case(gpu: Gpu) -> dict[str, dict[str, float]]:
    """Return predicted milliseconds by the title of a case of the benchmarks, and by its contenders there."""
    return {
        case: {name: round(1e3 * together(launches, gpu).total, 4) for name, launches in made.items()}
        for case, made in contenders(gpu).items()
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


def _step(share: float) -> str:
    return f"expert_layer: {_TITLE}, {share:.0%} trained"


def _rate(work: str, made: Mapping[str, Sequence[Kernel]], gpu: Gpu, target: float, peer: str) -> Row:
    ours = made["ours"]
    taken = together(ours, gpu)
    rate = kernels.flops(ours) / taken.total / 1e12
    return Row(work, "TFLOP/s", rate, target, False, peer, reason(taken), len(ours))


def _ratio(
    work: str, made: Mapping[str, Sequence[Kernel]], peer: str, gpu: Gpu, target: float, assumption: str = ""
) -> Row:
    taken, against = together(made["ours"], gpu), together(made[peer], gpu).total
    shown = f"{peer}{assumption}, predicted {1e3 * against:.3g} ms to {1e3 * taken.total:.3g}"
    return Row(work, "times", against / taken.total, target, False, shown, reason(taken), len(made["ours"]))
