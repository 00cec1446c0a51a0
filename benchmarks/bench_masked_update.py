"""masked_update against what a user has today: gradient times mask, then torch's optimizer.

That chain leaves masked weights alone only without weight decay (the decay here is 0), and it holds a mask
of one byte a weight.
"""

import torch

from benchmarks.harness import compare, write
from moe_unlearn.ops import masked_adamw_, masked_sgd_
from moe_unlearn.ops.bits import pack_bits

SHAPE = (8, 1024, 2048)  # 16.8 million weights: 8 experts' down projections of OLMoE


def tensors(dtype, keep, seed=0):
    generator = torch.Generator().manual_seed(seed)
    param = torch.randn(SHAPE, generator=generator).to(dtype)
    grad = (torch.randn(SHAPE, generator=generator) * 1e-2).to(dtype)
    mask = torch.zeros(SHAPE, dtype=torch.bool)
    if keep == "blocks":  # one row in 20
        mask[:, ::20] = True
    else:
        mask = torch.rand(SHAPE, generator=generator) < keep
    return param, grad, mask


def torch_step(optimizer, param, mask):
    param.grad.mul_(mask)
    optimizer.step()


def sgd(dtype, keep, **options):
    param, grad, mask = tensors(dtype, keep)
    words, theirs = pack_bits(mask), torch.nn.Parameter(param.clone())
    theirs.grad = grad.clone()
    buffer = torch.zeros_like(param) if options else None
    optimizer = torch.optim.SGD([theirs], lr=1e-3, **options)

    def expression():
        with torch.no_grad():
            theirs.sub_(theirs.grad * mask * 1e-3)

    contenders = {
        "ours": lambda: masked_sgd_(param, grad, buffer, words, lr=1e-3, step=2, impl="cpu", **options),
        "grad.mul_(mask) + torch SGD": lambda: torch_step(optimizer, theirs, mask),
    }
    if not options:
        contenders["w.sub_(g * mask * lr)"] = expression
    return contenders


def adamw(dtype, keep, state_dtype=None, rounding="nearest"):
    param, grad, mask = tensors(dtype, keep)
    words = pack_bits(mask)
    m, v = (torch.zeros(SHAPE, dtype=state_dtype or dtype) for _ in range(2))
    contenders = {
        "ours": lambda: masked_adamw_(param, grad, m, v, words, lr=1e-3, step=2, rounding=rounding, impl="cpu")
    }
    for name, fused in (("AdamW", False), ("fused AdamW", True)):
        theirs = torch.nn.Parameter(param.clone())
        theirs.grad = grad.clone()
        optimizer = torch.optim.AdamW([theirs], lr=1e-3, weight_decay=0.0, fused=fused)
        contenders[f"grad.mul_(mask) + torch {name}"] = lambda o=optimizer, p=theirs: torch_step(o, p, mask)
    return contenders


def main():
    results = []
    for dtype in (torch.bfloat16, torch.float32):
        name = str(dtype).removeprefix("torch.")
        for keep in (0.5, 0.05, "blocks"):
            results.append(compare(f"SGD {name}, kept {keep}", sgd(dtype, keep), target=8))
        results.append(compare(f"SGD momentum {name}, kept 0.5", sgd(dtype, 0.5, momentum=0.9)))
        for keep in (0.5, "blocks"):
            results.append(compare(f"AdamW {name}, kept {keep}", adamw(dtype, keep), target=4))
    results.append(compare("AdamW bfloat16, float32 state", adamw(torch.bfloat16, 0.5, torch.float32)))
    results.append(
        compare("AdamW bfloat16, float32 state, stochastic", adamw(torch.bfloat16, 0.5, torch.float32, "stochastic"))
    )
    write("masked_update", results)


if __name__ == "__main__":
    main()
