"""Corrects routers once after training, so that they give for the retain inputs of now what they gave before.

    w'_e = argmin  sum_t (x_t . w' + b_e - z_te)^2 + lambda |w' - w_e|^2

x_t are the inputs of the retain tokens that are watched (`stability`) in the trained model, z_te the logits that the
same tokens had before training, w_e the trained row; lambda is `ridge` times the mean of sum_t x_t x_t^T's diagonal.
Under a mask the sum is minimised over the free coordinates alone. The inputs are those of one forward pass before any
router is corrected. Sums and solutions are float64.

Source: our specification after GRIP's correction behind training (arXiv 2601.16905; not read but in a port).
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from moe_unlearn.model.batches import Batch
from moe_unlearn.routers.watch import Router, routers_of, watch


@torch.no_grad()
def logits(model: nn.Module, batches: Sequence[Batch]) -> dict[str, Tensor]:
    """Return the logits [T, E] of every attended token, float32 or wider, of each router that trains, by its weight."""
    found: dict[str, list[Tensor]] = {}

    def see(router: Router, inputs: Tensor, top_k_index: Tensor) -> None:
        found.setdefault(router.name, []).append(router.logits(_wide(inputs)))

    watch(model, routers_of(model), batches, see)
    return {name: torch.cat(parts) for name, parts in found.items()}


@torch.no_grad()
def corrected(
    model: nn.Module,
    batches: Sequence[Batch],
    before: Mapping[str, Tensor],
    ridge: float,
    free: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    """Return the corrected weights [E, H] float64 by name, from the logits `before` of the tokens of the same batches.

    `free` has bool [E, H] by name, the weights that may move, where not all may.
    """
    sums: dict[str, tuple[Tensor, Tensor]] = {}
    begins = dict.fromkeys(before, 0)

    def see(router: Router, inputs: Tensor, top_k_index: Tensor) -> None:
        x, begin = inputs.double(), begins[router.name]
        begins[router.name] = begin + len(x)
        left = before[router.name][begin : begin + len(x)].to(x) - router.logits(x)
        square, cross = sums.get(router.name, (0, 0))
        sums[router.name] = square + x.T @ x, cross + x.T @ left

    watch(model, routers_of(model), batches, see)
    named = dict(model.named_parameters())
    return {name: named[name].double() + _solved(*both, ridge, free.get(name)) for name, both in sums.items()}


def _solved(square: Tensor, cross: Tensor, ridge: float, free: Tensor | None) -> Tensor:
    """Return the change [E, H] that minimises the sum, from sum_t x x^T [H, H] and sum_t x (z - x . w) [H, E]."""
    square = square.clone()
    square.diagonal().add_(ridge * square.diagonal().mean())
    if free is None:
        change: Tensor = torch.linalg.solve(square, cross).T
        return change
    change = torch.zeros_like(cross.T)
    for expert, own in enumerate(free):
        at = own.nonzero().flatten()
        change[expert, at] = torch.linalg.solve(square[at][:, at], cross[at, expert])
    return change


def _wide(values: Tensor) -> Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32))
