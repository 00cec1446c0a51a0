"""The benchmark harness: rows of contenders that work, fail or are missing, and figures that are what they say."""

import itertools

import pytest
import torch

from benchmarks import harness
from benchmarks.harness import OURS, Case, Work

CEILINGS = {"flops": {"bfloat16": 4e9, "float32": 1e9}, "bytes": 1e9}


def case(contenders, missing=None, names=None, **options):
    names = names or (*contenders, *(missing or ()))
    return Case("op", "toy", tuple(names), lambda: Work(contenders, missing or {}, **options))


def work():
    return lambda: None


def test_a_row_has_times_reasons_and_verdicts():
    def broken():
        raise ValueError("no such shape\nand more")

    row = harness.run(
        case(
            {OURS: work(), "slow": work(), "broken": broken},
            {"absent": "not installed (absent)"},
            targets={"slow": 1e-9},
            flops=1e6,
            bytes=1e3,
            rounds=3,
        ),
        "cpu",
        CEILINGS,
    )
    assert row["milliseconds"].keys() == {OURS, "slow"} == row["teraflops"].keys()
    assert row["missing"] == {"absent": "not installed (absent)", "broken": "failed: ValueError: no such shape"}
    (found,) = row["verdicts"]
    assert found["what"] == "times as fast as slow" and found["hit"] and found["low"] <= found["value"] <= found["high"]


def test_ours_that_fails_is_an_error_and_nothing_else():
    def broken():
        raise RuntimeError("bad kernel")

    row = harness.run(case({OURS: broken, "slow": work()}), "cpu", CEILINGS)
    assert row["error"] == "failed: RuntimeError: bad kernel" and "milliseconds" not in row


def test_a_contender_that_is_neither_there_nor_missing_is_an_error():
    with pytest.raises(AssertionError, match="forgotten"):
        harness.run(case({OURS: work()}, names=(OURS, "forgotten")), "cpu", CEILINGS)


@pytest.mark.quick
def test_figures_are_those_of_the_medians():
    seconds = {OURS: [1.0, 2.0, 9.0], "rival": [4.0, 4.0, 4.0]}
    own = Work({}, targets={"rival": 3.0}, flops=4e9, bytes=1e9, dtype=torch.bfloat16, teraflops_target=1e-3)
    found = harness.figures(seconds, own, CEILINGS)
    assert found["milliseconds"] == {OURS: 2000.0, "rival": 4000.0}
    assert found["teraflops"] == {OURS: 0.002, "rival": 0.001}
    # both ceilings ask for one second
    assert found["roofline"] == {OURS: 0.5, "rival": 0.25}
    verdicts = harness.verdicts(seconds, own, {OURS: 2.0, "rival": 8.0})
    assert [(v["what"], v["value"], v["target"], v["hit"]) for v in verdicts] == [
        ("times as fast as rival", 2.0, 3.0, False),
        ("TFLOP/s", 0.002, 0.001, True),
        ("extra memory of that of rival", 0.25, None, None),
    ]


@pytest.mark.quick
def test_compare_calls_each_once_to_warm_up_and_once_a_round():
    calls, ticks = {OURS: 0, "rival": 0}, itertools.count()

    def called(name):
        def function():
            calls[name] += 1

        return function

    result = harness.compare("n", {k: called(k) for k in calls}, rounds=5, target=1, clock=lambda: next(ticks) * 1e-3)
    assert calls == {OURS: 6, "rival": 6}
    assert result["ratios"] == {"rival": 1.0} and result["reached"]


def test_extra_memory_is_what_a_call_adds_at_its_peak():
    held = torch.ones(8 << 20)  # 32 MiB that stand before
    extra = harness.peak_memory(lambda: torch.ones(16 << 20).sum() + held[0], "cpu")
    assert extra is None or 60 <= extra / harness.MIB <= 80


def test_ceilings_are_of_the_run():
    found = harness.measure_ceilings("cpu", 128)
    assert found["bytes"] > 1e8 and found["flops"].keys() == {"bfloat16", "float32"}
