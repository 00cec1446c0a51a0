"""Our own cases: each of the eight ops, forward and gradients, over dtypes and routing patterns.

Small enough for a CPU (all of them in seconds). The values of gradients and hidden states are random normal, those of
float64 results small integers whose sums are exact, since no wider truth exists to hold them against.
"""

import functools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from moe_unlearn import ops
from moe_unlearn.ops.bits import pack_bits
from moe_unlearn.ops.expert_wgrad import (
    Factors,
    expert_wgrad_adamw_,
    expert_wgrad_inner,
    expert_wgrad_score,
)
from moe_unlearn.ops.gram import gram_factors
from moe_unlearn.regress.case import Case, forget, register
from moe_unlearn.testing import integers, routing

ORIGIN = "moe_unlearn.regress.ours"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
PATTERNS = ("uniform", "skewed", "one_expert", "half_empty")


def register_all(impl: str = "auto") -> list[Case]:
    """Register our cases with the implementation `impl` of every op; earlier ones are replaced."""
    forget(ORIGIN)
    return [register(case) for case in cases(impl)]


def cases(impl: str = "auto") -> list[Case]:
    """Our cases, each op called with impl=`impl`; not registered."""
    makers = (_route, _retain_weights, _expert_mlp, _expert_wgrad, _token_loss, _gram, _weight_score, _masked_update)
    made = []
    for maker in makers:
        op = maker.__name__.strip("_")
        for name, options in maker(impl):
            tags = frozenset({"ours", op, *name.split("/")})
            made.append(Case(name=f"{op}/{name}", tags=tags, origin=ORIGIN, **options))
    return made


Cases = Iterator[tuple[str, dict]]


def _normal(seed: int) -> Callable[..., Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(shape, generator=generator)


def _words(seed: int, *shape: int) -> Tensor:
    """A packed mask that keeps about half."""
    return pack_bits(torch.rand(shape, generator=torch.Generator().manual_seed(seed + 1)) < 0.5)


# -------------------------------------------------------------------------------------------------------- route


def _route(impl: str) -> Cases:
    sizes = {"tokens": 100, "experts": 8, "top_k": 2}
    for pattern in (*PATTERNS, "sentinels"):
        yield (
            pattern,
            {
                "function": functools.partial(_call_route, ops.route, impl=impl),
                "reference": functools.partial(_call_route, ops.route_ref),
                "inputs": _route_inputs,
                "sizes": sizes,
                "routing": pattern,
            },
        )


def _route_inputs(seed, *, tokens, experts, top_k, routing):
    generator = torch.Generator().manual_seed(seed)
    return {
        "top_k_index": _index(routing, tokens, experts, top_k, seed),
        "num_experts": experts,
        "group": torch.randint(-1, 2, (tokens,), generator=generator),
        "log_tilt": torch.randn(experts, generator=generator),
        "log_weight": torch.randn(tokens, generator=generator),
    }


def _index(pattern, tokens, experts, top_k, seed):
    return routing(pattern, tokens, experts, min(top_k, experts), seed=seed)


def _call_route(function, top_k_index, num_experts, group, log_tilt, log_weight, **choice):
    """The op adds to log_weight in place: it is given a copy, which is returned."""
    added = log_weight.clone()
    made = function(top_k_index, num_experts, group=group, num_groups=2, log_tilt=log_tilt, log_weight=added, **choice)
    return {**made._asdict(), "log_weight": added}


# ------------------------------------------------------------------------------------------------ retain_weights


def _retain_weights(impl: str) -> Cases:
    for name, cap in (("free", None), ("capped", 1.5)):
        yield (
            name,
            {
                "function": functools.partial(_call_retain_weights, cap=cap, impl=impl),
                "reference": functools.partial(_retain_weights_truth, cap=cap),
                "inputs": _retain_weights_inputs,
                "sizes": {"tokens": 300, "experts": 5},
                "smallest": {"tokens": 8},
            },
        )


def _retain_weights_inputs(seed, *, tokens, experts):
    generator = torch.Generator().manual_seed(seed)
    members = torch.rand(tokens, experts, generator=generator) < 0.3
    target = (members.float().mean(0) + 0.1).clamp(0, 1)
    return {"members": members, "target": target}


def _call_retain_weights(members, target, *, cap, impl):
    made = ops.retain_weights(members, target, cap=cap, impl=impl)
    return {"weights": made.weights.to(target.dtype), "achieved": made.achieved.to(target.dtype)}


def _retain_weights_truth(members, target, *, cap):
    made = ops.retain_weights_ref(members, target, cap=cap)
    # in float64 from the tilt: the op itself returns float32
    weights = (made.bias + members.double() @ made.tilt.to(members.device)).exp()
    weights = weights if cap is None else weights.clamp_max(cap)
    return {"weights": weights.to(target.dtype), "achieved": made.achieved.to(target.dtype)}


# ---------------------------------------------------------------------------------------------------- expert_mlp


def _expert_mlp(impl: str) -> Cases:
    sizes = {"tokens": 64, "hidden": 24, "inner": 16, "experts": 5, "top_k": 2}
    gradients = ("hidden_states", "top_k_weights", "gate_up_proj", "down_proj")
    gpt_oss = ops.Gate("silu", 1.702, 7.0, 1.0)
    for dtype in DTYPES:
        for pattern in PATTERNS:
            yield (
                f"{dtype}/{pattern}",
                {
                    "function": functools.partial(ops.expert_mlp, impl=impl),
                    "reference": ops.expert_mlp_ref,
                    "inputs": functools.partial(_expert_mlp_inputs, dtype=dtype, bias=False),
                    "sizes": sizes,
                    "routing": pattern,
                    "gradients": gradients,
                },
            )
        options = {"gate": gpt_oss, "transposed": True, "interleaved": True}
        yield (
            f"{dtype}/gpt_oss",
            {
                "function": functools.partial(ops.expert_mlp, impl=impl, **options),
                "reference": functools.partial(ops.expert_mlp_ref, **options),
                "inputs": functools.partial(_expert_mlp_inputs, dtype=dtype, bias=True),
                "sizes": {**sizes, "tokens": 24},
                "routing": "uniform",
                "gradients": (*gradients, "gate_up_bias", "down_bias"),
            },
        )


def _expert_mlp_inputs(seed, *, tokens, hidden, inner, experts, top_k, routing, dtype, bias):
    """With biases the weights are transposed, as in gpt-oss."""
    normal, kind = _normal(seed), DTYPES[dtype]
    made = ops.route_ref(_index(routing, tokens, experts, top_k, seed), experts)
    w1, w2 = normal(experts, 2 * inner, hidden) / hidden**0.5, normal(experts, hidden, inner) / inner**0.5
    inputs = {
        # with biases large enough for the clamp of gpt-oss to matter
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


def _expert_wgrad(impl: str) -> Cases:
    sizes = {"tokens": 60, "hidden": 64, "inner": 32, "experts": 5, "top_k": 2}
    parts = {"store": (_store, "skewed"), "masked": (_store, "first_empty"), "adamw": (_adamw, "skewed"),
             "score": (_score, "skewed"), "inner": (_inner, "skewed")}  # fmt: skip
    for dtype in DTYPES:
        for part, (function, pattern) in parts.items():
            yield (
                f"{part}/{dtype}",
                {
                    "function": functools.partial(function, impl=impl),
                    "reference": functools.partial(function, impl="ref"),
                    "inputs": functools.partial(_expert_wgrad_inputs, dtype=dtype, part=part),
                    "sizes": sizes,
                    "routing": pattern,
                },
            )


def _expert_wgrad_inputs(seed, *, tokens, hidden, inner, experts, top_k, routing, dtype, part):
    kind = DTYPES[dtype]
    made = ops.route_ref(_index(routing, tokens, experts, top_k, seed), experts)
    rows = len(made.sorted_rows)
    normal = _normal(seed)
    if part == "inner":  # float64 out: integers, whose sums are exact
        whole = iter(range(4 * seed, 4 * seed + 4))
        normal = lambda *shape: integers(*shape, seed=next(whole))  # noqa: E731
    inputs = {
        "grad": normal(rows, inner).to(kind),
        "input": normal(tokens, hidden).to(kind),
        "expert_offsets": made.expert_offsets,
        "input_rows": made.sorted_rows // min(top_k, experts),
        # every second expert is trained, the last one first
        "experts": torch.arange(experts - 1, -1, -2),
    }
    if part != "store":
        inputs["mask"] = _words(seed, len(inputs["experts"]), inner, hidden)
    if part in ("adamw", "score"):
        inputs["weight"] = normal(experts, inner, hidden).to(kind)
    return inputs


def _store(grad, input, expert_offsets, input_rows, experts, mask=None, *, impl):
    return ops.expert_wgrad(grad, input, expert_offsets, input_rows=input_rows, experts=experts, mask=mask, impl=impl)


def _adamw(grad, input, expert_offsets, input_rows, experts, mask, weight, *, impl):
    """The weight and both moments after the second of two steps, on copies."""
    weight = weight.clone()
    wide = torch.promote_types(weight.dtype, torch.float32)
    m, v = (torch.zeros(len(experts), *weight.shape[1:], dtype=wide, device=weight.device) for _ in range(2))
    for step in (1, 2):
        expert_wgrad_adamw_(
            weight, m, v, grad, input, expert_offsets, input_rows=input_rows, experts=experts, mask=mask, lr=1e-2,
            step=step, weight_decay=0.1, impl=impl,
        )  # fmt: skip
    return {"weight": weight, "exp_avg": m, "exp_avg_sq": v}


def _score(grad, input, expert_offsets, input_rows, experts, mask, weight, *, impl):
    forget_side = Factors(grad, input, expert_offsets, None, input_rows)
    retain_side = Factors(grad.flip(1), input, expert_offsets, None, input_rows)
    return expert_wgrad_score(weight, forget_side, retain_side, gamma=3.0, experts=experts, impl=impl)


def _inner(grad, input, expert_offsets, input_rows, experts, mask, *, impl):
    sides = [Factors(g, input, expert_offsets, None, input_rows) for g in (grad, grad.flip(0))]
    return expert_wgrad_inner(sides, experts=experts, mask=mask, impl=impl)


# ---------------------------------------------------------------------------------------------------- token_loss


def _token_loss(impl: str) -> Cases:
    gradients = ("hidden_states", "lm_head", "bias", "token_weights")
    for kind in ("nll", "uce", "kl"):
        for dtype in DTYPES:
            yield (
                f"{kind}/{dtype}",
                {
                    "function": functools.partial(_loss, ops.token_loss, kind=kind, impl=impl),
                    "reference": functools.partial(_loss, ops.token_loss_ref, kind=kind),
                    "inputs": functools.partial(_token_loss_inputs, kind=kind, dtype=dtype),
                    "sizes": {"tokens": 300, "hidden": 24, "vocabulary": 97},
                    "smallest": {"vocabulary": 2},
                    "gradients": gradients,
                },
            )


def _token_loss_inputs(seed, *, tokens, hidden, vocabulary, kind, dtype):
    """A third of the labels ignored, uneven weights of which some are zero or negative."""
    generator, normal, narrow = torch.Generator().manual_seed(seed + 1), _normal(seed), DTYPES[dtype]
    labels = torch.randint(0, vocabulary, (tokens,), generator=generator)
    labels[torch.rand(tokens, generator=generator) < 1 / 3] = -100
    h = normal(hidden, tokens).to(narrow)
    inputs = {
        # columns are tokens: the rounding of one token's loss scales all of its gradient, so that a row of the
        # criterion must hold many tokens
        "hidden_states": h,
        "lm_head": (normal(hidden, vocabulary) / hidden**0.5 / (3 if kind == "uce" else 1)).to(narrow),
        "labels": labels,
        "bias": (normal(vocabulary) / 3).to(narrow),
        "token_weights": normal(tokens).sign() * (0.5 + normal(tokens).abs()) * (normal(tokens) > -1),
    }
    if kind == "kl":
        inputs["ref_hidden_states"] = (h.float() + normal(hidden, tokens) / 2).to(narrow)
    return inputs


def _loss(function, hidden_states, lm_head, ref_hidden_states=None, **arguments):
    if ref_hidden_states is not None:
        arguments["ref_hidden_states"] = ref_hidden_states.t()
    return function(hidden_states.t(), lm_head.t(), **arguments)


# ---------------------------------------------------------------------------------------------------------- gram


def _gram(impl: str) -> Cases:
    for dtype in DTYPES:
        yield (
            f"masked/{dtype}",
            {
                "function": functools.partial(ops.gram, impl=impl),
                "reference": functools.partial(ops.gram, impl="ref"),
                "inputs": functools.partial(_gram_inputs, dtype=dtype),
                "sizes": {"objectives": 3, "rows": 20, "columns": 70},
            },
        )
        yield (
            f"factors/{dtype}",
            {
                "function": functools.partial(gram_factors, impl=impl),
                "reference": functools.partial(gram_factors, impl="ref"),
                "inputs": functools.partial(_factors_inputs, dtype=dtype),
                "sizes": {"objectives": 3, "tokens": 40, "hidden": 24, "inner": 16, "experts": 5, "top_k": 2},
                "routing": "skewed",
            },
        )


def _gram_inputs(seed, *, objectives, rows, columns, dtype):
    """Sums of products that float64 holds exactly and, for float32 gradients, float32 does not."""
    high = 2000 if dtype == "float32" else 100
    sets = [
        [integers(*shape, low=-high, high=high, seed=10 * seed + 2 * i + p, dtype=DTYPES[dtype])
         for p, shape in enumerate([(rows, columns), (columns,)])]
        for i in range(objectives)
    ]  # fmt: skip
    return {"gradients": sets, "masks": [_words(seed, rows, columns), None]}


def _factors_inputs(seed, *, objectives, tokens, hidden, inner, experts, top_k, routing, dtype):
    made = ops.route_ref(_index(routing, tokens, experts, top_k, seed), experts)
    rows, kind = len(made.sorted_rows), DTYPES[dtype]
    return {
        "row_gradients": [integers(rows, inner, seed=10 * seed + i, dtype=kind) for i in range(objectives)],
        "inputs": integers(rows, hidden, seed=10 * seed + 9, dtype=kind),
        "expert_offsets": made.expert_offsets,
    }


# -------------------------------------------------------------------------------------------------- weight_score


def _weight_score(impl: str) -> Cases:
    for dtype in DTYPES:
        yield (
            dtype,
            {
                "function": functools.partial(_score_parts, impl=impl),
                "reference": functools.partial(_score_parts, impl="ref"),
                "inputs": functools.partial(_weight_score_inputs, dtype=dtype),
                "sizes": {"rows": 30, "columns": 70},
            },
        )


def _weight_score_inputs(seed, *, rows, columns, dtype):
    normal, kind = _normal(seed), DTYPES[dtype]
    return {name: normal(rows, columns).to(kind) for name in ("weight", "grad_forget", "grad_retain")}


def _score_parts(weight, grad_forget, grad_retain, *, impl):
    """Score, both histograms and a mask; the integers of the float32 score, also where float64 is the truth."""
    terms = (weight, grad_forget, grad_retain)
    narrow = [t.float() for t in terms]
    prefix, threshold = 0x3F80, 0x3F800000  # around 1.0
    digits = {"high": {"digit": 0}, "low": {"digit": 1, "prefix": prefix}}
    counts = {name: ops.score_histogram(*narrow, gamma=3.0, impl=impl, **digit) for name, digit in digits.items()}
    words, taken = ops.score_mask(*narrow, gamma=3.0, threshold_bits=threshold, ties=1, impl=impl)
    return {"score": ops.weight_score(*terms, gamma=3.0, impl=impl), **counts, "words": words, "taken": taken}


# ------------------------------------------------------------------------------------------------- masked_update


def _masked_update(impl: str) -> Cases:
    for dtype in DTYPES:
        for rounding in ("nearest",) if dtype == "float32" else ("nearest", "stochastic"):
            for rule, function in (("sgd", _sgd_step), ("adamw", _adamw_step)):
                yield (
                    f"{rule}/{dtype}/{rounding}",
                    {
                        "function": functools.partial(function, rounding=rounding, impl=impl),
                        "reference": functools.partial(function, rounding=rounding, impl="ref"),
                        "inputs": functools.partial(_masked_update_inputs, dtype=dtype),
                        "sizes": {"experts": 4, "rows": 8, "columns": 70},
                    },
                )


def _masked_update_inputs(seed, *, experts, rows, columns, dtype):
    normal, kind = _normal(seed), DTYPES[dtype]
    trained = torch.arange(0, experts, 2)
    compact = (len(trained), rows, columns)
    return {
        "param": normal(experts, rows, columns).to(kind),
        "grad": normal(*compact).to(kind),
        "first": normal(*compact),
        "second": normal(*compact).square(),
        "mask": _words(seed, *compact),
        "slices": trained,
    }


def _sgd_step(param, grad, first, second, mask, slices, *, rounding, impl):
    param, first = param.clone(), first.clone()
    ops.masked_sgd_(
        param, grad, first, mask, lr=1e-2, momentum=0.9, nesterov=True, weight_decay=0.1, step=3,
        rounding=_rounding(param, rounding), seed=5, slices=slices, impl=impl,
    )  # fmt: skip
    return {"param": param, "momentum": first}


def _adamw_step(param, grad, first, second, mask, slices, *, rounding, impl):
    param, first, second = param.clone(), first.clone(), second.clone()
    ops.masked_adamw_(
        param, grad, first, second, mask, lr=1e-2, weight_decay=0.1, step=3,
        rounding=_rounding(param, rounding), seed=5, slices=slices, impl=impl,
    )  # fmt: skip
    return {"param": param, "exp_avg": first, "exp_avg_sq": second}


def _rounding(param: Tensor, rounding: str) -> str:
    """float64 is not rounded at all."""
    return "nearest" if param.dtype == torch.float64 else rounding
