"""Measure masked_update against what a user has today: the gradient times the mask, then torch's optimizer.

That chain leaves masked weights alone only without weight decay (so the decay here is 0), and it holds a mask of one
byte a weight. In the case `blocks`, one row in 20 is kept whole.
"""

import functools

import torch

from benchmarks.harness import OURS, Case, Work, side_names, sides
from moe_unlearn.ops import SGD as SGDRule
from moe_unlearn.ops import AdamW, Update, masked_adamw_, masked_sgd_
from moe_unlearn.ops.bits import pack_bits
from moe_unlearn.ops.costs.masked_update import bytes_per_weight

SHAPES = {"cpu": (8, 1024, 2048), "cuda": (64, 1024, 2048)}  # 16.8 million weights; 134 million
SGD, EXPRESSION = "grad.mul_(mask) + torch SGD", "w.sub_(g * mask * lr)"
ADAMW, FUSED = "grad.mul_(mask) + torch AdamW", "grad.mul_(mask) + torch fused AdamW"
STOCHASTIC = "stochastic"


def cases(device: str) -> list[Case]:
    found = []
    for dtype in ("bfloat16", "float32"):
        for keep in (0.5, 0.05, "blocks"):
            found.append(case("SGD", dtype, keep, device))
        found.append(case("SGD momentum", dtype, 0.5, device))
        found += [case("AdamW", dtype, keep, device) for keep in (0.5, "blocks")]
    wide = {"state": "float32"}
    return [
        *found,
        case("AdamW", "bfloat16", 0.5, device, **wide),
        case("AdamW", "bfloat16", 0.5, device, **wide, rounding=STOCHASTIC),
    ]


def case(rule, dtype, keep, device, state=None, rounding="nearest") -> Case:
    names = {"SGD": (OURS, SGD, EXPRESSION), "SGD momentum": (OURS, SGD), "AdamW": (OURS, ADAMW, FUSED)}[rule]
    more = "".join(f", {text}" for text in (state and f"{state} state", rounding == STOCHASTIC and rounding) if text)
    make = functools.partial(adamw, dtype, keep, device, state, rounding)
    if rule != "AdamW":
        make = functools.partial(sgd, dtype, keep, device, 0.9 if "momentum" in rule else 0.0)
    aimed = keep == 0.5 and rule != "SGD momentum" and not more
    facts = {"rule": rule, "keep": keep, "dtype": dtype}
    title, names = f"{rule} {dtype}, kept {keep}{more}", (*names, *side_names(device))
    return Case("masked_update", title, names, make, 0 if aimed else 1, 3, facts)


def tensors(dtype, keep, device):
    random = {"size": SHAPES[device], "generator": torch.Generator(device).manual_seed(0), "device": device}
    param = torch.randn(**random).to(getattr(torch, dtype))
    grad = torch.randn(**random).mul_(1e-2).to(getattr(torch, dtype))
    if keep == "blocks":
        mask = torch.zeros(SHAPES[device], dtype=torch.bool, device=device)
        mask[:, ::20] = True
    else:
        mask = torch.rand(**random) < keep
    return param, grad, mask


def chain(optimizer, param, mask):
    param.grad.mul_(mask)
    optimizer.step()


def parameter(param, grad):
    theirs = torch.nn.Parameter(param.clone())
    theirs.grad = grad.clone()
    return theirs


def sgd(dtype, keep, device, momentum) -> Work:
    param, grad, mask = tensors(dtype, keep, device)
    words, theirs = pack_bits(mask), parameter(param, grad)
    buffer = torch.zeros_like(param) if momentum else None
    optimizer = torch.optim.SGD([theirs], lr=1e-3, momentum=momentum)
    call = functools.partial(masked_sgd_, param, grad, buffer, words, SGDRule(1e-3, momentum), Update(step=2))
    each, missing = sides("masked_update.sgd", device, lambda impl: call(impl=impl))
    contenders = {OURS: call, SGD: lambda: chain(optimizer, theirs, mask), **each}
    if not momentum:
        contenders[EXPRESSION] = torch.no_grad()(lambda: theirs.sub_(theirs.grad * mask * 1e-3))
    size = param.element_size()
    return Work(
        contenders,
        missing,
        targets={SGD: 8.0} if keep == 0.5 and not momentum and device == "cpu" else {},
        bytes=param.numel() * bytes_per_weight(size, size if momentum else 0, size, fraction(keep)),
        dtype=param.dtype,
        found={"choice": ["masked_update.sgd", param.numel()]},
    )


def adamw(dtype, keep, device, state, rounding) -> Work:
    param, grad, mask = tensors(dtype, keep, device)
    words = pack_bits(mask)
    m, v = (torch.zeros_like(param, dtype=getattr(torch, state or dtype)) for _ in range(2))
    update = Update(step=2, rounding=rounding)
    call = functools.partial(masked_adamw_, param, grad, m, v, words, AdamW(lr=1e-3), update)
    each, missing = sides("masked_update.adamw", device, lambda impl: call(impl=impl))
    contenders = {OURS: call, **each}
    for name, fused in ((ADAMW, False), (FUSED, True)):
        theirs = parameter(param, grad)
        optimizer = torch.optim.AdamW([theirs], lr=1e-3, weight_decay=0.0, fused=fused)
        contenders[name] = functools.partial(chain, optimizer, theirs, mask)
    size = param.element_size()
    return Work(
        contenders,
        missing,
        targets={ADAMW: 4.0} if keep == 0.5 and state is None and device == "cpu" else {},
        bytes=param.numel() * bytes_per_weight(size, 2 * m.element_size(), size, fraction(keep)),
        dtype=param.dtype,
        found={"choice": ["masked_update.adamw", param.numel()]},
    )


def fraction(keep) -> float:
    """Return the fraction of memory lines that an update must touch: half of the weights at random touch every line."""
    return 1 / 20 if keep == "blocks" else 1.0
