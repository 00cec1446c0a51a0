"""Rows of a rank by arithmetic, against torch's own for every mesh of up to 8 ranks, and as read off a parameter."""

import pytest
import torch
from torch import distributed
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor._utils import _compute_local_shape_and_global_offset
from torch.distributed.tensor.placement_types import _StridedShard
from torch.testing._internal.distributed.fake_pg import FakeStore

from moe_unlearn.sharding import Placing, first_row, part, placing_of, rows_here

pytestmark = pytest.mark.quick
PAIRS = [(a, b) for a in range(1, 9) for b in range(1, 9) if a * b <= 8]
CASES = {
    **{f"fsdp {n}": (Placing.fsdp(n), (Shard(0),)) for n in range(1, 9)},
    **{f"replicas {r} x {n}": (Placing.fsdp(n, r), (Replicate(), Shard(0))) for r, n in PAIRS if r > 1},
    **{
        f"ep {ep} x efsdp {f}": (Placing.experts(ep, f), (_StridedShard(0, split_factor=ep), Shard(0)))
        for f, ep in PAIRS
    },
    **{f"{a} then {b}": (Placing((a, b), (1, 1), ("outer", "inner")), (Shard(0), Shard(0))) for a, b in PAIRS},
}


def counts(placing):
    """How many rows a parameter may have: transformers deals out equal numbers of experts."""
    step = placing.sizes[-1] if placing.names[-1] == "ep" else 1
    return range(step, 18 * step, step)


@pytest.mark.parametrize("case", CASES)
def test_what_a_rank_holds_is_what_torch_gives_it(case):
    placing, placements = CASES[case]
    for rows in counts(placing):
        for place in placing.coordinates():
            held = placing.held(rows, place)
            shape, offset = _compute_local_shape_and_global_offset((rows, 3), placing.sizes, list(place), placements)
            assert len(held) == shape[0], (rows, place)
            assert not held or held.start == offset[0], (rows, place)


@pytest.mark.parametrize("case", CASES)
def test_every_row_is_held_and_those_who_see_it_sum_it(case):
    placing, _ = CASES[case]
    for rows in counts(placing):
        assert [row for block in placing.blocks(rows) for row in block] == list(range(rows))
        for place in placing.coordinates():
            seen = placing.seen(rows, place)
            if placing.names[-1] == "ep":
                assert seen == range(place[-1] * rows // placing.sizes[-1], (place[-1] + 1) * rows // placing.sizes[-1])
            else:
                assert seen == range(rows)
            peers = placing.peers(place)
            assert place in peers and {placing.seen(rows, peer) for peer in peers} == {seen}
            assert {row for peer in peers for row in placing.held(rows, peer)} == set(seen)
            others = {row for p in placing.coordinates() if p not in peers for row in placing.held(rows, p)}
            assert not others & set(seen)


def test_worked_example():
    placing = Placing.experts(ep=2, efsdp=2)
    assert placing.held(8, (1, 0)) == range(2, 4) and placing.seen(8, (1, 0)) == range(4)
    assert placing.peers((1, 0)) == [(0, 0), (1, 0)]


def test_rows_that_are_no_block_are_refused():
    scattered = Placing((2, 1), (3, 1), ("a", "b"))
    with pytest.raises(ValueError, match=r"one block; got \[range\(0, 2\), range\(4, 6\), range\(8, 10\)\] of 12 rows"):
        scattered.held(12, (0, 0))


@pytest.fixture
def rank_of():
    """Makes this process a rank of a group whose other ranks do not exist: whatever waits for them is wrong at once."""

    def become(rank: int, world: int) -> None:
        if distributed.is_initialized():
            distributed.destroy_process_group()
        distributed.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)

    yield become
    if distributed.is_initialized():
        distributed.destroy_process_group()


def group_of(rows):
    return None if rows.group is None else distributed.get_process_group_ranks(rows.group)


@pytest.mark.parametrize("rank", range(3))
def test_rows_are_read_off_a_parameter(rank, rank_of):
    rank_of(rank, 3)
    mesh = DeviceMesh("cpu", torch.arange(3), mesh_dim_names=("fsdp",))
    whole = torch.arange(10.0).view(5, 2)
    weight = distribute_tensor(whole, mesh, [Shard(0)], src_data_rank=None)
    rows = rows_here("w", weight)
    held = [range(0, 2), range(2, 4), range(4, 5)]
    assert rows.held == held[rank] and rows.seen == range(5) and rows.parts == rows.blocks == tuple(held)
    assert group_of(rows) == [0, 1, 2] and [*map(distributed.get_process_group_ranks, rows.reduced)] == [[0, 1, 2]]
    assert first_row(weight) == rows.held.start and first_row(whole) == 0
    assert torch.equal(part(weight), whole[rows.held.start : rows.held.stop]) and part(whole) is whole


@pytest.mark.parametrize("rank", range(4))
def test_experts_are_read_off_a_parameter(rank, rank_of):
    rank_of(rank, 4)
    mesh = DeviceMesh("cpu", torch.arange(4).view(2, 2), mesh_dim_names=("efsdp", "ep"))
    efsdp, ep = divmod(rank, 2)
    weight = DTensor.from_local(
        torch.zeros(2, 3),
        mesh,
        [_StridedShard(0, split_factor=2), Shard(0)],
        run_check=False,
        shape=(8, 3),
        stride=(3, 1),
    )
    rows = rows_here("w", weight)
    assert rows.seen == range(4 * ep, 4 * ep + 4)
    assert rows.parts == (range(4 * ep, 4 * ep + 2), range(4 * ep + 2, 4 * ep + 4)) and rows.held == rows.parts[efsdp]
    assert group_of(rows) == [ep, ep + 2]
    assert [distributed.get_process_group_ranks(g) for g in rows.reduced] == [[ep, ep + 2], [2 * efsdp, 2 * efsdp + 1]]


def test_replicas_are_summed_by_all(rank_of):
    rank_of(3, 4)
    mesh = DeviceMesh("cpu", torch.tensor([[0, 2], [1, 3]]), mesh_dim_names=("dp_replicate", "fsdp"))
    weight = distribute_tensor(torch.zeros(6, 2), mesh, [Replicate(), Shard(0)], src_data_rank=None)
    rows = rows_here("w", weight)
    # ranks in the order of the group, which is not that of the mesh
    assert rows.parts == (range(3), range(3), range(3, 6), range(3, 6)) and rows.held == range(3, 6)
    assert group_of(rows) == [0, 1, 2, 3] and [distributed.get_process_group_ranks(g) for g in rows.reduced] == [[1, 3]]


@pytest.mark.parametrize("placements", [[Shard(1)], [_StridedShard(1, split_factor=2)]])
def test_another_dimension_is_refused_by_name(placements, rank_of):
    rank_of(0, 2)
    mesh = DeviceMesh("cpu", torch.arange(2), mesh_dim_names=("tp",))
    weight = DTensor.from_local(torch.zeros(4, 4), mesh, placements, run_check=False, shape=(4, 8), stride=(8, 1))
    with pytest.raises(ValueError, match="q_proj.weight is cut along another dimension than 0 .*tensor parallelism"):
        placing_of("q_proj.weight", weight)
