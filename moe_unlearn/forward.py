"""What the objectives need of a forward pass beside token losses: sequences, refusals, layer outputs."""

import torch
from torch import Tensor, nn

from moe_unlearn import losses
from moe_unlearn.experts import experts_modules

Batch = dict[str, Tensor]


def sequence_logprobs(model: nn.Module, batch: Batch) -> Tensor:
    """Sum of the token log-probabilities of each row, [B]."""
    return -losses.token_losses(model, batch, kind="nll").sum(1)


def refusal(batch: Batch) -> Batch:
    """The refusal rows of a preference batch, as a batch of their own."""
    missing = [k for k in ("idk_input_ids", "idk_attention_mask", "idk_labels") if k not in batch]
    if missing:
        raise ValueError(f"forget.objective 'idk_dpo' needs the batch keys {', '.join(missing)}")
    rows = {k: batch[f"idk_{k}"] for k in ("input_ids", "attention_mask", "labels")}
    return rows | ({"index": batch["index"]} if "index" in batch else {})


def layer_states(model: nn.Module, batch: Batch, layer: int) -> Tensor:
    """Output [B, S, H] of decoder layer `layer`."""
    layers = decoder_layers(model)
    if not 0 <= layer < len(layers):
        raise ValueError(f"forget.layer must be in [0, {len(layers)}) for this model; got {layer}")
    captured = []
    handle = layers[layer].register_forward_hook(
        lambda module, args, output: captured.append(output[0] if isinstance(output, tuple) else output)
    )
    try:
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
