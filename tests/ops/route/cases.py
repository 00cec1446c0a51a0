"""Cases of route: sizes, routing decisions, counting by hand, and the comparison that every implementation passes."""

import torch

from moe_unlearn.ops import route
from moe_unlearn.testing import poison, routing
from tests.support.impls import REF, Impl

SIZES = ((0, 4, 2), (1, 2, 1), (1, 8, 1), (7, 3, 3), (64, 8, 2), (257, 33, 5))  # tokens, experts, experts per token
MANY_ROWS = (2600, 64, 8)
TYPES = (torch.int32, torch.int64)
GROUP_TYPES = (torch.int8, torch.int32, torch.int64)
# more cells than a GPU's shared memory holds, the most experts that its kernel takes, and one more
MANY_CELLS = ((64, 300), (1024, 2), (1024, 3), (1025, 2))


def inputs(size, pattern="sentinels", dtype=torch.int64, group_dtype=torch.int64, seed=None) -> dict:
    """Return route's arguments; the groups are those from -1 to one too many."""
    num_tokens, num_experts, top_k = size
    seed = num_tokens if seed is None else seed
    generator = torch.Generator().manual_seed(seed)
    return {
        "top_k_index": routing(pattern, num_tokens, num_experts, top_k, seed=seed).to(dtype),
        "num_experts": num_experts,
        "group": torch.randint(-1, 4, (num_tokens,), generator=generator).to(group_dtype),
        "num_groups": 3,
        "log_tilt": torch.randn(num_experts, generator=generator),
        "log_weight": torch.randn(num_tokens, generator=generator),
    }


def beyond(arguments: dict) -> dict:
    """Put the least and the greatest integers among the ids and the groups, in place."""
    index, group = arguments["top_k_index"], arguments["group"]
    index[::3, 0], index[1::3, -1] = torch.iinfo(index.dtype).min, torch.iinfo(index.dtype).max
    group[::5], group[1::5] = torch.iinfo(group.dtype).max, torch.iinfo(group.dtype).min
    return arguments


def many_cells(num_tokens, num_experts, num_groups) -> dict:
    arguments = inputs((num_tokens, num_experts, 4), "uniform")
    return arguments | {"num_groups": num_groups, "group": torch.arange(num_tokens) % num_groups}


def without(arguments: dict, *, group: bool = False, tilt: bool = False) -> dict:
    """Return the arguments without groups, or without a tilt."""
    left = {"group": None, "num_groups": 1} if group else {}
    return arguments | left | ({"log_tilt": None, "log_weight": None} if tilt else {})


def run(impl: Impl, arguments: dict, layout: str = "contiguous") -> list:
    """Return route's outputs on copies of the arguments, and log_weight after it, on the CPU."""
    arguments = impl.moved(arguments, layout)
    with poison():
        out = route(**arguments, impl=impl.name)
    return [None if value is None else value.cpu() for value in (*out, arguments.get("log_weight"))]


def assert_same(actual: list, expected: list) -> None:
    """Assert equal integers of 32 bits, and log_weight bit for bit."""
    assert {value.dtype for value in actual[:3]} == {torch.int32}
    for name, a, e in zip(("histogram", "offsets", "rows", "log_weight"), actual, expected, strict=True):
        assert (a is None and e is None) or (torch.equal(a, e) and torch.equal(a.signbit(), e.signbit())), name


def check(impl: Impl, arguments: dict, layout: str = "contiguous") -> list:
    """Assert that an implementation does to arguments in a layout what the reference does to contiguous ones."""
    expected = run(REF, arguments)
    assert_same(run(impl, arguments, layout), expected)
    return expected


def by_hand(top_k_index, num_experts, group, num_groups, log_tilt, log_weight) -> list:
    """Histogram, offsets, order and log_weight in Python loops."""
    rows = [(e, n) for n, e in enumerate(top_k_index.flatten().tolist())]
    here = [(e, n) for e, n in rows if 0 <= e < num_experts]
    away = [(e, n) for e, n in rows if not 0 <= e < num_experts]
    histogram = torch.zeros(num_groups, num_experts, dtype=torch.int32)
    top_k, group, log_weight = top_k_index.shape[1], group.tolist(), log_weight.clone()
    for e, n in here:
        if 0 <= group[n // top_k] < num_groups:
            histogram[group[n // top_k], e] += 1
    for e, n in rows:  # in the order of k within a token
        log_weight[n // top_k] += log_tilt[e] if 0 <= e < num_experts else 0.0
    offsets = [sum(e < bound for e, _ in here) for bound in range(num_experts + 1)]
    order = [n for _, n in sorted(here)] + [n for _, n in sorted(away, key=lambda row: row[1])]
    return [histogram, torch.tensor(offsets).int(), torch.tensor(order).int(), log_weight]
