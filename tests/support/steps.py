"""What tests of the unlearning step share: small data, recipes and comparisons of whole models."""

import torch

from moe_unlearn.config import Recipe
from moe_unlearn.step import UnlearnStep
from moe_unlearn.testing import assert_as_accurate
from tests.support.batches import random_batches, with_refusals

VOCAB = 64
SMALL = {
    # a random model is already unlikely enough for the default beta
    "simnpo": ["forget.beta=0.2"],
    "wga": ["forget.beta=0.1"],
    "satimp": ["forget.beta1=0.1"],
    # a random model is nearly as it is asked to be: no router may see another input, or what that moves is more
    "undial": ["scope.kind=parameters", r"scope.parameters=['lm_head','layers\.1\.mlp\.experts']"],
    "rmu": ["forget.layer=1", r"scope.parameters=['layers\.[01].*down_proj']"],
    "trace": ["trace.min_ratio=1.01", "trace.eta=0.3"],
    "combined": ["trace.min_ratio=1.01", "trace.eta=0.3"],
}


def data(seed=0):
    forget = [with_refusals(b, seed=i) for i, b in enumerate(random_batches(VOCAB, seed=seed + 1))]
    return forget, random_batches(VOCAB, seed=seed + 2)


def recipe(name, *overrides, lr=1e-3):
    # the recipes of a paper's settings begin with its name
    return Recipe.load(name, [*SMALL.get(name.partition("-")[0], []), f"optimizer.lr={lr}", *overrides])


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def changed(model, before):
    return {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}


def check_changes(model, ours, reference, gold, *, only_changed=False):
    """Hold weights against those of a `Reference` that gives weights, both after a step over those of `model`.

    The change, not the weight: a missing update would hide in the weight's own rounding.
    """
    for name, start in model.named_parameters():

        def change(made, name=name, start=start):
            return made[name].double() - start.double()

        truth = change(gold)
        if only_changed and not truth.any():
            assert not change(ours).any() and not change(reference.value).any(), name
            continue
        assert truth.abs().max() > 0
        baseline = reference.baseline(lambda made, change=change: change(made).float())
        assert_as_accurate(change(ours).float(), baseline, truth, name=name)


def prepared(model, made, **options):
    step = UnlearnStep(model, made, **options)
    forget, retain = data()
    step.prepare(forget, retain)
    return step, forget, retain


def made_of(step, pairs):
    """The metrics of one step whose micro-batches are these pairs of batches."""
    sizes = step.sizes(pairs)
    return [step(*pair, update=i == len(pairs) - 1, sizes=sizes) for i, pair in enumerate(pairs)][-1]
