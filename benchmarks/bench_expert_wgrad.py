"""Measure the grouped weight gradient with masked AdamW as its epilogue, against storing the gradient first.

The rivals compute `F.grouped_mm` over all experts, multiply by a dense mask, and call torch's fused AdamW over all
weights (dense) or over compact copies of the trained experts (compact). The mask keeps half of the weights of the
trained experts. Storing the gradient is measured against `F.grouped_mm` over all experts. Where we have several
implementations, each is timed.
"""

import functools

import torch
import torch.nn.functional as F

from benchmarks import shapes
from benchmarks.harness import OURS, Case, Work, side_names, sides
from benchmarks.shapes import Geometry
from moe_unlearn.ops import AdamW, Update, route
from moe_unlearn.ops.bits import pack_bits
from moe_unlearn.ops.costs import expert_wgrad as costs
from moe_unlearn.ops.costs.masked_update import bytes_per_weight
from moe_unlearn.ops.expert_wgrad import Factors, expert_wgrad, expert_wgrad_adamw_

GROUPED = "F.grouped_mm"
DENSE, COMPACT = "F.grouped_mm + mask + fused AdamW", "F.grouped_mm + compact fused AdamW"
LR = 1e-5


def cases(device: str) -> list[Case]:
    geometry, tokens = (shapes.OLMOE.narrow(4), 1024) if device == "cpu" else (shapes.QWEN3, 8192)
    found = [case(geometry, tokens, share, False, device) for share in (1.0, 0.2, 0.05)]
    if device == "cuda":
        found.append(case(geometry, tokens, 0.2, True, device))
        found += [case(shapes.OLMOE, 2048, 0.2, stored, device) for stored in (False, True)]
    return found


def case(geometry: Geometry, tokens: int, share: float, stored: bool, device: str) -> Case:
    """Return the case of AdamW as the epilogue, or of storing the gradient."""
    rivals, make = ((GROUPED,), store_work) if stored else ((DENSE, COMPACT), work)
    first = device == "cuda" and geometry is shapes.QWEN3 and share == 0.2
    return Case(
        "expert_wgrad",
        f"{geometry.name}, {tokens} tokens, {share:.0%} trained{', store' if stored else ''}",
        (OURS, *rivals, *side_names(device)),
        functools.partial(make, geometry, tokens, share, device),
        tier=0 if first else 1,
        seconds=5,
        facts={"geometry": geometry.name, "tokens": tokens, "share": share},
    )


def operands(geometry: Geometry, tokens: int, share: float, device: str) -> tuple[Factors, torch.Tensor]:
    """Return the factors of the gate and up projections, and the trained experts."""
    generator = torch.Generator().manual_seed(0)
    routing = route(shapes.routing("uniform", tokens, geometry).to(device), geometry.experts)
    rows = tokens * geometry.top_k
    grad = torch.randn(rows, 2 * geometry.inner, generator=generator).bfloat16().to(device)
    x = torch.randn(rows, geometry.hidden, generator=generator).bfloat16().to(device)
    trained = torch.randperm(geometry.experts, generator=generator)[: max(1, round(share * geometry.experts))]
    return Factors(grad, x, routing.expert_offsets, None, None), trained.sort().values.to(device)


def work(geometry: Geometry, tokens: int, share: float, device: str) -> Work:
    factors, trained = operands(geometry, tokens, share, device)
    grad, x, offsets, *_ = factors
    generator, shape = torch.Generator().manual_seed(1), (geometry.experts, grad.shape[1], x.shape[1])
    keep = (torch.rand(shape[1:], generator=generator) < 0.5).to(device)
    words = pack_bits(keep).expand(len(trained), -1, -1).contiguous()
    weight = torch.randn(shape[1:], generator=generator).bfloat16().to(device).expand(shape).contiguous()
    moments: dict[str, list] = {}

    def ours(impl="auto"):
        if impl not in moments:  # made at the first step, as by torch's optimizers
            moments[impl] = [weight.new_zeros(len(trained), *shape[1:]) for _ in range(2)]
        rule, update, experts = AdamW(lr=LR), Update(step=1), trained.int()
        expert_wgrad_adamw_(weight, *moments[impl], factors, rule, update, experts=experts, mask=words, impl=impl)

    each, missing = sides("expert_wgrad.adamw", device, ours)
    contenders = {OURS: ours, **each}
    if hasattr(F, "grouped_mm"):
        contenders |= {
            name: theirs(weight, grad, x, offsets, trained, keep, name == DENSE) for name in (DENSE, COMPACT)
        }
    else:
        missing |= dict.fromkeys((DENSE, COMPACT), f"torch {torch.__version__} has no F.grouped_mm")
    rows = len(grad)
    return Work(
        contenders,
        missing,
        flops=costs.flops(rows, *shape[1:], share),
        # weights and both moments are in bfloat16
        bytes=costs.bytes_moved(rows, *shape[1:], share) + share * weight.numel() * bytes_per_weight(2, state=4),
        memory=True,
        found={"choice": ["expert_wgrad.adamw", weight.numel()]},
    )


def store_work(geometry: Geometry, tokens: int, share: float, device: str) -> Work:
    """Return the work of storing the trained experts' gradient."""
    factors, trained = operands(geometry, tokens, share, device)
    grad, x, offsets, *_ = factors

    def ours(impl="auto"):
        return expert_wgrad(**factors._asdict(), experts=trained.int(), impl=impl)

    each, missing = sides("expert_wgrad", device, ours)
    contenders = {OURS: ours, **each}
    if hasattr(F, "grouped_mm"):
        contenders[GROUPED] = lambda: F.grouped_mm(grad.t(), x, offs=offsets[1:])
    else:
        missing[GROUPED] = f"torch {torch.__version__} has no F.grouped_mm"
    flops = costs.flops(len(grad), grad.shape[1], x.shape[1], share)
    return Work(contenders, missing, flops=flops, found={"choice": ["expert_wgrad", grad.numel()]})


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
