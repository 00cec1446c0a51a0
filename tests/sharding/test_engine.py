"""One process refuses an engine that is not there, and versions that are too old."""

import importlib.metadata

import pytest
import torch
from transformers.distributed import DistributedConfig

from moe_unlearn.masks.shards import own_words
from moe_unlearn.ops.bits import pack_bits, slices_with_a_bit
from moe_unlearn.sharding import Placing, Rows, as_forward, check_engine, reset, reshard, sum_of_peers
from moe_unlearn.step.sharded import exchange_of
from tests.support.models import tiny_olmoe

pytestmark = pytest.mark.quick


def test_without_an_engine_a_function_is_called_itself():
    model = torch.nn.Linear(1, 1)
    assert as_forward(model, len) is len
    reshard(model)
    reset(model)
    rows = torch.ones(2, 3)
    assert sum_of_peers(rows, (2,), None, None).data_ptr() == rows.data_ptr()


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


@pytest.mark.filterwarnings("ignore:.enable_expert_parallel. without .ep_size.:FutureWarning")
def test_the_engine_refuses_its_old_name_for_expert_parallelism():
    """`enable_expert_parallel` alone leads nowhere, as it asks for ranks without a plan: `ep_size` is the way."""
    asked = DistributedConfig(tp_size=2, enable_expert_parallel=True)
    with pytest.raises(ValueError, match="`tp_size=2` was requested, but `OlmoeForCausalLM` has no `tp_plan`"):
        tiny_olmoe(vocab_size=8)._resolve_parallel_plans(asked)
    ways = tiny_olmoe(vocab_size=8)._resolve_parallel_plans(DistributedConfig(fsdp_size=2, ep_size=2))
    assert not ways[0] and all(ways[1:])


@pytest.mark.parametrize("shape", [(70,), (7, 33), (7, 3, 40)])
@pytest.mark.parametrize("ranks", [1, 3, 8])
def test_a_mask_is_cut_like_its_weight(shape, ranks):
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(0)) < 0.5
    placing = Placing.fsdp(ranks)
    for rank in range(ranks):
        held = placing.held(shape[0], (rank,))
        own = own_words(pack_bits(mask), held, shape[0])
        assert torch.equal(own, pack_bits(mask[held.start : held.stop]))


def test_each_row_is_sent_to_all_who_hold_it():
    halves = range(3), range(3, 6)
    rows = Rows(halves[0], range(6), (halves[0], halves[0], halves[1], halves[1]), None, (), halves)
    weight = torch.zeros(6, 2, 4)
    every = exchange_of(weight, rows, None)
    assert every.slices is None and every.counts == (3, 3, 3, 3)
    assert every.order.tolist() == [0, 1, 2, 0, 1, 2, 3, 4, 5, 3, 4, 5]
    trained = torch.zeros(6, 2, 4, dtype=torch.bool)
    trained[[1, 4, 5]] = True
    slices = slices_with_a_bit(weight, pack_bits(trained))
    some = exchange_of(weight, rows, slices)
    assert some.slices.tolist() == [1, 4, 5] and some.counts == (1, 1, 2, 2)
    assert some.order.tolist() == [0, 0, 1, 2, 1, 2]
    # the ranks of one engine without replicas, of which this one sees the second half
    own = exchange_of(weight, Rows(range(3, 5), halves[1], (range(3, 5), range(5, 6)), None, (), ()), slices)
    assert own.slices.tolist() == [1, 2] and own.counts == (1, 1) and own.order is None
