"""gram against full matrices: masks before products, None as zero, factors against the gradients they make."""

import pytest
import torch
from torch.library import opcheck

from moe_unlearn.ops import gram, gram_factors, gram_ref, route
from moe_unlearn.ops.bits import pack_bits
from moe_unlearn.ops.gram import _gram, _gram_factors
from moe_unlearn.testing import LAYOUTS, ROUTINGS, assert_as_accurate, in_layout, integers, routing

pytestmark = pytest.mark.quick
SHAPES = [(4, 6, 5), (33,), (7, 32), (), (0, 5), (3, 0), (1, 70)]


def gradient_sets(m, make, missing=()):
    return [
        [None if (i, p) in missing else make(shape, 100 * i + p) for p, shape in enumerate(SHAPES)] for i in range(m)
    ]


def by_hand(sets, masks=None):
    """One long float64 vector per set."""
    vectors = []
    for tensors in sets:
        parts = []
        for p, (g, shape) in enumerate(zip(tensors, SHAPES, strict=True)):
            g = torch.zeros(shape) if g is None else g
            keep = torch.ones(shape, dtype=torch.bool) if masks is None or masks[p] is None else masks[p]
            parts.append(torch.where(keep, g.double(), 0).flatten())
        vectors.append(torch.cat(parts))
    return torch.stack([torch.stack([(a * b).sum() for b in vectors]) for a in vectors])


def random_masks():
    generator = torch.Generator().manual_seed(9)
    masks = [torch.rand(shape, generator=generator) < 0.6 for shape in SHAPES]
    masks[2] = None
    return masks


def packed(masks):
    return [None if mask is None else pack_bits(mask) for mask in masks]


@pytest.mark.parametrize("m", [1, 2, 3, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_integers_match_bitwise(m, dtype):
    missing = {(0, 1), (m - 1, 0)}
    sets = gradient_sets(m, lambda shape, seed: integers(*shape, seed=seed, dtype=dtype), missing)
    masks = random_masks()
    assert torch.equal(gram(sets), by_hand(sets))
    assert torch.equal(gram(sets, masks=packed(masks)), by_hand(sets, masks))
    assert gram(sets).dtype == torch.float64


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_accurate_far_below_float32(dtype):
    sets = gradient_sets(
        3, lambda shape, seed: torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
    )
    truth = by_hand(sets)
    # rounded to float32 at the end, so that a sum in float32 would fail and another float64 order passes
    assert_as_accurate(gram(sets).float(), truth.float(), truth)
    assert torch.equal(gram(sets), gram(sets).t())


def test_small_differences_of_large_entries_survive():
    """|g_1 - g_2|^2 from the Gram matrix, as the closed form for two needs it."""
    base, change = integers(40, 40, low=900, high=1000), integers(40, 40, low=0, high=1, seed=3)
    G = gram([[base], [base + change]])
    assert float(G[0, 0] + G[1, 1] - 2 * G[0, 1]) == float(change.sum())


def test_what_a_mask_hides_may_hold_anything():
    g, mask = integers(5, 40), torch.rand(5, 40) < 0.5
    dirty = g.masked_fill(~mask, torch.nan)
    assert torch.equal(gram([[dirty]], masks=[pack_bits(mask)]), gram([[g]], masks=[pack_bits(mask)]))
    assert gram([[dirty]]).isnan().all()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_does_not_matter(layout):
    a, b, mask = integers(6, 40), integers(6, 40, seed=1), pack_bits(torch.rand(6, 40) < 0.5)
    moved = [[in_layout(a, layout)], [in_layout(b, layout)]]
    assert torch.equal(gram(moved, masks=[in_layout(mask, layout)]), gram([[a], [b]], masks=[mask]))
    row = integers(40)
    assert torch.equal(gram([[row.expand(6, 40)], [b]]), gram([[row.expand(6, 40).clone()], [b]]))


def test_blocks_add_up(monkeypatch):
    import sys

    a, b = integers(50, 7), integers(50, 7, seed=1)
    whole = gram([[a], [b]])
    monkeypatch.setattr(sys.modules["moe_unlearn.ops.gram"], "BLOCK", 21)
    assert torch.equal(gram([[a], [b]]), whole)


def test_nothing_there_is_zero():
    assert torch.equal(gram([[None, None], [None, None]]), torch.zeros(2, 2, dtype=torch.float64))
    assert torch.equal(gram([[]]), torch.zeros(1, 1, dtype=torch.float64))
    assert torch.equal(gram_ref([torch.zeros(0, 3)]), torch.zeros(1, 1, dtype=torch.float64))


def factors(pattern, m, make, num_tokens=40, num_experts=5, top_k=2):
    """Row gradients, inputs and offsets in expert order, and the gradients [E, M, P] they make."""
    routed = route(routing(pattern, num_tokens, num_experts, top_k), num_experts)
    rows = num_tokens * top_k
    x, dy = make((rows, 6), 0), [make((rows, 4), i + 1) for i in range(m)]
    bounds = routed.expert_offsets.tolist()
    spans = [slice(a, b) for a, b in zip(bounds, bounds[1:], strict=False)]
    full = [torch.stack([d[s].double().t() @ x[s].double() for s in spans]) for d in dy]
    return dy, x, routed.expert_offsets, full


@pytest.mark.parametrize("pattern", ROUTINGS)
@pytest.mark.parametrize("m", [1, 3])
def test_factors_are_the_gram_of_the_gradients_they_make(pattern, m):
    dy, x, offsets, full = factors(pattern, m, lambda s, seed: integers(*s, seed=seed))
    assert torch.equal(gram_factors(dy, x, offsets), gram([[g] for g in full]))

    def normal(shape, seed):
        return torch.randn(shape, generator=torch.Generator().manual_seed(seed))

    dy, x, offsets, full = factors(pattern, m, normal)
    truth = gram([[g] for g in full])
    assert_as_accurate(gram_factors(dy, x, offsets).float(), truth.float(), truth)


def test_factors_take_other_layouts_and_no_rows():
    dy, x, offsets, full = factors("half_empty", 2, lambda s, seed: integers(*s, seed=seed))
    moved = [in_layout(dy[0], "transposed"), in_layout(dy[1], "sliced")]
    assert torch.equal(gram_factors(moved, in_layout(x, "strided"), offsets.long()), gram([[g] for g in full]))
    empty = gram_factors([torch.zeros(0, 4)], torch.zeros(0, 6), torch.zeros(6, dtype=torch.int32))
    assert torch.equal(empty, torch.zeros(1, 1, dtype=torch.float64))


@pytest.mark.slow
def test_opcheck_and_compile():
    a, b, mask = torch.randn(4, 40), torch.randn(4, 40), pack_bits(torch.rand(4, 40) < 0.5)
    opcheck(_gram, ([a, b], None, "ref"))
    opcheck(_gram, ([a, b.t().contiguous().t()], mask, "ref"))
    dy, x, offsets, _ = factors("uniform", 2, lambda s, seed: integers(*s, seed=seed))
    opcheck(_gram_factors, (dy, x, offsets, "ref"))
    compiled = torch.compile(lambda a, b, w: gram([[a], [b]], masks=[w]), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(a, b, mask), gram([[a], [b]], masks=[mask]))


def test_no_gradient_is_made_up():
    g = torch.randn(3, 4, requires_grad=True)
    with pytest.raises(RuntimeError, match="no autograd formula"):
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
