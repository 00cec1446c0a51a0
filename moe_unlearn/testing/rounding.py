"""Other arithmetics for plain PyTorch code: exact products, sloppy products, and random roundings.

    with rounding.arithmetic("random", seed=3):
        reference(**inputs)

Every operation inside, also those of a backward pass, is computed anew from its actual operands:

    exact        sums and products in float64, rounded once to the dtype of the result: no library is more accurate
    sequential   sums and products as the simplest loop computes them: one term after the other in float32, with every
                 product and every partial sum rounded
    random       everything in float64, plus random errors like those that the roundings of float32 cause

**Random roundings.** A sum t_1 + ... + t_K in floating point has the error sum_k d_k S_k. The S_k are its partial sums;
d_k, the relative error of one addition, lies within the unit roundoff u (2^-24 for float32) and is at most as wide as
the uniform distribution, of standard deviation u / sqrt(3). So the error's standard deviation is

    u sqrt(sum_k S_k^2 / 3)

and depends on the order of the additions through the S_k alone. A library may take any order, so the largest value over
several orders counts: one term after the other; from the last to the first; the lanes of 4 or 16 interleaved ones, one
lane after the other; and the mean over all orders, K S^2 / 3 + (K + 1) / 6 (Q - S^2 / K), with S the sum and Q the sum
of the squared terms. (Sums in pairs, in blocks or in lanes side by side have shorter partial sums than one of these.)
Products are rounded too (no fused multiply-add), which adds Q. Partial sums are computed in float64 at up to 32 places
of a sum; those between two places count as the later one.

A result is rounded to nearest after an offset of up to half a last bit, because functions are correct to a last bit
only, and a kernel may keep in float32, or round elsewhere, what the reference keeps in bfloat16. Before that,
exponentials and quotients may be off by a whole last bit of float32, as a GPU's instructions for them (ex2.approx,
rcp.approx) are. A GPU also computes exp(x) as 2^(x log2 e) and rounds the product, so the argument may be half a last
bit off, which makes |x| / 2 last bits of the result.

Runs with several seeds show what the roundings of a whole function can do, whatever operations it consists of. With
random roundings the ops of this package are computed by their references; the other arithmetics reach only ops called
with `impl="ref"`. A value that an operation only moves is never changed. Random numbers follow from the exact value and
the seed, so that equal results stay equal and no tie is broken.

The sums covered are products of matrices, sum, mean, variance, softmax and its like, norms, losses, cumsum, and
additions by index. Sums in a convolution, cdist, cumprod, logcumsumexp, of sparse tensors or of another library are not
covered, and their results only get the offset. Operations that write to `out=` are left alone.

Deterministic for a seed. Source: our specification; running a program with random roundings is Monte Carlo
arithmetic (Parker 1997), and the error of a sum by its partial sums is Higham's (Accuracy and Stability of Numerical
Algorithms, section 4.2).
"""

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch._decomp import get_decompositions
from torch._ops import OpOverload
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from moe_unlearn.testing import sums

ARITHMETICS = ("exact", "sequential", "random")
_aten = torch.ops.aten

# operations that round nothing, whatever their operands
_EXACT = frozenset({
    _aten.set_, _aten.resize_, _aten.resize_as_, _aten.clone, _aten._unsafe_view, _aten.zeros_like, _aten.ones_like,
    _aten.empty_like,
    _aten.new_zeros, _aten.new_empty, _aten.zero_, _aten.fill_, _aten.cat, _aten.stack, _aten.repeat, _aten.flip,
    _aten.roll, _aten.index, _aten.index_select, _aten.gather, _aten.masked_fill, _aten.where, _aten.embedding,
    _aten.constant_pad_nd, _aten.slice_backward, _aten.select_backward, _aten.neg, _aten.abs, _aten.amax, _aten.relu,
    _aten.max, _aten.topk, _aten.sort, _aten.eq, _aten.ne, _aten.gt, _aten.ge, _aten.lt, _aten.le, _aten.isfinite,
    _aten.index_copy, _aten.clamp, _aten.clamp_min, _aten.clamp_max, _aten.maximum, _aten.minimum, _aten.masked_select,
})  # fmt: skip

# operations with sums or several roundings inside, expressed by simpler ones
_DECOMPOSED = get_decompositions([
    _aten._softmax, _aten._safe_softmax, _aten._log_softmax, _aten._softmax_backward_data,
    _aten._log_softmax_backward_data,
    _aten.addmv, _aten.addbmm, _aten.logsumexp, _aten.linalg_vector_norm,
    _aten.native_layer_norm, _aten.native_layer_norm_backward, _aten.native_group_norm,
    _aten.native_group_norm_backward, _aten.mse_loss, _aten.mse_loss_backward, _aten.smooth_l1_loss,
    _aten.smooth_l1_loss_backward, _aten.huber_loss, _aten.huber_loss_backward, _aten.binary_cross_entropy,
    _aten.binary_cross_entropy_backward, _aten.binary_cross_entropy_with_logits, _aten.nansum,
    _aten.nll_loss_forward, _aten.nll_loss_backward, _aten.embedding_dense_backward,
    _aten.silu, _aten.silu_backward, _aten.gelu, _aten.gelu_backward, _aten.softplus, _aten.softplus_backward,
    _aten.sigmoid_backward, _aten.tanh_backward, _aten.log_sigmoid_forward, _aten.log_sigmoid_backward,
])  # fmt: skip

# in-place operations and the functions that are computed in their stead, since only these are covered
_IN_PLACE = {
    _aten.addmm_: _aten.addmm.default,
    _aten.baddbmm_: _aten.baddbmm.default,
    _aten.cumsum_: _aten.cumsum.default,
    _aten.sigmoid_: _aten.sigmoid.default,
}

# operations that a GPU computes by approximate instructions: powers of two, after a product, and quotients
_EXPONENTIALS = frozenset({_aten.exp, _aten.exp_, _aten.exp2, _aten.expm1, _aten.expm1_, _aten.tanh, _aten.tanh_})
_ARGUMENT, _RESULT = 3 << 40, (3 << 40) + 1  # streams of random numbers, beyond those that any seed uses for results
_APPROXIMATE = _EXPONENTIALS | {_aten.div, _aten.div_, _aten.reciprocal, _aten.reciprocal_, _aten.erf}


def _var_mean(
    x: Tensor, dim: int | list[int] | None = None, *, correction: float | None = None, keepdim: bool = False
) -> tuple[Tensor, Tensor]:
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    dims = list(range(x.dim())) if dim is None or dim == [] else [dim] if isinstance(dim, int) else list(dim)
    count = math.prod(x.shape[d] for d in dims)
    mean = wide.mean(dims, keepdim=True)
    squares = (wide - mean).square().sum(dims, keepdim=keepdim)
    mean = mean if keepdim else wide.mean(dims)
    return (squares / max(count - (1 if correction is None else correction), 0)).to(x.dtype), mean.to(x.dtype)


def _sigmoid(x: Tensor) -> Tensor:
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (1 / (1 + (-wide).exp())).clamp_max(1).to(x.dtype)


_DECOMPOSED |= {
    _aten.sigmoid.default: _sigmoid,
    _aten.var_mean.correction: _var_mean,
    _aten.var.correction: lambda *args, **options: _var_mean(*args, **options)[0],
    _aten.std.correction: lambda *args, **options: _var_mean(*args, **options)[0].sqrt(),
}


def ulp(value: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the distance between neighbours of `dtype` at magnitude |value|, as float64; the smallest one at zero."""
    info = torch.finfo(dtype)
    exponent = torch.floor(torch.log2(value.double().abs().clamp_min(info.tiny)))
    return torch.exp2(exponent) * info.eps


Deviations = dict[tuple, Tensor | None]  # standard deviations that runs of one computation share; see `arithmetic`


@contextlib.contextmanager
def arithmetic(kind: str, seed: int = 0, deviations: Deviations | None = None) -> Iterator[None]:
    """Make PyTorch compute inside as the module docstring says; raise ValueError for an unknown `kind`.

    Random runs of one computation may share `deviations`, a dict that the first run fills. Their operands differ only
    by roundings, which hardly change the deviation of an error, and computing it takes most of a run's time. float64 is
    left alone, and so are operations that are not PyTorch's or have no kernel for float64. Works on CPU and GPU.
    """
    if kind not in ARITHMETICS:
        raise ValueError(f"arithmetic must be one of {ARITHMETICS}; got {kind!r}")
    if kind == "random":
        # attention is computed as products and a softmax, each of which is covered
        with sdpa_kernel(SDPBackend.MATH), _Random(seed, deviations):
            yield
    else:
        with _Exact() if kind == "exact" else _Sequential():
            yield


class _Arithmetic(TorchDispatchMode):
    """A mode that has a subclass `compute` each operation."""

    by_reference = False  # whether ops of this package are computed by their references

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "moe_unlearn":
            return self._op_of_ours(func, args, kwargs)
        if torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd"):
            # inside an op of ours, below autograd, composite operations arrive here undivided
            with self:
                return func.decompose(*args, **kwargs)
        if self._left_alone(func, args, kwargs):
            return func(*args, **kwargs)
        if func.overloadpacket in _IN_PLACE:
            with self:
                return args[0].copy_(_IN_PLACE[func.overloadpacket](*args, **kwargs))
        return self.compute(func, args, kwargs)

    def _left_alone(self, func: OpOverload, args: tuple, kwargs: dict) -> bool:
        tensors = [*_tensors((args, kwargs))]
        narrow = any(v.is_floating_point() and v.dtype != torch.float64 for v in tensors)
        dense = all(v.layout == torch.strided and not v.is_nested for v in tensors)
        moves = func.is_view or torch.Tag.inplace_view in func.tags or func.overloadpacket in _EXACT
        drawn = torch.Tag.nondeterministic_seeded in func.tags
        given = any(a.kwarg_only and a.alias_info is not None for a in func._schema.arguments)  # out=
        return not narrow or not dense or func.namespace != "aten" or moves or drawn or given

    def _op_of_ours(self, func: OpOverload, args: tuple, kwargs: dict) -> Any:
        """Compute an op of this package, by its reference if that is asked for or allowed.

        The operations of the reference are then dispatched to this mode.
        """
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

    def compute(self, func: OpOverload, args: tuple, kwargs: dict) -> Any:
        raise NotImplementedError


class _Exact(_Arithmetic):
    def compute(self, func: OpOverload, args: tuple, kwargs: dict) -> Any:
        plain = func(*args, **kwargs)
        if sums.product(func, args, kwargs) is None:
            return plain
        return func(*_mapped(_wide, args), **_mapped(_wide, kwargs)).to(plain.dtype)


class _Sequential(_Arithmetic):
    def compute(self, func: OpOverload, args: tuple, kwargs: dict) -> Any:
        plain = func(*args, **kwargs)
        product = sums.product(func, args, kwargs)
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

    def __init__(self, seed: int, deviations: Deviations | None = None):
        super().__init__()
        self._seed = seed
        self._deviations = {} if deviations is None else deviations
        self._place = 0

    def _deviation(self, func: OpOverload, args: tuple, kwargs: dict) -> Tensor | None:
        """Return the `_deviation` of the operation at this place of the run, shared by runs with equal shapes."""
        self._place += 1
        key = self._place, func, *(v.shape for v in _tensors((args, kwargs)))
        if key not in self._deviations:
            self._deviations[key] = _deviation(func, args, kwargs)
        return self._deviations[key]

    def compute(self, func: OpOverload, args: tuple, kwargs: dict) -> Any:
        if func in _DECOMPOSED:
            with self:
                return _DECOMPOSED[func](*args, **kwargs)
        written = _written(func, args, kwargs)
        plain = None
        if not written:
            plain = func(*args, **kwargs)
            floating = [v.is_floating_point() and v.layout == torch.strided for v in _tensors(plain)]
            # an operation that returns places beside values chooses among its operands, and must choose as it would
            if not floating or not all(floating):
                return plain
        copies: dict[int, tuple[Tensor, Tensor]] = {}  # floating operands and their copies, by identity
        op = func.overloadpacket

        def copied(value: Any) -> Any:
            copy = _wide(value)
            if op in _EXPONENTIALS and isinstance(copy, Tensor):
                copy = self._moved(copy, 0.5, _ARGUMENT)
            return copies.setdefault(id(value), (value, copy))[1] if isinstance(value, Tensor) else copy

        deviation = self._deviation(func, args, kwargs)
        try:
            exact = func(*_mapped(copied, args), **_mapped(copied, kwargs))
        except RuntimeError:  # no kernel for float64
            return func(*args, **kwargs) if written else plain
        if written:
            for value in written:
                value.copy_(self._rounded(copies[id(value)][1], value.dtype, deviation, op in _APPROXIMATE))
            own = {id(copy): value for value, copy in copies.values()}

            def given(made: Any) -> Any:
                new = isinstance(made, Tensor) and made.dtype == torch.float64 and id(made) not in own
                return self._rounded(made, written[0].dtype, None) if new else own.get(id(made), made)

            return _mapped(given, exact)

        def result(one: Any, other: Any) -> Any:
            return self._rounded(other, one.dtype, deviation, op in _APPROXIMATE) if isinstance(one, Tensor) else one

        return _mapped(result, plain, exact)

    def _rounded(
        self, value: Tensor, dtype: torch.dtype, deviation: Tensor | None, approximate: bool = False
    ) -> Tensor:
        """Round a result to `dtype`, after adding what the roundings inside of a sum or an instruction do to it."""
        if approximate and dtype != torch.float64:
            # a result that float32 holds exactly, such as exp(0), comes out exact from an instruction too
            value = torch.where(value.float() == value, value, self._moved(value, 1.0, _RESULT))
        if deviation is not None:
            # NaN and infinity have no rounding error, and must not spread to neighbouring sums
            value = value + deviation.nan_to_num(0.0, 0.0, 0.0) * self._normal(value)
        if dtype == torch.float64 or dtype.itemsize == 1:
            return value.to(dtype)
        nearest = value.to(dtype)
        moved = (value + ulp(value, dtype) * (self._uniform(value, 0) - 0.5)).to(dtype)
        return torch.where((nearest == value) | ~value.isfinite(), nearest, moved)

    def _moved(self, value: Tensor, last_bits: float, stream: int) -> Tensor:
        """Move `value` at random by up to `last_bits` last bits of float32, but never past 0, 1 or -1."""
        offset = ulp(value, torch.float32) * (last_bits * (2 * self._uniform(value, stream) - 1))
        off = value + offset
        size = off.abs()
        moved = torch.where(value.abs() < 1, size.clamp_max(1), size.clamp_min(1)).copysign(value)
        # a number that is smaller than the last bit must not change its sign
        moved = torch.where(off.sign() * value.sign() < 0, 0.0, moved)
        return torch.where(value.isfinite(), moved, value)

    def _normal(self, value: Tensor) -> Tensor:
        radius = (-2 * torch.log1p(-self._uniform(value, 1))).sqrt()
        return radius * (2 * math.pi * self._uniform(value, 2)).cos()

    def _uniform(self, value: Tensor, stream: int) -> Tensor:
        """Return numbers in [0, 1) that follow from value, seed and stream, so that equal results and ties stay so."""
        bits = value.contiguous().view(torch.int64) + ((3 * self._seed + stream + 1) * 0x1E3779B97F4A7C15) % 2**62
        for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15)):
            bits = (bits ^ (bits >> shift)) * factor
        return ((bits ^ (bits >> 31)) & (2**53 - 1)).double() / 2**53


def _wide(value: Any) -> Any:
    """Return a float64 copy of a floating tensor, float64 for a floating dtype, and anything else as it is."""
    if isinstance(value, torch.dtype):
        return torch.float64 if value.is_floating_point else value
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.to(torch.float64, copy=True)
    return value


def _deviation(func: OpOverload, args: tuple, kwargs: dict) -> Tensor | None:
    """Compute the standard deviation of a sum's error, in the shape of its result; None where nothing is summed."""
    op, u = func.overloadpacket, torch.finfo(torch.float32).eps / 2
    product = sums.product(func, args, kwargs)
    if product is not None:
        squares = sums.partial_squares(product.a.double(), product.b.double())
        return (u * product.scale * (squares / 3).sqrt()).reshape(_shape(func, args, kwargs))
    if op == _aten.cumsum:
        wide: Tensor = args[0].double()
        return u * (wide.cumsum(args[1]).square().cumsum(args[1]) / 3).sqrt()
    scattered = sums.scattered(op, args, kwargs)
    if scattered is not None:
        # here each addition is rounded to the dtype of the target
        u = torch.finfo(args[0].dtype).eps / 2
        return u * (sums.segment_squares(*scattered, args[0].shape) / 3).sqrt()
    return None


def _written(func: OpOverload, args: tuple, kwargs: dict) -> list[Tensor]:
    """Return the floating operands that an operation writes."""
    found = []
    for place, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[place] if place < len(args) else kwargs.get(argument.name)
            found += [v for v in _tensors(value) if v.is_floating_point()]
    return found


def _tensors(value: object) -> Iterator[Tensor]:
    """Yield the tensors among operands or results."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple, dict)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _tensors(item)


def _mapped(function: Callable, value: Any, *others: Any) -> Any:
    """Return the same lists, tuples and dicts with function(leaf, ...) in place of each leaf."""
    if isinstance(value, dict):
        return {k: _mapped(function, v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_mapped(function, *items) for items in zip(value, *others, strict=True))
    return function(value, *others)


def _shape(func: OpOverload, args: tuple, kwargs: dict) -> torch.Size:
    """Return the shape of an operation's result without computing it."""
    args, kwargs = _mapped(lambda v: v.to("meta") if isinstance(v, Tensor) else v, (args, kwargs))
    shape: torch.Size = func(*args, **kwargs).shape
    return shape
