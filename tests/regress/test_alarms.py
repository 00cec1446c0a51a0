"""The rate of false alarms on this machine, and that it is measured."""

import math

import pytest

from moe_unlearn.regress import alarms


def test_correct_results_pass_on_this_machine():
    found = alarms.measure(600, seed=1)
    assert found.comparisons >= 600
    assert found.largest <= alarms.LARGEST and found.rate <= alarms.LIMIT, str(found)
    assert "false alarms at most" in str(found)


def test_without_the_spread_they_would_not(monkeypatch):
    """The criterion before it had one, with a reference whose products are exact."""
    real = alarms.margin
    monkeypatch.setattr(alarms, "margin", lambda actual, value, gold, rounded: real(actual, value, gold))
    found = alarms.measure(200, seed=1)
    assert found.largest > 2 and found.rate > 0.01


@pytest.mark.quick
def test_a_tail_of_exponential_values():
    """Quantiles of an exponential distribution: P(value > 1) = exp(-1 / mean)."""
    count, mean = 5000, 1 / 20
    values = [-mean * math.log((i + 0.5) / count) for i in range(count)]
    assert alarms.tail(values) == pytest.approx(math.exp(-1 / mean), rel=0.5)
    assert alarms.tail([0.5] * 100) == 0.0 and alarms.tail([2.0] * 100) == 1.0


@pytest.mark.quick
@pytest.mark.parametrize("depth", [32, 200])
def test_small_errors_are_found_whatever_the_yardstick(depth):
    found = [alarms.smallest_errors(depth, kind) for kind in ("native", "exact", "sequential")]
    for errors in found:
        assert errors["one element, now"] < 1e-5 and errors["all, now"] < 2e-6
        assert errors["one element, before"] < errors["one element, now"]
    assert len({round(math.log2(errors["one element, now"])) for errors in found}) == 1
