"""Rounds that take turns, ratios with their interval, and verdicts that need a shown change."""

import itertools
import statistics

import numpy as np
import pytest
import torch

from moe_unlearn.regress import timing
from moe_unlearn.regress.timing import Comparison, Interval, decide, measure, ratio, rotate, verdict


class Clock:
    """Time passes only by what the contenders cost, plus a drift with every reading."""

    def __init__(self, drift: float = 0.0):
        self.now, self.drift, self.calls = 0.0, drift, []

    def __call__(self) -> float:
        return self.now

    def contender(self, name: str, seconds: float):
        def call():
            self.calls.append(name)
            self.now += seconds * (1 + self.drift * len(self.calls))

        return call


@pytest.mark.quick
def test_rounds_alternate_their_order_and_count_every_call():
    clock = Clock()
    contenders = {"a": clock.contender("a", 1.0), "b": clock.contender("b", 2.0)}
    seconds = measure(contenders, rounds=4, warm_up=0, clock=clock)
    assert seconds == {"a": [1.0] * 4, "b": [2.0] * 4}
    assert "".join(clock.calls) == "ab" + "ab" + "ba" + "ab" + "ba"


@pytest.mark.quick
@pytest.mark.parametrize(("repeats", "order"), [(2, "abba" + "baab"), (3, "abbaab" + "baabba")])
def test_the_fastest_reading_of_a_round_counts(repeats, order):
    clock = Clock()
    costs = {name: itertools.cycle([5.0, 1.0, 3.0]) for name in "ab"}
    contenders = {name: (lambda name=name: clock.contender(name, next(costs[name]))()) for name in "ab"}
    seconds = measure(contenders, rounds=2, repeats=repeats, warm_up=0, clock=clock)
    assert "".join(clock.calls) == "ab" + order
    if repeats == 3:
        assert seconds == {"a": [1.0, 1.0], "b": [1.0, 1.0]}


@pytest.mark.quick
def test_drift_cancels():
    clock = Clock(drift=0.02)
    seconds = measure({n: clock.contender(n, 1.0) for n in "ab"}, rounds=40, warm_up=0, clock=clock)
    assert seconds["a"][-1] > 2 * seconds["a"][0]
    assert ratio(seconds["a"], seconds["b"]).value == pytest.approx(1, abs=2e-3)
    assert verdict(seconds["a"], seconds["b"]) == "same"


@pytest.mark.quick
def test_short_contenders_are_called_in_batches():
    clock = Clock()
    seconds = measure({"a": clock.contender("a", 1e-4)}, rounds=5, warm_up=0, shortest=1e-2, clock=clock)
    assert seconds["a"] == pytest.approx([1e-4] * 5)
    assert len(clock.calls) == 1 + 5 * 100


@pytest.mark.quick
def test_contenders_about_as_fast_take_the_same_number_of_calls():
    assert timing.common({"a": 10, "b": 40, "c": 9}) == {"a": 40, "b": 40, "c": 9}


@pytest.mark.quick
def test_a_contender_below_the_clocks_resolution():
    ticks = itertools.count()
    coarse = measure({"a": lambda: next(ticks)}, rounds=5, warm_up=0, clock=lambda: next(ticks) // 1000 * 1e-3)
    assert min(coarse["a"]) > 0


def test_warm_up_is_by_time():
    start = timing.perf_counter()
    measure({"a": lambda: None, "b": lambda: None}, rounds=1, warm_up=0.1)
    assert 0.2 <= timing.perf_counter() - start < 2


@pytest.mark.quick
def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="one contender, one round and one repeat; got 0, 7 and 1"):
        measure({})
    with pytest.raises(ValueError, match="same number of rounds, at least 1; got 2 and 3"):
        ratio([1, 1], [1, 1, 1])
    with pytest.raises(ValueError, match="positive seconds; got 0"):
        ratio([1, 1], [1, 0])
    with pytest.raises(ValueError, match="at least 5 rounds; got 4"):
        verdict([1.0] * 4, [2.0] * 4)
    with pytest.raises(ValueError, match="at least 5 rounds; got 3"):
        decide([(1.0, 1.0)] * 3)


@pytest.mark.parametrize("n", [5, 8, 9, 31, 32])
@pytest.mark.parametrize("confidence", [0.8, 0.95])
def test_the_interval_is_that_of_resampling(n, confidence):
    """The closed form against 20,000 resamples; of an even number the lower and the upper median bracket."""
    generator = np.random.default_rng(n)
    values = np.exp(generator.normal(size=n))
    found = ratio([1.0] * n, list(values), confidence=confidence)
    draws = np.sort(generator.choice(values, (20_000, n)), axis=1)
    tail = (1 - confidence) / 2
    low = np.quantile(draws[:, (n - 1) // 2], tail, method="inverted_cdf")
    high = np.quantile(draws[:, n // 2], 1 - tail, method="inverted_cdf")
    order = np.sort(values)
    assert found.value == pytest.approx(statistics.median(values))
    # resampling may miss the order statistic by one place where the probability is close to the tail
    assert abs(np.searchsorted(order, low) - np.searchsorted(order, found.low)) <= 1
    assert abs(np.searchsorted(order, high) - np.searchsorted(order, found.high)) <= 1


@pytest.mark.quick
@pytest.mark.parametrize(
    ("factor", "noise", "expected"),
    [
        (1.1, 0.01, "slower"),
        (0.9, 0.01, "faster"),
        (1.03, 0.001, "same"),  # shown, and too small to matter
        (1.0, 0.3, "same"),
        (1.0, 0.0, "same"),
    ],
)
def test_a_verdict_needs_an_interval_without_one_and_more_than_the_threshold(factor, noise, expected):
    base = 1 + noise * np.random.default_rng(0).random(21)
    head = factor * (1 + noise * np.random.default_rng(1).random(21))
    assert verdict(list(base), list(head)) == expected


@pytest.mark.quick
def test_wide_noise_is_not_a_slow_down():
    head = [0.7, 0.8, 0.9, 1.2, 1.3, 1.4, 1.5]
    assert statistics.median(head) > 1.05
    assert verdict([1.0] * 7, head) == "same"


@pytest.mark.quick
def test_decide_takes_rounds_until_they_answer():
    assert decide(itertools.repeat((1.0, 1.3))) == Comparison("slower", Interval(1.3, 1.3, 1.3), 8)
    assert decide(itertools.repeat((1.3, 1.0))).verdict == "faster"
    quiet, noisy = (decide(_noise(scale, 1.0)) for scale in (0.01, 0.05))
    assert (quiet.verdict, quiet.rounds, quiet.reason) == ("same", 8, "")
    assert (noisy.verdict, noisy.reason) == ("same", "") and noisy.rounds > 8
    lost = decide(_noise(1.0, 1.0))
    assert (lost.verdict, lost.rounds) == ("same", timing.LOOKS[-1])
    assert "noisy: the interval spans" in lost.reason


@pytest.mark.quick
def test_decide_uses_what_came_when_rounds_run_out():
    found = decide([(1.0, 1.2)] * 6)
    assert (found.verdict, found.rounds) == ("slower", 6)


@pytest.mark.quick
def test_no_speed_without_right_results_or_across_devices():
    def untouched():
        raise AssertionError("measured although no verdict was possible")
        yield

    red = decide(untouched(), numerics=False)
    assert (red.verdict, red.ratio) == ("suppressed", None)
    prints = {"gpu": "A", "driver": "1"}, {"gpu": "B", "driver": "1"}
    refused = decide(untouched(), fingerprints=prints)
    assert refused.verdict == "refused" and refused.reason.endswith(": gpu: A -> B")
    assert "gpu: A -> B" in str(refused)


def test_looking_often_keeps_the_error_rate():
    """Gaussian rounds at the threshold of detection: at most 1 % of 2,000 comparisons of equals differ."""
    alarms = sum(decide(_noise(0.15, 1.0, seed)).verdict != "same" for seed in range(2000))
    assert alarms <= 20


def test_rotating_buffers_come_in_turn():
    seen = []
    call = rotate(lambda x: seen.append(int(x)), lambda i: {"x": torch.tensor(i)}, copies=3)
    for _ in range(7):
        call()
    assert seen == [0, 1, 2, 0, 1, 2, 0]


def test_buffers_exceed_the_cache():
    made = []
    rotate(lambda x: None, lambda i: made.append(i) or {"x": torch.empty(timing.cache_bytes("cpu") // 4)})
    assert made == [0, 1]
    made.clear()
    rotate(lambda x: None, lambda i: made.append(i) or {"x": torch.empty(1)})
    assert len(made) == 64


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_events_time_the_gpu():
    x = torch.randn(4096, 4096, device="cuda")
    seconds = measure({"one": lambda: x @ x, "two": lambda: (x @ x, x @ x)}, device="cuda")
    assert 1.8 < ratio(seconds["one"], seconds["two"]).value < 2.2


def _noise(scale: float, factor: float, seed: int = 0):
    generator = np.random.default_rng(seed)
    while True:
        base, head = np.exp(scale * generator.normal(size=2))
        yield float(base), float(factor * head)
