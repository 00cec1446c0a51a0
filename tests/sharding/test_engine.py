"""What one process asks of an engine that is not there, and which versions are refused."""

import importlib.metadata

import pytest
import torch

from moe_unlearn.masks.shards import own_words
from moe_unlearn.ops.bits import pack_bits
from moe_unlearn.sharding import Placing, Rows, as_forward, check_engine, reset, reshard, sum_of_peers

pytestmark = pytest.mark.quick


def test_without_an_engine_a_function_is_called_itself():
    model = torch.nn.Linear(1, 1)
    assert as_forward(model, len) is len
    reshard(model)
    reset(model)
    rows = torch.ones(2, 3)
    assert sum_of_peers(rows, (2,), None) is rows


@pytest.mark.parametrize(
    "library,version,refused",
    [
        ("torch", "2.12.1+cu130", "torch >= 2.13"),
        ("transformers", "5.18.0", "transformers >= 5.19"),
        ("torch", "3.0", ""),
    ],
)
def test_versions_that_are_too_old_are_refused_by_name(library, version, refused, monkeypatch):
    actual = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: version if name == library else actual(name))
    if refused:
        with pytest.raises(ValueError, match=f"sharded weights need {refused}; this is {library} {version[:4]}"):
            check_engine(torch.nn.Linear(1, 1))
    else:
        check_engine(torch.nn.Linear(1, 1))


@pytest.mark.parametrize("shape", [(70,), (7, 33), (7, 3, 40)])
@pytest.mark.parametrize("ranks", [1, 3, 8])
def test_a_mask_is_cut_like_its_weight(shape, ranks):
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(0)) < 0.5
    placing = Placing.fsdp(ranks)
    for rank in range(ranks):
        held = placing.held(shape[0], (rank,))
        rows = Rows(held, range(shape[0]), (held,), None, (), tuple(placing.blocks(shape[0])))
        own = own_words(pack_bits(mask), rows, shape[0])
        assert torch.equal(own, pack_bits(mask[held.start : held.stop]))
