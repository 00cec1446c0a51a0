"""What checks cost is measured with every check that a step and a save have, and without."""

import pytest
import torch

from benchmarks import bench_checks
from moe_unlearn.checkpoint import CheckpointError, verify


@pytest.fixture(scope="module")
def made():
    return bench_checks.step_of(2, 6)


def test_without_checks_a_step_takes_what_it_refuses(made):
    step, act = made
    forget, retain = ({"input_ids": torch.ones(1, 4, dtype=torch.long)} for _ in range(2))
    for batch in (forget, retain):
        batch |= {"labels": batch["input_ids"], "attention_mask": -torch.ones(1, 4)}
    with pytest.raises(ValueError, match="attention_mask must be 0"):
        step(forget, retain)
    with bench_checks.without(bench_checks.STEPS["none"]):
        step(forget, retain)
        act()


def test_ways_take_turns(made, tmp_path):
    step, act = made
    rows = [*bench_checks.in_turns(act, bench_checks.STEPS, 2)]
    assert [way for way, *_ in rows] == [*bench_checks.STEPS] and all(0 < own for _, own, _ in rows)
    bench_checks.save(step, tmp_path / "whole")
    verify(tmp_path / "whole")
    with bench_checks.without(bench_checks.SAVES["neither"]):
        bench_checks.save(step, tmp_path / "unchecked")
    with pytest.raises(CheckpointError):
        verify(tmp_path / "unchecked")
