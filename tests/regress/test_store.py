"""The store: what was written is read, nothing is overwritten, and every kind of damage is named."""

import json
import random

import pytest
import torch

from moe_unlearn.files import UNFINISHED
from moe_unlearn.regress.store import Store, StoreError

ARRAYS = {"output 0": torch.tensor([1.0, -0.0, float("nan")]), "empty": torch.zeros(0, 3), "ids": torch.arange(3)}


def content(case="softmax", supersedes=None, **changed):
    return {
        "case": case,
        "origin": "x.py",
        "seed": 0,
        "sizes": {"rows": 2},
        "routing": "",
        "inputs": {"x": "00"},
        "outputs": {name: {} for name in ARRAYS},
        "environment": {},
        "source": {},
        "seconds": [],
        "supersedes": supersedes,
        "reason": "",
        **changed,
    }


@pytest.fixture
def store(tmp_path):
    made = Store(tmp_path / "store")
    first = made.add(content(), ARRAYS)
    made.add(content(supersedes=first.sha256, reason="better"), {**ARRAYS, "ids": torch.arange(1, 4)})
    made.add(content("other/float32"), ARRAYS)
    return made


def again(store):
    return Store(store.folder)


@pytest.mark.quick
def test_reads_what_was_written(store):
    current = again(store).current()
    assert set(current) == {"softmax", "other/float32"}
    arrays = store.arrays(current["other/float32"])
    assert list(arrays) == list(ARRAYS)
    for name, value in ARRAYS.items():
        assert arrays[name].dtype == value.dtype and torch.equal(arrays[name].nan_to_num(7), value.nan_to_num(7))
    assert torch.equal(store.arrays(current["softmax"])["ids"], torch.arange(1, 4))


def test_what_was_measured_by_is_kept_and_records_without_it_are_read(store):
    store.add(content("new", yardstick={"arithmetic": "native"}), ARRAYS)
    current = again(store).current()
    assert current["new"].content["yardstick"] == {"arithmetic": "native"}
    assert "yardstick" not in current["softmax"].content
    store.add(content("bad", yardstick="native"), ARRAYS)
    with pytest.raises(StoreError, match="not an entry: yardstick"):
        again(store).current()


def test_the_former_entry_is_kept(store):
    newest, former = again(store).history("softmax")
    assert newest.content["reason"] == "better" and newest.content["supersedes"] == former.sha256
    assert torch.equal(store.arrays(former)["ids"], torch.arange(3))


@pytest.mark.quick
def test_only_the_newest_can_be_superseded(store):
    former = store.history("softmax")[1].sha256
    before = sorted(p.name for p in store.folder.rglob("*"))
    for supersedes in (None, former, "0" * 64):
        with pytest.raises(ValueError, match="cannot be added"):
            store.add(content(supersedes=supersedes), ARRAYS)
    assert sorted(p.name for p in store.folder.rglob("*")) == before


def test_adding_changes_no_file(store):
    before = {p: p.read_bytes() for p in store.folder.rglob("*") if p.is_file()}
    store.add(content("third"), ARRAYS)
    assert all(p.read_bytes() == data for p, data in before.items())
    assert not list(store.folder.rglob(f"{UNFINISHED}*"))


def test_an_interrupted_write_leaves_nothing(store, monkeypatch):
    before = sorted(store.folder.rglob("*"))
    monkeypatch.setattr("os.replace", lambda *a: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        store.add(content("third"), {"output 0": torch.ones(2)})
    assert sorted(store.folder.rglob("*")) == before


def read_all(folder):
    made = Store(folder)
    for entry in made.entries():
        made.arrays(entry)
    made.current()


def test_every_damage_is_found(store):
    generator = random.Random(0)
    files = [p for p in store.folder.rglob("*") if p.is_file() and p.name != ".gitattributes"]
    for path in files:
        data = path.read_bytes()
        damaged = [data[:-1], b"", data + b" "]
        for _ in range(40):
            i, bit = generator.randrange(len(data)), generator.randrange(8)
            damaged.append(data[:i] + bytes([data[i] ^ 1 << bit]) + data[i + 1 :])
        for version in damaged:
            path.write_bytes(version)
            with pytest.raises(StoreError, match=path.name[:20]):
                read_all(store.folder)
        path.write_bytes(data)
    read_all(store.folder)


def test_missing_and_doubled_files_are_named(store):
    newest, former = store.history("softmax")
    (path,) = (store.folder / "entries").glob(f"*{former.sha256}.json")
    data = path.read_bytes()
    path.unlink()
    with pytest.raises(StoreError, match=f"supersedes {former.sha256}, which is missing"):
        read_all(store.folder)
    path.write_bytes(data)
    arrays = store.arrays_path(newest)
    data = arrays.read_bytes()
    arrays.unlink()
    with pytest.raises(StoreError, match=f"{arrays.name}: cannot be read"):
        read_all(store.folder)
    arrays.write_bytes(data)
    (path,) = (store.folder / "entries").glob("other*.json")
    path.rename(path.with_name(path.name.replace("other", "third")))
    with pytest.raises(StoreError, match="its name is of another case"):
        read_all(store.folder)


def test_two_successors_of_one_entry(store, tmp_path):
    first = store.history("softmax")[1]
    theirs = Store(tmp_path / "theirs")
    theirs.add({k: v for k, v in first.content.items() if k not in ("format", "arrays", "recorded")}, ARRAYS)
    other = theirs.add(content(supersedes=theirs.current()["softmax"].sha256, reason="merged"), ARRAYS)
    for path in (tmp_path / "theirs" / "entries").iterdir():
        (store.folder / "entries" / path.name).write_bytes(path.read_bytes())
    # as two branches of a repository would leave it
    with pytest.raises(StoreError, match="keep one of them"):
        again(store).current()
    assert other.sha256


def test_another_format_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("moe_unlearn.regress.store.FORMAT", "moe-unlearn kernels 2")
    Store(tmp_path).add(content(), ARRAYS)
    monkeypatch.undo()
    with pytest.raises(StoreError, match="expected format 'moe-unlearn kernels 1'; got 'moe-unlearn kernels 2'"):
        Store(tmp_path).entries()


def test_a_file_is_no_store(tmp_path):
    (tmp_path / "x").write_text("", encoding="utf-8")
    with pytest.raises(ValueError, match="expects a folder; got the file"):
        Store(tmp_path / "x")


def test_entries_are_json_that_people_can_read(store):
    for path in (store.folder / "entries").iterdir():
        assert json.loads(path.read_text(encoding="utf-8"))["format"] == "moe-unlearn kernels 1"
