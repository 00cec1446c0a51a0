"""Level raises forget rows to what unseen text has, and keeps that text where it was."""

import copy
import math

import pytest
import torch

from moe_unlearn import data, losses
from moe_unlearn.config import Recipe
from moe_unlearn.data.of_recipe import pair_collator, paired
from moe_unlearn.data.pairs import check_unseen, dealt
from moe_unlearn.model.batches import refusal, target_mask
from moe_unlearn.model.head import token_losses
from moe_unlearn.step import UnlearnStep
from tests.support.batches import random_batch
from tests.support.models import tiny_olmoe
from tests.support.steps import VOCAB, recipe
from tests.support.steps import data as batches

pytestmark = pytest.mark.quick
UNITS = ("token", "sequence")


def odds(p):
    return math.log((1 - p) / p)


def at(values, share):
    """The value of a descending list at a share of its length, between two of them in proportion."""
    place = share * (len(values) - 1)
    low = min(int(place), len(values) - 1)
    high = min(low + 1, len(values) - 1)
    return values[low] + (place - low) * (values[high] - values[low])


def distance(rows, goals, margin, unit):
    """The formula of `losses.level`, written out over lists of probabilities."""
    total = 0.0
    for row, goal in zip(rows, goals, strict=True):
        own, other = (sorted(map(odds, side), reverse=True) for side in (row, goal))
        if not own or not other:
            continue
        if unit == "sequence":
            apart = [sum(own) / len(own) - sum(other) / len(other)]
        else:
            apart = [o - at(other, i / max(len(own) - 1, 1)) for i, o in enumerate(own)]
        total += sum(max(0.0, abs(d) - margin) ** 2 for d in apart)
    return total


def ragged(lengths, seed):
    """Rows of probabilities, and their NLL [B, S] with its mask, which has gaps, and NaN where it is not set."""
    draw, width = torch.Generator().manual_seed(seed), max(lengths) + 3
    nll = torch.full((len(lengths), width), torch.nan, dtype=torch.float64)
    mask, rows = torch.zeros(len(lengths), width, dtype=torch.bool), []
    for row, length in enumerate(lengths):
        places = torch.randperm(width, generator=draw)[:length]
        p = torch.rand(length, generator=draw, dtype=torch.float64).clamp(0.01, 0.99)
        nll[row, places], mask[row, places] = -p.log(), True
        rows.append(p.tolist())
    return rows, nll, mask


@pytest.mark.parametrize("margin", [0.0, 0.5])
@pytest.mark.parametrize("unit", UNITS)
def test_level_is_its_formula(unit, margin):
    rows, nll, mask = ragged([7, 1, 4, 0, 3, 1], 1)
    goals, goal_nll, goal_mask = ragged([5, 3, 1, 4, 0, 1], 2)
    expected = distance(rows, goals, margin, unit)
    assert expected > 1
    found = losses.level(nll, mask, goal_nll, goal_mask, margin=margin, unit=unit)
    assert float(found) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("unit", UNITS)
def test_levels_gradient_is_that_of_the_formula_and_does_not_reach_the_goal(unit):
    _, nll, mask = ragged([5, 1, 3], 3)
    _, goal_nll, goal_mask = ragged([4, 2, 1], 4)
    nll, goal_nll = (torch.where(m, v, 0.7).requires_grad_() for v, m in ((nll, mask), (goal_nll, goal_mask)))

    def loss(values):
        return losses.level(values, mask, goal_nll, goal_mask, margin=0.2, unit=unit)

    loss(nll).backward()
    assert goal_nll.grad is None
    step, expected = 1e-6, torch.zeros_like(nll)
    for place in mask.nonzero().tolist():
        moved = [nll.detach().clone() for _ in range(2)]
        for values, sign in zip(moved, (1, -1), strict=True):
            values[tuple(place)] += sign * step
        expected[tuple(place)] = (loss(moved[0]) - loss(moved[1])) / (2 * step)
    torch.testing.assert_close(nll.grad, expected, rtol=1e-6, atol=1e-8)
    assert not nll.grad[~mask].any() and nll.grad[mask].any()


def test_the_margin_is_on_both_sides():
    nll, mask = torch.tensor([[0.5, 2.0, 9.0]]), torch.ones(1, 3, dtype=torch.bool)
    apart = torch.log(torch.expm1(torch.tensor([2.0, 2.0]))) - torch.log(torch.expm1(torch.tensor([0.5, 9.0])))
    assert float(losses.level(nll, mask, nll, mask)) == 0
    goal = torch.tensor([[2.0, 2.0, 2.0]])
    for distance in apart.abs().tolist():
        for margin, few in ((distance - 1e-3, False), (max(apart.abs()) + 1e-3, True)):
            own = nll.clone().requires_grad_()
            losses.level(own, mask, goal, mask, margin=float(margin)).backward()
            assert bool(own.grad.any()) != few, "inside the margin nothing moves, outside of it something does"


def test_a_memorised_token_has_a_slope():
    """By the logit the slope is that of the distance alone; that of the NLL would be 1 - p, 6e-6 here."""
    logit = torch.tensor(12.0, dtype=torch.float64, requires_grad=True)
    nll, mask = torch.nn.functional.softplus(-logit).view(1, 1), torch.ones(1, 1, dtype=torch.bool)
    losses.level(nll, mask, torch.full_like(nll, math.log(2)), mask).backward()
    assert float(logit.grad) == pytest.approx(2 * 12.0)
    certain = torch.zeros(1, 1, requires_grad=True)  # p has rounded to 1
    losses.level(certain, mask, torch.ones(1, 1), mask).backward()
    assert certain.grad.isfinite().all() and certain.grad.any()


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return tiny_olmoe(vocab_size=VOCAB).double().eval()


def levels(*overrides):
    return recipe("graddiff", "forget.objective=level", "optimizer.name=sgd", *overrides, lr=3e-2)


@pytest.mark.parametrize("unit", UNITS)
def test_losses_are_means_over_their_units(unit, model):
    step = UnlearnStep(copy.deepcopy(model), levels(f"forget.unit={unit}", "forget.margin=0.1"))
    forget, retain = batches()
    step.prepare(forget, retain)
    former = [token_losses(step.model, refusal(batch), kind="nll") for batch in forget]
    with torch.no_grad():
        for p in step.model.parameters():
            p.mul_(1.1)
    rows, unseen = forget[1], refusal(forget[1])
    found = {name: value.detach() for name, value in step.objectives.forget(rows).items()}
    now = [token_losses(step.model, side, kind="nll") for side in (rows, unseen)]

    def probabilities(values, side):
        return [(-v[m]).exp().tolist() for v, m in zip(values, target_mask(side), strict=True)]

    own, other, before = (probabilities(v, s) for v, s in ((now[0], rows), (now[1], unseen), (former[1], unseen)))
    counts = [len(own), len(other)] if unit == "sequence" else [sum(map(len, own)), sum(map(len, other))]
    assert float(found["forget"]) == pytest.approx(distance(own, other, 0.1, unit) / counts[0], rel=1e-9)
    if unit == "token":  # what each token was, whatever the order
        pairs = zip(sum(other, []), sum(before, []), strict=True)
        held = sum(max(0.0, abs(odds(p) - odds(q)) - 0.1) ** 2 for p, q in pairs)
    else:
        held = distance(other, before, 0.1, unit)
    assert float(found["hold"]) == pytest.approx(held / counts[1], rel=1e-5)  # what was is kept in float32
    assert [int(step.objectives.units(rows, retain[0])[name]) for name in ("forget", "hold")] == counts


def test_unseen_text_stays_where_it_was_if_it_is_held(model):
    """A test that fails when hold is dropped: only a factor of it tells the two runs apart."""
    forget, retain = random_batch(VOCAB, seed=1), random_batch(VOCAB, seed=2)
    unseen = {f"idk_{key}": value for key, value in random_batch(VOCAB, seed=3).items()}
    drift = []
    for hold in (0, 5):
        step = UnlearnStep(copy.deepcopy(model), levels(f"forget.hold={hold}"))
        step.prepare([forget | unseen], [retain])
        before = token_losses(step.model, refusal(forget | unseen), kind="nll").detach()
        for _ in range(12):
            metrics = step(forget | unseen, retain)
        after = token_losses(step.model, refusal(forget | unseen), kind="nll").detach()
        drift.append(float((after - before).abs().mean()))
        assert metrics["hold_loss"] > 0
    assert drift[1] < 0.5 * drift[0]


def test_unseen_texts_are_dealt_evenly_and_the_same_for_a_seed():
    examples = [data.Example([1, i], [1, i], 0) for i in range(5)]
    made = dealt(examples, 12, seed=3)
    assert sorted(made.count(example) for example in examples) == [2, 2, 2, 3, 3]
    assert made[:5] == made[5:10] == dealt(examples, 5, seed=3) != dealt(examples, 5, seed=4)


def rows_of(*firsts):
    return [data.Example([first, 5, 6], [-100, 5, 6], 1) for first in firsts]


def test_what_level_needs_is_checked(model):
    made, forget = levels(), rows_of(1, 2)
    with pytest.raises(ValueError, match="'level' needs texts like the forget set's that the model never saw: give"):
        pair_collator(made, None, forget, None)
    for side in ("forget", "retain", "holdout"):
        with pytest.raises(ValueError, match=f"no other set: 1 of 2 stand in the {side} set too"):
            check_unseen({"unseen": rows_of(7, 8), side: rows_of(8, 9)})
    with pytest.raises(ValueError, match=r"data.unseen is for forget.objective level.* got 'npo': leave it out"):
        Recipe.load("npo", ["data.unseen=x.jsonl"])
    with pytest.raises(ValueError, match="forget.unit must be one of token, sequence; got 'row'"):
        levels("forget.unit=row")
    batch = random_batch(VOCAB)
    silent = {f"idk_{key}": value for key, value in batch.items()}
    silent["idk_labels"] = torch.full_like(silent["idk_labels"], -100)
    with pytest.raises(ValueError, match="the unseen set carries no loss: all its labels are -100"):
        UnlearnStep(copy.deepcopy(model), made).prepare([batch | silent], [batch])
    with pytest.raises(ValueError, match="needs the batch keys idk_input_ids"):
        UnlearnStep(copy.deepcopy(model), made).prepare([batch], [batch])


def test_the_trainers_rows_may_have_unseen_ones():
    class Tokenizer:
        """Stands for a tokenizer of rows that are examples already."""

    pairs = paired({"forget": rows_of(1, 2), "retain": rows_of(3), "unseen": rows_of(4)}, levels(), Tokenizer())
    collator = pair_collator(levels(), None, pairs.forget, None, pairs.unseen)
    assert collator([pairs[0], pairs[1]])["forget"]["idk_input_ids"].tolist() == [[4, 5, 6]] * 2
