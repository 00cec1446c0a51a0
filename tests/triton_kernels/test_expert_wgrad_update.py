"""The SGD and AdamW epilogues give, bit for bit, what the reference's masked update makes of the same gradient.

Factors are small integers, so that the gradient is exact whatever the order of its sum. As in
test_masked_update.py the reference runs on the CPU.
"""

import pytest
import torch

from moe_unlearn.ops.bits import keep_where, unpack_bits
from moe_unlearn.ops.expert_wgrad import Factors, expert_wgrad_adamw_, expert_wgrad_ref, expert_wgrad_sgd_
from moe_unlearn.ops.masked_update import SGD, AdamW, Update
from moe_unlearn.testing import LAYOUTS, in_layout
from tests.ops.test_masked_update import adamw, randn, same_bits, sgd
from tests.support.by_keyword import by_keyword
from tests.triton_kernels.test_expert_wgrad import (  # noqa: F401  fixtures
    BF16,
    FP32,
    ODD,
    SIZES,
    arch,
    case,
    direct,
    small_tiles,
)
from tests.triton_kernels.test_masked_update import NUMERICS, RULES, assert_same, inputs

EXPERTS = [3, 2, 1]  # half_empty gives rows to 1 and 3
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")  # NaN and infinity are meant
STATE = {adamw: ("exp_avg", "exp_avg_sq"), sgd: ("momentum_buffer",)}


def prepared(numerics, rule, *, pattern="half_empty", sizes=SIZES, experts=EXPERTS, masked=True):
    """(function, factors, arguments of the update with the exact gradient). Of the listed experts, 2 has no rows."""
    function, options = RULES[rule]
    made = case("cpu", pattern, NUMERICS[numerics][0], exact=True, sizes=sizes)
    listed = None if experts is None else torch.tensor(experts)
    common, state = inputs(numerics, (4, sizes["M"], sizes["P"]), slices=experts, masked=masked)
    # a sum of negative zeros alone may keep its sign or not
    common["grad"] = expert_wgrad_ref(**made, experts=listed, out_dtype=FP32) + 0.0
    assert experts == [] or common["grad"].any()
    common |= options | dict(zip(STATE[function], state, strict=False))
    if function is sgd and "momentum" not in options:
        common["momentum_buffer"] = None
    return function, made, common


def epilogue(function, made, common, device, layout="contiguous"):
    """The new weight and state, as `function` returns them, by the epilogue on `device`."""
    names = ("param", *STATE[function], "master")
    tensors = {k: None if common[k] is None else in_layout(common[k].clone(), layout).to(device) for k in names}
    rest = {k: v for k, v in common.items() if k not in (*names, "grad", "mask", "slices")}
    experts, mask = (None if t is None else t.to(device) for t in (common["slices"], common["mask"]))
    weight, master, *state = (tensors[k] for k in ("param", "master", *STATE[function]))
    update = expert_wgrad_adamw_ if function is adamw else expert_wgrad_sgd_
    factors = Factors(**{k: v.to(device) for k, v in made.items()})
    by_keyword(update)(weight, *state, factors, experts=experts, mask=mask, master=master, impl="triton", **rest)
    return [None if tensors[k] is None else tensors[k].cpu() for k in names]


def check(function, made, common, device, **options):
    actual = epilogue(function, made, common, device, **options)
    assert_same((function(**common, impl="ref"), actual))
    return actual


def _numerics_and_rules():
    """Every numerics with both rules, every rule with what has two dtypes: test_masked_update.py has the product."""
    few = ("adamw decay", "sgd nesterov")
    for numerics in NUMERICS:
        for rule in RULES:
            if rule in few or numerics == "bf16 fp32 state stochastic":
                quick = rule in few and numerics in ("fp32", "bf16", "bf16 fp32 state stochastic", "bf16 master")
                yield pytest.param(numerics, rule, marks=[pytest.mark.quick] if quick else [])


@pytest.mark.parametrize("numerics, rule", list(_numerics_and_rules()))
@pytest.mark.slow
def test_every_rule_has_the_bits_of_the_reference(device, small_tiles, numerics, rule):  # noqa: F811
    check(*prepared(numerics, rule), device)


@pytest.mark.parametrize("rule", ["adamw default", "sgd momentum", "sgd plain"])
@pytest.mark.parametrize("sizes", [SIZES, ODD], ids=["aligned", "odd"])
def test_architectures_and_sizes(device, arch, sizes, rule):  # noqa: F811
    check(*prepared("bf16 stochastic", rule, sizes=sizes, pattern="skewed"), device)


@pytest.mark.quick
@pytest.mark.parametrize("rule", ["adamw decay", "sgd decay"])
@pytest.mark.slow
def test_contiguous_factors(device, arch, rule):  # noqa: F811
    function, made, common = prepared("bf16", rule, pattern="sentinels")
    made = direct(made)
    behind = int(made["expert_offsets"][-1])
    made["grad"][behind:] = made["input"][behind:] = torch.nan
    check(function, made, common, device)


@pytest.mark.parametrize("rule", ["adamw decay", "sgd momentum"])
def test_all_experts_without_a_mask(device, small_tiles, rule):  # noqa: F811
    check(*prepared("bf16 fp32 state", rule, experts=None, masked=False), device)


@pytest.mark.parametrize("layout", LAYOUTS[1:])
@pytest.mark.parametrize("rule", ["adamw decay", "sgd momentum"])
def test_layouts_of_weight_and_state(device, small_tiles, rule, layout):  # noqa: F811
    check(*prepared("bf16 master", rule), device, layout=layout)


@pytest.mark.parametrize("numerics", ["fp32", "bf16 stochastic", "bf16 master"])
@pytest.mark.parametrize("rule", ["adamw decay", "sgd nesterov"])
def test_shipped_tiles(device, numerics, rule):
    sizes = SIZES | {"M": 70, "P": 168}
    check(*prepared(numerics, rule, sizes=sizes, experts=[3]), device)


@pytest.mark.quick
@pytest.mark.parametrize("numerics", ["bf16 fp32 state", "bf16 master"])
@pytest.mark.parametrize("rule", ["adamw decay", "sgd momentum"])
@pytest.mark.slow(but=1)
def test_what_the_mask_keeps_out_stays_untouched(device, small_tiles, rule, numerics):  # noqa: F811
    """A tile without a bit, rows without a bit, words without a bit, words of one bit and of all, any bits."""
    function, made, common = prepared(numerics, rule, sizes=SIZES)
    common["mask"][0, :32, :2], common["mask"][2, 5], common["mask"][0, :, 1] = 0, 0, 0
    common["mask"][2, 6], common["mask"][2, 7, :2] = 1, -1
    common["param"][0, 3] = torch.nan  # expert 0 is not listed
    kept = unpack_bits(common["mask"], SIZES["P"])
    for name in STATE[function]:
        common[name][~kept] = torch.nan
    new = check(function, made, common, device)
    touched = torch.zeros(new[0].shape, dtype=torch.bool)
    touched[EXPERTS] = kept
    assert same_bits(new[0][~touched], common["param"][~touched])
    assert all(
        same_bits(state[~kept], common[name][~kept]) for name, state in zip(STATE[function], new[1:], strict=False)
    )
    assert not same_bits(new[0], common["param"])


@pytest.mark.quick
@pytest.mark.parametrize("word", [1, -(2**31)])
@pytest.mark.slow
def test_tiles_of_one_word_alone_are_not_skipped(device, small_tiles, word):  # noqa: F811
    function, made, common = prepared("bf16", "adamw decay")
    common["mask"][:] = word
    check(function, made, common, device)


@pytest.mark.quick
@pytest.mark.slow
def test_the_first_step_does_not_read_the_momentum_buffer(device, small_tiles):  # noqa: F811
    function, made, common = prepared("bf16 fp32 state", "sgd momentum")
    common |= {"step": 1, "momentum_buffer": torch.full_like(common["momentum_buffer"], torch.nan)}
    new = check(function, made, common, device)
    kept = unpack_bits(common["mask"], SIZES["P"])
    assert not new[1][kept].isnan().any() and new[1][~kept].isnan().all()


def test_a_buffer_without_momentum_is_left_alone_but_chooses_the_arithmetic(device, small_tiles):  # noqa: F811
    function, made, common = prepared("bf16", "sgd decay")
    common["param"].flatten()[33:35] = 0  # the interpreter does not round to bfloat16 denormals
    for dtype in (BF16, FP32):
        common["momentum_buffer"] = randn(len(EXPERTS), SIZES["M"], SIZES["P"], dtype=dtype)
        new = check(function, made, common, device)
        assert same_bits(new[1], common["momentum_buffer"])


def test_nothing_to_do(device, small_tiles):  # noqa: F811
    function, made, common = prepared("bf16", "adamw decay", experts=[])
    assert same_bits(check(function, made, common, device)[0], common["param"])


def test_compile(device, small_tiles):  # noqa: F811
    factors = Factors(**case(device, dtype=BF16, exact=True))
    weights = [randn(4, SIZES["M"], SIZES["P"], dtype=BF16).to(device) for _ in range(2)]
    states = [[torch.zeros_like(weights[0]) for _ in range(2)] for _ in weights]

    def step(weight, m, v):
        expert_wgrad_adamw_(weight, m, v, factors, AdamW(lr=0.1), Update(step=1), impl="triton")
        expert_wgrad_sgd_(weight, m, factors, SGD(lr=0.1, momentum=0.9), Update(step=2), impl="triton")

    torch.compile(step, fullgraph=True, backend="aot_eager")(weights[0], *states[0])
    step(weights[1], *states[1])
    assert torch.equal(*weights) and all(map(torch.equal, *states))


@pytest.mark.quick
@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("rule", ["adamw decay", "sgd nesterov"])
@pytest.mark.slow
def test_a_condition_that_the_device_knows(device, small_tiles, rule, masked):  # noqa: F811
    """The update as it is where the condition holds; where not, not a bit is written."""
    function, made, common = prepared("bf16 fp32 state stochastic", rule, masked=masked)
    shape = common["grad"].shape
    for holds in (True, False):
        kept = keep_where(torch.tensor(holds), common["mask"], shape)
        actual = check(function, made, common | {"mask": kept}, device)
        if holds:
            assert_same((epilogue(function, made, common, device), actual))
        else:
            names = ("param", *STATE[function], "master")
            assert all(same_bits(a, common[k]) for a, k in zip(actual, names, strict=True) if a is not None)
