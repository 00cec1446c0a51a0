"""gram in Triton: blocks, programs and tiles, and how many sets a launch takes."""

import pytest
import torch

from moe_unlearn.ops.bits import pack_bits
from moe_unlearn.testing import ROUTINGS
from moe_unlearn.triton_kernels import configs
from moe_unlearn.triton_kernels.gram import _launches
from tests.ops.gram.cases import (
    BF16,
    F16,
    F32,
    Rows,
    assert_same_sums,
    by_hand,
    factors,
    gradient_sets,
    half,
    normal,
    run,
    run_factors,
    whole,
)
from tests.support.covers import cover
from tests.support.impls import REF, TRITON


@pytest.fixture
def small(monkeypatch):
    """Two words a block, three programs, sums of two: a few hundred elements cross every boundary."""
    monkeypatch.setattr(configs, "gram", lambda: configs.Gram(3, 2, 4, 2))
    monkeypatch.setattr(configs, "gram_factors", lambda sets: configs.GramFactors(16, 16, 4, 2, 2))


@pytest.mark.parametrize("shape", [(1,), (32,), (31, 33), (2, 3, 64), (5, 7, 2, 45), (3, 129)], ids=str)
def test_blocks_and_programs(small, shape):
    sets, mask = [[whole(shape, i, BF16)] for i in range(3)], half(shape)
    flat = torch.stack([g.double().flatten() for (g,) in sets])
    assert torch.equal(run(TRITON, sets), flat @ flat.t())
    flat = flat * mask.flatten()
    assert torch.equal(run(TRITON, sets, [pack_bits(mask)]), flat @ flat.t())


@pytest.mark.quick
@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
def test_sums_of_many_blocks_are_accurate_far_below_float32(small, dtype):
    sets = gradient_sets(3, lambda shape, seed: normal(shape, seed, dtype))
    assert_same_sums(run(TRITON, sets), by_hand(sets))


@pytest.mark.parametrize("m", range(1, 12))
def test_every_pair_is_in_a_launch_in_ascending_order(m):
    pairs = {(a, b) for numbers in _launches(m) for a in numbers for b in numbers if a <= b}
    assert pairs == {(a, b) for a in range(m) for b in range(a, m)}
    assert all(list(numbers) == sorted(set(numbers)) and len(numbers) <= 4 for numbers in _launches(m))


@pytest.mark.quick
@cover(pattern=ROUTINGS, m=(1, 2, 5))  # more than three take several launches
@pytest.mark.slow(but=2)
def test_factors_of_integers_match_bitwise(small, pattern, m):
    rows, truth = factors(pattern, m, whole, num_tokens=30)
    assert torch.equal(run_factors(TRITON, rows), truth)


def test_factors_wider_than_a_block():
    rows = Rows([whole((37, 45), i) for i in range(2)], whole((37, 70), 9), torch.tensor([0, 33, 33, 37]))
    assert torch.equal(run_factors(TRITON, rows), run_factors(REF, rows))
