"""masked_update against torch.optim, against its reference, and in the corners where masks leak."""

import functools

import pytest
import torch

from moe_unlearn import backend
from moe_unlearn.ops import masked_update as module
from moe_unlearn.ops.bits import pack_bits, philox, round_stochastic
from moe_unlearn.ops.masked_update import (
    SGD,
    AdamW,
    Update,
    masked_adamw_,
    masked_adamw_ref,
    masked_sgd_,
    masked_sgd_ref,
)
from moe_unlearn.testing import LAYOUTS, assert_as_accurate, check_against_ref, in_layout, poison
from tests.support.by_keyword import by_keyword

# Triton's are in tests/triton_kernels: the square root of torch on the CPU is one ulp off IEEE's now and then
IMPLS = [impl for impl in ("ref", "cpu") if backend.has("masked_update.adamw", impl, "cpu")]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
SGD_CASES = {
    "plain": {},
    "decay": {"weight_decay": 0.1},
    "momentum": {"momentum": 0.9, "weight_decay": 0.1},
    "dampening": {"momentum": 0.8, "dampening": 0.3},
    "nesterov": {"momentum": 0.9, "nesterov": True, "weight_decay": 0.01},
}
ADAMW_CASES = {"default": {}, "decay": {"weight_decay": 0.1, "betas": (0.8, 0.95), "eps": 1e-6}}


def randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def random_mask(*shape, seed=0, keep=0.5):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < keep


def bits(value):
    """The bits of a tensor as integers, so that NaN payloads and signed zeros count."""
    width = {2: torch.int16, 4: torch.int32, 8: torch.int64}[value.element_size()]
    return value.detach().contiguous().view(width)


def same_bits(a, b):
    return a.dtype == b.dtype and torch.equal(bits(a), bits(b))


def moments(shape, dtype, seed=0):
    return randn(*shape, seed=seed + 101, dtype=dtype), randn(*shape, seed=seed + 102).square().to(dtype)


@pytest.mark.quick
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", ADAMW_CASES.values(), ids=ADAMW_CASES)
def test_adamw_is_torch_adamw_where_the_mask_allows(options, dtype, impl, rounded_sqrt):
    start, mask = randn(5, 6, 37, dtype=dtype), random_mask(5, 6, 37)
    theirs, ours = torch.nn.Parameter(start.clone()), start.clone()
    m, v = torch.zeros_like(ours), torch.zeros_like(ours)
    options = {"weight_decay": 0.0} | options
    optimizer = torch.optim.AdamW([theirs], lr=1e-2, foreach=False, fused=False, **options)
    for step in range(1, 21):
        theirs.grad = randn(5, 6, 37, seed=step, dtype=dtype)
        update = by_keyword(masked_adamw_)
        update(ours, theirs.grad.clone(), m, v, mask=pack_bits(mask), lr=1e-2, step=step, impl=impl, **options)
        optimizer.step()
    state = optimizer.state[theirs]
    for mine, other in ((ours, theirs), (m, state["exp_avg"]), (v, state["exp_avg_sq"])):
        assert same_bits(mine[mask], other[mask])
    assert same_bits(ours[~mask], start[~mask])
    assert not m[~mask].any() and not v[~mask].any()


@pytest.mark.quick
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", SGD_CASES.values(), ids=SGD_CASES)
def test_sgd_is_torch_sgd_where_the_mask_allows(options, dtype, impl):
    """Bitwise in float32 and float64; as accurate as torch where torch rounds lr to the narrow dtype too."""
    start, mask = randn(7, 41, dtype=dtype), random_mask(7, 41)
    theirs, gold, ours = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone().double()), start.clone()
    buffer = torch.full_like(ours, torch.nan) if "momentum" in options else None
    optimizers = [torch.optim.SGD([p], lr=0.05, foreach=False, fused=False, **options) for p in (theirs, gold)]
    for step in range(1, 11):
        theirs.grad = randn(7, 41, seed=step, dtype=dtype)
        gold.grad = theirs.grad.double()
        rule = SGD(lr=0.05, **options)
        masked_sgd_(ours, theirs.grad.clone(), buffer, pack_bits(mask), rule, Update(step=step), impl=impl)
        for optimizer in optimizers:
            optimizer.step()
    assert same_bits(ours[~mask], start[~mask])
    pairs = [(ours, theirs, gold)]
    if buffer is not None:
        assert buffer[~mask].isnan().all()
        states = [o.state[p]["momentum_buffer"] for o, p in zip(optimizers, (theirs, gold), strict=True)]
        pairs.append((buffer, *states))
    for mine, other, truth in pairs:
        if dtype in (torch.float32, torch.float64):
            assert same_bits(mine[mask], other[mask])
        else:
            assert_as_accurate(mine[mask], other[mask].detach(), truth[mask].detach())


def adamw(param, grad, exp_avg, exp_avg_sq, master=None, impl="auto", **keywords):
    """`masked_adamw_` in the form of its reference, all numbers by keyword."""
    copies = [None if t is None else t.clone() for t in (param, exp_avg, exp_avg_sq, master)]
    by_keyword(masked_adamw_)(copies[0], grad, *copies[1:3], master=copies[3], impl=impl, **keywords)
    return tuple(copies)


def sgd(param, grad, momentum_buffer, master=None, impl="auto", **keywords):
    copies = [None if t is None else t.clone() for t in (param, momentum_buffer, master)]
    by_keyword(masked_sgd_)(copies[0], grad, copies[1], master=copies[2], impl=impl, **keywords)
    return tuple(copies)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("numerics", ["float32", "bf16", "mixed", "master"])
@pytest.mark.parametrize("compact", [False, True])
def test_the_op_is_as_accurate_as_its_reference(compact, numerics, impl):
    dtype = torch.float32 if numerics == "float32" else torch.bfloat16
    state = torch.float32 if numerics in ("mixed", "master") else dtype
    shape = (3, 40, 70) if compact else (6, 40, 70)
    inputs = {
        "param": randn(6, 40, 70, dtype=dtype),
        "grad": randn(*shape, seed=9),
        "mask": pack_bits(random_mask(*shape)),
        "slices": torch.tensor([4, 0, 2]) if compact else None,
        "master": randn(*shape, seed=4) if numerics == "master" else None,
        "lr": 0.01,
        "weight_decay": 0.1,
        "step": 3,
    }
    m, v = moments(shape, state)
    for function, ref, state in (
        (adamw, masked_adamw_ref, {"exp_avg": m, "exp_avg_sq": v}),
        (sgd, masked_sgd_ref, {"momentum_buffer": m, "momentum": 0.9}),
    ):
        check_against_ref(functools.partial(function, impl=impl), by_keyword(ref), inputs | state)


@pytest.mark.quick
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("shape", [(6, 5, 33), (6, 64), (70,)], ids=str)
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_compact_slices_equal_a_dense_mask_that_freezes_the_rest(rounding, shape, impl):
    param = randn(*shape, dtype=torch.bfloat16)
    slices = torch.tensor([5, 1, 2])
    mask = torch.zeros(shape, dtype=torch.bool)
    mask[slices] = random_mask(3, *shape[1:])
    grad = randn(*shape, seed=1)
    m, v = moments(shape, torch.float32)
    common = {"lr": 0.03, "weight_decay": 0.1, "step": 4, "rounding": rounding, "seed": 7, "impl": impl}
    dense = adamw(param, grad, m, v, mask=pack_bits(mask), **common)
    compact = adamw(param, grad[slices], m[slices], v[slices], mask=pack_bits(mask[slices]), slices=slices, **common)
    assert same_bits(dense[0], compact[0]) and not same_bits(dense[0], param)
    assert same_bits(dense[1][slices], compact[1]) and same_bits(dense[2][slices], compact[2])


@pytest.mark.quick
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_memory_layout_gives_the_same_bits(layout, impl):
    param, grad, mask = randn(6, 5, 34), randn(3, 5, 34, seed=1), pack_bits(random_mask(3, 5, 34))
    state, slices = moments((3, 5, 34), torch.float32), torch.tensor([0, 5, 3])
    expected = adamw(param, grad, *state, mask=mask, lr=0.1, step=2, slices=slices, impl=impl)
    actual = [in_layout(t, layout) for t in (param, *state)]
    grad, mask, slices = (in_layout(t, layout) for t in (grad, mask, slices))
    masked_adamw_(actual[0], grad, *actual[1:], mask, AdamW(lr=0.1), Update(step=2), slices=slices, impl=impl)
    for a, e in zip(actual, expected, strict=False):
        assert same_bits(a, e)


@pytest.mark.quick
@pytest.mark.parametrize("shape", [(9, 3, 33), (50, 40), (100,)], ids=str)
@pytest.mark.parametrize("slices", [None, [7, 0, 3]])
def test_the_size_of_blocks_changes_no_bit(shape, slices, monkeypatch):
    slices = None if slices is None else torch.tensor(slices)
    shape_in = shape if slices is None else (3, *shape[1:])
    param, grad, mask = randn(*shape, dtype=torch.bfloat16), randn(*shape_in), random_mask(*shape_in)
    state = moments(shape_in, torch.float32)
    common = {"mask": pack_bits(mask), "lr": 0.1, "step": 2, "rounding": "stochastic", "slices": slices}
    whole = adamw(param, grad, *state, impl="ref", **common)
    monkeypatch.setattr(module, "_BLOCK_ELEMENTS", 100)
    for a, b in zip(whole[:3], adamw(param, grad, *state, impl="ref", **common)[:3], strict=True):
        assert same_bits(a, b)


@pytest.mark.quick
@pytest.mark.parametrize("impl", IMPLS)
def test_stochastic_rounding_uses_the_bits_of_the_whole_parameter(impl):
    param, grad = randn(4, 33, dtype=torch.bfloat16), randn(2, 33, seed=1)
    slices, key = torch.tensor([3, 1]), {"step": 5, "seed": 11, "parameter_id": 2}
    new = sgd(param, grad, None, mask=None, lr=0.01, slices=slices, rounding="stochastic", impl=impl, **key)
    index = torch.arange(4 * 33).view(4, 33)[slices]
    exact = torch.add(param[slices].float(), grad, alpha=-0.01)
    assert same_bits(new[0][slices], round_stochastic(exact, philox(index, 5, 11, 2)))
    assert same_bits(new[0][[0, 2]], param[[0, 2]])


@pytest.mark.quick
@pytest.mark.parametrize("impl", IMPLS)
def test_small_bf16_steps_are_lost_by_nearest_and_kept_by_stochastic_and_master(impl):
    # the rounding step of bfloat16 is 2^-8 on [1, 2); an update of 1e-6 is far below half of it
    start = torch.ones(200, 200, dtype=torch.bfloat16) * 1.5
    nearest, stochastic, copied = start.clone(), start.clone(), start.clone()
    master, steps = start.float(), 30
    for step in range(1, steps + 1):
        grad = torch.full_like(master, 0.1)
        masked_sgd_(nearest, grad, None, None, SGD(lr=1e-5), Update(step=step), impl=impl)
        masked_sgd_(stochastic, grad, None, None, SGD(lr=1e-5), Update(step=step, rounding="stochastic"), impl=impl)
        masked_sgd_(copied, grad, None, None, SGD(lr=1e-5), Update(step=step), master=master, impl=impl)
    assert same_bits(nearest, start)
    assert (master < 1.5).all() and same_bits(copied, master.bfloat16())
    # each element steps down by 2^-7 with probability p = 1e-6 / 2^-7 a step: 1.2 million Bernoulli trials,
    # five standard deviations; an element that stepped stays, so the mean is the exact one
    gap, trials = 2.0**-7, start.numel() * steps
    p = 1e-6 / gap
    hits = float((1.5 - stochastic.double()).sum() / gap)
    assert abs(hits - trials * p) <= 5 * (trials * p) ** 0.5
    assert hits > 0


@pytest.mark.quick
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("rounding", ["nearest", "stochastic", "master"])
def test_masked_elements_keep_every_bit(rounding, impl):
    param = randn(8, 40, dtype=torch.bfloat16)
    payloads = torch.tensor([0x7FA1, 0x7F80, -0x80, 0x0001, -0x8000], dtype=torch.int16)
    param[0, :5] = payloads.view(torch.bfloat16)
    mask = random_mask(8, 40)
    mask[0] = False
    grad = randn(8, 40, seed=1)
    grad[0], grad[~mask] = torch.nan, torch.inf
    m, v = moments((8, 40), torch.float32)
    m[~mask] = torch.nan
    master = param.float() if rounding == "master" else None
    if master is not None:
        master[~mask] = 123.0
    kind = "nearest" if rounding == "master" else rounding
    keywords = {"mask": pack_bits(mask), "lr": 0.1, "weight_decay": 0.3, "rounding": kind, "master": master}
    new = adamw(param, grad, m, v, step=2, impl=impl, **keywords)
    for before, after in zip((param, m, v), new[:3], strict=True):
        assert torch.equal(bits(before)[~mask], bits(after)[~mask])
        assert after[mask].isfinite().all() and not (bits(before) == bits(after))[mask].all()
    if master is not None:
        assert (new[3][~mask] == 123.0).all() and same_bits(new[0][mask], new[3][mask].bfloat16())


@pytest.mark.quick
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("shape, slices", [((0, 4), None), ((3, 0), None), ((3, 4), []), ((), None), ((0,), None)])
def test_empty_and_zero_dimensional(shape, slices, impl):
    slices = None if slices is None else torch.tensor(slices, dtype=torch.int64)
    param = torch.ones(shape)
    inner = shape if slices is None else (0, *shape[1:])
    state = torch.zeros(inner), torch.zeros(inner)
    mask = pack_bits(torch.ones(inner, dtype=torch.bool))
    with poison():
        new = adamw(param, torch.ones(inner), *state, mask=mask, lr=0.5, step=1, slices=slices, impl=impl)
    if shape == ():
        assert new[0] < 1 and new[1] > 0
    else:
        assert same_bits(new[0], param)


@pytest.mark.quick
def test_results_do_not_depend_on_the_number_of_threads():
    param, grad = randn(300, 1000, dtype=torch.bfloat16), randn(300, 1000, seed=1)
    state, mask = moments((300, 1000), torch.float32), pack_bits(random_mask(300, 1000))
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(adamw(param, grad, *state, mask=mask, lr=0.1, step=1, rounding="stochastic")[:3])
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(same_bits(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.quick
def test_an_update_between_forward_and_backward_is_caught():
    weight = torch.nn.Parameter(randn(3, 3))
    x = randn(2, 3).requires_grad_()
    loss = (x @ weight).square().sum()
    masked_sgd_(weight, torch.ones(3, 3), None, None, SGD(lr=0.1), Update(step=1))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_opcheck():
    param, mask = randn(4, 40), pack_bits(random_mask(2, 40))
    grad, (m, v), slices = randn(2, 40, seed=1), moments((2, 40), torch.float32), torch.tensor([3, 0])
    check, ops, update = torch.library.opcheck, torch.ops.moe_unlearn, Update(step=2)
    sgd, adamw = SGD(lr=0.1, weight_decay=0.1), AdamW(lr=0.1, beta2=0.99, weight_decay=0.1)
    check(ops.masked_adamw.default, (param, grad, m, v, mask, None, slices, *adamw, *update, "auto"))
    for buffer, master in ((m, None), (None, randn(2, 40, seed=5))):
        tensors = param.bfloat16(), grad, buffer, mask, master, slices
        check(ops.masked_sgd.default, (*tensors, *sgd, *update, "auto"))


def test_compiles_as_one_graph():
    def update(param, grad, m, v, mask, slices):
        masked_adamw_(param, grad, m, v, mask, AdamW(lr=0.1), Update(step=2, rounding="stochastic"), slices=slices)
        masked_sgd_(param, grad, None, mask, SGD(lr=0.1), Update(step=2), slices=slices)
        return param * 2

    def inputs():
        m, v = moments((2, 40), torch.float32)
        mask, slices = pack_bits(random_mask(2, 40)), torch.tensor([3, 0])
        return [randn(4, 40, dtype=torch.bfloat16), randn(2, 40), m, v, mask, slices]

    eager, compiled = inputs(), inputs()
    expected = update(*eager)
    actual = torch.compile(update, fullgraph=True, backend="aot_eager")(*compiled)
    assert same_bits(actual, expected)
    assert all(torch.equal(a, b) for a, b in zip(compiled, eager, strict=True))


BAD = {
    "integer param": (TypeError, "param must be a floating-point", {"param": torch.ones(3, 40).int()}),
    "integer grad": (TypeError, "grad must be a floating-point", {"grad": torch.ones(3, 40).int()}),
    "grad shape": (ValueError, r"grad must have shape \[3, 40\]; got \[40, 3\]", {"grad": torch.ones(40, 3)}),
    "moment shape": (ValueError, "exp_avg must have shape", {"exp_avg": torch.ones(3, 1)}),
    "moment dtype": (TypeError, "exp_avg_sq must be", {"exp_avg_sq": torch.ones(3, 40).half()}),
    "bool mask": (TypeError, "packed int32 words", {"mask": torch.ones(3, 40, dtype=torch.bool)}),
    "mask shape": (
        ValueError,
        r"\[3, 2\] for weights \[3, 40\]; got \[3, 1\]",
        {"mask": torch.ones(3, 1, dtype=torch.int32)},
    ),
    "slices dtype": (TypeError, "slices must be int64", {"slices": torch.ones(3).int()}),
    "slices shape": (ValueError, r"slices must be \[M\]", {"slices": torch.ones(3, 1).long()}),
    "compact grad": (ValueError, r"grad must have shape \[2, 40\]", {"slices": torch.tensor([0, 1])}),
    "rounding": (ValueError, "rounding must be one of", {"rounding": "up"}),
    "half": (
        TypeError,
        "stochastic rounding is to bfloat16",
        {"param": torch.ones(3, 40).half(), "rounding": "stochastic"},
    ),
    "master dtype": (TypeError, "master must be float32", {"master": torch.ones(3, 40).bfloat16()}),
    "master rounding": (
        ValueError,
        "master needs rounding 'nearest'",
        {"master": torch.ones(3, 40), "rounding": "stochastic"},
    ),
    "step": (ValueError, "step counts from 1; got 0", {"step": 0}),
    "device": (ValueError, "grad must be on cpu like param", {"grad": torch.ones(3, 40, device="meta")}),
}


@pytest.mark.quick
@pytest.mark.parametrize("error, message, change", BAD.values(), ids=BAD)
def test_bad_arguments(error, message, change):
    good = {
        "param": torch.ones(3, 40),
        "grad": torch.ones(3, 40),
        "exp_avg": torch.zeros(3, 40),
        "exp_avg_sq": torch.zeros(3, 40),
        "mask": None,
        "lr": 0.1,
        "step": 1,
    }
    with pytest.raises(error, match=message):
        by_keyword(masked_adamw_)(**(good | change))


@pytest.mark.quick
def test_bad_sgd_options():
    param = torch.ones(2, 3)
    with pytest.raises(ValueError, match="needs a momentum_buffer"):
        masked_sgd_(param, param, None, None, SGD(lr=0.1, momentum=0.9), Update(step=1))
    with pytest.raises(ValueError, match="nesterov needs momentum"):
        masked_sgd_(param, param, None, None, SGD(lr=0.1, nesterov=True), Update(step=1))
    with pytest.raises(RuntimeError, match="no implementation cuda"):
        masked_sgd_(param, param, None, None, SGD(lr=0.1), Update(step=1), impl="cuda")
