"""An exception on one of two ranks leaves the step clean or marked on both, and neither waits for ever.

The rank that raises ends, as a process does that nobody has told to go on; the other learns so where it waits for it.
"""

import json
import time

import pytest
import torch
from torch import distributed

from moe_unlearn.step import UnlearnStep
from tests.support.forked_ranks import found_on, run_forked
from tests.support.interrupted import Injector, differing, state_of
from tests.support.models import tiny_olmoe
from tests.support.sharded_child import batches_of, shard
from tests.support.steps import VOCAB, data, recipe

pytestmark = pytest.mark.slow
CASES = {
    "npo": ("npo", "optimizer.name=adamw"),
    "mollm": ("mollm", "mollm.kl_floor=0", "mollm.gradients=compact", "optimizer.name=sgd"),
}


def start(case, injector):
    """The step of a rank over a model of one layer, after its first update."""
    torch.manual_seed(0)
    model = shard(tiny_olmoe(VOCAB, num_hidden_layers=1).eval())
    step = UnlearnStep(model, recipe(*CASES[case]), process_group=distributed.group.WORLD)
    step.prepare(*data())
    step(*batches_of(0, distributed.get_rank(), 2))
    injector.begin()
    return step


@pytest.fixture
def injector(monkeypatch):
    """What counts the calls of this process and of its forks, by the references."""
    monkeypatch.setenv("MOE_UNLEARN_IMPL", "ref")
    return Injector(monkeypatch)


def calls_of(case, injector, folder):
    """The names of the calls of ops and of hooks in the second step of the second rank."""

    def act(rank):
        step = start(case, injector)
        step(*batches_of(1, rank, 2))
        return injector.calls

    return found_on(2, folder, act)[1]


def check(case, at, injector, folder):
    """Raise at one call of the second rank; return how many of both ranks were marked."""
    folder.mkdir()

    def act(rank):
        step = start(case, injector)
        before, raised = state_of(step), "nothing"
        injector.begin(at if rank else None, (KeyboardInterrupt, torch.OutOfMemoryError)[at % 2])
        try:
            step(*batches_of(1, rank, 2))
        except BaseException as error:
            raised = type(error).__name__
        injector.begin()
        found = {
            "raised": raised,
            "marked": step.gradients.under_way,
            "changed": sorted(differing(before, state_of(step))),
            "steps": step.steps,
        }
        (folder / f"found{rank}.json").write_text(json.dumps(found), encoding="utf-8")
        assert raised == "nothing"

    began = time.monotonic()
    run_forked(2, folder, act)
    assert time.monotonic() - began < 60  # a group waits five minutes
    other, own = (json.loads((folder / f"found{rank}.json").read_text(encoding="utf-8")) for rank in range(2))
    assert own["raised"] in ("KeyboardInterrupt", "OutOfMemoryError")
    for found in (other, own):
        if found["marked"]:
            assert {*found["changed"]} <= {"weights", "optimizer"}, found
        elif found["raised"] != "nothing":
            assert not found["changed"], found
        else:  # nothing was left to wait for
            assert found is other and found["steps"] == 2, found
    return own["marked"] + other["marked"]


def test_an_exception_at_some_calls_of_one_rank(injector, tmp_path):
    calls = calls_of("npo", injector, tmp_path / "calls")
    assert "hook" in calls
    backward = calls.index("expert_mlp.backward")
    second = [at for at, name in enumerate(calls) if name.startswith("masked_update")][1]
    marked = [check("npo", at, injector, tmp_path / f"{at}") for at in (backward, second)]
    assert marked[0] == 0 < marked[1]


@pytest.mark.nightly
@pytest.mark.parametrize("case", CASES)
def test_an_exception_at_any_call_of_one_rank(case, injector, tmp_path):
    calls = calls_of(case, injector, tmp_path / "calls")
    marked = sum(check(case, at, injector, tmp_path / f"{at}") for at in range(len(calls)))
    assert marked >= sum(name.startswith("masked_update") for name in calls)
