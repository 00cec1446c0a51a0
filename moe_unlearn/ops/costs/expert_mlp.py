"""Costs of `expert_mlp`: two products forward and as many for each kind of gradient."""

from collections.abc import Sequence

from torch import Tensor

from moe_unlearn.ops.costs.cost import Cost


def flops(rows: int, weights: int) -> int:
    """Count the operations of `rows` routed rows with the weights of an expert; dgrad and wgrad take as many each."""
    return 2 * rows * weights


def forward_bytes(tokens: int, rows: int, hidden: int, inner: int, experts: int, element: int = 2) -> int:
    """Return the least bytes that a fused forward of a gated layer moves.

    They are the weights once, x, z, the activation, the rows of the output, and the sum over K.
    """
    weights = 3 * experts * hidden * inner
    return element * (weights + 2 * tokens * hidden + 4 * rows * inner + 2 * rows * hidden)


def backward_bytes(tokens: int, rows: int, hidden: int, inner: int, experts: int, element: int = 2) -> int:
    """Return the least bytes that dgrad and wgrad of all experts of a gated layer move.

    Every weight is read once and every gradient written once.
    """
    dgrad = 6 * rows * inner + 2 * rows * hidden + 2 * tokens * hidden
    wgrad = 2 * tokens * hidden + 3 * rows * inner
    return element * (6 * experts * hidden * inner + dgrad + wgrad)


def _forward_flops(*, top_k_weights: Tensor, gate_up_proj: Tensor, down_proj: Tensor, **_: object) -> int:
    return flops(top_k_weights.numel(), (gate_up_proj.numel() + down_proj.numel()) // len(down_proj))


def _backward_flops(
    *, top_k_weights: Tensor, gate_up_proj: Tensor, down_proj: Tensor, needs: Sequence[bool], **_: object
) -> int:
    weights = gate_up_proj.numel() * needs[0] + down_proj.numel() * any(needs[:3])
    return flops(top_k_weights.numel(), weights // len(down_proj))


def _forward_space(
    *, impl: str, hidden_states: Tensor, top_k_weights: Tensor, gate_up_proj: Tensor, down_proj: Tensor, **_: object
) -> int:
    """Return the workspace of the forward in bytes.

    Every implementation holds the rows of the output [N, H] before they are added up; triton also activations [N, I].
    """
    rows, hidden = top_k_weights.numel(), hidden_states.shape[1]
    inner = down_proj.numel() // len(down_proj) // hidden
    wide = gate_up_proj.numel() // len(gate_up_proj) // hidden
    return rows * hidden_states.itemsize * {"cpu": hidden, "triton": hidden + inner}.get(impl, 4 * hidden + wide)


def _backward_space(*, impl: str, hidden_states: Tensor, z: Tensor, needs: Sequence[bool], **_: object) -> int:
    """Return the workspace of the backward in bytes: rows of d hidden_states [N, H], where it is needed."""
    hidden = hidden_states.shape[1]
    if impl in ("cpu", "triton"):
        return needs[0] * len(z) * hidden * hidden_states.itemsize
    return 4 * len(z) * (hidden + 4 * z.shape[1])


COSTS = {
    "expert_mlp": Cost(_forward_flops, _forward_space, "expert_mlp"),
    "expert_mlp_backward": Cost(_backward_flops, _backward_space, "expert_mlp.backward"),
}
