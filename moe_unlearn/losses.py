"""Forget and retain objectives, and the way from a model to per-token losses.

Formulas over log-probabilities; a sequence's is the sum over the positions that carry a loss:

    nll        mean of -w log p                                  GA is its negative, GradDiff its difference
    uce        mean of -w log(1 - p / 2), in [0, log 2]          MOLLM's bounded forget loss
    kl         mean of w KL(p_ref || p)                          summed over the vocabulary
    npo        -(2 / beta) mean log sigmoid(-beta (s - s_ref))                     s = sequence log-prob
    simnpo     -(2 / beta) mean log sigmoid(-beta (s / length + delta))
    idk_dpo    -(2 / beta) mean log sigmoid(beta ((s_idk - s_idk_ref) - (s_forget - s_forget_ref)));
               s_idk is of a refusal, or of an alternate answer                    IDK-DPO, AltPO
    idk_nll    nll of a refusal, or of an alternate answer, in the answer's place  WAGLE's PO
    wga        mean of p^beta log p, p^beta held fixed                             GA weighted by confidence
    satimp     mean of p^beta1 (1 - p)^beta2 log p, the weight held fixed          saturation x importance
    ceu        mean of -sum_v q_v log p_v, q = p without the label, held fixed     CE-U; gradient of -log(1 - p)
    undial     mean of -sum_v q_v log p_v, q = p_ref with the label's logit lowered by beta    UNDIAL
    logit_margin  mean of (max_v z_v - mean_v z_v)^2                               PDU; see `margin`
    rmu        mean over labelled tokens and dimensions of (h - control)^2
    embed_diff the same with (h - h_ref)^2

Token means are sum_t w_t l_t / (number of positions): weights do not enter the divisor. A position t counts
iff attention_mask[t] = 1 and labels[t + 1] != -100; its loss is that of predicting labels[t + 1]. A hidden
state is of its own token and not of the next: rmu and embed_diff take those of labelled tokens (`state_mask`).

Sources: the baselines, wga, satimp, ceu and undial as open-unlearning defines them (read there); uce in the FedOSD
code of MOLLM's authors, its use in MOLLM is our reconstruction; the weighted mean and the rule of positions are our
specification.
"""

import contextlib
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from moe_unlearn.batches import Batch, attention_mask, inputs
from moe_unlearn.modes import checkpoints_with_graph, evaluation_mode
from moe_unlearn.ops.token_loss import IGNORED, token_loss
from moe_unlearn.ranks import local

# config field -> the factor it puts on the logits; flags of a config, never names of models
_LOGIT_FACTORS = {
    "logits_scaling": lambda value: 1.0 / value,
    "logit_scale": float,
    "lm_head_multiplier": float,
}


def nll(token_logprobs: Tensor, weights: Tensor | None = None) -> Tensor:
    """sum_t w_t (-log p_t) / T over token_logprobs [T]; 0 for T = 0."""
    return _weighted_mean(-token_logprobs, weights)


def uce(token_logprobs: Tensor, weights: Tensor | None = None) -> Tensor:
    """sum_t w_t (-log(1 - p_t / 2)) / T over token_logprobs [T]; flat at p = 0 and at p = 1."""
    return _weighted_mean(-torch.log1p(-0.5 * _wide(token_logprobs).exp()), weights)


def wga(token_nll: Tensor, beta: float) -> Tensor:
    """-p^beta nll of each token, of the shape of token_nll = -log p; p^beta is held fixed (weighted gradient ascent).

    Source: arXiv 2502.19301, as open-unlearning has it.
    """
    wide = _wide(token_nll)
    return -(-beta * wide.detach()).exp() * wide


def satimp(token_nll: Tensor, beta1: float, beta2: float) -> Tensor:
    """-p^beta1 (1 - p)^beta2 nll of each token, of the shape of token_nll = -log p; the weight is held fixed.

    p^beta1 is the weight of saturation, (1 - p)^beta2 that of importance. Source: arXiv 2505.11953, as
    open-unlearning has it.
    """
    wide = _wide(token_nll)
    fixed = wide.detach()
    return -(-beta1 * fixed).exp() * (-torch.expm1(-fixed)) ** beta2 * wide


def npo(seq_logprobs: Tensor, ref_seq_logprobs: Tensor, beta: float) -> Tensor:
    """Negative preference optimisation of sequences [B]; (2 / beta) log 2 at the reference."""
    return -2 / beta * logsigmoid(-beta * _wide(seq_logprobs - ref_seq_logprobs)).mean()


def simnpo(seq_logprobs: Tensor, lengths: Tensor, beta: float, delta: float = 0.0) -> Tensor:
    """NPO without a reference: log-probs [B] by their lengths [B] in tokens; an empty sequence counts as 0."""
    mean_nll = -_wide(seq_logprobs) / lengths.clamp_min(1)
    return -2 / beta * logsigmoid(beta * (mean_nll - delta)).mean()


def idk_dpo(
    idk_seq_logprobs: Tensor,
    ref_idk_seq_logprobs: Tensor,
    forget_seq_logprobs: Tensor,
    ref_forget_seq_logprobs: Tensor,
    beta: float,
) -> Tensor:
    """Preference of a refusal over the answer to be forgotten, each a log-prob [B] with its reference."""
    margin = (idk_seq_logprobs - ref_idk_seq_logprobs) - (forget_seq_logprobs - ref_forget_seq_logprobs)
    return -2 / beta * logsigmoid(beta * _wide(margin)).mean()


def rmu(hidden_states: Tensor, control: Tensor, mask: Tensor) -> Tensor:
    """Steering of hidden_states [B, S, H] to control [H] where mask [B, S] is set."""
    return embed_diff(hidden_states, control.expand_as(hidden_states), mask)


def embed_diff(hidden_states: Tensor, ref_hidden_states: Tensor, mask: Tensor) -> Tensor:
    """Mean squared difference [] of two [B, S, H] where mask [B, S] is set; 0 where it is nowhere."""
    # taking the rows, not multiplying by the mask: padding may hold anything
    difference = _wide(hidden_states[mask]) - _wide(ref_hidden_states[mask])
    return difference.square().sum() / max(difference.numel(), 1)


def sequence_sums(token_values: Tensor, mask: Tensor | None = None) -> Tensor:
    """Sum [B] of token_values [B, S] over the set positions of mask [B, S], over all without one."""
    return (token_values if mask is None else torch.where(mask, token_values, 0)).sum(1)


def target_mask(batch: Batch) -> Tensor:
    """bool [B, S]: the positions that carry a loss; see the module docstring. The last never does."""
    attended = attention_mask(batch)
    mask = torch.zeros_like(attended, dtype=torch.bool)
    mask[:, :-1] = (attended[:, :-1] == 1) & (batch["labels"][:, 1:] != IGNORED)
    return mask


def state_mask(batch: Batch) -> Tensor:
    """bool [B, S]: the positions whose hidden states count, the batch's `state_mask` or those of labelled tokens."""
    given = batch.get("state_mask")
    return (attention_mask(batch) == 1) & (batch["labels"] != IGNORED) if given is None else given


@dataclass(frozen=True)
class Head:
    """The output head as `token_loss` takes it."""

    weight: Tensor
    bias: Tensor | None = None
    logit_scale: float = 1.0
    logit_softcap: float | None = None


def kl(
    hidden_states: Tensor,
    ref_hidden_states: Tensor,
    head: Head,
    weights: Tensor | None = None,
    *,
    ref_lm_head: Tensor | None = None,
) -> Tensor:
    """sum_t w_t KL(p_ref || p)_t / T from hidden states [T, H] and a head; logits are never stored.

    `ref_lm_head` is the head of the reference where it differs. No gradient flows into the reference.
    """
    labels = torch.zeros(len(hidden_states), dtype=torch.int64, device=hidden_states.device)
    values = token_loss(
        hidden_states, head.weight, labels, bias=head.bias, token_weights=weights, kind="kl",
        ref_hidden_states=ref_hidden_states, ref_lm_head=ref_lm_head, logit_scale=head.logit_scale,
        logit_softcap=head.logit_softcap,
    )  # fmt: skip
    return values.sum() / max(len(values), 1)


def head_of(model: nn.Module) -> Head:
    """The head of a causal language model, PEFT-wrapped or not, with its config's scale and soft-cap.

    Raises ValueError for a model without a head, or with one that is more than a weight and a bias.
    What a config does not say is not guessed: `verify_head` finds it out.
    """
    causal = unwrapped(model)
    layer = causal.get_output_embeddings() if hasattr(causal, "get_output_embeddings") else None
    if layer is None:
        raise ValueError(f"{type(causal).__name__} has no output head: a causal language model is needed")
    if hasattr(layer, "base_layer"):
        raise ValueError(
            f"the output head is wrapped in an adapter ({type(layer).__name__}), which its weight alone does "
            f"not show: leave it out of target_modules"
        )
    config = causal.config.get_text_config() if hasattr(causal.config, "get_text_config") else causal.config
    scale = 1.0
    for field, factor in _LOGIT_FACTORS.items():
        value = getattr(config, field, None)
        if value is not None:
            scale *= factor(value)
    softcap = getattr(config, "final_logit_softcapping", None)
    return Head(layer.weight, getattr(layer, "bias", None), scale, float(softcap) if softcap else None)


def decoder_of(model: nn.Module) -> nn.Module:
    """A causal LM without its head."""
    causal = unwrapped(model)
    decoder = causal.get_decoder() if hasattr(causal, "get_decoder") else None
    return getattr(causal, causal.base_model_prefix) if decoder is None or decoder is causal else decoder


def final_hidden_states(model: nn.Module, batch: Batch) -> Tensor:
    """Output [B, S, H] of the decoder's last norm, which is what the head multiplies; the head does not run."""
    with checkpoints_with_graph(model) if torch.is_grad_enabled() else contextlib.nullcontext():
        out = decoder_of(model)(**inputs(batch), use_cache=False)
    return out.last_hidden_state


def token_losses(
    model: nn.Module,
    batch: Batch,
    *,
    kind: str = "nll",
    token_weights: Tensor | None = None,
    hidden_states: Tensor | None = None,
    ref_hidden_states: Tensor | None = None,
    ref_lm_head: Tensor | None = None,
    label_penalty: float = 0.0,
) -> Tensor:
    """Per-token losses [B, S], float32: position t holds that of predicting labels[t + 1], 0 if it counts not.

    `token_weights` [B, S] multiply them; `hidden_states` [B, S, H] spare the forward pass; "kl" needs
    `ref_hidden_states` [B, S, H], "ce" a `label_penalty`. Errors as `token_loss`.
    """
    states = final_hidden_states(model, batch) if hidden_states is None else hidden_states
    head = head_of(model)
    targets = torch.full_like(batch["labels"], IGNORED)
    targets[:, :-1] = batch["labels"][:, 1:]
    targets = torch.where(target_mask(batch), targets, IGNORED)
    losses = token_loss(
        states.flatten(0, 1),
        head.weight,
        targets.flatten(),
        bias=head.bias,
        token_weights=None if token_weights is None else token_weights.flatten(),
        kind=kind,
        ref_hidden_states=None if ref_hidden_states is None else ref_hidden_states.flatten(0, 1),
        ref_lm_head=ref_lm_head,
        logit_scale=head.logit_scale,
        logit_softcap=head.logit_softcap,
        label_penalty=label_penalty,
    )
    return losses.view(targets.shape)


@torch.no_grad()
def verify_head(model: nn.Module, batch: Batch) -> None:
    """Compare the log-probs of `token_losses` with those of the model's own logits, once.

    Raises RuntimeError if they differ by more than the rounding of logits in their dtype explains: the head
    does more than its config says (another norm, another scale). ValueError if no position of the batch counts.
    """
    mask = target_mask(batch)
    if not mask.any():
        raise ValueError("verify_head needs a batch with a position that carries a loss")
    with evaluation_mode(model):
        ours = -token_losses(model, batch)[mask]
        logits = model(**inputs(batch)).logits[mask]
    targets = batch["labels"].roll(-1, 1)[mask]
    theirs = torch.log_softmax(_wide(logits), -1).gather(1, targets[:, None]).squeeze(1)
    # matrix product, scale and soft-cap each round a logit to its dtype; the rest is float32
    size = _wide(logits).abs().amax(1)
    allowed = 4 * torch.finfo(logits.dtype).eps * size + 64 * torch.finfo(torch.float32).eps * (1 + size)
    difference = (ours - theirs).abs()
    # written so that NaN fails
    if not (difference <= allowed).all():
        raise RuntimeError(
            f"{type(unwrapped(model)).__name__}: its logits are not the head applied to the final hidden "
            f"states with the scale and soft-cap of its config; log-probs differ by up to "
            f"{float(difference.max()):.3g}, rounding explains {float(allowed.max()):.3g}"
        )


def unwrapped(model: nn.Module) -> nn.Module:
    """The causal language model inside data-parallel and PEFT wrappers."""
    model = local(model)
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _wide(values: Tensor) -> Tensor:
    return values if values.dtype == torch.float64 else values.float()


def _weighted_mean(values: Tensor, weights: Tensor | None) -> Tensor:
    values = _wide(values)
    return (values if weights is None else values * weights).sum() / max(len(values), 1)
