"""Computes which rows of a parameter each rank of a mesh holds, sees and sums, without any communication.

    holds   the rows of weight, mask and optimizer state that lie on the rank
    sees    the rows that the rank's forward pass uses: all of them under FSDP2, those of its own experts under expert
            parallelism
    sums    ranks that see the same rows add up their gradients, and each keeps what it holds

`Placing` takes plain numbers, so that a plan may ask for a mesh that does not exist; `rows_here` reads them off a
parameter. Worked example, 8 experts on 4 ranks, ep 2 x efsdp 2: the rank at (efsdp 1, ep 0) sees experts 0 to 3, holds
2 and 3, and adds up with the rank at (efsdp 0, ep 0).

Deterministic. Source: the layouts of torch.distributed.tensor, after which the tests check every case.
"""

import functools
from collections.abc import Sequence
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor, distributed

#: the mesh dimension along which ranks see different experts, as transformers calls it
EXPERTS = "ep"


class Placing(NamedTuple):
    """How the rows of a parameter lie on a mesh.

    sizes: how many ranks each dimension of the mesh has. splits: for each dimension 0 if its ranks have the same rows,
    1 if rows are cut into one part a rank, k > 1 if each of k parts is cut so by itself (torch's `_StridedShard`).
    names: of the dimensions.
    """

    sizes: tuple[int, ...]
    splits: tuple[int, ...]
    names: tuple[str, ...]

    @classmethod
    def fsdp(cls, ranks: int, replicas: int = 1) -> "Placing":
        """Return where FSDP2 puts a parameter on `ranks` ranks, or on each of `replicas` times as many."""
        if replicas == 1:
            return cls((ranks,), (1,), ("fsdp",))
        return cls((replicas, ranks), (0, 1), ("dp_replicate", "fsdp"))

    @classmethod
    def experts(cls, ep: int, efsdp: int = 1) -> "Placing":
        """Return where transformers puts an expert weight: experts cut over `ep`, and each part over `efsdp` ranks."""
        return cls((efsdp, ep), (ep, 1), ("efsdp", EXPERTS))

    def coordinates(self) -> list[tuple[int, ...]]:
        """Return the coordinates of all ranks, in the order of the mesh."""
        return list(product(*map(range, self.sizes)))

    def held(self, rows: int, coordinate: Sequence[int]) -> range:
        """Return which of `rows` rows a rank holds; ValueError if they are not one block."""
        return self._cut(rows, coordinate, range(len(self.sizes)))

    def seen(self, rows: int, coordinate: Sequence[int]) -> range:
        """Return which of `rows` rows the forward pass of a rank uses."""
        return self._cut(rows, coordinate, [i for i, name in enumerate(self.names) if name == EXPERTS], whole=True)

    def peers(self, coordinate: Sequence[int]) -> list[tuple[int, ...]]:
        """Return the coordinates of the ranks that see the same rows as this one, in the order of the mesh."""
        apart = [i for i, name in enumerate(self.names) if name == EXPERTS and self.splits[i]]
        return [other for other in self.coordinates() if all(other[i] == coordinate[i] for i in apart)]

    def blocks(self, rows: int) -> list[range]:
        """Return the different blocks of rows that ranks hold, in the order of the rows, empty ones left out."""
        found = {self.held(rows, coordinate) for coordinate in self.coordinates()}
        return sorted((block for block in found if block), key=lambda block: block.start)

    def _cut(self, rows: int, coordinate: Sequence[int], dimensions: Sequence[int], *, whole: bool = False) -> range:
        """Cut along some dimensions of the mesh; `whole` parts are not cut out of others."""
        parts = [range(rows)]
        for i in dimensions:
            if self.splits[i]:
                factor = 1 if whole else self.splits[i]
                parts = _taken(parts, _spans(sum(map(len, parts)), self.sizes[i], coordinate[i], factor))
        merged = _merged(parts)
        if len(merged) > 1:
            raise ValueError(f"expected the rows of a rank to be one block; got {merged} of {rows} rows on {self}")
        return merged[0] if merged else range(rows, rows)


class Rows(NamedTuple):
    """Says what this rank holds and sees of one parameter.

    `parts` are what each rank of `group` holds, in the order of the group; they see the same rows and add up their
    gradients. A group of None is this rank alone. `reduced` are the groups over which sums of all rows are completed,
    one after the other: one for each dimension of the mesh along which the parameter is cut.
    """

    held: range
    seen: range
    parts: tuple[range, ...]
    group: "distributed.ProcessGroup | None"
    reduced: "tuple[distributed.ProcessGroup, ...]"
    blocks: tuple[range, ...]  # what any rank holds, in the order of the rows


def is_sharded(tensor: Tensor) -> bool:
    """Return whether a tensor is torch's DTensor, of which each rank has a part."""
    return hasattr(tensor, "placements")


@torch.no_grad()
def part(tensor: Tensor) -> Tensor:
    """Return what this rank holds of a tensor; the memory is the tensor's own."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def whole(tensor: Any) -> Tensor:
    """Return all of a tensor; for a sharded one every rank has to call this."""
    full: Tensor = tensor.full_tensor() if is_sharded(tensor) else tensor
    return full


def like(parameter: Any, own: Tensor) -> Tensor:
    """Return `own`, this rank's rows of a tensor [len(parameter), ...], shared out as a sharded parameter is."""
    # imported here because a single process never needs it and it is slow to import
    from torch.distributed.tensor import DTensor

    row = torch.empty(0, *own.shape[1:], device="meta")
    made: Tensor = DTensor.from_local(
        own,
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=torch.Size((len(parameter), *own.shape[1:])),
        stride=row.stride(),
    )
    return made


def placing_of(name: str, parameter: Any) -> Placing:
    """Return where a sharded parameter lies; ValueError, which names it, if it is cut other than along dimension 0."""
    splits = []
    for placement in parameter.placements:
        dimension = getattr(placement, "dim", None)
        if dimension not in (None, 0) or placement.is_partial():
            raise ValueError(
                f"{name} is cut along another dimension than 0 ({placement}), as tensor parallelism does, which is not "
                "supported; expected FSDP2 or expert parallelism, which share out whole rows"
            )
        splits.append(0 if dimension is None else int(getattr(placement, "split_factor", 1)))
    mesh = parameter.device_mesh
    names = mesh.mesh_dim_names or tuple(f"dimension {i}" for i in range(mesh.ndim))
    return Placing(tuple(mesh.shape), tuple(splits), tuple(names))


def held_rows(parameter: Any) -> range:
    """Return the rows of a parameter that this rank holds, all of one that is not sharded; a scalar is one row."""
    count = len(parameter) if parameter.dim() else 1
    if not is_sharded(parameter):
        return range(count)
    return _held(placing_of("a parameter", parameter), count, tuple(parameter.device_mesh.get_coordinate()))


def first_row(parameter: Any) -> int:
    """Return which row of a parameter the first one is that this rank holds, 0 for one that is not sharded."""
    return held_rows(parameter).start


@functools.cache
def _held(placing: Placing, rows: int, coordinate: tuple[int, ...]) -> range:
    return placing.held(rows, coordinate)


def rows_here(name: str, parameter: Any, group: "distributed.ProcessGroup | None" = None) -> Rows:
    """Return the rows of a sharded parameter on this rank; `group` are all ranks of the model, None the default group.

    No rank waits for another. Raises ValueError, which names the parameter, for a layout that is not supported.
    """
    mesh, count, placing = parameter.device_mesh, len(parameter), placing_of(name, parameter)
    coordinate = tuple(mesh.get_coordinate())
    peers = placing.peers(coordinate)
    held, seen = placing.held(count, coordinate), placing.seen(count, coordinate)
    if held and not (seen.start <= held.start and held.stop <= seen.stop):
        raise ValueError(f"{name}: this rank holds rows {held}, which its forward pass does not see ({seen})")
    varying = [i for i in range(mesh.ndim) if len({peer[i] for peer in peers}) > 1]
    summing = None
    if len(varying) == 1:
        summing = mesh.get_group(varying[0])
    elif varying:
        summing = distributed.group.WORLD if group is None else group
        if distributed.get_world_size(summing) != len(peers):
            raise ValueError(
                f"{name} is summed over {[placing.names[i] for i in varying]} of its mesh, {len(peers)} ranks: "
                "replicas are supported where all ranks together are one mesh, without expert parallelism"
            )
    parts: tuple[range, ...] = (held,)
    if summing is not None:
        where = [(mesh.mesh == rank).nonzero()[0].tolist() for rank in distributed.get_process_group_ranks(summing)]
        parts = tuple(placing.held(count, place) for place in where)
    reduced = tuple(mesh.get_group(i) for i, n in enumerate(placing.sizes) if placing.splits[i] and n > 1)
    return Rows(held, seen, parts, summing, reduced, tuple(placing.blocks(count)))


def rows_of_work(parameter: Tensor, group: "distributed.ProcessGroup") -> Rows:
    """Return the rows of a parameter, whole on every rank of `group`, on which this rank works: as FSDP2 cuts them."""
    count, ranks = len(rowwise(parameter)), distributed.get_world_size(group)
    placing = Placing.fsdp(ranks)
    parts = tuple(placing.held(count, (rank,)) for rank in range(ranks))
    held = parts[distributed.get_rank(group)]
    return Rows(held, range(count), parts, group, (group,), tuple(placing.blocks(count)))


def rowwise(tensor: Tensor) -> Tensor:
    """Return a view of a tensor that has rows: a scalar is one row."""
    return tensor if tensor.dim() else tensor.view(1)


def _spans(rows: int, ranks: int, index: int, factor: int) -> list[range]:
    """Return the positions that the rank `index` of `ranks` takes of `rows` rows, out of each of `factor` parts."""
    spans = []
    whole = max(-(-rows // factor), 1)
    for start in range(0, rows, whole):
        size = min(whole, rows - start)
        part = -(-size // ranks)
        spans.append(range(start + min(index * part, size), start + min((index + 1) * part, size)))
    return spans


def _taken(parts: list[range], spans: list[range]) -> list[range]:
    """Return the rows at the positions `spans` of `parts` laid end to end."""
    found = []
    for span in spans:
        first = 0
        for part in parts:
            start, stop = max(span.start - first, 0), min(span.stop - first, len(part))
            if start < stop:
                found.append(part[start:stop])
            first += len(part)
    return found


def _merged(parts: list[range]) -> list[range]:
    """Join ranges that follow one another."""
    merged: list[range] = []
    for part in parts:
        if merged and merged[-1].stop == part.start:
            merged[-1] = range(merged[-1].start, part.stop)
        else:
            merged.append(part)
    return merged
