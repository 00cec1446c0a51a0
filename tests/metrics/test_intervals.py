"""The interval of a mean over documents."""

import math

import pytest
import torch

from moe_unlearn.metrics.intervals import interval

pytestmark = pytest.mark.quick


def test_an_interval_covers_the_mean_as_often_as_it_says():
    draw = torch.Generator().manual_seed(0)
    covered = 0
    for values in torch.rand(200, 40, generator=draw, dtype=torch.float64):
        low, high = interval(values.tolist())
        covered += low <= 0.5 <= high
        assert high - low == pytest.approx(2 * 1.96 * values.std().item() / math.sqrt(40), rel=0.25)
    assert 0.88 <= covered / 200 <= 0.99


def test_it_stays_among_the_values_and_two_calls_agree():
    assert interval([1.0, 1.0, 1.0]) == (1.0, 1.0)
    assert interval([0.0, None, 1.0]) == interval([0.0, 1.0]) == (0.0, 1.0)
    assert interval([0.3]) is None is interval([None, 0.2])


def test_a_document_counts_as_much_as_its_weight():
    low, high = interval([0.0, 1.0] * 50, [1.0, 3.0] * 50)
    assert low < 0.75 < high and high - low < 0.25
