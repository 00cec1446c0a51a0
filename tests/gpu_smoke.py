"""Every op of every implementation once, and two whole layers, against `ref`: the first thing to know of a device.

    python -m tests.gpu_smoke --journal FILE               on the GPU
    python -m tests.gpu_smoke --journal FILE --device cpu --toy

Integers, and whatever is made of them, have the bits of `ref` on the CPU; sums of random numbers meet the criterion of
`moe_unlearn.testing`. Each check runs on the current stream and, on a GPU, on another one, where its inputs are
written behind a long wait: a kernel that goes to the wrong stream or device reads what is not there yet.
"""

import argparse
import contextlib
import functools
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks import shapes
from benchmarks.journal import Journal
from benchmarks.layers import Layer
from moe_unlearn import backend, ops
from moe_unlearn.backend import Unfit
from moe_unlearn.ops.bits import pack_bits
from moe_unlearn.ops.expert_wgrad import (
    Factors,
    expert_wgrad_adamw_,
    expert_wgrad_inner,
    expert_wgrad_sgd_,
)
from moe_unlearn.ops.retain_weights import moments, tilted_weights
from moe_unlearn.ops.weight_score import score_between, score_magnitudes
from moe_unlearn.testing import check_against_ref, integers, poison, routing
from tests.support.triton_cache import CacheCount

BF16, F32 = torch.bfloat16, torch.float32
IMPLEMENTATIONS = {"cuda": ("triton", "cuda"), "cpu": ("cpu", "triton")}
# cycles that the other stream waits before it writes the inputs: some 30 milliseconds
_WAIT = 50_000_000
EXPERTS, SHAPE, TOKENS = 8, (136, 256), 300
LISTED = torch.tensor([6, 1, 3])


@dataclass(frozen=True)
class Check:
    """`call(impl, **arguments)` gives tensors; `covers` are the kernels it runs, by their registered names."""

    covers: tuple[str, ...]
    what: str
    call: Callable[..., tuple[Tensor, ...]]
    arguments: dict
    gradients: tuple[str, ...] | None = None  # None: the bits of `ref`; else the criterion, for these gradients too


def checks() -> Iterator[Check]:
    """One for each op and kind of result."""
    random = functools.partial(torch.randn, generator=torch.Generator().manual_seed(0))
    index = routing("skewed", TOKENS, EXPERTS, 2)
    group, tilt, log_weight = torch.arange(TOKENS) % 3, random(EXPERTS), random(TOKENS)
    yield Check(
        ("route",), "groups and tilt", _route, {"index": index, "group": group, "tilt": tilt, "log_weight": log_weight}
    )
    factors, retain = (_factors(index, pattern) for pattern in (1, 2))
    weight, words = random(EXPERTS, *SHAPE).to(BF16), pack_bits(torch.rand(len(LISTED), *SHAPE) < 0.5)
    state = [random(len(LISTED), *SHAPE).abs().to(BF16) for _ in range(2)]
    common = {"factors": factors, "experts": LISTED, "mask": words}
    yield Check(("expert_wgrad", "expert_wgrad.accumulate"), "store and add", _wgrad, {**common, "out": state[0]})
    update = {**common, "weight": weight, "first": state[0], "second": state[1]}
    yield Check(("expert_wgrad.sgd", "expert_wgrad.adamw"), "updates", _wgrad_update, update)
    yield Check(("expert_wgrad.inner",), "inner", _wgrad_inner, {"both": (factors, retain), "mask": words})
    sets = [[integers(*SHAPE, dtype=BF16, seed=s), integers(70, seed=s + 9, dtype=BF16)] for s in range(3)]
    yield Check(("gram",), "integers", lambda impl, sets: (ops.gram(sets, impl=impl),), {"sets": sets})
    yield Check(("gram.factors",), "integers", _gram_factors, {"factors": factors, "other": retain.grad})
    terms = {"weight": weight, "g_f": random(EXPERTS, *SHAPE).to(BF16), "g_r": random(EXPERTS, *SHAPE).to(BF16)}
    scores = tuple(f"weight_score.{part}" for part in ("histogram", "mask", "between", "magnitudes"))
    yield Check(scores, "all parts", _score, terms)
    masked = {"weight": weight[0], "grad": random(SHAPE).to(BF16), "first": state[0][0], "second": state[1][0]}
    yield Check(("masked_update.sgd", "masked_update.adamw"), "rounding", _masked, {**masked, "mask": words[0]})
    members = torch.rand(TOKENS, 40) < 0.4
    tilts = {"words": pack_bits(members), "tilt": random(40, dtype=torch.float64) / 7}
    yield Check(("retain_weights", "retain_weights.moments"), "sums", _tilted, tilts, gradients=())
    heads = {"h": random(TOKENS, 96).to(BF16), "head": random(500, 96).to(BF16)}
    heads |= {"labels": torch.arange(TOKENS) * 7 % 500, "weights": random(TOKENS).abs()}
    loss = "token_loss", *(f"token_loss.{part}" for part in ("backward", "kept", "room", "head"))
    for kind in ("nll", "uce"):
        yield Check(loss, kind, functools.partial(_loss, kind), heads, gradients=("h", "head"))
    for kind, tiles, more in (("ce", "tiled", {"label_penalty": 2.0}), ("logit_margin", "logit_margin", {})):
        parts = f"token_loss.{tiles}", f"token_loss.{tiles}.backward"
        yield Check(parts, kind, functools.partial(_loss, kind, **more), heads, gradients=("h", "head"))
    layer = {"x": random(TOKENS, SHAPE[1]).to(BF16), "weights": random(TOKENS, 2).softmax(1).to(BF16), "index": index}
    layer |= {
        "gate_up": random(EXPERTS, 2 * 72, SHAPE[1]).to(BF16) / 16,
        "down": random(EXPERTS, SHAPE[1], 72).to(BF16),
    }
    yield Check(("expert_mlp", "expert_mlp.backward"), "small", _mlp, layer, ("x", "weights", "gate_up", "down"))


def _factors(index: Tensor, seed: int) -> Factors:
    """Make factors of small integers in bfloat16, whose products are exact in any order."""
    made = ops.route(index, EXPERTS, impl="ref")
    grad = integers(index.numel(), SHAPE[0], low=-1, high=1, dtype=BF16, seed=seed)
    x = integers(len(index), SHAPE[1], low=-1, high=1, dtype=BF16, seed=seed + 5)
    return Factors(grad, x, made.expert_offsets, None, made.sorted_rows // index.shape[1])


def _route(impl, index, group, tilt, log_weight):
    log_weight = log_weight.clone()
    made = ops.route(index, EXPERTS, group=group, num_groups=3, log_tilt=tilt, log_weight=log_weight, impl=impl)
    return *made, log_weight


def _wgrad(impl, factors, experts, mask, out):
    own, out = factors._asdict(), out.clone()
    stored = ops.expert_wgrad(**own, experts=experts, mask=mask, out_dtype=F32, impl=impl)
    return stored, ops.expert_wgrad(**own, experts=experts, mask=mask, out=out, impl=impl)


def _wgrad_update(impl, factors, experts, mask, weight, first, second):
    weights, buffer, *moments = [weight.clone(), weight.clone()], *(t.clone() for t in (first, first, second))
    sgd, adamw = ops.SGD(lr=1e-2, momentum=0.9, weight_decay=0.1), ops.AdamW(lr=1e-2, weight_decay=0.1)
    update, where = ops.Update(step=3), {"experts": experts, "mask": mask, "impl": impl}
    expert_wgrad_sgd_(weights[0], buffer, factors, sgd, update, **where)
    expert_wgrad_adamw_(weights[1], *moments, factors, adamw, update, **where)
    return *weights, buffer, *moments


def _wgrad_inner(impl, both, mask):
    return (expert_wgrad_inner(list(both), experts=LISTED.to(mask.device), mask=mask, impl=impl),)


def _gram_factors(impl, factors, other):
    # inputs stand in sorted order here
    x = factors.input[factors.input_rows.long()]
    return (ops.gram_factors([factors.grad, other], x, factors.expert_offsets, impl=impl),)


def _score(impl, weight, g_f, g_r):
    terms = weight, g_f, g_r
    histogram = ops.score_histogram(*terms, gamma=0.5, digit=0, impl=impl)
    words, taken = ops.score_mask(*terms, gamma=0.5, threshold_bits=0x3F000000, ties=5, impl=impl)
    *between, above = score_between(*terms, gamma=0.5, low=0x3E000000, high=0x3F000000, most=weight.numel(), impl=impl)
    return histogram, words, taken, *between, torch.tensor(above), score_magnitudes(*terms, impl=impl)


def _masked(impl, weight, grad, first, second, mask):
    weights, buffer, *moments = [weight.clone(), weight.clone()], *(t.clone() for t in (first, first, second))
    update = ops.Update(step=3, rounding="stochastic", seed=5, first_row=7)
    ops.masked_sgd_(weights[0], grad, buffer, mask, ops.SGD(lr=1e-2, momentum=0.9), update, impl=impl)
    ops.masked_adamw_(weights[1], grad, *moments, mask, ops.AdamW(lr=1e-2), update, impl=impl)
    return *weights, buffer, *moments


def _tilted(impl, words, tilt):
    made = tilted_weights(words, tilt, -0.3, cap=1.1, impl=impl), *moments(words, tilt, -0.3, cap=1.1, impl=impl)
    return tuple(t.float() for t in made)


def _loss(kind, impl, h, head, labels, weights, **more):
    return (ops.token_loss(h, ops.Head(head), labels, token_weights=weights, kind=kind, impl=impl, **more),)


def _mlp(impl, x, weights, index, gate_up, down):
    made = ops.route(index, EXPERTS, impl="ref" if impl == "ref" else "auto")
    matrices = ops.ExpertWeights(gate_up, down)
    return (ops.expert_mlp(x, weights, made.sorted_rows, made.expert_offsets, matrices, impl=impl),)


# ---- running a check -----------------------------------------------------------------------------------------


def moved(value, change: Callable[[Tensor], Tensor]):
    """`value` with every tensor in it changed; lists, tuples and dicts are gone into."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, dict):
        return {key: moved(item, change) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        items = [moved(item, change) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    return value


@contextlib.contextmanager
def _stream(kind: str) -> Iterator[None]:
    if kind == "current":
        yield
        return
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        yield
    stream.synchronize()


def on_device(check: Check, impl: str, device: str, stream: str, **arguments) -> tuple[Tensor, ...]:
    """Run the implementation for arguments of the CPU; its results come back to the CPU."""
    there = moved(arguments, lambda t: t.to(device))
    with _stream(stream), poison():
        if stream != "current":
            torch.cuda._sleep(_WAIT)
            there = moved(there, lambda t: t + 0 if t.dtype != torch.bool else t.clone())
        return tuple(t.cpu() for t in check.call(impl, **there))


def run(check: Check, impl: str, device: str, stream: str) -> None:
    """Raise AssertionError where the implementation does not give what `ref` gives on the CPU."""
    function = functools.partial(on_device, check, impl, device, stream)
    ref = functools.partial(check.call, "ref")
    if check.gradients is not None:
        check_against_ref(function, ref, check.arguments, gradients=check.gradients)
        return
    for i, (got, expected) in enumerate(zip(function(**check.arguments), ref(**check.arguments), strict=True)):
        assert got.dtype == expected.dtype and got.shape == expected.shape, f"output {i}: {got.dtype} {got.shape}"
        differing = int((_bits(got) != _bits(expected)).sum())
        assert not differing, f"output {i}: {differing} of {got.numel()} elements have other bits than ref's"


def _bits(tensor: Tensor) -> Tensor:
    integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.contiguous().view(integer[tensor.element_size()]) if tensor.is_floating_point() else tensor


def layer(geometry: shapes.Geometry, tokens: int, impl: str, device: str) -> None:
    """A whole layer of published widths: output, both input gradients, and the weight gradient of listed experts.

    The first three by the criterion, the last with integer factors, so that its bits are those of float64 products.
    """
    made = Layer(geometry, tokens, device=device)
    gate_up, down = made.parameters()
    rows = ops.route(made.index, geometry.experts, impl="ref")
    places = rows.sorted_rows, rows.expert_offsets

    def ours(x: Tensor, weights: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
        return ops.expert_mlp(x, weights, *places, ops.ExpertWeights(w1, w2), impl=impl)

    def ref(x: Tensor, weights: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
        return ops.expert_mlp_ref(x, weights, *places, ops.ExpertWeights(w1, w2))

    given = {"x": made.hidden.detach(), "weights": made.weights.detach(), "w1": gate_up.detach(), "w2": down.detach()}
    check_against_ref(ours, ref, given, gradients=("x", "weights"))
    size = tokens * geometry.top_k, 2 * geometry.inner
    grad = integers(*size, low=-1, high=1, dtype=BF16).to(device)
    x = integers(size[0], geometry.hidden, low=-1, high=1, dtype=BF16, seed=1).to(device)
    experts = torch.tensor([geometry.experts - 1, 0, 3], device=device)
    got = ops.expert_wgrad(grad, x, rows.expert_offsets, experts=experts, out_dtype=F32, impl=impl)
    bounds = rows.expert_offsets.tolist()
    for dw, e in zip(got, experts.tolist(), strict=True):
        own = slice(bounds[e], bounds[e + 1])
        assert torch.equal(dw.double(), grad[own].double().t() @ x[own].double()), f"dW of expert {e}"


def layers(device: str, toy: bool) -> Iterator[tuple[str, Callable[[], None]]]:
    """The whole layers with the implementations that are there."""
    for geometry in (shapes.QWEN3, shapes.OLMOE):
        used, tokens = (geometry.narrow(32), 64) if toy else (geometry, 1024)
        for impl in ("auto", *IMPLEMENTATIONS[device]):
            if impl == "auto" or impl in backend.available("expert_mlp", device):
                yield f"layer of {geometry.name} {impl}", functools.partial(layer, used, tokens, impl, device)


def everything(device: str, toy: bool) -> Iterator[tuple[str, Callable[[], None]]]:
    """(name, check) of all that this device has, the ops first."""
    streams = ("current", "another") if device == "cuda" else ("current",)
    for check in checks():
        impls = [i for i in IMPLEMENTATIONS[device] if any(i in backend.available(n, device) for n in check.covers)]
        # what has nothing but torch's operations runs them on the device
        for impl in impls or ["ref"]:
            for stream in streams:
                name = f"{check.covers[0]} {impl}, {check.what}, {stream} stream"
                yield name, functools.partial(run, check, impl, device, stream)
    yield from layers(device, toy)


def conduct(journal: Journal, device: str, toy: bool) -> int:
    """Run all checks, a line for each; returns 1 if one failed."""
    found = list(everything(device, toy))
    journal.write("collected", tests=len(found))
    failed, count = 0, CacheCount()
    for name, check in found:
        start, outcome, why = time.monotonic(), "passed", ""
        try:
            check()
        except Unfit as error:
            # Hopper's instructions are nowhere else
            elsewhere = device == "cuda" and torch.cuda.get_device_capability() != (9, 0)
            outcome, why = ("skipped", f"needs Hopper: {error}") if elsewhere else ("failed", f"Unfit: {error}")
        except Exception as error:  # noqa: BLE001 -- the next check may still tell something
            traceback.print_exc()
            outcome, why = "failed", f"{type(error).__name__}: {error}"
        failed += outcome == "failed"
        ended = {"outcome": outcome, "seconds": round(time.monotonic() - start, 2), "why": why[:1500]}
        journal.write("test", name=name, **ended, triton=count.taken())
    return int(failed > 0)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--journal", required=True)
    parser.add_argument("--device", choices=tuple(IMPLEMENTATIONS), default="cuda")
    parser.add_argument("--toy", action="store_true", help="layers a thirty-second as wide")
    options = parser.parse_args()
    return conduct(Journal(options.journal, "smoke"), options.device, options.toy)


if __name__ == "__main__":
    sys.exit(main())
