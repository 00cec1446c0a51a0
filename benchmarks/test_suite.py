"""The ops' cases for pytest-benchmark: a group for each op and shape, a row for each contender.

    OMP_NUM_THREADS=1 pytest benchmarks --benchmark-only                          all but what takes minutes
    pytest benchmarks --benchmark-only -k route --benchmark-autosave              then change something, and
    pytest benchmarks --benchmark-only -k route --benchmark-compare               hold it against that

Here contenders run one after the other, so that a drifting machine counts as a difference; `benchmarks.suite` lets
them take turns and gives intervals. A contender that is not here is skipped, and the reason says why.
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
# processor time leaves out what others take from a shared machine; with more threads it would be their sum
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
    """The function, and on a GPU the wait for what it launched."""
    if DEVICE == "cpu":
        return function

    def run():
        function()
        torch.cuda.synchronize()

    return run
