"""Cases of retain_weights: members, their passes by the formulas, and what holds of every solution."""

import math
from typing import NamedTuple

import pytest
import torch

from moe_unlearn.ops.bits import pack_bits
from moe_unlearn.ops.retain_weights import moments, tilted_weights
from moe_unlearn.testing import assert_as_accurate, poison
from tests.support.impls import Impl

FLOAT32, FLOAT64 = torch.finfo(torch.float32).eps, torch.finfo(torch.float64).eps
EXACT = 1e-7  # what is promised of a reachable target
SIZES = (0, 1, 2, 30, 31, 32, 33, 63, 64, 65, 70)  # either side of a word, and of the 1 that stands behind the members
BIAS = -0.3


def random_members(num_tokens, rates, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(num_tokens, len(rates), generator=generator) < torch.as_tensor(rates)


def frequency(members):
    return members.double().mean(0)


class Passes(NamedTuple):
    """The operands of the passes."""

    members: torch.Tensor
    words: torch.Tensor
    tilt: torch.Tensor


def passes(num_tokens, size, seed=0) -> Passes:
    """Return frequencies, tilts and weights that differ from expert to expert."""
    generator = torch.Generator().manual_seed(seed)
    members = random_members(num_tokens, torch.rand(size, generator=generator) * 0.6 + 0.2, seed)
    tilt = torch.randn(size, generator=generator, dtype=torch.float64) / (1 + size) ** 0.5
    return Passes(members, pack_bits(members), tilt)


def oracle(members, tilt, bias=BIAS, cap=math.inf):
    """(weights, first, second) in float64, by the formulas."""
    extended = torch.cat([members.new_ones(len(members), 1), members], 1).double()
    raw = (bias + members.double() @ tilt).exp()
    free = torch.where(raw < cap, raw, 0)
    return raw.clamp_max(cap), extended.t() @ raw.clamp_max(cap), (extended * free[:, None]).t() @ extended


def binding(made: Passes) -> float:
    """Return a cap half way between the smallest and the largest weight, if they differ."""
    raw = oracle(made.members, made.tilt)[0]
    return float(raw.min() + raw.max()) / 2 if len(raw.unique()) > 1 else 0.5


def run(impl: Impl, made: Passes, bias=BIAS, cap=math.inf, layout="contiguous") -> list:
    """Return weights and both moments of copies of the words and the tilt, on the CPU."""
    words, tilt = impl.moved((made.words, made.tilt), layout)
    with poison():
        weights = tilted_weights(words, tilt, bias, cap=cap, impl=impl.name)
        return [value.cpu() for value in (weights, *moments(words, tilt, bias, cap=cap, impl=impl.name))]


def check(impl: Impl, made: Passes, bias=BIAS, cap=math.inf, layout="contiguous") -> list:
    """Each rounded to float32: another order of float64 sums passes, a token too many fails."""
    weights, first, second = results = run(impl, made, bias, cap, layout)
    assert weights.dtype == torch.float32 and first.dtype == second.dtype == torch.float64
    assert torch.equal(second, second.t())
    truth = oracle(made.members, made.tilt, bias, cap)
    for name, got, gold in zip(("weights", "first", "second"), results, truth, strict=True):
        assert_as_accurate(got.float(), gold.float(), gold, name=name)
    return results


def assert_same(actual, expected) -> None:
    assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))


def check_solution(members, result, cap=None):
    """Properties that hold whatever the target: mean 1, the cap, the rule, achieved and ESS from the weights."""
    w = result.weights.double().cpu()
    assert result.weights.dtype == torch.float32 and w.shape == (len(members),)
    assert abs(float(w.mean()) - 1) <= 4 * FLOAT32
    assert cap is None or float(w.max()) <= cap * (1 + FLOAT32)
    rule = (result.bias + members.double() @ result.tilt).exp().clamp_max(math.inf if cap is None else cap)
    assert float((rule - w).abs().max()) <= FLOAT32 * float(w.max())
    moved = (w[:, None] * members).mean(0)
    assert float((moved - result.achieved).abs().max()) <= 4 * FLOAT32
    assert result.ess == pytest.approx(float(w.sum() ** 2 / w.square().sum()))
