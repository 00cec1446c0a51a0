"""WAGLE masks in the official form: names between fused and single experts, round trips, and bad files."""

import io
import os
import subprocess
import weakref
import zipfile

import pytest
import torch
from transformers import AutoModelForCausalLM

from moe_unlearn import masks
from moe_unlearn.masks import files
from moe_unlearn.ops.bits import pack_bits
from moe_unlearn.wagle import WeightMask
from tests.support import models

FAMILIES = {  # a layer with experts, and what one expert's gate, up and down matrices are called on disk
    "tiny_olmoe": ("model.layers.1.mlp", "gate_proj", "up_proj", "down_proj"),
    "tiny_qwen2_moe": ("model.layers.1.mlp", "gate_proj", "up_proj", "down_proj"),
    "tiny_qwen3_moe": ("model.layers.1.mlp", "gate_proj", "up_proj", "down_proj"),
    "tiny_mixtral": ("model.layers.1.block_sparse_moe", "w1", "w3", "w2"),
    "tiny_deepseek_v2": ("model.layers.1.mlp", "gate_proj", "up_proj", "down_proj"),
    "tiny_deepseek_v3": ("model.layers.1.mlp", "gate_proj", "up_proj", "down_proj"),
}


def random_mask(model, seed=0) -> WeightMask:
    draw = torch.Generator().manual_seed(seed)
    kept = {name: torch.rand(p.shape, generator=draw) < 0.6 for name, p in model.named_parameters()}
    shapes = {name: tuple(k.shape) for name, k in kept.items()}
    return WeightMask(shapes, {name: pack_bits(k) for name, k in kept.items()}, keep=0.6)


def official(mask: WeightMask, layer: str, gate: str, up: str, down: str) -> dict[str, torch.Tensor]:
    """The official form written out by hand: rows of `gate_up_proj` are the gate's, then those of up."""
    out = {}
    for name in mask.names:
        kept = mask.kept(name)
        owner, _, last = name.rpartition(".")
        if not owner.endswith(".experts"):
            # Mixtral's router moves with its block
            out[name.replace(".mlp.", ".block_sparse_moe.") if gate == "w1" else name] = kept
            continue
        owner = owner.replace("mlp", layer.rpartition(".")[2])
        for e in range(len(kept)):
            parts = zip((gate, up), kept[e].chunk(2), strict=True) if last == "gate_up_proj" else [(down, kept[e])]
            out |= {f"{owner}.{e}.{kind}.weight": part for kind, part in parts}
    return out


def same(a: WeightMask, b: WeightMask) -> bool:
    return a.shapes == b.shapes and all(torch.equal(a.packed[n], b.packed[n]) for n in a.names)


@pytest.mark.parametrize("family", FAMILIES)
def test_official_names_and_values(family, tmp_path):
    model = getattr(models, family)()
    mask, expected = random_mask(model), official(random_mask(model), *FAMILIES[family])
    masks.save(mask, tmp_path / "with_0.6.pt", model, "official")
    written = torch.load(tmp_path / "with_0.6.pt", weights_only=True)
    assert (
        written.keys() == expected.keys() and f"{FAMILIES[family][0]}.experts.3.{FAMILIES[family][1]}.weight" in written
    )
    assert all(written[name].dtype == torch.bool and torch.equal(written[name], k) for name, k in expected.items())
    read = masks.load(tmp_path / "with_0.6.pt", model)
    assert same(read, mask) and read.official and read.keep == read.fraction == mask.fraction
    assert sorted(os.listdir(tmp_path)) == ["with_0.6.pt", "with_0.6.pt.sha256"]


def test_the_experts_of_one_parameter_are_whole_at_a_time(tmp_path, monkeypatch):
    """A byte a weight, beside what torch saves or maps of an official file."""
    model, found, alive = models.tiny_olmoe(), [], []

    def watched(real):
        def watch(*given):
            made = real(*given)
            bits = next(each for each in (made, *given) if isinstance(each, torch.Tensor) and each.dtype == torch.bool)
            if bits.dim() == 3:
                found.append(weakref.ref(bits))
                alive.append(sum(each() is not None for each in found))
            return made

        return watch

    monkeypatch.setattr(WeightMask, "unpacked", watched(WeightMask.unpacked))
    monkeypatch.setattr(files, "pack_bits", watched(files.pack_bits))
    masks.save(random_mask(model), tmp_path / "mask", model, "official")
    written = len(alive)
    masks.load(tmp_path / "mask", model)
    assert len(alive) == 2 * written == 8 and max(alive) <= 2


def test_an_official_file_has_its_digest_beside_it(olmoe, tmp_path, caplog):
    path, beside = tmp_path / "mask.pt", tmp_path / "mask.pt.sha256"
    mask = random_mask(olmoe)
    for _ in range(2):  # the second over the first
        masks.save(mask, path, olmoe, "official")
        assert same(masks.load(path, olmoe), mask) and not caplog.text
    subprocess.run(["sha256sum", "--check", beside.name], cwd=tmp_path, check=True, capture_output=True)
    whole = path.read_bytes()
    path.write_bytes(whole[:5000] + bytes([whole[5000] ^ 1]) + whole[5001:])
    with pytest.raises(ValueError, match="mask.pt: damaged: it does not match its SHA-256 in .*mask.pt.sha256"):
        masks.load(path, olmoe)
    path.write_bytes(whole)
    beside.unlink()
    assert same(masks.load(path, olmoe), mask) and "mask.pt has no digest" in caplog.text
    assert f"(cd {tmp_path} && sha256sum mask.pt > mask.pt.sha256)" in caplog.text


def test_names_in_memory_and_the_old_archive_are_read_too(tmp_path):
    model = models.tiny_olmoe()
    mask = random_mask(model)
    named = {name: mask.kept(name) for name in mask.names}
    torch.save(named, tmp_path / "fused.pt")
    torch.save(official(mask, *FAMILIES["tiny_olmoe"]), tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    mask.save(tmp_path / "native")
    for name in ("fused.pt", "old.pt", "native"):
        assert same(masks.load(tmp_path / name, model), mask), name


def test_a_model_from_disk_has_the_same_names(tmp_path):
    model = models.tiny_mixtral()
    model.save_pretrained(tmp_path / "model")
    loaded, mask = AutoModelForCausalLM.from_pretrained(tmp_path / "model"), random_mask(model)
    masks.save(mask, tmp_path / "a.pt", model, "official")
    assert same(masks.load(tmp_path / "a.pt", loaded), mask)
    masks.save(mask, tmp_path / "b.pt", loaded, "official")
    assert same(masks.load(tmp_path / "b.pt", model), mask)


@pytest.fixture(scope="module")
def olmoe():
    return models.tiny_olmoe()


EXPERT = "model.layers.0.mlp.experts.3.up_proj.weight"


def broken(change):
    def make(model):
        named = masks.to_hub(model, {n: torch.ones(p.shape, dtype=torch.bool) for n, p in model.named_parameters()})
        change(named)
        return named

    return make


BAD = {
    "shape": (broken(lambda m: m.update({EXPERT: m[EXPERT][:-1]})), r"up_proj.weight' must have shape \[24, 32\]; got"),
    "missing": (broken(lambda m: m.pop(EXPERT)), "the mask of '.*experts.3.up_proj.weight' is missing"),
    "unknown": (
        broken(lambda m: m.update({"model.layers.0.mlp.experts.8.up_proj.weight": m[EXPERT]})),
        "'.*experts.8.up_proj.weight' is no parameter of this model; did you mean",
    ),
    "float": (broken(lambda m: m.update({EXPERT: m[EXPERT].float()})), "a dense bool tensor; got torch.float32"),
    "number": (broken(lambda m: m.update({EXPERT: 1})), "must be a dense bool tensor; got int"),
    "sparse": (broken(lambda m: m.update({EXPERT: m[EXPERT].to_sparse()})), "must be a dense bool tensor"),
    "list": (lambda m: [torch.ones(2)], "expected a dict of parameter names and bool tensors; got list"),
    "keys": (lambda m: {1: torch.ones(2)}, "expected a dict of parameter names"),
    "empty": (lambda m: {}, "the mask of '.*' is missing"),
    "huge": (broken(lambda m: m.update({EXPERT: torch.ones((), dtype=torch.bool).expand(10**6, 10**6)})), "shape"),
}


@pytest.mark.parametrize("make,message", BAD.values(), ids=BAD)
def test_bad_masks_are_named(make, message, olmoe, tmp_path):
    torch.save(make(olmoe), tmp_path / "mask.pt")
    with pytest.raises(ValueError, match=rf"mask.pt: .*{message}"):
        masks.load(tmp_path / "mask.pt", olmoe)


class Hostile:
    """A pickle that would make a folder."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


@pytest.mark.parametrize("new", [True, False], ids=["archive", "old archive"])
def test_a_hostile_pickle_runs_nothing(new, olmoe, tmp_path):
    path = tmp_path / "mask.pt"
    torch.save({"a": Hostile(tmp_path / "run")}, path, _use_new_zipfile_serialization=new)
    told = "mask.pt: cannot be read as tensors alone: .* such as [a-z]+.[a-z]+, which is never run$"
    with pytest.raises(ValueError, match=told):
        masks.load(path, olmoe)
    assert not (tmp_path / "run").exists()


@pytest.mark.quick
def test_files_that_are_no_masks(olmoe, tmp_path):
    whole = io.BytesIO()
    torch.save({"a": torch.ones(3, dtype=torch.bool)}, whole)
    with zipfile.ZipFile(tmp_path / "zip", "w") as archive:
        archive.writestr("data.txt", "no tensors")
    contents = {"cut": whole.getvalue()[:200], "text": b"keep them all", "empty": b"", "pickle": b"\x80\x02K\x01."}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    for name in ("zip", "absent", *contents):
        with pytest.raises(ValueError, match=f"{name}: "):
            masks.load(tmp_path / name, olmoe)


def test_saving_for_another_model_leaves_what_was_there(olmoe, tmp_path):
    path = tmp_path / "mask.pt"
    path.write_text("before", encoding="utf-8")
    with pytest.raises(ValueError, match="the mask belongs to another model"):
        masks.save(random_mask(models.tiny_mixtral()), path, olmoe, "official")
    assert path.read_text(encoding="utf-8") == "before" and os.listdir(tmp_path) == ["mask.pt"]


def test_a_wrapped_model_is_refused(olmoe, tmp_path):
    masks.save(random_mask(olmoe), tmp_path / "mask.pt", olmoe, "official")
    with pytest.raises(ValueError, match="a plain transformers model; got Sequential"):
        masks.load(tmp_path / "mask.pt", torch.nn.Sequential(olmoe))
