"""A layer whose every result is known to the bit: small integers, a linear gate, weights that are powers of two.

`silu` with alpha 0 is x / 2, so that products are exact in float32 and only what is stored in bfloat16 is rounded.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from moe_unlearn.ops import Gate
from moe_unlearn.testing import integers, poison
from tests.ops.expert_mlp import cases
from tests.support.impls import Impl

HALF = Gate("silu", 0.0)


class Results(NamedTuple):
    """Holds what the op's passes return, all in bfloat16 but d_weights."""

    out: Tensor
    z: Tensor
    d_x: Tensor
    d_weights: Tensor
    dz: Tensor
    scaled: Tensor


def layer(pattern: str, tokens: int, hidden: int, inner: int, **options) -> dict:
    """Return the arguments of a layer of -1, 0 and 1 in bfloat16, with `grad_out`; options as of `cases.case`."""
    made = cases.case(pattern, tokens, hidden, inner, dtype=torch.bfloat16, gate=HALF, **options)
    for seed, name in enumerate(cases.names_of(made)):
        made[name] = integers(*made[name].shape, seed=seed, low=-1, high=1, dtype=torch.bfloat16)
    made["top_k_weights"] = 2.0 ** integers(*made["top_k_weights"].shape, seed=9, low=-1, high=1)
    return made | {"grad_out": integers(tokens, hidden, seed=10, low=-1, high=1, dtype=torch.bfloat16)}


def computed(impl: Impl, arguments: dict) -> Results:
    """Return on the CPU what an implementation computes; the factors' largest values are those of what is stored."""
    arguments = impl.moved(arguments)
    grad_out = arguments.pop("grad_out")
    out, z = cases.forward(impl.name, **arguments)
    d_x, d_weights, dz, scaled = cases.gradients(impl.name, grad_out=grad_out, z=z, **arguments)
    return Results(*(made.cpu() for made in (out, z, d_x, d_weights, dz, scaled)))


def gold(arguments: dict) -> Results:
    """Return the results by float64, rounded where bfloat16 is stored; rows that no expert has are zero."""
    narrow = {k: v.double() if torch.is_tensor(v) and v.is_floating_point() else v for k, v in arguments.items()}
    x, w1, w2, grad = (narrow[k] for k in ("hidden_states", "gate_up_proj", "down_proj", "grad_out"))
    if arguments["transposed"]:
        w1, w2 = w1.mT, w2.mT
    tokens, top_k = narrow["top_k_weights"].shape
    bounds, slots = arguments["expert_offsets"].tolist(), arguments["sorted_rows"].long()
    token, weight = slots // top_k, narrow["top_k_weights"].flatten()[slots, None]

    def product(rows, weights, bias=None):
        parts = [rows[a:b] @ w.mT for a, b, w in zip(bounds, bounds[1:], weights, strict=False)]
        parts = parts if bias is None else [part + own for part, own in zip(parts, bias, strict=True)]
        return torch.cat([*parts, rows.new_zeros(len(rows) - bounds[-1], weights.shape[1])])

    def rounded(values):
        return values.to(torch.bfloat16).double()

    def by_token(rows):
        return rounded(torch.zeros_like(rows).index_copy(0, slots, rounded(rows)).view(tokens, top_k, -1).sum(1))

    z = rounded(product(x[token], w1, narrow.get("gate_up_bias")))
    gate, up = (z[:, ::2], z[:, 1::2]) if arguments["interleaved"] else z.chunk(2, 1)
    a = gate * up / 2
    out = by_token(weight * product(rounded(a), w2, narrow.get("down_bias")))
    da = product(grad[token], w2.mT)
    d_rows = (da * a).sum(1)
    if "down_bias" in narrow:
        of_rows = torch.ones(len(slots), 1, dtype=torch.float64)
        d_rows += (product(of_rows, narrow["down_bias"][..., None]) * grad[token]).sum(1)
    d_weights = torch.zeros_like(d_rows).index_copy(0, slots, d_rows).view(tokens, top_k)
    d_gate, d_up = weight * da * up / 2, weight * da * gate / 2
    dz = torch.stack([d_gate, d_up], 2).flatten(1) if arguments["interleaved"] else torch.cat([d_gate, d_up], 1)
    dz = rounded(dz)
    return Results(out, z, by_token(product(dz, w1.mT)), d_weights, dz, rounded(weight * a))


def check(impl: Impl, arguments: dict) -> None:
    """Assert that an implementation has exactly these results, in memory full of NaN."""
    with poison():
        made = computed(impl, arguments)
    for name, ours, theirs in zip(Results._fields, made, gold(arguments), strict=True):
        assert torch.equal(ours.double(), theirs), name
