"""Measure TRACE's token weights and the sums of one Newton step against dense float64 products.

The rival is what a user writes today, with the members as a dense bool [T, S]: one product for the exponents, and a
weighted product for the Hessian. Our kernels read one bit a token and expert. S = 32 stands for two experts in each
of 16 layers, S = 128 for eight. The case `solved` runs all of Newton's method.
"""

import functools

import torch

from benchmarks.harness import OURS, Case, Work, side_names, sides
from moe_unlearn.ops import retain_weights
from moe_unlearn.ops.bits import pack_bits
from moe_unlearn.ops.costs.retain_weights import bytes_moved
from moe_unlearn.ops.retain_weights import moments, tilted_weights

TOKENS, BIAS, CAP = 1 << 16, 0.1, 1.5
DENSE, REF = "dense float64", "ref"


def dense_weights(members, tilt):
    return (BIAS + members.double() @ tilt).exp().clamp_max(CAP).float()


def dense_moments(members, tilt):
    extended = torch.nn.functional.pad(members.double(), (1, 0), value=1.0)
    raw = (BIAS + extended[:, 1:] @ tilt).exp()
    return extended.T @ raw.clamp_max(CAP), (extended * torch.where(raw < CAP, raw, 0.0)[:, None]).T @ extended


KERNELS = {"weights": "retain_weights", "moments": "retain_weights.moments"}
PARTS = {"weights": (tilted_weights, dense_weights), "moments": (moments, dense_moments)}


def cases(device: str) -> list[Case]:
    found = []
    for size in (32, 128):
        facts = {"tokens": TOKENS, "experts": size}
        for part in PARTS:
            make, title = functools.partial(work, part, size, device), f"{part}, {TOKENS} tokens, {size} experts"
            found.append(Case("retain_weights", title, (OURS, DENSE, REF, *side_names(device)), make, 1, 5, facts))
        if size == 32 or device == "cuda":  # 128 experts would take a CPU a minute
            make, title = functools.partial(solved, size, device), f"solved, {TOKENS} tokens, {size} experts"
            found.append(Case("retain_weights", title, (OURS, REF), make, 2, 10, facts))
    return found


def membership(size, device):
    generator = torch.Generator().manual_seed(size)
    return (torch.rand(TOKENS, size, generator=generator) < 0.2).to(device)


def work(part, size, device) -> Work:
    members, tilt = membership(size, device), torch.linspace(-0.3, 0.3, size, device=device).double()
    words, (function, dense) = pack_bits(members), PARTS[part]
    call = functools.partial(function, words, tilt, BIAS, cap=CAP)
    each, missing = sides(KERNELS[part], device, lambda impl: call(impl=impl))
    return Work(
        {
            OURS: call,
            DENSE: lambda: dense(members, tilt),
            REF: lambda: call(impl="ref"),
            **each,
        },
        missing,
        bytes=bytes_moved(TOKENS, size, weights=part == "weights"),
        dtype=torch.float64,
        found={"choice": [KERNELS[part], words.numel()]},
    )


def solved(size, device) -> Work:
    members = membership(size, device)
    target = members.double().mean(0) * torch.linspace(0.8, 1.5, size, device=device).double()
    target = target.clamp(0.01, 0.99)
    return Work(
        {
            OURS: lambda: retain_weights(members, target, cap=10.0),
            REF: lambda: retain_weights(members, target, cap=10.0, impl="ref"),
        },
        dtype=torch.float64,
        rounds=5,
    )
