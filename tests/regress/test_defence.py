"""Every way to fool a measurement is flagged on a kernel that does it, and nothing is on an honest one."""

import time

import pytest
import torch

from moe_unlearn.regress import adversaries, defence, timing
from moe_unlearn.regress.defence import Ceilings, Finding, impossible, inspect, patched_timers

DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")),
]


@pytest.fixture(autouse=True)
def clocks():
    """A test that leaves a clock replaced would spoil the ones after it."""
    yield
    assert patched_timers() == []


@pytest.mark.parametrize("device", DEVICES)
def test_each_adversary_is_flagged_and_the_honest_kernel_is_not(device):
    proofs = {name: (kind, {finding.kind for finding in found}) for name, kind, found in defence.prove(device)}
    assert proofs.pop("honest") == ("", set())
    assert {kind for kind, _ in proofs.values()} == {
        "cached result",
        "mutated input",
        "aliased output",
        "side-stream work",
        "patched timer",
        "impossible speed",
    }
    assert {name: found for name, (kind, found) in proofs.items() if kind not in found} == {}


def test_work_elsewhere_is_seen_on_a_machine_that_gives_little_time(monkeypatch):
    """A clock ten times as fast stands for a process that gets a tenth of a processor."""
    real = time.perf_counter
    monkeypatch.setattr(defence, "perf_counter", lambda: 10 * real())
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert [f.kind for f in inspect(adversaries.works_elsewhere, adversaries.inputs)] == ["side-stream work"]
        assert inspect(adversaries.honest, adversaries.inputs) == []
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("name", ["writes_its_input", "returns_its_input", "patches_the_timer"])
def test_a_finding_says_what_and_where(name):
    expected = {
        "writes_its_input": Finding("mutated input", "the call changes x"),
        "returns_its_input": Finding("aliased output", "the output lies in the memory of x"),
        "patches_the_timer": Finding("patched timer", "time.perf_counter was replaced"),
    }[name]
    kernel = adversaries.kernels()[name][1]
    assert inspect(kernel, adversaries.inputs) == [expected]
    assert time.perf_counter() > 0


def test_structured_inputs_and_outputs():
    def inputs(seed):
        generator = torch.Generator().manual_seed(seed)
        return {"parts": [torch.randn(8, generator=generator) for _ in range(3)], "power": 2}

    def honest(parts, power):
        return {"powers": tuple(part**power for part in parts)}

    def writes(parts, power):
        parts[1].mul_(2)
        return honest(parts, power)

    def aliases(parts, power):
        return {"powers": (parts[0] ** power, parts[1].view(2, 4))}

    assert inspect(honest, inputs) == []
    assert inspect(writes, inputs) == [Finding("mutated input", "the call changes parts.1")]
    assert inspect(aliases, inputs) == [Finding("aliased output", "output powers.1 lies in the memory of parts.1")]


def test_outputs_that_do_not_depend_on_the_values_are_told_apart_by_the_inputs():
    """Equal inputs for every seed prove nothing about a cache."""
    assert inspect(lambda x: x + 1, lambda seed: {"x": torch.ones(4)}) == []
    assert inspect(lambda x: torch.ones(3), lambda seed: {"x": torch.full((4,), float(seed))}) == [
        Finding("cached result", "other inputs give the same results")
    ]


def test_autograd_inputs_and_sizes_that_follow_from_the_seed():
    def inputs(seed):
        return {"x": torch.randn(4 + seed, generator=torch.Generator().manual_seed(seed)).requires_grad_()}

    assert inspect(lambda x: x.exp(), inputs) == []


def test_ceilings():
    ceilings = Ceilings(flops=1e12, bandwidth=1e10)
    assert impossible([1.0] * 5, flops=1e12, moved=1e10, ceilings=ceilings) == []
    (found,) = impossible([0.5] * 5, flops=1e12, ceilings=ceilings)
    assert str(found) == "impossible speed: 2e+12 FLOP/s, but this machine reached 1e+12"
    (found,) = impossible([0.1] * 5, moved=1e10, ceilings=ceilings)
    assert "1e+11 byte/s" in found.message


def test_ten_times_is_the_limit():
    assert impossible([1.0] * 5, [9.9] * 5) == []
    assert impossible([1.0] * 5, [10.1] * 5) == [Finding("impossible speed", "10.1 times as fast as its rival")]


def test_measuring_reads_the_clock_it_imported(monkeypatch):
    monkeypatch.setattr(time, "perf_counter", lambda: 0.0)
    monkeypatch.setattr(time, "thread_time", lambda: 0.0)
    assert min(timing.measure({"a": lambda: sum(range(1000))}, rounds=3, warm_up=0.01)["a"]) > 0
    monkeypatch.undo()


def test_a_kernels_errors_pass_through():
    def broken(x):
        raise RuntimeError("out of luck")

    with pytest.raises(RuntimeError, match="out of luck"):
        inspect(broken, adversaries.inputs)
