"""Forget and retain objectives, and the way from a model to per-token losses.

Sequence log-probabilities are sums over the positions that carry a loss; S is the sequence-summed NLL, so
S = -seq_logprobs. Exact forms as in open-unlearning (field-standard names); TRACE's weighted mean and the
position rule are our specification:

    a position t counts iff attention_mask[t] = 1 and labels[t + 1] != -100; it predicts labels[t + 1]
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from moe_unlearn.ops.token_loss import token_loss

Batch = dict[str, Tensor]


def nll(token_logprobs: Tensor, weights: Tensor | None = None) -> Tensor:
    """sum_t w_t (-log p_t) / T over token_logprobs [T]; gradient ascent is its negative."""
    return _weighted_mean(-token_logprobs, weights)


def uce(token_logprobs: Tensor, weights: Tensor | None = None) -> Tensor:
    """sum_t w_t (-log(1 - p_t / 2)) / T: bounded by log 2, flat at p = 0 and at p = 1 (MOLLM's forget loss;
    read in the authors' FedOSD code)."""
    return _weighted_mean(-torch.log1p(-0.5 * token_logprobs.exp()), weights)


def npo(seq_logprobs: Tensor, ref_seq_logprobs: Tensor, beta: float) -> Tensor:
    """-(2 / beta) mean log sigmoid(-beta (seq_logprobs - ref_seq_logprobs)), sequences [B]."""
    return -2 / beta * _log_sigmoid(beta * (ref_seq_logprobs - seq_logprobs)).mean()


def simnpo(seq_logprobs: Tensor, lengths: Tensor, beta: float, delta: float = 0.0) -> Tensor:
    """-(2 / beta) mean log sigmoid(beta (-seq_logprobs / lengths - delta)); NPO without a reference."""
    per_token = -seq_logprobs / lengths.clamp_min(1)
    return -2 / beta * _log_sigmoid(beta * (per_token - delta)).mean()


def idk_dpo(
    idk_seq_logprobs: Tensor,
    ref_idk_seq_logprobs: Tensor,
    seq_logprobs: Tensor,
    ref_seq_logprobs: Tensor,
    beta: float,
) -> Tensor:
    """-(2 / beta) mean log sigmoid(beta ((idk - ref_idk) - (forget - ref_forget))) of log-probs [B]."""
    margin = (idk_seq_logprobs - ref_idk_seq_logprobs) - (seq_logprobs - ref_seq_logprobs)
    return -2 / beta * _log_sigmoid(beta * margin).mean()


def kl(ref_logprobs: Tensor, logprobs: Tensor, weights: Tensor | None = None) -> Tensor:
    """sum_t w_t KL(p_ref || p)_t / T of two full log-distributions [T, V].

    For a model's head use `token_losses(kind="kl")`, which never holds [T, V].
    """
    return _weighted_mean((ref_logprobs.exp() * (ref_logprobs - logprobs)).sum(-1), weights)


def rmu(hidden_states: Tensor, control: Tensor, mask: Tensor) -> Tensor:
    """Mean over masked tokens and dimensions of (h - control)^2; h [B, S, H], control [H], mask [B, S]."""
    return embed_diff(hidden_states, control.expand_as(hidden_states), mask)


def embed_diff(hidden_states: Tensor, ref_hidden_states: Tensor, mask: Tensor) -> Tensor:
    """Mean over masked tokens and dimensions of (h - h_ref)^2, [B, S, H] and mask [B, S]."""
    difference = torch.where(mask[..., None], hidden_states - ref_hidden_states, 0)
    return difference.float().square().sum() / (mask.sum().clamp_min(1) * hidden_states.shape[-1])


def target_mask(batch: Batch) -> Tensor:
    """bool [B, S]: the positions that carry a loss; see the module docstring."""
    mask = torch.zeros_like(batch["attention_mask"], dtype=torch.bool)
    mask[:, :-1] = (batch["attention_mask"][:, :-1] == 1) & (batch["labels"][:, 1:] != -100)
    return mask


@dataclass(frozen=True)
class Head:
    """The output head as `token_loss` takes it."""

    weight: Tensor
    bias: Tensor | None
    logit_scale: float
    logit_softcap: float | None


def head_of(model: nn.Module) -> Head:
    """The head of a causal LM; scaling and soft-capping are read from its config, `verify_head` checks them."""
    head = model.get_output_embeddings()
    if head is None:
        raise ValueError(f"{type(model).__name__} has no output embeddings: a causal language model is needed")
    config = model.config.get_text_config() if hasattr(model.config, "get_text_config") else model.config
    scale = 1.0
    if getattr(config, "logits_scaling", None):
        scale = 1.0 / config.logits_scaling
    elif getattr(config, "logit_scale", None):
        scale = float(config.logit_scale)
    return Head(head.weight, getattr(head, "bias", None), scale, getattr(config, "final_logit_softcapping", None))


def final_hidden_states(model: nn.Module, batch: Batch) -> Tensor:
    """Output [B, S, H] of the decoder's last norm, what the head multiplies; the head does not run."""
    causal = model.get_base_model() if hasattr(model, "get_base_model") else model
    decoder = getattr(causal, causal.base_model_prefix)
    out = decoder(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)
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
) -> Tensor:
    """Per-token losses [B, S], float32: position t holds the loss of predicting labels[t + 1], 0 elsewhere.

    `token_weights` [B, S] multiply them; `hidden_states` [B, S, H] spares the forward pass.
    """
    states = final_hidden_states(model, batch) if hidden_states is None else hidden_states
    head = head_of(model)
    labels = torch.full_like(batch["labels"], -100)
    labels[:, :-1] = batch["labels"][:, 1:]
    labels = torch.where(target_mask(batch), labels, -100)
    flat = token_loss(
        states.flatten(0, 1),
        head.weight,
        labels.flatten(),
        bias=head.bias,
        token_weights=None if token_weights is None else token_weights.flatten(),
        kind=kind,
        ref_hidden_states=None if ref_hidden_states is None else ref_hidden_states.flatten(0, 1),
        ref_lm_head=ref_lm_head,
        logit_scale=head.logit_scale,
        logit_softcap=head.logit_softcap,
    )
    return flat.view(labels.shape)


@torch.no_grad()
def verify_head(model: nn.Module, batch: Batch) -> None:
    """Compare `token_losses` with the model's own logits once; RuntimeError if they are not reproduced.

    A head that does more than config fields say (an extra norm, another scale) must not be guessed at.
    """
    mask = target_mask(batch)
    ours = -token_losses(model, batch)[mask]
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    logp = torch.log_softmax(logits.float(), -1)[:, :-1]
    labels = batch["labels"][:, 1:].clamp_min(0)
    theirs = logp.gather(2, labels[..., None])[..., 0][mask[:, :-1]]
    # the two differ by the rounding of the logits, which grows with their size
    allowed = 8 * torch.finfo(logits.dtype).eps * (1 + logits.abs().max().float())
    if len(ours) and float((ours - theirs).abs().max()) > float(allowed):
        raise RuntimeError(
            f"{type(model).__name__}: logits are not head(final hidden states) with the scale and soft-cap of "
            f"its config; log-probs differ by {float((ours - theirs).abs().max()):.3g}"
        )


def _weighted_mean(values: Tensor, weights: Tensor | None) -> Tensor:
    return (values if weights is None else values * weights).sum() / max(len(values), 1)


def _log_sigmoid(values: Tensor) -> Tensor:
    return torch.nn.functional.logsigmoid(values.float() if values.dtype != torch.float64 else values)
