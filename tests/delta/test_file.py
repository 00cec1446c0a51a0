"""A delta that is not as it was written is refused in one line, and nothing is written."""

import hashlib
import json
import math

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from moe_unlearn import delta
from tests.delta.folders import bits, files, write_folder

pytestmark = pytest.mark.quick


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small base, a model of which some, none, all and one of the rows are changed, and their delta."""
    root = tmp_path_factory.mktemp("delta")
    shapes, which = {"a": (40, 2), "b": (3,), "c": (2, 2), "d": (4, 1)}, {"a": slice(5, 22), "c": slice(2), "d": 1}
    base = {name: torch.arange(1.0, 1 + math.prod(shape)).view(shape).bfloat16() for name, shape in shapes.items()}
    changed = {name: t.clone() for name, t in base.items()}
    for name, rows in which.items():
        changed[name].view(torch.int16)[rows] ^= 0x101
    write_folder(root / "base", base)
    delta.write(root / "base", write_folder(root / "changed", changed), root / "d", recipe="r")
    return root


def contents(path):
    with safe_open(path, "pt") as opened:
        return load_file(path), opened.metadata()


def sealed(about):
    text = json.dumps(about)
    return {"about": text, "sha256": hashlib.sha256(text.encode()).hexdigest()}


def refused(folder, path, out, message):
    """Both verbs refuse the delta in one line of at most that message, and leave what is there."""
    for act, model in ((delta.apply, "base"), (delta.revert, "changed")):
        with pytest.raises(ValueError, match=message) as caught:
            act(folder / model, path, out)
        assert str(path) in str(caught.value) and "\n" not in str(caught.value)
        assert not out.exists() and not list(out.parent.glob(".moe-unlearn-*"))


def test_a_truncated_or_longer_file_is_refused(folder, tmp_path):
    whole = (folder / "d").read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    for length in {0, 1, 7, 8, 9, header - 1, header, header + 1, len(whole) - 1}:
        (tmp_path / "d").write_bytes(whole[:length])
        refused(folder, tmp_path / "d", tmp_path / "out", "expected a whole safetensors file")
    (tmp_path / "d").write_bytes(whole + b"\0")
    refused(folder, tmp_path / "d", tmp_path / "out", "expected .* bytes; got")
    for start in (b"\xff" * 8, b"\0" * 8, (10**8 + 1).to_bytes(8, "little")):
        (tmp_path / "d").write_bytes(start + whole[8:])
        refused(folder, tmp_path / "d", tmp_path / "out", "expected a whole safetensors file")


def test_every_flipped_byte_is_noticed(folder, tmp_path):
    """But for spaces around the header, which mean nothing: then the result is right."""
    whole = (folder / "d").read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    expected, noticed = load_file(folder / "changed" / "model.safetensors"), 0
    for place in [*range(0, header, 3), *range(header, len(whole))]:
        damaged = bytearray(whole)
        damaged[place] ^= 1 << place % 8
        (tmp_path / "d").write_bytes(damaged)
        try:
            delta.apply(folder / "base", tmp_path / "d", tmp_path / "out")
        except ValueError as error:
            assert str(tmp_path / "d") in str(error) and "\n" not in str(error)
            assert not (tmp_path / "out").exists()
            noticed += 1
        else:
            assert chr(whole[place]) == " " and place < header
            made = load_file(tmp_path / "out" / "model.safetensors")
            assert all(bits(made[name]).equal(bits(t)) for name, t in expected.items())
    assert noticed > 200


def test_files_of_a_delta_that_do_not_belong_together_are_refused(folder, tmp_path):
    for name, recipe in (("d", "r"), ("other", "s")):
        made = delta.write(folder / "base", folder / "changed", tmp_path / name, recipe=recipe, max_file_size=1)
    parts = sorted(path.name for path in tmp_path.glob("d-*"))
    assert len(parts) == len(made.stored)
    own = files(tmp_path)
    index = json.loads(own["d.index.json"])
    places, about = index["weight_map"], index["metadata"]
    other = {parts[0]: own[parts[0].replace("d-", "other-")]}

    def indexed(metadata=about, weight_map=places):
        return {"d.index.json": json.dumps({"metadata": metadata, "weight_map": weight_map}).encode()}

    for damaged, message in (
        (other, f"damaged: {parts[0]} belongs to another delta"),
        (indexed(about | {"sha256": "0" * 64}), "damaged: its metadata does not match its SHA-256"),
        (indexed(about | {"about": 5}), "damaged: its metadata does not match its SHA-256"),
        (indexed(about | {"format": "pt"}), "the format 'moe-unlearn delta 1'; got 'pt'"),
        (indexed([]), "the format 'moe-unlearn delta 1'; got None"),
        (indexed(5), "expected the index of a delta's files"),
        (indexed(weight_map={"xor/a": places["xor/a"]}), "damaged: expected 'rows/a' to be .*; got nothing"),
        ({parts[1]: own[parts[1]][:-1]}, "expected a whole safetensors file"),
        ({parts[1]: None}, f"names {parts[1]}, which is not there"),
    ):
        for name, content in (own | damaged).items():
            if content is None:
                (tmp_path / name).unlink()
            else:
                (tmp_path / name).write_bytes(content)
        refused(folder, tmp_path / "d", tmp_path / "out", message)


def test_another_format_or_version_is_refused(folder, tmp_path):
    tensors, about = contents(folder / "d")
    for metadata in (about | {"format": "moe-unlearn delta 2"}, {"format": "pt"}, None):
        save_file(tensors, tmp_path / "d", metadata)
        got = None if metadata is None else metadata["format"]
        refused(folder, tmp_path / "d", tmp_path / "out", f"the format 'moe-unlearn delta 1'; got {got and repr(got)}")
    refused(folder, folder / "base" / "model.safetensors", tmp_path / "out", "the format 'moe-unlearn delta 1'; got")


def test_metadata_that_was_changed_or_is_none_is_refused(folder, tmp_path):
    tensors, about = contents(folder / "d")
    content = json.loads(about["about"])
    with_base = content | {"base": "0" * 64}
    save_file(tensors, tmp_path / "d", about | {"about": json.dumps(with_base)})
    refused(folder, tmp_path / "d", tmp_path / "out", "damaged: its metadata does not match its SHA-256")
    save_file(tensors, tmp_path / "d", {"format": delta.FORMAT, "about": "x", "sha256": "y"})
    refused(folder, tmp_path / "d", tmp_path / "out", "damaged: its metadata does not match its SHA-256")
    whole = (folder / "d").read_bytes()
    (tmp_path / "d").write_bytes(whole.replace(b'\\"base', b"\\ud800", 1))
    refused(folder, tmp_path / "d", tmp_path / "out", "expected a whole safetensors file: .* surrogates not allowed")
    own = content["tensors"]
    wrong = [
        {"tensors": 5},
        {"tensors": {"a": 5}},
        {"tensors": own | {"a": ["BF16", [40, 2], 41]}},
        {"tensors": own | {"a": ["BF16", [40, 2], -1]}},
        {"tensors": own | {"a": ["BF16", [40, 2], True]}},
        {"tensors": own | {"a": ["BF16", [40, -2], 17]}},
        {"tensors": own | {"a": ["F4", [40, 2], 17]}},
    ]
    for about_wrong in [content | more for more in wrong] + [{}, [], "text", {**content, "tensors": None}]:
        save_file(tensors, tmp_path / "d", {"format": delta.FORMAT, **sealed(about_wrong)})
        refused(folder, tmp_path / "d", tmp_path / "out", "no readable metadata of a delta")


def test_tensors_too_many_too_few_or_of_another_kind_are_refused(folder, tmp_path):
    tensors, about = contents(folder / "d")
    assert tensors.keys() == {"xor/a", "rows/a", "xor/c", "xor/d", "rows/d"}
    cases = {
        "'xor/a' to be uint16 \\[17, 2\\]; got nothing": {n: t for n, t in tensors.items() if n != "xor/a"},
        "'rows/d' to be int32 \\[1\\]; got nothing": {n: t for n, t in tensors.items() if n != "rows/d"},
        "'xor/e' to be absent; got int64 \\[1\\]": tensors | {"xor/e": torch.zeros(1, dtype=torch.int64)},
        "'rows/c' to be absent; got": tensors | {"rows/c": tensors["rows/a"].clone()},
        "'xor/a' to be uint16 \\[17, 2\\]; got uint16 \\[34\\]": tensors | {"xor/a": tensors["xor/a"].flatten()},
        "'xor/c' to be uint16 .*; got int16": tensors | {"xor/c": tensors["xor/c"].view(torch.int16)},
        "'a' does not have the rows": tensors | {"rows/a": tensors["rows/a"] ^ 1},
        "'d' does not have the rows": tensors | {"rows/d": torch.tensor([16], dtype=torch.int32)},
    }
    for message, damaged in cases.items():
        save_file(damaged, tmp_path / "d", about)
        refused(folder, tmp_path / "d", tmp_path / "out", f"damaged: (expected )?{message}")


def test_bits_that_were_changed_are_refused_as_the_deltas_fault(folder, tmp_path):
    tensors, about = contents(folder / "d")
    save_file(
        tensors | {"xor/c": tensors["xor/c"].view(torch.int16).bitwise_xor(1).view(torch.uint16)}, tmp_path / "d", about
    )
    made = delta.read(folder / "d")
    with pytest.raises(
        ValueError, match=f"damaged: expected it to make its result, with the digest {made.result}; got"
    ):
        delta.apply(folder / "base", tmp_path / "d", tmp_path / "out")
    with pytest.raises(ValueError, match=f"damaged: expected it to make its base, with the digest {made.base}; got"):
        delta.revert(folder / "changed", tmp_path / "d", tmp_path / "out")
    assert files(tmp_path).keys() == {"d"}


def test_no_file_at_all_is_an_error_that_names_it(folder, tmp_path):
    for path in (tmp_path / "none", tmp_path):
        with pytest.raises(OSError, match=str(path)):
            delta.apply(folder / "base", path, tmp_path / "out")
    with pytest.raises(ValueError, match="expected a file to write; got /dev/null"):
        delta.write(folder / "base", folder / "changed", "/dev/null")
