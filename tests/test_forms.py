"""A weight's gradient has one form in a step, whatever its micro-batches are like: fuzzed against one plain batch."""

import copy
import random

import pytest
import torch

from moe_unlearn import data as rows_of
from moe_unlearn.data import Example
from moe_unlearn.step import UnlearnStep
from tests.support.exactness import LEVERS, allowed
from tests.support.models import tiny_olmoe
from tests.support.steps import SMALL, VOCAB, made_of, recipe, weights

pytestmark = pytest.mark.quick
# two orders of sums in float64, through a model and a step; MOLLM solves a system that multiplies their difference
CLOSE, CLOSE_MOLLM = 2.0**-30, 2.0**-20
AXES = {
    "objective": ("ga", "graddiff", "uce", "npo", "simnpo", "idk_dpo", "kl_min", "rmu"),
    "lever": ("none", "trace", "wagle", "mollm", "mollm", "all"),
    "form": ("auto", "auto", "compact", "factors"),
    "accumulate": (1, 2, 3, 4),
    "guard": ("strict", "loss"),
    "scope": ("all", "experts"),
    "momentum": (0.0, 0.9),
}
STEPS = 2


def drawn(seed):
    """A case, and the lengths of its forget and retain rows in every micro-batch."""
    draw = random.Random(seed)
    while True:
        case = {axis: draw.choice(values) for axis, values in AXES.items()}
        if allowed(case) and (case["scope"] == "all" or case["lever"] == "trace"):
            break
    rows = [
        [[draw.choice((2, 5, 20, 60)) for _ in range(draw.choice((1, 2)))] for _ in range(2)]
        for _ in range(STEPS * case["accumulate"])
    ]
    return case, rows


def settings_of(case):
    name = {"uce": "graddiff"}.get(case["objective"], case["objective"])
    levers = {"none": (), "all": tuple(LEVERS)}.get(case["lever"], (case["lever"],))
    overrides = [
        *SMALL.get(name, []),
        *(line for lever in levers for line in LEVERS[lever]),
        "forget.gamma=0.5",
        "optimizer.name=sgd",
        f"optimizer.momentum={case['momentum']}",
        "optimizer.weight_decay=0.1",
        f"guard={case['guard']}",
        f"accumulate={case['accumulate']}",
    ]
    if case["objective"] == "uce":
        overrides.append("forget.objective=uce")
    if "mollm" in levers:
        overrides.append(f"mollm.gradients={case['form']}")
        if name == "rmu":
            overrides.append("mollm.kl=false")
    if case["scope"] == "experts":
        overrides.append("scope.kind=experts")
    return recipe(name, *overrides, lr=1e-2)


def collated(lengths, start, seed):
    draw = torch.Generator().manual_seed(seed)
    ids = [torch.randint(3, VOCAB, (length,), generator=draw).tolist() for length in lengths]
    return rows_of.collate([Example(row, [-100, *row[1:]], 1) for row in ids], range(start, start + len(ids)))


def batches_of(rows):
    """A pair of batches for each entry of `rows`."""
    pairs, starts = [], [0, 0]
    for seed, sides in enumerate(rows):
        pair = [collated(lengths, starts[i], 2 * seed + i) for i, lengths in enumerate(sides)]
        refused = collated([3 + length % 7 for length in sides[0]], starts[0], 1000 + seed)
        pair[0] |= {f"idk_{key}": refused[key] for key in ("input_ids", "attention_mask", "labels")}
        starts = [start + len(lengths) for start, lengths in zip(starts, sides, strict=True)]
        pairs.append(tuple(pair))
    return pairs


def joined(pairs):
    """One pair of batches with the rows of all."""
    return tuple(
        {
            key: torch.cat(
                [
                    torch.nn.functional.pad(b[key], (0, longest(side, key) - b[key].shape[-1]), value=fill(key))
                    if b[key].dim() == 2
                    else b[key]
                    for b in side
                ]
            )
            for key in side[0]
        }
        for side in zip(*pairs, strict=True)
    )


def longest(side, key):
    return max(batch[key].shape[-1] for batch in side)


def fill(key):
    return -100 if key.endswith("labels") else 0


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return tiny_olmoe(vocab_size=VOCAB).double().eval()


def run(model, settings, pairs, prepared=None, *, fused=True):
    """Return what steps of `pairs` change away from the reference, by step; their metrics; the state before."""
    step = UnlearnStep(copy.deepcopy(model), settings, fused=fused)
    every = [pair for group in pairs for pair in group]
    if prepared is None:
        step.prepare(*zip(*every, strict=True))
    else:
        step.load_state_dict({key: value for key, value in prepared.items() if key != "optimizer"})
    with torch.no_grad():
        for i, p in enumerate(step.model.parameters()):
            p.add_(0.02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(i), dtype=p.dtype))
    state, before = step.state_dict(), weights(step.model)
    metrics = [made_of(step, group) for group in pairs]
    return {name: after - before[name] for name, after in weights(step.model).items()}, metrics, state


def check_same(found, expected, close):
    assert any(change.any() for change in expected.values())
    for name, change in expected.items():
        assert float((found[name] - change).abs().max()) <= close * float(change.abs().max()), name


@pytest.mark.parametrize("seed", range(48))
@pytest.mark.slow(but=2)
def test_a_step_of_any_micro_batches_is_the_plain_step_of_all_rows(seed, model):
    case, rows = drawn(seed)
    settings, pairs = settings_of(case), batches_of(rows)
    groups = [pairs[i * case["accumulate"] : (i + 1) * case["accumulate"]] for i in range(STEPS)]
    expected, losses, prepared = run(model, settings, [[joined(group)] for group in groups], fused=False)
    found, own, _ = run(model, settings, groups, prepared)
    close = CLOSE if settings.mollm is None else CLOSE_MOLLM
    check_same(found, expected, close)
    for mine, whole in zip(own, losses, strict=True):
        for key in (key for key in whole if key.endswith("_loss")):
            assert mine[key] == pytest.approx(whole[key], rel=close, abs=close), key


@pytest.mark.parametrize("lengths", [(2, 100), (100, 2)])
def test_mollm_of_short_and_long_micro_batches(lengths, model):
    """On default settings: what is smaller for one of them is not for the other."""
    pairs = batches_of([[[length], [length]] for length in lengths])
    settings = recipe("mollm", "batch_size=1", "accumulate=2", "optimizer.name=sgd", "mollm.kl_floor=0", lr=1e-2)
    expected, _, prepared = run(model, settings, [[joined(pairs)]], fused=False)
    found, _, _ = run(model, settings, [pairs], prepared)
    check_same(found, expected, CLOSE_MOLLM)
