"""Kernels whose machine code is known beforehand: the tool must see tensor cores, TMA, spills and float atomics."""

import torch
import triton
import triton.language as tl

from moe_unlearn.regress import static


@triton.jit
def _matmul_kernel(a, b, out, rows, columns, inner, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    row = tl.program_id(0) * M + tl.arange(0, M)
    column = tl.program_id(1) * N + tl.arange(0, N)
    total = tl.zeros((M, N), tl.float32)
    for start in range(0, inner, K):
        k = start + tl.arange(0, K)
        left = tl.load(a + row[:, None] * inner + k[None, :], mask=row[:, None] < rows, other=0.0)
        right = tl.load(b + k[:, None] * columns + column[None, :], mask=column[None, :] < columns, other=0.0)
        total = tl.dot(left, right, total)
    inside = (row[:, None] < rows) & (column[None, :] < columns)
    tl.store(out + row[:, None] * columns + column[None, :], total.to(tl.bfloat16), mask=inside)


@triton.jit
def _descriptor_kernel(a, b, out, rows, columns, inner, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    left = tl.make_tensor_descriptor(a, [rows, inner], [inner, 1], [M, K])
    right = tl.make_tensor_descriptor(b, [inner, columns], [columns, 1], [K, N])
    result = tl.make_tensor_descriptor(out, [rows, columns], [columns, 1], [M, N])
    total = tl.zeros((M, N), tl.float32)
    for start in range(0, inner, K):
        total = tl.dot(left.load([tl.program_id(0) * M, start]), right.load([start, tl.program_id(1) * N]), total)
    result.store([tl.program_id(0) * M, tl.program_id(1) * N], total.to(tl.bfloat16))


@triton.jit
def _float_atomic_kernel(x, out, BLOCK: tl.constexpr):
    tl.atomic_add(out + tl.arange(0, BLOCK) % 4, tl.load(x + tl.arange(0, BLOCK)))


@triton.jit
def _integer_atomic_kernel(x, out, BLOCK: tl.constexpr):
    tl.atomic_add(out + tl.load(x + tl.arange(0, BLOCK)), 1)


@triton.jit
def _broken_kernel(x, out, BLOCK: tl.constexpr):
    tl.store(out + tl.arange(0, BLOCK), tl.load(x + tl.arange(0, 2 * BLOCK)))


def _matmul(kernel, M, N, K, num_warps):
    a, b, out = (torch.empty(4096, 4096, dtype=torch.bfloat16) for _ in range(3))
    kernel[(1, 1)](a, b, out, 4096, 4096, 4096, M, N, K, num_warps=num_warps, num_stages=3)


def _atomic(kernel, dtype, out_dtype):
    kernel[(1,)](torch.empty(128, dtype=dtype), torch.empty(128, dtype=out_dtype), 128)


CASES = {
    "pointers": lambda: _matmul(_matmul_kernel, 128, 128, 64, 8),
    "descriptors": lambda: _matmul(_descriptor_kernel, 128, 128, 64, 8),
    "spilling": lambda: _matmul(_matmul_kernel, 256, 256, 32, 4),
    "float32": lambda: _atomic(_float_atomic_kernel, torch.float32, torch.float32),
    "bfloat16": lambda: _atomic(_float_atomic_kernel, torch.bfloat16, torch.bfloat16),
    "integer": lambda: _atomic(_integer_atomic_kernel, torch.int32, torch.int32),
    "broken": lambda: _atomic(_broken_kernel, torch.float32, torch.float32),
}
for name, launch in CASES.items():
    static.register(static.LaunchCase(name, launch))
static.register(
    static.TritonCase(
        "by signature",
        _matmul_kernel,
        {**dict.fromkeys(("a", "b", "out"), "*bf16:16"), **dict.fromkeys(("rows", "columns", "inner"), "i32:16")},
        {"M": 128, "N": 128, "K": 64},
        num_warps=8,
    )
)
