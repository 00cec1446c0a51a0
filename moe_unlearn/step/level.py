"""The losses of the objective level: forget rows beside their unseen texts, and these beside what they were.

The companion of a forget row (`batches.refusal`) is its unseen text; `losses.level` and `losses.held` are the formulas.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from moe_unlearn import losses
from moe_unlearn.config import Forget
from moe_unlearn.model.batches import Batch, refusal, target_mask
from moe_unlearn.model.head import token_losses
from moe_unlearn.prepare.rows import RowCache


def level(
    model: nn.Module,
    settings: Forget,
    batch: Batch,
    former: RowCache,
    states: Tensor | None = None,
    states_unseen: Tensor | None = None,
) -> dict[str, Tensor]:
    """Compute {"forget": ..., "hold": ...}, means over the `units`, each a scalar with its graph.

    `former` has the log-probs of unseen rows before the first step; `states` [B, S, H] of the rows and of their unseen
    texts replace the forward passes.
    """
    unseen = refusal(batch)
    mask, mask_unseen = target_mask(batch), target_mask(unseen)
    nll = token_losses(model, batch, kind="nll", hidden_states=states)
    nll_unseen = token_losses(model, unseen, kind="nll", hidden_states=states_unseen)
    was = -former.get(unseen).to(nll_unseen.dtype)
    margin, unit, count = settings.margin, settings.unit, units(settings, batch)
    sums = {
        "forget": losses.level(nll, mask, nll_unseen, mask_unseen, margin=margin, unit=unit),
        "hold": losses.held(nll_unseen, was, mask_unseen, margin=margin, unit=unit),
    }
    return {name: value / count[name].clamp_min(1) for name, value in sums.items()}


def units(settings: Forget, batch: Batch) -> dict[str, Tensor]:
    """Count the units of both losses of a batch, int64 [] each: positions, or rows where sequences are compared."""
    masks = {"forget": target_mask(batch), "hold": target_mask(refusal(batch))}
    if settings.unit == "sequence":
        return {name: torch.full_like(mask.sum(), len(mask)) for name, mask in masks.items()}
    return {name: mask.sum() for name, mask in masks.items()}


def check(forget: Sequence[Batch]) -> None:
    """Raise ValueError if no unseen text of these batches has a token to predict."""
    if not any(target_mask(refusal(batch)).any() for batch in forget):
        raise ValueError("the unseen set carries no loss: all its labels are -100")
