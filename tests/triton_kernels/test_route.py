"""route in Triton: the blocks and tiles that it divides rows and experts into, as shipped and tiny."""

import itertools

import pytest

from moe_unlearn.testing import ROUTINGS
from moe_unlearn.triton_kernels import configs
from tests.ops.route.cases import SIZES, check, inputs, without
from tests.support.covers import cover
from tests.support.impls import TRITON

# small blocks and tiles: several tiles per block, several blocks per chunk, several chunks, ragged ends of each
TINY = configs.Route(tokens_per_block=11, blocks=0, count_tile=16, tile=16, chunk=2, cells=4, num_warps=4)


def tiny(num_tokens, top_k, num_experts):
    return TINY._replace(blocks=max(1, -(-num_tokens // TINY.tokens_per_block)))


@pytest.fixture
def shipped_or_tiny(request, monkeypatch):
    # a compiled histogram wants a row for every thread: the tiny tiles are for the interpreter
    if request.param == "tiny":
        if TRITON.device.type == "cuda":
            pytest.skip("the tiny tiles have fewer rows than threads")
        monkeypatch.setattr(configs, "route", tiny)


BOTH = pytest.mark.parametrize("shipped_or_tiny", ["shipped", "tiny"], indirect=True)


@pytest.mark.quick
@cover(
    indirect=["shipped_or_tiny"],
    # the interpreter takes a second for the 117 tiny blocks of the largest size, and this one has all edges
    size=(*SIZES[:-1], (45, 33, 5)),
    pattern=ROUTINGS,
    with_group=(True, False),
    with_tilt=(True, False),
    shipped_or_tiny=("tiny",),
)
@pytest.mark.slow(but=7)
def test_tiny_tiles_on_every_routing_and_size(size, pattern, with_group, with_tilt, shipped_or_tiny):
    check(TRITON, without(inputs(size, pattern), group=not with_group, tilt=not with_tilt))


@pytest.mark.parametrize("num_experts", [1, 2, 31, 32, 33, 128, 512, 600])
def test_numbers_of_experts(num_experts):
    check(TRITON, inputs((60, num_experts, min(16, num_experts)), seed=num_experts))


@BOTH
@pytest.mark.parametrize("top_k", [1, 2, 3, 7, 8, 16, 20])
def test_numbers_of_experts_per_token(top_k, shipped_or_tiny):
    check(TRITON, inputs((23, 24, top_k), seed=top_k))


@BOTH
@pytest.mark.parametrize(
    "num_tokens,top_k",
    [(10, 1), (11, 1), (12, 1), (22, 2), (23, 2), (33, 3), (127, 1), (128, 1), (129, 1), (255, 1), (128, 2), (257, 1)],
)
def test_ends_of_blocks_and_tiles(num_tokens, top_k, shipped_or_tiny):
    check(TRITON, inputs((num_tokens, 5, top_k)))


@pytest.mark.parametrize("size", [(1720, 512, 3), (900, 200, 7)], ids=str)
def test_many_blocks_of_several_tiles_as_shipped(size):
    num_tokens, num_experts, top_k = size
    config = configs.route(num_tokens, top_k, num_experts)
    assert config.blocks > config.chunk and config.tokens_per_block * top_k > 2 * config.tile
    check(TRITON, inputs(size, "skewed"))


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
