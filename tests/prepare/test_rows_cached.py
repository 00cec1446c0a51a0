"""Rows are found by index or by content, whatever the batch and the padding; on disk they are never trusted."""

import json
import os
import re
import resource
import time
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from moe_unlearn.files import UNFINISHED
from moe_unlearn.model.digest import tensor_digest
from moe_unlearn.prepare.rows import RowCache, RowStore, content_keys, row_keys, rows_of

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
    other["labels"][0, 0] = -100  # the first token's, which nothing predicts
    assert content_keys(one) == content_keys(other)
    other["labels"][0, 1] = -100
    assert content_keys(one) != content_keys(other)


def test_an_index_finds_a_row_and_its_content_is_compared():
    cache = RowCache("test values")
    made = batch([5, 6], [7, 8], index=[3, 4])
    cache.put(made, values(made, 0.5))
    again = batch([7, 8], pad_left=1, index=[4])
    assert torch.equal(cache.get(again), values(again, 0.5))
    # the number of tokens says nothing
    for other in (batch([1, 2], index=[4]), batch([7, 8], index=[3]), batch([5, 6], index=[4])):
        with pytest.raises(ValueError, match=r"test values: row 0 of this batch has the index \d, under which prepare"):
            cache.get(other)
    relabelled = batch([7, 8], index=[4])
    relabelled["labels"][0, 1] = -100
    with pytest.raises(ValueError, match="its tokens or labels differ"):
        cache.known_keys(relabelled)


@pytest.mark.parametrize("again", [False, True], ids=["within a batch", "in another batch"])
def test_an_index_that_names_two_rows_is_refused_and_nothing_is_put(again):
    cache = RowCache("test values")
    if again:
        first, second = batch([5, 6], index=[3]), batch([9], [7, 8], index=[2, 3])
        cache.put(first, values(first))
    else:
        second = batch([5, 6], [7, 8], index=[3, 3])
    with pytest.raises(ValueError, match="row 1 of this batch has the index 3 of another row; `index` must name each"):
        cache.put(second, values(second))
    assert len(cache) == again
    cache.put(batch([5, 6], [5, 6], index=[3, 3]), torch.ones(2, 2))  # one row twice is one row
    assert len(cache) == 1


def test_errors_name_the_rows():
    cache = RowCache("reference log-probs")
    made = batch([5, 6], index=[3])
    cache.put(made, values(made))
    with pytest.raises(ValueError, match=r"reference log-probs: rows \[1\] .* saw 1 rows"):
        cache.get(batch([5, 6], [7, 8], index=[3, 9]))
    with pytest.raises(ValueError, match=r"rows \[0\] .* saw 1 rows"):
        cache.known_keys(batch([5, 6]))
    with pytest.raises(ValueError, match="expected a state with the contents of its rows; it has none"):
        cache.load_state_dict({k: v for k, v in cache.state_dict().items() if k != "contents"})


def test_state_round_trip():
    cache, other = RowCache("test values"), RowCache("test values")
    made = batch([5, 6, 7], [8, 9])
    cache.put(made, values(made, 0.25))
    other.load_state_dict(cache.state_dict())
    assert torch.equal(other.get(made), cache.get(made))
    indexed = batch([5, 6], index=[1])
    cache.put(indexed, values(indexed))
    other.load_state_dict(cache.state_dict())
    with pytest.raises(ValueError, match="row 0 of this batch has the index 1"):
        other.get(batch([6, 5], index=[1]))
    empty = RowCache("empty")
    empty.load_state_dict(RowCache("empty").state_dict())
    assert len(empty) == 0


def test_content_keys_ignore_index_and_padding_and_see_everything_else():
    plain = content_keys(batch([5, 6, 7], [8, 9]))
    assert plain == content_keys(batch([5, 6, 7], [8, 9], pad_left=2, pad_right=3, index=[9, 4]))
    assert plain == row_keys(batch([5, 6, 7], [8, 9]), plain) != row_keys(batch([5], [6], index=[0, 1]), plain)
    gap, label_on_padding = batch([5, 6, 0, 7]), batch([5, 6, 7], pad_right=1)
    gap["attention_mask"][0, 2] = 0
    label_on_padding["labels"][0, 3] = 4  # predicted by the last attended token
    assert len({plain[0], *content_keys(gap), *content_keys(label_on_padding)}) == 3
    assert len(set(content_keys(batch([5, 6], [5, 6], [], [])))) == 2


def test_content_keys_see_positions_that_a_model_does_not_take_by_itself():
    def placed(made, *positions):
        return made | {"position_ids": torch.tensor(positions)}

    made, left = batch([5, 6, 7], [8, 9]), batch([5, 6, 7], [8, 9], pad_left=2)
    plain = content_keys(made)
    # what caches on disk hold stays found
    assert plain == content_keys(placed(made, [0, 1, 2], [0, 1, 7])) == content_keys(placed(made, [0, 1, 2], [0, 1, 0]))
    assert plain == content_keys(placed(left, [0, 0, 0, 1, 2], [0, 0, 0, 1, 9]))
    assert plain == content_keys(placed(left, [0, 1, 2, 3, 4], [0, 1, 2, 3, 4]))
    again, shifted = (content_keys(placed(made, *rows)) for rows in (([0, 1, 0], [0, 0, 1]), ([1, 2, 3], [1, 2, 3])))
    assert again == content_keys(placed(left, [3, 3, 0, 1, 0], [3, 3, 0, 0, 3]))
    assert len({*plain, *again, *shifted}) == 6
    gap = batch([5, 6, 0, 7])
    gap["attention_mask"][0, 2] = 0
    closed, kept = placed(gap, [0, 1, 0, 2]), placed(gap, [0, 1, 2, 3])
    assert content_keys(gap) == content_keys(kept) != content_keys(closed)
    assert content_keys(placed(batch([]), [])) == content_keys(batch([]))


def rows(*names, length=3, width=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {n: torch.randn(length + i, width, generator=generator).bfloat16() for i, n in enumerate(names)}


def lengths(stored):
    return {key: len(row) for key, row in stored.items()}


def check_equal(found, expected):
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key].read(), expected[key]) for key in expected)


@pytest.fixture
def store(tmp_path):
    return RowStore(tmp_path / "states-0", torch.bfloat16, (2,))


def only_file(store):
    (path,) = store.folder.iterdir()
    return path


def test_a_store_gives_back_what_was_written(store):
    assert store.read({"a": 3}) == {} and not store.folder.exists()
    first, second = rows("a", "b"), rows("b", "c", seed=1)
    store.write(first)
    store.write({})
    check_equal(store.read(lengths(first)), first)
    store.write({"c": second["c"]})
    everything = first | {"c": second["c"]}
    again = RowStore(store.folder, store.dtype, store.shape)
    check_equal(again.read(lengths(everything) | {"unknown": 7}), everything)
    check_equal(again.read({"b": 4}), {"b": first["b"]})
    assert len(list(store.folder.iterdir())) == 2


def test_a_row_in_two_files_is_read_once(store):
    store.write(rows("a"))
    store.write(rows("a", "b"))
    flip(max(store.folder.iterdir()))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_equal(store.read({"a": 3}), {"a": rows("a")["a"]})


def test_empty_rows_are_stored(store):
    empty = {"a": torch.zeros(0, 2, dtype=torch.bfloat16)}
    store.write(empty)
    check_equal(store.read({"a": 0}), empty)
    cache, made = RowCache("values"), batch([5, 6], [])
    cache.put_rows(made, rows_of(made, values(made)))
    assert cache.get(made).tolist() == [[5, 6], [0, 0]]


def flip(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def change_header(path, **changes):
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    metadata["rows"] = json.dumps(json.loads(metadata["rows"]) | changes)
    save_file(load_file(path), path, metadata)


DAMAGE = {
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-3]),
    "empty": lambda path: path.write_bytes(b""),
    "flipped bit": flip,
    "huge header": lambda path: path.write_bytes(b"\xff" * 64),
    "pickle": lambda path: path.write_bytes(b"\x80\x04cos\nsystem\n(S'true'\ntR."),
    "no metadata": lambda path: save_file({"values": torch.zeros(7, 2)}, path),
    "other tensors": lambda path: save_file({"x": torch.zeros(7)}, path, {"rows": "[]", "sha256": ""}),
    "deep header": lambda path: save_file({"values": torch.zeros(7)}, path, {"rows": "[" * 10**5, "sha256": ""}),
    "exchanged keys": lambda path: change_header(path, keys=["b", "a"]),
    "other lengths": lambda path: change_header(path, lengths=[4, 3]),
    "negative lengths": lambda path: change_header(path, lengths=[-1, 8]),
    "keys that are lists": lambda path: change_header(path, keys=[["a"], ["b"]]),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_is_named_once_and_replaced_by_the_next_write(store, damage):
    stored = rows("a", "b")
    store.write(stored)
    DAMAGE[damage](only_file(store))
    with pytest.warns(UserWarning, match="computed again") as caught:
        assert store.read(lengths(stored)) == {}
    assert len(caught) == 1 and str(only_file(store)) in str(caught[0].message)
    store.write(stored)
    assert only_file(store).stat().st_size > 100, "in the place of the damaged one"
    check_equal(store.read(lengths(stored)), stored)


def test_forged_files_with_a_right_checksum_are_not_used(store):
    """Nothing keeps a stranger from writing checksums: what is read must still fit what was asked for."""
    wide = RowStore(store.folder, torch.float32, (3,))
    wide.write({"a": torch.zeros(3, 3)})
    with pytest.warns(UserWarning, match=r"expected torch.bfloat16 \[tokens, \*\(2,\)\]; got torch.float32 \[3, 3\]"):
        assert store.read({"a": 3}) == {}
    only_file(store).unlink()
    store.write(rows("a"))
    with pytest.warns(UserWarning, match="row a has 5 tokens; got 3"):
        assert store.read({"a": 5}) == {}


def test_a_file_of_another_kind_renamed_into_place_is_not_used(store, tmp_path):
    other = RowStore(tmp_path / "states-1", torch.bfloat16, (2,))
    other.write(rows("a"))
    store.write(rows("b"))
    moved = store.folder / only_file(other).name
    only_file(other).rename(moved)
    with pytest.warns(UserWarning, match=f"{moved.name} .* expected rows of states-0; got .* of states-1"):
        check_equal(store.read({"a": 3, "b": 3}), rows("b"))
    assert moved.exists()


def test_foreign_files_are_left_alone(store):
    store.write(rows("a"))
    names = ["notes.txt", "model.safetensors", ".hidden", f"{'0' * 31}.safetensors"]
    for name in names:
        (store.folder / name).write_text("not ours", encoding="utf-8")
    (store.folder / f"{'1' * 32}.safetensors").mkdir()
    os.mkfifo(store.folder / f"{'2' * 32}.safetensors")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_equal(store.read({"a": 3}), rows("a"))
        store.write(rows("b"))
    assert all((store.folder / name).read_text(encoding="utf-8") == "not ours" for name in names)


def test_what_a_killed_process_left_goes_when_it_is_old(store):
    store.write(rows("a"))
    old, young = (store.folder / f"{UNFINISHED}{age}" for age in ("old", "young"))
    for path in (old, young):
        path.write_text("half", encoding="utf-8")
    hours_ago = time.time() - 7200
    os.utime(old, (hours_ago, hours_ago))
    store.write(rows("b"))
    assert not old.exists() and young.exists()


def test_a_full_disk_leaves_nothing_half_written(store):
    store.write(rows("a"))
    before = only_file(store)
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        # the kernel refuses the write in the middle of the file
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limit[1]))
        with pytest.raises(OSError, match=f"cannot write to the cache: .*{re.escape(str(store.folder))}"):
            store.write(rows("b", length=5000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert only_file(store) == before
    check_equal(store.read({"a": 3}), rows("a"))


def test_a_folder_that_cannot_be_written_is_named(store, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("", encoding="utf-8")
    below = tmp_path / "file" / "states"
    with pytest.raises(NotADirectoryError, match=f"cannot write to the cache: .*{re.escape(str(below))}"):
        RowStore(below, torch.bfloat16, (2,)).write(rows("a"))
    store.write(rows("a"))
    if os.getuid() == 0:  # permissions do not bind root
        refused = PermissionError(13, "Permission denied")
        monkeypatch.setattr(type(store.folder), "open", lambda *a, **k: (_ for _ in ()).throw(refused))
    store.folder.chmod(0o500)
    try:
        message = f"cannot write to the cache: Permission denied: .*{re.escape(str(store.folder))}"
        with pytest.raises(PermissionError, match=message):
            store.write(rows("b"))
        check_equal(store.read({"a": 3}), rows("a"))
    finally:
        store.folder.chmod(0o700)


def test_many_writers_at_once(store):
    batches = [rows(f"{i}a", f"{i}b", seed=i) for i in range(4)] * 4
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(store.write, batches))
    everything = {key: row for made in batches for key, row in made.items()}
    check_equal(store.read(lengths(everything)), everything)
    assert len(list(store.folder.iterdir())) == 4


@pytest.mark.parametrize("chunk", [1, 64, 160, 10**6])
def test_digest_is_of_the_content_not_of_its_place(chunk, monkeypatch):
    monkeypatch.setattr("moe_unlearn.model.digest._CHUNK", chunk)
    x = torch.randn(6, 5, 7)
    digest = tensor_digest(x)
    assert digest == tensor_digest(x.clone()) == tensor_digest(x.transpose(0, 2).contiguous().transpose(0, 2))
    others = [x.view(5, 6, 7), x.view(torch.int32), x + 1, x.half(), x[:5], x[..., :1], x[0, 0, 0], x[:0]]
    assert len({digest, *map(tensor_digest, others), tensor_digest(x, b"header")}) == len(others) + 2
    assert tensor_digest(torch.tensor([0.0])) != tensor_digest(torch.tensor([-0.0]))
