"""Make one expert layer with random weights, a batch and masks, from which every contender of the layer starts."""

import torch
from torch import Tensor
from transformers import GptOssConfig, OlmoeConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.olmoe.modeling_olmoe import OlmoeExperts

from benchmarks import shapes
from benchmarks.shapes import Geometry
from moe_unlearn.ops import ExpertLayout, ExpertWeights, Gate, expert_mlp, route

GPT_OSS_GATE = Gate("silu", 1.702, 7.0, 1.0)


class Layer:
    """The experts (a module of transformers), one batch of T tokens, its routing, and an upstream gradient.

    The fraction `share` of the experts trains, drawn at random; `masks` keep half of their weights.
    """

    def __init__(
        self, geometry: Geometry, tokens: int, *, routing: str = "uniform", device: str = "cpu", share: float = 1.0
    ):
        self.geometry, self.device = geometry, device
        torch.manual_seed(0)
        self.experts = _experts(geometry, device)
        for p in self.experts.parameters():
            # drawn once for all experts, because drawing each would take longer than the measurement
            p.data.copy_(torch.randn(p.shape[1:]).mul_(0.02))
        self.hidden = torch.randn(tokens, geometry.hidden).bfloat16().to(device).requires_grad_()
        self.index = shapes.routing(routing, tokens, geometry).to(device)
        scores = torch.rand(tokens, geometry.top_k)
        self.weights = (scores / scores.sum(1, keepdim=True)).bfloat16().to(device).requires_grad_()
        self.upstream = (torch.randn(tokens, geometry.hidden) * 1e-2).bfloat16().to(device)
        trained = torch.randperm(geometry.experts)[: max(1, round(share * geometry.experts))].sort().values
        self.trained = trained.to(device)

    def parameters(self) -> list[Tensor]:
        """Return the experts' parameters, in the module's order."""
        return list(self.experts.parameters())

    def masks(self) -> list[Tensor]:
        """Return a dense mask for each parameter: half of the weights of the trained experts, nothing of the others."""
        generator = torch.Generator().manual_seed(1)
        masks = []
        for p in self.parameters():
            mask = torch.zeros(p.shape, dtype=torch.bool, device=self.device)
            mask[self.trained] = (torch.rand(p.shape[1:], generator=generator) < 0.5).to(self.device)
            masks.append(mask)
        return masks

    def ours(self, hidden: Tensor, index: Tensor, weights: Tensor, **options) -> Tensor:
        """Return the layer's output, computed by the ops; `options` go to `expert_mlp`."""
        rows = route(index, self.geometry.experts)
        where = rows.sorted_rows, rows.expert_offsets
        if self.geometry.gpt_oss:
            own = {name: p for name, p in self.experts.named_parameters()}
            biases = own["gate_up_proj_bias"], own["down_proj_bias"]
            matrices = ExpertWeights(own["gate_up_proj"], own["down_proj"], *biases)
            layout = ExpertLayout(GPT_OSS_GATE, transposed=True, interleaved=True)
            return expert_mlp(hidden, weights, *where, matrices, layout=layout, **options)
        matrices = ExpertWeights(self.experts.gate_up_proj, self.experts.down_proj)
        return expert_mlp(hidden, weights, *where, matrices, **options)


def _experts(geometry: Geometry, device: str) -> torch.nn.Module:
    sizes = {"hidden_size": geometry.hidden, "intermediate_size": geometry.inner, "num_experts_per_tok": geometry.top_k}
    if geometry.gpt_oss:
        config, kind = GptOssConfig(num_local_experts=geometry.experts, **sizes), GptOssExperts
    else:
        config, kind = OlmoeConfig(num_experts=geometry.experts, **sizes), OlmoeExperts
    config._experts_implementation = "grouped_mm"
    with torch.device("meta"):
        experts = kind(config).bfloat16()
    return experts.to_empty(device=device)
