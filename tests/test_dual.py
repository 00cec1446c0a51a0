"""The dual variable of the retain loss: its path by the formula, what leaves it alone, its place in a run's state."""

import copy
import math

import pytest
import torch

from moe_unlearn.checkpoint import load_state, save_state
from moe_unlearn.config import Recipe
from moe_unlearn.data import ForgetRetainDataset
from moe_unlearn.errors import RetainBudgetError
from moe_unlearn.step import UnlearnStep
from moe_unlearn.trainer import UnlearnTrainer
from tests.support.models import tiny_olmoe
from tests.support.steps import VOCAB, changed, data, made_of, recipe, weights
from tests.support.training import arguments, differing, examples

pytestmark = pytest.mark.quick
# two orders of sums in float64, through a few steps
CLOSE = 2.0**-30
# the retain loss of the random model is between 4 and 5
DUAL = ["retain.alpha=2.0", "dual.retain_loss_eps=3.0", "dual.step_size=0.5", "dual.warmup_steps=0"]


@pytest.fixture
def model():
    torch.manual_seed(0)
    return tiny_olmoe(vocab_size=VOCAB).double().eval()


def pdu(*overrides, lr=1e-3):
    return recipe("pdu", *DUAL, *overrides, lr=lr)


def written_out(model, pairs, settings):
    """The method as its paper has it, over whole logits with SGD: losses and dual variable of each step."""
    alpha, dual, found = settings.retain.alpha, settings.dual, []
    for i, (forget, retain) in enumerate(pairs):
        z, (mask, y) = model(**given(forget)).logits, counted(forget)
        forget_loss = ((z.max(-1).values - z.mean(-1))[mask] ** 2).mean()
        mask, y = counted(retain)
        retain_loss = torch.nn.functional.cross_entropy(model(**given(retain)).logits[mask], y)
        (forget_loss + alpha * (retain_loss - dual.retain_loss_eps)).backward()
        losses = {"forget_loss": forget_loss.item(), "retain_loss": retain_loss.item()}
        found.append(losses | {"retain_alpha": alpha})
        if i >= dual.warmup_steps:
            alpha = max(0.0, alpha + dual.step_size * (losses["retain_loss"] - dual.retain_loss_eps))
        with torch.no_grad():
            for p in model.parameters():
                p -= settings.optimizer.lr * p.grad
                p.grad = None
    return found


def given(batch):
    return {key: batch[key] for key in ("input_ids", "attention_mask")}


def counted(batch):
    mask = torch.zeros_like(batch["labels"], dtype=torch.bool)
    mask[:, :-1] = (batch["labels"][:, 1:] != -100) & (batch["attention_mask"][:, :-1] == 1)
    return mask, batch["labels"].roll(-1, 1)[mask]


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "plain"])
@pytest.mark.parametrize(
    "overrides",
    [[], ["guard=loss"], ["dual.warmup_steps=2"], ["dual.retain_loss_eps=6.0", "retain.alpha=1.0"]],
    ids=["rising", "in one pass", "warm-up", "falling to zero"],
)
@pytest.mark.slow(but=4)
def test_steps_and_dual_variable_are_the_papers(overrides, fused, model):
    settings = pdu("optimizer.name=sgd", *overrides)
    pairs = [pair for i in range(2) for pair in zip(*data(seed=10 * i), strict=True)]
    step, theirs = UnlearnStep(copy.deepcopy(model), settings, fused=fused), copy.deepcopy(model)
    theirs.set_experts_implementation("eager")
    step.prepare(*zip(*pairs, strict=True))
    found, expected = [step(*pair) for pair in pairs], written_out(theirs, pairs, settings)
    for ours, truth in zip(found, expected, strict=True):
        assert {key: ours[key] for key in truth} == pytest.approx(truth, rel=CLOSE, abs=CLOSE)
    path = [entry["retain_alpha"] for entry in expected]
    assert len(set(path)) > 2 and (path[-1] == 0) == (settings.dual.retain_loss_eps == 6)
    start, truth = weights(model), weights(theirs)
    for name, ours in weights(step.model).items():
        assert (ours - truth[name]).abs().max() <= CLOSE * (truth[name] - start[name]).abs().max(), name


def test_it_follows_the_loss_of_all_micro_batches(model):
    """However a step's rows are cut."""
    forget, retain = data()
    paths = []
    for size in (4, 2):
        step = UnlearnStep(copy.deepcopy(model), pdu())
        step.prepare(forget, retain)
        for i in range(2):
            pairs = [
                tuple({key: value[at : at + size] for key, value in side[i].items()} for side in (forget, retain))
                for at in range(0, 4, size)
            ]
            metrics = made_of(step, pairs)
            paths.append((metrics, step.objectives.dual.value))
    for (one, after), (other, after_too) in zip(paths[:2], paths[2:], strict=True):
        assert one == pytest.approx(other, rel=CLOSE) and after == pytest.approx(after_too, rel=CLOSE)
        assert after - one["retain_alpha"] == pytest.approx(0.5 * (one["retain_loss"] - 3.0), rel=CLOSE)


def test_the_load_balancing_loss_is_part_of_what_it_follows(model):
    """alpha multiplies that loss too."""
    model.config.output_router_logits, model.router_aux_loss_coef = True, 0.5
    forget, retain = data()
    step = UnlearnStep(model, pdu())
    step.prepare(forget, retain)
    metrics = step(forget[0], retain[0])
    loss = metrics["retain_loss"] + 0.5 * metrics["router_aux_loss"]
    assert metrics["router_aux_loss"] > 1 and step.objectives.dual.value == 2.0 + 0.5 * (loss - 3.0)


@pytest.mark.slow
def test_a_step_that_moves_nothing_leaves_it(model):
    forget, retain = data()
    step = UnlearnStep(model, pdu("retain_budget=1.0"))
    step.prepare(forget, retain)
    before = weights(model)
    with pytest.raises(RetainBudgetError):
        step(forget[0], retain[0])
    step(forget[0], retain[0], update=False)
    step.discard()
    step.plan(forget, retain)  # which rehearses two steps on a copy
    assert step.objectives.dual.value == 2.0 and not changed(model, before) and step.steps == 0


def test_verified_steps_have_it_too(model):
    step = UnlearnStep(model.float(), pdu(), verify=3)
    forget, retain = data()
    step.prepare(forget, retain)
    path = [step(forget[i], retain[i])["retain_alpha"] for i in (0, 1, 0)]
    assert step.verifier.summary().count("equals") == 3 and path[0] == 2.0 < path[1] < path[2]


def test_it_is_saved_and_resumed_to_the_last_bit(model, tmp_path):
    forget, retain = data()
    whole = UnlearnStep(model, pdu())
    whole.prepare(forget, retain)
    for i in range(2):
        whole(forget[i], retain[i])
    save_state(tmp_path, "step", whole.state_dict())
    again = UnlearnStep(copy.deepcopy(model), pdu())
    again.load_state_dict(load_state(tmp_path, "step"))
    one, other = (step(forget[0], retain[0]) for step in (whole, again))
    assert one == other and one["retain_alpha"] not in (2.0, 0.0)
    assert whole.objectives.dual.value == again.objectives.dual.value
    assert not changed(again.model, weights(whole.model))
    with pytest.raises(ValueError, match="the state belongs to another recipe: dual was"):
        UnlearnStep(copy.deepcopy(model), pdu("dual=null")).load_state_dict(whole.state_dict())


@pytest.mark.slow
def test_a_trainer_resumes_it(model, tmp_path):
    dataset = ForgetRetainDataset(examples(10, 1), examples(12, 2), seed=0)

    def trainer():
        return UnlearnTrainer(copy.deepcopy(model), arguments(tmp_path, max_steps=5), pdu("guard=loss"), dataset)

    whole, again = trainer(), trainer()
    whole.train()
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    paths = [
        [entry["retain_alpha"] for entry in t.state.log_history if "retain_alpha" in entry] for t in (whole, again)
    ]
    assert len(set(paths[0])) == 5 and paths[0] == paths[1]
    assert whole.unlearn_step.objectives.dual.value == again.unlearn_step.objectives.dual.value
    assert differing(again.model, whole.model) == []


def test_a_bound_that_the_model_is_above_is_warned_of(model, recwarn):
    forget, retain = data()
    for bound in (6.0, 3.0):
        assert not [warning for warning in recwarn.list if "dual" in str(warning.message)]
        step = UnlearnStep(copy.deepcopy(model), pdu(f"dual.retain_loss_eps={bound}"))
        step.prepare(forget, retain)
        for i in range(2):
            step(forget[i], retain[i])
    (message,) = (str(warning.message) for warning in recwarn.list if "dual" in str(warning.message))
    assert "before the first update, above what it is to be held at (dual.retain_loss_eps 3)" in message


@pytest.mark.slow
def test_the_plan_says_it(model, recwarn):
    lines = str(UnlearnStep(model, pdu("dual.warmup_steps=7")).plan(*data()))
    assert "dual       holds the retain loss at 3, alpha is 2 and moves by 0.5 times the excess after 7 steps" in lines
    assert not [warning for warning in recwarn.list if "dual" in str(warning.message)]


def test_any_objective_may_have_it(model):
    step = UnlearnStep(model, recipe("npo", "dual.retain_loss_eps=3.0"))
    forget, retain = data()
    step.prepare(forget, retain)
    metrics = step(forget[0], retain[0])
    assert metrics["retain_alpha"] == 1.0
    assert step.objectives.dual.value == 1.0 + (metrics["retain_loss"] - 3.0)


@pytest.mark.parametrize(
    "name,overrides,message",
    [
        ("npo", ["dual=true"], "dual.retain_loss_eps must say what the retain loss is held at, .*; got none"),
        ("npo", ["dual.retain_loss_eps=-1"], "dual.retain_loss_eps must be at least 0; got -1.0"),
        ("pdu", ["dual.step_size=0"], "dual.step_size must be above 0; got 0.0"),
        ("pdu", ["dual.warmup_steps=-1"], "dual.warmup_steps must be at least 0; got -1"),
        ("pdu", ["retain.alpha=-1"], "retain.alpha, where dual starts, must be at least 0; got -1.0"),
        ("pdu", ["retain.objective=none"], "dual bounds the retain loss and needs a retain.objective; got 'none'"),
        ("pdu", ["mollm=true"], "dual weighs the retain loss in a sum that mollm replaces: mollm=null or dual=null"),
    ],
)
def test_bad_settings(name, overrides, message):
    with pytest.raises(ValueError, match=message):
        Recipe.load(name, overrides)


def test_a_loss_that_is_not_finite_leaves_it(model):
    step = UnlearnStep(model, pdu())
    forget, retain = data()
    step.prepare(forget, retain)
    with torch.no_grad():
        model.lm_head.weight[0] = math.inf
    with pytest.raises(ArithmeticError, match="stopped before the update"):
        step(forget[0], retain[0])
    assert step.objectives.dual.value == 2.0
