"""The Gram matrix of m gradient sets, against what a user of MOLLM writes with torch.

Rivals: one dot product per pair of objectives and tensor, in the gradients' own dtype as it is usually written, and
with the sums in float64 as here; and, for the factors, the dense weight gradients and dot products of those.
"""

import torch

from benchmarks.harness import compare, write
from moe_unlearn.ops import gram, gram_factors
from moe_unlearn.ops.bits import pack_bits

SHAPES = [(8, 512, 1024), (8, 1024, 256), (1024, 1024)]  # 7.3 million elements an objective
EXPERTS, ROWS, HIDDEN, INNER = 16, 12, 1024, 512  # factors: few rows an expert


def gradient_sets(m, dtype):
    generator = torch.Generator().manual_seed(0)
    return [[torch.randn(shape, generator=generator).to(dtype) for shape in SHAPES] for _ in range(m)]


def dots(sets, widen=None):
    m = len(sets)
    G = torch.zeros(m, m, dtype=torch.float64)
    for i in range(m):
        for j in range(i, m):
            for a, b in zip(sets[i], sets[j], strict=True):
                a, b = (a.flatten(), b.flatten()) if widen is None else (a.flatten().to(widen), b.flatten().to(widen))
                G[i, j] += torch.dot(a, b)
            G[j, i] = G[i, j]
    return G


def masked_dots(sets, masks):
    return dots([[g * mask for g, mask in zip(tensors, masks, strict=True)] for tensors in sets])


def factors(m, dtype):
    generator = torch.Generator().manual_seed(1)
    rows = EXPERTS * ROWS
    dy = [torch.randn(rows, INNER, generator=generator).to(dtype) for _ in range(m)]
    return dy, torch.randn(rows, HIDDEN, generator=generator).to(dtype), torch.arange(0, rows + 1, ROWS)


def dense(dy, x, offsets):
    bounds = offsets.tolist()
    spans = [slice(a, b) for a, b in zip(bounds, bounds[1:], strict=False)]
    return dots([[g[s].t() @ x[s] for s in spans] for g in dy])


def main():
    results = []
    for dtype in (torch.float32, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        for m in (2, 3):
            sets = gradient_sets(m, dtype)
            masks = [torch.rand(shape, generator=torch.Generator().manual_seed(2)) < 0.5 for shape in SHAPES]
            words = [pack_bits(mask) for mask in masks]
            contenders = {
                "ours": lambda s=sets: gram(s, impl="cpu"),
                "torch.dot": lambda s=sets: dots(s),
                "torch.dot in float64": lambda s=sets: dots(s, torch.float64),
            }
            result = compare(f"{m} objectives, {name}", contenders)
            exact = dots(sets, torch.float64)
            errors = {key: float(((f() - exact).abs() / exact.abs()).max()) for key, f in contenders.items()}
            results.append(result | {"largest_relative_error": errors})
            contenders = {
                "ours": lambda s=sets, w=words: gram(s, masks=w, impl="cpu"),
                "product with the mask, torch.dot": lambda s=sets, k=masks: masked_dots(s, k),
            }
            results.append(compare(f"{m} objectives, half masked, {name}", contenders))
        arguments = factors(3, dtype)
        contenders = {
            "ours": lambda a=arguments: gram_factors(*a, impl="cpu"),
            "dense gradients, torch.dot": lambda a=arguments: dense(*a),
            "ref": lambda a=arguments: gram_factors(*a, impl="ref"),
        }
        results.append(compare(f"factors, 3 objectives, {ROWS} rows an expert, {name}", contenders))
    write("gram", results)


if __name__ == "__main__":
    main()
