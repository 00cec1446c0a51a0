"""The ledger, the measurement beside it, and what is said of the kernels' own allocations."""

import gc

import pytest
import torch

from moe_unlearn.ops.expert_mlp import expert_mlp
from moe_unlearn.ops.gate import ExpertWeights
from moe_unlearn.ops.route import route
from moe_unlearn.plan.dry_run import Rehearsal
from moe_unlearn.plan.memory import Ledger, measured_peak
from tests.support.by_keyword import token_loss

pytestmark = [pytest.mark.quick, pytest.mark.usefixtures("measurable_memory")]
CPU = torch.device("cpu")


def floats(count):
    return torch.zeros(count)


@pytest.mark.slow
def test_the_peak_and_its_parts():
    ledger = Ledger(CPU)
    a, b = floats(100), floats(50)
    ledger.add(a, "weights")
    ledger.add(b, "activations")
    ledger.add(b.view(5, 10), "activations")  # the same storage
    ledger.pulse(8, "workspace")
    del b
    gc.collect()
    c = floats(10)
    ledger.add(c, "activations")
    ledger.label([c, a], "gradients")  # weights have their name already
    assert ledger.peak() == {"weights": 400, "activations": 200, "workspace": 8}
    assert ledger.largest() == {"weights": 400, "activations": 200, "workspace": 8, "gradients": 40}
    ledger.hold(1000, "mask")
    assert ledger.peak() == {"weights": 400, "gradients": 40, "mask": 1000}


def test_what_is_held_resized_and_left_out():
    ledger = Ledger(CPU)
    tensor, apart = floats(100), floats(10)
    ledger.leave_out(apart)
    ledger.add(tensor, "weights")
    ledger.add(apart, "weights")
    key = ledger.hold(1000, "gathered")
    ledger.resize(tensor, 40)
    ledger.let_go(key)
    ledger.pulse(500, "workspace")
    assert ledger.peak() == {"weights": 400, "gathered": 1000}
    del tensor
    ledger.hold(1401, "mask")
    assert ledger.peak() == {"mask": 1401}


def test_a_replacement_takes_the_place_of_what_is_released_at_once():
    for released in (True, False):
        ledger = Ledger(CPU)
        old, new = floats(100), floats(100)
        ledger.add(old, "activations")
        ledger.replace(old, new, "activations")
        if released:
            del old
        ledger.pulse(4, "workspace")
        assert sum(ledger.peak().values()) == (404 if released else 804)
        del new
        ledger.pulse(500, "workspace")
        assert ledger.largest()["activations"] == (400 if released else 800)
        assert sum(ledger.peak().values()) == (500 if released else 900)


def test_cuda_rounds_to_blocks():
    ledger = Ledger(torch.device("cuda"))
    kept = floats(129)
    ledger.add(kept, "activations")
    assert ledger.peak() == {"activations": 1024}


def test_the_measured_peak_is_that_of_the_allocator():
    with measured_peak("cpu") as measured:
        a = floats(1000)
        b = a.clone()
        del a, b
        c = floats(500)
    assert measured.peak == 8000
    with pytest.raises(KeyError), measured_peak("cpu"):
        raise KeyError
    del c


def test_gradients_that_autograd_adds_are_added_in_place():
    def loss(x):
        y = x * 1
        return (y * 2 + y * 3 + y * 4).sum()

    x = torch.randn(1000, requires_grad=True)
    rehearsal = Rehearsal(CPU)
    with rehearsal:
        value = loss(rehearsal.fake(x).requires_grad_())
        rehearsal.ledger = Ledger(CPU)
        value.backward()
    value = loss(x)
    with measured_peak("cpu") as measured:
        value.backward()
    assert measured.peak < 3 * 4000
    assert sum(rehearsal.ledger.peak().values()) == pytest.approx(measured.peak, abs=64)  # scalars


def layer(dtype, impl, tokens=192, top_k=4, hidden=64, inner=96, experts=8):
    generator = torch.Generator().manual_seed(0)
    index = torch.rand(tokens, experts, generator=generator).argsort(1)[:, :top_k]
    routing = route(index, experts)

    def run(x, w, up, down):
        return expert_mlp(x, w, routing.sorted_rows, routing.expert_offsets, ExpertWeights(up, down), impl=impl).sum()

    shapes = (tokens, hidden), (tokens, top_k), (experts, 2 * inner, hidden), (experts, hidden, inner)
    return run, [torch.randn(s, generator=generator).to(dtype).requires_grad_() for s in shapes]


def loss(dtype, impl, kind, head_trains, tokens=600, hidden=64, vocabulary=900):
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(vocabulary, (tokens,), generator=generator)
    labels[:200] = -100
    h, head, reference = (torch.randn(n, hidden, generator=generator).to(dtype) for n in (tokens, vocabulary, tokens))

    def run(h, head):
        keywords = {"ref_hidden_states": reference} if kind == "kl" else {}
        return token_loss(h, head, labels, kind=kind, impl=impl, **keywords).sum()

    return run, [h.requires_grad_(), head.requires_grad_(head_trains)]


CASES = {"layer": layer} | {
    f"{kind}, head {'trains' if trains else 'frozen'}": lambda dtype, impl, kind=kind, trains=trains: loss(
        dtype, impl, kind, trains
    )
    for kind in ("nll", "uce", "kl")
    for trains in (True, False)
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("impl", ["cpu", "ref"])
@pytest.mark.parametrize("case", CASES)
def test_what_kernels_allocate_inside(case, impl, dtype):
    run, inputs = CASES[case](dtype, impl)
    for train in (False, True):
        rehearsal = Rehearsal(CPU)
        fakes = [rehearsal.fake(t).requires_grad_(t.requires_grad) for t in inputs]
        with rehearsal, torch.set_grad_enabled(train):
            value = run(*fakes)
            if train:
                value.backward()
        with measured_peak("cpu") as measured, torch.set_grad_enabled(train):
            value = run(*inputs)
            if train:
                value.backward()
        assert sum(rehearsal.ledger.peak().values()) == pytest.approx(measured.peak, rel=0.1), train
