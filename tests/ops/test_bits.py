"""The bit layouts: packing, Philox against its published vectors, and rounding without bias."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_unlearn.ops.bits import keep_where, num_words, pack_bits, philox, round_stochastic, unpack_bits

pytestmark = pytest.mark.quick


def random_mask(*shape, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.5


def test_pack_and_unpack_every_length():
    for n in range(101):
        for shape in ((n,), (3, n), (2, 0, n), (2, 3, n)):
            mask = random_mask(*shape, seed=n)
            words = pack_bits(mask)
            assert words.dtype == torch.int32 and words.shape == (*shape[:-1], -(-n // 32))
            assert torch.equal(unpack_bits(words, n), mask), shape


def test_layout_bit_by_bit():
    for i in (0, 1, 30, 31, 32, 63, 64, 69):
        mask = torch.zeros(2, 70, dtype=torch.bool)
        mask[1, i] = True
        words = pack_bits(mask)
        # int32 words: bit 31 is the sign
        assert words[1, i // 32].item() & 0xFFFFFFFF == 1 << (i % 32)
        assert words.ne(0).sum() == 1
    assert pack_bits(torch.ones(34, dtype=torch.bool)).tolist() == [-1, 3]
    assert pack_bits(torch.tensor(True)).tolist() == [1]


@pytest.mark.parametrize("holds", [True, False])
@pytest.mark.parametrize("shape", [(3, 5, 64), (2, 70), (31,)], ids=str)
def test_a_condition_keeps_a_mask_or_nothing(shape, holds):
    condition, mask = torch.tensor(holds), random_mask(*shape)
    for own, expected in ((None, torch.ones(shape, dtype=torch.bool)), (pack_bits(mask), mask)):
        words = keep_where(condition, own, shape)
        assert words.dtype == torch.int32
        assert torch.equal(words, pack_bits(expected & holds)), "no padding bit is set either"
    assert keep_where(condition, None, (8, 1024, 64)).untyped_storage().nbytes() <= 8


def test_padding_bits_are_zero_and_ignored():
    words = pack_bits(torch.zeros(5, dtype=torch.bool))
    assert words.item() == 0
    assert not unpack_bits(words | -32, 5).any()


@pytest.mark.parametrize(
    "view",
    [
        lambda m: m.transpose(0, 1),
        lambda m: m[:, ::2],
        lambda m: m[1:, 3:50],
        lambda m: m[:1].expand(4, 90),
        lambda m: m.flip(1),
    ],
)
def test_memory_layouts(view):
    mask = view(random_mask(7, 90))
    assert torch.equal(pack_bits(mask), pack_bits(mask.clone(memory_format=torch.contiguous_format)))
    words = random_mask(3, 128).view(3, 128)
    packed = pack_bits(words).repeat_interleave(2, dim=1)[:, ::2]
    assert not packed.is_contiguous() and torch.equal(unpack_bits(packed, 128), words)


def test_slicing_rows_commutes_with_packing():
    mask = random_mask(6, 5, 33)
    assert torch.equal(pack_bits(mask)[[4, 1]], pack_bits(mask[[4, 1]]))


def test_num_words_and_errors():
    assert [num_words(n) for n in (0, 1, 32, 33)] == [0, 1, 1, 2]
    with pytest.raises(TypeError, match="mask must be bool; got torch.int64"):
        pack_bits(torch.ones(3).long())
    with pytest.raises(ValueError, match="= 2; got torch.int32"):
        unpack_bits(torch.zeros(2, 1, dtype=torch.int32), 33)
    with pytest.raises(ValueError, match="got torch.int64"):
        unpack_bits(torch.zeros(1).long(), 3)
    with pytest.raises(TypeError, match="starts from float32"):
        round_stochastic(torch.zeros(1).double(), torch.zeros(1).long())


def philox_scalar(index, step, seed, parameter_id):
    """Philox4x32-10 on Python integers, from its definition; output word 0."""
    low = 0xFFFFFFFF
    c = [index & low, index >> 32 & low, step & low, step >> 32 & low]
    k = [seed & low, parameter_id & low]
    for _ in range(10):
        a, b = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(b >> 32) ^ c[1] ^ k[0], b & low, (a >> 32) ^ c[3] ^ k[1], a & low]
        k = [(k[0] + 0x9E3779B9) & low, (k[1] + 0xBB67AE85) & low]
    return c[0]


PI = [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344, 0xA4093822, 0x299F31D0]


@pytest.mark.parametrize(
    "counter, key, word",
    [
        ([0] * 4, [0] * 2, 0x6627E8D5),
        ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, 0x408F276D),
        (PI[:4], PI[4:], 0xD16CFE09),
    ],
    ids=["zeros", "ones", "pi"],
)
def test_philox_known_answers(counter, key, word):
    """The vectors Random123 publishes for philox4x32-10."""
    index, step = counter[0] | counter[1] << 32, counter[2] | counter[3] << 32
    assert philox_scalar(index, step, *key) == word
    # int64 holds an index of 64 bits as its two's complement
    index = index - (1 << 64) if index >> 63 else index
    assert philox(torch.tensor([index]), step, *key).item() == word


@settings(max_examples=200, deadline=None)
@given(
    index=st.integers(0, 2**63 - 1),
    step=st.integers(0, 2**40),
    seed=st.integers(0, 2**32 - 1),
    parameter_id=st.integers(0, 2**32 - 1),
)
def test_philox_is_the_scalar_definition(index, step, seed, parameter_id):
    found = philox(torch.tensor([index]), step, seed, parameter_id).item()
    assert found == philox_scalar(index, step, seed, parameter_id)


def test_philox_words_differ_in_every_argument():
    index = torch.arange(1000)
    base = philox(index, 1, 2, 3)
    others = [
        philox(index + 1000, 1, 2, 3),
        philox(index, 2, 2, 3),
        philox(index, 1, 3, 3),
        philox(index, 1, 2, 4),
        philox(index + 2**32, 1, 2, 3),
    ]
    # two independent streams of 1000 words meet with probability 1000 / 2^32
    assert all(not (base == other).any() for other in others)
    assert ((base >= 0) & (base < 2**32)).all()


def test_rounding_gives_a_neighbour_and_keeps_what_is_exact():
    value = torch.randn(100_000, generator=torch.Generator().manual_seed(0))
    rounded = round_stochastic(value, philox(torch.arange(100_000), 1, 2, 3))
    # truncation towards zero, or the next bfloat16 away from it
    below = (value.view(torch.int32) & -65536).view(torch.float32)
    above = ((value.view(torch.int32) & -65536) + 65536).view(torch.float32)
    up = rounded.float() == above
    assert ((rounded.float() == below) | up).all() and up.any() and not up.all()
    exact = value.bfloat16()
    assert torch.equal(round_stochastic(exact.float(), torch.full((100_000,), 0xFFFFFFFF)), exact)


def test_rounding_is_unbiased():
    """The mean over n draws of 1 + f ulp has variance f (1 - f) ulp^2 / n: five standard deviations."""
    n, ulp = 1 << 18, 2.0**-7
    random = philox(torch.arange(n), 7, 5, 1)
    for sign in (1.0, -1.0):
        for fraction in (2**-16, 0.1, 0.5, 0.75, 1 - 2**-16):
            value = torch.full((n,), sign * (1 + fraction * ulp))
            mean_error = float((round_stochastic(value, random).double() - value.double()).mean())
            held = float(value[0].double().abs() - 1) / ulp  # the fraction float32 could hold
            assert abs(mean_error) <= 5 * ulp * (held * (1 - held) / n) ** 0.5 + 1e-15


def test_rounding_counts_every_random_value_once():
    """Over all 2^16 low halves a value goes up exactly as often as its cut bits say."""
    random = torch.arange(1 << 16)
    for cut in (0, 1, 12345, 0x8000, 0xFFFF):
        value = torch.tensor([0x3F800000 + cut], dtype=torch.int32).view(torch.float32).expand(1 << 16)
        assert int((round_stochastic(value, random).float() > 1).sum()) == cut
        # only the low half is used
        assert torch.equal(round_stochastic(value, random), round_stochastic(value, random + (9 << 16)))


def test_rounding_of_the_special():
    special = torch.tensor([torch.inf, -torch.inf, torch.nan, 0.0, -0.0, 1e-40, torch.finfo(torch.float32).max])
    for word in (0, 0x8000, 0xFFFFFFFF):
        out = round_stochastic(special, torch.full((7,), word))
        assert out[0] == torch.inf and out[1] == -torch.inf and out[2].isnan()
        assert out[3:5].view(torch.int16).tolist() == [0, -32768]
        assert out[5] >= 0 and out[6] > 3e38
