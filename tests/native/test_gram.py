"""gram in C++: the sums of the reference, exact for integers, and the same bits for any number of threads."""

import pytest
import torch

from moe_unlearn.ops import gram, gram_factors
from moe_unlearn.ops.bits import pack_bits
from moe_unlearn.testing import LAYOUTS, ROUTINGS, assert_as_accurate, in_layout, integers, poison
from tests.ops.test_gram import by_hand, factors, gradient_sets, packed, random_masks

pytestmark = pytest.mark.quick
F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64


def normal(shape, seed, dtype=F32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def check(got, truth):
    """Rounded to float32: another order of float64 sums passes, a sum in float32 or an element too few fails."""
    assert got.dtype == F64 and torch.equal(got, got.t())
    assert_as_accurate(got.float(), truth.float(), truth)


@pytest.mark.parametrize("m", [1, 2, 3, 5])
@pytest.mark.parametrize("dtype", [F32, BF16, F16, F64], ids=str)
def test_integers_match_bitwise(m, dtype, instruction_set):
    missing = {(0, 1), (m - 1, 0)}
    sets = gradient_sets(m, lambda shape, seed: integers(*shape, seed=seed, dtype=dtype), missing)
    masks = random_masks()
    with poison():
        assert torch.equal(gram(sets, impl="cpu"), by_hand(sets))
        assert torch.equal(gram(sets, masks=packed(masks), impl="cpu"), by_hand(sets, masks))


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
def test_accurate_far_below_float32(dtype):
    sets = gradient_sets(3, lambda shape, seed: normal(shape, seed, dtype))
    masks = random_masks()
    check(gram(sets, impl="cpu"), by_hand(sets))
    check(gram(sets, masks=packed(masks), impl="cpu"), by_hand(sets, masks))


def test_every_instruction_set_has_the_same_bits():
    from moe_unlearn import native

    sets, masks = gradient_sets(3, normal), packed(random_masks())
    try:
        results = []
        for name in native.INSTRUCTION_SETS:
            native.instruction_set(name)
            results.append(gram(sets, masks=masks, impl="cpu"))
    finally:
        native.instruction_set("")
    assert all(torch.equal(result, results[0]) for result in results)


def test_what_a_mask_hides_may_hold_anything():
    g, mask = integers(5, 40), torch.rand(5, 40) < 0.5
    words = [pack_bits(mask)]
    for dirt in (torch.nan, torch.inf):
        dirty = g.masked_fill(~mask, dirt)
        assert torch.equal(gram([[dirty]], masks=words, impl="cpu"), gram([[g]], masks=words, impl="ref"))
        assert not gram([[dirty]], impl="cpu").isfinite().any()


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_memory_layout(layout, masked):
    """Rows of 70 elements are no whole words: what lies behind them in memory is NaN in some layouts."""
    a, b, mask = integers(2, 3, 70), integers(2, 3, 70, seed=1), pack_bits(torch.rand(2, 3, 70) < 0.5)
    moved = [[in_layout(a, layout)], [in_layout(b, "contiguous")]]
    masks = [in_layout(mask, layout)] if masked else None
    expected = gram([[a], [b]], masks=[mask] if masked else None, impl="ref")
    assert torch.equal(gram(moved, masks=masks, impl="cpu"), expected)
    row = integers(70).expand(2, 3, 70)
    assert torch.equal(gram([[row], [b]], impl="cpu"), gram([[row.clone()], [b]], impl="ref"))


def test_blocks_add_up_and_threads_change_no_bit(threads):
    """Several blocks, the last one short, of 65536 elements each."""
    shape = (7, 33_333)
    exact = [[integers(*shape, seed=s)] for s in range(3)]
    mask = pack_bits(torch.rand(shape, generator=torch.Generator().manual_seed(0)) < 0.5)
    for masks in (None, [mask]):
        assert torch.equal(gram(exact, masks=masks, impl="cpu"), gram(exact, masks=masks, impl="ref"))
    sets = [[normal(shape, s)] for s in range(3)]
    got = gram(sets, masks=[mask], impl="cpu")
    check(got, gram(sets, masks=[mask], impl="ref"))
    torch.set_num_threads(1)
    assert torch.equal(gram(sets, masks=[mask], impl="cpu"), got)


def test_small_differences_of_large_entries_survive():
    base, change = integers(40, 40, low=900, high=1000), integers(40, 40, low=0, high=1, seed=3)
    G = gram([[base], [base + change]], impl="cpu")
    assert float(G[0, 0] + G[1, 1] - 2 * G[0, 1]) == float(change.sum())


def test_gradients_that_carry_a_graph():
    g = torch.ones(4, 40, requires_grad=True) * 2
    dy, x = torch.ones(300, 4, requires_grad=True) * 1, torch.ones(300, 6, requires_grad=True) * 1
    assert gram([[g]], impl="cpu").tolist() == [[640]]
    assert gram_factors([dy], x, torch.tensor([0, 300]), impl="cpu").tolist() == [[300 * 300 * 24]]


@pytest.mark.parametrize("pattern", ROUTINGS)
@pytest.mark.parametrize("m", [1, 3])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_factors_are_the_gram_of_the_gradients_they_make(pattern, m, dtype):
    with poison():
        dy, x, offsets, full = factors(pattern, m, lambda s, seed: integers(*s, seed=seed, dtype=dtype))
        assert torch.equal(gram_factors(dy, x, offsets, impl="cpu"), gram([[g] for g in full], impl="ref"))
        dy, x, offsets, full = factors(pattern, m, lambda s, seed: normal(s, seed, dtype))
        check(gram_factors(dy, x, offsets, impl="cpu"), gram([[g] for g in full], impl="ref"))


def test_factors_of_experts_with_several_blocks_of_rows(threads):
    """Up to 700 rows an expert, of which 128 are multiplied at a time."""

    def case(make):
        return factors("skewed", 2, make, num_tokens=500, num_experts=4, top_k=2)

    dy, x, offsets, full = case(lambda s, seed: integers(*s, seed=seed))
    assert int(offsets.diff().max()) > 2 * 128
    assert torch.equal(gram_factors(dy, x, offsets, impl="cpu"), gram([[g] for g in full], impl="ref"))
    dy, x, offsets, full = case(normal)
    check(gram_factors(dy, x, offsets, impl="cpu"), gram([[g] for g in full], impl="ref"))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_factors_in_other_layouts(layout):
    dy, x, offsets, full = factors("half_empty", 2, lambda s, seed: integers(*s, seed=seed))
    moved = [in_layout(g, layout) for g in dy]
    got = gram_factors(moved, in_layout(x, layout), offsets.long(), impl="cpu")
    assert torch.equal(got, gram([[g] for g in full], impl="ref"))


def test_nothing_there_is_zero():
    assert torch.equal(gram([[torch.zeros(0, 3)]], impl="cpu"), torch.zeros(1, 1, dtype=F64))
    assert torch.equal(gram([[torch.zeros(3, 0)]] * 2, impl="cpu"), torch.zeros(2, 2, dtype=F64))
    empty = gram_factors([torch.zeros(0, 4)], torch.zeros(0, 6), torch.zeros(6, dtype=torch.int32), impl="cpu")
    assert torch.equal(empty, torch.zeros(1, 1, dtype=F64))


def test_rows_behind_the_last_offset_take_no_part():
    dy, x, offsets, full = factors("sentinels", 2, lambda s, seed: integers(*s, seed=seed))
    assert int(offsets[-1]) < len(x)
    dy = [torch.cat([g[: offsets[-1]], torch.full_like(g[offsets[-1] :], torch.nan)]) for g in dy]
    assert torch.equal(gram_factors(dy, x, offsets, impl="cpu"), gram([[g] for g in full], impl="ref"))
