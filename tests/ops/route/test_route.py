"""route against counting by hand, in every implementation: integers must match bit for bit on every routing pattern."""

import pytest
import torch
from torch.library import opcheck

from moe_unlearn.ops import route, route_ref
from moe_unlearn.testing import LAYOUTS, ROUTINGS, routing
from tests.ops.route.cases import (
    GROUP_TYPES,
    SIZES,
    TYPES,
    assert_same,
    beyond,
    by_hand,
    check,
    inputs,
    run,
    without,
)
from tests.support.covers import cover
from tests.support.impls import REF, impls

pytestmark = pytest.mark.quick
IMPLS = impls("route")


@cover(full=True, indirect=["impl"], impl=IMPLS, pattern=ROUTINGS, size=SIZES)
def test_equals_counting_by_hand(size, pattern, impl):
    arguments = inputs(size, pattern)
    assert_same(run(impl, arguments), by_hand(**arguments))


def test_the_worked_example(impl):
    index, group = impl.moved((torch.tensor([[2, 0], [0, 2]]), torch.tensor([0, 1])))
    out = route(index, 3, group=group, num_groups=2, impl=impl.name)
    assert out.tokens_per_expert.tolist() == [[1, 0, 1], [1, 0, 1]]
    assert out.expert_offsets.tolist() == [0, 2, 2, 4]
    assert out.sorted_rows.tolist() == [1, 2, 0, 3]


@cover(indirect=["impl"], impl=IMPLS, layout=LAYOUTS, dtype=TYPES, group_dtype=GROUP_TYPES)
def test_layout_and_integer_type_do_not_matter_nor_ids_beyond_the_experts(group_dtype, dtype, layout, impl):
    check(impl, beyond(inputs((120, 9, 3), "sentinels", dtype, group_dtype)), layout)


def test_negative_ids_and_ignored_tokens_count_nowhere(impl):
    arguments = {
        "top_k_index": torch.tensor([[-1, 0], [1, 9], [1, 0]]),
        "num_experts": 2,
        "group": torch.tensor([0, -1, 7]),
        "log_tilt": torch.tensor([1.0, 10.0]),
        "log_weight": torch.zeros(3),
    }
    histogram, offsets, rows, log_weight = run(impl, arguments)
    assert histogram.tolist() == [[1, 0]]
    # the groups leave tokens out of the histogram only: the rows still have to be computed
    assert offsets.tolist() == [0, 2, 4]
    assert rows.tolist() == [1, 5, 2, 4, 0, 3]
    assert log_weight.tolist() == [1.0, 10.0, 11.0]


def test_no_id_wraps_around_into_the_range_when_it_is_narrowed(impl):
    index = [[-1, 0], [2**32, 1], [2**32 + 1, -(2**32)], [2**63 - 1, -(2**63)], [1, 0]]
    arguments = {
        "top_k_index": torch.tensor(index),
        "num_experts": 2,
        "group": torch.tensor([0, 2**32, 1, -(2**63), 2**32 + 1]),
        "num_groups": 2,
        "log_tilt": torch.tensor([1.0, 10.0]),
        "log_weight": torch.zeros(5),
    }
    assert_same(run(impl, arguments), by_hand(**arguments))


@cover(indirect=["impl"], impl=IMPLS, num_groups=(1, 3), with_group=(False, True), with_tilt=(False, True))
def test_optional_arguments(with_tilt, with_group, num_groups, impl):
    check(impl, without(inputs((130, 20, 3)), group=not with_group, tilt=not with_tilt) | {"num_groups": num_groups})


@cover(indirect=["impl"], impl=IMPLS, dtype=(torch.float32, torch.bfloat16, torch.float16, torch.float64))
def test_log_weight_adds_its_terms_in_order(dtype, impl):
    """Terms whose sum depends on the order, of any float type; NaN of an expert no token uses stays out."""
    generator = torch.Generator().manual_seed(1)
    tilt = (torch.randn(40, generator=generator) * 10.0 ** torch.randint(-4, 4, (40,), generator=generator)).to(dtype)
    tilt[7] = torch.nan
    index = torch.randint(8, 44, (300, 9), generator=generator)
    arguments = {"num_experts": 40, "log_tilt": tilt, "log_weight": torch.randn(300, generator=generator)}
    forwards = check(impl, {"top_k_index": index} | arguments)[-1]
    backwards = run(REF, {"top_k_index": index.flip(1)} | arguments)[-1]
    assert not torch.equal(forwards, backwards), "the order must matter, or it is not tested"


def test_a_token_not_here_turns_minus_zero_into_zero(impl):
    log_weight = run(impl, inputs((3, 4, 2), "all_sentinels") | {"log_weight": torch.full((3,), -0.0)})[-1]
    assert not log_weight.any() and not log_weight.signbit().any()


@pytest.mark.slow
def test_compiles_without_a_graph_break_and_runs_agree(impl):
    *given, weight = impl.moved(tuple(inputs((64, 8, 2)).values()))

    def function(index, num_experts, group, num_groups, tilt, weight):
        weight = weight.clone()
        out = route(
            index, num_experts, group=group, num_groups=num_groups, log_tilt=tilt, log_weight=weight, impl=impl.name
        )
        return *out, weight

    runs = [function(*given, weight), function(*given, weight)]
    runs.append(torch.compile(function, fullgraph=True, backend="aot_eager")(*given, weight))
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(runs[0], run, strict=True))


# ---- The op and its reference ------------------------------------------------------------------------------


@pytest.mark.parametrize("with_tilt", [False, True])
def test_opcheck(with_tilt):
    index = routing("sentinels", 9, 4, 2)
    tilt = (torch.randn(4), torch.randn(9)) if with_tilt else (None, None)
    opcheck(torch.ops.moe_unlearn.route.default, (index, 4, torch.zeros(9, dtype=torch.int64), 2, *tilt, "ref"))


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
