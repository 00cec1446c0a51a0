"""What the objectives need of a forward pass beside token losses: sequences, refusals, layer outputs."""

import contextlib
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from moe_unlearn import losses
from moe_unlearn.batches import ROW, Batch, checked, take
from moe_unlearn.config import Recipe
from moe_unlearn.experts import experts_modules


def sequence_logprobs(model: nn.Module, batch: Batch, hidden_states: Tensor | None = None) -> Tensor:
    """Sum of the token log-probabilities of each row, [B]; `hidden_states` [B, S, H] spare the forward pass."""
    return -losses.token_losses(model, batch, kind="nll", hidden_states=hidden_states).sum(1)


def refusal(batch: Batch) -> Batch:
    """The refusal rows of a preference batch, as a batch of their own."""
    missing = [k for k in ("idk_input_ids", "idk_attention_mask", "idk_labels") if k not in batch]
    if missing:
        raise ValueError(
            f"a forget.objective with refusals (idk_dpo, idk_nll) needs the batch keys {', '.join(missing)}"
        )
    rows = {k: batch[f"idk_{k}"] for k in ROW if f"idk_{k}" in batch}
    return rows | ({"index": batch["index"]} if "index" in batch else {})


def forgotten(recipe: Recipe, batch: Batch) -> Batch:
    """The rows that carry the forget loss: of `idk_nll` the refusals, of `ceu` without the first labels of each row."""
    if recipe.forget.objective == "ceu":
        labels = batch["labels"]
        labelled = labels != losses.IGNORED
        first = labelled & (labelled.cumsum(1) <= recipe.forget.ignore_first_n_answer_tokens)
        return {**batch, "labels": labels.masked_fill(first, losses.IGNORED)}
    return refusal(batch) if recipe.forget.objective == "idk_nll" else batch


def check_batches(batches: Iterable[Batch], side: str) -> list[Batch]:
    """Each of them `checked`; raises ValueError also if none of them carries a loss."""
    rows = [checked(batch, side) for batch in batches]
    if not any(losses.target_mask(batch).any() for batch in rows):
        raise ValueError(f"the {side} set carries no loss: it is empty or all labels are -100")
    return rows


def counted_row(batches: list[Batch]) -> Batch:
    """The first row [1, S] that carries a loss, of the first batch that has one; ValueError if none does."""
    for batch in batches:
        counted = losses.target_mask(batch).any(1).nonzero().flatten()
        if len(counted):
            return take(batch, counted[:1])
    raise ValueError("expected a row that carries a loss; got only labels of -100 or unattended positions")


class _Reached(Exception):  # noqa: N818 -- not an error: it ends a forward pass early
    """The layer whose output was wanted has run."""


def layer_states(model: nn.Module, batch: Batch, layer: int) -> Tensor:
    """Output [B, S, H] of decoder layer `layer`; the layers behind it do not run."""
    layers = decoder_layers(model)
    if not 0 <= layer < len(layers):
        raise ValueError(f"forget.layer must be in [0, {len(layers)}) for this model; got {layer}")
    captured = []

    def stop(module, args, output):
        captured.append(output[0] if isinstance(output, tuple) else output)
        raise _Reached

    handle = layers[layer].register_forward_hook(stop)
    try:
        with contextlib.suppress(_Reached):
            losses.final_hidden_states(model, batch)
    finally:
        handle.remove()
    return captured[0]


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The list of decoder layers: the ModuleList that holds the first experts module."""
    name = next(iter(experts_modules(model)))
    while name:
        name = name.rpartition(".")[0]
        module = model.get_submodule(name)
        if isinstance(module, nn.ModuleList):
            return module
    raise ValueError("the experts modules of this model do not stand in a list of decoder layers")


def control_vector(seed: int, steering: float, hidden_size: int) -> Tensor:
    """RMU's steering target c * u, u uniform in [0, 1)^H and normalised; float32 [H]."""
    u = torch.rand(hidden_size, generator=torch.Generator().manual_seed(seed))
    return steering * u / u.norm()
