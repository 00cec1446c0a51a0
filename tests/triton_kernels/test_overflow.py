"""Offsets past 2^31: every tensor argument of every op stretched, in memory that exists only where it is touched.

A stretched tensor has few elements and one stride so large that its last offset passes 2^31 while the stride
itself fits 32 bits, as `row * stride` in a kernel then does not. Results must be those of the same layout with a
small stride, bit for bit. An offset computed in 32 bits reads far in front of the tensor: it dies, or differs.
"""

import contextlib
import math
from collections.abc import Iterator

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_unlearn.ops import ExpertLayout, ExpertWeights, Gate, expert_mlp
from moe_unlearn.testing import integers
from moe_unlearn.triton_kernels.common import INTERPRET
from tests.support.checkers.case import Case, bits
from tests.support.checkers.child import in_child
from tests.support.checkers.launches import map_tensors, tensors_in, watch
from tests.support.checkers.memory import contiguous_strides, lazily, lazy, resident_bytes
from tests.triton_kernels.memory_cases import CASES, DESCRIPTORS

pytestmark = pytest.mark.skipif(not INTERPRET.value, reason="a GPU has no lazily committed memory")
PAST = 2**31
ALIGNED = 64  # elements; keeps rows where tensor descriptors may read them

# one small case of each kernel; the argument's size, not its content, is what matters
NAMES = [
    "route/sentinels",
    "retain_weights/moments 301x33",
    "retain_weights/weights 301x33",
    "expert_mlp/skewed",
    "expert_mlp/transposed",
    *(f"expert_wgrad/{what} half_empty" for what in ("store", "accumulate", "sgd", "adamw", "inner")),
    *(f"token_loss/{kind} small bfloat16" for kind in ("nll", "uce", "kl")),
    "gram/sets bfloat16",
    "gram/factors skewed",
    "weight_score/high digits 3x5x7",
    "weight_score/mask 3x5x7",
    "masked_update/sgd 5x6x37 bfloat16 masked",
    "masked_update/adamw 5x6x37 float32 masked",
]


def stretched(tensor: Tensor, dim: int, last_offset: int) -> Tensor:
    """Its values in memory whose last index along `dim` lies at `last_offset` or behind, the rest compact."""
    inner = tuple(size if d != dim else 1 for d, size in enumerate(tensor.shape))
    strides = list(contiguous_strides(inner))
    # at the least apart: a whole block of the other dimensions
    step = max(last_offset // max(tensor.shape[dim] - 1, 1) + 1, math.prod(inner))
    strides[dim] = -(-step // ALIGNED) * ALIGNED
    return lazy(tensor.shape, tuple(strides), tensor.dtype).copy_(tensor)


def differences(case: Case) -> Iterator[str]:
    """For every dimension: what changes when all tensors with at least 3 elements along it are stretched."""
    for dim in range(max(tensor.dim() for tensor in tensors_in(dict(case.arguments)))):
        near, far = (_results(case, dim, offset) for offset in (0, PAST))
        if near != far:
            yield f"dimension {dim}: other bits"


def _results(case: Case, dim: int, last_offset: int) -> list[bytes]:
    def moved(tensor):
        fits = dim < tensor.dim() and tensor.shape[dim] >= 3
        return stretched(tensor, dim, last_offset) if fits else tensor.clone()

    arguments = map_tensors(dict(case.arguments), moved)
    return [bits(tensor) for tensor in [*tensors_in(case.function(**arguments)), *tensors_in(arguments)]]


@pytest.mark.parametrize(
    "name,architecture",
    [
        pytest.param(name, each, marks=() if each == "80" or name.startswith(DESCRIPTORS) else pytest.mark.nightly)
        for name in NAMES
        for each in ("80", "90")
    ],
)
def test_every_argument_may_reach_past_2_to_the_31(name, architecture, monkeypatch):
    monkeypatch.setenv("MOE_UNLEARN_TRITON_ARCH", architecture)

    def run():
        before = resident_bytes()
        yield from differences(CASES[name]())
        if resident_bytes() - before > 400 * 2**20:
            yield f"{(resident_bytes() - before) >> 20} MiB were touched"

    assert in_child(run) == []


# What the launchers allocate themselves: stretched where they pass its strides on, else really that large, with only
# the programs at the far end run.


@pytest.mark.parametrize("dim", [0, 1, 2])
def test_results_may_reach_past_2_to_the_31(dim):
    def run():
        results, allocated, case = [], [], CASES["expert_wgrad/store half_empty"]()
        for offset in (0, PAST):

            def allocate(shape, dtype, offset=offset):
                allocated.append(stretched(torch.zeros(shape, dtype=dtype), dim, offset))
                return allocated[-1]

            arguments = map_tensors(dict(case.arguments), torch.clone)
            with lazily(allocate):
                outputs = tensors_in(case.function(**arguments))
            results.append([bits(output) for output in outputs])
        assert allocated[-1].stride(dim) * (allocated[-1].shape[dim] - 1) > PAST
        if results[0] != results[1]:
            yield "other bits"

    assert in_child(run) == []


ROWS = 2**21 + 5  # many rows and short sums: the programs that run are quick


def far_end(name, grid):
    """The programs of the last rows and columns. One expert has ceil(rows / 128) row tiles, and the grid two more."""
    if name == "_sum_kernel":
        return [(x, grid[1] - 1, 0) for x in range(grid[0] - 4, grid[0])]
    if name == "_weights_gradient_kernel":
        return [(x, 0, 0) for x in range(grid[0] - 4, grid[0])]
    row_tiles = triton.cdiv(ROWS, 128)
    end = row_tiles * (grid[0] // (row_tiles + 2))
    return [(x, 0, 0) for x in range(end - 1, end)]


@pytest.mark.parametrize("hidden,inner", [(16, 2**10), (2**10, 16)])
def test_the_layer_of_expert_mlp_may_reach_past_2_to_the_31(hidden, inner, monkeypatch):
    """One expert; only its last rows and columns are computed, and these alone are not zero: small integers."""
    monkeypatch.setenv("MOE_UNLEARN_TRITON_ARCH", "80")
    last = 2  # rows and columns that are looked at

    def values(*shape):
        return integers(*shape, low=1, high=2, dtype=torch.bfloat16, seed=len(shape))

    def run():
        before = resident_bytes()
        x, upstream = (lazy((ROWS, hidden), dtype=torch.bfloat16) for _ in range(2))
        gate_up, down = (
            torch.zeros(1, *shape, dtype=torch.bfloat16) for shape in ((2 * inner, hidden), (hidden, inner))
        )
        x[-last:, -last:], upstream[-last:, -last:] = values(2, last, last)
        gate_up[0, -last:, -last:] = gate_up[0, inner - last : inner, -last:] = values(last, last)
        down[0, -last:, -last:] = torch.ones(last, last)
        routed = {"sorted_rows": torch.arange(ROWS).int(), "expert_offsets": torch.tensor([0, ROWS]).int()}
        weights, layout = ExpertWeights(gate_up, down), ExpertLayout(Gate("relu"))
        results = []
        for impl, rows in (("triton", ROWS), ("ref", last)):
            tokens = x[-rows:].detach().requires_grad_()
            if impl == "ref":
                routed = {"sorted_rows": torch.arange(last).int(), "expert_offsets": torch.tensor([0, last]).int()}
            shares = torch.ones(rows, 1).requires_grad_()
            with lazily() if impl == "triton" else contextlib.nullcontext(), watch(programs=far_end):
                out = expert_mlp(tokens, shares, **routed, weights=weights, layout=layout, impl=impl)
                gradients = torch.autograd.grad(out, (tokens, shares), upstream[-rows:])
            results.append([tensor[-last:, -last:].detach().clone() for tensor in (out, *gradients)])
        for ours, theirs in zip(*results, strict=True):
            if not theirs.any() or not torch.equal(ours, theirs):
                yield f"{ours} instead of {theirs}"
        touched = (resident_bytes() - before) >> 20
        if touched > 1200:
            yield f"{touched} MiB were touched"

    assert in_child(run) == []


@triton.jit
def _copy_rows_kernel(x, out, row_stride, WIDE: tl.constexpr, WIDTH: tl.constexpr):
    row, column = tl.program_id(0), tl.arange(0, WIDTH)
    if WIDE:
        row = row.to(tl.int64)
    tl.store(out + row * WIDTH + column, tl.load(x + row * row_stride + column))


@pytest.mark.quick
@pytest.mark.parametrize("wide", [True, False])
def test_an_offset_in_32_bits_is_found(wide):
    def copy(x):
        out = torch.empty(3, 2)
        _copy_rows_kernel[(3,)](x, out, x.stride(0), wide, 2)
        return out

    found = in_child(lambda: differences(Case(copy, {"x": torch.randn(3, 2)})))
    assert found == ([] if wide else ["died of SIGSEGV"])
