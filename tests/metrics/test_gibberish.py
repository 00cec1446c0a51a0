"""Gibberish is told from text, on generations whose repetition and likelihood are known."""

import pytest

from moe_unlearn.metrics import gibberish_rate, repetition

pytestmark = pytest.mark.quick


def test_repetition_is_one_minus_distinct_runs():
    assert repetition([1, 2, 3, 4, 5]) == 0 and repetition([1, 2]) == 0 and repetition([]) == 0
    assert repetition([7] * 10) == pytest.approx(1 - 1 / 8)
    assert repetition([1, 2, 3, 1, 2, 3, 1]) == pytest.approx(1 - 3 / 5)


def test_out_of_the_range_of_the_typical_ones(oracle, examples):
    judge = oracle()  # likes the three texts and nothing else
    prompts = [e.input_ids[:4] for e in examples]
    typical = [e.input_ids[4:20] for e in examples]
    calm = gibberish_rate(judge, prompts, typical, typical)
    assert (calm.rate, calm.repetitive, calm.unlikely, calm.empty) == (0, 0, 0, 0)
    odd = [typical[0][:8], [9] * 16, []]
    found = gibberish_rate(judge, prompts, odd, typical)
    assert found.rate == pytest.approx(1 / 3) and found.repetitive == found.unlikely == pytest.approx(1 / 3)
    assert found.empty == pytest.approx(1 / 3)
    # not repetitive, but tokens the judge has never seen in a row
    found = gibberish_rate(judge, prompts, [typical[1], list(range(20, 36)), typical[2]], typical)
    assert (found.rate, found.repetitive, found.unlikely) == pytest.approx((1 / 3, 0, 1 / 3))


def test_a_lower_quantile_is_stricter(oracle, examples):
    prompts = [e.input_ids[:4] for e in examples]
    typical = [e.input_ids[4:20] for e in examples]
    broken = [typical[0], typical[1], [5] * 16]
    assert gibberish_rate(oracle(), prompts, typical, broken).rate == 0
    assert gibberish_rate(oracle(), prompts, broken, broken, quantile=0.5).rate == pytest.approx(1 / 3)


def test_what_cannot_be_compared(oracle, examples):
    prompts = [e.input_ids[:4] for e in examples]
    with pytest.raises(ValueError, match="equally many"):
        gibberish_rate(oracle(), prompts, [[1]], [[1]])
    with pytest.raises(ValueError, match="all are empty"):
        gibberish_rate(oracle(), prompts, [[1]] * 3, [[]] * 3)
    with pytest.raises(ValueError, match="quantile"):
        gibberish_rate(oracle(), prompts, [[1]] * 3, [[1]] * 3, quantile=0)
