"""Of files that are damaged on the disk, masks and states of a step, none is read as if it were whole."""

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from moe_unlearn.masks import WeightMask
from tests.trust.sealed import KINDS, damage, write_mask, write_state


@pytest.mark.quick
@pytest.mark.parametrize("trials", [30, pytest.param(200, marks=pytest.mark.nightly)])
@pytest.mark.parametrize("kind", KINDS)
def test_no_damage_is_silent(kind, trials, tmp_path):
    assert 0 < damage(kind, trials, tmp_path) <= 2 * trials


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
