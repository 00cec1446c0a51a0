"""Offsets, rows, experts and slices that lead outside of what they index: refused before a kernel addresses memory.

`tests/trust` makes thousands of such calls; here is what the errors say, and how a device is spared to be waited for.
"""

import pytest
import torch

from moe_unlearn import ops
from moe_unlearn.ops import checks, legal
from moe_unlearn.ops.expert_wgrad import Factors, expert_wgrad, expert_wgrad_inner, expert_wgrad_sgd_
from moe_unlearn.step import UnlearnStep
from tests.ops.expert_mlp.cases import case
from tests.support.batches import random_batches
from tests.support.models import tiny_olmoe
from tests.support.steps import VOCAB, recipe, weights
from tests.support.steps import changed as changed_weights

pytestmark = pytest.mark.quick
ROWS = Factors(torch.ones(3, 4), torch.ones(5, 6), torch.tensor([0, 1, 3]).int(), None, torch.tensor([4, 0, 2]))


def ints(*numbers):
    return torch.tensor(numbers, dtype=torch.int32)


def changed(**fields):
    return expert_wgrad(**ROWS._replace(**fields)._asdict())


def layer(impl="auto", trained=None, **fields):
    inputs = case(tokens=4, top_k=2, experts=3) | fields
    weights = ops.ExpertWeights(inputs["gate_up_proj"], inputs["down_proj"])
    routed = [inputs[name] for name in ("hidden_states", "top_k_weights", "sorted_rows", "expert_offsets")]
    return ops.expert_mlp(*routed, weights, trained_experts=trained, impl=impl)


def slices(*numbers):
    part = torch.zeros(len(numbers), 4)
    ops.masked_sgd_(torch.zeros(2, 4), part, part, None, ops.SGD(0.1, 0.9), ops.Update(1), slices=torch.tensor(numbers))


RISE = "expert_offsets must rise from 0 to at most"
WRONG = {
    "first": (lambda: changed(expert_offsets=ints(1, 1, 3)), ValueError, f"{RISE} 3 rows; got 1 to 1 for expert 0"),
    "falls": (lambda: changed(expert_offsets=ints(0, 3, 1)), ValueError, f"{RISE} 3 rows; got 3 to 1 for expert 1"),
    "beyond": (lambda: changed(expert_offsets=ints(0, 1, 4)), ValueError, f"{RISE} 3 rows; got 1 to 4 for expert 1"),
    "bounds": (lambda: changed(expert_offsets=ints(0, 9).view(1, 2)), ValueError, f"{RISE} 3 rows; got 0 to 9"),
    "rows": (
        lambda: changed(input_rows=torch.tensor([4, 5, 0])),
        IndexError,
        r"input_rows must be in \[0, 5\); got 5 at",
    ),
    "negative": (lambda: changed(grad_rows=ints(0, 1, -1)), IndexError, r"grad_rows .* got -1 at position 2"),
    "experts": (lambda: expert_wgrad(**ROWS._asdict(), experts=ints(0, 2)), IndexError, r"experts must be in \[0, 2\)"),
    "inner": (
        lambda: expert_wgrad_inner([ROWS, ROWS._replace(input_rows=ints(0, 0, 5))]),
        IndexError,
        "input_rows .* got 5 at position 2",
    ),
    "ghost": (lambda: ops.gram_factors([torch.ones(3, 4)], torch.ones(3, 2), ints(0, 9)), ValueError, f"{RISE} 3 rows"),
    "slices": (lambda: slices(1, 2), IndexError, r"slices must be in \[0, 2\); got 2 at position 1"),
    "layer": (lambda: layer(expert_offsets=ints(0, 2, 1, 8)), ValueError, f"{RISE} 8 rows; got 2 to 1 for expert 1"),
    "sorted": (lambda: layer(sorted_rows=ints(*range(7), 8)), IndexError, r"sorted_rows .* got 8 at position 7"),
    "twice": (lambda: layer(sorted_rows=ints(*range(7), 0)), ValueError, r"sorted_rows must be distinct; got \[0\]"),
    "trained": (lambda: layer(trained=ints(3)), IndexError, r"trained_experts must be in \[0, 3\); got 3"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_index_is_named(name):
    call, kind, message = WRONG[name]
    with pytest.raises(kind, match=message):
        call()


@pytest.fixture
def on_a_device(monkeypatch):
    """The CPU takes the way of a device that is not waited for, on which `torch._assert_async` raises at once."""
    monkeypatch.setattr(checks, "_is_readable", lambda indices: False)
    monkeypatch.setattr(legal, "_met", {})


@pytest.mark.parametrize("name", [name for name in WRONG if name != "twice"])
def test_on_a_device_the_same_is_met_without_a_look(name, on_a_device):
    """The op reads and writes within bounds; whoever looks next is told once."""
    call, _, message = WRONG[name]
    call()
    with pytest.raises(IndexError, match=f"an op on cpu met indices outside .*: {message.split()[0]}"):
        ops.check_device("cpu")
    ops.check_device("cpu")


def test_illegal_indices_become_legal_ones(on_a_device):
    assert legal.legal_offsets(ints(1, -4, 2, 1, 9, 5), 6).tolist() == [0, 0, 2, 2, 6, 6]
    assert legal.legal_offsets(ints(0, 2, 3, 1, -1, 9).view(3, 2), 6).tolist() == [[0, 2], [3, 3], [0, 6]]
    wild = ints(7, -1, 3, 8)
    assert legal.legal_indices("grad_rows", wild, 4).tolist() == [0, 0, 3, 0]
    assert legal.legal_indices("grad_rows", wild, 4, ints(0, 1, 3), ints(1)).tolist() == [7, 0, 3, 8]
    offsets = ints(0, 2, 6)
    made = legal.legal_offsets(offsets, 6)
    assert torch.equal(made, offsets) and legal.legal_offsets(made, 6) is made


def test_a_layer_goes_backward_from_illegal_indices(on_a_device):
    inputs = case(tokens=4, top_k=2, experts=3) | {"sorted_rows": ints(9, *range(1, 8))}
    layer = ops.ExpertWeights(inputs["gate_up_proj"].requires_grad_(), inputs["down_proj"].requires_grad_())
    routed = [inputs[name] for name in ("hidden_states", "top_k_weights", "sorted_rows", "expert_offsets")]
    ops.expert_mlp(*routed, layer, trained_experts=ints(2, 5)).sum().backward()
    with pytest.raises(IndexError, match="trained_experts, sorted_rows; it took others"):
        ops.check_device("cpu")


@pytest.mark.parametrize("guard", ["strict", "loss"])
def test_a_step_tells_what_an_op_has_met_before_it_updates(guard, on_a_device):
    """It looks where it reads its losses anyway."""
    step = UnlearnStep(tiny_olmoe(VOCAB, num_hidden_layers=1), recipe("graddiff", f"guard={guard}"))
    forget, retain = (random_batches(VOCAB, 1, rows=2, length=8, seed=seed)[0] for seed in (1, 2))
    before = weights(step.model)
    handle = step.model.model.layers[0].register_forward_hook(lambda *_: slices(1, 2))
    with pytest.raises(IndexError, match="an op on cpu met indices outside of what they index: slices;"):
        step(forget, retain)
    assert not changed_weights(step.model, before)
    handle.remove()
    step(forget, retain)
    assert changed_weights(step.model, before)


def test_a_plan_reads_no_note_of_the_device(on_a_device):
    step = UnlearnStep(tiny_olmoe(VOCAB, num_hidden_layers=1), recipe("graddiff"))
    forget, retain = (random_batches(VOCAB, 1, rows=2, length=8, seed=seed)[0] for seed in (1, 2))
    step(forget, retain)
    assert legal.flag(torch.device("cpu")) is not None
    assert step.plan([forget], [retain]).notes == []


def test_rows_of_experts_that_are_not_listed_may_lead_anywhere(monkeypatch):
    wild = ROWS._replace(input_rows=torch.tensor([10**9, 0, 2]))
    second = torch.tensor([1])
    expected = expert_wgrad(**ROWS._asdict(), experts=second)
    for readable in (True, False):
        monkeypatch.setattr(checks, "_is_readable", lambda indices, readable=readable: readable)
        assert torch.equal(expert_wgrad(**wild._asdict(), experts=second), expected)


def test_what_an_op_made_is_looked_at_only_where_something_changed_it(on_a_device, monkeypatch):
    asked, note = [], legal._note
    monkeypatch.setattr(legal, "_note", lambda place, wrong: (asked.append(place), note(place, wrong)))
    taken = {}
    inputs = case(tokens=4, top_k=2, experts=3)
    weights = ops.ExpertWeights(inputs["gate_up_proj"].requires_grad_(), inputs["down_proj"].requires_grad_())
    made = ops.route(torch.tensor([[0, 1], [2, 0], [1, 3], [0, 2]]), 3)

    def run(offsets, trained=None):
        routed = inputs["hidden_states"], inputs["top_k_weights"], made.sorted_rows, offsets
        out = ops.expert_mlp(*routed, weights, trained_experts=trained, sink=taken.__setitem__)
        out.sum().backward()
        for weight, factors in taken.items():
            expert_wgrad_sgd_(weight.detach(), None, factors, ops.SGD(0.1), ops.Update(1))

    run(made.expert_offsets)
    assert not asked
    copied = made.expert_offsets.clone()
    run(copied)
    assert len(asked) == 1  # what came out of the layer is checked already
    made.expert_offsets[0] = 0
    run(made.expert_offsets, trained=torch.tensor([1]).int())
    assert len(asked) == 3
    wider = ops.route(torch.zeros(9, 2, dtype=torch.long), 3)
    legal.legal_offsets(wider.expert_offsets, 18)
    assert len(asked) == 3
    legal.legal_offsets(wider.expert_offsets, 8)
    assert len(asked) == 4  # those of more rows than these


@pytest.mark.parametrize("impl", ["ref", "cpu"])
def test_route_refuses_a_histogram_that_nobody_can_hold(impl):
    with pytest.raises(
        ValueError, match=r"num_experts \* num_groups must be at most 1048576 .* got 1099511627776 \* 1"
    ):
        ops.route(torch.zeros(2, 2, dtype=torch.long), 1 << 40, impl=impl)
    with pytest.raises(ValueError, match=r"got 4 \* 1048576"):
        ops.route(torch.zeros(2, 2, dtype=torch.long), 4, num_groups=1 << 20, impl=impl)


def test_compiled_code_is_checked_too():
    compiled = torch.compile(lambda rows: changed(input_rows=rows), backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(torch.tensor([4, 0, 2])), expert_wgrad(**ROWS._asdict()))
    with pytest.raises(IndexError, match="input_rows .* got 5 at position 1"):
        compiled(torch.tensor([4, 5, 2]))
