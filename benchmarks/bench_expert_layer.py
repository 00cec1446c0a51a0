"""One expert layer of OLMoE, forward + backward + masked AdamW, against what a user has today.

Rival: transformers' `grouped_mm` experts, autograd, gradient times mask, torch's AdamW. The mask keeps half of the
weights of the trained experts; the rival has no way to leave an expert's gradient out, so its mask is zero there.
Ours is the same maths from the ops: the update is made of each block of the weight gradient, which is never stored.

    python -m benchmarks.bench_expert_layer          the layer itself (64 experts, 1024 tokens): 10 GB of memory
    python -m benchmarks.bench_expert_layer small    16 experts, 256 tokens: the same 128 rows an expert
"""

import sys

import torch
from transformers import OlmoeConfig
from transformers.models.olmoe.modeling_olmoe import OlmoeExperts

from benchmarks.harness import compare, write
from moe_unlearn.ops import expert_mlp, route
from moe_unlearn.ops.bits import pack_bits
from moe_unlearn.ops.expert_wgrad import expert_wgrad_adamw_

HIDDEN, INNER, TOP_K = 2048, 1024, 8
SIZES = {"full": (64, 1024), "small": (16, 256)}
LR, SILU = 1e-5, ("silu", 1.0, float("inf"), 0.0, False, False, True)


class Layer:
    """What both sides start from: the experts, one batch, and the mask of the trained experts."""

    def __init__(self, experts, tokens, share):
        torch.manual_seed(0)
        config = OlmoeConfig(
            hidden_size=HIDDEN, intermediate_size=INNER, num_experts=experts, num_experts_per_tok=TOP_K
        )
        config._experts_implementation = "grouped_mm"
        with torch.device("meta"):
            self.experts = OlmoeExperts(config).bfloat16()
        self.experts.to_empty(device="cpu")
        for p in self.experts.parameters():
            # drawn once for all experts: drawing each would take longer than what is measured
            p.data.copy_(torch.randn(p.shape[1:]).mul_(0.02))
        self.hidden = torch.randn(tokens, HIDDEN).bfloat16().requires_grad_()
        scores, self.index = torch.randn(tokens, experts).softmax(1).topk(TOP_K)
        self.weights = scores.bfloat16().requires_grad_()
        self.upstream = torch.randn(tokens, HIDDEN).bfloat16() * 1e-2
        self.trained = torch.randperm(experts)[: round(share * experts)].sort().values
        self.masks = []
        for p in self.experts.parameters():
            mask = torch.zeros(p.shape, dtype=torch.bool)
            mask[self.trained] = torch.rand(p.shape[1:]) < 0.5
            self.masks.append(mask)


def theirs(layer, fused=False):
    optimizer = torch.optim.AdamW(layer.experts.parameters(), lr=LR, weight_decay=0.0, fused=fused)

    def step():
        optimizer.zero_grad()
        layer.hidden.grad = layer.weights.grad = None
        out = layer.experts(layer.hidden, layer.index, layer.weights)
        out.backward(layer.upstream)
        for p, mask in zip(layer.experts.parameters(), layer.masks, strict=True):
            p.grad.mul_(mask)
        optimizer.step()
        return out, layer.hidden.grad, layer.weights.grad

    return step


def ours(layer):
    experts = layer.trained.int()
    parameters = [p.detach().clone() for p in layer.experts.parameters()]
    words = [pack_bits(mask[layer.trained[0]]).repeat(len(experts), 1, 1) for mask in layer.masks]
    moments = [[torch.zeros(len(experts), *p.shape[1:], dtype=p.dtype) for _ in range(2)] for p in parameters]
    x, weights = layer.hidden.detach(), layer.weights.detach()
    ops = torch.ops.moe_unlearn

    def step():
        rows = route(layer.index, len(parameters[0]), impl="cpu")
        where = rows.sorted_rows, rows.expert_offsets
        out, z = ops.expert_mlp(x, weights, *where, *parameters, None, None, None, *SILU, "cpu")
        d_x, d_weights, dz, scaled = ops.expert_mlp_backward(
            layer.upstream, x, weights, *where, *parameters, None, z, *SILU, [True] * 4, "cpu"
        )
        token = rows.sorted_rows // TOP_K
        factors = ((dz, x, {"input_rows": token}), (layer.upstream, scaled, {"grad_rows": token}))
        for p, mask, state, (grad, input, maps) in zip(parameters, words, moments, factors, strict=True):
            expert_wgrad_adamw_(
                p, *state, grad, input, rows.expert_offsets, **maps, experts=experts, mask=mask, lr=LR, step=1,
                impl="cpu",
            )  # fmt: skip
        return out, d_x, d_weights

    return step


def check(layer):
    """Both compute the same layer: the largest difference relative to the largest value."""
    pairs = zip(ours(layer)(), theirs(layer)(), strict=True)
    return max(float(((a - b).abs().max() / b.abs().max()).detach()) for a, b in pairs)


def inference(layer):
    """Forward only, as evaluation runs it."""
    rows = route(layer.index, len(layer.experts.gate_up_proj), impl="cpu")
    parameters = [p.detach() for p in layer.experts.parameters()]
    arguments = layer.hidden.detach(), layer.weights.detach(), rows.sorted_rows, rows.expert_offsets, *parameters
    return {
        "ours": lambda: expert_mlp(*arguments, impl="cpu"),
        "grouped_mm": torch.no_grad()(lambda: layer.experts(layer.hidden, layer.index, layer.weights)),
    }


def main(size="full"):
    experts, tokens = SIZES[size]
    results = []
    for share, target in ((1.0, 2), (0.2, 3)):
        layer = Layer(experts, tokens, share)
        difference = check(layer) if size == "small" else None
        contenders = {"ours": ours(layer), "grouped_mm + mask + torch AdamW": theirs(layer)}
        if size == "small":
            contenders["grouped_mm + mask + torch fused AdamW"] = theirs(layer, fused=True)
        name = f"OLMoE layer, {experts} experts, {tokens} tokens, bf16, {share:.0%} trained"
        results.append(compare(name, contenders, target=target, rounds=3 if size == "full" else 5))
        if difference is not None:
            results[-1]["largest_difference"] = round(difference, 4)
    results.append(compare(f"the same, forward only, {experts} experts", inference(layer), rounds=3))
    write(f"expert_layer_{size}" if size != "full" else "expert_layer", results)


if __name__ == "__main__":
    main(*sys.argv[1:])
