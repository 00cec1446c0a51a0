"""masked_update in C++: the bits of the reference for every instruction set and thread count."""

import sys

import pytest
import torch

from moe_unlearn import native
from tests.ops.masked_update.cases import (
    BF16,
    BOTH,
    F16,
    NUMERICS,
    RULES,
    adamw,
    check,
    check_conversions,
    inputs,
    run,
    sgd,
)
from tests.support.covers import cover
from tests.support.impls import CPU

pytestmark = pytest.mark.quick


@cover(
    indirect=["instruction_set"],
    rule=tuple(RULES),
    numerics=tuple(NUMERICS),
    instruction_set=native.INSTRUCTION_SETS,
)
def test_same_bits_as_ref(rule, numerics, instruction_set):
    function, options = RULES[rule]
    for slices in (None, [3, 0]):
        common, state = inputs(numerics, (4, 5, 70), slices=slices)
        check(CPU, function, common, state, **options)


def test_same_bits_for_any_number_of_threads(threads):
    check(CPU, adamw, *inputs("bf16 fp32 state stochastic", (16, 40, 70)))
    check(CPU, sgd, *inputs("bf16", (3000, 33)), momentum=0.5)


@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
def test_conversions_round_as_torch_does(dtype, instruction_set):
    check_conversions(CPU, dtype)


def test_a_slice_out_of_range_is_refused_by_the_kernel_too(monkeypatch):
    common, state = inputs("fp32", (4, 5, 70), slices=[0, 1])
    wrong = common | {"slices": torch.tensor([0, 9])}
    for function, options in BOTH:
        with pytest.raises(IndexError, match=r"slices must be in \[0, 4\); got 9"):
            run(CPU, function, wrong, state, **options)
    monkeypatch.setattr(sys.modules["moe_unlearn.ops.masked_update"], "check_indices", lambda *given: None)
    for function, options in BOTH:
        with pytest.raises(RuntimeError, match="slice 9 of 4"):
            run(CPU, function, wrong, state, **options)
