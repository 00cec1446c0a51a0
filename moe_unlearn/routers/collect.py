"""Collects what invariant routers keep from the retain inputs of the model as it is, batch by batch.

Of each expert a sketch of at most 2 `rank` rows is held, never all inputs: frequent directions (Liberty, KDD 2013;
Ghashami et al., SIAM J. Comput. 2016). Its rows are the inputs themselves, and so exact, as long as there are no more
than that; beyond, [sketch; new inputs] = U S V^T becomes (S^2 - s^2)^(1/2) V^T with s the first singular value that
does not fit.
The basis has as many of its leading directions as hold the share `energy` of sum |x|^2, at most `rank`.

The inputs nearest to a tie are those with the smallest gap between the lowest logit chosen and the highest other one.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from moe_unlearn.config import Router as Settings
from moe_unlearn.model.batches import Batch
from moe_unlearn.routers.kept import Kept
from moe_unlearn.routers.watch import Router, choices, routers_of, watch

_ROUNDING = 2.0**-6  # of the largest logit: by how much logits of a bfloat16 router may seem to be in another order


@torch.no_grad()
def collect(model: nn.Module, batches: Iterable[Batch], settings: Settings) -> dict[str, Kept]:
    """Return what each router that trains keeps, by the name of its weight; empty where none trains.

    The inputs are those of all attended tokens of the `batches`; the model should be in evaluation mode. Raises
    ValueError for a router that is more than a weight and a bias, and for one whose choice is not its largest logits.
    """
    routers = routers_of(model)
    found = {router.name: _Collected(router, settings) for router in routers}

    def see(router: Router, inputs: Tensor, top_k_index: Tensor) -> None:
        found[router.name].add(inputs, top_k_index)

    watch(model, routers, batches, see)
    return {name: each.kept() for name, each in found.items()}


class _Collected:
    """What is known of one router from the inputs so far."""

    def __init__(self, router: Router, settings: Settings):
        self.router, self.settings = router, settings
        weight = router.weight.detach()
        self.weight = weight.to(torch.promote_types(weight.dtype, torch.float32), copy=True)
        experts, width = weight.shape
        self.rank = min(settings.rank, width)
        self.sketch = [self.weight.new_zeros(0, width) for _ in range(experts)]
        self.total = self.weight.new_zeros(experts)
        self.inputs, self.gap = self.weight.new_zeros(0, width), self.weight.new_zeros(0, experts)

    def add(self, inputs: Tensor, top_k_index: Tensor) -> None:
        """Take up inputs [T, H] and the experts that each chose."""
        inputs = inputs.to(self.weight)
        chosen, logits = choices(top_k_index, len(self.weight)), self.router.logits(inputs)
        gap = logits.masked_fill(~chosen, torch.inf).amin(1, keepdim=True) - logits
        gap = gap.masked_fill(chosen, torch.inf)
        self._check(gap, logits)
        self.total += torch.where(chosen, inputs.square().sum(1, keepdim=True), 0).sum(0)
        for expert, rows in enumerate(self.sketch):
            self.sketch[expert] = shrunk(torch.cat([rows, inputs[chosen[:, expert]]]), 2 * self.rank)
        self.inputs, self.gap = torch.cat([self.inputs, inputs]), torch.cat([self.gap, gap.clamp_min(0)])
        nearest = self.gap.amin(1).argsort(stable=True)[: self.settings.margin_inputs]
        self.inputs, self.gap = self.inputs[nearest], self.gap[nearest]

    def _check(self, gap: Tensor, logits: Tensor) -> None:
        """Raise ValueError if experts were chosen that have not the largest logits."""
        if (gap < -_ROUNDING * logits.abs().amax(1, keepdim=True)).any():
            raise ValueError(
                f"router.mode invariant needs routers that choose the largest logits; that of {self.router.name} "
                "chooses otherwise (a correction bias, or groups of experts): router: frozen, or router: free"
            )

    def kept(self) -> Kept:
        """Return what the router keeps."""
        basis = torch.stack([self._basis(rows, self.total[e]) for e, rows in enumerate(self.sketch)])
        return Kept(self.weight, basis, self.inputs, self.gap, self.settings.margin)

    def _basis(self, rows: Tensor, total: Tensor) -> Tensor:
        """Return an orthonormal basis [R, H] of the main directions of a sketch; rows of 0 where there are fewer."""
        basis = rows.new_zeros(self.rank, rows.shape[1])
        if len(rows):
            _, size, directions = torch.linalg.svd(rows, full_matrices=False)
            size, directions = size[: self.rank], directions[: self.rank]
            share = size.square().cumsum(0) - size.square()  # what the directions before hold
            found = size > size[0] * torch.finfo(size.dtype).eps * max(rows.shape)
            if self.settings.energy < 1:
                found &= share < self.settings.energy * total
            basis[: len(size)] = directions * found[:, None]
        return basis


def shrunk(rows: Tensor, most: int) -> Tensor:
    """Return a sketch of at most `most` rows [_, H] of these rows; rows as they are where there are no more."""
    if len(rows) <= most:
        return rows
    _, size, directions = torch.linalg.svd(rows, full_matrices=False)
    if len(size) > most:
        size, directions = (size[:most].square() - size[most].square()).clamp_min(0).sqrt(), directions[:most]
    sketch: Tensor = size[:, None] * directions
    return sketch
