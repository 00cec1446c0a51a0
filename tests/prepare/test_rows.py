"""What is cached of a row is used for that row only: an index that comes again names the same content."""

import copy

import pytest
import torch

from moe_unlearn.step import UnlearnStep
from tests.support.batches import random_batches
from tests.support.models import tiny_olmoe
from tests.support.steps import VOCAB, recipe

pytestmark = pytest.mark.quick

# what is cached -> a recipe that caches it, and the side it is of
CACHED = {
    "reference log-probs": (("npo",), "forget"),
    "TRACE token weights": (("trace",), "retain"),
    "reference hidden states": (("kl_min",), "retain"),
    "reference hidden states of the forget rows": (("undial",), "forget"),
    "reference layer outputs": (("rmu",), "retain"),
}


@pytest.fixture
def model():
    torch.manual_seed(0)
    return tiny_olmoe(vocab_size=VOCAB).eval()


def sets(seed=0):
    """Both sides with indices, every row as long with any seed."""
    made = []
    for side in (1, 2):
        batches = random_batches(VOCAB, seed=side)
        for i, batch in enumerate(batches):
            if seed:
                shifted = 3 + (batch["input_ids"] - 3 + seed) % (VOCAB - 3)
                batch["input_ids"] = shifted * batch["attention_mask"]
                batch["labels"] = torch.where(batch["labels"] == -100, -100, batch["input_ids"])
            batch["index"] = torch.arange(len(batch["input_ids"])) + 4 * i
        made.append(batches)
    return made


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda state: state.pop("ref_hidden_states_forget"), "lacks 'ref_hidden_states_forget': another version"),
        (lambda state: state.update(ref_more=None), "also has 'ref_more': another version of moe_unlearn saved"),
    ],
    ids=["older", "newer"],
)
def test_a_state_of_another_version_is_refused_by_name(model, change, message):
    step = UnlearnStep(model, recipe("npo"))
    step.prepare(*sets())
    state = step.state_dict()
    change(state["prepared"])
    other = UnlearnStep(copy.deepcopy(model), recipe("npo"))
    with pytest.raises(ValueError, match=message):
        other.load_state_dict(state)
    assert not other.prepared.done and other.prepared.ref_logprobs is None


@pytest.mark.parametrize("kind", CACHED)
def test_a_state_that_was_prepared_on_other_rows_is_not_used(model, kind):
    (name, *overrides), side = CACHED[kind]
    step = UnlearnStep(copy.deepcopy(model), recipe(name, *overrides))
    step.prepare(*sets())
    resumed = UnlearnStep(model, step.recipe)
    resumed.load_state_dict(step.state_dict())
    resumed.prepare(*sets())  # the rows it was prepared on: nothing to say
    same, other = (dict(zip(("forget", "retain"), sets(seed), strict=True)) for seed in (0, 5))
    mixed = {**same, side: other[side]}
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    message = f"{kind}: row 0 of this batch has the index 0, under which prepare"
    with pytest.raises(ValueError, match=message):
        resumed.prepare(mixed["forget"], mixed["retain"])
    with pytest.raises(ValueError, match=message):
        resumed(mixed["forget"][0], mixed["retain"][0])
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    resumed(same["forget"][0], same["retain"][0])


@pytest.mark.parametrize("kind", CACHED)
def test_one_index_for_two_rows_is_refused_in_prepare(model, kind):
    (name, *overrides), side = CACHED[kind]
    made = dict(zip(("forget", "retain"), sets(), strict=True))
    made[side][2]["index"] = made[side][0]["index"]
    with pytest.raises(ValueError, match=f"{kind}: row 0 of this batch has the index 0 of another row"):
        UnlearnStep(model, recipe(name, *overrides)).prepare(made["forget"], made["retain"])


def test_refusals_are_rows_of_their_own(model):
    forget, retain = sets()
    for batch, refused in zip(forget, sets(9)[0], strict=True):
        batch |= {f"idk_{key}": refused[key] for key in ("input_ids", "attention_mask", "labels")}
    step = UnlearnStep(model, recipe("idk_dpo"))
    step.prepare(forget, retain)
    step(forget[0], retain[0], update=False)
    other = {**forget[0], **{f"idk_{key}": sets(11)[0][0][key] for key in ("input_ids", "attention_mask", "labels")}}
    with pytest.raises(ValueError, match="reference log-probs of the refusals: row 0 of this batch has the index 0"):
        step(other, retain[0])
