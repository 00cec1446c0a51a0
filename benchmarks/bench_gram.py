"""Measure the Gram matrix of m gradient sets against what a user of MOLLM writes with torch.

The rivals take one dot product per pair of objectives and tensor, in the gradients' own dtype as it is usually
written, and with the sums in float64 as here. For the factors, the rival takes dot products of the dense weight
gradients.
"""

import functools

import torch

from benchmarks.harness import OURS, Case, Work
from moe_unlearn.ops import gram, gram_factors
from moe_unlearn.ops.bits import pack_bits
from moe_unlearn.ops.costs.gram import bytes_moved

SHAPES = {
    "cpu": [(8, 512, 1024), (8, 1024, 256), (1024, 1024)],  # 7.3 million elements an objective
    "cuda": [(64, 2048, 1024), (64, 1024, 1024)],  # 201 million elements
}
EXPERTS, ROWS, HIDDEN, INNER = 16, 12, 1024, 512  # for the factors: few rows an expert
DOT, WIDE, PRODUCT = "torch.dot", "torch.dot in float64", "product with the mask, torch.dot"
DENSE, REF = "dense gradients, torch.dot", "ref"


def cases(device: str) -> list[Case]:
    found = []
    for dtype in ("bfloat16", "float32"):
        for m in (2, 3):
            whole = functools.partial(sets_work, m, dtype, device, False)
            masked = functools.partial(sets_work, m, dtype, device, True)
            name = f"{m} objectives, {dtype}"
            found.append(Case("gram", name, (OURS, DOT, WIDE), whole, 1, 4, {"dtype": dtype}))
            found.append(Case("gram", f"{name}, half masked", (OURS, PRODUCT), masked, 2, 4, {"dtype": dtype}))
        name = f"factors, 3 objectives, {ROWS} rows an expert, {dtype}"
        make = functools.partial(factors_work, 3, dtype, device)
        found.append(Case("gram", name, (OURS, DENSE, REF), make, 2, 4, {"dtype": dtype}))
    return found


def dots(sets, widen=None):
    m = len(sets)
    G = torch.zeros(m, m, dtype=torch.float64, device=sets[0][0].device)
    for i in range(m):
        for j in range(i, m):
            for a, b in zip(sets[i], sets[j], strict=True):
                a, b = (a.flatten(), b.flatten()) if widen is None else (a.flatten().to(widen), b.flatten().to(widen))
                G[i, j] += torch.dot(a, b)
            G[j, i] = G[i, j]
    return G


def sets_work(m, dtype, device, masked) -> Work:
    random = {"generator": torch.Generator(device).manual_seed(0), "device": device}
    dtype, shapes = getattr(torch, dtype), SHAPES[device]
    sets = [[torch.randn(shape, **random).to(dtype) for shape in shapes] for _ in range(m)]
    moved = bytes_moved(gradient for own in sets for gradient in own)
    if masked:
        masks = [torch.rand(shape, **random) < 0.5 for shape in shapes]
        words = [pack_bits(mask) for mask in masks]
        contenders = {
            OURS: lambda: gram(sets, masks=words),
            PRODUCT: lambda: dots([[g * mask for g, mask in zip(own, masks, strict=True)] for own in sets]),
        }
        return Work(contenders, bytes=moved, dtype=dtype)
    contenders = {OURS: lambda: gram(sets), DOT: lambda: dots(sets), WIDE: lambda: dots(sets, torch.float64)}
    exact = contenders[WIDE]()
    errors = {name: float(((f() - exact).abs() / exact.abs()).max()) for name, f in contenders.items()}
    return Work(contenders, bytes=moved, dtype=dtype, found={"largest_relative_error": errors})


def factors_work(m, dtype, device) -> Work:
    generator = torch.Generator().manual_seed(1)
    dtype, rows = getattr(torch, dtype), EXPERTS * ROWS
    dy = [torch.randn(rows, INNER, generator=generator).to(device, dtype) for _ in range(m)]
    x = torch.randn(rows, HIDDEN, generator=generator).to(device, dtype)
    offsets = torch.arange(0, rows + 1, ROWS)
    spans = [slice(a, a + ROWS) for a in range(0, rows, ROWS)]
    offsets = offsets.to(device)
    return Work(
        {
            OURS: lambda: gram_factors(dy, x, offsets),
            DENSE: lambda: dots([[g[s].t() @ x[s] for s in spans] for g in dy]),
            REF: lambda: gram_factors(dy, x, offsets, impl="ref"),
        },
        dtype=dtype,
    )
