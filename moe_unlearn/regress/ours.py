"""Define our own cases: each of the eight ops, forward and gradients, over dtypes and routing patterns.

They are small enough for a CPU (all of them take seconds). Gradients and hidden states are random normal. Ops with
float64 results get small integers whose sums are exact, since no wider truth exists to compare with.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from moe_unlearn import ops
from moe_unlearn.ops.gram import gram_factors
from moe_unlearn.regress.case import Case, forget, register
from moe_unlearn.regress.flat import by_keyword
from moe_unlearn.regress.ours_layers import (
    DTYPES,
    PATTERNS,
    expert_index,
    expert_mlp,
    expert_wgrad,
    normal_of,
    packed_mask,
    token_loss,
)
from moe_unlearn.testing import integers

ORIGIN = "moe_unlearn.regress.ours"


def register_all(impl: str = "auto") -> list[Case]:
    """Register our cases with the implementation `impl` of every op, replacing earlier ones, and return them."""
    forget(ORIGIN)
    return [register(case) for case in cases(impl)]


def cases(impl: str = "auto") -> list[Case]:
    """Return our cases, each op called with impl=`impl`, without registering them."""
    makers = (_route, _retain_weights, expert_mlp, expert_wgrad, token_loss, _gram, _weight_score, _masked_update)
    return [
        dataclasses.replace(case, tags=frozenset({"ours", *case.name.split("/")}), origin=ORIGIN)
        for maker in makers
        for case in maker(impl)
    ]


# -------------------------------------------------------------------------------------------------------- route


def _route(impl: str) -> Iterator[Case]:
    sizes = {"tokens": 100, "experts": 8, "top_k": 2}
    for pattern in (*PATTERNS, "sentinels"):
        yield Case(
            f"route/{pattern}",
            function=functools.partial(_call_route, ops.route, impl=impl),
            reference=functools.partial(_call_route, ops.route_ref),
            inputs=_route_inputs,
            sizes=sizes,
            routing=pattern,
        )


def _route_inputs(seed: int, *, tokens: int, experts: int, top_k: int, routing: str) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "top_k_index": expert_index(routing, tokens, experts, top_k, seed),
        "num_experts": experts,
        "group": torch.randint(-1, 2, (tokens,), generator=generator),
        "log_tilt": torch.randn(experts, generator=generator),
        "log_weight": torch.randn(tokens, generator=generator),
    }


def _call_route(
    function: Callable,
    top_k_index: Tensor,
    num_experts: int,
    group: Tensor,
    log_tilt: Tensor,
    log_weight: Tensor,
    **choice: str,
) -> dict[str, Any]:
    """Call the op on a copy of log_weight, to which it adds in place, and return the copy too."""
    added = log_weight.clone()
    made = function(top_k_index, num_experts, group=group, num_groups=2, log_tilt=log_tilt, log_weight=added, **choice)
    return {**made._asdict(), "log_weight": added}


# ------------------------------------------------------------------------------------------------ retain_weights


def _retain_weights(impl: str) -> Iterator[Case]:
    for name, cap in (("free", None), ("capped", 1.5)):
        yield Case(
            f"retain_weights/{name}",
            function=functools.partial(_call_retain_weights, cap=cap, impl=impl),
            reference=functools.partial(_retain_weights_truth, cap=cap),
            inputs=_retain_weights_inputs,
            sizes={"tokens": 300, "experts": 5},
            smallest={"tokens": 8},
        )


def _retain_weights_inputs(seed: int, *, tokens: int, experts: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    members = torch.rand(tokens, experts, generator=generator) < 0.3
    target = (members.float().mean(0) + 0.1).clamp(0, 1)
    return {"members": members, "target": target}


def _call_retain_weights(members: Tensor, target: Tensor, *, cap: float | None, impl: str) -> dict[str, Any]:
    made = ops.retain_weights(members, target, cap=cap, impl=impl)
    return {"weights": made.weights.to(target.dtype), "achieved": made.achieved.to(target.dtype)}


def _retain_weights_truth(members: Tensor, target: Tensor, *, cap: float | None) -> dict[str, Any]:
    made = ops.retain_weights_ref(members, target, cap=cap)
    # computed in float64 from the tilt, because the op itself returns float32
    weights = (made.bias + members.double() @ made.tilt.to(members.device)).exp()
    weights = weights if cap is None else weights.clamp_max(cap)
    return {"weights": weights.to(target.dtype), "achieved": made.achieved.to(target.dtype)}


# ---------------------------------------------------------------------------------------------------------- gram


def _gram(impl: str) -> Iterator[Case]:
    for dtype in DTYPES:
        yield Case(
            f"gram/masked/{dtype}",
            function=functools.partial(ops.gram, impl=impl),
            reference=functools.partial(ops.gram, impl="ref"),
            inputs=functools.partial(_gram_inputs, dtype=dtype),
            sizes={"objectives": 3, "rows": 20, "columns": 70},
        )
        yield Case(
            f"gram/factors/{dtype}",
            function=functools.partial(gram_factors, impl=impl),
            reference=functools.partial(gram_factors, impl="ref"),
            inputs=functools.partial(_factors_inputs, dtype=dtype),
            sizes={"objectives": 3, "tokens": 40, "hidden": 24, "inner": 16, "experts": 5, "top_k": 2},
            routing="skewed",
        )


def _gram_inputs(seed: int, *, objectives: int, rows: int, columns: int, dtype: str) -> dict[str, Any]:
    """Return inputs whose sums of products float64 holds exactly and, for float32 gradients, float32 does not."""
    high = 2000 if dtype == "float32" else 100
    sets = [
        [
            integers(*shape, low=-high, high=high, seed=10 * seed + 2 * i + p, dtype=DTYPES[dtype])
            for p, shape in enumerate([(rows, columns), (columns,)])
        ]
        for i in range(objectives)
    ]
    return {"gradients": sets, "masks": [packed_mask(seed, rows, columns), None]}


def _factors_inputs(
    seed: int,
    *,
    objectives: int,
    tokens: int,
    hidden: int,
    inner: int,
    experts: int,
    top_k: int,
    routing: str,
    dtype: str,
) -> dict[str, Any]:
    made = ops.route_ref(expert_index(routing, tokens, experts, top_k, seed), experts)
    rows, kind = len(made.sorted_rows), DTYPES[dtype]
    return {
        "row_gradients": [integers(rows, inner, seed=10 * seed + i, dtype=kind) for i in range(objectives)],
        "inputs": integers(rows, hidden, seed=10 * seed + 9, dtype=kind),
        "expert_offsets": made.expert_offsets,
    }


# -------------------------------------------------------------------------------------------------- weight_score


def _weight_score(impl: str) -> Iterator[Case]:
    for dtype in DTYPES:
        yield Case(
            f"weight_score/{dtype}",
            function=functools.partial(_score_parts, impl=impl),
            reference=functools.partial(_score_parts, impl="ref"),
            inputs=functools.partial(_weight_score_inputs, dtype=dtype),
            sizes={"rows": 30, "columns": 70},
        )


def _weight_score_inputs(seed: int, *, rows: int, columns: int, dtype: str) -> dict[str, Any]:
    normal, kind = normal_of(seed), DTYPES[dtype]
    return {name: normal(rows, columns).to(kind) for name in ("weight", "grad_forget", "grad_retain")}


def _score_parts(weight: Tensor, grad_forget: Tensor, grad_retain: Tensor, *, impl: str) -> dict[str, Any]:
    """Return both histograms and a mask, of the float32 score also where float64 is the truth."""
    narrow = [t.float() for t in (weight, grad_forget, grad_retain)]
    prefix, threshold = 0x3F80, 0x3F800000  # around 1.0
    digits: dict[str, Any] = {"high": {"digit": 0}, "low": {"digit": 1, "prefix": prefix}}
    counts = {name: ops.score_histogram(*narrow, gamma=3.0, impl=impl, **digit) for name, digit in digits.items()}
    words, taken = ops.score_mask(*narrow, gamma=3.0, threshold_bits=threshold, ties=1, impl=impl)
    return {**counts, "words": words, "taken": taken}


# ------------------------------------------------------------------------------------------------- masked_update


def _masked_update(impl: str) -> Iterator[Case]:
    for dtype in DTYPES:
        for rounding in ("nearest",) if dtype == "float32" else ("nearest", "stochastic"):
            for rule, function in (("sgd", _sgd_step), ("adamw", _adamw_step)):
                yield Case(
                    f"masked_update/{rule}/{dtype}/{rounding}",
                    function=functools.partial(function, rounding=rounding, impl=impl),
                    reference=functools.partial(function, rounding=rounding, impl="ref"),
                    inputs=functools.partial(_masked_update_inputs, dtype=dtype),
                    sizes={"experts": 4, "rows": 8, "columns": 70},
                )


def _masked_update_inputs(seed: int, *, experts: int, rows: int, columns: int, dtype: str) -> dict[str, Any]:
    normal, kind = normal_of(seed), DTYPES[dtype]
    trained = torch.arange(0, experts, 2)
    compact = (len(trained), rows, columns)
    return {
        "param": normal(experts, rows, columns).to(kind),
        "grad": normal(*compact).to(kind),
        "first": normal(*compact),
        "second": normal(*compact).square(),
        "mask": packed_mask(seed, *compact),
        "slices": trained,
    }


def _sgd_step(
    param: Tensor,
    grad: Tensor,
    first: Tensor,
    second: Tensor,
    mask: Tensor,
    slices: Tensor,
    *,
    rounding: str,
    impl: str,
) -> dict[str, Any]:
    param, first = param.clone(), first.clone()
    rule, update = {"lr": 1e-2, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1}, _third(param, rounding)
    by_keyword(ops.masked_sgd_)(param, grad, first, mask, **rule, **update, slices=slices, impl=impl)
    return {"param": param, "momentum": first}


def _adamw_step(
    param: Tensor,
    grad: Tensor,
    first: Tensor,
    second: Tensor,
    mask: Tensor,
    slices: Tensor,
    *,
    rounding: str,
    impl: str,
) -> dict[str, Any]:
    param, first, second = param.clone(), first.clone(), second.clone()
    rule, update = {"lr": 1e-2, "weight_decay": 0.1}, _third(param, rounding)
    by_keyword(ops.masked_adamw_)(param, grad, first, second, mask, **rule, **update, slices=slices, impl=impl)
    return {"param": param, "exp_avg": first, "exp_avg_sq": second}


def _third(param: Tensor, rounding: str) -> dict:
    """Return which update it is, and its rounding; float64 is not rounded at all."""
    return {"step": 3, "rounding": "nearest" if param.dtype == torch.float64 else rounding, "seed": 5}
