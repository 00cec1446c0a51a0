"""Deltas lead from one model to another and back, bit for bit, in little memory."""

import hashlib
import json
import tracemalloc

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from benchmarks import harness
from moe_unlearn import delta
from moe_unlearn.delta import change
from tests.delta.folders import bits, files, hub_cache, random_bits, random_model, with_changed, write_folder

pytestmark = pytest.mark.quick


@pytest.fixture(scope="module")
def models():
    base = random_model()
    return base, *with_changed(base)


def tensors_of(folder):
    found = {}
    for path in folder.glob("*.safetensors"):
        found |= load_file(path)
    return found


def same(one, other):
    return one.keys() == other.keys() and all(
        one[n].dtype == other[n].dtype and one[n].shape == other[n].shape and bits(one[n]).equal(bits(other[n]))
        for n in one
    )


@pytest.mark.parametrize("block", [1, 16, change.BLOCK])
@pytest.mark.parametrize("shards", [(1, 1), (3, 2), (1, 5)])
def test_apply_and_revert_are_exact_in_every_dtype_and_shape(models, shards, block, tmp_path, monkeypatch):
    """Whatever files share the tensors out and however they are read: the digests and the delta are the same."""
    monkeypatch.setattr(change, "BLOCK", block)
    base, changed, counts = models
    a = write_folder(tmp_path / "a", base, shards[0])
    b = write_folder(tmp_path / "b", changed, shards[1], more={"config.json": "of the result"})
    made = delta.write(a, b, tmp_path / "d")
    assert {name: c.rows for name, c in made.changes.items()} == counts
    assert 0 < len(made.changed) < len(base)
    applied = delta.apply(a, tmp_path / "d", tmp_path / "applied")
    assert applied == (made.result, []) and same(tensors_of(tmp_path / "applied"), changed)
    reverted = delta.revert(tmp_path / "applied", tmp_path / "d", tmp_path / "back")
    assert reverted == (made.base, []) and files(tmp_path / "back") == files(a)
    assert delta.revert(b, tmp_path / "d", tmp_path / "back") == reverted
    assert same(tensors_of(tmp_path / "back"), base)
    assert (tmp_path / "back" / "config.json").read_text(encoding="utf-8") == "of the result"
    delta.write(a, b, tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == (tmp_path / "d").read_bytes()
    several = delta.write(a, b, tmp_path / "several" / "d", max_file_size=50)
    assert several == made._replace(path=tmp_path / "several" / "d.index.json", stored=several.stored)
    assert delta.apply(a, tmp_path / "several" / "d", tmp_path / "applied") == applied
    assert delta.revert(b, several.path, tmp_path / "back") == reverted and same(tensors_of(tmp_path / "back"), base)
    write_folder(tmp_path / "plain" / "a", base), write_folder(tmp_path / "plain" / "b", changed)
    monkeypatch.undo()
    delta.write(tmp_path / "plain" / "a", tmp_path / "plain" / "b", tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == (tmp_path / "d").read_bytes()


def test_the_file_is_what_its_description_says(models, tmp_path):
    base, changed, counts = models
    a, b = write_folder(tmp_path / "a", base), write_folder(tmp_path / "b", changed)
    made = delta.write(a, b, tmp_path / "d", recipe="of a recipe")
    with safe_open(tmp_path / "d", "pt") as opened:
        about = opened.metadata()
        stored = {name: opened.get_tensor(name) for name in opened.keys()}
    assert about["format"] == "moe-unlearn delta 1"
    assert hashlib.sha256(about["about"].encode()).hexdigest() == about["sha256"]
    content = json.loads(about["about"])
    assert content["recipe"] == "of a recipe" and content["tensors"]["layers.6.bfloat16"][:2] == ["BF16", [5, 3]]
    lines = []
    for name, tensor in sorted(base.items()):
        dtype, shape, rows = content["tensors"][name]
        digest = hashlib.sha256(bits(tensor).numpy().tobytes()).hexdigest()
        lines.append(json.dumps([name, dtype, shape, digest], separators=(",", ":")) + "\n")
        assert rows == counts[name]
        differ = bits(tensor) ^ bits(changed[name])
        if not rows:
            assert not differ.any() and not {f"xor/{name}", f"rows/{name}"} & stored.keys()
            continue
        differ = differ.reshape(-1, (tensor.shape[-1] if tensor.shape else 1) * tensor.dtype.itemsize)
        which = differ.bool().any(dim=1)
        assert bits(stored[f"xor/{name}"]).equal(differ[which].reshape(-1))
        assert stored[f"xor/{name}"].dtype.itemsize == tensor.dtype.itemsize
        if which.all():
            assert f"rows/{name}" not in stored
        else:
            words = stored[f"rows/{name}"].tolist()
            assert [words[i // 32] >> i % 32 & 1 for i in range(len(which))] == which.int().tolist()
    assert content["base"] == made.base == hashlib.sha256("".join(lines).encode()).hexdigest()
    assert made.size == sum(t.numel() * t.dtype.itemsize for t in stored.values())


def test_a_large_delta_has_several_files_which_replace_those_of_another(models, tmp_path):
    a, b, limit = write_folder(tmp_path / "a", models[0]), write_folder(tmp_path / "b", models[1]), 200
    one = delta.write(a, b, tmp_path / "one.safetensors")
    out = tmp_path / "out" / "d.safetensors"
    write_folder(out.parent, {"other": torch.zeros(2)}, more={"d-00001-of-00099.safetensors": "mine"})
    foreign = files(out.parent)
    for size in (limit, 10**9, 64, limit, 10**9):
        made = delta.write(a, b, out, max_file_size=size)
        own = files(out.parent).keys() - foreign.keys()
        parts = sorted(own - {"d.safetensors.index.json"})
        assert made.stored.keys() == one.stored.keys() and made.changes == one.changes
        assert files(out.parent).items() >= foreign.items()
        if size > limit:
            assert own == {"d.safetensors"}
            continue
        assert parts == [f"d-{i + 1:05d}-of-{len(parts):05d}.safetensors" for i in range(len(own) - 1)]
        held = [load_file(out.parent / part) for part in parts]
        assert len(held) > 3 and all(len(t) == 1 or sum(v.nbytes for v in t.values()) <= size for t in held)
        with pytest.raises(ValueError, match="expected an output apart from what is read"):
            delta.apply(a, out, out.with_name(parts[0]))


def test_a_model_of_experts_takes_what_its_changed_experts_take(tmp_path):
    generator = torch.Generator().manual_seed(0)
    experts = {f"experts.{e}.up_proj.weight": random_bits((64, 32), torch.bfloat16, generator) for e in range(16)}
    fused = {"experts.gate_up_proj": torch.stack([*experts.values()])}
    for number, base in enumerate((experts, fused)):
        changed = {name: t.clone() for name, t in base.items()}
        next(iter(changed.values())).view(torch.int16).view(-1, 64, 32)[0] ^= 1
        a, b = (write_folder(tmp_path / f"{number}{k}", model) for k, model in (("a", base), ("b", changed)))
        made = delta.write(a, b, tmp_path / f"{number}d")
        assert len(made.changed) == 1 and 64 * 32 * 2 <= made.size <= 64 * 32 * 2 + 16 * 64 / 8
        assert made.model_size == 16 * 64 * 32 * 2


def test_equal_models_and_models_without_tensors_differ_in_nothing(models, tmp_path):
    for number, model in enumerate((models[0], {})):
        a = write_folder(tmp_path / f"{number}a", model)
        made = delta.write(a, write_folder(tmp_path / f"{number}b", model), tmp_path / f"{number}d")
        assert made.base == made.result and made.changed == [] and made.size == 0
        delta.apply(a, made.path, tmp_path / f"{number}c")
        assert files(tmp_path / f"{number}c") == files(a)


def test_a_folder_of_links_into_the_hubs_cache_is_a_folder(models, tmp_path):
    base, changed, _ = models
    a = hub_cache(tmp_path / "cache-a", write_folder(tmp_path / "a", base, 3))
    b = hub_cache(tmp_path / "cache-b", write_folder(tmp_path / "b", changed, 2))
    delta.write(a, b, tmp_path / "d")
    (tmp_path / "link").symlink_to(a)
    for source in (a, tmp_path / "link"):
        delta.apply(source, tmp_path / "d", tmp_path / "applied")
        assert same(tensors_of(tmp_path / "applied"), changed)
        assert not any(path.is_symlink() for path in tmp_path.glob("applied/**/*"))
        assert files(tmp_path / "applied").keys() == files(tmp_path / "a").keys()
    taken = files(tmp_path / "cache-a")
    for out in (a / "x", a, tmp_path / "cache-a", tmp_path / "cache-a" / "blobs", tmp_path / "link", tmp_path):
        with pytest.raises(ValueError, match="expected an output apart from what is read"):
            delta.apply(a, tmp_path / "d", out)
    (tmp_path / "into").symlink_to(sorted((tmp_path / "cache-a" / "blobs").iterdir())[1])
    for out in (tmp_path / "into", a / "new", b / "new"):
        with pytest.raises(ValueError, match="expected an output apart from what is read"):
            delta.write(a, b, out)
    assert files(tmp_path / "cache-a") == taken


def test_another_model_is_refused_with_both_digests(models, tmp_path):
    base, changed, _ = models
    a, b = write_folder(tmp_path / "a", base), write_folder(tmp_path / "b", changed)
    c = write_folder(tmp_path / "c", with_changed(base, seed=5)[0])
    made, other = delta.write(a, b, tmp_path / "d"), delta.write(a, c, tmp_path / "other")
    write_folder(tmp_path / "out", {}, more={"kept": "as it was"})
    before = files(tmp_path / "out")
    for act, folder, want, got in (
        (delta.apply, c, made.base, other.result),
        (delta.revert, c, made.result, other.result),
        (delta.apply, b, made.base, f"{made.result}, which is its result"),
        (delta.revert, a, made.result, f"{made.base}, which is its base"),
    ):
        with pytest.raises(
            ValueError, match=f"expected {folder} to be the .* of .*, with the digest {want}; got {got}$"
        ):
            act(folder, tmp_path / "d", tmp_path / "out")
    assert files(tmp_path / "out") == before and len(list(tmp_path.iterdir())) == 6


def test_models_of_other_tensors_are_refused(models, tmp_path):
    base = models[0]
    a = write_folder(tmp_path / "a", base)
    delta.write(a, write_folder(tmp_path / "b", models[1]), tmp_path / "d")
    fewer = {name: t for name, t in base.items() if name != "layers.6.float32"}
    wider = base | {"layers.6.float32": torch.zeros(5, 4)}
    other = base | {"layers.6.float32": torch.zeros(5, 3, dtype=torch.int32)}
    more = base | {"lm_head.weight": torch.zeros(2), "a": torch.zeros(2)}
    for number, (model, message) in enumerate(
        (
            (fewer, "it lacks 'layers.6.float32'$"),
            (wider, r"expected 'layers.6.float32' of .* to be float32 \[5, 3\], as in .*; got float32 \[5, 4\]$"),
            (other, r"to be float32 \[5, 3\], as in .*; got int32 \[5, 3\]$"),
            (more, "it also has 'a' and 1 more$"),
        )
    ):
        folder = write_folder(tmp_path / f"other{number}", model, 1 + number % 2)
        for act in (
            lambda folder=folder: delta.write(a, folder, tmp_path / "new"),
            lambda folder=folder: delta.apply(folder, tmp_path / "d", tmp_path / "new"),
            lambda folder=folder: delta.revert(folder, tmp_path / "d", tmp_path / "new"),
        ):
            with pytest.raises(ValueError, match=message):
                act()
    assert not (tmp_path / "new").exists()


def test_what_fails_on_the_way_leaves_nothing(models, tmp_path, monkeypatch):
    a, b = write_folder(tmp_path / "a", models[0]), write_folder(tmp_path / "b", models[1])
    delta.write(a, b, tmp_path / "d")
    before = files(tmp_path)
    real, calls = change.Rows.read, []

    def fails(self, count):
        calls.append(self)
        if len(calls) > 40:
            raise OSError(5, "Input/output error")
        return real(self, count)

    monkeypatch.setattr(change.Rows, "read", fails)
    for act in (
        lambda: delta.write(a, b, tmp_path / "d"),
        lambda: delta.write(a, b, tmp_path / "d", max_file_size=100),
        lambda: delta.apply(a, tmp_path / "d", tmp_path / "out"),
        lambda: delta.revert(b, tmp_path / "d", tmp_path / "out"),
    ):
        calls.clear()
        with pytest.raises(OSError, match="Input/output error"):
            act()
        assert files(tmp_path) == before and not (tmp_path / "out").exists()


@pytest.mark.slow
def test_memory_is_that_of_a_few_blocks(tmp_path):
    """However large the largest tensor is, here 64 MiB, of which a block is a 64th, and however many there are."""
    size, expert = 64 << 20, torch.zeros(512, 1024, dtype=torch.bfloat16)
    base = {"embed.weight": torch.zeros(size // 4096, 2048, dtype=torch.bfloat16), "norm.weight": torch.ones(9)}
    base |= {f"experts.{i}.up_proj.weight": expert.clone() for i in range(48)}
    changed = {name: torch.ones_like(tensor) for name, tensor in base.items()}
    a, b = write_folder(tmp_path / "a", base), write_folder(tmp_path / "b", changed)
    del base, changed
    acts = (
        lambda: delta.write(a, b, tmp_path / "d"),
        lambda: delta.apply(a, tmp_path / "d", tmp_path / "applied"),
        lambda: delta.revert(tmp_path / "applied", tmp_path / "d", tmp_path / "back"),
    )
    whole = harness.peak_memory((a / "model.safetensors").read_bytes, "cpu")
    assert whole is None or whole > size / 2, "the measure sees a whole tensor"
    for act in acts:
        resident = harness.peak_memory(act, "cpu")  # None where the system does not tell
        assert resident is None or resident < size / 2
        tracemalloc.start()
        try:
            act()
            allocated = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert change.BLOCK < allocated < size / 2
