"""Products of bfloat16 matrices in float32: each sum adds its terms in their order, so its bits are known."""

import pytest
import torch

from moe_unlearn import native
from moe_unlearn.ops import Gate
from tests.ops.expert_mlp.cases import GPT_OSS, case, check, results
from tests.ops.expert_wgrad.cases import BF16, F32, check_update, factors
from tests.support.by_keyword import expert_mlp
from tests.support.covers import cover
from tests.support.impls import CPU

pytestmark = pytest.mark.quick
RELU = ("relu", 1.0, torch.inf, 0.0)
kernels = torch.ops.moe_unlearn_native
wide_sets = pytest.mark.parametrize("instruction_set", native.INSTRUCTION_SETS[1:], indirect=True)


@pytest.fixture(autouse=True)
def widened():
    """Has the kernels widen, whatever suits this CPU."""
    if native.narrow_products("widened") != "widened":
        native.narrow_products("")
        pytest.skip("this CPU has no AVX2")
    yield
    native.narrow_products("")


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(BF16)


def in_order(a, b):
    """Return a b in float32, rounded after each term: two bfloat16 numbers multiply exactly."""
    sums = torch.zeros(a.shape[0], b.shape[1])
    for left, right in zip(a.float().t(), b.float(), strict=True):
        sums = sums + left[:, None] * right
    return sums


# M and P around strips of 14 or 6 rows, panels of 32 and groups of 512 columns; rows around blocks of 128 terms
@wide_sets
@pytest.mark.parametrize("height, width, rows", [(1, 1, 1), (15, 33, 5), (43, 8, 300), (130, 65, 257), (9, 550, 17)])
def test_the_gradient_of_a_weight_adds_its_rows_in_order(height, width, rows, instruction_set):
    grad, input = normal(rows + 3, height), normal(rows + 3, width, seed=1)
    bounds, ids = torch.tensor([[2, 2 + rows], [0, 0]]), torch.randperm(rows + 3)
    for dtype in (F32, BF16):
        out = torch.full((2, height, width), torch.nan, dtype=dtype)
        kernels.expert_wgrad_(out, grad, input, bounds, None, ids, None, False)
        used = slice(2, 2 + rows)
        assert torch.equal(out[0], in_order(grad[used].t(), input[ids[used]]).to(dtype)) and not out[1].any()


@pytest.mark.parametrize("width", [2080, 2072])  # rows that fill cache lines, and rows that do not
def test_a_gradient_larger_than_a_cache_is_that_of_its_terms(width, threads):
    """Past the cache it is written in whole lines at most."""
    height = 1020  # a little above 4 MiB
    grad, input = normal(2, height), normal(2, width, seed=1)
    out = torch.full((1, height, width), torch.nan, dtype=BF16)
    kernels.expert_wgrad_(out, grad, input, torch.tensor([[0, 2]]), None, None, None, False)
    assert torch.equal(out[0], in_order(grad.t(), input).to(BF16))


# rows of an expert around panels and chunks; hidden and inner around strips, blocks of terms, rows and columns
@cover(
    indirect=["instruction_set"],
    shape=((1, 3, 1), (17, 300, 9), (33, 40, 140), (270, 257, 20), (48, 64, 300), (200, 700, 5)),
    transposed=(False, True),
    strided=(False, True),
    instruction_set=("avx2", "avx512"),
)
def test_the_layer_adds_the_terms_of_each_product_in_order(shape, transposed, strided, instruction_set):
    """Between products are rectified numbers, rounded, so that each result is known to the bit."""
    rows, hidden, inner = shape
    x, grad, routing_weights = normal(rows, hidden), normal(rows, hidden, seed=3), torch.ones(rows, 1, dtype=BF16)
    up, down = normal(hidden, inner, seed=1), normal(inner, hidden, seed=2)
    stored = [(w if transposed else w.t()).contiguous()[None] for w in (up, down)]
    if strided:
        stored = [torch.stack([w, w.new_full(w.shape, torch.nan)], -1)[..., 0] for w in stored]
    operands = x, routing_weights, torch.arange(rows, dtype=torch.int32), torch.tensor([0, rows], dtype=torch.int32)
    layout = (*RELU, transposed, False, False)
    out, z = kernels.expert_mlp(*operands, *stored, None, None, *layout)
    expected = in_order(x, up).to(BF16)
    assert torch.equal(z, expected) and torch.equal(out, in_order(expected.relu(), down).to(BF16))
    d_x, _, dz, _ = kernels.expert_mlp_backward(grad, *operands, *stored, None, z, *layout, True, True, True, True)
    expected = torch.where(z > 0, in_order(grad, down.t()).to(BF16), 0)
    assert torch.equal(dz, expected) and torch.equal(d_x, in_order(expected, up.t()).to(BF16))


@cover(
    indirect=["instruction_set", "threads"],
    pattern=("skewed", "half_empty", "one_expert", "sentinels"),
    layout=({}, {"transposed": True, "interleaved": True, "gate": GPT_OSS}, {"gated": False, "gate": Gate("gelu")}),
    bias=(False, True),
    instruction_set=("avx2", "avx512"),
    threads=(1, 3),
)
def test_a_layer_is_as_accurate_as_the_reference(pattern, layout, bias, instruction_set, threads):
    check(CPU, case(pattern, hidden=70, inner=45, dtype=BF16, bias=bias, **layout))


@wide_sets
@pytest.mark.parametrize("numerics", ["bf16", "bf16 fp32 state stochastic"])
def test_updates_are_those_of_the_gradient(numerics, instruction_set):
    check_update(CPU, "adamw decay", numerics, factors((250, 70), BF16))


def test_bits_depend_on_neither_threads_nor_instruction_sets():
    arguments, found = case(tokens=400, experts=2, hidden=70, inner=45, dtype=BF16, bias=True), []
    before = torch.get_num_threads()
    try:
        for name, threads in (("avx512", 1), ("avx2", 1), ("avx512", 3)):
            native.instruction_set(name)
            torch.set_num_threads(threads)
            found.append(results(CPU, arguments))
    finally:
        native.instruction_set("")
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_a_layer_without_inner_width_gives_zeros():
    """A sum of no terms is 0, not what its memory held."""
    assert not expert_mlp(**case(inner=0, dtype=BF16), impl="cpu").any()


@wide_sets
def test_denormal_numbers_infinities_and_nan_count(instruction_set):
    """AVX512-BF16's own instruction takes a denormal for 0; a multiply-add of float32 does not."""
    grad = torch.full((1, 4), 2.0**-130, dtype=BF16)
    input = torch.tensor([2.0**120, 2.0**-3, torch.inf, torch.nan], dtype=BF16).repeat(1, 10)  # a panel and a part
    expected = torch.tensor([2.0**-10, 2.0**-133, torch.inf, torch.nan]).repeat(4, 10)
    for dtype in (F32, BF16):
        out = torch.empty(1, 4, 40, dtype=dtype)
        kernels.expert_wgrad_(out, grad, input, torch.tensor([[0, 1]]), None, None, None, False)
        torch.testing.assert_close(out[0], expected.to(dtype), rtol=0, atol=0, equal_nan=True)
