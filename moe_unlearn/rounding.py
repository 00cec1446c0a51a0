"""Other arithmetics for plain PyTorch code: exact products, sloppy products, and roundings that fall at random.

    with rounding.arithmetic("random", seed=3):
        reference(**inputs)

Every operation inside, also those of a backward pass, is computed anew from its actual operands:

    exact        sums and products in float64, rounded once to the dtype they have: no library is more accurate
    sequential   sums and products as the plainest loop has them: one term after the other in float32, every
                 product and every partial sum rounded
    random       everything in float64, plus what the roundings of float32 do to it, drawn at random

**Random roundings.** A sum t_1 + ... + t_K in floating point is off by sum_k d_k S_k: S_k are its partial sums, and
d_k, the relative error of one addition, lies within the unit roundoff u (2^-24 for float32) and is at most as wide as
the uniform distribution, of standard deviation u / sqrt(3). So the error's deviation is

    u sqrt(sum_k S_k^2 / 3)

and depends on the order of the additions through the S_k alone. Which order a library takes is its own affair, so
the largest of those of several orders counts: one term after the other, from the last to the first, the lanes of 4
or 16 interleaved ones after each other, and the mean over all orders, K S^2 / 3 + (K + 1) / 6 (Q - S^2 / K) with S
the sum and Q that of the squared terms. (Sums in pairs, in blocks or in lanes side by side have shorter partial
sums than one of these.) Products are rounded too (no fused multiply-add), which adds Q. Partial sums are taken in
float64 at up to 32 places of a sum; between two of them they count as the later one. A result is rounded to nearest
after an offset of up to half a last bit: functions like exp are correct to a last bit only, and a kernel may keep in
float32, or round elsewhere, what the reference keeps in bfloat16.

Runs with several seeds show what the roundings of a whole function can do, whatever it is made of. With random
roundings the ops of this package are computed by their references; else only those are seen that are asked for by
`impl="ref"`. A value that an operation only moves is never changed. Sums that are seen are products of matrices, sum,
mean, softmax and its like, norms, cumsum, and what is added up by index; those inside of a convolution or of another
library are not, and get the offset of their result alone.

Deterministic for a seed. Source: our specification; running a program with random roundings is Monte Carlo
arithmetic (Parker 1997), and the error of a sum by its partial sums is Higham's (Accuracy and Stability of Numerical
Algorithms, section 4.2).
"""

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch._decomp import get_decompositions
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

ARITHMETICS = ("exact", "sequential", "random")
_PLACES = 32
_LANES = (1, 4, 16)
_CHUNK = 1 << 22  # float64 numbers that the partial sums of a product may take at once
_aten = torch.ops.aten

# they round nothing, whatever their operands
_EXACT = frozenset({
    _aten.set_, _aten.resize_, _aten.clone, _aten._unsafe_view, _aten.zeros_like, _aten.ones_like, _aten.empty_like,
    _aten.new_zeros, _aten.new_empty, _aten.zero_, _aten.fill_, _aten.cat, _aten.stack, _aten.repeat, _aten.flip,
    _aten.roll, _aten.index, _aten.index_select, _aten.gather, _aten.masked_fill, _aten.where, _aten.embedding,
    _aten.constant_pad_nd, _aten.slice_backward, _aten.select_backward, _aten.neg, _aten.abs, _aten.amax, _aten.relu,
    _aten.max, _aten.topk, _aten.sort, _aten.eq, _aten.ne, _aten.gt, _aten.ge, _aten.lt, _aten.le, _aten.isfinite,
    _aten.index_copy, _aten.clamp, _aten.clamp_min, _aten.clamp_max, _aten.maximum, _aten.minimum, _aten.masked_select,
})  # fmt: skip

# operations with sums or several roundings inside, in terms of simpler ones
_DECOMPOSED = get_decompositions([
    _aten._softmax, _aten._safe_softmax, _aten._log_softmax, _aten._softmax_backward_data,
    _aten._log_softmax_backward_data,
    _aten.addmv, _aten.addbmm, _aten.logsumexp, _aten.linalg_vector_norm,
    _aten.native_layer_norm, _aten.native_layer_norm_backward, _aten.var, _aten.std,
    _aten.nll_loss_forward, _aten.nll_loss_backward, _aten.embedding_dense_backward,
    _aten.silu, _aten.silu_backward, _aten.gelu, _aten.gelu_backward, _aten.softplus, _aten.softplus_backward,
    _aten.sigmoid_backward, _aten.tanh_backward, _aten.log_sigmoid_forward, _aten.log_sigmoid_backward,
])  # fmt: skip


def ulp(value: Tensor, dtype: torch.dtype) -> Tensor:
    """Distance between neighbours of `dtype` at magnitude |value|, as float64; the smallest at zero."""
    info = torch.finfo(dtype)
    exponent = torch.floor(torch.log2(value.double().abs().clamp_min(info.tiny)))
    return torch.exp2(exponent) * info.eps


@contextlib.contextmanager
def arithmetic(kind: str, seed: int = 0) -> Iterator[None]:
    """A context in which PyTorch computes as the module docstring says; ValueError for an unknown `kind`.

    float64 is left alone, and so are operations that are not PyTorch's or have no kernel for float64. CPU and GPU.
    """
    if kind not in ARITHMETICS:
        raise ValueError(f"arithmetic must be one of {ARITHMETICS}; got {kind!r}")
    if kind == "random":
        # attention as products and a softmax, each of which is seen
        with sdpa_kernel(SDPBackend.MATH), _Random(seed):
            yield
    else:
        with _Exact() if kind == "exact" else _Sequential():
            yield


class _Arithmetic(TorchDispatchMode):
    """Routes each operation to what a subclass makes of it."""

    by_reference = False  # whether our own kernels are replaced too

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func.namespace == "moe_unlearn":
            return self._op_of_ours(func, args, kwargs)
        if torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd"):
            # inside an op of ours, below autograd, they come here whole
            with self:
                return func.decompose(*args, **kwargs)
        narrow = any(v.is_floating_point() and v.dtype != torch.float64 for v in _tensors((args, kwargs)))
        drawn = torch.Tag.nondeterministic_seeded in func.tags
        if not narrow or func.namespace != "aten" or func.is_view or drawn or func.overloadpacket in _EXACT:
            return func(*args, **kwargs)
        return self.compute(func, args, kwargs)

    def _op_of_ours(self, func, args, kwargs):
        """An op of ours, by its reference where it is or may be computed so: then what it does comes back here."""
        names = [argument.name for argument in func._schema.arguments]
        given = dict(zip(names, args, strict=False)) | kwargs
        if given.get("impl") != "ref":
            if not self.by_reference:
                return func(*args, **kwargs)
            given["impl"] = "ref"
        on_gpu = any(v.is_cuda for v in _tensors(given))
        key = torch._C.DispatchKey.CUDA if on_gpu else torch._C.DispatchKey.CPU
        with self:
            return func.redispatch(torch._C.DispatchKeySet(key), **{k: given[k] for k in names if k in given})

    def compute(self, func, args, kwargs):
        raise NotImplementedError


class _Exact(_Arithmetic):
    def compute(self, func, args, kwargs):
        plain = func(*args, **kwargs)
        if _product(func, args, kwargs) is None:
            return plain
        return func(*_mapped(_wide, args), **_mapped(_wide, kwargs)).to(plain.dtype)


class _Sequential(_Arithmetic):
    def compute(self, func, args, kwargs):
        plain = func(*args, **kwargs)
        product = _product(func, args, kwargs)
        if product is None:
            return plain
        a, b = product.a.float(), product.b.float()
        total = a.new_zeros(a.shape[0], a.shape[1], b.shape[2])
        for k in range(a.shape[2]):
            total = total + a[:, :, k : k + 1] * b[:, k : k + 1]
        total = (total * product.scale).reshape(plain.shape)
        return (total if product.onto is None else total + product.onto.float()).to(plain.dtype)


class _Random(_Arithmetic):
    by_reference = True

    def __init__(self, seed: int):
        super().__init__()
        self._seed, self._generators = seed, {}

    def compute(self, func, args, kwargs):
        if func in _DECOMPOSED:
            with self:
                return _DECOMPOSED[func](*args, **kwargs)
        written = _written(func, args, kwargs)
        plain = None
        if not written:
            plain = func(*args, **kwargs)
            floating = [v.is_floating_point() for v in _tensors(plain)]
            # what gives places beside values chooses among its operands, and must choose as it does
            if not floating or not all(floating):
                return plain
        copies: dict[int, tuple[Tensor, Tensor]] = {}  # floating operands and their copies, by identity

        def copied(value):
            copy = _wide(value)
            return copies.setdefault(id(value), (value, copy))[1] if isinstance(value, Tensor) else copy

        off = self._off(func, args, kwargs)
        try:
            exact = func(*_mapped(copied, args), **_mapped(copied, kwargs))
        except RuntimeError:  # no kernel for float64
            return func(*args, **kwargs) if written else plain
        if written:
            for value in written:
                value.copy_(self._rounded(copies[id(value)][1] + off, value.dtype))
            own = {id(copy): value for value, copy in copies.values()}
            return _mapped(lambda v: own.get(id(v), v), exact)

        def result(one, other):
            return self._rounded(other + off, one.dtype) if isinstance(one, Tensor) else one

        return _mapped(result, plain, exact)

    def _rounded(self, value: Tensor, dtype: torch.dtype) -> Tensor:
        if dtype == torch.float64:
            return value
        nearest = value.to(dtype)
        moved = (value + ulp(value, dtype) * (self._draw(torch.rand, value) - 0.5)).to(dtype)
        return torch.where((nearest == value) | ~value.isfinite(), nearest, moved)

    def _off(self, func, args, kwargs) -> Tensor | float:
        """What the roundings inside of a sum add to its result."""
        deviation = _deviation(func, args, kwargs)
        if deviation is None:
            return 0.0
        # NaN and infinity have no roundings, and must not reach the sums beside theirs
        return deviation.nan_to_num(0.0, 0.0, 0.0) * self._draw(torch.randn, deviation)

    def _draw(self, distribution: Callable, like: Tensor) -> Tensor:
        device = like.device
        if device not in self._generators:
            self._generators[device] = torch.Generator(device).manual_seed(self._seed)
        return distribution(like.shape, generator=self._generators[device], dtype=like.dtype, device=device)


def _wide(value):
    """A float64 copy of a floating tensor, float64 for a floating dtype; anything else as it is."""
    if isinstance(value, torch.dtype):
        return torch.float64 if value.is_floating_point else value
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.to(torch.float64, copy=True)
    return value


# ------------------------------------------------------------------------------------------------------- sums


class _Product(NamedTuple):
    """A sum as a product: a [B, M, K] times b [B, K, N], times `scale`, plus the tensor `onto` if there is one."""

    a: Tensor
    b: Tensor
    scale: float = 1.0
    onto: Tensor | None = None


def _product(func, args, kwargs) -> _Product | None:
    """The sum that an operation is; None for other operations."""
    op = func.overloadpacket
    if op in (_aten.addmm, _aten.baddbmm):
        a, b = (t if op == _aten.baddbmm else t[None] for t in args[1:3])
        return _Product(a, b, kwargs.get("alpha", 1), kwargs.get("beta", 1) * args[0])
    if op == _aten.mm:
        return _Product(args[0][None], args[1][None])
    if op == _aten.bmm:
        return _Product(args[0], args[1])
    if op == _aten.mv:
        return _Product(args[0][None], args[1][None, :, None])
    if op in (_aten.dot, _aten.vdot):
        return _Product(args[0][None, None], args[1][None, :, None])
    if op not in (_aten.sum, _aten.mean):
        return None
    x = args[0]
    dims = kwargs.get("dim", args[1] if len(args) > 1 else None)
    dims = range(x.dim()) if dims is None or dims == [] else [dims] if isinstance(dims, int) else dims
    dims = sorted({d % max(x.dim(), 1) for d in dims})
    rest = [d for d in range(x.dim()) if d not in dims]
    count = math.prod(x.shape[d] for d in dims) if x.dim() else 1
    flat = x.permute(*rest, *dims).reshape(1, -1, count) if x.numel() else x.new_zeros(1, 0, count)
    return _Product(flat, x.new_ones(1, count, 1), 1 / max(count, 1) if op == _aten.mean else 1.0)


def _deviation(func, args, kwargs) -> Tensor | None:
    """Standard deviation of a sum's error, in the shape of its result; None where nothing is summed."""
    op, u = func.overloadpacket, torch.finfo(torch.float32).eps / 2
    product = _product(func, args, kwargs)
    if product is not None:
        squares = _partial_squares(product.a.double(), product.b.double())
        return (u * product.scale * (squares / 3).sqrt()).reshape(_shape(func, args, kwargs))
    if op == _aten.cumsum:
        return u * (args[0].double().cumsum(args[1]).square().cumsum(args[1]) / 3).sqrt()
    scattered = _scattered(op, args, kwargs)
    if scattered is not None:
        # each addition is rounded where it is kept
        u = torch.finfo(args[0].dtype).eps / 2
        return u * (_segment_squares(*scattered, args[0].shape) / 3).sqrt()
    return None


def _partial_squares(a: Tensor, b: Tensor) -> Tensor:
    """[B, M, N]: the largest sum of squared partial sums among the orders, for a [B, M, K] times b [B, K, N]."""
    batch, rows, depth = a.shape
    columns = b.shape[2]
    if not a.numel() or not b.numel():
        return a.new_zeros(batch, rows, columns)
    total, terms = (a @ b).square(), a.square() @ b.square()
    # of a shuffled sum: E[S_k^2] for k of the K terms drawn without replacement, summed over k
    worst = depth * total / 3 + (depth + 1) / 6 * (terms - total / depth).clamp_min(0)
    most = max(1, _CHUNK // (batch * columns * min(depth, _PLACES)))
    for lanes in _LANES:
        order = torch.cat([torch.arange(i, depth, lanes, device=a.device) for i in range(min(lanes, depth))])
        x, y = a[:, :, order], b[:, order]
        worst = torch.maximum(worst, torch.cat([_in_order(part, y) for part in x.split(most, 1)], 1))
    return worst + terms


def _in_order(a: Tensor, b: Tensor) -> Tensor:
    """The sum of squared partial sums from the first term to the last, or from the last to the first if larger."""
    depth = a.shape[2]
    size = math.ceil(depth / _PLACES)
    places = math.ceil(depth / size)
    pad = places * size - depth
    a, b = torch.nn.functional.pad(a, (0, pad)), torch.nn.functional.pad(b, (0, 0, 0, pad))
    blocks = torch.einsum("bmpk,bpkn->pbmn", a.unflatten(2, (places, size)), b.unflatten(1, (places, size)))
    forward, backward = blocks.cumsum(0), blocks.flip(0).cumsum(0)
    return size * torch.maximum(forward.square().sum(0), backward.square().sum(0))


def _scattered(op, args, kwargs) -> tuple[Tensor, Tensor] | None:
    """Places [R] in the flat target and terms [R] of an operation that adds up by index; None for others."""
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
    """Flat places in `target` of elements that `index` moves along `dim`."""
    places = torch.arange(target.numel(), device=target.device).view(target.shape)
    window = places[tuple(slice(None) if d == dim % target.dim() else slice(n) for d, n in enumerate(index.shape))]
    return window.gather(dim, index.long()).flatten()


def _segment_squares(places: Tensor, terms: Tensor, shape: torch.Size) -> Tensor:
    """The sums of squared partial sums at each place, the larger of first to last and last to first."""
    order = places.argsort(stable=True)
    places, terms = places[order], terms[order].nan_to_num(0.0, 0.0, 0.0)
    forward, backward = (terms.cumsum(0), terms.flip(0).cumsum(0).flip(0))
    first = torch.searchsorted(places, places)
    last = torch.searchsorted(places, places, right=True) - 1
    partial = torch.maximum(
        (forward - forward[first] + terms[first]).abs(), (backward - backward[last] + terms[last]).abs()
    )
    return partial.new_zeros(math.prod(shape)).index_add_(0, places, partial.square()).view(shape)


def _written(func, args, kwargs) -> list[Tensor]:
    """The floating operands that an operation writes."""
    found = []
    for place, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[place] if place < len(args) else kwargs.get(argument.name)
            found += [v for v in _tensors(value) if v.is_floating_point()]
    return found


def _tensors(value) -> Iterator[Tensor]:
    """The tensors among operands or results."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple, dict)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _tensors(item)


def _mapped(function: Callable, value, *others):
    """The same lists, tuples and dicts with function(leaf, ...) for each leaf."""
    if isinstance(value, dict):
        return {k: _mapped(function, v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_mapped(function, *items) for items in zip(value, *others, strict=True))
    return function(value, *others)


def _shape(func, args, kwargs) -> torch.Size:
    """The shape of an operation's result, without computing it."""
    args, kwargs = _mapped(lambda v: v.to("meta") if isinstance(v, Tensor) else v, (args, kwargs))
    return func(*args, **kwargs).shape
