"""The criterion by which this project decides that a kernel is right, and inputs that break kernels.

**The criterion.** The truth (`gold`) is the reference in float64 on inputs already quantised to the dtype under
test; `baseline` is the same reference computed in that dtype. An output passes when

    max |out - gold|  <= max(2 max |baseline - gold|, 6 spread) + 2 ulp(max |gold|)          in every row
    rms(out - gold)   <= max(1.25 (1 + 4 / sqrt(n)) rms(baseline - gold), (1 + 6 / sqrt(m)) rms(spread))
                         + ulp(rms gold) max(1 / 4, 2 / sqrt(n))                   over all elements, n of them
    NaN and infinity stand in the same places as in the baseline
    dtype and shape are those of the baseline

A row is the last dimension; rows shorter than 64 are pooled with their neighbours to at least 64, since
the largest error of a few elements says little. For the same reason, and since one factor's error can run
through a whole row of a weight gradient, the error of the baseline (and the spread) in a row counts as at least
the 90th percentile over the rows that are not zero, relative to max |gold|. The term 4 / sqrt(n) is the sampling
error of a ratio of two RMS values. Where few large values dominate, n is their number, estimated as
3 (sum gold^2)^2 / sum gold^4, which is the number of elements if these are normally distributed.

**The spread.** The error of the same maths in the same dtype depends on the machine: a library that sums well, or
happens to, leaves nearly no error, and a correct kernel with another order of sums would fail. So an output may also
be as far off as the roundings of any order of sums take it. `spread` is the deviation from gold, element by element,
of 16 runs of the reference with random roundings (`rounding` has the derivation: u sqrt(sum of squared partial
sums / 3) for each sum, the largest of several orders, computed in float64); in a row its largest element counts. It
follows from the operands alone, not from the machine. It is computed only where an output does not pass without it,
and only ever allows more.

The 6 is chosen so that correct sums in ten orders err by less than 0.7 of the bound, and a fitted tail gives at most
1e-7 false rejections per comparison: `python -m moe_unlearn.regress.alarms` measures both on a machine,
`tests/regress/test_alarms.py` repeats a part of it, and `benchmarks/NOTES.md` describes what was tried. Errors of many
elements may have one cause. Over the 16 runs the mean square then varies like that of a few independent elements:
m = 2 / (its relative variance), at most n.

Source: our specification; the comparison with the error of the same maths in the same dtype follows the
practice of flash-attention's tests.
"""

import contextlib
import math
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moe_unlearn.testing.rounding import ulp
from moe_unlearn.testing.yardstick import RUNS, Baseline, Reference, current_yardstick

MINIMUM_ROW = 64
SPREAD = 6.0  # the allowed error in deviations


class AccuracyError(AssertionError):
    """An output is less accurate than its baseline allows; the message says where and by how much."""


def described() -> dict[str, object]:
    """Return the yardstick and the numbers of the criterion that verdicts rest on, for a record."""
    return {"arithmetic": current_yardstick(), "runs": RUNS, "spread": SPREAD}


def assert_as_accurate(actual: Tensor, baseline: Tensor | Baseline, gold: Tensor, *, name: str = "output") -> None:
    """Raise AccuracyError unless `actual` meets the criterion of this module's docstring.

    Args:
        actual: the result under test.
        baseline: the reference in the same dtype; a plain tensor comes without a spread.
        gold: the reference in float64. All have the same shape, `actual` and `baseline` the same dtype.
    """
    value, rounded = (baseline.value, baseline.rounded) if isinstance(baseline, Baseline) else (baseline, None)
    if actual.shape != gold.shape or value.shape != gold.shape:
        raise AccuracyError(
            f"{name}: shapes differ: actual {tuple(actual.shape)}, baseline {tuple(value.shape)}, "
            f"gold {tuple(gold.shape)}"
        )
    if actual.dtype != value.dtype:
        raise AccuracyError(f"{name}: expected dtype {value.dtype}; got {actual.dtype}")
    if gold.numel() == 0:
        return
    if not actual.is_floating_point():
        if not torch.equal(actual, value):
            raise AccuracyError(f"{name}: {int((actual != value).sum())} integer elements differ")
        return
    for what, find in (("NaN", torch.isnan), ("+inf", torch.isposinf), ("-inf", torch.isneginf)):
        if not torch.equal(find(actual), find(value)):
            raise AccuracyError(
                f"{name}: {what} in {int(find(actual).sum())} places, baseline has {int(find(value).sum())}"
            )
    margins = margin(actual, value, gold)
    if rounded is not None and not margins.within:
        margins = margin(actual, value, gold, rounded())
    if not margins.row <= 1:
        raise AccuracyError(f"{name}: {margins.where} ({actual.dtype})")
    if not margins.rms <= 1:
        raise AccuracyError(f"{name}: {margins.whole} ({actual.dtype})")


@dataclass(frozen=True)
class Margin:
    """Errors of the worst row and of the RMS, relative to what is allowed (at most 1 passes); and both in words."""

    row: float
    rms: float
    where: str
    whole: str

    @property
    def within(self) -> bool:
        return self.row <= 1 and self.rms <= 1


def margin(actual: Tensor, value: Tensor, gold: Tensor, rounded: Tensor | None = None) -> Margin:
    """Compute the errors of `actual` relative to what the criterion allows; `rounded` [RUNS, ...] gives the spread."""
    actual, value = actual.detach(), value.detach()
    finite = value.isfinite() & gold.isfinite()
    truth = torch.where(finite, gold.detach().double(), 0.0)
    error, allowed = (torch.where(finite, v.double() - truth, 0.0).abs() for v in (actual, value))
    squares = None
    if rounded is not None:
        off = rounded.double() - truth
        squares = torch.where(finite & off.isfinite(), off, 0.0).square()
    return _margin(error, allowed, truth, squares, actual.dtype)


def _margin(error: Tensor, allowed: Tensor, truth: Tensor, squares: Tensor | None, dtype: torch.dtype) -> Margin:
    scale = _pooled_maximum(truth.abs())
    count = _effective(truth)
    bound, rms_bound = 2 * _typical(allowed, scale, dtype), 1.25 * (1 + 4 / math.sqrt(count)) * _rms(allowed)
    if squares is not None:
        # the last rounding's mean square is 1/6 of a squared last bit where it is random, 1/12 where it is to nearest
        spread, rounding = squares.mean(0), ulp(truth, dtype).square()
        inner, nearest = ((spread - rounding / n).clamp_min(0).sqrt() for n in (6, 12))
        # the bounds below add last bits for the last rounding
        bound = torch.maximum(bound, SPREAD * _typical(inner, scale, dtype))
        independent = min(count, _independent(squares))
        rms_bound = max(rms_bound, (1 + SPREAD / math.sqrt(independent)) * _rms(nearest))
    bound = bound + 2 * ulp(scale, dtype)
    last_bit = float(ulp(truth.square().mean().sqrt(), dtype))
    rms_bound += last_bit * max(1 / 4, 2 / math.sqrt(truth.numel()))
    largest, rms = _pooled_maximum(error), _rms(error)
    worst = int((largest / bound).argmax())
    at, most = float(largest[worst]), float(bound[worst])
    where = (
        f"pooled row {worst} of {len(bound)}: error {at:.3e} exceeds {most:.3e} "
        f"(largest |gold| {float(scale[worst]):.3e})"
    )
    return Margin(at / most, rms / rms_bound, where, f"rms error {rms:.3e} exceeds {rms_bound:.3e}")


def _typical(deviation: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the largest deviation of each row, at least the typical one for rows of its scale."""
    largest = _pooled_maximum(deviation)
    # rows that are exactly zero, such as those of empty experts, say nothing about the others
    relative = (largest / scale.clamp_min(torch.finfo(dtype).tiny))[scale > 0]
    typical = relative.kthvalue(math.ceil(0.9 * len(relative))).values if len(relative) else 0.0
    return torch.maximum(largest, typical * scale)


def _effective(truth: Tensor) -> float:
    """Estimate how many elements make up an RMS of errors proportional to the values.

    If the values are normally distributed, all do; if one of them is huge, one does.
    """
    squares = (truth / truth.abs().max().clamp_min(torch.finfo(torch.float64).tiny)).square()
    total = float(squares.sum())
    return min(max(3 * total**2 / float(squares.square().sum()), 1.0), truth.numel()) if total else truth.numel()


def _independent(squares: Tensor) -> float:
    """Estimate how many independent elements have a mean square that varies like that of `squares` [RUNS, ...]."""
    means = squares.reshape(len(squares), -1).mean(1)
    mean, variance = float(means.mean()), float(means.var())
    return max(2 * mean**2 / variance, 1.0) if variance else math.inf


def _rms(values: Tensor) -> float:
    return float(values.square().mean().sqrt())


def _pooled_maximum(values: Tensor) -> Tensor:
    """Return the maxima of rows, pooled to at least MINIMUM_ROW elements; see the module docstring."""
    rows = values.reshape(-1, values.shape[-1] if values.dim() else 1)
    pool = min(math.ceil(MINIMUM_ROW / rows.shape[1]), rows.shape[0])
    maxima = rows.amax(1)
    groups = len(maxima) // pool
    # the remainder joins the last whole group, so that no pool is too small
    index = (torch.arange(len(maxima), device=values.device) // pool).clamp_max(groups - 1)
    return torch.full((groups,), -math.inf, dtype=maxima.dtype, device=values.device).scatter_reduce(
        0, index, maxima, "amax"
    )


def check_against_ref(
    op: Callable,
    ref: Callable,
    inputs: Mapping[str, Any],
    *,
    gradients: tuple[str, ...] = (),
    seed: int = 0,
    gradient_layout: str = "contiguous",
) -> None:
    """Check `op(**inputs)` against `ref(**inputs)`: outputs, and the gradients of the named inputs.

    The reference runs twice, in the given dtype and in float64 on the same values. Upstream gradients are
    random, never uniform, and have the memory layout `gradient_layout` (see `LAYOUTS`).
    """
    made = outcomes(op, ref, inputs, gradients=gradients, seed=seed, gradient_layout=gradient_layout)
    for name, triple in made.items():
        assert_as_accurate(*triple, name=name)


def outcomes(
    op: Callable,
    ref: Callable,
    inputs: Mapping[str, Any],
    *,
    gradients: tuple[str, ...] = (),
    seed: int = 0,
    gradient_layout: str = "contiguous",
    baseline: Callable | None = None,
) -> dict[str, tuple[Tensor, Baseline, Tensor]]:
    """Compute what `check_against_ref` compares: (actual, baseline, gold) of "output 0", ... and "gradient of x", ...

    An op that returns a dict gives names "output key". `baseline` computes in the given dtype in place of `ref`.
    """
    dtypes: list[torch.dtype] = []

    def evaluated(function: Callable, arguments: Mapping[str, Any]) -> dict[str, Tensor | None]:
        return evaluate(function, arguments, gradients, seed=seed, gradient_layout=gradient_layout, dtypes=dtypes)

    actual = evaluated(op, inputs)
    reference = Reference(lambda: evaluated(baseline or ref, inputs))
    gold = evaluated(ref, {k: _double(v) for k, v in inputs.items()})
    names = [list(made) for made in (actual, reference.value, gold)]
    if names[0] != names[1] or names[1] != names[2]:
        raise AccuracyError(f"op, baseline and gold give different outputs: {names[0]}, {names[1]}, {names[2]}")
    found: dict[str, tuple[Tensor, Baseline, Tensor]] = {}
    for name in names[0]:
        first, last = actual[name], gold[name]
        if first is None or last is None or reference.value[name] is None:
            missing = [made[name] is None for made in (actual, reference.value, gold)]
            raise AccuracyError(f"{name}: missing in {missing} (op, ref, gold)")
        found[name] = first, reference.baseline(operator.itemgetter(name)), last
    return found


def evaluate(
    function: Callable,
    arguments: Mapping[str, Any],
    gradients: tuple[str, ...] = (),
    *,
    seed: int = 0,
    gradient_layout: str = "contiguous",
    dtypes: list[torch.dtype] | None = None,
) -> dict[str, Tensor | None]:
    """Compute `function(**arguments)` and the gradients of the named arguments: "output 0", ..., "gradient of x", ...

    The upstream gradients are those of `check_against_ref`. An empty list `dtypes` is filled with the dtypes of the
    outputs that have a gradient. Upstream gradients are rounded to the dtypes in the list, so that further runs with
    the same list have the upstream gradients of the first.
    """
    leaves = {k: _leaf(v) if k in gradients else v for k, v in arguments.items()}
    outputs = _named(function(**leaves))
    floating = [out for out in outputs.values() if out.is_floating_point() and out.requires_grad]
    dtypes = [] if dtypes is None else dtypes
    dtypes.extend(() if dtypes else [out.dtype for out in floating])
    made: dict[str, Tensor | None] = {name: out.detach() for name, out in outputs.items()}
    if gradients:
        upstream = _random_upstream(floating, dtypes, seed, gradient_layout)
        values = torch.autograd.grad(floating, [leaves[k] for k in gradients], upstream, allow_unused=True)
        made |= {f"gradient of {k}": value for k, value in zip(gradients, values, strict=True)}
    return made


def _random_upstream(outputs: list[Tensor], dtypes: list[torch.dtype], seed: int, layout: str) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    upstream = []
    for out, dtype in zip(outputs, dtypes, strict=True):
        value = torch.randn(out.shape, generator=generator).to(dtype).to(out.dtype).to(out.device)
        upstream.append(in_layout(value, layout))
    return upstream


def _double(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.double() if value.is_floating_point() else value
    if isinstance(value, (list, tuple)) and not hasattr(value, "_fields"):
        return type(value)(map(_double, value))
    return value


def _leaf(value: Tensor) -> Tensor:
    # detach keeps strides, so a transposed or expanded input stays so
    return value.detach().requires_grad_()


def _named(value: object) -> dict[str, Tensor]:
    """Return the tensors that a function returned (one, several, or a dict of them) by name."""
    if not isinstance(value, Mapping):
        value = dict(enumerate(value if isinstance(value, (tuple, list)) else (value,)))
    return {f"output {key}": v for key, v in value.items() if isinstance(v, Tensor)}


LAYOUTS = ("contiguous", "transposed", "sliced", "offset", "strided")


def in_layout(value: Tensor, layout: str) -> Tensor:
    """Return the values of `value` in another memory layout.

    `transposed`: first and last dimension swapped in memory; `sliced`: a window of a larger tensor whose
    rest is NaN; `offset`: storage starts one element late; `strided`: every second element of a
    NaN-filled buffer. Integer buffers are filled with their largest value instead of NaN.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"layout must be one of {LAYOUTS}; got {layout!r}")
    if layout == "contiguous" or value.dim() == 0:
        return value.contiguous()
    if layout == "transposed":
        return value.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "offset":
        flat = _poisoned((value.numel() + 1,), value)
        return flat[1:].view(value.shape).copy_(value)
    if layout == "sliced":
        buffer = _poisoned([n + 2 for n in value.shape], value)
        return buffer[tuple(slice(1, n + 1) for n in value.shape)].copy_(value)
    buffer = _poisoned([*value.shape[:-1], 2 * value.shape[-1]], value)
    return buffer[..., ::2].copy_(value)


def _poisoned(shape: Sequence[int], like: Tensor) -> Tensor:
    fill = math.nan if like.is_floating_point() else torch.iinfo(like.dtype).max
    return torch.full(tuple(shape), fill, dtype=like.dtype, device=like.device)


def integers(*shape: int, low: int = -3, high: int = 3, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Draw small integers as floats; every partial sum is exact, so any order of additions must match bitwise."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(low, high + 1, shape, generator=generator).to(dtype)


ROUTINGS = (
    "uniform",
    "skewed",
    "one_expert",
    "first_empty",
    "last_empty",
    "half_empty",
    "sentinels",
    "all_sentinels",
)


def routing(pattern: str, num_tokens: int, num_experts: int, top_k: int, *, seed: int = 0) -> Tensor:
    """Draw a `top_k_index` int64 [T, K] of a named pattern; experts within one row are distinct where possible.

    `one_expert` sends every row to expert E // 2 (a repeated id when K > 1); `sentinels` replaces about a
    third of the ids by E, transformers' "not on this rank".
    """
    if pattern not in ROUTINGS:
        raise ValueError(f"routing pattern must be one of {ROUTINGS}; got {pattern!r}")
    generator = torch.Generator().manual_seed(seed)
    if pattern == "all_sentinels":
        return torch.full((num_tokens, top_k), num_experts)
    if pattern == "one_expert":
        return torch.full((num_tokens, top_k), num_experts // 2)
    probability = torch.ones(num_experts)
    if pattern == "skewed":
        probability = 1.0 / torch.arange(1, num_experts + 1).float() ** 1.5
    empty = {"first_empty": [0], "last_empty": [num_experts - 1], "half_empty": range(0, num_experts, 2)}
    for expert in empty.get(pattern, ()):
        probability[expert] = 0.0
    if num_tokens == 0:
        return torch.empty(0, top_k, dtype=torch.int64)
    few = int((probability > 0).sum()) < top_k
    index = torch.multinomial(probability.expand(num_tokens, -1), top_k, few, generator=generator)
    if pattern == "sentinels":
        index[torch.rand(index.shape, generator=generator) < 1 / 3] = num_experts
    return index


@contextlib.contextmanager
def poison() -> Iterator[None]:
    """Fill every `torch.empty*` made inside with NaN or the largest integer, so that reading it is noticed."""
    previous = torch.are_deterministic_algorithms_enabled()
    setting: Any = torch.utils.deterministic  # its attribute is a property of the module, which no stub knows
    fill = setting.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    setting.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(previous)
        setting.fill_uninitialized_memory = fill
