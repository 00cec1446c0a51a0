"""Folders in hub layout are read as they stand; a folder that is none is refused by name."""

import json

import pytest
import torch
from safetensors.torch import save_file

from moe_unlearn import delta
from moe_unlearn.delta.folder import INDEX, ModelFolder
from tests.delta.folders import files, write_folder

pytestmark = pytest.mark.quick

MODEL = {name: torch.arange(6.0).view(2, 3) + i for i, name in enumerate("abcd")}


def test_all_but_weights_is_carried_over(tmp_path):
    """Weights in another form are the unchanged model: they are left out and named."""
    others = ("pytorch_model.bin", "original/consolidated.00.pth", "model.gguf", "pytorch_model.bin.index.json")
    own = {"generation_config.json": "{}", ".gitattributes": "x", "README.md": "text", "modeling.py": "pass"}
    hidden = {".git/objects": "x", ".cache/huggingface/x.bin": "x"}
    a = write_folder(tmp_path / "a", MODEL, more=own | hidden | dict.fromkeys(others, "other weights"))
    save_file(MODEL, a / "consolidated.safetensors")
    (a / INDEX).write_text("of whatever", encoding="utf-8")
    (a / "elsewhere").symlink_to(tmp_path)
    b = write_folder(tmp_path / "b", MODEL | {"a": -MODEL["a"]}, 2)
    delta.write(a, b, tmp_path / "d")
    applied = delta.apply(a, tmp_path / "d", tmp_path / "out")
    assert applied.left_out == sorted([*others, "consolidated.safetensors", "elsewhere/", INDEX])
    expected = files(write_folder(tmp_path / "expected", MODEL | {"a": -MODEL["a"]}, more=own))
    assert files(tmp_path / "out") == expected


def test_a_model_at_out_is_replaced_and_all_else_stays(tmp_path):
    """A reader would prefer a single file of an earlier model to an index, and those of its index are of no use."""
    made = {}
    for shards in (1, 3):
        a = write_folder(tmp_path / f"a{shards}", MODEL, shards)
        delta.write(a, write_folder(tmp_path / f"b{shards}", MODEL), tmp_path / "d")
        made[shards] = files(a)
    write_folder(tmp_path / "out", {"other": MODEL["a"]}, 2, more={"notes.txt": "mine", "below/model.safetensors": "x"})
    kept = {name: files(tmp_path / "out")[name] for name in ("notes.txt", "below/model.safetensors")}
    for shards in (1, 3, 1):
        delta.apply(tmp_path / f"a{shards}", tmp_path / "d", tmp_path / "out")
        assert files(tmp_path / "out") == made[shards] | kept
        delta.apply(tmp_path / f"a{shards}", tmp_path / "d", tmp_path / "far" / f"new{shards}")
        assert files(tmp_path / "far" / f"new{shards}") == made[shards]


def test_a_folder_without_weights_in_safetensors_is_refused(tmp_path):
    a = write_folder(tmp_path / "a", MODEL)
    (a / "model.safetensors").rename(a / "pytorch_model.bin")
    for folder in (a, tmp_path / "none", a / "config.json"):
        with pytest.raises(ValueError, match=f"expected model.safetensors or {INDEX} in {folder}; it has neither"):
            ModelFolder(folder)


def test_an_index_that_does_not_fit_is_refused(tmp_path):
    a = write_folder(tmp_path / "a", MODEL, 2)
    index = json.loads((a / INDEX).read_text(encoding="utf-8"))["weight_map"]
    first, second = sorted(set(index.values()))
    cases = [
        ("not JSON", "expected the index of a model's files"),
        ("[1]", "expected the index of a model's files"),
        ({"weight_map": {"a": [first]}}, "expected the index of a model's files"),
        ({}, "expected the index of a model's files"),
        ({"weight_map": {}}, "names no file"),
        ({"weight_map": {"a": 5}}, "expected names of safetensors files beside it; got 5"),
        ({"weight_map": {"a": "../b.safetensors"}}, "beside it; got '../b.safetensors'"),
        ({"weight_map": {"a": "pytorch_model.bin"}}, "beside it; got 'pytorch_model.bin'"),
        ({"weight_map": index | {"e": "third.safetensors"}}, "names third.safetensors, which is not there"),
        ({"weight_map": index | {"e": first}}, "names 'e', which no file of the folder has"),
    ]
    for content, message in cases:
        (a / INDEX).write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
        with pytest.raises(ValueError, match=message) as caught:
            ModelFolder(a)
        assert str(a / INDEX) in str(caught.value)
    (a / INDEX).write_text(json.dumps({"weight_map": index}), encoding="utf-8")
    assert ModelFolder(a).kinds.keys() == MODEL.keys()
    save_file({"a": MODEL["a"], "b": MODEL["b"], "d": MODEL["d"]}, a / second)
    with pytest.raises(ValueError, match=f"'a' is in {first} and in .*{second}"):
        ModelFolder(a)


def test_a_damaged_file_of_weights_is_refused_by_name(tmp_path):
    a = write_folder(tmp_path / "a", MODEL, 2)
    path = sorted(a.glob("*.safetensors"))[1]
    whole = path.read_bytes()
    length = int.from_bytes(whole[:8], "little")
    for damaged in (
        b"",
        whole[:-1],
        whole + b"\0",
        whole[:8] + b"[" * length + whole[8 + length :],
        whole.replace(b'"F32"', b'"F99"', 1),
        whole.replace(b"[2,3]", b"[3,3]", 1),
        whole.replace(b"[2,3]", b"[2,x]", 1),
        whole.replace(b'"shape"', b'"Shape"', 1),
        whole.replace(b"[0,24]", b"[0,48]", 1),
        whole.replace(b'"format":"pt"', b'"format":1234', 1),
    ):
        assert damaged != whole
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=f"{path}: expected a whole safetensors file"):
            ModelFolder(a)
