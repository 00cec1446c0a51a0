"""Forget and retain objectives; `model.head` computes per-token losses from a model.

The formulas use log-probabilities. That of a sequence is the sum over its positions that carry a loss:

    nll        mean of -w log p                                  GA is its negative, GradDiff its difference
    uce        mean of -w log(1 - p / 2), in [0, log 2]          MOLLM's bounded forget loss
    kl         mean of w KL(p_ref || p)                          summed over the vocabulary
    npo        -(2 / beta) mean log sigmoid(-beta (s - s_ref))                     s = sequence log-prob
    simnpo     -(2 / beta) mean log sigmoid(-beta (s / length + delta))
    idk_dpo    -(2 / beta) mean log sigmoid(beta ((s_idk - s_idk_ref) - (s_forget - s_forget_ref)));
               s_idk belongs to a refusal or to an alternate answer                IDK-DPO, AltPO
    idk_nll    nll of a refusal, or of an alternate answer, in the answer's place  WAGLE's PO
    wga        mean of p^beta log p, p^beta held fixed                             GA weighted by confidence
    satimp     mean of p^beta1 (1 - p)^beta2 log p, the weight held fixed          saturation x importance
    ceu        mean of -sum_v q_v log p_v, q = p without the label, held fixed     CE-U; gradient of -log(1 - p)
    undial     mean of -sum_v q_v log p_v, q = p_ref with the label's logit lowered by beta    UNDIAL
    level      mean of max(0, |o - o_unseen| - margin)^2, o = log((1 - p) / p), the tokens of a forget and of an
               unseen row in the order of their odds, and hold times the same of unseen text and what it was
    logit_margin  mean of (max_v z_v - mean_v z_v)^2                               PDU
    rmu        mean over labelled tokens and dimensions of (h - control)^2
    embed_diff the same with (h - h_ref)^2

Token means are sum_t w_t l_t / (number of positions): weights do not enter the divisor. A position t counts
iff attention_mask[t] is not 0 and labels[t + 1] != -100; its loss is that of predicting labels[t + 1]. A hidden
state belongs to its own token, not to the next one: rmu and embed_diff take the states of labelled tokens
(`model.batches.state_mask`), the first token of a row not among them, whose label nothing predicts.

The reference's hidden states are cached in bfloat16, which is exact for a bfloat16 model. A float32 model is compared
with rounded states: kl and embed_diff do not begin at 0 but at their rounding, and undial's first gradient was off by
1.7 to 2.7 % in norm on three random models of 2 layers, by 3 to 5 % of a weight's largest entry.

Sources: open-unlearning defines the baselines, wga, satimp, ceu and undial (read there). uce is in the FedOSD code of
MOLLM's authors; its use in MOLLM is our reconstruction. The weighted mean and the rule of positions are our
specification.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from moe_unlearn.model.batches import Batch, state_mask, target_mask
from moe_unlearn.model.head import (
    decoder_of,
    final_hidden_states,
    head_of,
    operands,
    token_losses,
    unwrapped,
    verify_head,
    with_head,
)
from moe_unlearn.ops.token_loss import IGNORED, Head, token_loss

# with what makes per-token losses of a model, so that `losses` is all that an objective of a user's own needs
__all__ = [
    "Head",
    "decoder_of",
    "embed_diff",
    "final_hidden_states",
    "head_of",
    "idk_dpo",
    "kl",
    "level",
    "logit_margin",
    "margin_mask",
    "nll",
    "npo",
    "rmu",
    "satimp",
    "sequence_sums",
    "simnpo",
    "state_mask",
    "target_mask",
    "token_losses",
    "uce",
    "unwrapped",
    "verify_head",
    "wga",
]


_LEAST_NLL = 1e-6  # of a label whose odds are still told apart from certainty


def nll(token_logprobs: Tensor, weights: Tensor | None = None) -> Tensor:
    """Compute the weighted mean NLL of token_logprobs [T]: sum_t w_t (-log p_t) / T; 0 for T = 0."""
    return _weighted_mean(-token_logprobs, weights)


def uce(token_logprobs: Tensor, weights: Tensor | None = None) -> Tensor:
    """Compute the bounded forget loss of token_logprobs [T]: sum_t w_t (-log(1 - p_t / 2)) / T.

    It is flat at p = 0 and at p = 1.
    """
    return _weighted_mean(-torch.log1p(-0.5 * _wide(token_logprobs).exp()), weights)


def wga(token_nll: Tensor, beta: float) -> Tensor:
    """Compute the loss of weighted gradient ascent, -p^beta nll, of each token; p^beta is held fixed.

    The result has the shape of token_nll = -log p. Source: arXiv 2502.19301, as open-unlearning has it.
    """
    wide = _wide(token_nll)
    return -(-beta * wide.detach()).exp() * wide


def satimp(token_nll: Tensor, beta1: float, beta2: float) -> Tensor:
    """Compute the SatImp loss, -p^beta1 (1 - p)^beta2 nll, of each token; the weight is held fixed.

    p^beta1 is the weight of saturation, (1 - p)^beta2 that of importance; the result has the shape of
    token_nll = -log p. Source: arXiv 2505.11953, as open-unlearning has it.
    """
    wide = _wide(token_nll)
    fixed = wide.detach()
    return -(-beta1 * fixed).exp() * (-torch.expm1(-fixed)) ** beta2 * wide


def level(
    token_nll: Tensor,
    mask: Tensor,
    goal_nll: Tensor,
    goal_mask: Tensor,
    *,
    margin: float = 0.0,
    unit: str = "token",
) -> Tensor:
    """Add up how far each row's tokens are from being as unlikely as those of its goal, [].

        token       sum_i max(0, |o(l_(i)) - o(g_(i))| - margin)^2
        sequence    sum over rows of max(0, |mean_i o(l_i) - mean_i o(g_i)| - margin)^2

    o(l) = log(e^l - 1) = log((1 - p) / p) are the log-odds against a label, l = -log p. token_nll [B, S] counts at the
    set positions of mask [B, S], goal_nll [B, G] at those of goal_mask [B, G]; no gradient flows into the goal. l_(i)
    is the i-th least likely of a row's n tokens and g_(i) the goal's at the same share of its own, i / (n - 1),
    between two of them in proportion: a row may spread its tokens in any order, but needs as many likely and unlikely
    ones as its goal. A row without a token on either side counts 0. By a label's logit the slope is that of the square
    alone, where that of -log p vanishes for a memorised token. Deterministic. Source: our specification.
    """
    own, goal = _odds(token_nll, mask), _odds(goal_nll.detach(), goal_mask)
    if unit == "sequence":
        counted = mask.any(1) & goal_mask.any(1)
        apart = _row_means(own, mask) - _row_means(goal, goal_mask)
        return _beyond(torch.where(counted, apart, 0), margin)
    count, of = mask.sum(1, keepdim=True), goal_mask.sum(1, keepdim=True)
    rank = torch.arange(own.shape[1], device=own.device)
    counted = (rank < count) & (of > 0)
    place = torch.where(counted, rank * ((of - 1).to(own.dtype) / (count - 1).clamp_min(1)), 0)
    low = torch.minimum(place.long(), (of - 1).clamp_min(0))
    high = torch.minimum(low + 1, (of - 1).clamp_min(0))
    ranked = _descending(goal, goal_mask)
    between = torch.lerp(ranked.gather(1, low), ranked.gather(1, high), place - low)
    # an infinite rest of the sort is taken out before the difference, whose gradient would be NaN
    own, between = (torch.where(counted, side, 0) for side in (_descending(own, mask), between))
    return _beyond(own - between, margin)


def held(token_nll: Tensor, former_nll: Tensor, mask: Tensor, *, margin: float = 0.0, unit: str = "token") -> Tensor:
    """Add up how far tokens, or the means of rows, are from what they were, [].

        token       sum over `mask` of max(0, |o(l) - o(l_former)| - margin)^2
        sequence    sum over rows of max(0, |mean o(l) - mean o(l_former)| - margin)^2

    All are [B, S]; o and `unit` are those of `level`. No gradient flows into `former_nll`.
    """
    own, former = _odds(token_nll, mask), _odds(former_nll.detach(), mask)
    if unit == "sequence":
        own, former = _row_means(own, mask), _row_means(former, mask)
    return _beyond(own - former, margin)


def npo(seq_logprobs: Tensor, ref_seq_logprobs: Tensor, beta: float) -> Tensor:
    """Compute the loss of negative preference optimisation of sequences [B]; (2 / beta) log 2 at the reference."""
    return -2 / beta * logsigmoid(-beta * _wide(seq_logprobs - ref_seq_logprobs)).mean()


def simnpo(seq_logprobs: Tensor, lengths: Tensor, beta: float, delta: float = 0.0) -> Tensor:
    """Compute NPO without a reference from log-probs [B] divided by lengths [B] in tokens.

    An empty sequence counts as 0.
    """
    mean_nll = -_wide(seq_logprobs) / lengths.clamp_min(1)
    return -2 / beta * logsigmoid(beta * (mean_nll - delta)).mean()


def idk_dpo(
    idk_seq_logprobs: Tensor,
    ref_idk_seq_logprobs: Tensor,
    forget_seq_logprobs: Tensor,
    ref_forget_seq_logprobs: Tensor,
    beta: float,
) -> Tensor:
    """Compute the DPO loss that prefers a refusal to the answer to be forgotten; all arguments are log-probs [B]."""
    margin = (idk_seq_logprobs - ref_idk_seq_logprobs) - (forget_seq_logprobs - ref_forget_seq_logprobs)
    return -2 / beta * logsigmoid(beta * _wide(margin)).mean()


def rmu(hidden_states: Tensor, control: Tensor, mask: Tensor) -> Tensor:
    """Compute the mean squared distance of hidden_states [B, S, H] from control [H] where mask [B, S] is set."""
    return embed_diff(hidden_states, control.expand_as(hidden_states), mask)


def embed_diff(hidden_states: Tensor, ref_hidden_states: Tensor, mask: Tensor) -> Tensor:
    """Compute the mean squared difference [] of two [B, S, H] where mask [B, S] is set; 0 for an empty mask.

    Raises ValueError for a mask that is not bool.
    """
    if mask.dtype != torch.bool:
        raise ValueError(f"mask must be bool, since torch takes integers for indexes; got {mask.dtype}")
    # rows are taken and not multiplied by the mask, since padding may hold NaN
    difference = _wide(hidden_states[mask]) - _wide(ref_hidden_states[mask])
    return difference.square().sum() / max(difference.numel(), 1)


def sequence_sums(token_values: Tensor, mask: Tensor | None = None) -> Tensor:
    """Add up token_values [B, S] of each row, [B], over the set positions of mask [B, S], or over all without one."""
    return (token_values if mask is None else torch.where(mask, token_values, 0)).sum(1)


def kl(
    hidden_states: Tensor,
    ref_hidden_states: Tensor,
    head: Head,
    weights: Tensor | None = None,
    *,
    ref_lm_head: Tensor | None = None,
    ref_bias: Tensor | None = None,
) -> Tensor:
    """Compute sum_t w_t KL(p_ref || p)_t / T from hidden states [T, H] and a head; logits are never stored.

    `ref_lm_head` [V, H] and `ref_bias` [V] are those of the reference where they differ from the head's. No gradient
    flows into the reference.
    """
    labels = torch.zeros(len(hidden_states), dtype=torch.int64, device=hidden_states.device)
    rows, head, reference = operands(hidden_states, head, ref_hidden_states, ref_lm_head, ref_bias)
    values = token_loss(rows, head, labels, token_weights=weights, kind="kl", reference=reference)
    return values.sum() / max(len(values), 1)


def margin_mask(batch: Batch) -> Tensor:
    """Return bool [B, S], the positions whose logits are flattened: the batch's `state_mask`, else `target_mask`."""
    return state_mask(batch) if "state_mask" in batch else target_mask(batch)


def logit_margin(model: nn.Module, batch: Batch, hidden_states: Tensor) -> Tensor:
    """Compute PDU's forget loss, the mean over positions of (max_v z_v - mean_v z_v)^2, z [V] a position's logits.

    Takes final hidden states [B, S, H]; returns [], float32 (float64 for float64), 0 if no position counts. Logits
    are never stored. There is no softmax, so that the gradient does not vanish where the prediction is confident. The
    loss is least, 0, where all tokens are equally likely. Errors as `head_of` and `token_loss`.

    Source: arXiv 2506.05314, "logit margin flattening". Its authors' trainer in open-unlearning takes the positions of
    the labelled tokens themselves, one later; the trainers of `integrations.open_unlearning` ask for these.
    """
    mask = margin_mask(batch)
    labels = torch.where(mask, 0, IGNORED).flatten()
    rows = hidden_states.flatten(0, 1)
    values = with_head(model, lambda head: token_loss(rows, head, labels, kind="logit_margin"))
    return values.sum() / mask.sum().clamp_min(1)


def _beyond(apart: Tensor, margin: float) -> Tensor:
    """Add up the squares of what of each distance is beyond `margin`."""
    return (apart.abs() - margin).clamp_min(0).square().sum()


def _odds(nll: Tensor, mask: Tensor) -> Tensor:
    """Compute the log-odds against each label, log(e^nll - 1), 0 outside the mask; finite where p rounds to 1."""
    wide = torch.where(mask, _wide(nll), math.log(2))
    above = wide + (wide.clamp_min(_LEAST_NLL) - wide).detach()  # with a slope below the least NLL, too
    return above + torch.log(-torch.expm1(-above))


def _descending(values: Tensor, mask: Tensor) -> Tensor:
    """Sort each row's values at set positions in descending order; what follows them means nothing."""
    return values.masked_fill(~mask, -math.inf).sort(stable=True, dim=1, descending=True).values


def _row_means(values: Tensor, mask: Tensor) -> Tensor:
    return sequence_sums(values, mask) / mask.sum(1).clamp_min(1)


def _wide(values: Tensor) -> Tensor:
    return values if values.dtype == torch.float64 else values.float()


def _weighted_mean(values: Tensor, weights: Tensor | None) -> Tensor:
    values = _wide(values)
    return (values if weights is None else values * weights).sum() / max(len(values), 1)
