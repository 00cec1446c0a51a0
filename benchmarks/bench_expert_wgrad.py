"""The grouped weight gradient with masked AdamW as its epilogue, against the gradient stored and then used.

Rivals: `F.grouped_mm` over all experts, times a dense mask, torch's fused AdamW over all weights (dense) or over
compact copies of the trained experts (compact). The mask keeps half of the weights of the trained experts.
"""

import functools

import torch
import torch.nn.functional as F

from benchmarks import shapes
from benchmarks.harness import OURS, Case, Work
from benchmarks.shapes import Geometry
from moe_unlearn.ops import route
from moe_unlearn.ops.bits import pack_bits
from moe_unlearn.ops.expert_wgrad import expert_wgrad_adamw_

DENSE, COMPACT = "F.grouped_mm + mask + fused AdamW", "F.grouped_mm + compact fused AdamW"
LR = 1e-5


def cases(device: str) -> list[Case]:
    geometry, tokens = (shapes.OLMOE.narrow(4), 1024) if device == "cpu" else (shapes.QWEN3, 8192)
    return [case(geometry, tokens, share, device) for share in (1.0, 0.2, 0.05)]


def case(geometry: Geometry, tokens: int, share: float, device: str) -> Case:
    return Case(
        "expert_wgrad",
        f"{geometry.name}, {tokens} tokens, {share:.0%} trained",
        (OURS, DENSE, COMPACT),
        functools.partial(work, geometry, tokens, share, device),
        seconds=5,
        facts={"geometry": geometry.name, "tokens": tokens, "share": share},
    )


def work(geometry: Geometry, tokens: int, share: float, device: str) -> Work:
    generator = torch.Generator().manual_seed(0)
    routing = route(shapes.routing("uniform", tokens, geometry).to(device), geometry.experts)
    offsets, rows = routing.expert_offsets, tokens * geometry.top_k
    grad = torch.randn(rows, 2 * geometry.inner, generator=generator).bfloat16().to(device)
    x = torch.randn(rows, geometry.hidden, generator=generator).bfloat16().to(device)
    shape = geometry.experts, 2 * geometry.inner, geometry.hidden
    trained = torch.randperm(geometry.experts, generator=generator)[: max(1, round(share * geometry.experts))]
    trained = trained.sort().values.to(device)
    keep = (torch.rand(shape[1:], generator=generator) < 0.5).to(device)
    words = pack_bits(keep).expand(len(trained), -1, -1).contiguous()
    weight = torch.randn(shape[1:], generator=generator).bfloat16().to(device).expand(shape).contiguous()
    moments = []

    def ours():
        if not moments:  # at the first step, as torch's optimizers do
            moments.extend(weight.new_zeros(len(trained), *shape[1:]) for _ in range(2))
        expert_wgrad_adamw_(
            weight, *moments, grad, x, offsets, experts=trained.int(), mask=words, lr=LR, step=1
        )  # fmt: skip

    contenders, missing = {OURS: ours}, {}
    if hasattr(F, "grouped_mm"):
        contenders |= {
            name: theirs(weight, grad, x, offsets, trained, keep, name == DENSE) for name in (DENSE, COMPACT)
        }
    else:
        missing = dict.fromkeys((DENSE, COMPACT), f"torch {torch.__version__} has no F.grouped_mm")
    products = 2.0 * rows * shape[1] * shape[2]
    return Work(
        contenders,
        missing,
        flops=products * share,
        bytes=2.0 * share * rows * (shape[1] + shape[2]) + share * weight.numel() * (12 + 1 / 8),
        memory=True,
    )


def theirs(weight, grad, x, offsets, trained, keep, dense):
    parameter = torch.nn.Parameter(weight.clone() if dense else weight[trained])
    mask = torch.zeros(parameter.shape, dtype=torch.bool, device=weight.device)
    mask[trained if dense else slice(None)] = keep
    optimizer = torch.optim.AdamW([parameter], lr=LR, weight_decay=0.0, fused=True)

    def step():
        gradient = F.grouped_mm(grad.t(), x, offs=offsets[1:])
        parameter.grad = (gradient if dense else gradient[trained]).mul_(mask)
        optimizer.step()
        parameter.grad = None
        if not dense:
            weight.index_copy_(0, trained, parameter.data)

    return step
