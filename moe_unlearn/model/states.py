"""Computes what objectives need besides token losses: sequence log-probs, layer outputs and RMU's control vector."""

import contextlib

import torch
from torch import Tensor, nn

from moe_unlearn.experts import experts_modules
from moe_unlearn.model.batches import Batch
from moe_unlearn.model.head import final_hidden_states, token_losses
from moe_unlearn.model.packing import Call, call_of


def sequence_logprobs(model: nn.Module, batch: Batch, hidden_states: Tensor | None = None) -> Tensor:
    """Add up the token log-probabilities of each row, [B]; given `hidden_states` [B, S, H], no forward pass runs."""
    return -token_losses(model, batch, kind="nll", hidden_states=hidden_states).sum(1)


class _Reached(Exception):  # noqa: N818 -- not an error: it ends a forward pass early
    """Ends a forward pass once the layer whose output is wanted has run."""


def layer_states(model: nn.Module, batch: Batch, layer: int, call: Call | None = None) -> Tensor:
    """Compute the output [B, S, H] of decoder layer `layer`; the layers behind it do not run.

    `call` is as of `final_hidden_states`.
    """
    layers = decoder_layers(model)
    if not 0 <= layer < len(layers):
        raise ValueError(
            f"forget.layer must be in [0, {len(layers)}) for this model; got {layer}: --set forget.layer="
            f"{len(layers) - 1} steers the last layer, and scope.parameters names what trains at or below it"
        )
    captured: list[Tensor] = []
    call = call or call_of(batch)

    def stop(module: nn.Module, args: tuple, output: Tensor | tuple[Tensor, ...]) -> None:
        captured.append(output[0] if isinstance(output, tuple) else output)
        raise _Reached

    handle = layers[layer].register_forward_hook(stop)
    try:
        with contextlib.suppress(_Reached):
            final_hidden_states(model, batch, call)
    finally:
        handle.remove()
    return call.rows(captured[0].flatten(0, 1))


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """Return the list of decoder layers: the ModuleList that holds the first experts module."""
    name = next(iter(experts_modules(model)))
    while name:
        name = name.rpartition(".")[0]
        module = model.get_submodule(name)
        if isinstance(module, nn.ModuleList):
            return module
    raise ValueError("the experts modules of this model do not stand in a list of decoder layers")


def control_vector(seed: int, steering: float, hidden_size: int) -> Tensor:
    """Draw RMU's steering target c * u, u uniform in [0, 1)^H and normalised; float32 [H]."""
    u = torch.rand(hidden_size, generator=torch.Generator().manual_seed(seed))
    vector: Tensor = steering * u / u.norm()
    return vector
