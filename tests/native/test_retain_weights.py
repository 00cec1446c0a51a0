"""retain_weights in C++: as exact with every instruction set, and the same bits for any number of threads."""

import math

import pytest
import torch

from moe_unlearn import native
from tests.ops.retain_weights.cases import assert_same, check, passes, run
from tests.support.covers import cover
from tests.support.impls import CPU

pytestmark = pytest.mark.quick


@cover(
    indirect=["instruction_set"],
    cap=(math.inf, 1.1),
    num_tokens=(0, 1, 40, 9001),
    size=(0, 1, 31, 32, 33, 70),
    instruction_set=native.INSTRUCTION_SETS,
)
def test_against_the_formulas(size, num_tokens, cap, instruction_set):
    check(CPU, passes(num_tokens, size), cap=cap)


def test_same_bits_for_any_number_of_threads(threads):
    made = passes(20000, 37)
    got = run(CPU, made, cap=2.0)
    torch.set_num_threads(1)
    assert_same(run(CPU, made, cap=2.0), got)
