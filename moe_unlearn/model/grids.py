"""The grids that deployment rounds weights to, and the weights that it rounds.

    int8    one scale an output, the largest magnitude / 127
    int4    groups of 128 inputs, symmetric: the largest magnitude / 7
    nf4     blocks of 64 inputs, the 16 levels of QLoRA (arXiv 2305.14314, appendix E), the largest magnitude

Weights are rounded to the nearest level (half to even).
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from moe_unlearn.experts import experts_modules
from moe_unlearn.model.scope import router_parameters
from moe_unlearn.ranks import local

NF4 = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)


@dataclass(frozen=True)
class Grid:
    """A grid of weights: `largest` is the code of the largest magnitude of `group` inputs (None: of all of them).

    Without `largest` the codes are those of the levels `NF4`.
    """

    name: str
    group: int | None
    largest: int | None = None

    def codes(self, weight: Tensor, inputs: int) -> tuple[Tensor, Tensor]:
        """Return codes and scales, [..., groups, group] and [..., groups, 1], with the inputs last; float32."""
        values = weight.detach().float().movedim(inputs, -1)
        size = values.shape[-1] if self.group is None else min(self.group, values.shape[-1])
        values = pad(values, (0, -values.shape[-1] % size)).unflatten(-1, (-1, size))
        largest = values.abs().amax(-1, keepdim=True)
        scale = torch.where(largest > 0, largest, 1.0) / (self.largest or 1)
        return self.nearest(values / scale), scale

    def rounded(self, weight: Tensor, inputs: int) -> Tensor:
        """Return the weight on the grid, in its own dtype and shape."""
        codes, scale = self.codes(weight, inputs)
        values = (self.level(codes) * scale).flatten(-2)[..., : weight.shape[inputs]]
        return values.movedim(-1, inputs).to(weight.dtype)

    def nearest(self, scaled: Tensor) -> Tensor:
        """Return the codes of the levels nearest to weights over their scale, float32."""
        if self.largest is not None:
            return scaled.round().clamp(-self.largest, self.largest)
        levels = torch.tensor(NF4, device=scaled.device)
        return torch.bucketize(scaled.contiguous(), (levels[1:] + levels[:-1]) / 2).float()

    def level(self, codes: Tensor) -> Tensor:
        """Return the levels of codes: the weights on the grid, over their scale."""
        return codes if self.largest is not None else torch.tensor(NF4, device=codes.device)[codes.long()]

    def cell(self, codes: Tensor) -> tuple[Tensor, Tensor]:
        """Return the least and the greatest weight, over its scale, that each code is nearest to."""
        if self.largest is not None:
            return (codes - 0.5).clamp_min(-self.largest), (codes + 0.5).clamp_max(self.largest)
        levels = torch.tensor(NF4, device=codes.device)
        middle = (levels[1:] + levels[:-1]) / 2
        ends = torch.cat([levels[:1], middle, levels[-1:]])
        return ends[codes.long()], ends[codes.long() + 1]


GRIDS = (Grid("int8", None, 127), Grid("int4", 128, 7), Grid("nf4", 64))


def linear_weights(model: nn.Module) -> dict[str, tuple[Tensor, int]]:
    """Return what quantisation rounds, by name, with the dimension of the inputs: linear layers and experts.

    Output head, embeddings, norms, biases and routers are left out, as the usual quantisers leave them.
    """
    model = local(model)
    head = getattr(model, "get_output_embeddings", lambda: None)()
    found: dict[str, tuple[Tensor, int]] = {}
    routers = {name for layer in experts_modules(model) for name in router_parameters(model, layer)}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and module is not head and f"{name}.weight" not in routers:
            found[f"{name}.weight"] = module.weight, 1
    for name, module in experts_modules(model).items():
        inputs = 1 if module.is_transposed else 2
        found |= {f"{name}.{own}": (p, inputs) for own, p in module.named_parameters() if p.dim() == 3}
    return found
