"""Round the weights as deployment does, and ask again: a change smaller than half a step of the grid is undone by it.

    int8    one scale an output, the largest magnitude / 127
    int4    groups of 128 inputs, symmetric: the largest magnitude / 7
    nf4     blocks of 64 inputs, the 16 levels of QLoRA (arXiv 2305.14314, appendix E), the largest magnitude

Linear layers and experts are rounded to nearest (half to even), written back in the weights' own dtype, and restored
bit for bit. *Survives* is the share of the weights that unlearning changed whose code on the grid differs from that of
the former weight, each on its own scale: what stays below 1 is lost when the model is deployed.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from moe_unlearn.audit.attack import Attack, Outcome, Target, Variant
from moe_unlearn.audit.weights import linear_weights, restored

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
        scaled = values / scale
        if self.largest is not None:
            return scaled.round().clamp(-self.largest, self.largest), scale
        levels = torch.tensor(NF4, device=scaled.device)
        return torch.bucketize(scaled.contiguous(), (levels[1:] + levels[:-1]) / 2).float(), scale

    def rounded(self, weight: Tensor, inputs: int) -> Tensor:
        """Return the weight on the grid, in its own dtype and shape."""
        codes, scale = self.codes(weight, inputs)
        if self.largest is None:
            codes = torch.tensor(NF4, device=codes.device)[codes.long()]
        values = (codes * scale).flatten(-2)[..., : weight.shape[inputs]]
        return values.movedim(-1, inputs).to(weight.dtype)


GRIDS = (Grid("int8", None, 127), Grid("int4", 128, 7), Grid("nf4", 64))


def survives(grid: Grid, weight: Tensor, former: Tensor, inputs: int) -> tuple[int, int]:
    """Return how many weights changed, and how many of these have another code than their former selves."""
    changed = weight.detach() != former.detach()
    pairs = zip(_parts(weight, inputs), _parts(former, inputs), _parts(changed, inputs), strict=True)
    count = kept = 0
    for own, old, moved in pairs:
        new, was = (grid.codes(part, part.dim() - 1)[0].flatten(-2)[..., : part.shape[-1]] for part in (own, old))
        count, kept = count + int(moved.sum()), kept + int((moved & (new != was)).sum())
    return count, kept


def _parts(weight: Tensor, inputs: int) -> list[Tensor]:
    """Return the weight's experts, or itself, with the inputs last: what is worked on at a time."""
    weight = weight.detach().movedim(inputs, -1)
    return list(weight) if weight.dim() == 3 else [weight]


def _run(target: Target) -> Outcome:
    weights, former = linear_weights(target.model), linear_weights(target.before)
    variants, survived = {}, {}
    for grid in GRIDS:
        with restored(weight for weight, _ in weights.values()), torch.no_grad():
            for weight, inputs in weights.values():
                weight.copy_(grid.rounded(weight, inputs))
            variants[grid.name] = Variant(f"rounded to {grid.name}", target.read())
        counts = [
            survives(grid, weight, former[name][0].to(weight.device), inputs)
            for name, (weight, inputs) in weights.items()
        ]
        changed, kept = (sum(own) for own in zip(*counts, strict=True))
        survived[grid.name] = {"changed": changed, "survive": kept / changed if changed else None}
    return Outcome(variants, {"survives": survived})


ATTACK = Attack(
    "rounding",
    "Rounded weights",
    "Linear layers and experts are rounded as deployed models are: a forgetting that is finer than the grid is undone.",
    _run,
)
