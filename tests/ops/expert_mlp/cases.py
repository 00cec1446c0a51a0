"""Cases of expert_mlp: layers of every layout, gate and routing, and the comparison with the reference."""

import itertools
from functools import partial

import torch

from moe_unlearn.ops import ExpertLayout, ExpertWeights, Gate, route
from moe_unlearn.ops.expert_mlp import largest_of
from moe_unlearn.ops.gate import ACTIVATIONS
from moe_unlearn.testing import check_against_ref, in_layout, poison, routing
from tests.support.by_keyword import expert_mlp, expert_mlp_ref
from tests.support.impls import REF, Impl

GRADIENTS = ("hidden_states", "top_k_weights", "gate_up_proj", "down_proj")
GPT_OSS = Gate("silu", 1.702, 7.0, 1.0)
GATES = [*map(Gate, ACTIVATIONS), GPT_OSS, Gate("silu", 1.0, 0.5), Gate("gelu", limit=0.3)]
GATES += [Gate("gelu_tanh", 1.702, 0.7, 1.0)]
LAYOUT_FLAGS = list(itertools.product([False, True], repeat=3))  # transposed, interleaved, gated
ALL = (True, True, True, True, True)  # gradients that are needed


def takes(case: dict) -> bool:
    """Return whether the implementation has a kernel for what the case says of dtypes, layout and gate."""
    if case.get("impl") != "cuda":
        return True
    gated = case.get("gated", True) and case.get("flags", (False, False, True))[2]
    narrow = case.get("dtype", torch.bfloat16) == torch.bfloat16 and case.get("weights") != torch.float64
    return gated and narrow and case.get("gate", Gate()).activation == "silu"


def case(
    pattern="skewed",
    tokens=19,
    hidden=24,
    inner=16,
    experts=5,
    top_k=2,
    *,
    dtype=torch.float32,
    bias=False,
    seed=0,
    **layout,
):
    """Arguments of the op for one routing pattern and the fields of a `ExpertLayout`."""
    layout = ExpertLayout(**layout)
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator).to(dtype)

    index = routing(pattern, tokens, experts, top_k, seed=seed)
    made = route(index, experts, impl="ref")  # an emulation may have one op alone
    wide = 2 * inner if layout.gated else inner
    w1 = normal(experts, hidden, wide) if layout.transposed else normal(experts, wide, hidden)
    w2 = normal(experts, inner, hidden) if layout.transposed else normal(experts, hidden, inner)
    arguments = {
        "hidden_states": normal(tokens, hidden),
        "top_k_weights": torch.rand((tokens, top_k), generator=generator).to(dtype) + 0.1,
        "sorted_rows": made.sorted_rows,
        "expert_offsets": made.expert_offsets,
        "gate_up_proj": w1 / hidden**0.5,
        "down_proj": w2 / inner**0.5,
        **layout._asdict(),
    }
    if bias:
        arguments |= {"gate_up_bias": normal(experts, wide), "down_bias": normal(experts, hidden)}
    return arguments


def names_of(arguments: dict, impl: Impl = REF) -> tuple[str, ...]:
    """Return the arguments that have a gradient; those of biases are expert_wgrad's, which CUDA does not have."""
    return GRADIENTS + (("gate_up_bias", "down_bias") if "down_bias" in arguments and impl.kind != "cuda" else ())


def check(impl: Impl, arguments: dict, **keywords) -> None:
    """Assert by the criterion that output and gradients are as accurate as the reference's, in memory full of NaN."""
    gradients = {"gradients": names_of(arguments, impl)} | keywords
    with poison():
        check_against_ref(partial(expert_mlp, impl=impl.name), expert_mlp_ref, on(impl.device, arguments), **gradients)


def results(impl: Impl, arguments: dict, exact=False) -> tuple[torch.Tensor, ...]:
    """Return on the CPU the output and all gradients, those under integers if `exact`."""
    arguments = on(impl.device, arguments)
    leaves = {k: arguments[k].detach().requires_grad_() for k in names_of(arguments, impl)}
    out = expert_mlp(**arguments | leaves, impl=impl.name)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(0)).to(out)
    upstream = upstream.clamp(-1, 1).round() if exact else upstream
    made = out.detach(), *torch.autograd.grad(out, list(leaves.values()), upstream)
    return tuple(t.cpu() for t in made)


def flat(arguments, impl="auto"):
    """Positional arguments of the custom op."""
    routed = (arguments[name] for name in ("hidden_states", "top_k_weights", "sorted_rows", "expert_offsets"))
    weights = ExpertWeights(**{name: arguments[name] for name in ExpertWeights._fields if name in arguments})
    layout = ExpertLayout(**{name: arguments[name] for name in ExpertLayout._fields})
    return *routed, *weights, arguments.get("trained_experts"), *layout.flat(), impl


# ---- The passes of the op alone ----------------------------------------------------------------------------


def on(device, arguments):
    return {k: v.to(device) if torch.is_tensor(v) else v for k, v in arguments.items()}


def forward(impl, **arguments):
    """(output, z)"""
    return torch.ops.moe_unlearn.expert_mlp(*flat(arguments, impl))


def backward(impl, *, grad_out, z, needs=ALL, **arguments):
    """(d_x, d_weights, dz, scaled, largest)"""
    x, weights, rows, offsets, w1, w2, _, b2, _, *options, _ = flat(arguments)
    return torch.ops.moe_unlearn.expert_mlp_backward(
        grad_out, x, weights, rows, offsets, w1, w2, b2, z, *options, list(needs), impl
    )


def gradients(impl, **arguments):
    """(d_x, d_weights, dz, scaled); the largest values of a kernel are those of what it stored."""
    *made, largest = backward(impl, **arguments)
    if impl != "ref":
        assert torch.equal(largest, largest_of(*made[2:]))
    return tuple(made)


def backward_case(device, arguments, layout="contiguous"):
    """`arguments` with a random upstream gradient and the z of the reference."""
    arguments = on(device, arguments)
    x = arguments["hidden_states"]
    grad_out = torch.randn(x.shape, generator=torch.Generator().manual_seed(7)).to(x)
    return arguments | {"grad_out": in_layout(grad_out, layout), "z": forward("ref", **arguments)[1]}
