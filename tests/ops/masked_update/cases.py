"""Cases of masked_update: rules, numerics, shapes, updates with NaN among their values, and comparisons of bits."""

import torch

from moe_unlearn.ops import SGD, Update, masked_sgd_
from moe_unlearn.ops.bits import pack_bits
from moe_unlearn.ops.masked_update import masked_adamw_
from moe_unlearn.ops.moments import PACKED, narrowed, packed_zeros
from moe_unlearn.testing import poison
from tests.support.by_keyword import by_keyword
from tests.support.impls import REF, Impl

BF16, F16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
SGD_CASES = {
    "plain": {},
    "decay": {"weight_decay": 0.1},
    "momentum": {"momentum": 0.9, "weight_decay": 0.1},
    "dampening": {"momentum": 0.8, "dampening": 0.3},
    "nesterov": {"momentum": 0.9, "nesterov": True, "weight_decay": 0.01},
}
ADAMW_CASES = {"default": {}, "decay": {"weight_decay": 0.1, "betas": (0.8, 0.95), "eps": 1e-6}}
# name: dtype of the parameter, of the state, rounding, master
NUMERICS = {
    "fp32": (F32, F32, "nearest", False),
    "fp32 stochastic": (F32, F32, "stochastic", False),
    "fp32 master": (F32, F32, "nearest", True),
    "bf16": (BF16, BF16, "nearest", False),
    "bf16 stochastic": (BF16, BF16, "stochastic", False),
    "bf16 fp32 state": (BF16, F32, "nearest", False),
    "bf16 fp32 state stochastic": (BF16, F32, "stochastic", False),
    "bf16 master": (BF16, F32, "nearest", True),
    "fp16": (F16, F16, "nearest", False),
    "fp16 fp32 state": (F16, F32, "nearest", False),
    "fp16 master": (F16, F16, "nearest", True),
    "fp32 bf16 state": (F32, BF16, "nearest", False),
    "bf16 master bf16 state": (BF16, BF16, "nearest", True),
    "fp32 packed": (F32, PACKED, "nearest", False),
    "bf16 packed stochastic": (BF16, PACKED, "stochastic", False),
    "bf16 master packed": (BF16, PACKED, "nearest", True),
}
FEW_NUMERICS = ("fp32", "bf16", "bf16 fp32 state stochastic", "bf16 master")
# a shape and the slices of a compact update of it
SHAPES = {
    "rows padded": ((6, 5, 33), [4, 0, 2]),
    "whole words": ((6, 64), [5, 1]),
    "one dimension": ((70,), [69, 3, 31, 32] + list(range(4, 31))),
    "four dimensions": ((4, 2, 3, 40), [3, 1]),
    "one column": ((7, 1), [6, 0]),
    "one row": ((1, 1, 95), [0]),
    "more words than a block": ((3, 40, 130), [2, 0]),
    "many small slices": ((90, 3), [89, 7, 50]),
    "a word": ((32,), [31]),
    "nothing": ((0, 4), []),
    "no columns": ((3, 0), [1]),
    "no slices": ((3, 4), []),
    "a number": ((), None),
}


def randn(*shape, seed=0, dtype=F32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def random_mask(*shape, seed=0, keep=0.5):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < keep


def bits(value):
    """The bits of a tensor as integers, so that NaN payloads and signed zeros count."""
    width = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[value.element_size()]
    return value.detach().contiguous().view(width)


def same_bits(a, b):
    return a.dtype == b.dtype and torch.equal(bits(a), bits(b))


def assert_same(pair):
    """Assert equal bits, but that a NaN is a NaN."""
    for expected, actual in zip(*pair, strict=True):
        if expected is None:
            assert actual is None
            continue
        assert actual.dtype == expected.dtype and actual.shape == expected.shape
        differ = (bits(actual) != bits(expected)) & ~(actual.isnan() & expected.isnan())
        assert not differ.any(), f"{int(differ.sum())} of {differ.numel()} differ"


def packed(m, second=False):
    """Return float32 moments in blocks of codes."""
    random = torch.randint(1 << 32, m.shape, generator=torch.Generator().manual_seed(7))
    return narrowed(m, packed_zeros(m.shape, m.device), None, random, second=second)


def moments(shape, dtype, seed=0):
    m, v = randn(*shape, seed=seed + 101), randn(*shape, seed=seed + 102).square()
    return (packed(m), packed(v, second=True)) if dtype == PACKED else (m.to(dtype), v.to(dtype))


def adamw(param, grad, exp_avg, exp_avg_sq, master=None, impl="auto", **keywords):
    """`masked_adamw_` in the form of its reference, all numbers by keyword."""
    copies = [None if t is None else t.clone() for t in (param, exp_avg, exp_avg_sq, master)]
    by_keyword(masked_adamw_)(copies[0], grad, *copies[1:3], master=copies[3], impl=impl, **keywords)
    return tuple(copies)


def sgd(param, grad, momentum_buffer, master=None, impl="auto", **keywords):
    copies = [None if t is None else t.clone() for t in (param, momentum_buffer, master)]
    by_keyword(masked_sgd_)(copies[0], grad, copies[1], master=copies[2], impl=impl, **keywords)
    return tuple(copies)


RULES = {f"adamw {k}": (adamw, v) for k, v in ADAMW_CASES.items()} | {
    f"sgd {k}": (sgd, v) for k, v in SGD_CASES.items()
}
RULES["adamw far ends"] = adamw, {"betas": (0.25, 0.5), "eps": 0.3, "weight_decay": 0.2}
BOTH = (adamw, {"weight_decay": 0.3}), (sgd, {"momentum": 0.9, "weight_decay": 0.3})


def inputs(numerics, shape, *, slices=None, masked=True, keep=0.5, grad_dtype=F32):
    """(arguments of both optimizers, moments) with denormals, infinities and NaN among the values."""
    dtype, state, rounding, master = NUMERICS[numerics]
    inner = shape if slices is None else (len(slices), *shape[1:])
    grad = randn(*inner, seed=9, dtype=grad_dtype)
    if grad.numel() > 40:
        grad.flatten()[:4] = torch.tensor([torch.nan, torch.inf, -torch.inf, 1e-42]).to(grad_dtype)
    param = randn(*shape, dtype=dtype)
    if param.numel() > 40:
        param.flatten()[33:37] = torch.tensor([1e-39, -1e-40, -0.0, torch.inf]).to(dtype)
    mask = random_mask(*inner, keep=keep)
    if mask.dim() > 1:
        mask[-1:] &= random_mask(*inner[1:], seed=1, keep=0.03)  # whole words of zeros
    common = {
        "param": param,
        "grad": grad,
        "master": randn(*inner, seed=4) if master else None,
        "mask": pack_bits(mask) if masked else None,
        "slices": None if slices is None else torch.tensor(slices, dtype=torch.int64),
        "lr": 0.03,
        "step": 3,
        "rounding": rounding,
        "seed": 2**35 + 5,
        "parameter_id": 3,
    }
    return common, moments(inner, state)


def given(rule, common, state, **options) -> dict:
    """Return the keywords of one update; without momentum SGD has the buffer that `common` holds, or none."""
    if rule is adamw:
        return common | dict(zip(("exp_avg", "exp_avg_sq"), state, strict=True)) | options
    buffer = {"momentum_buffer": state[0] if "momentum" in options else None}
    return buffer | common | options


def apply(impl: Impl, rule, arguments: dict) -> list:
    """Update tensors of the implementation's device in place; return parameter, state and master on the CPU."""
    state = ("exp_avg", "exp_avg_sq") if rule is adamw else ("momentum_buffer",)
    with poison():
        by_keyword(masked_adamw_ if rule is adamw else masked_sgd_)(**arguments, impl=impl.name)
    return [None if arguments[k] is None else arguments[k].cpu() for k in ("param", *state, "master")]


def run(impl: Impl, rule, common, state, layout="contiguous", **options) -> list:
    """Return what one update leaves in copies of the parameter, the state and the master, on the CPU."""
    return apply(impl, rule, impl.moved(given(rule, common, state, **options), layout))


def check(impl: Impl, rule, common, state, layout="contiguous", **options) -> list:
    """Assert that an implementation does in a layout what the reference does to contiguous tensors, bit for bit."""
    actual = run(impl, rule, common, state, layout, **options)
    assert_same((run(REF, rule, common, state, **options), actual))
    return actual


def check_conversions(impl: Impl, dtype):
    """Every 16-bit pattern widened, and float32 near every rounding boundary narrowed, as torch does it."""
    every = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(dtype).view(1, -1)
    every = every[~every.isnan()].view(1, -1)
    wide, narrow_grad = impl.moved((torch.zeros(every.shape), every))
    masked_sgd_(wide, narrow_grad, None, None, SGD(lr=-1.0), Update(step=1), impl=impl.name)
    assert torch.equal(wide.cpu(), every.float())
    finite = every[every.isfinite()].float()
    near = torch.cat([finite.view(torch.int32) + i * (1 << 12) + j for i in range(16) for j in (-1, 0, 1)])
    near = near.view(torch.float32)
    near = near[near.isfinite()].view(1, -1)
    narrow, grad, state = impl.moved((torch.zeros(near.shape, dtype=dtype), near, torch.zeros(near.shape)))
    masked_sgd_(narrow, grad, state, None, SGD(lr=-1.0, momentum=0.9), Update(step=1), impl=impl.name)
    assert torch.equal(narrow.cpu(), near.to(dtype)) and torch.equal(state.cpu(), near)
