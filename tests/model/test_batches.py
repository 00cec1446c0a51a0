"""Batches: the model is called with all that is given for it, packed rows are rows, what is unknown is refused."""

import copy
import math

import pytest
import torch

from moe_unlearn.model.batches import KNOWN, checked, refusal, stack
from moe_unlearn.model.states import layer_states
from moe_unlearn.prepare.preparation import Preparation
from moe_unlearn.step import UnlearnStep
from moe_unlearn.step.objectives import Objectives
from tests.support.batches import random_batch, random_batches
from tests.support.models import tiny_olmoe
from tests.support.packed_rows import check_equal, examples, flattened, mean_nll, offsets
from tests.support.steps import VOCAB, recipe, weights

pytestmark = pytest.mark.quick


@pytest.fixture
def model():
    torch.manual_seed(0)
    return tiny_olmoe(vocab_size=VOCAB).eval()


def placed(batch, period=5):
    """The batch with positions that start again every `period` tokens."""
    rows, length = batch["input_ids"].shape
    return batch | {"position_ids": torch.arange(length).remainder(period).repeat(rows, 1)}


@pytest.mark.parametrize("joint", [True, False])
@pytest.mark.parametrize("sides", [("retain",), ("forget",), ("forget", "retain")], ids="+".join)
def test_losses_are_the_models_own_with_the_positions_given(model, sides, joint):
    batches = {"forget": random_batch(VOCAB, length=12, seed=1), "retain": random_batch(VOCAB, length=11, seed=2)}
    plain = dict(batches)
    for side in sides:
        batches[side] = placed(batches[side])
    model.double()
    objectives = Objectives(model, recipe("graddiff"), Preparation())
    with torch.no_grad():
        losses = objectives(*batches.values(), joint=joint)
        expected, without = ({s: mean_nll(model, b) for s, b in given.items()} for given in (batches, plain))
    assert bool(objectives.tokens_per_expert) == joint  # one forward pass, in which one side is padded
    assert -float(losses["forget"]) == pytest.approx(expected["forget"], rel=2e-6)
    assert float(losses["retain"]) == pytest.approx(expected["retain"], rel=2e-6)
    for side in sides:
        assert abs(expected[side] - without[side]) > 1e-3


def test_refusals_keep_the_positions_given():
    refused = placed(random_batch(VOCAB, length=9), 3)
    batch = checked(random_batch(VOCAB) | {f"idk_{key}": value for key, value in refused.items()}, "forget")
    check_equal(refusal(batch), refused)


def test_positions_of_one_row_are_those_of_all(model):
    batch = placed(random_batch(VOCAB))
    one = batch | {"position_ids": batch["position_ids"][:1]}
    check_equal(checked(one, "retain"), batch)
    step = UnlearnStep(model, recipe("graddiff"))
    assert step(one, one, update=False) == step(batch, batch, update=False)


def test_a_stack_gives_every_row_its_positions():
    rows, given = random_batch(VOCAB, rows=2, length=6), placed(random_batch(VOCAB, rows=1, length=8), 3)
    stacked, where = stack([rows, given])
    assert stacked["position_ids"].tolist() == [[0, 1, 2, 3, 4, 5, 0, 0]] * 2 + [[0, 1, 2, 0, 1, 2, 0, 1]]
    assert where == [slice(0, 2), slice(2, 3)]
    assert "position_ids" not in stack([rows, rows])[0]


def test_outputs_of_a_layer_are_of_the_positions_given(model):
    batch = placed(random_batch(VOCAB))
    with torch.no_grad():
        expected = model(**batch, output_hidden_states=True).hidden_states[1]
        assert torch.equal(layer_states(model, batch, 0), expected)


@pytest.mark.parametrize("on_disk", [False, True])
def test_references_are_of_the_positions_given(model, on_disk, tmp_path):
    forget, retain = ([placed(b) for b in random_batches(VOCAB, seed=s)] for s in (1, 2))
    model.double()
    folder = tmp_path if on_disk else None
    if on_disk:  # the same tokens where they stand without: rows of another content
        UnlearnStep(copy.deepcopy(model), recipe("npo")).prepare(
            *([{k: v for k, v in b.items() if k != "position_ids"} for b in side] for side in (forget, retain)),
            cache_dir=folder,
        )
    step = UnlearnStep(model, recipe("npo"))
    step.prepare(forget, retain, cache_dir=folder)
    # log-probs are cached in float32
    assert step(forget[0], retain[0])["forget_loss"] == pytest.approx(2 * math.log(2) / 0.1, rel=1e-6)


# the batches of a call, and what it has beside them
ENTRIES = {
    "prepare": lambda step, forget, retain: step.prepare([forget], [retain]),
    "step": lambda step, forget, retain: step(forget, retain),
    "sizes": lambda step, forget, retain: step.sizes([(forget, retain)]),
    "plan": lambda step, forget, retain: step.plan([forget], [retain]),
}


@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize("side", ["forget", "retain"])
def test_a_tensor_that_is_not_known_is_refused(model, side, entry):
    batches = {"forget": random_batch(VOCAB, seed=1), "retain": random_batch(VOCAB, seed=2)}
    batches[side]["token_type_ids"] = torch.zeros_like(batches[side]["input_ids"])
    before, step = weights(model), UnlearnStep(model, recipe("graddiff"))
    with pytest.raises(ValueError) as caught:
        ENTRIES[entry](step, *batches.values())
    assert str(caught.value).startswith(f"the {side} batch has token_type_ids, which nothing here reads; known are")
    assert all(key in str(caught.value) for key in KNOWN)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


@pytest.mark.slow
def test_what_is_no_tensor_is_left_alone(model):
    batch = random_batch(VOCAB)
    step, named = UnlearnStep(model, recipe("graddiff")), batch | {"source": ["a", "b"]}
    assert step(named, named, update=False) == step(batch, batch, update=False)
    assert step.plan([named], [named]).shape == "forget 4 x 12, retain 4 x 12"


@pytest.mark.parametrize("prefix", ["", "idk_"])
@pytest.mark.parametrize("form", [torch.Tensor.tolist, torch.Tensor.numpy], ids=["list", "array"])
def test_a_known_key_that_is_no_tensor_is_refused(form, prefix):
    row = placed(random_batch(VOCAB)) | {"index": torch.arange(4), "packing": torch.full((4,), 12)}
    row |= {
        "state_mask": row["labels"] != -100,
        "token_weights": torch.rand(4, 12),
        "ref_logprobs": torch.rand(4, 12),
        "ref_hidden_states": torch.rand(4, 12, 2),
    }
    row |= {key: torch.tensor([0, 12]) for key in ("cu_seq_lens_q", "cu_seq_lens_k", "seq_idx")}
    tried = [prefix + key for key in row if prefix + key in KNOWN]
    numbers = {f"{prefix}max_length_{side}" for side in "qk"}
    assert {*tried, *numbers} == {key for key in KNOWN if key.startswith("idk_") == bool(prefix)}
    for key in tried:
        given = form(row[key.removeprefix(prefix)])
        with pytest.raises(ValueError) as caught:
            checked(random_batch(VOCAB) | {key: given}, "retain")
        expected = f"the retain batch: {key} must be a tensor (torch.as_tensor({key})); got {type(given).__name__}"
        assert str(caught.value) == expected


@pytest.mark.parametrize("longest", [[5], "5"], ids=str)
def test_a_longest_length_is_a_number(longest):
    batch = flattened(examples(5, 4)) | offsets(0, 5, 9) | {"max_length_q": longest}
    with pytest.raises(ValueError, match="the retain batch: max_length_q must be a number; got"):
        checked(batch, "retain")


def test_a_key_without_a_value_is_not_given():
    batch = random_batch(VOCAB)
    nothing = dict.fromkeys({*KNOWN, "max_length_q", "idk_max_length_k"} - batch.keys())
    check_equal(checked(batch | nothing, "retain"), batch)


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            {"position_ids": torch.zeros(2, 12).long()},
            r"the forget batch: position_ids must be \[B, S\] = \[4, 12\]; got",
        ),
        ({"index": torch.zeros(4, 12).long()}, r"the forget batch: index must be \[B\] = \[4\]; got \[4, 12\]"),
        ({"state_mask": torch.ones(4).bool()}, r"the forget batch: state_mask must be \[B, S\] = \[4, 12\]; got \[4\]"),
        ({"state_mask": torch.ones(4, 12).long()}, r"state_mask must be bool \(state_mask.bool\(\)\); got torch.int64"),
        ({"labels": None}, "the forget batch has no 'labels'; got input_ids, attention_mask"),
        ({"idk_labels": torch.ones(4, 3)}, "the forget batch of refusals has no 'idk_input_ids'; got idk_labels"),
        (
            {f"idk_{k}": torch.ones(3, 9).long() for k in ("input_ids", "attention_mask", "labels")},
            "the forget batch has 4 rows and 3 refusals; expected one for each row",
        ),
    ],
)
def test_shapes_that_do_not_go_together(changes, message):
    with pytest.raises(ValueError, match=message):
        checked(random_batch(VOCAB) | changes, "forget")


@pytest.mark.parametrize(
    "name,factor", [*zip(("graddiff", "rmu", "npo", "kl_min", "seuf", "combined"), (2, 0.25) * 3, strict=True)]
)
@pytest.mark.slow
def test_a_token_is_attended_wherever_the_mask_is_not_0(model, name, factor):
    results = []
    for changed in (lambda mask: mask, lambda mask: mask * factor):
        sides = [[random_batch(VOCAB, seed=s)] for s in (1, 2)]
        for [batch] in sides:
            mask = batch["attention_mask"]
            batch["attention_mask"] = torch.where(torch.arange(12) < 6, mask, changed(mask))
        step = UnlearnStep(copy.deepcopy(model), recipe(name))
        step.prepare(*sides)
        [forget], [retain] = sides
        selected, caches = step.prepared.selected, step.plan(*sides).memory.get("reference caches")
        results.append((step.sizes([(forget, retain)]), step(forget, retain, update=False), caches, selected))
    (*ours, selected), (*theirs, expected) = results
    assert ours == theirs and (selected is expected or torch.equal(selected, expected))


@pytest.mark.parametrize("name", ["rmu", "pdu"])
def test_padding_has_no_state_whatever_the_mask_says(model, name):
    batch = random_batch(VOCAB, seed=2)
    assert (batch["attention_mask"] == 0).any()
    step = UnlearnStep(model, recipe(name))
    step.prepare([batch], [batch])
    masks = batch["attention_mask"].bool(), torch.ones(4, 12, dtype=torch.bool)
    results = []
    for mask in masks:
        given = batch | {"state_mask": mask}
        results.append((step.sizes([(given, given)]), step(given, given, update=False)))
        step.discard()
    assert results[0] == results[1]
    assert results[0][0]["forget"] == batch["attention_mask"].sum()
    if name == "rmu":  # unchanged, but cached in bfloat16
        squares = step.prepared.ref_layer_states.get(batch).float().square()
        assert results[0][1]["retain_loss"] <= torch.finfo(torch.bfloat16).eps ** 2 * squares.max()
