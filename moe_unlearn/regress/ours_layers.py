"""Define our cases of the ops that are differentiable or make gradients: expert_mlp, expert_wgrad, token_loss."""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from moe_unlearn import ops
from moe_unlearn.ops.bits import pack_bits
from moe_unlearn.ops.expert_wgrad import Factors, expert_wgrad_adamw_, expert_wgrad_inner
from moe_unlearn.regress.case import Case
from moe_unlearn.regress.flat import by_keyword
from moe_unlearn.testing import integers, routing

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
PATTERNS = ("uniform", "skewed", "one_expert", "half_empty")


def normal_of(seed: int) -> Callable[..., Tensor]:
    """Return a function of a shape that gives normal numbers, one after the other from one seed."""
    generator = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(shape, generator=generator)


def packed_mask(seed: int, *shape: int) -> Tensor:
    """Return a packed mask that keeps about half."""
    return pack_bits(torch.rand(shape, generator=torch.Generator().manual_seed(seed + 1)) < 0.5)


def expert_index(pattern: str, tokens: int, experts: int, top_k: int, seed: int) -> Tensor:
    """Return `testing.routing`'s indices, with at most as many experts per token as there are."""
    return routing(pattern, tokens, experts, min(top_k, experts), seed=seed)


# ---------------------------------------------------------------------------------------------------- expert_mlp


def expert_mlp(impl: str) -> Iterator[Case]:
    sizes = {"tokens": 64, "hidden": 24, "inner": 16, "experts": 5, "top_k": 2}
    gradients = ("hidden_states", "top_k_weights", "gate_up_proj", "down_proj")
    gpt_oss = ops.Gate("silu", 1.702, 7.0, 1.0)
    for dtype in DTYPES:
        for pattern in PATTERNS:
            yield Case(
                f"expert_mlp/{dtype}/{pattern}",
                function=functools.partial(by_keyword(ops.expert_mlp), impl=impl),
                reference=by_keyword(ops.expert_mlp_ref),
                inputs=functools.partial(_expert_mlp_inputs, dtype=dtype, bias=False),
                sizes=sizes,
                routing=pattern,
                gradients=gradients,
            )
        options: dict[str, Any] = {"gate": gpt_oss, "transposed": True, "interleaved": True}
        yield Case(
            f"expert_mlp/{dtype}/gpt_oss",
            function=functools.partial(by_keyword(ops.expert_mlp), impl=impl, **options),
            reference=functools.partial(by_keyword(ops.expert_mlp_ref), **options),
            inputs=functools.partial(_expert_mlp_inputs, dtype=dtype, bias=True),
            sizes={**sizes, "tokens": 24},
            routing="uniform",
            gradients=(*gradients, "gate_up_bias", "down_bias"),
        )


def _expert_mlp_inputs(
    seed: int, *, tokens: int, hidden: int, inner: int, experts: int, top_k: int, routing: str, dtype: str, bias: bool
) -> dict[str, Any]:
    """Return the inputs of one case; with biases the weights are transposed, as in gpt-oss."""
    normal, kind = normal_of(seed), DTYPES[dtype]
    made = ops.route_ref(expert_index(routing, tokens, experts, top_k, seed), experts)
    w1, w2 = normal(experts, 2 * inner, hidden) / hidden**0.5, normal(experts, hidden, inner) / inner**0.5
    inputs = {
        # with biases, large enough for the clamp of gpt-oss to matter
        "hidden_states": (normal(tokens, hidden) * (4 if bias else 1)).to(kind),
        "top_k_weights": (normal(tokens, min(top_k, experts)).abs() + 0.1).to(kind),
        "sorted_rows": made.sorted_rows,
        "expert_offsets": made.expert_offsets,
        "gate_up_proj": (w1.transpose(1, 2).contiguous() if bias else w1).to(kind),
        "down_proj": (w2.transpose(1, 2).contiguous() if bias else w2).to(kind),
    }
    if bias:
        inputs["gate_up_bias"] = normal(experts, 2 * inner).to(kind)
        inputs["down_bias"] = normal(experts, hidden).to(kind)
    return inputs


# -------------------------------------------------------------------------------------------------- expert_wgrad


def expert_wgrad(impl: str) -> Iterator[Case]:
    sizes = {"tokens": 60, "hidden": 64, "inner": 32, "experts": 5, "top_k": 2}
    parts: dict[str, tuple[Callable, str]] = {
        "store": (_store, "skewed"),
        "masked": (_store, "first_empty"),
        "adamw": (_adamw, "skewed"),
        "inner": (_inner, "skewed"),
    }
    for dtype in DTYPES:
        for part, (function, pattern) in parts.items():
            yield Case(
                f"expert_wgrad/{part}/{dtype}",
                function=functools.partial(function, impl=impl),
                reference=functools.partial(function, impl="ref"),
                inputs=functools.partial(_expert_wgrad_inputs, dtype=dtype, part=part),
                sizes=sizes,
                routing=pattern,
            )


def _expert_wgrad_inputs(
    seed: int, *, tokens: int, hidden: int, inner: int, experts: int, top_k: int, routing: str, dtype: str, part: str
) -> dict[str, Any]:
    kind = DTYPES[dtype]
    made = ops.route_ref(expert_index(routing, tokens, experts, top_k, seed), experts)
    rows = len(made.sorted_rows)
    normal = normal_of(seed)
    if part == "inner":  # float64 results need integers, whose sums are exact
        whole = iter(range(4 * seed, 4 * seed + 4))
        normal = lambda *shape: integers(*shape, seed=next(whole))  # noqa: E731
    inputs = {
        "grad": normal(rows, inner).to(kind),
        "input": normal(tokens, hidden).to(kind),
        "expert_offsets": made.expert_offsets,
        "input_rows": made.sorted_rows // min(top_k, experts),
        # every second expert is trained, and the last one comes first
        "experts": torch.arange(experts - 1, -1, -2),
    }
    if part != "store":
        inputs["mask"] = packed_mask(seed, len(inputs["experts"]), inner, hidden)
    if part == "adamw":
        inputs["weight"] = normal(experts, inner, hidden).to(kind)
    return inputs


def _store(
    grad: Tensor,
    input: Tensor,
    expert_offsets: Tensor,
    input_rows: Tensor,
    experts: Tensor,
    mask: Tensor | None = None,
    *,
    impl: str,
) -> Tensor:
    return ops.expert_wgrad(grad, input, expert_offsets, input_rows=input_rows, experts=experts, mask=mask, impl=impl)


def _adamw(
    grad: Tensor,
    input: Tensor,
    expert_offsets: Tensor,
    input_rows: Tensor,
    experts: Tensor,
    mask: Tensor,
    weight: Tensor,
    *,
    impl: str,
) -> dict[str, Tensor]:
    """Return the weight and both moments after the second of two steps, on copies."""
    weight = weight.clone()
    wide = torch.promote_types(weight.dtype, torch.float32)
    factors = {"grad": grad, "input": input, "expert_offsets": expert_offsets, "input_rows": input_rows}
    m, v = (torch.zeros(len(experts), *weight.shape[1:], dtype=wide, device=weight.device) for _ in range(2))
    for step in (1, 2):
        rule = {"lr": 1e-2, "weight_decay": 0.1, "step": step}
        by_keyword(expert_wgrad_adamw_)(weight, m, v, **factors, **rule, experts=experts, mask=mask, impl=impl)
    return {"weight": weight, "exp_avg": m, "exp_avg_sq": v}


def _inner(
    grad: Tensor, input: Tensor, expert_offsets: Tensor, input_rows: Tensor, experts: Tensor, mask: Tensor, *, impl: str
) -> Tensor:
    sides = [Factors(g, input, expert_offsets, None, input_rows) for g in (grad, grad.flip(0))]
    return expert_wgrad_inner(sides, experts=experts, mask=mask, impl=impl)


# ---------------------------------------------------------------------------------------------------- token_loss


def token_loss(impl: str) -> Iterator[Case]:
    gradients = ("hidden_states", "lm_head", "bias", "token_weights")
    for kind in ("nll", "uce", "kl"):
        for dtype in DTYPES:
            yield Case(
                f"token_loss/{kind}/{dtype}",
                function=functools.partial(_loss, by_keyword(ops.token_loss), kind=kind, impl=impl),
                reference=functools.partial(_loss, by_keyword(ops.token_loss_ref), kind=kind),
                inputs=functools.partial(_token_loss_inputs, kind=kind, dtype=dtype),
                sizes={"tokens": 300, "hidden": 24, "vocabulary": 97},
                smallest={"vocabulary": 2},
                gradients=gradients,
            )


def _token_loss_inputs(
    seed: int, *, tokens: int, hidden: int, vocabulary: int, kind: str, dtype: str
) -> dict[str, Any]:
    """Return inputs with a third of the labels ignored and uneven weights, some of them zero or negative."""
    generator, normal, narrow = torch.Generator().manual_seed(seed + 1), normal_of(seed), DTYPES[dtype]
    labels = torch.randint(0, vocabulary, (tokens,), generator=generator)
    labels[torch.rand(tokens, generator=generator) < 1 / 3] = -100
    h = normal(hidden, tokens).to(narrow)
    inputs = {
        # columns are tokens: the rounding of one token's loss scales all of its gradient, so a row of the criterion
        # must hold many tokens
        "hidden_states": h,
        "lm_head": (normal(hidden, vocabulary) / hidden**0.5 / (3 if kind == "uce" else 1)).to(narrow),
        "labels": labels,
        "bias": (normal(vocabulary) / 3).to(narrow),
        "token_weights": normal(tokens).sign() * (0.5 + normal(tokens).abs()) * (normal(tokens) > -1),
    }
    if kind == "kl":
        inputs["ref_hidden_states"] = (h.float() + normal(hidden, tokens) / 2).to(narrow)
    return inputs


def _loss(
    function: Callable,
    hidden_states: Tensor,
    lm_head: Tensor,
    ref_hidden_states: Tensor | None = None,
    **arguments: Any,
) -> Tensor:
    if ref_hidden_states is not None:
        arguments["ref_hidden_states"] = ref_hidden_states.t()
    losses: Tensor = function(hidden_states.t(), lm_head=lm_head.t(), **arguments)
    return losses
