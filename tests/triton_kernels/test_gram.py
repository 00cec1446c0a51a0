"""gram in Triton: bit for bit on integers, and as accurate as float64 sums in another order on anything else."""

import pytest
import torch

from moe_unlearn.ops import gram, gram_factors
from moe_unlearn.ops.bits import num_words, pack_bits
from moe_unlearn.testing import LAYOUTS, ROUTINGS, assert_as_accurate, in_layout, integers, poison
from moe_unlearn.triton_kernels import configs
from moe_unlearn.triton_kernels.gram import _launches
from tests.ops import test_gram as reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture
def small(monkeypatch):
    """Two words a block, three programs, sums of two: a few hundred elements cross every boundary."""
    monkeypatch.setattr(configs, "gram", lambda: configs.Gram(3, 2, 4, 2))
    monkeypatch.setattr(configs, "gram_factors", lambda sets: configs.GramFactors(16, 16, 4, 2, 2))


def normal(shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def moved(sets, device):
    return [[None if g is None else g.to(device) for g in tensors] for tensors in sets]


def assert_same_sums(actual, truth):
    """Equal after rounding to float32, as near as another order of float64 sums comes; exactly symmetric."""
    assert actual.dtype == torch.float64 and torch.equal(actual, actual.t())
    assert_as_accurate(actual.cpu().float(), truth.float(), truth)


@pytest.mark.parametrize(
    "m", [1, pytest.param(2, marks=pytest.mark.quick), 3, 4, 7]
)  # more than four take several launches
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_integers_match_bitwise(device, dtype, m):
    missing = {(0, 1), (m - 1, 0)}
    sets = reference.gradient_sets(m, lambda shape, seed: integers(*shape, seed=seed, dtype=dtype), missing)
    masks = reference.random_masks()
    on_device = [None if w is None else w.to(device) for w in reference.packed(masks)]
    with poison():
        assert torch.equal(gram(moved(sets, device), impl="triton").cpu(), reference.by_hand(sets))
        masked = gram(moved(sets, device), masks=on_device, impl="triton").cpu()
    assert torch.equal(masked, reference.by_hand(sets, masks))


@pytest.mark.parametrize("shape", [(1,), (32,), (31, 33), (2, 3, 64), (5, 7, 2, 45), (3, 129)], ids=str)
def test_blocks_and_programs(device, small, shape):
    sets = [[integers(*shape, seed=i, dtype=torch.bfloat16)] for i in range(3)]
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(5)) < 0.5
    flat = torch.stack([g.double().flatten() for (g,) in sets])
    assert torch.equal(gram(moved(sets, device), impl="triton").cpu(), flat @ flat.t())
    flat = flat * mask.flatten()
    masked = gram(moved(sets, device), masks=[pack_bits(mask).to(device)], impl="triton").cpu()
    assert torch.equal(masked, flat @ flat.t())


@pytest.mark.quick
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_accurate_far_below_float32(device, small, dtype):
    sets = reference.gradient_sets(3, lambda shape, seed: normal(shape, seed).to(dtype))
    assert_same_sums(gram(moved(sets, device), impl="triton"), reference.by_hand(sets))


def test_small_differences_of_large_entries_survive(device):
    base, change = integers(40, 40, low=900, high=1000), integers(40, 40, low=0, high=1, seed=3)
    G = gram(moved([[base], [base + change]], device), impl="triton")
    assert float(G[0, 0] + G[1, 1] - 2 * G[0, 1]) == float(change.sum())


def test_what_a_mask_hides_may_hold_anything(device):
    g, mask = integers(5, 40), torch.rand(5, 40) < 0.5
    dirty, words = g.masked_fill(~mask, torch.nan).to(device), pack_bits(mask).to(device)
    assert torch.equal(
        gram([[dirty]], masks=[words], impl="triton").cpu(), gram([[g]], masks=[words.cpu()], impl="ref")
    )
    assert gram([[dirty]], impl="triton").isnan().all()


def test_bits_behind_the_last_column_are_not_read(device):
    g, words = integers(3, 40).to(device), torch.full((3, 2), -1, dtype=torch.int32, device=device)
    assert torch.equal(gram([[g]], masks=[words], impl="triton"), gram([[g]], impl="triton"))


@pytest.mark.parametrize("shape", [(6, 40), (3, 4, 64)], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_does_not_matter(device, layout, shape):
    a, b = integers(*shape).to(device), integers(*shape, seed=1).to(device)
    mask = pack_bits(torch.rand(shape, generator=torch.Generator().manual_seed(2)) < 0.5).to(device)
    plain = gram([[a], [b]], masks=[mask], impl="ref")
    changed = [[in_layout(a, layout)], [in_layout(b, layout)]]
    assert torch.equal(gram(changed, masks=[in_layout(mask, layout)], impl="triton"), plain)
    assert torch.equal(gram([changed[0], [b]], masks=[mask], impl="triton"), plain)
    assert torch.equal(gram(changed, impl="triton"), gram([[a], [b]], impl="ref"))


def test_expanded_gradients(device):
    row, b = integers(40).to(device), integers(6, 40, seed=1).to(device)
    expanded = gram([[row.expand(6, 40)], [b]], impl="triton")
    assert torch.equal(expanded, gram([[row.expand(6, 40).clone()], [b]], impl="ref"))


@pytest.mark.parametrize("m", range(1, 12))
def test_every_pair_is_in_a_launch_in_ascending_order(m):
    pairs = {(a, b) for numbers in _launches(m) for a in numbers for b in numbers if a <= b}
    assert pairs == {(a, b) for a in range(m) for b in range(a, m)}
    assert all(list(numbers) == sorted(set(numbers)) and len(numbers) <= 4 for numbers in _launches(m))


@pytest.mark.parametrize("m", [1, pytest.param(2, marks=pytest.mark.quick), 5])  # more than three take several launches
@pytest.mark.parametrize("pattern", ROUTINGS)
@pytest.mark.slow
def test_factors_of_integers_match_bitwise(device, small, pattern, m):
    dy, x, offsets, full = reference.factors(pattern, m, lambda s, seed: integers(*s, seed=seed), num_tokens=30)
    with poison():
        actual = gram_factors([d.to(device) for d in dy], x.to(device), offsets.to(device), impl="triton")
    assert torch.equal(actual.cpu(), gram([[g] for g in full], impl="ref"))


@pytest.mark.quick
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("pattern", ["skewed", "one_expert"])
@pytest.mark.slow
def test_factors_are_accurate_far_below_float32(device, pattern, dtype):
    """With the tiles of `configs`: an expert of 80 rows has three blocks."""
    made = reference.factors(pattern, 3, lambda s, seed: normal(s, seed).to(dtype))
    dy, x, offsets, full = made
    actual = gram_factors([d.to(device) for d in dy], x.to(device), offsets.to(device), impl="triton")
    assert_same_sums(actual, gram([[g] for g in full], impl="ref"))


def test_factors_wider_than_a_block(device):
    dy, x = [integers(37, 45, seed=i) for i in range(2)], integers(37, 70, seed=9)
    offsets = torch.tensor([0, 33, 33, 37])
    actual = gram_factors([d.to(device) for d in dy], x.to(device), offsets.to(device), impl="triton")
    assert torch.equal(actual.cpu(), gram_factors(dy, x, offsets, impl="ref"))


def test_rows_behind_the_last_offset_take_no_part(device, small):
    dy, x, offsets, _ = reference.factors("sentinels", 2, lambda s, seed: integers(*s, seed=seed), num_tokens=30)
    here = int(offsets[-1])
    assert here < len(x)
    expected = gram_factors(dy, x, offsets, impl="ref")
    for rows in (x, *dy):
        rows[here:] = torch.nan
    actual = gram_factors([d.to(device) for d in dy], x.to(device), offsets.to(device), impl="triton")
    assert torch.equal(actual.cpu(), expected)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_factors_in_any_layout(device, small, layout):
    dy, x, offsets, full = reference.factors("half_empty", 2, lambda s, seed: integers(*s, seed=seed), num_tokens=20)
    changed = [in_layout(dy[0].to(device), layout), dy[1].to(device)]
    bounds = in_layout(offsets.long().to(device), "strided")
    actual = gram_factors(changed, in_layout(x.to(device), layout), bounds, impl="triton")
    assert torch.equal(actual.cpu(), gram([[g] for g in full], impl="ref"))


@pytest.mark.quick
def test_nothing_there_is_zero(device):
    zero = torch.zeros(1, 1, dtype=torch.float64)
    empty = torch.zeros(0, 3, device=device)
    offsets = torch.zeros(6, dtype=torch.int32, device=device)
    with poison():
        assert torch.equal(gram([[empty]], impl="triton").cpu(), zero)
        assert torch.equal(gram_factors([torch.zeros(0, 4, device=device)], empty, offsets, impl="triton").cpu(), zero)
        # rows, but none of a listed expert; no expert; factors without columns
        rows = torch.ones(9, 3, device=device)
        assert torch.equal(gram_factors([rows], rows, offsets, impl="triton").cpu(), zero)
        assert torch.equal(gram_factors([rows], rows, offsets[:1], impl="triton").cpu(), zero)
        assert torch.equal(gram_factors([rows[:, :0]], rows, offsets[:2], impl="triton").cpu(), zero)


def test_nan_reaches_the_entries_of_its_set_alone(device):
    sets = [[integers(4, 40, seed=i).to(device)] for i in range(3)]
    sets[1][0][2, 7] = torch.nan
    found = gram(sets, impl="triton").isnan().cpu()
    expected = torch.zeros(3, 3, dtype=torch.bool)
    expected[1], expected[:, 1] = True, True
    assert torch.equal(found, expected)


def test_the_same_bits_every_time(device, small):
    sets = [[normal((9, 130), i).to(device)] for i in range(2)]
    dy, x, offsets, _ = reference.factors("uniform", 2, normal, num_tokens=30)
    on_device = [d.to(device) for d in dy], x.to(device), offsets.to(device)
    first = gram(sets, impl="triton"), gram_factors(*on_device, impl="triton")
    with poison():
        second = gram(sets, impl="triton"), gram_factors(*on_device, impl="triton")
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_compiles_as_one_graph(device):
    a, b = integers(4, 40).to(device), integers(4, 40, seed=1).to(device)
    words = torch.full((4, num_words(40)), 0x5A5A5A5A, dtype=torch.int32, device=device)
    dy, x, offsets, _ = reference.factors("uniform", 1, lambda s, seed: integers(*s, seed=seed), num_tokens=10)
    dy, x, offsets = dy[0].to(device), x.to(device), offsets.to(device)

    def both(a, b, words, dy, x, offsets):
        return gram([[a], [b]], masks=[words], impl="triton"), gram_factors([dy], x, offsets, impl="triton")

    arguments = a, b, words, dy, x, offsets
    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    assert all(torch.equal(c, e) for c, e in zip(compiled(*arguments), both(*arguments), strict=True))
