"""Sums of float32 numbers against exact arithmetic: of every size, in every order, in parts."""

from fractions import Fraction

import pytest
import torch

from moe_unlearn.ops import exact_sums
from moe_unlearn.ops.exact_sums import exact, sums_by_exponent

pytestmark = pytest.mark.quick


def numbers():
    """Floats of every exponent, subnormal ones among them."""
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(0, 0x7F800000, (3000,), generator=generator, dtype=torch.int32)
    signs = torch.randint(0, 2, bits.shape, generator=generator) * 2 - 1
    extreme = torch.tensor([0.0, -0.0, 1e-45, torch.finfo(torch.float32).max, torch.finfo(torch.float32).tiny])
    return torch.cat([bits.view(torch.float32) * signs, extreme])


def test_sums_are_exact_in_every_order_and_in_parts(monkeypatch):
    values = numbers()
    expected = sum((Fraction(abs(v)) for v in values.tolist()), Fraction())
    assert exact(sums_by_exponent(values)) == expected
    monkeypatch.setattr(exact_sums, "BLOCK", 7)
    shuffled = values[torch.randperm(len(values), generator=torch.Generator().manual_seed(1))].view(5, -1)
    assert exact(sums_by_exponent(shuffled[:2]) + sums_by_exponent(shuffled[2:].T)) == expected
    assert exact(sums_by_exponent(torch.zeros(0))) == 0


def test_a_value_that_is_not_finite_makes_the_sum_infinite():
    assert exact(sums_by_exponent(torch.tensor([1.0, torch.inf]))) == float("inf")
    assert exact(sums_by_exponent(torch.tensor([1e300], dtype=torch.float64))) == float("inf")
