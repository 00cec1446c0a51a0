"""What the kernels share: Philox and stochastic rounding bit for bit, and the guard against raw bfloat16 dots."""

import pytest
import torch
import triton
import triton.language as tl

from moe_unlearn.ops import bits
from moe_unlearn.testing import assert_as_accurate
from moe_unlearn.testing.yardstick import Reference
from moe_unlearn.triton_kernels.common import INTERPRET, dot, random_words, round_stochastic

pytestmark = pytest.mark.quick


@triton.jit
def _random_kernel(index, value, words, rounded, step, seed, parameter_id, BLOCK: tl.constexpr):
    offset = tl.arange(0, BLOCK)
    word, _ = random_words(tl.load(index + offset), step, seed, parameter_id)
    tl.store(words + offset, word.to(tl.int64))
    tl.store(rounded + offset, round_stochastic(tl.load(value + offset), word))


@pytest.mark.parametrize("step,seed,parameter_id", [(1, 0, 0), (2**33 + 5, 2**40 + 17, 3), (7, -1, 2**31 + 5)])
def test_random_bits_and_rounding_are_those_of_the_reference(device, step, seed, parameter_id):
    index = torch.tensor([0, 1, 5, 2**31, 2**32 + 7, 2**40 + 3, 2**53, 9], device=device)
    value = torch.tensor([1.0, -3.14159, torch.nan, torch.inf, -torch.inf, 1e-40, 3.3e38, -0.0], device=device)
    words = torch.empty_like(index)
    rounded = torch.empty(8, dtype=torch.bfloat16, device=device)
    _random_kernel[(1,)](index, value, words, rounded, step, seed, parameter_id, 8)
    assert torch.equal(words, bits.philox(index, step, seed, parameter_id))
    expected = bits.round_stochastic(value, words)
    assert torch.equal(rounded.nan_to_num(nan=77.0), expected.nan_to_num(nan=77.0))
    assert torch.equal(rounded.nan_to_num(nan=77.0).signbit(), expected.nan_to_num(nan=77.0).signbit())


@triton.jit
def _dot_kernel(a, b, out, RAW: tl.constexpr, SIZE: tl.constexpr):
    row = tl.arange(0, SIZE)
    tile = row[:, None] * SIZE + row[None, :]
    total = tl.load(out + tile)
    if RAW:
        total = tl.dot(tl.load(a + tile), tl.load(b + tile), total)
    else:
        total = dot(tl.load(a + tile), tl.load(b + tile), total)
    tl.store(out + tile, total)


@pytest.mark.quick
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dot(device, dtype):
    a, b = torch.randn(2, 16, 16, device=device).to(dtype)
    before = torch.randn(16, 16, device=device)
    out = before.clone()
    _dot_kernel[(1,)](a, b, out, False, 16)
    baseline = Reference(lambda: before + a.float() @ b.float()).baseline()
    assert_as_accurate(out, baseline, before.double() + a.double() @ b.double())


@pytest.mark.skipif(not INTERPRET.value, reason="only the interpreter gets this wrong")
def test_a_raw_bfloat16_dot_is_refused(device):
    a = torch.ones(16, 16, dtype=torch.bfloat16)
    with pytest.raises(Exception, match="common.dot"):
        _dot_kernel[(1,)](a, a, torch.zeros(16, 16), True, 16)
