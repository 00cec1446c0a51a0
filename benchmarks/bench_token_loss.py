"""Measure loss and gradients from hidden states and an output head, against logits and cross_entropy and fused peers.

`frozen` takes the gradient of the hidden states alone, as where experts are trained. `trained` takes that of the head
too, for which our kernel makes some of the logits twice. Every token has a weight of its own, all of them 1 / T, so
that peers without such weights compute the same. Extra memory includes the gradients, for every contender.
"""

import functools
import warnings

import torch

from benchmarks import rivals, shapes
from benchmarks.harness import OURS, Case, Work
from moe_unlearn.ops import Head, token_loss
from moe_unlearn.ops.costs import token_loss as costs

LOGITS, CHUNKED = "logits + cross_entropy", "torch F.linear_cross_entropy, chunked mean"
PEERS = ("liger fused linear CE", "cut-cross-entropy")
CPU_SIZE = 512, 1024, 50_000  # tokens, hidden width, vocabulary


def cases(device: str) -> list[Case]:
    if device == "cpu":
        kinds = [(dtype, trained) for dtype in ("bfloat16", "float32") for trained in (False, True)]
        rows = [(*CPU_SIZE, dtype, trained, 1 if dtype == "bfloat16" else 2) for dtype, trained in kinds]
        return [case(*row, "", device) for row in rows]
    found = []
    for geometry in shapes.GATE:
        for tokens in (8192, 2048) if geometry is shapes.QWEN3 else (8192,):
            for trained in (False, True):
                tier = 0 if geometry is shapes.QWEN3 and tokens == 8192 else 2
                size = tokens, geometry.hidden, geometry.vocabulary
                found.append(case(*size, "bfloat16", trained, tier, f"{geometry.name} head, ", device))
    return found


def case(tokens, hidden, vocabulary, dtype, trained, tier, of, device) -> Case:
    return Case(
        "token_loss",
        f"{of}{tokens} tokens, V {vocabulary}, {'trained' if trained else 'frozen'} head, {dtype}",
        (OURS, *rivals.LOSSES),
        functools.partial(work, tokens, hidden, vocabulary, dtype, trained, device),
        tier,
        seconds=6 if device == "cuda" else 25 if dtype == "float32" or not trained else 15,
        facts={"tokens": tokens, "hidden": hidden, "vocabulary": vocabulary, "trained": trained},
    )


def work(tokens, hidden, vocabulary, dtype, trained, device) -> Work:
    random = {"generator": torch.Generator(device).manual_seed(0), "device": device}
    dtype = getattr(torch, dtype)
    h = torch.randn(tokens, hidden, **random).to(dtype).requires_grad_()
    head = torch.randn(vocabulary, hidden, **random).div_(hidden**0.5).to(dtype).requires_grad_(trained)
    labels = torch.randint(0, vocabulary, (tokens,), **random)
    weights = torch.full((tokens,), 1 / tokens, device=device)
    peers, missing = rivals.collected(rivals.LOSSES)
    widened = "logits.float() + cross_entropy"
    if device == "cpu" and (trained or dtype == torch.float32):
        missing[CHUNKED] = "only with the frozen head in bfloat16: it takes five times as long as the others"
        peers.pop(CHUNKED, None)
    if dtype == torch.float32:
        missing[widened] = "the logits are float32 already"
        del peers[widened]

    def ours(h, head, labels, weights):
        return token_loss(h, Head(head), labels, token_weights=weights).sum()

    def step(function, rounded=False):
        own = weights.to(dtype) if rounded else weights
        with warnings.catch_warnings():
            # torch warns of configurations that fall back to its plain path; times and memory show it anyway
            warnings.simplefilter("ignore")
            loss = function(h, head, labels, own)
            loss.backward()
        h.grad = head.grad = None
        return loss.detach()

    contenders = {OURS: functools.partial(step, ours)}
    contenders |= {name: functools.partial(step, f, rounded=name == LOGITS) for name, f in peers.items()}
    targets = {LOGITS: 1.0} if device == "cpu" else {name: 1.33 for name in PEERS}
    return Work(
        contenders,
        missing,
        targets=targets,
        mib_target=1024.0 if device == "cuda" and vocabulary == shapes.QWEN3.vocabulary and not trained else None,
        # a fused loss needs these products: the logits, then one gradient or two
        flops=costs.flops(tokens, head.numel(), 3 if trained else 2),
        bytes=costs.bytes_moved(head.numel(), h.element_size(), trains=trained),
        dtype=dtype,
        rounds=3 if device == "cpu" else 7,
        memory=True,
    )
