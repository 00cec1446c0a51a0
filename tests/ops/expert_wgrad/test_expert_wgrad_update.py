"""The updates in the epilogue of expert_wgrad have, bit for bit, what masked_update makes of the same gradient."""

import sys

import pytest
import torch

from moe_unlearn.ops import SGD, AdamW, Update
from moe_unlearn.ops.bits import keep_where
from moe_unlearn.ops.expert_wgrad import expert_wgrad_adamw_, expert_wgrad_sgd_
from moe_unlearn.optim import MaskedAdamW
from moe_unlearn.testing import LAYOUTS
from tests.ops.expert_wgrad.cases import (
    BF16,
    DTYPES,
    EXPERTS,
    F32,
    INDEXED,
    NUMERICS,
    ODD,
    RULES,
    SHAPE,
    E,
    check_update,
    factors,
    keep,
    on_device,
    same_bits,
    scattered,
    spoiled,
    takes,
    words_of,
)
from tests.support.by_keyword import by_keyword
from tests.support.covers import cover
from tests.support.impls import REF, impls

# NaN and infinity are meant
pytestmark = [pytest.mark.quick, pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")]
IMPLS = impls("expert_wgrad")
FEW_RULES = ("sgd nesterov", "adamw decay")


@cover(
    takes,
    indirect=["impl"],
    impl=IMPLS,
    rule=tuple(RULES),
    numerics=tuple(NUMERICS),
    layout=("contiguous", "transposed"),
)
def test_every_rule_and_numerics(layout, numerics, rule, impl):
    check_update(impl, rule, numerics, layout=layout)


@pytest.mark.nightly
@cover(takes, full=True, indirect=["impl"], impl=IMPLS, numerics=tuple(NUMERICS), rule=FEW_RULES)
def test_every_numerics_with_momentum_and_with_moments(numerics, rule, impl):
    check_update(impl, rule, numerics, layout="transposed")


@cover(
    takes,
    indirect=["impl"],
    impl=IMPLS,
    rule=FEW_RULES,
    numerics=("bf16 stochastic", "bf16 master", "bf16 packed stochastic"),
    dtype=DTYPES,
    shape=(SHAPE, ODD),
    indexed=INDEXED,
    experts=(None, (3, 1), EXPERTS),
    mask=("random", None),
    layout=LAYOUTS,
)
def test_factors_experts_masks_and_layouts(layout, mask, experts, indexed, shape, dtype, numerics, rule, impl):
    made = scattered(factors(shape, dtype, "sentinels", exact=impl.kind == "triton"), indexed)
    made = spoiled(made, range(E) if experts is None else experts)
    check_update(impl, rule, numerics, made, experts=experts, mask=mask, layout=layout)


@pytest.mark.parametrize("impl", IMPLS[1:], indirect=True)
def test_steps_with_packed_state_store_no_gradient_and_have_one_result(impl, monkeypatch):
    """Two steps of an optimizer by factors of integers, whose sums have the same bits in any order."""
    monkeypatch.setattr(sys.modules["moe_unlearn.ops.expert_wgrad"], "_expert_wgrad", None)

    def trained(impl):
        monkeypatch.setenv("MOE_UNLEARN_IMPL", f"expert_wgrad={impl.name}")
        generator = torch.Generator().manual_seed(0)
        weight = torch.nn.Parameter(impl.moved(torch.randn(E, *SHAPE, generator=generator).to(BF16)))
        optimizer = MaskedAdamW([weight], lr=0.1, numerics="stochastic", state="int8")
        optimizer.set_masks([impl.moved(words_of(keep(E, *SHAPE)))])
        for seed in range(2):
            optimizer.step(gradients={weight: on_device(impl, factors(exact=True, seed=seed))})
        held = optimizer.state[weight]
        return [t.detach().cpu() for t in (weight, held["exp_avg"], held["exp_avg_sq"])]

    assert all(same_bits(a, b) for a, b in zip(trained(impl), trained(REF), strict=True))


@cover(indirect=["impl"], impl=IMPLS, word=(0, 1, -(2**31), "of one expert", "in the last row"))
def test_tiles_with_few_bits_or_none(word, impl):
    words = torch.zeros(3, 40, 3, dtype=torch.int32)
    if isinstance(word, int):
        words[:] = word
    else:
        words[1, -1 if word == "in the last row" else slice(None)] = -1
    check_update(impl, "adamw decay", "bf16 fp32 state", experts=(3, 1, 0), mask=words)


@cover(indirect=["impl"], impl=IMPLS, rule=FEW_RULES, masked=(True, False))
def test_a_condition_that_the_device_knows(masked, rule, impl):
    """The update as it is where the condition holds; where not, not a bit is written."""
    shape = (3, *SHAPE)
    for holds in (True, False):
        words = keep_where(torch.tensor(holds), words_of(keep(*shape)) if masked else None, shape)
        check_update(impl, rule, "bf16 fp32 state stochastic", mask=words)


def test_no_expert_and_no_row(impl):
    check_update(impl, "adamw decay", "bf16", experts=())
    check_update(impl, "adamw decay", "bf16", factors(tokens=0))


@pytest.mark.slow
def test_compiles_without_a_graph_break(impl):
    def updated(step):
        made = impl.moved(factors())
        weight = torch.ones(E, *SHAPE, dtype=BF16, device=impl.device)
        state = [torch.zeros_like(weight) for _ in range(2)]
        step(weight, *state, made)
        return weight, *state

    def step(weight, m, v, made):
        expert_wgrad_adamw_(weight, m, v, made, AdamW(lr=0.1), Update(step=1), impl=impl.name)
        expert_wgrad_sgd_(weight, m, made, SGD(lr=0.1, momentum=0.9), Update(step=2), impl=impl.name)

    compiled = updated(torch.compile(step, fullgraph=True, backend="aot_eager"))
    assert all(map(torch.equal, compiled, updated(step)))


def test_autograd_notices_an_update_of_a_weight_it_still_needs(impl):
    weight = torch.randn(E, *SHAPE, device=impl.device).requires_grad_()
    loss = (weight**2).sum()
    with torch.no_grad():
        expert_wgrad_sgd_(weight, None, impl.moved(factors()), SGD(lr=0.1), Update(step=1), impl=impl.name)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# a dtype stands for a tensor of it
BAD_UPDATES = (
    ({"step": 0}, ValueError, "step counts from 1; got 0"),
    ({"first_row": -1}, ValueError, "first_row counts from 0; got -1"),
    ({"rounding": "up"}, ValueError, "rounding must be one of"),
    ({"master": BF16}, TypeError, "master must be float32"),
)
BAD = {
    "sgd": (
        *BAD_UPDATES,
        ({"momentum_buffer": torch.float16}, TypeError, "momentum_buffer must be"),
        ({"momentum": 0.9}, ValueError, "needs a momentum_buffer"),
        ({"nesterov": True}, ValueError, "nesterov needs momentum"),
    ),
    "adamw": (*BAD_UPDATES, ({"exp_avg_sq": torch.float16}, TypeError, "exp_avg_sq must be")),
}
STATE = {"sgd": {"momentum_buffer": None}, "adamw": {"exp_avg": F32, "exp_avg_sq": F32}}


@cover(indirect=["impl"], impl=IMPLS, rule=tuple(BAD))
def test_bad_options(rule, impl):
    function = {"sgd": expert_wgrad_sgd_, "adamw": expert_wgrad_adamw_}[rule]
    for options, error, message in BAD[rule]:
        given = {"weight": F32, **STATE[rule], "lr": 1, "step": 1, **options}
        given = {k: torch.ones(E, *SHAPE, dtype=v) if isinstance(v, torch.dtype) else v for k, v in given.items()}
        with pytest.raises(error, match=message):
            by_keyword(function)(**impl.moved(given), factors=impl.moved(factors()), impl=impl.name)
