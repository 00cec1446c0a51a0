"""route against counting by hand: integers must match bit for bit on every routing pattern."""

import pytest
import torch
from torch.library import opcheck

from moe_unlearn import backend
from moe_unlearn.ops import route, route_ref
from moe_unlearn.ops.route import _route
from moe_unlearn.testing import LAYOUTS, ROUTINGS, in_layout, integers, poison, routing
from tests.support.covers import cover

pytestmark = pytest.mark.quick
IMPLS = [impl for impl in ("ref", "cpu") if backend.has("route", impl, "cpu")]
SIZES = [(0, 4, 2), (1, 2, 1), (1, 8, 1), (7, 3, 3), (64, 8, 2), (257, 33, 5)]


def by_hand(top_k_index, num_experts, group, num_groups, log_tilt):
    """Histogram, offsets, order and tilt in Python loops."""
    rows = [(e, n) for n, e in enumerate(top_k_index.flatten().tolist())]
    here = [(e, n) for e, n in rows if 0 <= e < num_experts]
    away = [(e, n) for e, n in rows if not 0 <= e < num_experts]
    histogram = torch.zeros(num_groups, num_experts, dtype=torch.int32)
    top_k = top_k_index.shape[1]
    added = torch.zeros(len(top_k_index))
    for e, n in here:
        if 0 <= group[n // top_k] < num_groups:
            histogram[group[n // top_k], e] += 1
        added[n // top_k] += log_tilt[e]
    offsets = [sum(e < bound for e, _ in here) for bound in range(num_experts + 1)]
    order = [n for _, n in sorted(here)] + [n for _, n in sorted(away, key=lambda row: row[1])]
    return histogram, torch.tensor(offsets).int(), torch.tensor(order).int(), added


@cover(impl=IMPLS, pattern=tuple(ROUTINGS), size=SIZES)
def test_equals_counting_by_hand(size, pattern, impl):
    num_tokens, num_experts, top_k = size
    index = routing(pattern, num_tokens, num_experts, top_k, seed=num_tokens)
    group = torch.randint(-1, 4, (num_tokens,), generator=torch.Generator().manual_seed(3))
    log_tilt, before = integers(num_experts, seed=1), integers(num_tokens, seed=2)
    histogram, offsets, order, added = by_hand(index, num_experts, group.tolist(), 3, log_tilt)
    log_weight = before.clone()
    with poison():
        out = route(index, num_experts, group=group, num_groups=3, log_tilt=log_tilt, log_weight=log_weight, impl=impl)
    assert torch.equal(out.tokens_per_expert, histogram)
    assert torch.equal(out.expert_offsets, offsets)
    assert torch.equal(out.sorted_rows, order)
    assert torch.equal(log_weight, before + added)
    assert {t.dtype for t in out} == {torch.int32}


@pytest.mark.parametrize("impl", IMPLS)
def test_the_worked_example(impl):
    out = route(torch.tensor([[2, 0], [0, 2]]), 3, group=torch.tensor([0, 1]), num_groups=2, impl=impl)
    assert out.tokens_per_expert.tolist() == [[1, 0, 1], [1, 0, 1]]
    assert out.expert_offsets.tolist() == [0, 2, 2, 4]
    assert out.sorted_rows.tolist() == [1, 2, 0, 3]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_layout_and_integer_type_do_not_matter(layout, dtype, impl):
    index = routing("sentinels", 50, 6, 3).to(dtype)
    group = torch.arange(50, dtype=torch.int8) % 3 - 1
    tilt = integers(6, seed=5)
    results = []
    for given in (index, in_layout(index, layout)):
        log_weight = torch.zeros(50)
        out = route(
            given,
            6,
            group=in_layout(group, layout),
            num_groups=2,
            log_tilt=in_layout(tilt, layout),
            log_weight=log_weight,
            impl=impl,
        )
        results.append((*out, log_weight))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_negative_ids_and_ignored_tokens_count_nowhere():
    log_weight = torch.zeros(3)
    out = route(
        torch.tensor([[-1, 0], [1, 9], [1, 0]]),
        2,
        group=torch.tensor([0, -1, 7]),
        log_tilt=torch.tensor([1.0, 10.0]),
        log_weight=log_weight,
    )
    assert out.tokens_per_expert.tolist() == [[1, 0]]
    # the groups leave tokens out of the histogram only: the rows still have to be computed
    assert out.expert_offsets.tolist() == [0, 2, 4]
    assert out.sorted_rows.tolist() == [1, 5, 2, 4, 0, 3]
    assert log_weight.tolist() == [1.0, 10.0, 11.0]


@pytest.mark.parametrize("with_tilt", [False, True])
def test_opcheck(with_tilt):
    index = routing("sentinels", 9, 4, 2)
    tilt = (torch.randn(4), torch.randn(9)) if with_tilt else (None, None)
    opcheck(_route, (index, 4, torch.zeros(9, dtype=torch.int64), 2, *tilt, "ref"))


def test_compiles_without_a_graph_break():
    index, tilt = routing("uniform", 16, 4, 2), torch.randn(4)

    def function(index, tilt):
        log_weight = torch.zeros(16)
        out = route(index, 4, log_tilt=tilt, log_weight=log_weight)
        return out.tokens_per_expert, out.sorted_rows, log_weight

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")(index, tilt)
    assert all(torch.equal(a, b) for a, b in zip(compiled, function(index, tilt), strict=True))


def test_the_reference_is_the_op():
    index = routing("skewed", 40, 5, 2)
    assert all(torch.equal(a, b) for a, b in zip(route(index, 5), route_ref(index, 5), strict=True))


@pytest.mark.parametrize(
    "arguments,error,message",
    [
        (dict(top_k_index=torch.zeros(3, 2)), TypeError, "int32 or int64; got torch.float32"),
        (dict(top_k_index=torch.zeros(3, dtype=torch.int64)), ValueError, r"\[T, K\].*\(3,\)"),
        (dict(top_k_index=torch.zeros(3, 0, dtype=torch.int64)), ValueError, "K >= 1"),
        (dict(num_experts=0), ValueError, "num_experts and num_groups must be >= 1; got 0 and 1"),
        (dict(group=torch.zeros(3)), TypeError, "group must be int8, int32 or int64; got torch.float32"),
        (dict(group=torch.zeros(2, dtype=torch.int64)), ValueError, r"group must be \[T\] = \[3\]"),
        (dict(log_tilt=torch.zeros(4)), ValueError, "go together"),
        (dict(log_tilt=torch.zeros(5), log_weight=torch.zeros(3)), ValueError, r"\[E\] = \[4\]"),
        (dict(log_tilt=torch.zeros(4), log_weight=torch.zeros(3).double()), ValueError, "float32"),
        (dict(impl="fast"), ValueError, "impl must be 'auto' or one of"),
    ],
)
def test_bad_input_is_named(arguments, error, message):
    with pytest.raises(error, match=message):
        route(**{"top_k_index": torch.zeros(3, 2, dtype=torch.int64), "num_experts": 4, **arguments})
