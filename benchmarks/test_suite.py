"""Run the ops' cases under pytest-benchmark: a group for each op and shape, a row for each contender.

    OMP_NUM_THREADS=1 pytest benchmarks --benchmark-only                          all but cases that take minutes
    pytest benchmarks --benchmark-only -k route --benchmark-autosave              then change something, and
    pytest benchmarks --benchmark-only -k route --benchmark-compare               compare with the saved run

Here contenders run one after the other, so a drifting machine counts as a difference; `benchmarks.suite` lets
them take turns and gives intervals. A missing contender is skipped with the reason.
"""

import functools
import time

import pytest
import torch

from benchmarks import harness, suite
from benchmarks.harness import OURS, Case, Work

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LONGEST = 30.0
CASES = [case for case in suite.cases(DEVICE) if case.op != "step" and case.seconds < LONGEST]


@functools.lru_cache(maxsize=1)
def built(case: Case) -> Work:
    harness.collect(DEVICE)
    return harness.built(case)


@pytest.mark.parametrize(
    "case,name", [pytest.param(case, name, id=f"{case.title} | {name}") for case in CASES for name in case.names]
)
# processor time excludes other work on a shared machine; with more threads it would be their sum
@pytest.mark.benchmark(
    timer=time.thread_time if DEVICE == "cpu" and torch.get_num_threads() == 1 else time.perf_counter,
    min_rounds=5,
    max_time=0.5,
    warmup=False,
)
def test_op(benchmark, case, name):
    work = built(case)
    if name in work.missing:
        pytest.skip(f"{name}: {work.missing[name]}")
    function = work.contenders[name]
    try:
        function()
    except Exception as error:
        if name == OURS:
            raise
        pytest.skip(f"{name} failed: {harness.brief(error)}")
    benchmark.group = case.title
    benchmark.extra_info.update(case.facts, device=DEVICE, flops=work.flops, bytes=work.bytes)
    benchmark(synchronized(function))


def synchronized(function):
    """Return the function; on a GPU it also waits for what it launched."""
    if DEVICE == "cpu":
        return function

    def run():
        function()
        torch.cuda.synchronize()

    return run
