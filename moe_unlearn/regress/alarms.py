"""Measure how often the criterion calls correct results wrong on this machine, and the smallest error that it sees.

    python -m moe_unlearn.regress.alarms [--comparisons N] [--seed S]

Correct results come from small kernels that sum in many orders: the libraries' own, reversed, shuffled, in blocks, in
lanes, in pairs, one term after the other with and without fused multiply-add. Each is judged by the harshest
yardstick there is, the reference with exact products: a result that passes it passes on every machine. A comparison's
`error / bound` is the part it needs of what the criterion allows, the larger one of its rows and its RMS. An
exponential tail is fitted (by the mean excess) beyond the 50th part of the comparisons that needs most, and gives the
rate of false alarms; the errors' own tails, of sums of many roundings, fall faster.

The smallest error is reported for one element, relative to the largest of its row, and for a factor on all.

Results are deterministic for a seed and a machine. Source: our specification; fitting the values beyond a high
quantile is the peaks-over-threshold method of extreme value statistics.
"""

import argparse
import functools
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import silu

from moe_unlearn.testing import margin
from moe_unlearn.testing.yardstick import Reference, yardstick

LIMIT = 1e-7  # the most false alarms a comparison
LARGEST = 0.7  # the largest error / bound
_TAIL = 50

Kernel = Callable[..., Tensor]


@dataclass(frozen=True)
class Subject:
    """A reference, its inputs, and correct kernels for the same computation."""

    name: str
    reference: Kernel
    inputs: tuple[Tensor, ...]
    kernels: dict[str, Kernel]


@dataclass(frozen=True)
class Alarms:
    """Findings of `measure`: comparisons, the largest error / bound, the result that needed it, and the fitted rate."""

    comparisons: int
    largest: float
    worst: str
    rate: float

    def __str__(self) -> str:
        return (
            f"largest error / bound {self.largest:.2f} in {self.comparisons} correct results ({self.worst}), "
            f"false alarms at most {max(self.rate, 1e-12):.0e} a comparison"
        )


def measure(comparisons: int, seed: int = 0) -> Alarms:
    """Judge correct results by the criterion until there are `comparisons` of them; return the findings."""
    needed: list[tuple[float, str]] = []
    generator = torch.Generator().manual_seed(seed)
    while len(needed) < comparisons:
        for subject in subjects(generator):
            with yardstick("exact"):
                baseline = Reference(functools.partial(subject.reference, *subject.inputs)).baseline()
            rounded, gold = baseline.rounded(), subject.reference(*(t.double() for t in subject.inputs))
            for name, kernel in subject.kernels.items():
                margins = margin(kernel(*subject.inputs), baseline.value, gold, rounded)
                needed.append((max(margins.row, margins.rms), f"{subject.name}, {name}"))
    largest, worst = max(needed)
    return Alarms(len(needed), largest, worst, tail([value for value, _ in needed]))


def tail(values: Sequence[float], limit: float = 1.0) -> float:
    """Return the rate at which values exceed `limit`, by an exponential tail beyond the largest 50th part of them."""
    ordered = sorted(values, reverse=True)
    count = max(1, len(ordered) // _TAIL)
    threshold = ordered[count] if count < len(ordered) else ordered[-1]
    excess = sum(value - threshold for value in ordered[:count]) / count
    if threshold >= limit:
        return sum(value > limit for value in ordered) / len(ordered)
    return count / len(ordered) * math.exp((threshold - limit) / excess) if excess else 0.0


def smallest_errors(depth: int, kind: str, seed: int = 0) -> dict[str, float]:
    """Return the smallest relative errors that fail in a float32 product of `depth` terms, under one of `YARDSTICKS`.

    "one element" and "all" are each found with the spread of `testing` and without it, as the criterion once was.
    """
    generator = torch.Generator().manual_seed(seed)
    a, b = (torch.randn(shape, generator=generator) for shape in ((96, depth), (depth, 128)))
    gold = a.double() @ b.double()
    with yardstick(kind):
        baseline = Reference(lambda: a @ b).baseline()
    rounded, found = baseline.rounded(), {}
    for name, change in {"one element": _one_off, "all": lambda y, e: y * (1 + e)}.items():
        for which, spread in {"before": None, "now": rounded}.items():
            low, high = -30.0, 0.0
            while high - low > 0.02:
                middle = (low + high) / 2
                wrong = change(gold, 2.0**middle).float()
                margins = margin(wrong, baseline.value, gold, spread)
                low, high = (low, middle) if not margins.within else (middle, high)
            found[f"{name}, {which}"] = 2.0**high
    return found


def _one_off(value: Tensor, relative: float) -> Tensor:
    value = value.clone()
    value[17, 5] += relative * value[17].abs().max()
    return value


# --------------------------------------------------------------------------------------------------- subjects


def subjects(generator: torch.Generator) -> Iterator[Subject]:
    """Yield one subject of each kind, of drawn sizes, dtypes and values."""

    def size(low: int, high: int) -> int:
        draw = torch.rand((), generator=generator)
        drawn: float = low * (high / low) ** float(draw)
        return round(drawn)

    def values(*shape: int) -> Tensor:
        x = torch.randn(shape, generator=generator)
        kind = int(torch.randint(4, (), generator=generator))
        if kind == 1:  # of one sign, so that partial sums grow as fast as they can
            return x.abs()
        if kind == 2:  # a few large terms
            return x * 10 ** (3 * torch.rand(shape, generator=generator) - 2)
        if kind == 3 and shape[-1] > 1:  # neighbours that cancel
            x[..., 1::2] = -x[..., : shape[-1] - shape[-1] % 2 : 2] * (1 + 1e-3 * x[..., 1::2])
        return x

    dtype = (torch.float32, torch.float32, torch.bfloat16, torch.float16)[
        int(torch.randint(4, (), generator=generator))
    ]
    rows, depth, columns = size(1, 64), size(1, 512), size(1, 96)
    a, b = values(rows, depth).to(dtype), values(columns, depth).t().to(dtype)
    order = torch.randperm(depth, generator=generator)
    yield Subject(f"product {rows} x {depth} x {columns} {dtype}", torch.matmul, (a, b), _products(order))
    yield Subject(f"sum of {depth} {dtype}", lambda x: x.sum(1), (a,), _sums(order))
    hidden, inner = size(2, 64), size(2, 64)
    x, w1, w2 = values(rows, hidden), values(2 * inner, hidden) / hidden**0.5, values(hidden, inner) / inner**0.5
    orders = torch.randperm(hidden, generator=generator), torch.randperm(inner, generator=generator)
    inputs = tuple(t.to(dtype) for t in (x, w1, w2))
    yield Subject(
        f"mlp {rows} x {hidden} x {inner} {dtype}",
        _mlp,
        inputs,
        {
            "library": _mlp,
            "shuffled": lambda x, w1, w2: _shuffled_mlp(x, w1, w2, *orders),
            "transposed": lambda x, w1, w2: _mlp(x, w1, w2, lambda x, w: (w @ x.t()).t()),
        },
    )
    for place, name in enumerate(("x", "gate and up", "down")):
        yield Subject(
            f"gradient of {name}, {rows} x {hidden} x {inner} {dtype}",
            _gradient(_mlp, place),
            inputs,
            {
                "library": _gradient(_mlp, place),
                "shuffled": _gradient(lambda x, w1, w2: _shuffled_mlp(x, w1, w2, *orders), place),
            },
        )
    scores = 10 * values(rows, columns).to(dtype)
    yield Subject(
        f"softmax {rows} x {columns} {dtype}",
        lambda x: torch.softmax(x, -1),
        (scores,),
        {
            "library": lambda x: torch.softmax(x, -1),
            "by hand": _softmax,
            "reversed": lambda x: _softmax(x.flip(-1)).flip(-1),
        },
    )


def _products(order: Tensor) -> dict[str, Kernel]:
    return {
        "library": torch.matmul,
        "reversed": lambda a, b: a.flip(1) @ b.flip(0),
        "shuffled": lambda a, b: a[:, order] @ b[order],
        "transposed": lambda a, b: (b.t() @ a.t()).t(),
        "blocks of 16": lambda a, b: _blocks(a, b, 16),
        "blocks of 64, reversed": lambda a, b: _blocks(a.flip(1), b.flip(0), 64),
        "one by one": _one_by_one,
        "one by one, fused": lambda a, b: _one_by_one(a, b, fused=True),
        "pairs": _pairs,
        "lanes of 8": lambda a, b: _lanes(a, b, 8),
    }


def _sums(order: Tensor) -> dict[str, Kernel]:
    def as_product(kernel: Kernel) -> Kernel:
        return lambda x: kernel(x, x.new_ones(x.shape[1], 1))[:, 0]

    kernels = {name: as_product(kernel) for name, kernel in _products(order).items()}
    return kernels | {"library": lambda x: x.sum(1), "columns": lambda x: x.t().contiguous().sum(0)}


def _blocks(a: Tensor, b: Tensor, size: int) -> Tensor:
    total = torch.zeros(len(a), b.shape[1])
    for x, y in zip(a.float().split(size, 1), b.float().split(size, 0), strict=True):
        total = total + x @ y
    return total.to(a.dtype)


def _one_by_one(a: Tensor, b: Tensor, fused: bool = False) -> Tensor:
    total = torch.zeros(len(a), b.shape[1])
    for x, y in zip(a.float().t(), b.float(), strict=True):
        total = (total.double() + torch.outer(x.double(), y.double())).float() if fused else total + torch.outer(x, y)
    return total.to(a.dtype)


def _pairs(a: Tensor, b: Tensor) -> Tensor:
    terms = a.float().t()[:, :, None] * b.float()[:, None]
    while len(terms) > 1:
        odd = terms[-1:] if len(terms) % 2 else terms[:0]
        terms = torch.cat([terms[: len(terms) - len(odd) : 2] + terms[1 : len(terms) - len(odd) : 2], odd])
    return terms[0].to(a.dtype)


def _lanes(a: Tensor, b: Tensor, count: int) -> Tensor:
    lanes = [_one_by_one(a[:, i::count].float(), b[i::count].float()) for i in range(min(count, a.shape[1]))]
    total = lanes[0]
    for lane in lanes[1:]:
        total = total + lane
    return total.to(a.dtype)


def _mlp(
    x: Tensor, w1: Tensor, w2: Tensor, linear: Callable[[Tensor, Tensor], Tensor] = lambda x, w: x @ w.t()
) -> Tensor:
    gate, up = linear(x, w1).chunk(2, 1)
    return linear(silu(gate) * up, w2)


def _shuffled_mlp(x: Tensor, w1: Tensor, w2: Tensor, hidden: Tensor, inner: Tensor) -> Tensor:
    both = torch.cat([inner, len(inner) + inner])
    return _mlp(x[:, hidden], w1[both][:, hidden], w2[:, inner])


def _gradient(function: Kernel, place: int) -> Kernel:
    def call(*inputs: Tensor) -> Tensor:
        leaves = [t.detach().requires_grad_() for t in inputs]
        out = function(*leaves)
        upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(0)).bfloat16().to(out.dtype)
        return torch.autograd.grad(out, leaves[place], upstream)[0]

    return call


def _softmax(x: Tensor) -> Tensor:
    e = (x.float() - x.float().amax(-1, keepdim=True)).exp()
    return (e / e.sum(-1, keepdim=True)).to(x.dtype)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print rate and smallest errors; return 0 if the rate and the largest error / bound keep their limits, else 1."""
    parser = argparse.ArgumentParser(prog="alarms", description=__doc__.split("\n")[0])
    parser.add_argument("--comparisons", type=int, default=30_000, help="correct results (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    found = measure(options.comparisons, options.seed)
    print(found)
    for depth in (32, 200, 2048):
        for kind in ("native", "exact", "sequential"):
            errors = "; ".join(f"{name} {error:.1e}" for name, error in smallest_errors(depth, kind).items())
            print(f"smallest error found, depth {depth}, {kind} yardstick: {errors}")
    return int(found.rate > LIMIT or found.largest > LARGEST)


if __name__ == "__main__":
    sys.exit(main())
