"""Compare what a kernel gives now with what it gave: bitwise equal, different but as accurate, or less accurate.

For each output and gradient, with gold the reference in float64 on the same inputs:
    equal       the recorded dtype, shape and bits
    accurate    other bits that meet the criterion of `testing` with the recorded values as its baseline: the largest
                error of a row is at most twice, and the RMS error at most 1.25 times the recorded one, or no more than
                the roundings of the reference in any order of its sums make; NaN and infinity stand in the same
                places; integers are equal
    inaccurate  anything else

A kernel without a record is compared with its baseline, the reference in its own dtype. Values that were recorded on
another machine, or that are nearly exact by chance, call no correct kernel wrong. Source: our specification.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moe_unlearn.regress.case import Case, digests
from moe_unlearn.testing import AccuracyError, assert_as_accurate, outcomes
from moe_unlearn.testing.yardstick import Baseline

EQUAL, ACCURATE, INACCURATE = "equal", "accurate", "inaccurate"


class Evaluation(NamedTuple):
    """One run of a case, all tensors on the CPU and contiguous; `actual`, `baseline` and `gold` have the same keys."""

    inputs: dict[str, str]  # SHA-256 of each input
    actual: dict[str, Tensor]
    baseline: dict[str, Baseline]
    gold: dict[str, Tensor]

    def measured_by(self, values: Mapping[str, Tensor]) -> dict[str, Tensor | Baseline]:
        """Return other values of these outputs, such as recorded ones, as baselines with this reference's spread."""
        known = self.baseline
        return {name: known[name].replaced(value) if name in known else value for name, value in values.items()}


class Verdict(NamedTuple):
    """Level that one output reached; `ratio` is its RMS error over that of the compared values."""

    output: str
    level: str
    ratio: float
    message: str = ""


class CaseError(ValueError):
    """Error for a case that cannot be judged: its inputs do not follow from the seed, or its reference fails."""


class MutationError(AssertionError):
    """Error for a kernel that changed its inputs."""


def evaluate(case: Case, seed: int = 0, *, routing: str | None = None, **sizes: int) -> Evaluation:
    """Run the kernel, its baseline and its truth on the inputs of `seed` and return the outcome.

    Raises CaseError where inputs or reference are to blame, MutationError where the kernel changed an input, and
    whatever else the kernel itself raises.
    """
    try:
        inputs = case.make(seed, routing=routing, **sizes)
        before = digests(inputs)
        if digests(case.make(seed, routing=routing, **sizes)) != before:
            raise CaseError(f"case {case.name!r}: inputs({seed}) gives other values each time; the seed must decide")
    except CaseError:
        raise
    except Exception as error:
        raise CaseError(f"case {case.name!r}: its inputs fail: {error!r}") from error

    def reference(**arguments: Any) -> Any:
        try:
            return case.reference(**arguments)
        except Exception as error:
            raise CaseError(f"case {case.name!r}: its reference fails: {error!r}") from error

    def function(**arguments: Any) -> Any:
        result = case.function(**arguments)
        if digests(arguments) != before:
            changed = [name for name, sha in digests(arguments).items() if sha != before[name]]
            raise MutationError(f"case {case.name!r}: the kernel changed its input {', '.join(changed)}")
        return result

    triples = outcomes(function, reference, inputs, gradients=tuple(case.gradients), seed=seed, baseline=case.baseline)
    if not triples:
        raise CaseError(f"case {case.name!r}: expected a tensor, or a tuple, list or dict of them; got none")
    actual = {name: _plain(triple[0]) for name, triple in triples.items()}
    gold = {name: _plain(triple[2]) for name, triple in triples.items()}
    return Evaluation(before, actual, {name: _plain_baseline(triple[1]) for name, triple in triples.items()}, gold)


def judge(actual: Tensor, expected: Tensor | Baseline, gold: Tensor, output: str = "output") -> Verdict:
    """Return the level of `actual` against `expected`, which was recorded or is a baseline."""
    value = expected.value if isinstance(expected, Baseline) else expected
    if same_bits(actual, value):
        return Verdict(output, EQUAL, 1.0)
    try:
        assert_as_accurate(actual, expected, gold, name=output)
    except AccuracyError as error:
        return Verdict(output, INACCURATE, error_ratio(actual, value, gold), str(error))
    return Verdict(output, ACCURATE, error_ratio(actual, value, gold))


def judge_all(
    actual: Mapping[str, Tensor], expected: Mapping[str, Tensor | Baseline], gold: Mapping[str, Tensor]
) -> list[Verdict]:
    """Return a verdict for each output, also for one that is missing on either side."""
    verdicts = []
    for name in [*expected, *(name for name in actual if name not in expected)]:
        if name not in actual or name not in expected:
            there = "is not given any more" if name not in actual else "was not there before"
            verdicts.append(Verdict(name, INACCURATE, math.inf, f"{name} {there}"))
        else:
            verdicts.append(judge(actual[name], expected[name], gold[name], name))
    return verdicts


def worst(verdicts: Sequence[Verdict]) -> str:
    """Return the lowest level among the verdicts."""
    return max((v.level for v in verdicts), key=(EQUAL, ACCURATE, INACCURATE).index)


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Return whether dtype, shape and bits are equal; signed zeros and the payloads of NaNs count."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return torch.equal(*(t.contiguous().reshape(-1).view(torch.uint8) for t in (a, b)))


def error_ratio(actual: Tensor, expected: Tensor, gold: Tensor) -> float:
    """Return the RMS error of `actual` over that of `expected`, where all are finite; NaN if they do not compare."""
    if not actual.shape == expected.shape == gold.shape or not actual.is_floating_point():
        return math.nan
    mine, theirs = rms_error(actual, gold), rms_error(expected, gold)
    return mine / theirs if theirs else (1.0 if mine == 0 else math.inf)


def rms_error(value: Tensor, gold: Tensor) -> float:
    """Return the root mean square of value - gold in float64, over the elements where both are finite."""
    error = value.double() - gold.double()
    error = error[error.isfinite()]
    return float(error.square().mean().sqrt()) if error.numel() else 0.0


def _plain(value: Tensor) -> Tensor:
    return value.detach().cpu().contiguous()


def _plain_baseline(baseline: Baseline) -> Baseline:
    return replace(baseline, value=_plain(baseline.value), rounded=lambda: baseline.rounded().cpu())
