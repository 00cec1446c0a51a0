"""route in Triton: integers and log_weight bit for bit as the reference, for every routing, size and layout."""

import itertools

import pytest
import torch

from moe_unlearn.ops import route, route_ref
from moe_unlearn.testing import LAYOUTS, ROUTINGS, in_layout, poison, routing
from moe_unlearn.triton_kernels import configs
from tests.ops.test_route import SIZES
from tests.support.covers import cover

# small blocks and tiles: several tiles per block, several blocks per chunk, several chunks, ragged ends of each
TINY = configs.Route(tokens_per_block=11, blocks=0, count_tile=16, tile=16, chunk=2, cells=4, num_warps=4)


def tiny(num_tokens, top_k, num_experts):
    return TINY._replace(blocks=max(1, -(-num_tokens // TINY.tokens_per_block)))


@pytest.fixture
def shipped_or_tiny(request, monkeypatch, device):
    # a compiled histogram wants a row for every thread: the tiny tiles are for the interpreter
    if request.param == "tiny":
        if device.type == "cuda":
            pytest.skip("the tiny tiles have fewer rows than threads")
        monkeypatch.setattr(configs, "route", tiny)


BOTH = pytest.mark.parametrize("shipped_or_tiny", ["shipped", "tiny"], indirect=True)


def check(index, num_experts, group=None, num_groups=1, log_tilt=None, log_weight=None, *, expected=None):
    """Both implementations on copies of `log_weight`; `expected`: what the reference gave on contiguous inputs."""
    if expected is None:
        reference = None if log_weight is None else log_weight.clone()
        expected = *route_ref(index, num_experts, group, num_groups, log_tilt, reference), reference
    with poison():
        out = route(
            index,
            num_experts,
            group=group,
            num_groups=num_groups,
            log_tilt=log_tilt,
            log_weight=log_weight,
            impl="triton",
        )
    assert {t.dtype for t in out} == {torch.int32}
    for name, got, want in zip((*out._fields, "log_weight"), (*out, log_weight), expected, strict=True):
        assert got is None and want is None or torch.equal(got, want), name
    return expected


def inputs(size, pattern, device, seed=0):
    """(index, num_experts, group, num_groups, log_tilt, log_weight): groups from -1 to one too many."""
    num_tokens, num_experts, top_k = size
    generator = torch.Generator().manual_seed(seed)
    index = routing(pattern, num_tokens, num_experts, top_k, seed=seed)
    group = torch.randint(-1, 4, (num_tokens,), generator=generator)
    tilt, weight = torch.randn(num_experts, generator=generator), torch.randn(num_tokens, generator=generator)
    return index.to(device), num_experts, group.to(device), 3, tilt.to(device), weight.to(device)


@pytest.mark.quick
@cover(indirect=["shipped_or_tiny"], size=SIZES, pattern=tuple(ROUTINGS), shipped_or_tiny=("shipped", "tiny"))
@pytest.mark.slow(but=7)
def test_every_routing_and_size(size, pattern, shipped_or_tiny, device, request):
    # the interpreter takes a second for the 117 tiny blocks of the largest size, and the others have all edges
    if "tiny" in request.node.name and size == SIZES[-1]:
        size = (45, 33, 5)
    check(*inputs(size, pattern, device))


@pytest.mark.quick
def test_the_worked_example(device):
    index = torch.tensor([[2, 0], [0, 2]], device=device)
    out = route(index, 3, group=torch.tensor([0, 1], device=device), num_groups=2, impl="triton")
    assert out.tokens_per_expert.tolist() == [[1, 0, 1], [1, 0, 1]]
    assert out.expert_offsets.tolist() == [0, 2, 2, 4]
    assert out.sorted_rows.tolist() == [1, 2, 0, 3]


@cover(
    indirect=["shipped_or_tiny"],
    num_groups=(1, 3),
    with_group=(False, True),
    with_tilt=(False, True),
    shipped_or_tiny=("shipped", "tiny"),
)
def test_optional_arguments(with_tilt, with_group, num_groups, shipped_or_tiny, device):
    index, num_experts, group, _, *tilt = inputs((130, 20, 3), "sentinels", device)
    check(index, num_experts, group if with_group else None, num_groups, *(tilt if with_tilt else (None, None)))


@cover(layout=tuple(LAYOUTS), dtype=(torch.int32, torch.int64), group_dtype=(torch.int8, torch.int32, torch.int64))
def test_layouts_and_integer_types(group_dtype, dtype, layout, device):
    index, num_experts, group, groups, tilt, weight = inputs((120, 9, 3), "sentinels", device)
    index, group = index.to(dtype), group.to(group_dtype)
    expected = check(index, num_experts, group, groups, tilt, weight.clone())
    index, group, tilt, weight = (in_layout(value, layout) for value in (index, group, tilt, weight))
    check(index, num_experts, group, groups, tilt, weight, expected=expected)


@pytest.mark.parametrize("num_experts", [1, 2, 31, 32, 33, 128, 512, 600])
def test_numbers_of_experts(num_experts, device):
    check(*inputs((60, num_experts, min(16, num_experts)), "sentinels", device, seed=num_experts))


@BOTH
@pytest.mark.parametrize("top_k", [1, 2, 3, 7, 8, 16, 20])
def test_numbers_of_experts_per_token(top_k, shipped_or_tiny, device):
    check(*inputs((23, 24, top_k), "sentinels", device, seed=top_k))


@BOTH
@pytest.mark.parametrize(
    "num_tokens,top_k",
    [(10, 1), (11, 1), (12, 1), (22, 2), (23, 2), (33, 3), (127, 1), (128, 1), (129, 1), (255, 1), (128, 2), (257, 1)],
)
def test_ends_of_blocks_and_tiles(num_tokens, top_k, shipped_or_tiny, device):
    check(*inputs((num_tokens, 5, top_k), "sentinels", device))


@pytest.mark.quick
def test_ids_and_groups_far_outside(device):
    """No id wraps around into the range when it is narrowed."""
    index = torch.tensor([[-1, 0], [2**32, 1], [2**32 + 1, -(2**32)], [2**63 - 1, -(2**63)], [1, 0]], device=device)
    group = torch.tensor([0, 2**32, 1, -(2**63), 2**32 + 1], device=device)
    check(index, 2, group, 2, torch.tensor([1.0, 10.0], device=device), torch.zeros(5, device=device))
    narrow = torch.tensor([[-(2**31), 2**31 - 1], [1, -1], [2, 0]], dtype=torch.int32, device=device)
    check(narrow, 2, torch.tensor([127, -128, 1], dtype=torch.int8, device=device), 2)


@pytest.mark.quick
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.slow(but=1)
def test_log_weight_adds_its_terms_in_order(dtype, device):
    """Terms whose sum depends on the order, of any float type; NaN of an expert no token uses stays out."""
    generator = torch.Generator().manual_seed(1)
    tilt = (torch.randn(40, generator=generator) * 10.0 ** torch.randint(-4, 4, (40,), generator=generator)).to(dtype)
    tilt[7] = torch.nan
    index = torch.randint(8, 44, (300, 9), generator=generator)
    weight = torch.randn(300, generator=generator)
    backwards = weight.clone()
    route_ref(index.flip(1), 40, log_tilt=tilt, log_weight=backwards)
    *_, forwards = check(index.to(device), 40, None, 1, tilt.to(device), weight.to(device))
    assert not torch.equal(forwards.cpu(), backwards), "the order must matter, or it is not tested"


@pytest.mark.quick
def test_a_token_not_here_turns_minus_zero_into_zero_as_in_the_reference(device):
    index = torch.full((3, 1), 5, device=device)
    weight = torch.full((3,), -0.0, device=device)
    route(index, 4, log_tilt=torch.ones(4, device=device), log_weight=weight, impl="triton")
    assert not weight.signbit().any()


@pytest.mark.parametrize("size", [(1720, 512, 3), (900, 200, 7)], ids=str)
def test_many_blocks_of_several_tiles_as_shipped(size, device):
    num_tokens, num_experts, top_k = size
    config = configs.route(num_tokens, top_k, num_experts)
    assert config.blocks > config.chunk and config.tokens_per_block * top_k > 2 * config.tile
    check(*inputs(size, "skewed", device))


@pytest.mark.quick
def test_the_shipped_tiles_cover_every_shape():
    tokens = (0, 1, 2, 127, 8191, 8192, 8193, 2**17, 2**20)
    for num_tokens, top_k, num_experts in itertools.product(tokens, (1, 2, 8, 16, 300), (1, 8, 128, 512, 5000)):
        config, shape = configs.route(num_tokens, top_k, num_experts), (num_tokens, top_k, num_experts)
        assert 1 <= config.blocks <= 256 and config.tokens_per_block >= 1, shape
        assert (config.blocks - 1) * config.tokens_per_block <= num_tokens - (num_tokens > 0), shape
        assert config.blocks * config.tokens_per_block >= num_tokens, shape
        # the compiled histogram counts every row once only if no thread repeats another's
        assert min(config.tile, config.count_tile) >= 32 * config.num_warps, shape
        assert all(n & (n - 1) == 0 for n in (config.tile, config.count_tile, config.chunk, config.cells)), shape


@pytest.mark.quick
@pytest.mark.slow
def test_compiles_without_a_graph_break_and_runs_agree(device):
    index, num_experts, group, groups, tilt, weight = inputs((64, 8, 2), "sentinels", device)

    def function(index, group, tilt, weight):
        weight = weight.clone()
        out = route(index, num_experts, group=group, num_groups=groups, log_tilt=tilt, log_weight=weight, impl="triton")
        return *out, weight

    arguments = index, group, tilt, weight
    runs = [function(*arguments), function(*arguments)]
    runs.append(torch.compile(function, fullgraph=True, backend="aot_eager")(*arguments))
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(runs[0], run, strict=True))
