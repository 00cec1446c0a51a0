"""What each of two ranks keeps under FSDP2: random bits of rounding, its part of masks and states, numerics."""

import json

import pytest
import torch
from safetensors.torch import load_file

from moe_unlearn import masks
from moe_unlearn.masks import WeightMask
from tests.support.sharded_child import masks_of, weights_of
from tests.support.sharded_state_child import NARROW, alike, narrow
from tests.support.two_ranks import run_two

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """The folder where both have left what they found, and that."""
    folder = tmp_path_factory.mktemp("state")
    run_two("tests.support.sharded_state_child", folder)
    return folder, *(json.loads((folder / f"rank{rank}.json").read_text(encoding="utf-8")) for rank in range(2))


@pytest.mark.parametrize("name", NARROW)
def test_bfloat16_is_rounded_with_the_random_bits_of_one_process(name, ranks):
    folder, *_ = ranks
    step = alike(name, 2, shared=False)
    ours, expected = load_file(folder / f"{name}.safetensors"), weights_of(step) | masks_of(step)
    assert any(not torch.equal(value, expected[key]) for key, value in narrow(shared=False).named_parameters())
    assert [key for key in expected if not torch.equal(ours[key], expected[key])] == []


def test_a_rank_keeps_the_words_of_its_rows_alone(ranks):
    _, *found = ranks
    one = alike("stochastic combined", 2, shared=False)
    for name, words in one.prepared.mask.packed.items():
        # the words of a vector are whole on both
        expected = words.nbytes if words.dim() > 1 else 2 * words.nbytes
        assert sum(each["kept"][f"mask {name}"] for each in found) == expected
    for name, words in one.masks.items():
        if words.dim() > 1:
            assert sum(each["kept"][f"step {name}"] for each in found) == words.nbytes
    assert all(each["fraction"] == one.prepared.mask.fraction for each in found)


@pytest.mark.parametrize("format,name", [("native", "mask"), ("official", "official")])
def test_ranks_write_the_mask_of_one_process(format, name, ranks, tmp_path):
    folder, *_ = ranks
    one = alike("stochastic combined", 2, shared=False)
    masks.save(one.prepared.mask, tmp_path / name, one.model, format)
    if format == "native":
        ours, theirs = (WeightMask.load(path / name) for path in (folder, tmp_path))
        assert ours.names == theirs.names and ours.fraction_per_expert.keys() == theirs.fraction_per_expert.keys()
        assert all(torch.equal(ours.words(name), theirs.words(name)) for name in ours.names)
    else:
        assert (folder / name).read_bytes() == (tmp_path / name).read_bytes()
