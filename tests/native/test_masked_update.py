"""masked_update in C++: the bits of the reference for every instruction set, thread count, layout and dtype."""

import pytest
import torch

from moe_unlearn import native
from moe_unlearn.ops import SGD, Update, masked_adamw_, masked_sgd_
from moe_unlearn.ops.bits import pack_bits
from moe_unlearn.testing import LAYOUTS, in_layout
from tests.support.by_keyword import by_keyword
from tests.support.covers import cover

pytestmark = pytest.mark.quick
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
# dtypes of param, grad and state
DTYPES = [
    (F32, F32, F32),
    (F32, BF16, F32),
    (BF16, BF16, BF16),
    (BF16, F32, BF16),
    (BF16, F32, F32),
    (BF16, F16, F32),
    (F16, F16, F16),
    (F16, F32, F32),
    (BF16, torch.float64, BF16),
]
SGD_CASES = [{}, {"weight_decay": 0.1}, {"momentum": 0.9, "dampening": 0.3}, {"momentum": 0.9, "nesterov": True}]
ADAMW_CASES = [{}, {"weight_decay": 0.1, "betas": (0.3, 0.95), "eps": 1e-6}]
RULES = [("sgd", options) for options in SGD_CASES] + [("adamw", options) for options in ADAMW_CASES]


def case(shape=(4, 5, 70), dtypes=(F32, F32, F32), slices=None, keep=0.5, master=False, seed=0):
    """The tensors of one update; keep=None: no mask."""
    generator = torch.Generator().manual_seed(seed)
    inner = shape if slices is None else (len(slices), *shape[1:])
    mask = torch.rand(inner, generator=generator) < (1.0 if keep is None else keep)
    if mask.dim() > 1:
        mask[:1] &= torch.rand(inner[1:], generator=generator) < 0.03  # whole words of zeros
    return {
        "param": torch.randn(shape, generator=generator).to(dtypes[0]),
        "grad": torch.randn(inner, generator=generator).to(dtypes[1]),
        "first": (torch.randn(inner, generator=generator) * 0.1).to(dtypes[2]),
        "second": torch.rand(inner, generator=generator).to(dtypes[2]) * 0.1,
        "mask": None if keep is None else pack_bits(mask),
        "master": torch.randn(inner, generator=generator) if master else None,
        "slices": None if slices is None else torch.tensor(slices, dtype=torch.int64),
    }


def run(rule, tensors, impl, **options):
    """What one step leaves in param, state and master."""
    t = {k: v if v is None or k in ("grad", "mask", "slices") else v.clone() for k, v in tensors.items()}
    update(rule, t, impl, **options)
    return t["param"], t["first"], t["second"], t["master"]


def update(rule, t, impl, **options):
    common = {"lr": 0.03, "step": 3, "master": t["master"], "slices": t["slices"], "impl": impl} | options
    if rule == "adamw":
        by_keyword(masked_adamw_)(t["param"], t["grad"], t["first"], t["second"], t["mask"], **common)
    else:
        by_keyword(masked_sgd_)(t["param"], t["grad"], t["first"], t["mask"], **common)


def assert_same_bits(actual, expected):
    for a, e in zip(actual, expected, strict=True):
        assert (a is None) == (e is None)
        if a is not None:
            integer = {2: torch.int16, 4: torch.int32}[a.element_size()]
            assert a.dtype == e.dtype
            assert torch.equal(a.contiguous().view(integer), e.contiguous().view(integer))


def check(rule, tensors, **options):
    assert_same_bits(run(rule, tensors, "cpu", **options), run(rule, tensors, "ref", **options))


@cover(indirect=["instruction_set"], rule=RULES, dtypes=DTYPES, instruction_set=native.INSTRUCTION_SETS)
def test_same_bits_as_ref(rule, dtypes, instruction_set):
    rule, options = rule
    check(rule, case(dtypes=dtypes), **options)
    check(rule, case(dtypes=dtypes, keep=None), step=1, **options)


@pytest.mark.parametrize("dtypes", [(BF16, F32, F32), (BF16, BF16, BF16), (F32, F32, F32)], ids=str)
@pytest.mark.parametrize("rule", ["sgd", "adamw"])
def test_stochastic_rounding_and_masters(rule, dtypes, instruction_set):
    options = {"weight_decay": 0.1} | ({"momentum": 0.9} if rule == "sgd" else {})
    random = {"rounding": "stochastic", "seed": -5, "parameter_id": 1 << 33}
    check(rule, case(dtypes=dtypes), step=(1 << 32) + 7, **random, **options)
    check(rule, case(dtypes=dtypes, slices=[3, 0]), **random, **options)
    check(rule, case(dtypes=dtypes, master=True), **options)
    check(rule, case(dtypes=dtypes, slices=[3, 0], master=True), **options)


@pytest.mark.parametrize(
    "shape", [(0, 4), (3, 0), (3, 1), (1,), (31,), (32,), (33,), (95,), (2, 2, 2, 64), ()], ids=str
)
@pytest.mark.parametrize("slices", [None, [], [0]])
def test_shapes(shape, slices):
    if slices is not None and (not shape or len(slices) > shape[0]):
        pytest.skip("no such slice")
    for keep in (0.5, None):
        check("adamw", case(shape, (BF16, F32, F32), slices, keep), rounding="stochastic")
        check("sgd", case(shape, (F32, F32, F32), slices, keep), momentum=0.9)


@cover(
    indirect=["instruction_set"],
    layout=tuple(LAYOUTS),
    slices=(None, [3, 1]),
    dtypes=((F32, F32, F32), (BF16, F16, BF16)),
    instruction_set=native.INSTRUCTION_SETS,
)
def test_every_memory_layout(dtypes, slices, layout, instruction_set):
    tensors = case((4, 3, 2, 41), dtypes, slices)
    expected = run("adamw", tensors, "ref")
    moved = {k: None if v is None else in_layout(v, layout) for k, v in tensors.items()}
    update("adamw", moved, "cpu")
    assert_same_bits((moved["param"], moved["first"], moved["second"], None), expected)


def test_expanded_gradient():
    tensors = case()
    tensors["grad"] = torch.tensor(0.3).expand(4, 5, 70)
    check("sgd", tensors)


def test_same_bits_for_any_number_of_threads(threads):
    tensors = case((16, 40, 70), (BF16, F32, F32))
    check("adamw", tensors, rounding="stochastic", seed=3)
    check("sgd", case((3000, 33), (BF16, BF16, BF16)), momentum=0.5)


@pytest.mark.parametrize("dtypes", [(F32, F32, F32), (BF16, BF16, BF16), (F16, F16, F16)], ids=str)
def test_masked_weights_keep_every_bit_and_are_not_read_into_their_neighbours(dtypes, instruction_set):
    tensors = case((6, 64), dtypes, keep=0.5)
    kept = torch.zeros(6, 64, dtype=torch.bool)
    kept[:, ::3] = True
    tensors["mask"] = pack_bits(kept)
    for name in ("param", "grad", "first", "second"):
        tensors[name][~kept] = torch.nan
    integer = {2: torch.int16, 4: torch.int32}[tensors["param"].element_size()]
    tensors["param"].view(integer)[1][~kept[1]] = 0x7FA1 if integer == torch.int16 else 0x7FA12345
    new = run("adamw", tensors, "cpu", weight_decay=0.1)
    for before, after in zip((tensors["param"], tensors["first"], tensors["second"]), new[:3], strict=True):
        assert torch.equal(before.view(integer)[~kept], after.view(integer)[~kept])
        assert after[kept].isfinite().all()


@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
def test_conversions_round_as_torch_does(dtype, instruction_set):
    """Every 16-bit pattern widened, and float32 near every rounding boundary narrowed."""
    every = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(dtype).view(1, -1)
    every = every[~every.isnan()].view(1, -1)
    wide = torch.zeros(every.shape)
    masked_sgd_(wide, every, None, None, SGD(lr=-1.0), Update(step=1), impl="cpu")
    assert torch.equal(wide, every.float())
    finite = every[every.isfinite()].float()
    near = torch.cat([finite.view(torch.int32) + i * (1 << 12) + j for i in range(16) for j in (-1, 0, 1)])
    near = near.view(torch.float32)
    near = near[near.isfinite()].view(1, -1)
    state = torch.zeros(near.shape)
    narrow = torch.zeros(near.shape, dtype=dtype)
    masked_sgd_(narrow, near, state, None, SGD(lr=-1.0, momentum=0.9), Update(step=1), impl="cpu")
    assert torch.equal(narrow, near.to(dtype)) and torch.equal(state, near)


def test_a_slice_out_of_range_is_refused():
    with pytest.raises(RuntimeError, match="slice 9 of 4"):
        run("sgd", case(slices=[0, 1]) | {"slices": torch.tensor([0, 9])}, "cpu")
