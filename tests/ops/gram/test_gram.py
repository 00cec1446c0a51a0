"""gram against full matrices: masks before products, None as zero, factors against the gradients they make."""

import sys

import pytest
import torch
from torch.library import opcheck

from moe_unlearn.ops import gram, gram_factors, gram_ref
from moe_unlearn.ops.bits import pack_bits
from moe_unlearn.testing import LAYOUTS, ROUTINGS, integers
from tests.ops.gram.cases import (
    BF16,
    F16,
    F32,
    F64,
    assert_same_sums,
    by_hand,
    factors,
    gradient_sets,
    half,
    normal,
    packed,
    random_masks,
    run,
    run_factors,
    whole,
)
from tests.support.covers import cover
from tests.support.impls import REF, impls

pytestmark = pytest.mark.quick
IMPLS = impls("gram")


# ---- Whole gradients ---------------------------------------------------------------------------------------


@cover(indirect=["impl"], impl=IMPLS, m=(1, 2, 3, 5, 7), dtype=(F32, BF16, F16, F64))
@pytest.mark.slow(but=8)
def test_integers_match_bitwise(m, dtype, impl):
    sets = gradient_sets(m, lambda shape, seed: whole(shape, seed, dtype), missing={(0, 1), (m - 1, 0)})
    masks = random_masks()
    assert torch.equal(run(impl, sets), by_hand(sets))
    assert torch.equal(run(impl, sets, packed(masks)), by_hand(sets, masks))


@cover(indirect=["impl"], impl=IMPLS, dtype=(F32, BF16, F16))
def test_accurate_far_below_float32(dtype, impl):
    sets, masks = gradient_sets(3, lambda shape, seed: normal(shape, seed, dtype)), random_masks()
    assert_same_sums(run(impl, sets), by_hand(sets))
    assert_same_sums(run(impl, sets, packed(masks)), by_hand(sets, masks))


def test_small_differences_of_large_entries_survive(impl):
    """|g_1 - g_2|^2 from the Gram matrix, as the closed form for two needs it."""
    base, change = integers(40, 40, low=900, high=1000), integers(40, 40, low=0, high=1, seed=3)
    G = run(impl, [[base], [base + change]])
    assert float(G[0, 0] + G[1, 1] - 2 * G[0, 1]) == float(change.sum())


@pytest.mark.parametrize("dirt", [torch.nan, torch.inf])
def test_what_a_mask_hides_may_hold_anything(dirt, impl):
    g, mask = whole((5, 40)), half((5, 40))
    dirty = g.masked_fill(~mask, dirt)
    assert torch.equal(run(impl, [[dirty]], [pack_bits(mask)]), run(REF, [[g]], [pack_bits(mask)]))
    assert not run(impl, [[dirty]]).isfinite().any()


def test_bits_behind_the_last_column_are_not_read(impl):
    g = whole((3, 40))
    assert torch.equal(run(impl, [[g]], [torch.full((3, 2), -1, dtype=torch.int32)]), run(REF, [[g]]))


@cover(indirect=["impl"], impl=IMPLS, layout=LAYOUTS, shape=((6, 40), (3, 4, 64), (2, 3, 70)))
def test_layout_does_not_matter(layout, shape, impl):
    """Rows of 40 or 70 elements are no whole words: what lies behind them in memory is NaN in some layouts."""
    a, b, words = whole(shape), whole(shape, 1), [pack_bits(half(shape))]
    assert torch.equal(run(impl, [[a], [b]], words, layout), run(REF, [[a], [b]], words))
    assert torch.equal(run(impl, [[a], [b]], None, layout), run(REF, [[a], [b]]))
    # one of the sets alone
    (a,) = impl.moved([a], layout)
    b, *on_device = impl.moved([b, *words])
    assert torch.equal(gram([[a], [b]], masks=on_device, impl=impl.name).cpu(), run(REF, [[a], [b]], words))


def test_expanded_gradients(impl):
    row, b = impl.moved((whole((70,)), whole((6, 70), 1)))
    expanded = gram([[row.expand(6, 70)], [b]], impl=impl.name)
    assert torch.equal(expanded.cpu(), run(REF, [[row.expand(6, 70)], [b]]))


def test_gradients_that_carry_a_graph(impl):
    g, dy, x = impl.moved((torch.ones(4, 40), torch.ones(30, 4), torch.ones(30, 6)))
    g, dy, x = (t.requires_grad_() * k for t, k in ((g, 2), (dy, 1), (x, 1)))
    assert gram([[g]], impl=impl.name).tolist() == [[640]]
    offsets = impl.moved(torch.tensor([0, 30]))
    assert gram_factors([dy], x, offsets, impl=impl.name).tolist() == [[30 * 30 * 24]]


def test_nan_reaches_the_entries_of_its_set_alone(impl):
    sets = [[whole((4, 40), i)] for i in range(3)]
    sets[1][0][2, 7] = torch.nan
    expected = torch.zeros(3, 3, dtype=torch.bool)
    expected[1], expected[:, 1] = True, True
    assert torch.equal(run(impl, sets).isnan(), expected)


def test_nothing_there_is_zero(impl):
    zero, empty = torch.zeros(1, 1, dtype=F64), torch.zeros(0, 3)
    assert torch.equal(run(impl, [[empty]]), zero)
    assert torch.equal(run(impl, [[torch.zeros(3, 0)]] * 2), torch.zeros(2, 2, dtype=F64))
    offsets, rows = torch.zeros(6, dtype=torch.int32), torch.ones(9, 3)
    # no rows; rows, but none of a listed expert; no expert; factors without columns
    for of_rows in (
        ([torch.zeros(0, 4)], empty, offsets),
        ([rows], rows, offsets),
        ([rows], rows, offsets[:1]),
        ([rows[:, :0]], rows, offsets[:2]),
    ):
        assert torch.equal(run_factors(impl, of_rows), zero)


@pytest.mark.slow
def test_compiles_as_one_graph_and_runs_agree(impl):
    sets = impl.moved([normal((9, 130), i) for i in range(2)])
    words = impl.moved(pack_bits(half((9, 130))))
    rows, _ = factors("uniform", 2, normal, num_tokens=30)
    (dy, other), x, offsets = impl.moved(rows)

    def both(a, b, words, dy, other, x, offsets):
        of_rows = gram_factors([dy, other], x, offsets, impl=impl.name)
        return gram([[a], [b]], masks=[words], impl=impl.name), of_rows

    given = (*sets, words, dy, other, x, offsets)
    expected = both(*given)
    for again in (both(*given), torch.compile(both, fullgraph=True, backend="aot_eager")(*given)):
        assert all(torch.equal(a, e) for a, e in zip(again, expected, strict=True))


# ---- Factors -----------------------------------------------------------------------------------------------


@cover(indirect=["impl"], impl=IMPLS, pattern=ROUTINGS, m=(1, 3), dtype=(F32, BF16, F16))
@pytest.mark.slow(but=12)
def test_factors_are_the_gram_of_the_gradients_they_make(pattern, m, dtype, impl):
    rows, truth = factors(pattern, m, lambda shape, seed: whole(shape, seed, dtype))
    assert torch.equal(run_factors(impl, rows), truth)
    rows, truth = factors(pattern, m, lambda shape, seed: normal(shape, seed, dtype))
    assert_same_sums(run_factors(impl, rows), truth)


@cover(indirect=["impl"], impl=IMPLS, layout=LAYOUTS)
def test_factors_in_any_layout(layout, impl):
    rows, truth = factors("half_empty", 2, whole)
    assert torch.equal(run_factors(impl, rows._replace(expert_offsets=rows.expert_offsets.long()), layout), truth)


def test_rows_behind_the_last_offset_take_no_part(impl):
    rows, truth = factors("sentinels", 2, whole)
    here = int(rows.expert_offsets[-1])
    assert here < len(rows.inputs)
    for tensor in (rows.inputs, *rows.row_gradients):
        tensor[here:] = torch.nan
    assert torch.equal(run_factors(impl, rows), truth)


# ---- The op and its reference ------------------------------------------------------------------------------


def test_blocks_of_the_reference_add_up(monkeypatch):
    sets = [[whole((50, 7), seed)] for seed in range(2)]
    expected = run(REF, sets)
    monkeypatch.setattr(sys.modules["moe_unlearn.ops.gram"], "BLOCK", 21)
    assert torch.equal(run(REF, sets), expected)


def test_none_is_zero():
    assert torch.equal(gram([[None, None], [None, None]]), torch.zeros(2, 2, dtype=F64))
    assert torch.equal(gram([[]]), torch.zeros(1, 1, dtype=F64))
    assert torch.equal(gram_ref([torch.zeros(0, 3)]), torch.zeros(1, 1, dtype=F64))


def test_opcheck():
    a, b, mask = torch.randn(4, 40), torch.randn(4, 40), pack_bits(half((4, 40)))
    opcheck(torch.ops.moe_unlearn.gram.default, ([a, b], None, "ref"))
    opcheck(torch.ops.moe_unlearn.gram.default, ([a, b.t().contiguous().t()], mask, "ref"))
    opcheck(torch.ops.moe_unlearn.gram_factors.default, (*factors("uniform", 2, whole)[0], "ref"))


def test_no_gradient_is_made_up():
    g = torch.randn(3, 4, requires_grad=True)
    with pytest.raises(RuntimeError, match="no gradient flows"):
        gram([[g]]).sum().backward()


@pytest.mark.parametrize(
    "sets,masks,error,message",
    [
        ([], None, ValueError, "at least one gradient set"),
        ([[torch.ones(2)], []], None, ValueError, r"one length; got lengths \[1, 0\]"),
        ([[torch.ones(2)], [torch.ones(3)]], None, ValueError, "parameter 0: expected one dtype, shape"),
        ([[torch.ones(2)], [torch.ones(2).double()]], None, ValueError, "parameter 0: expected one dtype"),
        ([[torch.ones(2).long()]], None, TypeError, "parameter 0: gradients must be floating point"),
        ([[torch.ones(2)]], [], ValueError, "one mask or None for each of 1 parameters; got 0"),
        ([[torch.ones(2, 40)]], [torch.ones(2, 1, dtype=torch.int32)], ValueError, r"words \[2, 2\]"),
        ([[torch.ones(2)]], [torch.ones(1, dtype=torch.int64)], ValueError, "int32 words"),
    ],
)
def test_bad_input_is_named(sets, masks, error, message):
    with pytest.raises(error, match=message):
        gram(sets, masks=masks)


@pytest.mark.parametrize(
    "change,message",
    [
        (dict(row_gradients=[]), "at least one block"),
        (dict(row_gradients=[torch.ones(4, 3)]), r"R = 5 and one M; got \[4, 3\]"),
        (dict(row_gradients=[torch.ones(5, 3).double()]), "must be torch.float32 on cpu"),
        (dict(inputs=torch.ones(5)), r"inputs must be float \[R, P\]"),
        (dict(expert_offsets=torch.ones(3)), "expert_offsets must be int32 or int64"),
    ],
)
def test_bad_factors_are_named(change, message):
    good = {"row_gradients": [torch.ones(5, 3)], "inputs": torch.ones(5, 2), "expert_offsets": torch.tensor([0, 5])}
    with pytest.raises(ValueError, match=message):
        gram_factors(**{**good, **change})
