"""Rows are found by index or by content, whatever the batch and the padding."""

import pytest
import torch

from moe_unlearn.cache import RowCache, row_keys

pytestmark = pytest.mark.quick


def batch(*rows, pad_left=0, pad_right=0, index=None):
    """Rows of token ids, padded on both sides as asked; labels equal the ids."""
    width = max(map(len, rows))
    ids = torch.zeros(len(rows), pad_left + width + pad_right, dtype=torch.int64)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
    for i, row in enumerate(rows):
        where = slice(pad_left, pad_left + len(row))
        ids[i, where] = labels[i, where] = torch.tensor(row)
        mask[i, where] = 1
    out = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    return out | ({"index": torch.tensor(index)} if index else {})


def values(made, offset=0.0):
    return (made["input_ids"] + offset) * made["attention_mask"]


def test_found_in_another_batch_with_other_padding():
    cache = RowCache("test values")
    first = batch([5, 6, 7], [8, 9])
    cache.put(first, values(first, 0.5))
    again = batch([8, 9], pad_left=3, pad_right=2)
    assert torch.equal(cache.get(again), values(again, 0.5))
    assert cache.nbytes == 5 * 4 and len(cache) == 2


def test_trailing_dimensions():
    cache = RowCache("states")
    made = batch([5, 6, 7], [8, 9])
    states = torch.randn(2, 3, 4).to(torch.bfloat16)
    cache.put(made, states)
    assert torch.equal(cache.get(made), states * made["attention_mask"][..., None])


def test_labels_are_part_of_the_content():
    one, other = batch([5, 6, 7]), batch([5, 6, 7])
    other["labels"][0, 0] = -100
    assert row_keys(one) != row_keys(other)


def test_index_wins_over_content():
    cache = RowCache("test values")
    made = batch([5, 6], [7, 8], index=[3, 4])
    cache.put(made, values(made))
    same_index = batch([1, 2], index=[4])
    assert cache.get(same_index).tolist() == [[7, 8]]


def test_errors_name_the_rows():
    cache = RowCache("reference log-probs")
    made = batch([5, 6], index=[3])
    cache.put(made, values(made))
    with pytest.raises(KeyError, match=r"reference log-probs: rows \[1\] .* saw 1 rows"):
        cache.get(batch([5, 6], [7, 8], index=[3, 9]))
    with pytest.raises(ValueError, match="row 0 has 3 tokens but 2 were cached under its key 'index 3'"):
        cache.get(batch([5, 6, 7], index=[3]))
    with pytest.raises(ValueError, match="`index` must name each row once"):
        cache.put(batch([5, 6, 7], index=[3]), torch.zeros(1, 3))


def test_state_round_trip():
    cache, other = RowCache("test values"), RowCache("test values")
    made = batch([5, 6, 7], [8, 9])
    cache.put(made, values(made, 0.25))
    other.load_state_dict(cache.state_dict())
    assert torch.equal(other.get(made), cache.get(made))
    empty = RowCache("empty")
    empty.load_state_dict(RowCache("empty").state_dict())
    assert len(empty) == 0
