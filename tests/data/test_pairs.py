"""Forget/retain pairs: anchored on forget, fair to retain, the same for the same seed and epoch."""

from collections import Counter

import pytest
from torch.utils.data import DataLoader

from moe_unlearn.data import Example, ForgetRetainDataset, PairCollator, check_apart, draw, hold_out, overlap
from moe_unlearn.data.pairs import check_held_out
from moe_unlearn.lazy import Lazy

pytestmark = pytest.mark.quick


def examples(count, start):
    return [Example([start + i] * (2 + i % 3), [start + i] * (2 + i % 3), 1) for i in range(count)]


EIGHT = examples(8, 700)


def partners(dataset):
    return [index for i in range(len(dataset)) for _, index in dataset[i]["retain"]]


def test_every_forget_example_once_and_retain_fairly():
    dataset = ForgetRetainDataset(examples(50, 100), examples(20, 500), seed=1)
    assert len(dataset) == 50
    assert [dataset[i]["forget"] for i in range(50)] == [[(e, i)] for i, e in enumerate(dataset.forget)]
    assert set(Counter(partners(dataset)).values()) == {2, 3}
    [(example, index)] = dataset[3]["retain"]
    assert example == dataset.retain[index]
    with pytest.raises(IndexError):
        dataset[50]
    assert dataset[-1] == dataset[49]


@pytest.mark.parametrize("ratio,count", [(1.625, 65), (2.0, 80), (1.01, 40)])
def test_several_retain_examples_for_each_forget_example(ratio, count):
    dataset = ForgetRetainDataset(examples(40, 100), examples(65, 500), retain_per_forget=ratio)
    assert len(partners(dataset)) == count
    assert {len(dataset[i]["retain"]) for i in range(40)} <= {int(ratio), int(ratio) + 1}
    if count <= 65:
        assert len(set(partners(dataset))) == count
    batch = PairCollator()([dataset[i] for i in range(40)])
    assert len(batch["forget"]["input_ids"]) == 40 and batch["retain"]["index"].tolist() == partners(dataset)


def test_fewer_than_one_retain_example_is_an_error():
    with pytest.raises(ValueError, match="at least 1; got 0.5"):
        ForgetRetainDataset(examples(4, 0), examples(4, 9), retain_per_forget=0.5)


def test_partners_are_a_function_of_seed_and_epoch():
    def drawn(seed, epoch):
        dataset = ForgetRetainDataset(examples(9, 0), examples(40, 0), seed=seed)
        dataset.set_epoch(epoch)
        return partners(dataset)

    assert drawn(1, 2) == drawn(1, 2)
    assert len({tuple(drawn(s, e)) for s in range(3) for e in range(3)}) == 9
    dataset = ForgetRetainDataset(examples(9, 0), examples(40, 0), seed=1)
    dataset[4], dataset[2]  # reading in another order changes nothing
    assert partners(dataset) == drawn(1, 0)


def test_collated_pairs():
    dataset = ForgetRetainDataset(examples(6, 100), examples(6, 500), seed=0)
    batch = next(iter(DataLoader(dataset, batch_size=4, collate_fn=PairCollator(pad_id=9))))
    assert set(batch) == {"forget", "retain"}
    for side, start in (("forget", 100), ("retain", 500)):
        rows = batch[side]
        assert set(rows) == {"input_ids", "attention_mask", "labels", "index"}
        assert (rows["input_ids"][:, 0] == start + rows["index"]).all()
        padded = rows["attention_mask"] == 0
        assert (rows["input_ids"][padded] == 9).all() and (rows["labels"][padded] == -100).all()


@pytest.mark.parametrize("side", ["forget", "retain"])
def test_an_empty_side_is_an_error(side):
    sides = {"forget": examples(2, 0), "retain": examples(2, 9)} | {side: []}
    with pytest.raises(ValueError, match=f"the {side} set is empty"):
        ForgetRetainDataset(**sides)


def test_drawn_examples_depend_on_the_seed_alone_and_keep_their_order():
    examples = [Example([i], [i], 0) for i in range(20)]
    drawn = draw(examples, 5, seed=1)
    assert drawn == draw(examples, 5, seed=1) != draw(examples, 5, seed=2)
    assert len(drawn) == 5 and drawn == sorted(drawn, key=examples.index)
    assert draw(examples, 20, seed=1) == draw(examples, 99, seed=1) == examples


def of_documents(*lengths):
    """Return documents of so many rows each; the last one is the first one again."""
    made = [[Example([d, r], [d, r], 1, continues=r > 0) for r in range(n)] for d, n in enumerate(lengths)]
    return [row for document in [*made, made[0]] for row in document]


def test_a_share_of_the_documents_is_held_out_whole_and_by_seed():
    """No row of a document that is held out stays, nor one of a document with the same tokens."""
    rows = of_documents(*[1, 3, 2] * 7)
    for seed in range(6):
        kept, held = hold_out(rows, 0.29, seed=seed)
        assert len({row.input_ids[0] for row in held}) == 6, "of 21 documents"
        assert {row.input_ids[0] for row in held}.isdisjoint(row.input_ids[0] for row in kept)
        assert len(kept) + len(held) == len(rows) and [row for row in rows if row in held] == held
    assert hold_out(rows, 0.29, seed=1) == hold_out(rows, 0.29, seed=1) != hold_out(rows, 0.29, seed=2)
    lazy = hold_out(Lazy(len(rows), rows.__getitem__), 0.29, seed=1)
    assert [[*side] for side in lazy] == [*hold_out(rows, 0.29, seed=1)]


@pytest.mark.parametrize(
    "documents,share,count", [(9, 0.1, 0), (10, 0.1, 1), (10, 0.01, 1), (100, 0.29, 29), (30, 0, 0)]
)
def test_so_many_documents_are_held_out(documents, share, count):
    kept, held = hold_out(of_documents(*[1] * documents)[:-1], share, seed=0)
    assert (len(held), len(kept)) == (count, documents - count)
    with pytest.raises(ValueError, match="at least 0 and below 1; got 1"):
        hold_out(kept, 1, seed=0)


def test_rows_that_training_would_see_are_refused():
    for side, sets in (("forget", (EIGHT, [])), ("retain", ([], EIGHT))):
        with pytest.raises(
            ValueError, match=f"retain-eval and {side} sets overlap: 2 of 3 rows stand in the {side} set"
        ):
            check_held_out([*EIGHT[:2], *examples(1, 900)], *sets)
    check_held_out(examples(3, 900), EIGHT, EIGHT)


def test_overlap_counts_by_content():
    forget = [Example([1, 2], [1, 2], 1), Example([1, 2, 3], [1, 2, 3], 1), Example([4], [4], 1)]
    retain = [Example([1, 2], [-100, 2], 2), Example([4, 5], [4, 5], 1)]
    assert overlap(forget, retain) == 1  # the labels do not matter
    assert overlap(forget, []) == 0
    check_apart(forget[1:], retain)
    with pytest.raises(
        ValueError, match="the forget and retain sets overlap: 1 of 3 forget examples stand in the retain"
    ):
        check_apart(forget, retain)
