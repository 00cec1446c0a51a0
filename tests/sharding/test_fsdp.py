"""Two ranks that FSDP2 shares the weights out to make the step of one process, bit for bit."""

import pytest
import torch
from safetensors.torch import load_file

from moe_unlearn.ops.bits import unpack_bits
from moe_unlearn.testing.yardstick import Reference
from tests.support import sharded_child
from tests.support.forked_ranks import found_on
from tests.support.sharded_child import ALL, STEPS, UNEVEN, batches_of, masks_of, step_of, weights_of
from tests.support.steps import check_changes, data, made_of


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """The folder where both have left what they found, and that."""
    folder = tmp_path_factory.mktemp("sharded")
    return folder, *found_on(2, folder, lambda rank: sharded_child.found_by(rank, folder))


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    folder = tmp_path_factory.mktemp("uneven")
    return folder, *found_on(3, folder, lambda rank: sharded_child.found_by(rank, folder))


def alone(name, ranks=2, dtype=torch.float32, *, fused=True):
    """Weights, masks and losses of one process to which the ranks' batches are micro-batches, in the order of ranks."""
    step = step_of(sharded_child.model(name).to(dtype), name, fused=fused)
    losses = []
    for i in range(STEPS):
        metrics = made_of(step, [batches_of(i, rank, ranks) for rank in range(ranks)])
        losses.append({key: value for key, value in metrics.items() if key.endswith(("_loss", "grad_norm"))})
    return weights_of(step) | masks_of(step), losses


@pytest.mark.slow
@pytest.mark.parametrize("name", ALL)
def test_two_ranks_make_the_step_of_one(name, ranks):
    folder, *found = ranks
    ours = load_file(folder / f"{name}.safetensors")
    expected, losses = alone(name)
    assert found[0][name] == found[1][name]
    for mine, theirs in zip(found[0][name], losses, strict=True):
        assert {key: mine[key] for key in theirs} == pytest.approx(theirs, rel=1e-6)
    assert ours.keys() == expected.keys()
    differing = [key for key in ours if not torch.equal(ours[key], expected[key])]
    if name in ("seuf", "level"):
        # their two passes use each weight twice: ranks add up those of each pass, one process those of each micro-batch
        check_changes(sharded_child.model(name), ours, *truth(name, 2), only_changed=True)
    else:
        assert not differing


def truth(name, ranks):
    """A plain float32 run as reference, and one in float64."""
    reference = Reference(lambda: alone(name, ranks, fused=False)[0])
    return reference, alone(name, ranks, torch.float64, fused=False)[0]


@pytest.mark.slow
@pytest.mark.parametrize("name", UNEVEN)
def test_three_ranks_with_uneven_rows_make_the_step_of_one(name, three):
    """But for the order in which gloo adds up three gradients."""
    folder, *found = three
    assert found[0][name] == found[1][name] == found[2][name]
    ours, expected = load_file(folder / f"{name}.safetensors"), alone(name, 3)[0]
    masks = [key for key in expected if key.startswith("mask of ")]
    # the gradients of a mask are added in another order too: those next to the threshold may fall on either side
    assert sum(bits_between(ours[key], expected[key]) for key in masks) <= 2
    if all(torch.equal(ours[key], expected[key]) for key in masks):
        check_changes(sharded_child.model(name), ours, *truth(name, 3), only_changed=True)


def bits_between(ours, theirs):
    return int(unpack_bits(ours ^ theirs, 32 * ours.shape[-1]).sum())


@pytest.mark.slow
def test_references_that_one_rank_has_on_its_disk_are_all_ranks(ranks):
    (files, same), (others, same_there) = (found["cached"] for found in ranks[1:])
    assert files == others == len(data()[0]) and same and same_there


@pytest.mark.slow
def test_weights_cut_along_another_dimension_are_refused_by_name(ranks):
    said = {found["another dimension"] for found in ranks[1:]}
    assert len(said) == 1 and said.pop().startswith("model.embed_tokens.weight is cut along another dimension than 0")
