"""Grouped weight gradients in Triton: every epilogue that stores something new, and the inner products.

Most tests shrink the tiles of `configs`, so that a matrix has several in each direction and the interpreter stays
quick; `test_shipped_tiles` takes them as they are. The updates are in test_expert_wgrad_update.py.
"""

import contextlib
from unittest import mock

import pytest
import torch

from moe_unlearn.ops import expert_wgrad, expert_wgrad_ref, weight_score_ref
from moe_unlearn.ops.bits import pack_bits
from moe_unlearn.ops.expert_wgrad import Factors, expert_wgrad_inner, expert_wgrad_inner_ref, expert_wgrad_score
from moe_unlearn.testing import LAYOUTS, ROUTINGS, assert_as_accurate, in_layout, poison
from moe_unlearn.testing.yardstick import Reference
from moe_unlearn.triton_kernels import configs, grouped_outer
from tests.ops import test_expert_wgrad as base

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
ARCHITECTURES = (80, 90)
# M and P are multiples of 16 bytes, as descriptors need them
SIZES = {"T": 40, "K": 2, "E": 4, "M": 40, "P": 72}
ODD = SIZES | {"M": 37, "P": 69}
# architecture, dtype and sizes; with equal tiles, architectures differ by descriptors only
VARIANTS = {
    "fp32": (80, FP32, ODD),
    "bf16": (80, BF16, ODD),
    "bf16 descriptors": (90, BF16, SIZES),
    "fp16 descriptors": (90, FP16, SIZES),
}


@pytest.fixture
def small_tiles(monkeypatch):
    """32 x 64 tiles of 16 rows, walked down two at a time."""
    original = configs.expert_wgrad
    small = {"block_m": 32, "block_p": 64, "block_rows": 16, "group": 2}
    monkeypatch.setattr(configs, "expert_wgrad", lambda *a: original(*a)._replace(**small))


@pytest.fixture(params=ARCHITECTURES)
def arch(request, monkeypatch, small_tiles):
    monkeypatch.setenv("MOE_UNLEARN_TRITON_ARCH", str(request.param))
    return request.param


@pytest.fixture(params=VARIANTS)
def variant(request, monkeypatch, small_tiles):
    """(dtype, sizes)"""
    number, dtype, sizes = VARIANTS[request.param]
    monkeypatch.setenv("MOE_UNLEARN_TRITON_ARCH", str(number))
    return dtype, sizes


@contextlib.contextmanager
def split_in(parts: int):
    current = configs.expert_wgrad
    with mock.patch.object(configs, "expert_wgrad", lambda *a: current(*a)._replace(splits=parts)):
        yield


def case(device, pattern="skewed", dtype=FP32, seed=0, exact=False, sizes=SIZES):
    """Factors of one layer: gradient rows in sorted order, inputs by token."""
    with mock.patch.multiple(base, **sizes):
        return {k: v.to(device) for k, v in base.case(pattern, dtype, seed, exact).items()}


def direct(made):
    """The same with both factors in sorted order: on sm_90 both are read by descriptors."""
    rows = made["input_rows"]
    return {k: v for k, v in made.items() if k != "input_rows"} | {"input": made["input"][rows]}


def oracle(made, experts=None):
    """dW in float64."""
    wide = {k: v.double() if v.is_floating_point() else v for k, v in made.items()}
    return expert_wgrad_ref(**wide, experts=None if experts is None else torch.tensor(experts))


def random_bits(device, *shape, keep=0.6, seed=0):
    return (torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < keep).to(device)


def triton(made, **options):
    return expert_wgrad(**made, **options, impl="triton")


@pytest.mark.quick
@pytest.mark.parametrize("pattern", ROUTINGS)
@pytest.mark.slow(but=6)
def test_store_is_exact_on_integers_and_writes_every_element(device, variant, pattern):
    dtype, sizes = variant
    made = case(device, pattern, dtype, exact=True, sizes=sizes)
    with poison():
        got = triton(made, out_dtype=FP32)
    assert torch.equal(got.double(), oracle(made))
    assert (got[made["expert_offsets"].diff() == 0] == 0).all()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_store_accuracy(device, variant, layout):
    dtype, sizes = variant
    made = case(device, dtype=dtype, sizes=sizes)
    moved = {k: in_layout(v, layout) for k, v in made.items()}
    assert_as_accurate(triton(moved), Reference(lambda: expert_wgrad_ref(**made)).baseline(), oracle(made))


@pytest.mark.parametrize("gathered", ["neither", "grad", "both"])
def test_rows_gathered_on_either_side(device, variant, gathered):
    dtype, sizes = variant
    made = case(device, dtype=dtype, exact=True, sizes=sizes)
    expected = oracle(made)
    rows = torch.randperm(len(made["grad"]), device=device)
    inverse = torch.empty_like(rows)
    inverse[rows] = torch.arange(len(rows), device=device)
    if gathered != "both":
        made = direct(made)
    if gathered != "neither":
        made |= {"grad": made["grad"][rows], "grad_rows": inverse.int()}
    assert torch.equal(triton(made, out_dtype=FP32).double(), expected)


@pytest.mark.parametrize("aligned", [True, False])
def test_descriptors_only_where_rows_and_layout_allow_them(device, monkeypatch, aligned):
    monkeypatch.setenv("MOE_UNLEARN_TRITON_ARCH", "90")
    made = case(device, dtype=BF16, sizes=SIZES if aligned else ODD)
    for factors, expected in ((made, (aligned, False)), (direct(made), (aligned, aligned))):
        factors = Factors(**factors)
        _, tile = grouped_outer.tile_for("store", factors, None)
        assert grouped_outer.factor_arguments(*factors, tile).by_descriptor == expected


@pytest.mark.quick
@pytest.mark.parametrize("listed", [[3], [3, 0], [2, 2], []])
def test_only_listed_experts_in_their_order(device, arch, listed):
    made = case(device, dtype=BF16, exact=True)
    got = triton(made, experts=torch.tensor(listed, dtype=torch.int32, device=device), out_dtype=FP32)
    assert got.shape == (len(listed), SIZES["M"], SIZES["P"])
    assert torch.equal(got.double(), oracle(made, listed))


@pytest.mark.parametrize("contiguous", [True, False])
def test_bounds_of_a_part_of_each_experts_rows(device, arch, contiguous):
    made = case(device, dtype=BF16, exact=True)
    made = direct(made) if contiguous else made
    start, stop = made["expert_offsets"][:-1], made["expert_offsets"][1:]
    middle = (start + 2 * stop) // 3
    for bounds in (torch.stack([start, middle], 1), torch.stack([middle, stop], 1)):
        part = made | {"expert_offsets": bounds}
        assert torch.equal(triton(part, out_dtype=FP32).double(), oracle(part))
        few = triton(part, experts=torch.tensor([3, 1], device=device), out_dtype=FP32)
        assert torch.equal(few.double(), oracle(part, [3, 1]))


@pytest.mark.quick
@pytest.mark.parametrize("contiguous", [True, False])
def test_rows_of_others_reach_nobody(device, arch, contiguous):
    """NaN in the rows of expert 1 and behind the last expert, row numbers there that lead nowhere."""
    made = case(device, "sentinels", BF16, exact=True)
    expected = oracle(made)
    behind, (first, last) = int(made["expert_offsets"][-1]), made["expert_offsets"][1:3].tolist()
    assert behind < len(made["grad"]) and first < last
    if contiguous:
        made = direct(made)
        made["input"][first:last] = made["input"][behind:] = torch.nan
    else:
        made["input_rows"][behind:] = 10**9
    made["grad"][first:last] = made["grad"][behind:] = torch.nan
    got = triton(made, out_dtype=FP32)
    assert got[1].isnan().all()
    kept = [0, 2, 3]
    assert torch.equal(got[kept].double(), expected[kept])


@pytest.mark.quick
@pytest.mark.slow
def test_masked_store(device, arch):
    made = case(device, dtype=BF16, exact=True)
    kept = random_bits(device, SIZES["E"], SIZES["M"], SIZES["P"])
    kept[1], kept[:, :32, :64] = False, False
    words = pack_bits(kept)
    # P = 72 leaves 24 bits of the last word without an element: whatever they are
    words[..., -1] |= -256
    with poison():
        got = triton(made, mask=words, out_dtype=FP32)
    assert torch.equal(got.double(), torch.where(kept, oracle(made), 0))
    strided = triton(made, mask=in_layout(words, "strided"), out_dtype=FP32)
    assert torch.equal(strided, got)


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # infinity times zero is meant
def test_a_masked_infinity_is_zero(device, small_tiles):
    made = case(device)
    made["input"][:, 3] = torch.inf
    kept = random_bits(device, SIZES["E"], SIZES["M"], SIZES["P"])
    kept[..., 3] = False
    got = triton(made, mask=pack_bits(kept))
    assert got.isfinite().all() and (got[~kept] == 0).all()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=str)
def test_accumulate_adds_in_place(device, small_tiles, dtype, layout):
    made, experts = case(device, dtype=BF16, exact=True), torch.tensor([1, 3], device=device)
    before = base.integers(2, SIZES["M"], SIZES["P"], dtype=dtype, seed=5).to(device)
    out = in_layout(before.clone(), layout)
    kept = random_bits(device, *out.shape)
    assert triton(made, experts=experts, out=out, mask=pack_bits(kept)) is out
    expected = before.double() + torch.where(kept, oracle(made, [1, 3]), 0)
    assert torch.equal(out.double(), expected.to(dtype).double())


@pytest.mark.quick
@pytest.mark.slow
def test_a_bf16_buffer_is_rounded_once(device, arch):
    made = case(device, dtype=BF16)
    out = torch.randn(4, SIZES["M"], SIZES["P"], generator=torch.Generator().manual_seed(0)).bfloat16().to(device)
    expected = (out.float() + triton(made, out_dtype=FP32)).bfloat16()
    assert torch.equal(triton(made, out=out), expected)


@pytest.mark.quick
@pytest.mark.parametrize("pattern", ["skewed", "half_empty", "one_expert", "all_sentinels"])
@pytest.mark.slow(but=1)
def test_split_rows(device, arch, pattern):
    """Four parts of blocks of 16 rows: some are empty, some end inside a block."""
    made, experts = case(device, pattern, BF16, exact=True), torch.tensor([2, 0], device=device)
    kept = random_bits(device, 2, SIZES["M"], SIZES["P"])
    expected = torch.where(kept, oracle(made, [2, 0]), 0)
    out = torch.ones(2, SIZES["M"], SIZES["P"], device=device)
    with split_in(4), poison():
        assert torch.equal(triton(direct(made), out_dtype=FP32).double(), oracle(made))
        got = triton(made, experts=experts, mask=pack_bits(kept), out_dtype=FP32)
        triton(made, experts=experts, mask=pack_bits(kept), out=out)
    assert torch.equal(got.double(), expected) and torch.equal(out.double(), 1 + expected)


def test_split_accuracy(device, variant):
    dtype, sizes = variant
    made = case(device, "one_expert", dtype, sizes=sizes)
    with split_in(3):
        assert_as_accurate(triton(made), Reference(lambda: expert_wgrad_ref(**made)).baseline(), oracle(made))


def test_rows_are_split_where_few_tiles_meet_many_rows():
    def splits(experts, rows, epilogue="store"):
        return configs.expert_wgrad(epilogue, (experts, 2048, 768), rows, True, BF16, 90, 132).splits

    assert splits(1, 8192) == 5 and splits(1, 2048) == 2 and splits(128, 8192) == 1
    assert splits(1, 512) == splits(1, 0) == splits(0, 0) == splits(1, 8192, "weights") == 1


# one case each: 128 x 256 tiles take the interpreter a second
@pytest.mark.parametrize("number,dtype", [(80, BF16), (90, BF16), (80, FP32)], ids=["sm_80", "sm_90", "fp32"])
def test_shipped_tiles(device, monkeypatch, number, dtype):
    monkeypatch.setenv("MOE_UNLEARN_TRITON_ARCH", str(number))
    sizes = {"T": 90, "K": 2, "E": 1, "M": 136, "P": 264}
    made = case(device, dtype=dtype, exact=True, sizes=sizes)
    kept = random_bits(device, 1, 136, 264)
    expected = oracle(made)
    assert torch.equal(triton(made, out_dtype=FP32).double(), expected)
    masked = triton(direct(made), mask=pack_bits(kept), out_dtype=FP32)
    assert torch.equal(masked.double(), torch.where(kept, expected, 0))
    weight = base.integers(1, 136, 264, dtype=dtype, seed=3).to(device)
    factors = Factors(**made)
    score = expert_wgrad_score(weight, factors, factors, gamma=0.5, impl="triton")
    assert torch.equal(score.double(), (weight.double() - expected / 0.5) * expected)
    inner = expert_wgrad_inner([factors, factors], mask=pack_bits(kept), impl="triton")
    norms = torch.where(kept, expected, 0).square().sum((1, 2))
    assert torch.equal(inner, norms[:, None, None].expand(1, 2, 2))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_score(device, variant, layout):
    dtype, sizes = variant
    forget = case(device, seed=1, dtype=dtype, exact=True, sizes=sizes)
    retain = direct(case(device, "half_empty", seed=2, dtype=dtype, exact=True, sizes=sizes))
    shape = 4, sizes["M"], sizes["P"]
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype).to(device)
    experts = torch.tensor([0, 3], device=device)
    with poison():
        got = expert_wgrad_score(
            in_layout(weight, layout), Factors(**forget), Factors(**retain), gamma=0.3, experts=experts, impl="triton"
        )
    sides = [oracle(side, [0, 3]).float() for side in (forget, retain)]
    assert got.dtype == FP32 and torch.equal(got, weight_score_ref(weight[experts], *sides, 0.3))
    if layout == "contiguous":
        whole = expert_wgrad_score(weight, Factors(**forget), Factors(**retain), gamma=0.3, impl="triton")
        assert torch.equal(whole[experts], got)


@pytest.mark.parametrize("m", [1, pytest.param(2, marks=pytest.mark.quick), 3, 4])
@pytest.mark.slow(but=1)
def test_inner_products_are_exact_on_integers_and_masked(device, variant, m):
    dtype, sizes = variant
    cases = [case(device, p, dtype, i, exact=True, sizes=sizes) for i, p in enumerate(ROUTINGS[:m])]
    cases[0] = direct(cases[0])
    kept = random_bits(device, 4, sizes["M"], sizes["P"])
    kept[2] = False
    gradients = [Factors(**c) for c in cases]
    with poison():
        got = expert_wgrad_inner(gradients, mask=pack_bits(kept), impl="triton")
        few = expert_wgrad_inner(gradients, experts=torch.tensor([3, 0], device=device), impl="triton")
    whole = torch.stack([oracle(side) for side in cases], 1).flatten(2)
    sides = torch.where(kept.flatten(1)[:, None], whole, 0)
    assert got.dtype == torch.float64 and torch.equal(got, sides @ sides.mT)
    assert torch.equal(few, (whole @ whole.mT)[[3, 0]]) and few.any()


def test_inner_product_accuracy(device, variant):
    dtype, sizes = variant
    cases = [case(device, seed=i, dtype=dtype, sizes=sizes) for i in range(3)]
    lists = [list(part) for part in zip(*(Factors(**c) for c in cases), strict=True)]
    got = expert_wgrad_inner([Factors(**c) for c in cases], impl="triton")
    wide = [
        [t.double() for t in part] if part[0] is not None and part[0].is_floating_point() else part for part in lists
    ]
    baseline = Reference(lambda: expert_wgrad_inner_ref(*lists, None, None)).baseline()
    assert_as_accurate(got, baseline, expert_wgrad_inner_ref(*wide, None, None))
    assert torch.equal(got, got.mT)


def test_nothing_to_do(device, small_tiles):
    made = case(device, sizes=SIZES | {"T": 0})
    factors, none = Factors(**made), torch.zeros(0, dtype=torch.int64, device=device)
    with poison():
        assert not triton(made).any() and triton(made, experts=none).shape == (0, SIZES["M"], SIZES["P"])
        assert not expert_wgrad_inner([factors] * 2, impl="triton").any()
        assert expert_wgrad_inner([factors] * 2, experts=none, impl="triton").shape == (0, 2, 2)
        weight = torch.ones(4, SIZES["M"], SIZES["P"], device=device)
        assert not expert_wgrad_score(weight, factors, factors, gamma=1.0, impl="triton").any()
        assert expert_wgrad_score(weight, factors, factors, gamma=1.0, experts=none, impl="triton").numel() == 0
        flat = made | {"grad": made["grad"][:, :0]}
        assert triton(flat).shape == (4, 0, SIZES["P"])
        assert not expert_wgrad_inner([Factors(**flat)] * 2, impl="triton").any()


def test_one_token_and_one_expert_per_token(device, arch):
    made = case(device, dtype=BF16, exact=True, sizes=SIZES | {"T": 1, "K": 1})
    assert torch.equal(triton(made, out_dtype=FP32).double(), oracle(made))


def test_runs_repeat_bitwise(device, arch):
    made = case(device, dtype=BF16)
    factors = [Factors(**made), Factors(**direct(made))]
    runs = [(triton(made), expert_wgrad_inner(factors, impl="triton")) for _ in range(2)]
    assert torch.equal(runs[0][0], runs[1][0]) and torch.equal(runs[0][1], runs[1][1])


def test_float64_factors_are_left_to_the_reference(device, small_tiles):
    made = case(device, dtype=torch.float64)
    assert torch.equal(triton(made), expert_wgrad_ref(**made))
    weight = torch.ones(4, SIZES["M"], SIZES["P"], device=device)
    with pytest.raises(TypeError, match="float64 factors"):
        expert_wgrad_score(weight, Factors(**made), Factors(**made), gamma=1.0, impl="triton")


def test_compile(device, small_tiles):
    made, out = case(device), torch.zeros(4, SIZES["M"], SIZES["P"], device=device)
    factors, other = Factors(**made), torch.zeros_like(out)

    def step(out):
        expert_wgrad(**made, out=out, impl="triton")
        score = expert_wgrad_score(out, factors, factors, gamma=0.5, impl="triton")
        return expert_wgrad(**made, impl="triton"), score, expert_wgrad_inner([factors] * 2, impl="triton")

    got = torch.compile(step, fullgraph=True, backend="aot_eager")(out)
    assert all(map(torch.equal, got, step(other))) and torch.equal(out, other)
