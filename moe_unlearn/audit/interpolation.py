"""Go on along the line from the former weights to the unlearned ones, and ask at every point.

    theta(a) = theta_before + a (theta_after - theta_before),     a in [0, 1.5]

Before a = 1 the point holds a part of the former weights, so that a text that is there says how near it lies and not
that it was hidden: these points make a curve and no verdict. Beyond a = 1 no former weight is put back; a text that
returns there was covered, not removed.
"""

import torch
from torch import Tensor

from moe_unlearn.audit.attack import Attack, Outcome, Target, Variant
from moe_unlearn.audit.weights import restored, router_tensors
from moe_unlearn.ranks import local

POINTS = (0.0, 0.25, 0.5, 0.75, 0.9, 1.0, 1.25, 1.5)
_PART = 2**24  # weights that are moved at a time


def _run(target: Target) -> Outcome:
    # unlearning may have untied weights, and correction biases of routers are buffers
    after = dict(local(target.model).named_parameters()) | router_tensors(target.model)
    before = dict(local(target.before).named_parameters(remove_duplicate=False)) | router_tensors(target.before)
    pairs = {name: (own, before[name]) for name, own in after.items() if not _equal(own, before[name])}
    variants = {}
    for a in POINTS:
        with restored(own for own, _ in pairs.values()), torch.no_grad():
            for own, former in pairs.values():
                _move(own, former, a)
            label = f"weights at a = {a:g}"
            variants[f"{a:g}"] = Variant(label, target.read(), judged=a > 1)
    return Outcome(variants, {"points": list(POINTS)})


def _equal(own: Tensor, former: Tensor) -> bool:
    return torch.equal(own, former.to(own.device))


def _move(own: Tensor, former: Tensor, a: float) -> None:
    flat = own.detach().reshape(-1) if own.is_contiguous() else None
    if flat is None:
        own.copy_(torch.lerp(former.to(own.device).float(), own.float(), a))
        return
    for into, old in zip(flat.split(_PART), former.detach().reshape(-1).split(_PART), strict=True):
        into.copy_(torch.lerp(old.to(into.device).float(), into.float(), a))


ATTACK = Attack(
    "interpolation",
    "Along the update",
    "The weights are moved along the line from the former model to this one, and beyond it.",
    _run,
)
