"""Measure route against the same work in torch calls: sort, histograms and sums as MoE code writes them."""

import functools

import torch

from benchmarks.harness import OURS, Case, Work, side_names, sides
from moe_unlearn.ops import route
from moe_unlearn.ops.costs.route import bytes_moved
from moe_unlearn.testing import routing

TORCH, REF = "torch calls", "ref"
SIZES = {
    "cpu": ((64, 64, 8), (1024, 64, 8), (8192, 128, 8), (32768, 256, 8)),
    "cuda": ((8192, 128, 8), (256, 128, 8), (2048, 64, 8), (32768, 128, 8)),
}


def cases(device: str) -> list[Case]:
    first = (8192, 128, 8)
    return [
        Case(
            "route",
            f"T {t}, E {e}, K {k}",
            (OURS, TORCH, REF, *side_names(device)),
            functools.partial(work, t, e, k, device),
            0 if device == "cuda" and (t, e, k) == first else 1,
            2,
            {"tokens": t, "experts": e, "top_k": k},
        )
        for t, e, k in SIZES[device]
    ]


def work(num_tokens, num_experts, top_k, device) -> Work:
    index = routing("uniform", num_tokens, num_experts, top_k).to(device)
    group = (torch.arange(num_tokens) % 2).to(device)
    tilt, log_weight = torch.randn(num_experts, device=device), torch.zeros(num_tokens, device=device)
    options = {"group": group, "num_groups": 2, "log_tilt": tilt, "log_weight": log_weight}

    def torch_calls():
        flat = index.flatten()
        order = flat.argsort(stable=True)
        counts = torch.stack([torch.bincount(index[group == g].flatten(), minlength=num_experts) for g in (0, 1)])
        offsets = torch.nn.functional.pad(counts.sum(0).cumsum(0), (1, 0))
        log_weight.add_(tilt[index].sum(1))
        return order, counts, offsets

    each, missing = sides("route", device, lambda impl: route(index, num_experts, **options, impl=impl))
    asked = device == "cuda" and (num_tokens, num_experts) == (8192, 128)
    return Work(
        {
            OURS: lambda: route(index, num_experts, **options),
            TORCH: torch_calls,
            REF: lambda: route(index, num_experts, **options, impl="ref"),
            **each,
        },
        missing,
        targets={TORCH: 5.0} if asked else {},
        microseconds_target=20.0 if asked else None,
        bytes=bytes_moved(num_tokens, top_k),
        dtype=torch.float32,
        graph=True,
        found={"choice": ["route", index.numel()]},
    )
