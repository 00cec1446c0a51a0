"""Sums in PyTorch's operations and the sizes of their partial sums, from which `rounding` derives rounding errors.

Source: our specification; see `rounding`.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch._ops import OpOverload, OpOverloadPacket

_PLACES = 32
_LANES = (1, 4, 16)
_aten = torch.ops.aten


class Product(NamedTuple):
    """A sum written as a product: a [B, M, K] times b [B, K, N], times `scale`, plus the tensor `onto` if given."""

    a: Tensor
    b: Tensor
    scale: float = 1.0
    onto: Tensor | None = None


def product(func: OpOverload, args: tuple, kwargs: dict) -> Product | None:
    """Return the sum that an operation computes, as a `Product`; None for other operations."""
    op = func.overloadpacket
    if op in (_aten.addmm, _aten.baddbmm):
        a, b = (t if op == _aten.baddbmm else t[None] for t in args[1:3])
        beta = kwargs.get("beta", 1)
        return Product(a, b, kwargs.get("alpha", 1), beta * args[0] if beta else None)
    if op == _aten.mm:
        return Product(args[0][None], args[1][None])
    if op == _aten.bmm:
        return Product(args[0], args[1])
    if op == _aten.mv:
        return Product(args[0][None], args[1][None, :, None])
    if op in (_aten.dot, _aten.vdot):
        return Product(args[0][None, None], args[1][None, :, None])
    if op not in (_aten.sum, _aten.mean):
        return None
    x = args[0] if args[0].dim() else args[0].reshape(1)
    dims = kwargs.get("dim", args[1] if len(args) > 1 else None)
    dims = range(x.dim()) if dims is None or dims == [] else [dims] if isinstance(dims, int) else dims
    dims = sorted({d % x.dim() for d in dims})
    rest = [d for d in range(x.dim()) if d not in dims]
    count = math.prod(x.shape[d] for d in dims)
    if not count:
        return None
    flat = x.permute(*rest, *dims).reshape(1, math.prod(x.shape[d] for d in rest), count)
    return Product(flat, x.new_ones(1, count, 1), 1 / count if op == _aten.mean else 1.0)


def partial_squares(a: Tensor, b: Tensor) -> Tensor:
    """Return the largest sum of squared partial sums of several orders, [B, M, N]; a is [B, M, K], b [B, K, N]."""
    batch, rows, depth = a.shape
    columns = b.shape[2]
    if not a.numel() or not b.numel():
        return a.new_zeros(batch, rows, columns)
    total, terms = (a @ b).square(), a.square() @ b.square()
    # for a shuffled sum this is E[S_k^2] for k of the K terms drawn without replacement, summed over k
    worst = depth * total / 3 + (depth + 1) / 6 * (terms - total / depth).clamp_min(0)
    for lanes in _LANES:
        order = torch.cat([torch.arange(i, depth, lanes, device=a.device) for i in range(min(lanes, depth))])
        worst = torch.maximum(worst, _in_order(a[:, :, order], b[:, order]))
    return worst + terms


def _in_order(a: Tensor, b: Tensor) -> Tensor:
    """Return the sum of squared partial sums, the larger one of adding first to last and last to first."""
    size = math.ceil(a.shape[2] / _PLACES)
    partial = a.new_zeros(a.shape[0], a.shape[1], b.shape[2])
    before, sums, squares = (torch.zeros_like(partial) for _ in range(3))
    blocks = list(zip(a.split(size, 2), b.split(size, 1), strict=True))
    for x, y in blocks:
        before.addcmul_(partial, partial)
        sums += partial
        partial = torch.baddbmm(partial, x, y)
        squares.addcmul_(partial, partial)
    # when adding from the last term on, a partial sum is the total less the sum of the terms before it
    backward = len(blocks) * partial.square() - 2 * partial * sums + before
    return size * torch.maximum(squares, backward)


def scattered(op: OpOverloadPacket, args: tuple, kwargs: dict) -> tuple[Tensor, Tensor] | None:
    """Return places [R] in the flat target and terms [R] of an operation that adds up by index; None for others."""
    target = args[0]
    if op in (_aten.index_add, _aten.index_add_):
        dim, index, source = args[1:4]
        shape = [-1 if d == dim % target.dim() else 1 for d in range(target.dim())]
        index = index.reshape(shape).expand(source.shape) if target.dim() else index
        return _flat_places(target, dim, index), (kwargs.get("alpha", 1) * source).double().flatten()
    if op in (_aten.scatter_add, _aten.scatter_add_):
        dim, index, source = args[1:4]
        source = source[tuple(slice(n) for n in index.shape)]
        return _flat_places(target, dim, index), source.double().flatten()
    if op in (_aten.index_put, _aten.index_put_, _aten._index_put_impl_, _aten._unsafe_index_put):
        indices, values = args[1:3]
        if not (args[3] if len(args) > 3 else kwargs.get("accumulate", False)):
            return None
        places = torch.arange(target.numel(), device=target.device).view(target.shape)
        chosen = _aten.index(places, indices)
        return chosen.flatten(), values.double().expand(chosen.shape).flatten()
    return None


def _flat_places(target: Tensor, dim: int, index: Tensor) -> Tensor:
    """Return the flat places in `target` of elements that `index` moves along `dim`."""
    places = torch.arange(target.numel(), device=target.device).view(target.shape)
    window = places[tuple(slice(None) if d == dim % target.dim() else slice(n) for d, n in enumerate(index.shape))]
    return window.gather(dim, index.long()).flatten()


def segment_squares(places: Tensor, terms: Tensor, shape: torch.Size) -> Tensor:
    """Return the sum of squared partial sums at each place, the larger of adding first to last and last to first."""
    order = places.argsort(stable=True)
    places, terms = places[order], terms[order].nan_to_num(0.0, 0.0, 0.0)
    forward, backward = (terms.cumsum(0), terms.flip(0).cumsum(0).flip(0))
    first = torch.searchsorted(places, places)
    last = torch.searchsorted(places, places, right=True) - 1
    partial = torch.maximum(
        (forward - forward[first] + terms[first]).abs(), (backward - backward[last] + terms[last]).abs()
    )
    return partial.new_zeros(math.prod(shape)).index_add_(0, places, partial.square()).view(shape)
