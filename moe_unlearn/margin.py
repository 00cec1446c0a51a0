"""PDU's forget loss: the logits of the forget rows, flattened towards a uniform prediction.

    L = mean over positions of (max_v z_v - mean_v z_v)^2          z [V] the logits of a position

Without a softmax its gradient does not vanish where the prediction is confident, and it is least, 0, where all tokens
are equally likely. The positions are those that carry a loss, which predict a labelled token, or those that a batch's
`state_mask` [B, S] says.

Source: arXiv 2506.05314, "logit margin flattening". Its authors' trainer in open-unlearning takes the positions of the
labelled tokens themselves, one later; the trainers of `integrations.open_unlearning` ask for these.
"""

import torch
from torch import Tensor, nn

from moe_unlearn import losses
from moe_unlearn.batches import Batch
from moe_unlearn.ops.token_loss import IGNORED, token_loss


def margin_mask(batch: Batch) -> Tensor:
    """bool [B, S]: the positions whose logits are flattened."""
    given = batch.get("state_mask")
    return losses.target_mask(batch) if given is None else given


def logit_margin(model: nn.Module, batch: Batch, hidden_states: Tensor) -> Tensor:
    """The loss [], float32 (float64 for float64), from final hidden states [B, S, H]; 0 where no position counts.

    Logits are never stored. Errors as `losses.head_of` and `token_loss`.
    """
    mask, head = margin_mask(batch), losses.head_of(model)
    values = token_loss(
        hidden_states.flatten(0, 1), head.weight, torch.where(mask, 0, IGNORED).flatten(), bias=head.bias,
        kind="logit_margin", logit_scale=head.logit_scale, logit_softcap=head.logit_softcap,
    )  # fmt: skip
    return values.sum() / mask.sum().clamp_min(1)
