"""retain_weights in Triton: weights and moments against the float64 oracle, and the solver that runs on them."""

import itertools
import math

import pytest
import torch
import triton.language as tl

from moe_unlearn.ops import retain_weights
from moe_unlearn.ops.bits import pack_bits
from moe_unlearn.ops.retain_weights import moments, tilted_weights
from moe_unlearn.testing import LAYOUTS, assert_as_accurate, in_layout, integers, poison
from moe_unlearn.triton_kernels import configs
from moe_unlearn.triton_kernels import retain_weights as kernels
from tests.ops.test_retain_weights import EXACT, check, frequency, random_members

# either side of a word, and of the 1 that stands behind the members
SIZES = [0, 1, 2, 30, 31, 32, 33, 63, 64, 65]
BIAS = -0.25


def case(num_tokens, num_members, device, seed=0):
    """(members, words, tilt) with frequencies, tilts and weights that differ from expert to expert."""
    generator = torch.Generator().manual_seed(seed)
    members = random_members(num_tokens, torch.rand(num_members, generator=generator) * 0.6 + 0.2, seed)
    tilt = torch.randn(num_members, generator=generator, dtype=torch.float64) / (1 + num_members) ** 0.5
    return members.to(device), pack_bits(members).to(device), tilt.to(device)


def oracle(members, tilt, bias, cap):
    """(weights, first, second) in float64, by the formulas."""
    extended = torch.cat([members.new_ones(len(members), 1), members], 1).double()
    raw = (bias + members.double() @ tilt).exp()
    weights = raw.clamp_max(cap)
    free = torch.where(raw < cap, raw, 0)
    return weights, extended.t() @ weights, (extended * free[:, None]).t() @ extended


def compare(members, words, tilt, bias=BIAS, cap=math.inf):
    """The three results, each rounded to float32: another order of float64 sums passes, a token too many fails."""
    with poison():
        weights = tilted_weights(words, tilt, bias, cap=cap, impl="triton")
        first, second = moments(words, tilt, bias, cap=cap, impl="triton")
    assert weights.dtype == torch.float32 and first.dtype == second.dtype == torch.float64
    assert torch.equal(second, second.t())
    names = "weights", "first", "second"
    for name, got, gold in zip(names, (weights, first, second), oracle(members, tilt, bias, cap), strict=True):
        assert_as_accurate(got.float(), gold.float(), gold, name=name)
    return weights, first, second


@pytest.mark.quick
@pytest.mark.parametrize("capped", [False, True])
@pytest.mark.parametrize("num_members", SIZES)
@pytest.mark.slow(but=3)
def test_every_number_of_members(num_members, capped, device):
    members, words, tilt = case(40, num_members, device, seed=num_members)
    # half way between the smallest and the largest weight, so that some tokens are at the cap and some are not
    raw = oracle(members, tilt, BIAS, math.inf)[0]
    cap = float(raw.min() + raw.max()) / 2 if num_members else 0.5
    compare(members, words, tilt, cap=cap if capped else math.inf)


@pytest.mark.parametrize("num_tokens", [1, 2, 31, 32, 33, 64, 65, 127, 128, 129, 257])
def test_every_number_of_tokens(num_tokens, device):
    compare(*case(num_tokens, 3, device, seed=num_tokens), cap=1.0)


@pytest.mark.parametrize("num_members", [1, 40])
@pytest.mark.parametrize("chunks", [1, 2, 5])
def test_chunks_of_several_blocks(chunks, num_members, device, monkeypatch):
    """Shipped, a chunk has several blocks from 17 thousand tokens on: more than the interpreter should do."""

    def few(num_tokens, size):
        per_chunk = 32 * -(-num_tokens // (32 * chunks))
        return shipped(num_tokens, size)._replace(
            tokens_per_chunk=per_chunk, chunks=-(-num_tokens // per_chunk), sum_chunks=2
        )

    shipped = configs.moments
    monkeypatch.setattr(configs, "moments", few)
    compare(*case(300, num_members, device), cap=1.0)


@pytest.mark.quick
def test_no_tokens(device):
    _, words, tilt = case(0, 40, device)
    with poison():
        assert tilted_weights(words, tilt, 0.0, impl="triton").shape == (0,)
        first, second = moments(words, tilt, 0.0, impl="triton")
    assert not first.any() and not second.any()
    assert first.shape == (41,) and second.shape == (41, 41)


@pytest.mark.quick
@pytest.mark.parametrize("num_members", [31, 32, 40])
@pytest.mark.slow
def test_zero_tilt_counts_exactly(num_members, device):
    members, words, tilt = case(70, num_members, device)
    first, second = moments(words, torch.zeros_like(tilt), 0.0, impl="triton")
    *_, expected = oracle(members, torch.zeros_like(tilt), 0.0, math.inf)
    assert torch.equal(second, expected) and torch.equal(first, second[0])


@pytest.mark.quick
def test_all_tokens_at_the_cap_have_no_second_moments(device):
    members, words, tilt = case(50, 5, device)
    first, second = moments(words, torch.zeros_like(tilt), 1.0, cap=2.0, impl="triton")
    assert not second.any()
    assert torch.equal(first, 2.0 * torch.cat([members.new_ones(50, 1), members], 1).double().sum(0))
    # at the cap exactly, a token is not free
    first, second = moments(words, torch.zeros_like(tilt), 0.0, cap=1.0, impl="triton")
    assert not second.any() and float(first[0]) == 50


@pytest.mark.quick
@pytest.mark.parametrize("kernel", [kernels._weights_kernel, kernels._moments_kernel])
def test_bias_and_cap_are_declared_float64(kernel):
    """Without that a compiled kernel takes them as float32; the interpreter ignores it, so the next test cannot see."""
    assert kernel.fn.__annotations__["bias"] == kernel.fn.__annotations__["cap"] == tl.float64


@pytest.mark.quick
def test_bias_tilt_and_cap_are_not_rounded_to_float32(device):
    """Float arguments of a kernel are float32 unless declared otherwise."""
    bias, cap = 1 / 3, 1.7000000001
    tilt = torch.tensor([1e-9], dtype=torch.float64, device=device)
    # one token: no sum whose rounding would have to be allowed
    members = torch.ones(1, 1, dtype=torch.bool, device=device)
    first, second = moments(pack_bits(members), tilt, bias, cap=cap, impl="triton")
    _, first_gold, second_gold = oracle(members, tilt, bias, math.inf)
    for got, gold in ((first, first_gold), (second, second_gold)):
        assert_as_accurate(got, gold, gold)
    first, _ = moments(pack_bits(members), tilt, 5.0, cap=cap, impl="triton")
    assert first.tolist() == [cap, cap]


@pytest.mark.quick
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_overflow_leaves_nan_and_infinity_where_the_reference_does(device):
    """The line search refuses a step by them."""
    members, words, tilt = case(40, 6, device)
    tilt[2] = 800.0
    for got, want in zip(moments(words, tilt, 0.0, impl="triton"), moments(words, tilt, 0.0, impl="ref"), strict=True):
        assert torch.equal(got.isnan(), want.isnan()) and torch.equal(got.isinf(), want.isinf())
    weights = tilted_weights(words, tilt, 0.0, cap=3.0, impl="triton")
    assert torch.equal(weights, tilted_weights(words, tilt, 0.0, cap=3.0, impl="ref"))


@pytest.mark.quick
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.slow
def test_layouts(layout, device):
    members, words, tilt = case(33, 40, device)
    compare(members, in_layout(words, layout), in_layout(tilt, layout), cap=1.0)


@pytest.mark.quick
@pytest.mark.slow
def test_bits_behind_the_members_are_ignored(device):
    members, words, tilt = case(40, 35, device)
    expected = compare(members, words, tilt)
    words[:, 1] |= -8  # all bits from 35 on
    assert all(torch.equal(a, b) for a, b in zip(expected, compare(members, words, tilt), strict=True))


@pytest.mark.parametrize("cap", [None, 1.6])
def test_the_solver_on_these_passes(cap, device):
    """The whole op: reachable targets hit, weights as the reference finds them."""
    members = random_members(60, [0.3, 0.5]).to(device)
    w = integers(60, low=1, high=3, dtype=torch.float64).to(device)
    target = ((w / w.mean())[:, None] * members).mean(0)
    result = retain_weights(members, target, cap=cap, impl="triton")
    assert float((result.achieved - target.cpu()).abs().max()) <= EXACT
    assert (frequency(members) - target).abs().max() > 100 * EXACT, "the target must be another one"
    check(members.cpu(), result._replace(weights=result.weights.cpu()), cap)
    reference = retain_weights(members, target, cap=cap, impl="ref")
    assert_as_accurate(result.weights, reference.weights, result.weights.double())
    assert result.ess == pytest.approx(reference.ess)


@pytest.mark.quick
@pytest.mark.slow
def test_compiles_without_a_graph_break_and_runs_agree(device):
    _, words, tilt = case(40, 35, device)

    def function(words, tilt):
        return (
            tilted_weights(words, tilt, 0.1, cap=2.0, impl="triton"),
            *moments(words, tilt, 0.1, cap=2.0, impl="triton"),
        )

    runs = [function(words, tilt), function(words, tilt)]
    runs.append(torch.compile(function, fullgraph=True, backend="aot_eager")(words, tilt))
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(runs[0], run, strict=True))


@pytest.mark.quick
def test_the_shipped_chunks_cover_every_shape():
    tokens = (0, 1, 32, 33, 16896, 16897, 100_000, 2**24)
    for num_tokens, size in itertools.product(tokens, (1, 32, 33, 129, 513, 2000)):
        config, shape = configs.moments(num_tokens, size), (num_tokens, size)
        assert config.tokens_per_chunk % config.block == 0 and config.chunks >= 1, shape
        assert (config.chunks - 1) * config.tokens_per_chunk < max(num_tokens, 1), shape
        assert config.chunks * config.tokens_per_chunk >= num_tokens, shape
