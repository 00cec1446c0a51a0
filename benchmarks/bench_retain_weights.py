"""TRACE's token weights and the sums of one Newton step, against dense float64 products.

Rival: what a user writes today, with the members as a dense bool [T, S]: one product for the exponents, and a
weighted product for the Hessian. Ours reads one bit a token and expert. S: 32 are two experts in each of 16 layers,
128 are eight.
"""

import torch

from benchmarks.harness import compare, write
from moe_unlearn.ops import retain_weights
from moe_unlearn.ops.bits import pack_bits
from moe_unlearn.ops.retain_weights import moments, tilted_weights

TOKENS, BIAS, CAP = 1 << 16, 0.1, 1.5


def dense_weights(members, tilt):
    return (BIAS + members.double() @ tilt).exp().clamp_max(CAP).float()


def dense_moments(members, tilt):
    extended = torch.nn.functional.pad(members.double(), (1, 0), value=1.0)
    raw = (BIAS + extended[:, 1:] @ tilt).exp()
    return extended.T @ raw.clamp_max(CAP), (extended * torch.where(raw < CAP, raw, 0.0)[:, None]).T @ extended


def main():
    results = []
    for size in (32, 128):
        generator = torch.Generator().manual_seed(size)
        members = torch.rand(TOKENS, size, generator=generator) < 0.2
        words, tilt = pack_bits(members), torch.linspace(-0.3, 0.3, size).double()
        for name, function, dense in (("weights", tilted_weights, dense_weights), ("moments", moments, dense_moments)):
            contenders = {
                "ours": lambda f=function, w=words, t=tilt: f(w, t, BIAS, cap=CAP, impl="cpu"),
                "dense float64": lambda f=dense, m=members, t=tilt: f(m, t),
                "ref": lambda f=function, w=words, t=tilt: f(w, t, BIAS, cap=CAP, impl="ref"),
            }
            results.append(compare(f"{name}, {TOKENS} tokens, {size} experts", contenders))
        target = (members.double().mean(0) * torch.linspace(0.8, 1.5, size)).clamp(0.01, 0.99)
        solved = {
            impl: lambda i=impl, m=members, g=target: retain_weights(m, g, cap=10.0, impl=i) for impl in ("cpu", "ref")
        }
        results.append(compare(f"solved, {TOKENS} tokens, {size} experts", solved, rounds=3))
    write("retain_weights", results)


if __name__ == "__main__":
    main()
