"""Each of two ranks keeps its own part under FSDP2: random bits of rounding, masks and states, numerics."""

import pytest
import torch
from safetensors.torch import load_file

from moe_unlearn import masks
from moe_unlearn.masks import WeightMask
from tests.support import sharded_child, sharded_state_child
from tests.support.forked_ranks import found_on
from tests.support.sharded_child import masks_of, weights_of
from tests.support.sharded_state_child import NARROW, REBOUND, RESUMED, alike, begun, gone_on, micro_batches, narrow
from tests.support.steps import made_of

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """The folder where both have left what they found, and that."""
    folder = tmp_path_factory.mktemp("state")
    begun(sharded_child.model(), micro_batches(0), folder / "of one")
    return folder, *found_on(2, folder, lambda rank: sharded_state_child.found_by(rank, folder))


@pytest.mark.parametrize("name", [*NARROW, f"rebound {REBOUND}"])
def test_bfloat16_is_rounded_with_the_random_bits_of_one_process(name, ranks):
    folder, *_ = ranks
    step = alike(name.removeprefix("rebound "), 2, shared=False)
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
    assert all(each["rebound"]["kept"] == each["kept"] for each in found)
    assert all(each["fraction"] == one.prepared.mask.fraction for each in found)


def test_weights_are_shared_out_before_the_first_step(ranks):
    for found in ranks[1:]:
        assert "the optimizer has states of weights that are no longer in the model" in found["rebound"]["said"]


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


@pytest.mark.parametrize("made_by,gone_on_by", [("of ranks", "ranks"), ("of one", "ranks"), ("of ranks", "one")])
def test_ranks_and_one_process_go_on_from_each_others_states(made_by, gone_on_by, ranks):
    folder, *_ = ranks
    step = sharded_child.step_of(sharded_child.model(), RESUMED)
    for i in range(2):
        made_of(step, micro_batches(i))
    expected = weights_of(step)
    if gone_on_by == "ranks":
        ours = load_file(folder / f"on {made_by}.safetensors")
    else:
        ours = weights_of(gone_on(sharded_child.model(), micro_batches(1), folder / made_by))
    assert [key for key in expected if not torch.equal(ours[key], expected[key])] == []
