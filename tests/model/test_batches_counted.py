"""Batches on their way into a model: which rows count, what is passed on."""

import pytest
import torch

from moe_unlearn.model.batch_sets import counted_row
from moe_unlearn.model.batches import target_mask
from moe_unlearn.step import UnlearnStep
from tests.support.batches import random_batch, random_batches
from tests.support.models import tiny_olmoe
from tests.support.steps import VOCAB, data, recipe

pytestmark = pytest.mark.quick


def silent(batch, rows):
    """The batch with no label in `rows`."""
    labels = batch["labels"].clone()
    labels[rows] = -100
    return batch | {"labels": labels}


def where_rows_are_silent(kind):
    batches = random_batches(VOCAB, seed=2)
    first = {"first row": [0], "first batch": slice(None), "nowhere": []}[kind]
    return [silent(batches[0], first), *batches[1:]]


@pytest.mark.parametrize("kind", ["first row", "first batch", "nowhere"])
def test_the_head_is_verified_on_a_row_that_carries_a_loss(kind):
    model, (forget, _) = tiny_olmoe(vocab_size=VOCAB).eval(), data()
    retain = where_rows_are_silent(kind)
    batch, row = {"first row": (0, 1), "first batch": (1, 0), "nowhere": (0, 0)}[kind]
    counted = counted_row(retain)
    assert all(torch.equal(value, retain[batch][key][row : row + 1]) for key, value in counted.items())
    assert target_mask(counted).any()
    UnlearnStep(model, recipe("npo")).prepare(forget, retain)
    # and it is verified: a head that does more is still found
    model.lm_head.register_forward_hook(lambda m, args, out: out * 1.2)
    with pytest.raises(ValueError, match="its logits are not the head"):
        UnlearnStep(model, recipe("npo")).prepare(forget, retain)


def test_no_row_that_counts():
    with pytest.raises(ValueError, match="expected a row that carries a loss"):
        counted_row([silent(random_batch(VOCAB), slice(None))] * 2)
