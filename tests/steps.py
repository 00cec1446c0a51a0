"""What tests of the unlearning step share: small data, recipes and comparisons of whole models."""

import torch

from moe_unlearn.config import Recipe
from moe_unlearn.step import UnlearnStep
from moe_unlearn.testing import assert_as_accurate
from tests.batches import random_batches, with_refusals

VOCAB = 64
SMALL = {
    # a random model is already unlikely enough for the default beta
    "simnpo": ["forget.beta=0.2"],
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


def check_changes(model, results, *, only_changed=False):
    """The change, not the weight: a missing update would hide in the weight's own rounding."""
    for name, start in model.named_parameters():
        change = [results[k][name].double() - start.double() for k in ("ours", "baseline", "gold")]
        if only_changed and not change[2].any():
            assert not change[0].any() and not change[1].any(), name
            continue
        assert change[2].abs().max() > 0
        assert_as_accurate(change[0].float(), change[1].float(), change[2], name=name)


def prepared(model, made, **options):
    step = UnlearnStep(model, made, **options)
    forget, retain = data()
    step.prepare(forget, retain)
    return step, forget, retain
