"""Sums of two dtypes: the bits of `add_`, without a copy of one operand in the other's dtype."""

import pytest
import torch

from moe_unlearn.model.one_copy import BLOCK, add_up
from moe_unlearn.plan.memory import measured_peak

pytestmark = pytest.mark.quick


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_sum_has_the_bits_of_one_at_once_in_every_layout(dtype):
    generator = torch.Generator().manual_seed(0)
    start, values = torch.randn(6, 40, generator=generator), torch.randn(6, 40, generator=generator).to(dtype)
    for total, added in ((start, values), (start.t(), values.t()), (start, values.t().contiguous().t())):
        expected = total.clone().add_(added, alpha=0.3)
        ours = total.clone()
        assert add_up(ours, added, 0.3) is ours and torch.equal(ours, expected)
    every_third = start.flatten()[::3].clone()
    assert torch.equal(
        add_up(every_third.clone(), values.flatten()[::3]), every_third.clone().add_(values.flatten()[::3])
    )


def test_a_sum_of_two_dtypes_takes_the_memory_of_a_block(measurable_memory):
    total, values = torch.zeros(3, BLOCK), torch.ones(3, BLOCK, dtype=torch.bfloat16)
    with measured_peak("cpu") as measured:
        add_up(total, values, 2.0)
    assert measured.peak <= 4 * BLOCK and torch.equal(total, torch.full_like(total, 2.0))
