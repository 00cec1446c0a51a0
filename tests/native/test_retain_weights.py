"""retain_weights in C++: as exact as the reference, and the same bits for any number of threads."""

import math

import pytest
import torch

from moe_unlearn import native
from moe_unlearn.ops import retain_weights
from moe_unlearn.ops.bits import pack_bits
from moe_unlearn.ops.retain_weights import moments, tilted_weights
from moe_unlearn.testing import assert_as_accurate, integers, poison
from tests.support.covers import cover

pytestmark = pytest.mark.quick
BIAS = -0.3


def case(num_tokens, size, seed=0):
    """(members, words, tilt) with frequencies and tilts that differ from expert to expert."""
    generator = torch.Generator().manual_seed(seed)
    rates = torch.rand(size, generator=generator) * 0.6 + 0.2
    members = torch.rand(num_tokens, size, generator=generator) < rates
    tilt = torch.randn(size, generator=generator, dtype=torch.float64) / (1 + size) ** 0.5
    return members, pack_bits(members), tilt


def oracle(members, tilt, cap):
    extended = torch.cat([members.new_ones(len(members), 1), members], 1).double()
    raw = (BIAS + members.double() @ tilt).exp()
    free = torch.where(raw < cap, raw, 0)
    return raw.clamp_max(cap), extended.t() @ raw.clamp_max(cap), (extended * free[:, None]).t() @ extended


@cover(
    indirect=["instruction_set"],
    cap=(math.inf, 1.1),
    num_tokens=(0, 1, 40, 9001),
    size=(0, 1, 31, 32, 33, 70),
    instruction_set=native.INSTRUCTION_SETS,
)
def test_against_the_formulas(size, num_tokens, cap, instruction_set):
    members, words, tilt = case(num_tokens, size)
    with poison():
        weights = tilted_weights(words, tilt, BIAS, cap=cap, impl="cpu")
        first, second = moments(words, tilt, BIAS, cap=cap, impl="cpu")
    assert torch.equal(second, second.t())
    for got, gold in zip((weights, first, second), oracle(members, tilt, cap), strict=True):
        # rounded to float32: another order of float64 sums passes, a token too many fails
        assert_as_accurate(got.float(), gold.float(), gold)


def test_zero_tilt_counts_exactly():
    members, words, tilt = case(5000, 40)
    first, second = moments(words, torch.zeros_like(tilt), 0.0, impl="cpu")
    extended = torch.cat([torch.ones(5000, 1), members], 1).double()
    assert torch.equal(second, extended.t() @ extended) and torch.equal(first, second[0])


def test_same_bits_for_any_number_of_threads():
    _, words, tilt = case(20000, 37)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(
                (
                    tilted_weights(words, tilt, BIAS, cap=2.0, impl="cpu"),
                    *moments(words, tilt, BIAS, cap=2.0, impl="cpu"),
                )
            )
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_overflow_leaves_nan_and_infinity_where_the_reference_does():
    members, words, tilt = case(40, 6)
    members[0] = torch.tensor([True, False, True, True, True, True])
    words, tilt = pack_bits(members), tilt.abs() + 300
    for cap in (math.inf, 2.0):
        results = [moments(words, tilt, 0.0, cap=cap, impl=impl) for impl in ("cpu", "ref")]
        for got, expected in zip(*results, strict=True):
            assert torch.equal(got.isnan(), expected.isnan()) and torch.equal(got.isinf(), expected.isinf())
        weights = [tilted_weights(words, tilt, 0.0, cap=cap, impl=impl) for impl in ("cpu", "ref")]
        assert torch.equal(*weights)


def test_strided_words_and_tilt():
    _, words, tilt = case(50, 40)
    moved = torch.stack([words, words], -1)[..., 0], torch.stack([tilt, tilt], -1)[..., 0]
    for got, expected in zip(moments(*moved, BIAS, impl="cpu"), moments(words, tilt, BIAS, impl="cpu"), strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("cap", [None, 3.0])
def test_the_solver_finds_what_it_finds_on_the_reference(cap):
    members, _, _ = case(3000, 12)
    target = members.double().mean(0) * (1 + 0.2 * integers(12, low=-1, high=1).double())
    ours, reference = (retain_weights(members, target, cap=cap, impl=impl) for impl in ("cpu", "ref"))
    assert_as_accurate(ours.weights, reference.weights, reference.weights.double())
    assert float((ours.achieved - target).abs().max()) <= 1e-7
