"""Loss and gradients from hidden states and an output head, against logits and F.cross_entropy with autograd.

`frozen`: gradient of the hidden states alone, as where experts are trained; `trained`: of the head too, for which
ours makes some of the logits twice. Extra memory is the growth of the peak resident size over what stood before the
call, in a process of its own; the gradients themselves are in it, on both sides, and without them it is given too.
"""

import subprocess
import sys

import torch
import torch.nn.functional as F

from benchmarks.harness import compare, write
from moe_unlearn.ops import token_loss

TOKENS, HIDDEN, VOCABULARY = 2048, 1024, 50_000
OURS, THEIRS, WIDENED = "ours", "logits + cross_entropy", "logits.float() + cross_entropy"
LEAST_MEMORY_RATIO = 8


def inputs(dtype, trained, tokens=TOKENS):
    generator = torch.Generator().manual_seed(0)
    h = torch.randn(tokens, HIDDEN, generator=generator).to(dtype).requires_grad_()
    head = (torch.randn(VOCABULARY, HIDDEN, generator=generator) / HIDDEN**0.5).to(dtype).requires_grad_(trained)
    return h, head, torch.randint(0, VOCABULARY, (tokens,), generator=generator)


def step(kind, h, head, labels):
    """Forward and backward; returns the loss."""
    h.grad = head.grad = None
    if kind == OURS:
        loss = token_loss(h, head, labels, impl="cpu").sum() / (labels >= 0).sum()
    else:
        logits = h @ head.t()
        loss = F.cross_entropy(logits.float() if kind == WIDENED else logits, labels)
    loss.backward()
    return loss.detach()


def status(field):
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def measure_memory(kind, dtype, trained):
    """Prints the bytes by which the peak resident size grows; run in a process of its own."""
    step(kind, *inputs(dtype, trained, tokens=2))
    arguments = inputs(dtype, trained)
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the peak starts anew
    before = status("VmRSS")
    step(kind, *arguments)
    print(status("VmHWM") - before)


def memory(kind, name, trained):
    command = [sys.executable, "-m", "benchmarks.bench_token_loss", kind, name, str(int(trained))]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def case(name, trained, kept=1.0):
    dtype = getattr(torch, name)
    h, head, labels = inputs(dtype, trained)
    labels[: round((1 - kept) * TOKENS)] = -100
    rivals = [THEIRS] if name == "float32" else [THEIRS, WIDENED]
    contenders = {kind: lambda k=kind: step(k, h, head, labels) for kind in (OURS, *rivals)}
    label = f"{'trained' if trained else 'frozen'} head, {name}" + ("" if kept == 1 else f", {kept:.0%} of the labels")
    result = compare(label, contenders, target=1, rounds=2)
    result["loss"] = {kind: float(step(kind, h, head, labels)) for kind in contenders}
    if kept < 1:
        return result
    gradients = (h.numel() + (head.numel() if trained else 0)) * h.element_size()
    extra = {kind: memory(kind, name, trained) for kind in contenders}
    result["extra_bytes"], result["bytes_of_gradients"] = extra, gradients
    without = {kind: max(size - gradients, 1) for kind, size in extra.items()}
    result["memory_ratio"] = round(extra[THEIRS] / extra[OURS], 1)
    result["memory_ratio_without_gradients"] = round(without[THEIRS] / without[OURS], 1)
    result["memory_reached"] = result["memory_ratio_without_gradients"] >= LEAST_MEMORY_RATIO
    print(f"  extra MB { ({k: v >> 20 for k, v in extra.items()}) }, of them gradients {gradients >> 20}", flush=True)
    return result


def main():
    if len(sys.argv) == 4:
        return measure_memory(sys.argv[1], getattr(torch, sys.argv[2]), sys.argv[3] == "1")
    results = [case(name, trained) for name in ("float32", "bfloat16") for trained in (False, True)]
    results.append(case("float32", True, kept=0.5))
    write("token_loss", results)


if __name__ == "__main__":
    main()
