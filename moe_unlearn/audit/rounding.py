"""Round the weights as deployment does, and ask again: a change smaller than half a step of the grid is undone by it.

Linear layers and experts are rounded to the grids of `model.grids`, written back in the weights' own dtype, and put
back bit for bit. *Survives* is the share of the weights that unlearning changed whose code on the grid differs from
that of the former weight, each on its own scale: what stays below 1 is lost when the model is deployed.
"""

import torch
from torch import Tensor

from moe_unlearn.audit.attack import Attack, Outcome, Target, Variant
from moe_unlearn.audit.weights import restored
from moe_unlearn.model.grids import GRIDS, Grid, linear_weights


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
