"""masked_update against torch.optim, against its reference in every implementation, and where masks leak.

The reference always runs on the CPU, so that a GPU is held to the same bits.
"""

import pytest
import torch

from moe_unlearn.ops import masked_update as module
from moe_unlearn.ops.bits import pack_bits, philox, round_stochastic, unpack_bits
from moe_unlearn.ops.masked_update import (
    SGD,
    AdamW,
    Update,
    masked_adamw_,
    masked_adamw_ref,
    masked_sgd_,
    masked_sgd_ref,
)
from moe_unlearn.testing import LAYOUTS, assert_as_accurate, check_against_ref, in_layout
from tests.ops.masked_update.cases import (
    ADAMW_CASES,
    BF16,
    BOTH,
    F16,
    F32,
    F64,
    FEW_NUMERICS,
    NUMERICS,
    RULES,
    SGD_CASES,
    SHAPES,
    adamw,
    apply,
    assert_same,
    bits,
    check,
    given,
    inputs,
    moments,
    randn,
    random_mask,
    run,
    same_bits,
    sgd,
)
from tests.support.by_keyword import by_keyword
from tests.support.covers import cover, pairwise
from tests.support.impls import REF, impls

# NaN and infinity are meant
pytestmark = [pytest.mark.quick, pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")]
IMPLS = impls("masked_update")
DTYPES = [F32, BF16, F16, F64]


# ---- Against torch.optim: not Triton, since the square root of torch on the CPU is one ulp off now and then -


@pytest.mark.parametrize("impl", ["ref", "cpu"], indirect=True)
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
        update(ours, theirs.grad.clone(), m, v, mask=pack_bits(mask), lr=1e-2, step=step, impl=impl.name, **options)
        optimizer.step()
    state = optimizer.state[theirs]
    for mine, other in ((ours, theirs), (m, state["exp_avg"]), (v, state["exp_avg_sq"])):
        assert same_bits(mine[mask], other[mask])
    assert same_bits(ours[~mask], start[~mask])
    assert not m[~mask].any() and not v[~mask].any()


@pytest.mark.parametrize("impl", ["ref", "cpu"], indirect=True)
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
        masked_sgd_(ours, theirs.grad.clone(), buffer, pack_bits(mask), rule, Update(step=step), impl=impl.name)
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


@pytest.mark.parametrize("impl", ["ref", "cpu"], indirect=True)
def test_small_bf16_steps_are_lost_by_nearest_and_kept_by_stochastic_and_master(impl):
    # the rounding step of bfloat16 is 2^-8 on [1, 2); an update of 1e-6 is far below half of it
    start = torch.ones(200, 200, dtype=torch.bfloat16) * 1.5
    nearest, stochastic, copied = start.clone(), start.clone(), start.clone()
    master, steps = start.float(), 30
    for step in range(1, steps + 1):
        grad = torch.full_like(master, 0.1)
        masked_sgd_(nearest, grad, None, None, SGD(lr=1e-5), Update(step=step), impl=impl.name)
        masked_sgd_(
            stochastic, grad, None, None, SGD(lr=1e-5), Update(step=step, rounding="stochastic"), impl=impl.name
        )
        masked_sgd_(copied, grad, None, None, SGD(lr=1e-5), Update(step=step), master=master, impl=impl.name)
    assert same_bits(nearest, start)
    assert (master < 1.5).all() and same_bits(copied, master.bfloat16())
    # each element steps down by 2^-7 with probability p = 1e-6 / 2^-7 a step: 1.2 million Bernoulli trials,
    # five standard deviations; an element that stepped stays, so the mean is the exact one
    gap, trials = 2.0**-7, start.numel() * steps
    p = 1e-6 / gap
    hits = float((1.5 - stochastic.double()).sum() / gap)
    assert abs(hits - trials * p) <= 5 * (trials * p) ** 0.5
    assert hits > 0


# ---- What every implementation does ------------------------------------------------------------------------


@cover(full=True, indirect=["impl"], impl=IMPLS, rule=tuple(RULES), numerics=tuple(NUMERICS))
@pytest.mark.slow(but=40)
def test_every_rule_has_the_bits_of_the_reference(rule, numerics, impl):
    function, options = RULES[rule]
    grad_dtype = DTYPES[(tuple(RULES).index(rule) + tuple(NUMERICS).index(numerics)) % 4]
    for masked in (True, False):
        common, state = inputs(numerics, (3, 5, 70), masked=masked, grad_dtype=grad_dtype)
        check(impl, function, common, state, **options)


# numbers that neither bfloat16 nor float16 holds
VALUES = {"lr": (0.3, 1e-3), "weight_decay": (0.1, 0.3, 1e-3), "step": (1, 7)}
NUMBERS = {
    "adamw": VALUES | {"betas": ((0.3, 0.9), (0.9, 0.7), (0.6, 0.999)), "eps": (0.1, 0.3, 1e-3)},
    "sgd": VALUES | {"momentum": (0.9, 0.3), "dampening": (0.1, 0.3, 1e-3)},
    "nesterov": VALUES | {"momentum": (0.7, 1e-3), "nesterov": (True,)},
}


@cover(indirect=["impl"], impl=IMPLS, rule=tuple(NUMBERS))
def test_each_number_is_rounded_where_the_reference_rounds_it(rule, impl):
    function = adamw if rule == "adamw" else sgd
    for numerics in ("bf16", "fp16"):
        common, state = inputs(numerics, (16, 70), masked=False)
        for options in pairwise(NUMBERS[rule]):
            check(impl, function, common, state, **options)


@cover(indirect=["impl"], impl=IMPLS, numerics=("fp32", "bf16", "bf16 fp32 state", "bf16 master"), rule=(0, 1))
def test_as_accurate_as_the_reference(rule, numerics, impl):
    dtype, state_dtype, _, master = NUMERICS[numerics]
    shape = (3, 40, 70)
    m, v = moments(shape, state_dtype)
    arguments = {
        "param": randn(6, 40, 70, dtype=dtype),
        "grad": randn(*shape, seed=9),
        "mask": pack_bits(random_mask(*shape)),
        "slices": torch.tensor([4, 0, 2]),
        "master": randn(*shape, seed=4) if master else None,
        "lr": 0.01,
        "weight_decay": 0.1,
        "step": 3,
    }
    function, ref, state = (
        (adamw, masked_adamw_ref, {"exp_avg": m, "exp_avg_sq": v}),
        (sgd, masked_sgd_ref, {"momentum_buffer": m, "momentum": 0.9}),
    )[rule]
    check_against_ref(
        lambda **keywords: function(**keywords, impl=impl.name), by_keyword(ref), impl.moved(arguments | state)
    )


@cover(indirect=["impl"], impl=IMPLS, rounding=("nearest", "stochastic"), shape=((6, 5, 33), (6, 64), (70,)))
def test_compact_slices_equal_a_dense_mask_that_freezes_the_rest(rounding, shape, impl):
    slices = torch.tensor([5, 1, 2])
    mask = torch.zeros(shape, dtype=torch.bool)
    mask[slices] = random_mask(3, *shape[1:])
    grad, (m, v) = randn(*shape, seed=1), moments(shape, F32)
    common = {
        "param": randn(*shape, dtype=BF16),
        "master": None,
        "lr": 0.03,
        "step": 4,
        "rounding": rounding,
        "seed": 7,
    }
    common["weight_decay"] = 0.1
    dense = run(impl, adamw, common | {"grad": grad, "mask": pack_bits(mask)}, (m, v))
    of_slices = {"grad": grad[slices], "mask": pack_bits(mask[slices]), "slices": slices}
    compact = run(impl, adamw, common | of_slices, (m[slices], v[slices]))
    assert same_bits(dense[0], compact[0]) and not same_bits(dense[0], common["param"])
    assert same_bits(dense[1][slices], compact[1]) and same_bits(dense[2][slices], compact[2])


@cover(indirect=["impl"], impl=IMPLS, shape=tuple(SHAPES), compact=(False, True), masked=(False, True))
def test_every_shape(shape, compact, masked, impl):
    shape, slices = SHAPES[shape]
    for numerics, (function, options) in zip(("bf16 fp32 state stochastic", "bf16 master"), BOTH, strict=True):
        common, state = inputs(numerics, shape, slices=slices if compact else None, masked=masked)
        check(impl, function, common, state, **options)


@cover(
    indirect=["impl"],
    impl=IMPLS,
    layout=LAYOUTS,
    slices=(None, [0, 5, 3]),
    shape=((6, 5, 34), (6, 64), (6, 2, 3, 33), (6,)),
    numerics=("fp32", "bf16 fp32 state", "bf16 master"),
)
def test_every_layout(layout, slices, shape, numerics, impl):
    """Also that nothing outside the views is written."""
    common, state = inputs(numerics, shape, slices=slices)
    moved = impl.moved(given(adamw, common, state), layout)
    assert_same((run(REF, adamw, common, state), apply(impl, adamw, moved)))
    for name in ("param", "exp_avg", "exp_avg_sq"):
        view = moved[name]
        if view._base is not None and layout in ("sliced", "strided", "offset"):
            whole = view._base.clone()
            whole.as_strided(view.shape, view.stride(), view.storage_offset()).fill_(torch.nan)
            assert whole.isnan().all()


def test_each_tensor_may_have_its_own_layout(impl):
    common, state = inputs("bf16 master", (4, 6, 40))
    layouts = iter(["transposed", "strided", "sliced", "offset", "transposed", "strided"])
    moved = impl.moved(given(adamw, common, state))
    moved = {k: in_layout(v, next(layouts)) if isinstance(v, torch.Tensor) else v for k, v in moved.items()}
    assert_same((run(REF, adamw, common, state), apply(impl, adamw, moved)))


def test_expanded_gradient(impl):
    common, state = inputs("fp32", (4, 5, 70))
    expected = run(REF, sgd, common | {"grad": torch.full((4, 5, 70), 0.3)}, state)
    moved = impl.moved(given(sgd, common, state))
    moved["grad"] = torch.tensor(0.3, device=impl.device).expand(4, 5, 70)
    assert_same((expected, apply(impl, sgd, moved)))


@pytest.mark.parametrize("nesterov", [False, True])
def test_first_step_ignores_the_momentum_buffer_but_keeps_its_masked_bits(nesterov, impl):
    common, _ = inputs("bf16 fp32 state", (4, 70))
    common["step"], buffer = 1, torch.full((4, 70), torch.nan)
    actual = check(impl, sgd, common, (buffer,), momentum=0.9, nesterov=nesterov)
    kept = unpack_bits(common["mask"], 70)
    assert same_bits(actual[1][~kept], buffer[~kept])


@cover(indirect=["impl"], impl=IMPLS, dtype=(BF16, F32))
def test_a_buffer_without_momentum_is_left_alone_but_chooses_the_arithmetic(dtype, impl):
    common, state = inputs("bf16", (4, 70))
    common["momentum_buffer"] = randn(4, 70, dtype=dtype)
    actual = check(impl, sgd, common, state, weight_decay=0.1)
    assert same_bits(actual[1], common["momentum_buffer"])


@cover(indirect=["impl"], impl=IMPLS, numerics=(*FEW_NUMERICS, "fp16"), rule=(0, 1))
def test_masked_elements_keep_every_bit(numerics, rule, impl):
    function, options = BOTH[rule]
    common, state = inputs(numerics, (8, 70), keep=0.3)
    kept = unpack_bits(common["mask"], 70)
    param, before = common["param"], randn(8, 70, dtype=common["param"].dtype)
    payloads = torch.tensor([0x7FA1, 0x0001, -0x8000, 0x7F81], dtype=torch.int16)
    payloads = payloads if param.element_size() == 2 else payloads.int() << 16 | 0x2345
    param.copy_(before)
    count = int((~kept).sum())
    param[~kept] = payloads.view(param.dtype).repeat(count)[:count]
    common["grad"] = randn(8, 70, seed=9)
    for tensor in (common["grad"], *state):
        tensor[~kept] = torch.nan
    actual = check(impl, function, common, state, **options)
    for new, old in zip(actual, (param, *state[: len(actual) - 2], common["master"]), strict=True):
        if new is not None:
            assert torch.equal(bits(new)[~kept], bits(old)[~kept])
            assert new[kept].isfinite().all() and not (bits(new) == bits(old))[kept].all()


def test_stochastic_rounding_uses_the_bits_of_the_whole_parameter(impl):
    param, grad, slices = randn(4, 33, dtype=BF16), randn(2, 33, seed=1), torch.tensor([3, 1])
    key = {"step": 5, "seed": 11, "parameter_id": 2}
    common = {"param": param, "grad": grad, "mask": None, "master": None, "slices": slices, "lr": 0.01} | key
    new = run(impl, sgd, common, (None,), rounding="stochastic")
    exact = torch.add(param[slices].float(), grad, alpha=-0.01)
    index = torch.arange(4 * 33).view(4, 33)[slices]
    assert same_bits(new[0][slices], round_stochastic(exact, philox(index, 5, 11, 2)))
    assert same_bits(new[0][[0, 2]], param[[0, 2]])


@cover(indirect=["impl"], impl=IMPLS, slices=(None, [3, 0]), rule=(0, 1))
def test_many_steps_stay_on_the_bits_of_the_reference(slices, rule, impl):
    """Steps, seeds and parameters of more than 32 bits, and negative ones."""
    function, options = BOTH[rule]
    common, state = inputs("bf16 fp32 state stochastic", (4, 70), slices=slices)
    common |= {"seed": -3, "parameter_id": 1 << 33}
    ours, theirs = (where.moved(given(function, common, state, **options)) for where in (impl, REF))
    for step in (1, 2, 3, 2**33):
        new = {"step": step, "grad": randn(*common["grad"].shape, seed=step % 1000, dtype=BF16)}
        expected = apply(REF, function, theirs | new)
        assert_same((expected, apply(impl, function, ours | impl.moved(new))))


@pytest.mark.slow
def test_compiles_as_one_graph_and_runs_agree(impl):
    def update(param, grad, m, v, mask, slices):
        stochastic = Update(step=2, rounding="stochastic")
        masked_adamw_(param, grad, m, v, mask, AdamW(lr=0.1), stochastic, slices=slices, impl=impl.name)
        masked_sgd_(param, grad, None, mask, SGD(lr=0.1), Update(step=2), slices=slices, impl=impl.name)
        return param * 2

    def arguments():
        m, v = moments((2, 40), F32)
        mask, slices = pack_bits(random_mask(2, 40)), torch.tensor([3, 0])
        return impl.moved([randn(4, 40, dtype=BF16), randn(2, 40), m, v, mask, slices])

    runs = [arguments() for _ in range(3)]
    results = [update(*runs[0]), update(*runs[1])]
    results.append(torch.compile(update, fullgraph=True, backend="aot_eager")(*runs[2]))
    for result, left in zip(results, runs, strict=True):
        assert same_bits(result, results[0])
        assert all(torch.equal(a, b) for a, b in zip(left, runs[0], strict=True))


# ---- The op and its reference ------------------------------------------------------------------------------


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


def test_bad_sgd_options():
    param = torch.ones(2, 3)
    with pytest.raises(ValueError, match="needs a momentum_buffer"):
        masked_sgd_(param, param, None, None, SGD(lr=0.1, momentum=0.9), Update(step=1))
    with pytest.raises(ValueError, match="nesterov needs momentum"):
        masked_sgd_(param, param, None, None, SGD(lr=0.1, nesterov=True), Update(step=1))
    with pytest.raises(RuntimeError, match="no implementation cuda"):
        masked_sgd_(param, param, None, None, SGD(lr=0.1), Update(step=1), impl="cuda")
