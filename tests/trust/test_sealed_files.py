"""Of files that are damaged on the disk, masks and states of a step, none is read as if it were whole."""

import random

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from moe_unlearn.checkpoint import states
from moe_unlearn.masks import WeightMask
from moe_unlearn.ops.bits import pack_bits
from tests.support.damage import FORMS, damaged


def write_mask(folder):
    draw = torch.Generator().manual_seed(0)
    kept = {name: torch.rand(shape, generator=draw) < 0.6 for name, shape in {"a": (3, 70), "b.weight": (33,)}.items()}
    shapes = {name: tuple(k.shape) for name, k in kept.items()}
    WeightMask(shapes, {name: pack_bits(k) for name, k in kept.items()}, keep=0.6).save(folder / "mask")


def write_state(folder):
    cache = {"keys": ["ab" * 32, "cd" * 32], "values": torch.rand(2, 5)}
    prepared = {"done": ["trace", "wagle"], "kl_floor": 1e-5, "selected": torch.eye(3).bool(), "token_weights": cache}
    states.save_state(folder, "unlearn", {"recipe": {"name": "combined"}, "steps": 3, "prepared": prepared})


KINDS = {
    "mask": (write_mask, lambda folder: WeightMask.load(folder / "mask")),
    "state": (write_state, lambda folder: states.load_state(folder, "unlearn")),
}


@pytest.mark.quick
@pytest.mark.parametrize("trials", [30, pytest.param(200, marks=pytest.mark.nightly)])
@pytest.mark.parametrize("kind", KINDS)
def test_no_damage_is_silent(kind, trials, tmp_path):
    write, read = KINDS[kind]
    write(tmp_path)
    read(tmp_path)
    draw, silent = random.Random(trials), []
    for path in sorted(tmp_path.iterdir()):
        whole = path.read_bytes()
        for trial in range(trials):
            if (content := damaged(whole, draw.choice(FORMS), draw)) == whole:
                continue
            path.unlink(missing_ok=True) if content is None else path.write_bytes(content)
            try:
                read(tmp_path)
            except (ValueError, FileNotFoundError) as error:
                assert path.stem in str(error)
            else:
                silent.append((path.name, trial))
        path.write_bytes(whole)
    assert not silent


@pytest.mark.quick
def test_files_of_earlier_versions_are_read_with_a_warning(tmp_path, caplog):
    write_mask(tmp_path)
    write_state(tmp_path)
    mask, state = (read(tmp_path) for _, read in KINDS.values())
    with safe_open(tmp_path / "mask", "pt") as file:
        about = file.metadata() | {"format": "moe-unlearn weight mask 1"}
    del about["sha256"]
    save_file(mask.packed, tmp_path / "mask", about)
    save_file(load_file(tmp_path / "unlearn.safetensors"), tmp_path / "unlearn.safetensors")
    old_mask, old_state = (read(tmp_path) for _, read in KINDS.values())
    assert all(torch.equal(old_mask.packed[name], mask.packed[name]) for name in mask.names)
    assert old_state["prepared"]["done"] == state["prepared"]["done"]
    assert f"{tmp_path / 'mask'} has no digest" in caplog.text and "WeightMask.load(path).save(path)" in caplog.text
    assert f"{tmp_path / 'unlearn.safetensors'} has no digest" in caplog.text
    save_file(mask.packed, tmp_path / "mask", about | {"format": "moe-unlearn weight mask 2"})
    with pytest.raises(ValueError, match="damaged: what it holds does not match its SHA-256"):
        WeightMask.load(tmp_path / "mask")
