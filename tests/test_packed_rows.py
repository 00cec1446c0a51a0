"""Packed rows: each example is a row of its own, whatever the model's attention."""

import copy
import warnings

import pytest
import torch
from transformers import TrainingArguments

from moe_unlearn.data import Example, ForgetRetainDataset, PairCollator, collate, packed_batches
from moe_unlearn.model.batches import checked, padded, refusal, state_mask, target_mask
from moe_unlearn.model.states import layer_states
from moe_unlearn.step import UnlearnStep
from moe_unlearn.trace import routing_frequencies
from moe_unlearn.trainer import UnlearnTrainer
from moe_unlearn.wagle import weight_mask
from tests.support.batches import random_batch, with_refusals
from tests.support.models import TINY_MODELS, tiny_olmoe
from tests.support.packed_rows import check_equal, examples, flattened, mean_nll, offsets
from tests.support.steps import VOCAB, recipe, weights

pytestmark = pytest.mark.quick


@pytest.fixture
def model():
    torch.manual_seed(0)
    return tiny_olmoe(vocab_size=VOCAB).eval()


OPTIONS = {
    "positions": {},
    "offsets too": {"return_flash_attn_kwargs": True},
    "offsets alone": {"return_flash_attn_kwargs": True, "return_position_ids": False},
    "seq_idx alone": {"return_seq_idx": True, "return_position_ids": False},
    "all": {"return_flash_attn_kwargs": True, "return_seq_idx": True},
}


@pytest.mark.parametrize("options", OPTIONS)
def test_a_flattened_batch_is_its_rows(options):
    rows = examples(5, 9, 2, 7)
    expected = collate(rows, range(4))
    del expected["index"]
    batch = flattened(rows, **OPTIONS[options])
    check_equal(checked(batch, "retain"), expected)
    # a mask that leaves nothing out says no more than none
    ones = {"attention_mask": torch.ones_like(batch["input_ids"])}
    if options != "positions":
        check_equal(checked(batch | ones, "retain"), expected)
    indexed = batch | {"index": torch.tensor([7, 3, 0, 5])}
    check_equal(checked(indexed, "retain"), expected | {"index": indexed["index"]})


def test_packed_batches_are_their_rows(model):
    rows = examples(4, 3, 2, 5, 1)
    [batch] = packed_batches(rows, 8, model=model, batch_size=2, pad_id=9)
    order = [3, 1, 0, 2, 4]
    found = padded(batch)
    check_equal(found, collate([rows[i] for i in order], order))
    # by label alone: an example that carries none is taken for padding
    with pytest.warns(UserWarning, match=r"that carry no label are taken for padding .* give index \[B, S\]"):
        unnamed = padded({key: value for key, value in batch.items() if key != "index"})
    check_equal(unnamed, {k: v[:4] for k, v in found.items() if k != "index"})


def test_what_is_given_of_each_token_goes_with_it():
    rows = examples(2, 3)
    batch = flattened(rows) | {
        "state_mask": torch.tensor([[True, False, True, True, False]]),
        "token_weights": torch.arange(5.0)[None],
        "ref_hidden_states": torch.arange(10.0).view(1, 5, 2),
    }
    found = checked(batch, "retain")
    assert found["state_mask"].tolist() == [[True, False, False], [True, True, False]]
    assert found["token_weights"].tolist() == [[0, 1, 0], [2, 3, 4]]
    assert found["ref_hidden_states"].tolist() == [[[0, 1], [2, 3], [0, 0]], [[4, 5], [6, 7], [8, 9]]]


@pytest.mark.parametrize("packed", [False, True])
def test_refusals_stand_against_the_examples_of_a_packed_row(packed):
    rows, refused = examples(4, 6, 3), examples(3, 2, 5, seed=1)
    given = flattened(refused) if packed else collate(refused, range(3))
    expected = {k: v for k, v in collate(refused, range(3)).items() if k != "index"}
    batch = flattened(rows) | {f"idk_{key}": value for key, value in given.items()}
    found = checked(batch, "forget")
    check_equal({k.removeprefix("idk_"): v for k, v in found.items() if k.startswith("idk_")}, expected)


@pytest.mark.parametrize("packed", [False, True])
def test_refusals_are_those_of_the_rows_index(model, packed):
    rows, refused = examples(4, 6, 3), examples(13, 12, 15, seed=1)
    if packed:
        [given], [answers] = (packed_batches(side, 40, model=model) for side in (rows, refused))
    else:
        given, answers = collate(rows, range(3)), collate(refused[::-1], [2, 1, 0])
    found = checked(given | {f"idk_{key}": value for key, value in answers.items()}, "forget")
    order = found["index"].tolist()
    assert sorted(order) == [0, 1, 2] and (order == [1, 0, 2]) == packed
    expected = collate([refused[i] for i in order], order)
    check_equal(refusal(found), expected)
    check_equal(checked(found, "forget"), found)


def test_a_row_that_comes_twice_has_its_refusal_twice():
    rows, refused = examples(4, 6), examples(3, 5, seed=1)
    given = collate([rows[i] for i in (1, 0, 1)], [1, 0, 1])
    answers = {f"idk_{k}": v for k, v in collate([refused[i] for i in (1, 1, 0)], [1, 1, 0]).items()}
    check_equal(refusal(checked(given | answers, "forget")), collate([refused[i] for i in (1, 0, 1)], [1, 0, 1]))


def test_dpo_prefers_the_refusal_of_each_row(model):
    rows, refused = examples(5, 9, 7), examples(8, 4, 6, seed=1)
    retain = random_batch(VOCAB, seed=2)
    results = []
    for order in ([0, 1, 2], [2, 0, 1]):
        answers = {f"idk_{k}": v for k, v in collate([refused[i] for i in order], order).items()}
        forget = collate(rows, range(3)) | answers
        step = UnlearnStep(copy.deepcopy(model), recipe("idk_dpo"))
        step.prepare([forget], [retain])
        results.append([step(forget, retain)["forget_loss"] for _ in range(2)])
    assert results[0] == results[1]


@pytest.mark.parametrize(
    "index, other, message",
    [
        (
            [0, 1, 2],
            [0, 1, 3],
            r"the forget batch: idk_index must name the rows of index, \[0, 1, 2\]; got \[0, 1, 3\]",
        ),
        ([0, 1, 2], [0, 1, 1], r"got \[0, 1, 1\]"),
        (None, [5, 7, 9], r"the rows, which have no index, by their places, \[0, 1, 2\]; got \[5, 7, 9\]"),
    ],
)
def test_refusals_of_other_rows(index, other, message):
    given = collate(examples(4, 6, 3), range(3) if index is None else index)
    if index is None:
        del given["index"]
    answers = {f"idk_{k}": v for k, v in collate(examples(3, 2, 5, seed=1), other).items()}
    with pytest.raises(ValueError, match=message):
        checked(given | answers, "forget")


@pytest.mark.parametrize(
    "changes, message",
    [
        (offsets(1, 5, 9), r"cu_seq_lens_q must rise from 0 to the length .* 9; got \[1, 5, 9\] for 1 row$"),
        (offsets(0, 5, 5, 9), r"must rise from 0 .* got \[0, 5, 5, 9\]"),
        (offsets(0, 5, 8), r"must rise from 0 to the length of the one row that it is of, 9; got \[0, 5, 8\]"),
        (offsets(), r"must rise from 0 .* got \[\]"),
        (
            offsets(0, 5, 9) | offsets(0, 4, 9, name="cu_seq_lens_k"),
            r"position_ids and cu_seq_lens_k do not part row 0 at the same tokens \(first at 4\)",
        ),
        (offsets(0, 9), r"position_ids and cu_seq_lens_q do not part row 0 at the same tokens \(first at 5\)"),
        (
            {"position_ids": torch.tensor([[3, 4, 5, 6, 7, 0, 1, 2, 3]])},
            r"position_ids of a packed row must be 0 where an example begins; got 3 at row 0, token 0 .*attention_mask",
        ),
        ({"position_ids": torch.tensor([[0, 1, 2, 3, 4, 2, 3, 4, 5]])}, r"got 2 at row 0, token 5"),
        (offsets(0, 5, 9) | {"max_length_q": 4}, r"max_length_q is 4, but an example has 5 tokens"),
        (offsets(0, 5, 9) | {"attention_mask": torch.tensor([[1] * 8 + [0]])}, r"attention_mask leaves out tokens"),
        ({"index": torch.tensor([[0, 0, 0, 0, 1, 1, 1, 1, 1]])}, r"index must be the same for all tokens"),
        ({"index": torch.arange(3)}, r"index must be .* or one number for each of 2 packed examples; got \[3\]"),
        ({"labels": torch.full((1, 9), -100)}, r"has no rows: none of its packed examples has a label"),
    ],
)
def test_packed_rows_that_say_two_things(changes, message):
    with pytest.raises(ValueError, match=message):
        checked(flattened(examples(5, 4)) | changes, "retain")


def test_offsets_are_of_one_row():
    batch = {"input_ids": torch.ones(2, 4).long(), "labels": torch.ones(2, 4).long()} | offsets(0, 4, 8)
    with pytest.raises(ValueError, match=r"for 2 rows$"):
        checked(batch, "retain")


def test_a_packed_row_that_was_not_made_rows_is_not_computed(model):
    with pytest.raises(ValueError, match="expected padded rows, with an attention_mask"):
        target_mask(flattened(examples(5, 4)))
    with pytest.raises(ValueError, match="expected padded rows, with an attention_mask"):
        layer_states(model, flattened(examples(5, 4), return_flash_attn_kwargs=True), 0)


@pytest.mark.parametrize("name", ["graddiff", "simnpo", "rmu", "combined", "seuf-wmdp", "idk_dpo", "level"])
@pytest.mark.slow
def test_a_step_of_packed_rows_is_that_of_the_rows(model, name):
    sides = [examples(5, 9, 7, seed=1), examples(4, 8, 6, 3, seed=2)]
    rows = [{k: v for k, v in collate(s, range(len(s))).items() if k != "index"} for s in sides]
    packed = [flattened(s, return_flash_attn_kwargs=True) for s in sides]
    if name in ("idk_dpo", "level"):
        refused = {f"idk_{k}": v for k, v in collate(examples(3, 4, 5, seed=3), range(3)).items() if k != "index"}
        rows[0] |= refused
        packed[0] |= refused
    made = recipe(name)
    results = []
    for forget, retain in (rows, packed):
        step = UnlearnStep(copy.deepcopy(model), made)
        sizes = step.sizes([(forget, retain)])
        step.prepare([forget], [retain])
        plan = str(step.plan([forget], [retain])) if name == "graddiff" else None  # of which the rest says no more
        results.append([sizes, step(forget, retain, sizes=sizes), plan, weights(step.model)])
    *ours, changed = results[1]
    *theirs, expected = results[0]
    assert ours == theirs
    check_equal(changed, expected)


def texts(*lengths, seed=0):
    """Examples as `encode` makes them of plain texts: every token has a label, the first too."""
    return [Example(row.input_ids, row.input_ids, 0) for row in examples(*lengths, seed=seed)]


@pytest.mark.parametrize("name", ["rmu", "npo", "undial", "ceu"])
def test_a_label_that_nothing_predicts_means_nothing(model, name):
    sides = [texts(9, 7, 5, seed=1), texts(8, 6, 4, 3, seed=2)]  # longest first, as they are packed
    packed = [packed_batches(side, 40, model=model)[0] for side in sides]
    rows = [collate(side, range(len(side))) for side in sides]
    unlabelled = [batch | {"labels": batch["labels"].clone()} for batch in rows]
    for batch in unlabelled:
        batch["labels"][:, 0] = -100
    results = []
    for forget, retain in (unlabelled, rows, packed):
        step = UnlearnStep(copy.deepcopy(model), recipe(name))
        step.prepare(rows[:1], rows[1:])  # a row is the one that was prepared, with the label or without
        sizes = step.sizes([(forget, retain)])
        results.append((sizes, step(forget, retain, sizes=sizes), weights(step.model)))
    for sizes, metrics, changed in results[1:]:
        assert (sizes, metrics) == results[0][:2]
        check_equal(changed, results[0][2])


NOTHING = {
    "ceu": (["forget.ignore_first_n_answer_tokens=50"], "forget", "ceu loss: .*_answer_tokens is 50, which leaves"),
    "rmu": ([], "forget", "rmu loss: its state_mask is false everywhere"),
    "rmu ": ([], "retain", "embed_diff loss: its state_mask is false everywhere"),
    "pdu": ([], "forget", "logit_margin loss: its state_mask"),
    "graddiff": (["forget.objective=idk_nll"], "forget", "idk_nll loss: the labels of its refusals are all -100"),
}


@pytest.mark.parametrize("name", NOTHING)
def test_a_side_without_anything_to_compute_is_refused_before_a_step(model, name):
    overrides, side, message = NOTHING[name]
    made, labels = recipe(name.strip(), *overrides), torch.full((4, 9), -100)
    batches = {"forget": with_refusals(random_batch(VOCAB, seed=1)), "retain": random_batch(VOCAB, seed=2)}
    step = UnlearnStep(model, made)
    kept = batches[side]
    batches[side] = kept | {"state_mask": torch.zeros(4, 12, dtype=torch.bool)}
    if "idk_nll" in message:
        batches[side]["idk_labels"] = labels
    with pytest.raises(ValueError, match=f"the {side} set carries no {message}"):
        step.prepare(*([batch] for batch in batches.values()))
    assert not step.prepared.done
    if name != "ceu":  # one batch of several is enough
        step.prepare(*([batches[s], kept] if s == side else [batches[s]] for s in batches))


def test_states_count_where_a_label_is_predicted():
    batch = {
        "attention_mask": torch.tensor([[1, 1, 1, 1, 0], [0, 0, 1, 1, 1], [1, 1, 0, 1, 1]]),
        "labels": torch.tensor([[5, -100, 7, 8, 9], [4, 5, 6, -100, 3], [4, 5, 6, 7, 8]]),
    }
    assert state_mask(batch).int().tolist() == [[0, 0, 1, 1, 0], [0, 0, 0, 0, 1], [0, 1, 0, 0, 1]]


@pytest.mark.parametrize("name", ["npo", "simnpo", "seuf-wmdp"])
def test_an_index_keeps_examples_that_carry_no_label(model, name):
    rows = [*examples(5, 9), Example([4, 5, 6], [-100] * 3, 3), *examples(1, 6, seed=1)]
    separate, packed = collate(rows, range(5)), flattened(rows)
    number = torch.tensor([[i for i, row in enumerate(rows) for _ in row.input_ids]])
    results = []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for forget in (separate, packed | {"index": number}):
            step = UnlearnStep(copy.deepcopy(model), recipe(name))
            step.prepare([forget], [random_batch(VOCAB, seed=2)])
            retain = random_batch(VOCAB, seed=2)
            results.append((step.sizes([(forget, retain)]), step(forget, retain, update=False)))
    assert results[0] == results[1]
    with pytest.warns(UserWarning, match="the forget batch: examples of packed rows that carry no label"):
        left = checked(packed, "forget")
    assert len(left["input_ids"]) == 3 < len(rows)


@pytest.mark.parametrize("family", ["olmoe", "gpt_oss"])  # one that keeps packed examples apart, and one that does not
def test_losses_of_a_packed_row_are_the_models_of_rows_alone(family):
    torch.manual_seed(0)
    model = TINY_MODELS[family]().eval().double()
    rows = examples(5, 9, 4)
    step = UnlearnStep(model, recipe("graddiff"))
    with torch.no_grad():
        alone = [
            mean_nll(model, {"input_ids": ids, "labels": ids}) * (len(row) - 1)
            for row in rows
            for ids in [torch.tensor([row.input_ids])]
        ]
    loss = step(flattened(rows), flattened(rows), update=False)["retain_loss"]
    assert loss == pytest.approx(float(sum(alone)) / 15, rel=2e-6)


def test_masks_and_frequencies_of_packed_rows_are_those_of_the_rows(model):
    sides = [examples(5, 9, 7, seed=1), examples(4, 8, 6, seed=2)]
    packed, rows = [[flattened(s)] for s in sides], [[collate(s, range(3))] for s in sides]
    found, expected = (routing_frequencies(model, given[0]) for given in (packed, rows))
    assert torch.equal(found.counts, expected.counts) and found.tokens == expected.tokens
    found, expected = (weight_mask(model, *given, keep=0.3, gamma=1.0) for given in (packed, rows))
    check_equal(found.packed, expected.packed)


@pytest.mark.slow
def test_a_trainer_whose_collator_packs(model, tmp_path):
    dataset = ForgetRetainDataset(examples(5, 9, 7, 6, seed=1), examples(4, 8, 6, 7, 5, seed=2), seed=0)

    def packing(items):
        return {side: flattened([e for item in items for e, _ in item[side]]) for side in ("forget", "retain")}

    def unnamed(items):
        made = PairCollator()(items)
        return {side: {k: v for k, v in batch.items() if k != "index"} for side, batch in made.items()}

    results = []
    for name, collator in (("packed", packing), ("rows", unnamed)):
        args = TrainingArguments(
            output_dir=str(tmp_path / name),
            per_device_train_batch_size=2,
            per_device_eval_batch_size=2,
            max_steps=2,
            gradient_accumulation_steps=2,
            save_strategy="no",
            logging_steps=1,
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
        )
        changing = copy.deepcopy(model)
        trainer = UnlearnTrainer(changing, args, recipe("npo"), dataset, data_collator=collator, eval_dataset=dataset)
        trainer.train()
        logged = [e["forget_loss"] for e in trainer.state.log_history if "forget_loss" in e]
        results.append((logged, trainer.evaluate()["eval_loss"], weights(changing)))
    (*ours, changed), (*theirs, expected) = results
    assert ours == theirs and len(ours[0]) == 2
    check_equal(changed, expected)
