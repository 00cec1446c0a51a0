"""route and the sums of retain_weights, against the same in torch calls: what the references do."""

import torch

from benchmarks.harness import compare, write
from moe_unlearn.ops import route
from moe_unlearn.ops.bits import pack_bits
from moe_unlearn.ops.retain_weights import moments, tilted_weights
from moe_unlearn.testing import routing


def routes(num_tokens, num_experts, top_k):
    index = routing("uniform", num_tokens, num_experts, top_k)
    group = torch.arange(num_tokens) % 2
    tilt, log_weight = torch.randn(num_experts), torch.zeros(num_tokens)
    options = {"group": group, "num_groups": 2, "log_tilt": tilt, "log_weight": log_weight}

    def torch_calls():
        """Sort and histograms as MoE code writes them."""
        flat = index.flatten()
        order = flat.argsort(stable=True)
        counts = torch.stack([torch.bincount(index[group == g].flatten(), minlength=num_experts) for g in (0, 1)])
        offsets = torch.nn.functional.pad(counts.sum(0).cumsum(0), (1, 0))
        log_weight.add_(tilt[index].sum(1))
        return order, counts, offsets

    return {
        "ours": lambda: route(index, num_experts, **options, impl="cpu"),
        "torch calls": torch_calls,
        "ref": lambda: route(index, num_experts, **options, impl="ref"),
    }


def sums(num_tokens, num_members, rate):
    generator = torch.Generator().manual_seed(0)
    words = pack_bits(torch.rand(num_tokens, num_members, generator=generator) < rate)
    tilt = torch.randn(num_members, generator=generator, dtype=torch.float64) / 10
    return (
        {impl: lambda i=impl: moments(words, tilt, -0.1, cap=5.0, impl=i) for impl in ("cpu", "ref")},
        {impl: lambda i=impl: tilted_weights(words, tilt, -0.1, cap=5.0, impl=i) for impl in ("cpu", "ref")},
    )


def main():
    results = [
        compare(f"route, T {t}, E {e}, K {k}", routes(t, e, k), rounds=15)
        for t, e, k in ((64, 64, 8), (1024, 64, 8), (8192, 128, 8), (32768, 256, 8))
    ]
    for num_tokens, num_members, rate in ((20000, 16, 0.125), (20000, 128, 0.0625), (20000, 128, 0.9)):
        size = f"T {num_tokens}, S {num_members}, {rate:.0%} members"
        for name, contenders in zip(("moments", "weights"), sums(num_tokens, num_members, rate), strict=True):
            results.append(compare(f"retain_weights {name}, {size}", contenders))
    write("route", results)


if __name__ == "__main__":
    main()
