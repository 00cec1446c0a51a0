"""Gradient checkpointing changes no number: every objective and lever, both modes, fused and plain.

A loss that is built from what a hook caught inside a checkpointed layer (SEUF's gates, RMU's layer outputs) is
where it did, and so is a layer whose inputs need no gradient.
"""

import copy

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from moe_unlearn.config import FORGET_OBJECTIVES
from moe_unlearn.model.head import final_hidden_states
from moe_unlearn.step import UnlearnStep
from tests.support.batches import random_batch
from tests.support.models import tiny_olmoe
from tests.support.steps import VOCAB, data, recipe, weights

MODES = {"none": None, "reentrant": True, "not reentrant": False}
# of the last layer, so that what goes into the layers below needs no gradient
ONE_LAYER = ["scope.kind=parameters", r"scope.parameters=['layers\.1\.']"]
# name -> recipe and overrides
CASES = {
    **{name: ("graddiff", f"forget.objective={name}") for name in FORGET_OBJECTIVES if name != "rmu"},
    "rmu": ("rmu",),
    "rmu, tokens retained": ("rmu", "retain.objective=nll"),
    "kl": ("npo", "retain.objective=kl"),
    "no retain loss": ("ga",),
    "one layer": ("npo", *ONE_LAYER),
    "one layer, kl": ("npo", *ONE_LAYER, "retain.objective=kl"),
    "in one pass": ("graddiff", "guard=loss"),
    "trace offline": ("trace",),
    "trace online": ("trace", "trace.refresh=online"),
    "trace's experts": ("trace", "scope.kind=experts"),
    "wagle": ("wagle",),
    "mollm compact": ("mollm", "mollm.gradients=compact"),
    "mollm factors": ("mollm", "mollm.gradients=factors"),
    "mollm seuf": ("mollm", "scope.kind=seuf"),
    "three levers": ("combined",),
    "seuf": ("seuf",),
    "seuf npo": ("seuf", "forget.objective=npo"),
    "seuf idk_dpo": ("seuf", "forget.objective=idk_dpo"),
    "seuf trace": ("seuf", "trace.min_ratio=1.01", "trace.eta=0.3", "trace.refresh=online"),
}


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return tiny_olmoe(vocab_size=VOCAB).train()


def run(model, case, mode, fused, state=None):
    """One step behind `state`, a preparation: metrics, weights, whether a layer was run again, the preparation."""
    name, *overrides = CASES[case]
    own = copy.deepcopy(model)
    if MODES[mode] is not None:
        own.gradient_checkpointing_enable({"use_reentrant": MODES[mode]})
    again = []
    own.model.layers[1].mlp.register_forward_pre_hook(lambda *_: again.append(torch._C._current_graph_task_id() != -1))
    # an anchor alone would hardly move anything
    step = UnlearnStep(own, recipe(name, "scope.anchor=100", *overrides, lr=1e-2), fused=fused)
    forget, retain = data()
    if state is None:
        step.prepare(forget, retain)
        state = step.state_dict()
    else:
        step.load_state_dict(state)
    return step(forget[0], retain[0]), weights(own), any(again), state


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "plain"])
@pytest.mark.parametrize("case", CASES)
def test_checkpointing_changes_nothing(model, case, fused):
    metrics, expected, again, state = run(model, case, "none", fused)
    assert not again
    for mode in ("reentrant", "not reentrant"):
        ours, moved, again, _ = run(model, case, mode, fused, state)
        assert again, "no layer was run again, or this test shows nothing"
        assert ours == metrics, mode
        assert all(torch.equal(moved[name], p) for name, p in expected.items()), mode


@pytest.mark.parametrize("case", ["kl", "three levers", "seuf trace"])
def test_a_token_near_a_tie_takes_its_routes_again(model, case):
    """Experts 0 and 1 score alike, 2 and 3 but for the last bit: the recomputation chooses what was chosen."""
    tied = copy.deepcopy(model)
    with torch.no_grad():
        for layer in tied.model.layers:
            layer.mlp.gate.weight[1] = layer.mlp.gate.weight[0]
            layer.mlp.gate.weight[3] = layer.mlp.gate.weight[2]
            layer.mlp.gate.weight[3, 0] = torch.nextafter(layer.mlp.gate.weight[3, 0], torch.tensor(torch.inf))
    expected, moved, _, state = run(tied, case, "none", True)
    for mode in MODES:
        own, first, again = copy.deepcopy(tied), [], []

        def seen(module, args, first=first, again=again):
            routes = module, args[1].tolist()
            (first if torch._C._current_graph_task_id() == -1 else again).append(routes)

        for layer in own.model.layers:
            layer.mlp.experts.register_forward_pre_hook(seen)
        ours, after, *_ = run(own, case, mode, True, state)
        assert ours == expected and all(torch.equal(after[name], p) for name, p in moved.items())
        assert bool(again) == (mode != "none") and all(routes in first for routes in again)


def test_the_anchor_pulls_under_checkpointing(model):
    """What went wrong: the anchor loss stayed where it was."""
    own = copy.deepcopy(model)
    own.gradient_checkpointing_enable({"use_reentrant": True})
    step = UnlearnStep(own, recipe("seuf", "forget.gamma=0", "retain.objective=none", lr=1e-2))
    forget, retain = data()
    step.prepare(forget, retain)
    anchors = [step(forget[0], retain[0])["anchor_loss"] for _ in range(3)]
    assert anchors[0] > anchors[1] > anchors[2]


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoints_are_what_they_were_afterwards(model, reentrant):
    own = copy.deepcopy(model)
    own.gradient_checkpointing_enable({"use_reentrant": reentrant, "preserve_rng_state": False})
    before = [layer._gradient_checkpointing_func for layer in own.model.layers]

    def broken(*_):
        inside = [layer._gradient_checkpointing_func for layer in own.model.layers]
        assert all(f.keywords == {"use_reentrant": False, "preserve_rng_state": False} for f in inside)
        raise ZeroDivisionError

    own.model.layers[1].mlp.register_forward_pre_hook(broken)
    with pytest.raises(ZeroDivisionError):
        final_hidden_states(own, random_batch(VOCAB))
    assert [layer._gradient_checkpointing_func for layer in own.model.layers] == before


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoints_of_others(model, reentrant):
    """Those that keep the graph work as they are; under others the anchor says what is wrong."""
    expected = run(model, "seuf", "none", True)
    own = copy.deepcopy(model)
    own.gradient_checkpointing_enable()
    for layer in own.model.layers:
        layer._gradient_checkpointing_func = lambda f, *args: checkpoint(f, *args, use_reentrant=reentrant)
    step = UnlearnStep(own, recipe("seuf", "scope.anchor=100", lr=1e-2))
    step.load_state_dict(expected[3])
    forget, retain = data()
    if reentrant:
        with pytest.raises(RuntimeError, match="expected a checkpoint with use_reentrant=False"):
            step(forget[0], retain[0])
        step.optimizer.step()  # nothing was left behind that could move a weight
        assert all(torch.equal(p, own.state_dict()[name]) for name, p in weights(model).items())
    else:
        assert step(forget[0], retain[0]) == expected[0]
        assert all(torch.equal(own.state_dict()[name], p) for name, p in expected[1].items())
