"""The Triton updates give the reference's bits: every numerics, rule, shape and layout; masked elements stay untouched.

The reference always runs on the CPU, so that a GPU is held to the same bits.
"""

import numpy as np
import pytest
import torch
from triton.runtime.interpreter import InterpreterBuilder

from moe_unlearn.ops.bits import pack_bits, unpack_bits
from moe_unlearn.ops.masked_update import (
    SGD,
    AdamW,
    Update,
    masked_adamw_,
    masked_adamw_ref,
    masked_sgd_,
    masked_sgd_ref,
)
from moe_unlearn.testing import LAYOUTS, check_against_ref, in_layout, poison
from moe_unlearn.triton_kernels import configs
from moe_unlearn.triton_kernels.common import INTERPRET
from tests.ops.test_masked_update import (
    ADAMW_CASES,
    SGD_CASES,
    adamw,
    bits,
    moments,
    randn,
    random_mask,
    same_bits,
    sgd,
)
from tests.support.by_keyword import by_keyword

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
# name: dtype of the parameter, of the state, rounding, master
NUMERICS = {
    "fp32": (FP32, FP32, "nearest", False),
    "fp32 stochastic": (FP32, FP32, "stochastic", False),
    "fp32 master": (FP32, FP32, "nearest", True),
    "bf16": (BF16, BF16, "nearest", False),
    "bf16 stochastic": (BF16, BF16, "stochastic", False),
    "bf16 fp32 state": (BF16, FP32, "nearest", False),
    "bf16 fp32 state stochastic": (BF16, FP32, "stochastic", False),
    "bf16 master": (BF16, FP32, "nearest", True),
    "fp16": (FP16, FP16, "nearest", False),
    "fp16 fp32 state": (FP16, FP32, "nearest", False),
    "fp16 master": (FP16, FP16, "nearest", True),
}
RULES = {f"adamw {k}": (adamw, v) for k, v in ADAMW_CASES.items()} | {
    f"sgd {k}": (sgd, v) for k, v in SGD_CASES.items()
}
RULES["adamw far ends"] = adamw, {"betas": (0.25, 0.5), "eps": 0.3, "weight_decay": 0.2}
FEW_NUMERICS = ("fp32", "bf16", "bf16 fp32 state stochastic", "bf16 master")
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")  # NaN and infinity are meant


def inputs(numerics, shape, *, slices=None, masked=True, keep=0.5):
    """(arguments of both optimizers, moments) with denormals, infinities and NaN among the values."""
    dtype, state, rounding, master = NUMERICS[numerics]
    inner = shape if slices is None else (len(slices), *shape[1:])
    grad = randn(*inner, seed=9)
    if grad.numel() > 40:
        grad.flatten()[:4] = torch.tensor([torch.nan, torch.inf, -torch.inf, 1e-42])
    param = randn(*shape, dtype=dtype)
    if param.numel() > 40:
        param.flatten()[33:37] = torch.tensor([1e-39, -1e-40, -0.0, torch.inf]).to(dtype)
    common = {
        "param": param,
        "grad": grad,
        "master": randn(*inner, seed=4) if master else None,
        "mask": pack_bits(random_mask(*inner, keep=keep)) if masked else None,
        "slices": None if slices is None else torch.tensor(slices, dtype=torch.int64),
        "lr": 0.03,
        "step": 3,
        "rounding": rounding,
        "seed": 2**35 + 5,
        "parameter_id": 3,
    }
    return common, moments(inner, state)


def both(function, common, state, device, **options):
    """(outputs of the reference, of the kernel), on the CPU."""
    names = ("exp_avg", "exp_avg_sq") if function is adamw else ("momentum_buffer",)
    arguments = {"momentum_buffer": None} | common | dict(zip(names, state, strict=False)) | options
    if function is adamw:
        del arguments["momentum_buffer"]
    elif "momentum" not in arguments:
        arguments["momentum_buffer"] = None
    moved = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}
    outputs = function(**moved, impl="triton")
    return function(**arguments, impl="ref"), [None if t is None else t.cpu() for t in outputs]


def assert_same(pair):
    for expected, actual in zip(*pair, strict=True):
        if expected is None:
            assert actual is None
            continue
        assert actual.dtype == expected.dtype and actual.shape == expected.shape
        differ = (bits(actual) != bits(expected)) & ~(actual.isnan() & expected.isnan())
        assert not differ.any(), f"{int(differ.sum())} of {differ.numel()} differ"


def _every_rule():
    for numerics in NUMERICS:
        for rule in RULES:
            essential = numerics in FEW_NUMERICS and rule in (
                "adamw decay",
                "adamw far ends",
                "sgd nesterov",
                "sgd dampening",
            )
            yield pytest.param(numerics, rule, marks=[pytest.mark.quick] if essential else [])


@pytest.mark.parametrize("numerics, rule", list(_every_rule()))
@pytest.mark.slow(but=4)
def test_every_rule_has_the_bits_of_the_reference(numerics, rule, device):
    function, options = RULES[rule]
    for masked in (True, False):
        common, state = inputs(numerics, (3, 5, 70), masked=masked)
        assert_same(both(function, common, state, device, **options))


@pytest.mark.quick
@pytest.mark.parametrize("nesterov", [False, True])
def test_first_step_ignores_the_momentum_buffer_but_keeps_its_masked_bits(nesterov, device):
    common, _ = inputs("bf16 fp32 state", (4, 70))
    common["step"], buffer = 1, torch.full((4, 70), torch.nan)
    expected, actual = both(sgd, common, (buffer,), device, momentum=0.9, nesterov=nesterov)
    assert_same((expected, actual))
    kept = unpack_bits(common["mask"], 70)
    assert same_bits(actual[1][~kept], buffer[~kept])


@pytest.mark.parametrize("dtype", [BF16, FP32])
def test_a_buffer_without_momentum_is_left_alone_but_chooses_the_arithmetic(dtype, device):
    common, _ = inputs("bf16", (4, 70))
    common["momentum_buffer"] = randn(4, 70, dtype=dtype)
    expected = sgd(**common, impl="ref", weight_decay=0.1)
    moved = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in common.items()}
    actual = [None if t is None else t.cpu() for t in sgd(**moved, impl="triton", weight_decay=0.1)]
    assert_same((expected, actual))
    assert same_bits(actual[1], common["momentum_buffer"])


SHAPES = {
    "rows padded": ((6, 5, 33), [4, 0, 2]),
    "whole words": ((6, 64), [5, 1]),
    "one dimension": ((70,), [69, 3, 31, 32] + list(range(4, 31))),
    "four dimensions": ((4, 2, 3, 40), [3, 1]),
    "one column": ((7, 1), [6, 0]),
    "one row": ((1, 1, 95), [0]),
    "more words than a block": ((3, 40, 130), [2, 0]),
    "many small slices": ((90, 3), [89, 7, 50]),
}


@pytest.mark.quick
@pytest.mark.parametrize("compact", [False, True])
@pytest.mark.parametrize("shape, slices", SHAPES.values(), ids=SHAPES)
@pytest.mark.slow(but=6)
def test_every_shape(shape, slices, compact, device):
    for numerics, function in (("bf16 fp32 state stochastic", adamw), ("bf16 master", sgd)):
        common, state = inputs(numerics, shape, slices=slices if compact else None)
        options = {"momentum": 0.9, "weight_decay": 0.1} if function is sgd else {"weight_decay": 0.1}
        assert_same(both(function, common, state, device, **options))


@pytest.mark.quick
@pytest.mark.parametrize("block_words", [1, 4, 128])
@pytest.mark.parametrize("shape", [(3, 5, 70), (2, 130)], ids=str)
@pytest.mark.slow
def test_the_size_of_blocks_changes_no_bit(shape, block_words, monkeypatch, device):
    monkeypatch.setattr(configs, "masked_update", lambda *_: configs.MaskedUpdate(block_words, 4))
    for layout in ("contiguous", "transposed"):
        common, state = inputs("bf16 fp32 state stochastic", shape)
        common["param"] = in_layout(common["param"], layout)
        assert_same(both(adamw, common, state, device))


@pytest.mark.quick
@pytest.mark.parametrize("slices", [None, [0, 5, 3]])
@pytest.mark.parametrize("shape", [(6, 5, 34), (6, 64), (6, 2, 3, 33), (6,)], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.slow(but=8)
def test_every_layout(layout, shape, slices, device):
    """Also that nothing outside the views is written."""
    common, state = inputs("bf16 fp32 state", shape, slices=slices)
    expected = adamw(exp_avg=state[0], exp_avg_sq=state[1], impl="ref", **common)
    moved = {k: in_layout(v, layout).to(device) if isinstance(v, torch.Tensor) else v for k, v in common.items()}
    moments_ = [in_layout(t.to(device), layout) for t in state]
    param = moved["param"] = in_layout(common["param"].to(device), layout)
    by_keyword(masked_adamw_)(exp_avg=moments_[0], exp_avg_sq=moments_[1], impl="triton", **moved)
    assert_same((expected[:3], [t.cpu() for t in (param, *moments_)]))
    for view in (param, *moments_):
        if view._base is not None and layout in ("sliced", "strided", "offset"):
            whole = view._base.clone()
            whole.as_strided(view.shape, view.stride(), view.storage_offset()).fill_(torch.nan)
            assert whole.isnan().all()


@pytest.mark.quick
def test_each_tensor_may_have_its_own_layout(device):
    common, state = inputs("bf16 master", (4, 6, 40))
    expected = adamw(exp_avg=state[0], exp_avg_sq=state[1], impl="ref", **common)
    layouts = iter(["transposed", "strided", "sliced", "offset"])
    moved = {k: in_layout(v.to(device), next(layouts)) if isinstance(v, torch.Tensor) else v for k, v in common.items()}
    m, v = in_layout(state[0].to(device), "transposed"), in_layout(state[1].to(device), "strided")
    by_keyword(masked_adamw_)(exp_avg=m, exp_avg_sq=v, impl="triton", **moved)
    assert_same((expected, [t.cpu() for t in (moved["param"], m, v, moved["master"])]))


@pytest.mark.quick
@pytest.mark.parametrize("numerics", FEW_NUMERICS)
def test_masked_elements_keep_every_bit(numerics, device):
    common, state = inputs(numerics, (8, 70), keep=0.3)
    kept = unpack_bits(common["mask"], 70)
    common["grad"][~kept] = torch.nan
    payload = torch.tensor([0x7FA1, 0x0001, -0x8000, 0x7F81], dtype=torch.int16)
    if common["param"].dtype == BF16:
        common["param"][~kept] = payload.view(BF16).repeat(int((~kept).sum()))[: int((~kept).sum())]
    for function, options in ((adamw, {"weight_decay": 0.3}), (sgd, {"momentum": 0.9, "weight_decay": 0.3})):
        expected, actual = both(function, common, state, device, **options)
        for new, old in zip(actual, (common["param"], *state[: len(actual) - 2], common["master"]), strict=True):
            if new is not None:
                assert torch.equal(bits(new)[~kept], bits(old)[~kept])
        assert_same((expected, actual))


@pytest.mark.quick
@pytest.mark.skipif(not INTERPRET.value, reason="records what the interpreter loads and stores")
@pytest.mark.parametrize("master", [False, True])
def test_only_what_is_needed_is_loaded_and_stored(master, monkeypatch):
    """Nothing behind a zero word; what only supplies masked bits, not behind a word of ones either; each word once."""
    common, (buffer, _) = inputs("bf16 master" if master else "bf16 fp32 state", (1, 256))
    words = common["mask"] = torch.tensor([[0, 5, 0, -1, 0, 0, -(2**31), 0]], dtype=torch.int32)
    monkeypatch.setattr(configs, "masked_update", lambda *_: configs.MaskedUpdate(2, 4))
    loaded, stored = [], []

    def record(name, position, into):
        original = getattr(InterpreterBuilder, name)

        def recording(self, pointers, *rest):
            into.extend(pointers.data[np.broadcast_to(rest[position].data, pointers.data.shape)].tolist())
            return original(self, pointers, *rest)

        monkeypatch.setattr(InterpreterBuilder, name, recording)

    def elements(addresses, tensor):
        begin, width = tensor.data_ptr(), tensor.element_size()
        return [(a - begin) // width for a in addresses if begin <= a < begin + tensor.numel() * width]

    record("create_masked_load", 0, loaded)
    record("create_masked_store", 1, stored)
    by_keyword(masked_sgd_)(momentum_buffer=buffer, momentum=0.9, impl="triton", **common | {"step": 1})
    live = [i for i in range(256) if words[0, i // 32]]
    partial = [i for i in live if words[0, i // 32] != -1]
    assert elements(loaded, words) == list(range(8))
    assert elements(loaded, common["grad"]) == live and not elements(stored, common["grad"])
    assert elements(loaded, buffer) == partial and elements(stored, buffer) == live
    assert (
        elements(loaded, common["param"]) == (partial if master else live) and elements(stored, common["param"]) == live
    )
    if master:
        assert elements(loaded, common["master"]) == elements(stored, common["master"]) == live


@pytest.mark.parametrize("numerics", ["fp32", "bf16", "bf16 fp32 state", "bf16 master"])
def test_as_accurate_as_the_reference(numerics, device):
    dtype, state, _, master = NUMERICS[numerics]
    shape = (3, 40, 70)
    m, v = (t.to(device) for t in moments(shape, state))
    given = {
        "param": randn(6, 40, 70, dtype=dtype).to(device),
        "grad": randn(*shape, seed=9).to(device),
        "mask": pack_bits(random_mask(*shape)).to(device),
        "slices": torch.tensor([4, 0, 2], device=device),
        "master": randn(*shape, seed=4).to(device) if master else None,
        "lr": 0.01,
        "weight_decay": 0.1,
        "step": 3,
    }

    def triton(function):
        return lambda **keywords: function(**keywords, impl="triton")

    check_against_ref(triton(adamw), by_keyword(masked_adamw_ref), given | {"exp_avg": m, "exp_avg_sq": v})
    check_against_ref(triton(sgd), by_keyword(masked_sgd_ref), given | {"momentum_buffer": m, "momentum": 0.9})


@pytest.mark.quick
@pytest.mark.parametrize("shape, slices", [((0, 4), None), ((3, 0), None), ((3, 4), []), ((), None), ((0,), None)])
def test_empty_and_zero_dimensional(shape, slices, device):
    with poison():
        for numerics in ("bf16", "bf16 master"):
            common, state = inputs(numerics, shape, slices=slices)
            common["mask"] = pack_bits(torch.ones(common["grad"].shape, dtype=torch.bool))
            assert_same(both(adamw, common, state, device))


@pytest.mark.quick
def test_many_steps_stay_on_the_bits_of_the_reference(device):
    common, state = inputs("bf16 fp32 state stochastic", (4, 70))
    runs = {}
    for impl, where in (("ref", "cpu"), ("triton", device)):
        tensors = [t.clone().to(where) for t in (common["param"], *state)]
        mask = common["mask"].to(where)
        for step in (1, 2, 3, 2**33):
            grad = randn(4, 70, seed=step % 1000, dtype=BF16).to(where)
            masked_adamw_(
                tensors[0],
                grad,
                *tensors[1:],
                mask,
                AdamW(lr=0.01),
                Update(step=step, rounding="stochastic", seed=-3),
                impl=impl,
            )
        runs[impl] = [t.cpu() for t in tensors]
    assert_same((runs["ref"], runs["triton"]))


@pytest.mark.quick
@pytest.mark.slow
def test_two_runs_give_the_same_bits(device):
    common, state = inputs("bf16 fp32 state stochastic", (3, 40, 70))
    first, second = (both(adamw, common, state, device)[1] for _ in range(2))
    assert all(a is b is None or same_bits(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.quick
@pytest.mark.slow
def test_compiles_as_one_graph(device):
    def update(param, grad, m, v, mask, slices):
        masked_adamw_(
            param, grad, m, v, mask, AdamW(lr=0.1), Update(step=2, rounding="stochastic"), slices=slices, impl="triton"
        )
        masked_sgd_(param, grad, None, mask, SGD(lr=0.1), Update(step=2), slices=slices, impl="triton")
        return param * 2

    def arguments():
        m, v = moments((2, 40), FP32)
        mask, slices = pack_bits(random_mask(2, 40)), torch.tensor([3, 0])
        return [t.to(device) for t in (randn(4, 40, dtype=BF16), randn(2, 40), m, v, mask, slices)]

    eager, compiled = arguments(), arguments()
    expected = update(*eager)
    actual = torch.compile(update, fullgraph=True, backend="aot_eager")(*compiled)
    assert same_bits(actual, expected)
    assert all(torch.equal(a, b) for a, b in zip(compiled, eager, strict=True))
