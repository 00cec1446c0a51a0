"""retain_weights in Triton: the chunks and blocks that it divides tokens into."""

import itertools

import pytest
import triton.language as tl

from moe_unlearn.triton_kernels import configs
from moe_unlearn.triton_kernels import retain_weights as kernels
from tests.ops.retain_weights.cases import assert_same, check, passes, run
from tests.support.impls import TRITON


@pytest.mark.parametrize("num_tokens", [1, 2, 31, 32, 33, 64, 65, 127, 128, 129, 257])
def test_every_number_of_tokens(num_tokens):
    check(TRITON, passes(num_tokens, 3, seed=num_tokens), cap=1.0)


@pytest.mark.parametrize("num_members", [1, 40])
@pytest.mark.parametrize("chunks", [1, 2, 5])
def test_chunks_of_several_blocks(chunks, num_members, monkeypatch):
    """Shipped, a chunk has several blocks from 17 thousand tokens on: more than the interpreter should do."""

    def few(num_tokens, size):
        per_chunk = 32 * -(-num_tokens // (32 * chunks))
        return shipped(num_tokens, size)._replace(
            tokens_per_chunk=per_chunk, chunks=-(-num_tokens // per_chunk), sum_chunks=2
        )

    shipped = configs.moments
    monkeypatch.setattr(configs, "moments", few)
    check(TRITON, passes(300, num_members), cap=1.0)


@pytest.mark.quick
@pytest.mark.parametrize("kernel", [kernels._weights_kernel, kernels._moments_kernel])
def test_bias_and_cap_are_declared_float64(kernel):
    """Without that a compiled kernel takes them as float32; the interpreter ignores it, so the next test cannot see."""
    assert kernel.fn.__annotations__["bias"] == kernel.fn.__annotations__["cap"] == tl.float64


@pytest.mark.quick
def test_bits_behind_the_members_are_ignored():
    made = passes(40, 35)
    expected = check(TRITON, made)
    made.words[:, 1] |= -8  # all bits from 35 on
    assert_same(run(TRITON, made), expected)


@pytest.mark.quick
def test_the_shipped_chunks_cover_every_shape():
    tokens = (0, 1, 32, 33, 16896, 16897, 100_000, 2**24)
    for num_tokens, size in itertools.product(tokens, (1, 32, 33, 129, 513, 2000)):
        config, shape = configs.moments(num_tokens, size), (num_tokens, size)
        assert config.tokens_per_chunk % config.block == 0 and config.chunks >= 1, shape
        assert (config.chunks - 1) * config.tokens_per_chunk < max(num_tokens, 1), shape
        assert config.chunks * config.tokens_per_chunk >= num_tokens, shape
