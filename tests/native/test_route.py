"""route in C++: the same bits as the reference for any number of threads, layout and integer type."""

import pytest
import torch

from moe_unlearn.ops import route
from moe_unlearn.testing import LAYOUTS, ROUTINGS, in_layout, poison, routing
from tests.support.covers import cover

pytestmark = pytest.mark.quick
SIZES = [(0, 4, 2), (1, 8, 1), (7, 3, 3), (257, 33, 5), (2600, 64, 8)]


def inputs(size, pattern, dtype=torch.int64, group_dtype=torch.int64):
    num_tokens, num_experts, top_k = size
    generator = torch.Generator().manual_seed(num_tokens)
    return {
        "top_k_index": routing(pattern, num_tokens, num_experts, top_k, seed=num_tokens).to(dtype),
        "num_experts": num_experts,
        "group": torch.randint(-1, 4, (num_tokens,), generator=generator).to(group_dtype),
        "num_groups": 3,
        "log_tilt": torch.randn(num_experts, generator=generator),
        "log_weight": torch.randn(num_tokens, generator=generator),
    }


def run(arguments, impl):
    """The outputs of route, and log_weight after it."""
    arguments = dict(arguments)
    if arguments.get("log_weight") is not None:
        arguments["log_weight"] = arguments["log_weight"].clone()
    with poison():
        out = route(**arguments, impl=impl)
    return [*out, *([] if arguments.get("log_weight") is None else [arguments["log_weight"]])]


def assert_same(actual, expected):
    for a, e in zip(actual, expected, strict=True):
        assert a.dtype == e.dtype and torch.equal(a, e)


@cover(indirect=["threads"], size=SIZES, pattern=tuple(ROUTINGS), threads=(1, 2, 3))
def test_same_bits_as_ref_for_any_number_of_threads(pattern, size, threads):
    arguments = inputs(size, pattern)
    assert_same(run(arguments, "cpu"), run(arguments, "ref"))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("group_dtype", [torch.int8, torch.int32, torch.int64], ids=str)
def test_integer_types_and_ids_beyond_the_experts(dtype, group_dtype):
    arguments = inputs((300, 7, 2), "uniform", dtype, group_dtype)
    arguments["top_k_index"][::3, 0] = torch.iinfo(dtype).min
    arguments["top_k_index"][1::3, 1] = torch.iinfo(dtype).max
    arguments["group"][::5] = torch.iinfo(group_dtype).max
    assert_same(run(arguments, "cpu"), run(arguments, "ref"))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_memory_layout(layout):
    arguments = inputs((50, 6, 3), "sentinels")
    expected = run(arguments, "ref")
    moved = {k: in_layout(v, layout) if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}
    out = route(**moved, impl="cpu")
    assert_same([*out, moved["log_weight"]], expected)


def test_without_groups_and_with_narrow_tilt():
    arguments = inputs((64, 5, 2), "skewed")
    arguments["group"] = None
    arguments["log_tilt"] = arguments["log_tilt"].bfloat16()
    assert_same(run(arguments, "cpu"), run(arguments, "ref"))
    arguments["log_tilt"] = arguments["log_weight"] = None
    assert_same(run(arguments, "cpu"), run(arguments, "ref"))


def test_a_negative_zero_weight_meets_the_tilt_of_a_sentinel_as_in_ref():
    arguments = inputs((3, 4, 2), "all_sentinels")
    arguments["log_weight"] = torch.full((3,), -0.0)
    actual, expected = run(arguments, "cpu")[-1], run(arguments, "ref")[-1]
    assert torch.equal(actual.signbit(), expected.signbit())
