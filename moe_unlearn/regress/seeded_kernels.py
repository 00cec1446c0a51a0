"""Define small everyday kernels, and wrong versions of them, for `seeded`."""

import functools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from moe_unlearn.regress.case import Case

ROWS, COLUMNS, INNER = 40, 96, 200


def _normal(seed: int, *shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


# ------------------------------------------------------------------------------------------------------ kernels


def softmax(x: Tensor) -> Tensor:
    e = (x - x.amax(-1, keepdim=True)).exp()
    return e / e.sum(-1, keepdim=True)


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * weight


def layer_norm(x: Tensor, weight: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + 1e-5) * weight


def product(a: Tensor, b: Tensor) -> Tensor:
    return a @ b


def matmul(a: Tensor, b: Tensor, block: int = 64) -> Tensor:
    """Compute a @ b in blocks of the inner dimension, added in order."""
    parts = zip(a.split(block, 1), b.split(block, 0), strict=True)
    products: Iterator[Tensor] = (x @ y for x, y in parts)
    return functools.reduce(torch.add, products)


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.t() / q.shape[1] ** 0.5
    future = torch.ones_like(scores, dtype=torch.bool).triu(1)
    return torch.softmax(scores.masked_fill(future, float("-inf")), -1) @ v


def rotate(x: Tensor, angle: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    return torch.cat([a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()], -1)


def segment_sum(values: Tensor, segment: Tensor) -> Tensor:
    out = values.new_zeros(int(segment.max()) + 2, values.shape[1])  # the last segment is empty
    return out.index_add(0, segment, values)


def running_sum(x: Tensor) -> Tensor:
    return x.cumsum(-1)


def _matmul_inputs(dtype: torch.dtype) -> Callable[..., dict[str, Tensor]]:
    def inputs(seed: int, rows: int, inner: int, columns: int) -> dict[str, Tensor]:
        a, b = _normal(seed, (rows, inner), (inner, columns), dtype=dtype)
        return {"a": a, "b": b}

    return inputs


def _rows_inputs(seed: int, rows: int, columns: int) -> dict[str, Tensor]:
    # large values, and rows far apart: a softmax that does not subtract each row's maximum overflows
    x, offset = _normal(seed, (rows, columns), (rows, 1))
    return {"x": 20 * x + 500 * offset}


def _norm_inputs(seed: int, rows: int, columns: int) -> dict[str, Tensor]:
    x, weight = _normal(seed, (rows, columns), (columns,))
    return {"x": x + 0.5, "weight": weight}


def _attention_inputs(seed: int, rows: int, columns: int) -> dict[str, Tensor]:
    q, k, v = _normal(seed, *[(rows, columns)] * 3)
    return {"q": q, "k": k, "v": v}


def _rotate_inputs(seed: int, rows: int, columns: int) -> dict[str, Tensor]:
    x, angle = _normal(seed, (rows, 2 * columns), (rows, columns))
    return {"x": x, "angle": angle}


def _segment_inputs(seed: int, rows: int, columns: int) -> dict[str, Tensor]:
    segment = torch.randint(0, 7, (rows,), generator=torch.Generator().manual_seed(seed))
    return {"values": _normal(seed, (rows, columns))[0], "segment": segment}


_SIZES = {"rows": ROWS, "columns": COLUMNS}
_PRODUCT = {"rows": ROWS, "inner": INNER, "columns": COLUMNS}
CASES = [
    Case("softmax", softmax, lambda x: torch.softmax(x, -1), _rows_inputs, _SIZES),
    Case("rms_norm", rms_norm, rms_norm, _norm_inputs, _SIZES),
    Case("layer_norm", layer_norm, layer_norm, _norm_inputs, _SIZES),
    Case("matmul/float32", matmul, product, _matmul_inputs(torch.float32), _PRODUCT),
    Case("matmul/bfloat16", product, product, _matmul_inputs(torch.bfloat16), _PRODUCT),
    Case("attention", attention, attention, _attention_inputs, _SIZES),
    Case("rotate", rotate, rotate, _rotate_inputs, _SIZES),
    Case("segment_sum", segment_sum, segment_sum, _segment_inputs, _SIZES),
    Case(
        "running_sum",
        running_sum,
        running_sum,
        lambda seed, rows, columns: {"x": _normal(seed, (rows, columns))[0]},
        _SIZES,
    ),
]

# --------------------------------------------------------------------------------------------------------- bugs


def _unshifted(x: Tensor) -> Tensor:
    return x.exp() / x.exp().sum(-1, keepdim=True)


def _tail_missing(x: Tensor) -> Tensor:
    e = (x - x.amax(-1, keepdim=True)).exp()
    return e / e[:, :64].sum(-1, keepdim=True)


def _maximum_of_all(x: Tensor) -> Tensor:
    e = (x - x.max()).exp()
    return e / e.sum(-1, keepdim=True)


def _variance_narrow(x: Tensor, weight: Tensor) -> Tensor:
    narrow = x.half()
    variance = narrow.square().mean(-1, keepdim=True) - narrow.mean(-1, keepdim=True).square()
    return (x - x.mean(-1, keepdim=True)) * torch.rsqrt(variance.float() + 1e-5) * weight


def _inner_tail_missing(a: Tensor, b: Tensor) -> Tensor:
    return a[:, :192] @ b[:192]


def _accumulates_narrow(a: Tensor, b: Tensor) -> Tensor:
    total = torch.zeros(len(a), b.shape[1], dtype=torch.bfloat16)
    for x, y in zip(a.split(8, 1), b.split(8, 0), strict=True):
        total += (x.float() @ y.float()).bfloat16()
    return total.to(a.dtype)


def _rounds_towards_zero(a: Tensor, b: Tensor) -> Tensor:
    exact = a.float() @ b.float()
    return (exact.view(torch.int32) & ~0xFFFF).view(torch.float32).to(a.dtype)


def _operands_rounded(a: Tensor, b: Tensor) -> Tensor:
    return a.bfloat16().float() @ b.bfloat16().float()


def _wrong_stride(a: Tensor, b: Tensor) -> Tensor:
    return a @ b.t().reshape(b.shape)


def _mask_off_by_one(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.t() / q.shape[1] ** 0.5
    future = torch.ones_like(scores, dtype=torch.bool).triu(2)
    return torch.softmax(scores.masked_fill(future, float("-inf")), -1) @ v


def _mask_finite(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Compute attention with scores that hide too little, so that hidden values still have an effect."""
    scores = q @ k.t() / q.shape[1] ** 0.5
    future = torch.ones_like(scores, dtype=torch.bool).triu(1)
    return torch.softmax(scores.masked_fill(future, -10.0), -1) @ v


def _unscaled(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return attention(q * q.shape[1] ** 0.5, k, v)


def _mask_all_rows(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Compute attention whose first row sees nothing, which gives NaN."""
    scores = q @ k.t() / q.shape[1] ** 0.5
    return torch.softmax(scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(0), -torch.inf), -1) @ v


def _sine_negated(x: Tensor, angle: Tensor) -> Tensor:
    return rotate(x, -angle)


def _pairs_interleaved(x: Tensor, angle: Tensor) -> Tensor:
    a, b = x[..., ::2], x[..., 1::2]
    return torch.cat([a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()], -1)


def _atomics_lost(values: Tensor, segment: Tensor) -> Tensor:
    """Add the rows of each segment wrongly: only its last row counts."""
    return values.new_zeros(int(segment.max()) + 2, values.shape[1]).index_copy(0, segment, values)


def _not_zeroed(values: Tensor, segment: Tensor) -> Tensor:
    return segment_sum(values, segment).index_fill(0, segment.max()[None] + 1, 1e-6)


def _replaced(kernel: Callable) -> Callable:
    return lambda right: kernel


KERNEL_BUGS = [
    ("softmax", "overflow", "maximum not subtracted", _replaced(_unshifted)),
    ("softmax", "mask", "sum without the last block", _replaced(_tail_missing)),
    ("softmax", "reduction", "one maximum for all rows", _replaced(_maximum_of_all)),
    ("softmax", "precision", "in bfloat16", _replaced(lambda x: softmax(x.bfloat16()).float())),
    ("rms_norm", "scale", "mean over n - 1", _replaced(lambda x, weight: rms_norm(x, weight) * (95 / 96) ** 0.5)),
    (
        "rms_norm",
        "formula",
        "eps outside of the root",
        _replaced(lambda x, weight: x / (x.square().mean(-1, keepdim=True).sqrt() + 1e-3) * weight),
    ),
    ("rms_norm", "index", "weight one off", _replaced(lambda x, weight: rms_norm(x, weight.roll(1)))),
    ("layer_norm", "formula", "not centred", _replaced(rms_norm)),
    ("layer_norm", "cancellation", "variance as E[x^2] - E[x]^2 in float16", _replaced(_variance_narrow)),
    ("matmul/float32", "mask", "tail of the inner dimension left out", _replaced(_inner_tail_missing)),
    ("matmul/float32", "dtype", "operands rounded to bfloat16", _replaced(_operands_rounded)),
    ("matmul/float32", "stride", "second operand transposed", _replaced(_wrong_stride)),
    ("matmul/float32", "accumulation", "a block added twice", _replaced(lambda a, b: a @ b + a[:, :8] @ b[:8])),
    ("matmul/float32", "initialisation", "accumulator not zeroed", _replaced(lambda a, b: a @ b + 1e-4)),
    ("matmul/bfloat16", "accumulation", "in bfloat16", _replaced(_accumulates_narrow)),
    ("matmul/bfloat16", "rounding", "towards zero", _replaced(_rounds_towards_zero)),
    (
        "matmul/bfloat16",
        "stale tile",
        "one tile is the one before",
        _replaced(lambda a, b: (a @ b).index_copy(0, torch.arange(16, 32), (a @ b)[:16])),
    ),
    ("attention", "mask", "sees one token ahead", _replaced(_mask_off_by_one)),
    ("attention", "mask", "hidden scores only -10", _replaced(_mask_finite)),
    ("attention", "mask", "first row hidden", _replaced(_mask_all_rows)),
    ("attention", "scale", "left out", _replaced(_unscaled)),
    ("rotate", "sign", "of the sine", _replaced(_sine_negated)),
    ("rotate", "layout", "interleaved halves", _replaced(_pairs_interleaved)),
    ("segment_sum", "race", "last row wins", _replaced(_atomics_lost)),
    ("segment_sum", "initialisation", "empty segment not zero", _replaced(_not_zeroed)),
    ("running_sum", "off by one", "exclusive", _replaced(lambda x: x.cumsum(-1) - x)),
    (
        "running_sum",
        "accumulation",
        "carry between blocks lost",
        _replaced(lambda x: torch.cat([part.cumsum(-1) for part in x.split(32, -1)], -1)),
    ),
]

KERNEL_CHANGES = [
    ("matmul/float32", "order", "one product", _replaced(product)),
    ("matmul/float32", "order", "blocks of 32", _replaced(lambda a, b: matmul(a, b, 32))),
    ("matmul/float32", "order", "inner dimension reversed", _replaced(lambda a, b: matmul(a.flip(1), b.flip(0)))),
    ("matmul/bfloat16", "order", "inner dimension reversed", _replaced(lambda a, b: a.flip(1) @ b.flip(0))),
    ("matmul/bfloat16", "precision", "through float32", _replaced(lambda a, b: (a.float() @ b.float()).bfloat16())),
    ("softmax", "implementation", "torch's", _replaced(lambda x: torch.softmax(x, -1))),
    ("softmax", "order", "columns reversed", _replaced(lambda x: softmax(x.flip(-1)).flip(-1))),
    (
        "rms_norm",
        "implementation",
        "torch's",
        _replaced(lambda x, weight: torch.nn.functional.rms_norm(x, weight.shape, weight, 1e-6)),
    ),
    (
        "layer_norm",
        "implementation",
        "torch's",
        _replaced(lambda x, weight: torch.nn.functional.layer_norm(x, weight.shape, weight)),
    ),
    (
        "attention",
        "implementation",
        "torch's",
        _replaced(lambda q, k, v: torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)),
    ),
    (
        "segment_sum",
        "order",
        "rows reversed",
        _replaced(lambda values, segment: segment_sum(values.flip(0), segment.flip(0))),
    ),
    (
        "rotate",
        "formula",
        "complex product",
        _replaced(
            lambda x, angle: torch.cat(
                [(z := torch.complex(*x.chunk(2, -1)) * torch.polar(torch.ones_like(angle), angle)).real, z.imag], -1
            )
        ),
    ),
]
