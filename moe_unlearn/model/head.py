"""Finds the output head of a causal language model and computes per-token losses from hidden states with it."""

import contextlib
from collections.abc import Callable
from typing import Any, TypedDict

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from moe_unlearn.model.batches import Batch, inputs, target_mask
from moe_unlearn.model.modes import checkpoints_with_graph, evaluation_mode
from moe_unlearn.model.packing import Call, call_of
from moe_unlearn.ops.token_loss import IGNORED, Head, Reference, token_loss
from moe_unlearn.ranks import local
from moe_unlearn.sharding import as_forward, is_sharded, reshard

# config field -> its factor on the logits; fields of a config are read, never names of models
_LOGIT_FACTORS = {
    "logits_scaling": lambda value: 1.0 / value,
    "logit_scale": float,
    "lm_head_multiplier": float,
}


# widened heads have a multiple of this many columns, so that every row begins where GPU kernels can load it in blocks
_COLUMNS = 16


class ReferenceHead(TypedDict):
    """Holds a reference's head where it is not the model's own, as `token_losses` takes it."""

    ref_lm_head: Tensor | None
    ref_bias: Tensor | None


def head_of(model: nn.Module) -> Head:
    """Return the head of a causal language model, PEFT-wrapped or not, with its config's scale and soft-cap.

    Raises ValueError for a model without a head, or with one that is more than a weight and a bias.
    Nothing is guessed beyond the config; `verify_head` finds out whether the config says everything.
    """
    causal = unwrapped(model)
    layer = getattr(causal, "get_output_embeddings", lambda: None)()
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


def with_head(model: nn.Module, compute: Callable[[Head], Tensor]) -> Tensor:
    """Return compute(head_of(model)), in a pass of the head where FSDP2 has it by itself; errors as `head_of`."""
    if not is_sharded(head_of(model).weight):
        return compute(head_of(model))
    # its own forward pass does not run, so that nothing else would put the whole weight in place
    return as_forward(unwrapped(model).get_output_embeddings(), lambda: compute(head_of(model)))()


def decoder_of(model: nn.Module) -> nn.Module:
    """Return a causal LM without its head."""
    causal = unwrapped(model)
    decoder = causal.get_decoder() if hasattr(causal, "get_decoder") else None
    whole: nn.Module = getattr(causal, causal.base_model_prefix) if decoder is None or decoder is causal else decoder
    return whole


def final_hidden_states(model: nn.Module, batch: Batch, call: Call | None = None) -> Tensor:
    """Compute the output [B, S, H] of the decoder's last norm, the input of the head; the head does not run.

    `call` is the batch's (`call_of`) where the caller has it already.
    """
    call, decoder = call or call_of(batch), decoder_of(model)
    with call.shown(decoder), checkpoints_with_graph(model) if torch.is_grad_enabled() else contextlib.nullcontext():
        out = as_forward(model, decoder)(**call.arguments(batch), use_cache=False)
    return call.rows(out.last_hidden_state.flatten(0, 1))


def token_losses(
    model: nn.Module,
    batch: Batch,
    *,
    kind: str = "nll",
    token_weights: Tensor | None = None,
    hidden_states: Tensor | None = None,
    ref_hidden_states: Tensor | None = None,
    ref_lm_head: Tensor | None = None,
    ref_bias: Tensor | None = None,
    label_penalty: float = 0.0,
) -> Tensor:
    """Compute per-token losses [B, S], float32: position t has that of predicting labels[t + 1], 0 if not counted.

    `token_weights` [B, S] multiply the losses; given `hidden_states` [B, S, H], no forward pass runs; "kl" needs
    `ref_hidden_states` [B, S, H], "ce" a `label_penalty`. `ref_lm_head` and `ref_bias` are the reference's where they
    are not the model's own. Errors as `token_loss`.
    """
    own = ref_hidden_states, ref_lm_head, ref_bias
    compute = as_forward(model, _token_losses)
    return compute(model, batch, kind, token_weights, hidden_states, own, label_penalty)


def _token_losses(
    model: nn.Module,
    batch: Batch,
    kind: str,
    token_weights: Tensor | None,
    hidden_states: Tensor | None,
    of_reference: tuple[Tensor | None, Tensor | None, Tensor | None],
    label_penalty: float,
) -> Tensor:
    states = final_hidden_states(model, batch) if hidden_states is None else hidden_states
    ref_hidden_states, ref_lm_head, ref_bias = of_reference
    targets = torch.full_like(batch["labels"], IGNORED)
    targets[:, :-1] = batch["labels"][:, 1:]
    targets = torch.where(target_mask(batch), targets, IGNORED)
    ref_states = None if ref_hidden_states is None else ref_hidden_states.flatten(0, 1)
    weights = None if token_weights is None else token_weights.flatten()

    def compute(head: Head) -> Tensor:
        rows, widened, reference = operands(states.flatten(0, 1), head, ref_states, ref_lm_head, ref_bias)
        return token_loss(
            rows,
            widened,
            targets.flatten(),
            token_weights=weights,
            kind=kind,
            reference=reference,
            label_penalty=label_penalty,
        )

    return with_head(model, compute).view(targets.shape)


def operands(
    hidden_states: Tensor,
    head: Head,
    ref_hidden_states: Tensor | None,
    ref_lm_head: Tensor | None = None,
    ref_bias: Tensor | None = None,
) -> tuple[Tensor, Head, Reference | None]:
    """Return the hidden states, head and reference with which `token_loss` gives both logits, from [T, H] each.

    `token_loss` has one bias for both. A reference's own bias b therefore becomes a column of the head, as the model's
    does: W h + b = [W | b | 0] [h; 1; 0]. Gradients of W and b pass through it. That costs a copy of both heads for
    the time of the loss, and only for a `ref_bias`. The identity is exact; zeros fill a multiple of 16 columns.
    """
    if ref_bias is not None:
        # a reference is the same model, so that it has a bias of its own only where the model has one
        assert ref_hidden_states is not None and head.bias is not None
        one = hidden_states.new_ones(len(hidden_states), 1)
        hidden_states, ref_hidden_states = _widened(hidden_states, one), _widened(ref_hidden_states, one)
        ref_lm_head = _widened(head.weight.detach() if ref_lm_head is None else ref_lm_head, ref_bias[:, None])
        head = head._replace(weight=_widened(head.weight, head.bias[:, None]), bias=None)
    known = ref_hidden_states is not None or ref_lm_head is not None
    return hidden_states, head, Reference(ref_hidden_states, ref_lm_head) if known else None


def _widened(rows: Tensor, column: Tensor) -> Tensor:
    """Append a column to `rows`, then zeros up to a multiple of `_COLUMNS` columns."""
    filling = rows.new_zeros(len(rows), -(rows.shape[1] + 1) % _COLUMNS)
    return torch.cat([rows, column, filling], 1)


@torch.no_grad()
def verify_head(model: nn.Module, batch: Batch) -> None:
    """Compare the log-probs of `token_losses` with those of the model's own logits, once.

    Raises ValueError if they differ by more than the rounding of logits in their dtype explains: then the head
    does more than its config says (another norm, another scale). It is raised too if no position of the batch counts.
    """
    mask = target_mask(batch)
    if not mask.any():
        raise ValueError("verify_head needs a batch with a position that carries a loss")
    with evaluation_mode(model):
        ours = -token_losses(model, batch)[mask]
        logits = model(**inputs(batch)).logits[mask]
        reshard(model)
    targets = batch["labels"].roll(-1, 1)[mask]
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    theirs = torch.log_softmax(wide, -1).gather(1, targets[:, None]).squeeze(1)
    # matrix product, scale and soft-cap each round a logit to its dtype; all else is computed in float32
    size = wide.abs().amax(1)
    allowed = 4 * torch.finfo(logits.dtype).eps * size + 64 * torch.finfo(torch.float32).eps * (1 + size)
    difference = (ours - theirs).abs()
    # written so that NaN fails
    if not (difference <= allowed).all():
        raise ValueError(
            f"{type(unwrapped(model)).__name__}: its logits are not the head applied to the final hidden "
            f"states with the scale and soft-cap of its config; log-probs differ by up to "
            f"{float(difference.max()):.3g}, rounding explains {float(allowed.max()):.3g}"
        )


def unwrapped(model: nn.Module) -> PreTrainedModel:
    """Return the causal language model inside data-parallel and PEFT wrappers."""
    model = local(model)
    wrapper: Any = model
    causal: PreTrainedModel = wrapper.get_base_model() if hasattr(wrapper, "get_base_model") else wrapper
    return causal
