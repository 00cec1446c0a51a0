"""Whatever leaves a step by an exception leaves it clean, or marked where its update was under way."""

import copy
import re

import pytest
import torch

from moe_unlearn.step import UnlearnStep
from tests.support.batches import random_batches
from tests.support.interrupted import PACKAGE, Injector, differing, state_of
from tests.support.models import tiny_olmoe
from tests.support.steps import VOCAB, recipe

pytestmark = pytest.mark.quick
# recipe and settings -> calls of ops and of hooks in one step by the references, fused and plain
CASES = {
    ("graddiff", "optimizer.name=sgd", "retain.router_aux=0.1"): (53, 46),
    ("graddiff", "guard=loss", "optimizer.max_grad_norm=null"): (50, 43),
    ("npo",): (50, 43),
    ("mollm", "mollm.kl_floor=0", "mollm.log_descent_every=1"): (59, 62),
    ("seuf",): (22, 22),
    ("rmu", "forget.layer=0", r"scope.parameters=['layers\.0.*down_proj']"): (14, 13),
}
IN_A_STEP = {"model/states.py", "router_aux.py", "seuf.py", "step/gradients.py"}
# hooks of prepare(), expert parallelism, plans, verification and kernels that are tested
ELSEWHERE = {
    "experts.py",
    "model/capture.py",
    "plan/one_rank.py",
    "plan/rehearse.py",
    "regress/seeded.py",
    "routers/watch.py",
    "step/routers.py",
    "survive.py",
    "verify/forced_routing.py",
    "wagle/gradients.py",
}


def stepped(made, **options):
    """A step over a model of one layer that has been made once, so that its optimizer has a state, and its batches."""
    torch.manual_seed(0)
    step = UnlearnStep(tiny_olmoe(vocab_size=VOCAB, num_hidden_layers=1), made, **options)
    forget, retain = (random_batches(VOCAB, 1, rows=2, length=8, seed=seed) for seed in (1, 2))
    step.prepare(forget, retain)
    step(forget[0], retain[0])
    return step, forget[0], retain[0]


@pytest.mark.slow(but=4)
@pytest.mark.parametrize("fused", [True, False], ids=["fused", "plain"])
@pytest.mark.parametrize("case", CASES, ids=" ".join)
def test_an_exception_at_any_op_and_any_hook_leaves_a_step_clean(case, fused, monkeypatch):
    """Then the step is made as if nothing had happened; one that had begun its update refuses until it is restored."""
    monkeypatch.setenv("MOE_UNLEARN_IMPL", "ref")
    injector = Injector(monkeypatch)
    step, forget, retain = stepped(recipe(*case), fused=fused)
    before, saved = state_of(step), copy.deepcopy(step.state_dict())

    def restore():
        step.model.load_state_dict(before["weights"])
        step.load_state_dict(saved)

    injector.begin()
    expected = step(forget, retain)
    after, calls = state_of(step), injector.calls
    assert injector.places <= IN_A_STEP
    restore()
    marked = []
    for at, name in enumerate(calls):
        error = (KeyboardInterrupt, torch.OutOfMemoryError)[at % 2]
        injector.begin(at, error)
        with pytest.raises(error):
            step(forget, retain)
        injector.begin()
        changed = differing(before, state_of(step))
        if not step.gradients.under_way:
            assert not changed, (at, name)
            continue
        assert changed <= {"weights", "optimizer"}, (at, name)
        marked.append(name)
        for act in (lambda: step(forget, retain), step.state_dict):
            with pytest.raises(RuntimeError, match="an error left this step while its update was under way"):
                act()
        restore()
    assert {name.partition(".")[0] for name in marked} >= {"masked_update"}
    assert step(forget, retain) == expected and not differing(after, state_of(step))


def test_every_hook_of_a_step_is_met():
    found = {
        str(path.relative_to(PACKAGE))
        for path in PACKAGE.rglob("*.py")
        if re.search(r"\.register_\w*hook\(", path.read_text(encoding="utf-8"))
    }
    assert found == IN_A_STEP | ELSEWHERE


@pytest.mark.parametrize("at", ["forward", "backward"])
def test_micro_batches_before_stay_until_gradients_change(at, monkeypatch):
    injector = Injector(monkeypatch)
    step, forget, retain = stepped(recipe("graddiff"))
    other, *_ = stepped(recipe("graddiff"))
    first, second = (forget, retain), (retain, forget)
    sizes = step.sizes([first, second])
    for each in (step, other):
        each(*first, update=False, sizes=sizes)
    injector.begin()
    expected = other(*second, sizes=sizes)
    injector.begin(0 if at == "forward" else injector.calls.index("expert_mlp.backward"), KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):
        step(*second, sizes=sizes)
    injector.begin()
    assert len(step.tally.parts) == (at == "forward")
    if at == "backward":
        step(*first, update=False, sizes=sizes)
    assert step(*second, sizes=sizes) == expected and not differing(state_of(other), state_of(step))
