"""The files of a checkpoint of ranks: none that was changed, cut, swapped or forged is read."""

import hashlib
import json
import pickle
import random
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.distributed import checkpoint as torch_checkpoint

from moe_unlearn.checkpoint import CheckpointError, sharded, states, tree
from moe_unlearn.checkpoint.optimizer import from_tree, to_tree
from moe_unlearn.checkpoint.sharded import Part, Slices
from moe_unlearn.checkpoint.tensor_file import Rows, kind_of, stored_in, tensor_file
from moe_unlearn.files import UNFINISHED
from tests.support.damage import FORMS, damaged
from tests.support.forked_ranks import found_on

STATE = {
    "weights": {"a.weight": torch.arange(6.0).view(2, 3).t(), "b": torch.ones(3, dtype=torch.bfloat16)},
    "nested": {0: {"step": torch.tensor(5.0), "empty": torch.zeros(0, 2)}, "0": [1.5, None, True, (1, "x")]},
    "text": "größe",
}


def slices(ids, count=8, width=3):
    ids = torch.tensor(ids, dtype=torch.int64)
    return Slices(ids, ids[:, None] * 10.0 + torch.arange(width), count)


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """A checkpoint of two ranks."""
    folder = tmp_path_factory.mktemp("good")
    shares = [[0, 1, 3], [4, 7]]
    found_on(2, folder, lambda rank: sharded.save(folder / "kept", STATE | {"m": slices(shares[rank])}))
    return folder / "kept"


def test_a_round_trip_keeps_types_and_bits(good):
    found = sharded.load(good)
    assert found["nested"].keys() == STATE["nested"].keys() and found["nested"]["0"] == STATE["nested"]["0"]
    for inner, outer in ((found["weights"], STATE["weights"]), (found["nested"][0], STATE["nested"][0])):
        assert all(kind_of(inner[name]) == kind_of(t) and torch.equal(inner[name], t) for name, t in outer.items())
    assert found["text"] == "größe" and found["m"].ids.tolist() == [0, 1, 3, 4, 7]
    assert torch.equal(found["m"].values, slices([0, 1, 3, 4, 7]).values)


@pytest.mark.parametrize("start, stop, ids", [(0, 8, [0, 1, 3, 4, 7]), (1, 5, [1, 3, 4]), (5, 7, []), (2, 2, [])])
def test_a_part_has_the_slices_that_exist(good, start, stop, ids):
    found = sharded.load(good, {"m": Part(start, stop, 8)}, states=["m"])["m"]
    assert found.ids.tolist() == ids and torch.equal(found.values, slices(ids).values)


def test_a_part_of_a_whole_tensor_has_all_its_slices(good):
    found = sharded.load(good, {"weights": Part(1, 3, 3)}, states=["weights"])["weights"]
    assert found["a.weight"].ids.tolist() == [1, 2]
    assert torch.equal(found["a.weight"].values, STATE["weights"]["a.weight"][1:])


@pytest.mark.parametrize(
    "into, said",
    [
        ({"other": torch.zeros(3)}, "it has no other"),
        ({"nested": {1: torch.zeros(())}}, "it has no nested/1"),
        ({"weights": {"b": torch.zeros(3)}}, "weights/b: expected float32 [3] here; the checkpoint has bfloat16 [3]"),
        ({"weights": {"a.weight": torch.zeros(2, 3)}}, "weights/a.weight: expected float32 [2, 3] here"),
        ({"m": torch.zeros(8, 3)}, "m: the checkpoint has only some slices; ask for a Part"),
        ({"m": Part(0, 4, 9)}, "m: expected 9 slices here; the checkpoint has 8"),
        ({"weights": 3}, "weights/a.weight: expected a tensor or a Part to fill; got int"),
    ],
)
def test_targets_that_do_not_fit_are_refused_and_nothing_is_filled(good, into, said):
    a = torch.full((3, 2), 7.0)
    into = {"weights": {"a.weight": a}} | into
    with pytest.raises(CheckpointError) as error:
        sharded.load(good, into)
    assert said in str(error.value) and str(good) in str(error.value) and (a == 7).all()


def test_every_corruption_is_found(good, tmp_path):
    """Damage of every form, pickles, and files that are another's, 300 seeded ones."""
    files = sorted(p.name for p in good.iterdir())
    assert files == ["manifest", "rank-00000.safetensors", "rank-00001.safetensors", "state.json"]
    generator, target = random.Random(0), torch.full((3, 2), 7.0)
    for trial in range(300):
        bad = tmp_path / f"bad{trial}"
        shutil.copytree(good, bad)
        path = bad / generator.choice(files)
        kind = generator.choice([*FORMS, "pickle", "other"])
        if kind == "pickle":
            data = pickle.dumps({"m": 1})
        elif kind == "other":
            data = (good / generator.choice([name for name in files if name != path.name])).read_bytes()
        else:
            data = damaged(path.read_bytes(), kind, generator)
        if data != path.read_bytes():
            path.unlink()
            if data is not None:
                path.write_bytes(data)
            with pytest.raises(CheckpointError) as error:
                sharded.load(bad, {"weights": {"a.weight": target}})
            assert path.name in str(error.value), f"{kind} {path.name}: {error.value}"
            assert (target == 7).all()
        shutil.rmtree(bad)


def forge(folder, change):
    """A state and a manifest that fit each other, as an attacker would write them."""
    path = folder / "state.json"
    state = json.loads(path.read_text(encoding="utf-8"))
    change(state["index"]['["m"]'], state)
    path.write_text(json.dumps(state), encoding="utf-8")
    manifest = json.loads((folder / "manifest").read_bytes().partition(b"\n")[2])
    data = path.read_bytes()
    manifest["files"]["state.json"] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    body = json.dumps(manifest).encode()
    (folder / "manifest").write_bytes(hashlib.sha256(body).hexdigest().encode() + b"\n" + body)


FORGED = {
    "a file elsewhere": (lambda m, _: m["chunks"][0].update(file="../kept/rank-00000.safetensors"), "not known"),
    "another dtype": (lambda m, _: m.update(dtype="F99"), "not known"),
    "a wrong dtype": (lambda m, _: m.update(dtype="BF16"), "rank-0000"),
    "a part outside": (lambda m, _: m["chunks"][0].update(offsets=[7, 0]), "not in its shape"),
    "a part of a slice": (lambda m, _: m["chunks"][0].update(sizes=[2, 2]), "not of whole slices"),
    "a part twice": (lambda m, _: m["chunks"].append(m["chunks"][0]), "different runs"),
    "a part too large": (lambda m, _: m["chunks"][1].update(sizes=[9, 3]), "not in its shape"),
    "a whole with holes": (lambda m, _: m.update(slices=False), "its shape [8, 3] has 24"),
    "another tensor's name": (lambda m, _: m["chunks"][0].update(name="none"), "rank-0000"),
    "no index": (lambda _, state: state.pop("index"), "no readable state"),
    "no entry": (lambda _, state: state["index"].pop('["m"]'), "of other tensors"),
    "no tree": (lambda _, state: state.update(tree={"__tuple__": 3}), "kept"),
}


@pytest.mark.parametrize("case", FORGED)
def test_an_index_that_does_not_fit_is_refused(good, tmp_path, case):
    folder = tmp_path / "kept"
    shutil.copytree(good, folder)
    change, said = FORGED[case]
    forge(folder, change)
    with pytest.raises(CheckpointError) as error:
        sharded.load(folder)
    assert said in str(error.value) and str(folder) in str(error.value)


def test_what_is_no_checkpoint_is_refused(good, tmp_path):
    with pytest.raises(CheckpointError, match="no readable manifest"):
        sharded.load(tmp_path / "nothing")
    with pytest.warns(UserWarning, match="torch.distributed is disabled"):
        torch_checkpoint.save({"m": torch.ones(2)}, checkpoint_id=str(tmp_path / "torch"))
    with pytest.raises(CheckpointError, match="no readable manifest"):
        sharded.load(tmp_path / "torch")
    half = tmp_path / f"{UNFINISHED}0"
    shutil.copytree(good, half)
    (half / "manifest").unlink()
    with pytest.raises(CheckpointError, match="no readable manifest"):
        sharded.load(half)


def test_unknown_leaves_are_refused_and_leave_nothing(tmp_path):
    with pytest.raises(TypeError, match="here/0: a checkpoint holds no set"):
        sharded.save(tmp_path / "kept", {"here": [{1}]})
    with pytest.raises(CheckpointError, match="c: safetensors files hold no torch.complex64"):
        sharded.save(tmp_path / "kept", {"c": torch.zeros(2, dtype=torch.complex64)})
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_of_one_process_is_read_too(tmp_path):
    folder = states.commit(tmp_path, 3, STATE)
    a = torch.zeros(3, 2)
    found = sharded.load(folder, {"weights": {"a.weight": a}})
    assert found["weights"]["a.weight"] is a and torch.equal(a, STATE["weights"]["a.weight"])
    assert found["nested"].keys() == {0, "0"} and found["nested"]["0"] == STATE["nested"]["0"]
    assert torch.equal(found["weights"]["b"], STATE["weights"]["b"])
    (folder / "weights.json").write_text("{}", encoding="utf-8")
    with pytest.raises(CheckpointError, match="weights.json"):
        sharded.load(folder)


@pytest.mark.parametrize(
    "ids, values", [([1, 0], (2, 3)), ([0, 0], (2, 3)), ([-1], (1, 3)), ([8], (1, 3)), ([0], (2, 3)), ([], ())]
)
def test_slices_ascend_within_the_whole(ids, values):
    with pytest.raises(ValueError, match="expected"):
        Slices(torch.tensor(ids, dtype=torch.int64), torch.zeros(values), 8)


@pytest.mark.parametrize("held", [None, [0, 2], []])
def test_the_state_of_a_parameter_goes_to_the_whole_and_back(held):
    state = {"step": torch.tensor(3.0), "exp_avg": torch.arange(12.0).view(4, 3)}
    if held is not None:
        state = {**state, "exp_avg": state["exp_avg"][held], "slices": torch.tensor(held, dtype=torch.int64)}
    rows = Part(4, 8, 16)
    whole = to_tree(state, rows)
    assert whole["exp_avg"].ids.tolist() == [4 + i for i in (held if held is not None else range(4))]
    back = from_tree(whole, rows)
    assert back.keys() == ({} if held == [] else state).keys()
    assert all(torch.equal(back[name], state[name]) for name in back)
    assert from_tree(whole, Part(0, 4, 16)) == {}


def test_trees_of_ranks_are_merged():
    trees = [tree.split(value, lambda path, _: tree.name_of(path)) for value in ({"a": 1, "b": [2]}, {"b": [2], 0: 3})]
    assert tree.join(tree.merged(trees), lambda *_: None) == {"a": 1, "b": [2], 0: 3}
    for one, other in ([1], [1, 2]), ({"a": 1}, [1]), ((1,), [1]), (1, 1.0), (1, True), ([{"x": 0}], [{"x": 1}]):
        with pytest.raises(ValueError, match="to be the same on all ranks"):
            tree.merged([tree.split(value, lambda *_: "") for value in (one, other)])
    assert tree.merged([float("nan")] * 2) != 0


@pytest.mark.parametrize("about", [None, {"format": "pt"}])
def test_a_tensor_file_has_the_bytes_that_safetensors_writes(tmp_path, about):
    dtypes = (torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.bool, torch.uint8)
    tensors = {f'"{i}": é': torch.arange(6).view(2, 3).t().to(dtype) for i, dtype in enumerate(dtypes)}
    tensors |= {"number": torch.tensor(2.5), "empty": torch.zeros(0, 3), "again": torch.ones(7)}
    with tensor_file(tmp_path / "ours", {name: kind_of(t) for name, t in tensors.items()}, about) as write:
        for name in reversed(tensors):  # in any order
            write(name, tensors[name])
    save_file({name: t.contiguous() for name, t in tensors.items()}, tmp_path / "theirs", metadata=about)
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()
    assert load_file(tmp_path / "ours").keys() == tensors.keys()


def test_a_tensor_may_be_written_and_read_in_parts(tmp_path):
    tensors = {"a": torch.arange(24).view(4, 2, 3), "b": torch.tensor(2.5), "c": torch.zeros(2, 0), "d": torch.ones(5)}
    tensors["e"] = torch.randn(3, 2).bfloat16()
    with tensor_file(tmp_path / "parts", {name: kind_of(t) for name, t in tensors.items()}, {"key": "é"}) as write:
        write("a", tensors["a"][:1])
        write("b", tensors["b"])
        for part in tensors["e"].split(1):
            write("e", part)
        write("a", tensors["a"][1:3])
        write("d", tensors["d"])
        write("c", tensors["c"])
        write("a", tensors["a"][3:])
    save_file(tensors, tmp_path / "whole", metadata={"key": "é"})
    assert (tmp_path / "parts").read_bytes() == (tmp_path / "whole").read_bytes()
    stored, about, _ = stored_in(tmp_path / "whole")
    assert about == {"key": "é"} and {name: s.kind for name, s in stored.items()} == {
        name: kind_of(t) for name, t in tensors.items()
    }
    for name, tensor in tensors.items():
        with Rows(stored[name]) as rows:
            kind = stored[name].kind
            first, rest = rows.read(1), rows.read(kind.rows - 1)
        assert first.tobytes() + rest.tobytes() == tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
    whole = (tmp_path / "whole").read_bytes()
    (tmp_path / "whole").write_bytes(whole[:-1])
    last = [*stored.values()][-1]
    with Rows(last) as rows, pytest.raises(ValueError, match=f"{tmp_path / 'whole'}: the file ends within a tensor"):
        rows.read(last.kind.rows)


@pytest.mark.parametrize(
    "parts", [[2, 3], [5], [0, 2, 2, 1], ["flat"], ["float"], ["wide"]], ids=lambda parts: str(parts)
)
def test_parts_that_are_not_the_tensor_are_refused(parts, tmp_path):
    whole = torch.arange(8).view(4, 2)
    made = {"float": whole.float(), "wide": torch.zeros(1, 3, dtype=torch.int64), "flat": whole[:2].flatten()}
    with pytest.raises(ValueError, match=r"expected a to be int64 \[4, 2\]; got"):
        with tensor_file(tmp_path / "file", {"a": kind_of(whole)}) as write:
            for part in parts:
                write("a", torch.zeros(part, 2, dtype=torch.int64) if isinstance(part, int) else made[part])
    with (
        pytest.raises(ValueError, match="file: a not written"),
        tensor_file(tmp_path / "file", {"a": kind_of(whole)}) as w,
    ):
        w("a", whole[:3])
    assert list(tmp_path.iterdir()) == []


def test_a_tensor_file_is_whole_or_not_there(tmp_path):
    kinds = {name: kind_of(torch.ones(2)) for name in "ab"}
    with pytest.raises(ValueError, match="b not written"), tensor_file(tmp_path / "file", kinds) as write:
        write("a", torch.ones(2))
    with pytest.raises(ValueError, match=r"expected a to be float32 \[2\]; got float64 \[2\]"):
        with tensor_file(tmp_path / "file", kinds) as write:
            write("a", torch.ones(2).double())
    assert list(tmp_path.iterdir()) == []
