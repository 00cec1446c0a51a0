"""Calls of every op and epilogue on nasty shapes, for the checks of memory and order: `CASES`.

Shapes are no multiples of any tile, some larger than one; experts are empty, hold every row or one token; ids
mean "not here". Names are `op/what`. Each entry builds a fresh `Case`, whose function calls the public op.
"""

import functools
from collections.abc import Callable
from unittest import mock

import torch

from moe_unlearn.ops import (
    SGD,
    AdamW,
    Update,
    expert_wgrad,
    gram,
    gram_factors,
    masked_adamw_,
    masked_sgd_,
    retain_weights,
    route,
    score_histogram,
    score_mask,
)
from moe_unlearn.ops.bits import pack_bits
from moe_unlearn.ops.expert_wgrad import (
    Factors,
    expert_wgrad_adamw_,
    expert_wgrad_inner,
    expert_wgrad_sgd_,
)
from moe_unlearn.ops.retain_weights import moments, tilted_weights
from moe_unlearn.ops.token_loss import IGNORED, KINDS
from moe_unlearn.testing import in_layout, routing
from tests.ops.expert_mlp import cases as mlp
from tests.ops.expert_wgrad import cases as wgrad
from tests.ops.gram import cases as gram_cases
from tests.ops.masked_update import cases as update_cases
from tests.ops.retain_weights.cases import random_members
from tests.ops.token_loss import cases as loss
from tests.ops.weight_score import cases as scores
from tests.support.by_keyword import by_keyword, expert_mlp, token_loss
from tests.support.checkers.case import Case

BF16 = torch.bfloat16
CASES: dict[str, Callable[[], Case]] = {}
# ops whose kernels differ by architecture
DESCRIPTORS = ("expert_mlp", "expert_wgrad", "token_loss")


def case(name: str):
    """Register the function below as the builder of the case `name`."""

    def keep(build):
        assert name not in CASES
        CASES[name] = build
        return build

    return keep


def differentiated(op, arguments: dict, gradients: tuple[str, ...], **options) -> Case:
    """A case of `op` and of its backward, with an upstream gradient that differs everywhere and is strided."""

    def function(upstream, **given):
        leaves = {k: v.detach().requires_grad_() if k in gradients else v for k, v in given.items()}
        out = op(**leaves, **options, impl="triton")
        value = upstream.expand(out.shape) if out.dim() == 0 else upstream
        return out, *torch.autograd.grad(out, [leaves[k] for k in gradients], value)

    tensors = {k: v for k, v in arguments.items() if torch.is_tensor(v)}
    options |= {k: v for k, v in arguments.items() if k not in tensors}
    with torch.no_grad():
        like = op(**tensors, **options, impl="ref")
    generator = torch.Generator().manual_seed(7)
    upstream = in_layout(torch.randn(like.shape, generator=generator).to(like.dtype), "transposed")
    return Case(function, tensors | {"upstream": upstream})


def compared(op, arguments: dict, **keywords) -> Case:
    """A case of an op that gives the reference's bits."""
    return Case(
        functools.partial(op, impl="triton"), arguments, reference=functools.partial(op, impl="ref"), **keywords
    )


# --------------------------------------------------------------------------------------------------------- route


def _route_case(pattern, tokens, experts, top_k, dtype=torch.int64, tilted=True):
    arguments = {"top_k_index": routing(pattern, tokens, experts, top_k).to(dtype)}
    if tilted:
        arguments |= {
            "group": torch.arange(tokens) % 4 - 1,
            "log_tilt": torch.randn(experts),
            "log_weight": torch.randn(tokens),
        }
    function = functools.partial(route, num_experts=experts, num_groups=3 if tilted else 1)
    return compared(function, arguments, mutates=("log_weight",) if tilted else (), integer_atomics=True)


for _name, _arguments in {
    "one token": ("uniform", 1, 2, 1),
    "skewed": ("skewed", 257, 33, 5),
    "sentinels": ("sentinels", 131, 7, 3, torch.int32),
    "nobody here": ("all_sentinels", 37, 5, 2),
    "many experts": ("half_empty", 40, 300, 3),
    "bare": ("one_expert", 70, 8, 2, torch.int32, False),
}.items():
    CASES[f"route/{_name}"] = functools.partial(_route_case, *_arguments)


def configured(op, name: str, **changes):
    """`op` with some of what `configs.<name>` chooses changed, to reach on small inputs what large ones take."""

    def call(*arguments, **keywords):
        from moe_unlearn.triton_kernels import configs  # late: mutants replace the package

        choose = getattr(configs, name)
        with mock.patch.object(configs, name, lambda *a, **k: choose(*a, **k)._replace(**changes)):
            return op(*arguments, **keywords)

    return call


@case("route/many tiles per block")
def _():
    made = _route_case("sentinels", 301, 7, 3)
    small = {"tokens_per_block": 50, "blocks": 7, "count_tile": 16, "tile": 32, "chunk": 2, "cells": 4}
    return made._replace(function=configured(made.function, "route", **small))


# ------------------------------------------------------------------------------------------------ retain_weights


def _words(tokens, experts):
    return pack_bits(random_members(tokens, [0.3] * experts)), torch.linspace(-0.3, 0.3, experts).double()


for _tokens, _experts in [(1, 1), (301, 33), (70, 64)]:

    @case(f"retain_weights/moments {_tokens}x{_experts}")
    def _(tokens=_tokens, experts=_experts):
        words, tilt = _words(tokens, experts)
        return Case(
            lambda words, tilt: moments(words, tilt, 0.1, cap=1.2, impl="triton"), {"words": words, "tilt": tilt}
        )

    @case(f"retain_weights/weights {_tokens}x{_experts}")
    def _(tokens=_tokens, experts=_experts):
        words, tilt = _words(tokens, experts)
        return Case(lambda words, tilt: tilted_weights(words, tilt, 0.1, impl="triton"), {"words": words, "tilt": tilt})


@case("retain_weights/solved")
def _():
    members = random_members(65, [0.3, 0.5, 0.1])
    target = torch.tensor([0.4, 0.45, 0.15])
    return Case(
        lambda members, target: retain_weights(members, target, cap=3.0, impl="triton").weights,
        {"members": members, "target": target},
    )


# ---------------------------------------------------------------------------------------------------- expert_mlp

for _name, _arguments in {
    "skewed": dict(bias=True),
    "one token": dict(tokens=1, top_k=1),
    "bf16": dict(pattern="half_empty", dtype=BF16, bias=True),
    "sentinels": dict(pattern="sentinels", interleaved=True, gate=mlp.GPT_OSS, bias=True),
    "nobody here": dict(pattern="all_sentinels"),
    "transposed": dict(pattern="first_empty", transposed=True, dtype=BF16),
    "no gate": dict(pattern="one_expert", gated=False),
    "tiles": dict(tokens=75, hidden=136, inner=72, experts=3, dtype=BF16),
    "odd tiles": dict(tokens=75, hidden=133, inner=67, experts=3, pattern="last_empty"),
}.items():

    @case(f"expert_mlp/{_name}")
    def _(arguments=_arguments):
        made = mlp.case(**arguments)
        return differentiated(expert_mlp, made, mlp.names_of(made))


# -------------------------------------------------------------------------------------------------- expert_wgrad

# routing, and sizes of the factors
_SIZES = {
    "skewed": {},
    "half_empty": {"pattern": "half_empty"},
    "one_expert": {"pattern": "one_expert"},
    "sentinels": {"pattern": "sentinels"},
    "all_sentinels": {"pattern": "all_sentinels"},
    "one token": {"tokens": 1, "top_k": 1},
    "tiles": {"tokens": 90, "shape": (136, 168)},
    "odd tiles": {"tokens": 90, "shape": (131, 165)},
}


def _wgrad(name, dtype=BF16, seed=0):
    """(factors by name, experts, mask words, weight) of a size.

    Small integers: any order gives the same bits. No zeros: a sum of negative zeros alone may have either sign.
    """
    made = wgrad.factors(**{"shape": (12, 40), "tokens": 21} | _SIZES[name], dtype=dtype, seed=seed, exact=True)
    for factor in (made.grad, made.input):
        factor[factor == 0] = 1
    made.grad[int(made.expert_offsets[-1]) :] = torch.nan
    inner = made.grad.shape[1], made.input.shape[1]
    weight = torch.randn(wgrad.E, *inner).to(dtype)
    mask = pack_bits(torch.rand((2, *inner), generator=torch.Generator().manual_seed(seed)) > 0.4)
    named = {k: v for k, v in made._asdict().items() if v is not None}
    return named, torch.tensor([2, 1]), mask, weight  # of a half empty layer 1 has rows


def _updating(update, rule, step):
    """The update with this rule that takes the factors of its gradient by name."""

    def function(grad, input, expert_offsets, input_rows, **state):
        factors = Factors(grad, input, expert_offsets, None, input_rows)
        return update(factors=factors, rule=rule, update=step, **state)

    return function


for _name in _SIZES:

    @case(f"expert_wgrad/store {_name}")
    def _(name=_name):
        made, *_ = _wgrad(name, torch.float32)
        return compared(expert_wgrad, made)

    if _name in ("half_empty", "odd tiles"):

        @case(f"expert_wgrad/split accumulate {_name}")
        def _(name=_name):
            made, experts, mask, weight = _wgrad(name)
            function = configured(functools.partial(expert_wgrad, impl="triton"), "expert_wgrad", splits=3)
            return Case(
                function, made | {"experts": experts, "mask": mask, "out": weight[:2].float()}, mutates=("out",)
            )

    # the other epilogues: what differs from `store` is what they read and write beside the product
    if _name in ("skewed", "one_expert", "all_sentinels"):
        continue

    @case(f"expert_wgrad/accumulate {_name}")
    def _(name=_name):
        made, experts, mask, weight = _wgrad(name)
        out = weight[:2].float()
        return compared(expert_wgrad, made | {"experts": experts, "mask": mask, "out": out}, mutates=("out",))

    @case(f"expert_wgrad/sgd {_name}")
    def _(name=_name):
        made, experts, mask, weight = _wgrad(name)
        state = {"weight": weight, "momentum_buffer": torch.zeros_like(weight[:2])}
        function = _updating(expert_wgrad_sgd_, SGD(lr=0.1, momentum=0.9), Update(step=2))
        return compared(function, made | state | {"experts": experts, "mask": mask}, mutates=tuple(state))

    if _name == "odd tiles":  # once, and of few weights: a tile with random bits takes the interpreter long

        @case("expert_wgrad/packed moments")
        def _():
            made, experts, mask, weight = _wgrad("half_empty")
            moments = update_cases.moments(weight[:2].shape, update_cases.PACKED)
            state = {"weight": weight, "exp_avg": moments[0], "exp_avg_sq": moments[1]}
            function = _updating(expert_wgrad_adamw_, AdamW(lr=0.1), Update(step=2, rounding="stochastic"))
            return compared(function, made | state | {"experts": experts, "mask": mask}, mutates=tuple(state))

    @case(f"expert_wgrad/adamw {_name}")
    def _(name=_name):
        made, experts, mask, weight = _wgrad(name)
        state = {"weight": weight, "exp_avg": torch.zeros_like(weight[:2]), "exp_avg_sq": torch.zeros_like(weight[:2])}
        state["master"] = weight[experts].float()
        function = functools.partial(_updating(expert_wgrad_adamw_, AdamW(lr=0.1), Update(step=1)), impl="triton")
        return Case(function, made | state | {"experts": experts, "mask": mask}, mutates=tuple(state))

    @case(f"expert_wgrad/inner {_name}")
    def _(name=_name):
        gradients = [_wgrad(name, seed=seed)[0] for seed in range(2)]
        _, experts, mask, _ = _wgrad(name)

        def function(gradients, experts, mask, impl):
            return expert_wgrad_inner([Factors(**g) for g in gradients], experts=experts, mask=mask, impl=impl)

        return compared(function, {"gradients": gradients, "experts": experts, "mask": mask})


# ---------------------------------------------------------------------------------------------------- token_loss

for _kind in KINDS:
    for _name, _size in {"small": (21, 24, 97), "one token": (1, 7, 5), "tiles": (70, 72, 301)}.items():
        for _dtype in (torch.float32, BF16):

            @case(f"token_loss/{_kind} {_name} {str(_dtype)[6:]}")
            def _(kind=_kind, size=_size, dtype=_dtype):
                made = loss.make(*size, kind=kind, dtype=dtype, seed=1)
                made["labels"][0] = 0
                gradients = tuple(k for k in loss.GRADIENTS if k in made)
                return differentiated(token_loss, made, gradients)


@case("token_loss/nothing counted")
def _():
    made = loss.make(33, 24, 97)
    made["labels"][:] = IGNORED
    return differentiated(token_loss, made, ("hidden_states", "lm_head"))


@case("token_loss/frozen head, zero weights, capped")
def _():
    made = loss.make(70, 24, 97, dtype=BF16)
    return differentiated(token_loss, made, ("hidden_states",), logit_softcap=2.0, logit_scale=0.5)


# ---------------------------------------------------------------------------------------------------------- gram

for _dtype in (torch.float32, BF16):

    @case(f"gram/sets {str(_dtype)[6:]}")
    def _(dtype=_dtype):
        made = functools.partial(gram_cases.normal, dtype=dtype)
        sets = gram_cases.gradient_sets(3, made, {(0, 1), (2, 0)})
        masks = gram_cases.packed(gram_cases.random_masks())
        return Case(lambda sets, masks: gram(sets, masks=masks, impl="triton"), {"sets": sets, "masks": masks})

    @case(f"gram/long {str(_dtype)[6:]}")
    def _(dtype=_dtype):
        sets = [[torch.randn(3, 1000 + 37).to(dtype)] for _ in range(2)]
        return Case(lambda sets: gram(sets, impl="triton"), {"sets": sets})


for _pattern in ("skewed", "half_empty", "sentinels", "all_sentinels"):

    @case(f"gram/factors {_pattern}")
    def _(pattern=_pattern):
        rows, _ = gram_cases.factors(pattern, 2, gram_cases.normal)
        return Case(functools.partial(gram_factors, impl="triton"), rows._asdict())


# -------------------------------------------------------------------------------------------------- weight_score

for _shape in [(3, 5, 7), (1,), (3, 70), (5, 96), (2, 3, 1100)]:
    _what = "x".join(map(str, _shape))

    def _score_case(op, shape, dtype, **options):
        given = dict(zip(("weight", "grad_forget", "grad_retain"), scores.terms(shape, (dtype,) * 3), strict=True))
        return compared(functools.partial(op, gamma=0.7, **options), given, integer_atomics=True)

    CASES |= {
        f"weight_score/high digits {_what}": functools.partial(
            _score_case, score_histogram, _shape, torch.float32, digit=0
        ),
        f"weight_score/low digits {_what}": functools.partial(
            _score_case, score_histogram, _shape, torch.float32, digit=1, prefix=0x3E40
        ),
        f"weight_score/mask {_what}": functools.partial(
            _score_case, score_mask, _shape, BF16, threshold_bits=0x3E400000, ties=1
        ),
    }


@case("weight_score/mask with ties")
def _():
    terms = scores.tied((7, 333))
    bits = int(scores.patterns(terms, 1.0).median())
    function = functools.partial(score_mask, gamma=1.0, threshold_bits=bits, ties=50)
    return compared(function, dict(zip(("weight", "grad_forget", "grad_retain"), terms, strict=True)))


# ------------------------------------------------------------------------------------------------- masked_update

for _shape in [(5, 6, 37), (1, 1), (3, 2, 1030)]:
    for _dtype in (torch.float32, BF16):
        for _masked in (True, False):

            def _update_case(rule, shape, dtype, masked):
                """A rule on two of the parameter's slices, in another order; with a master for narrow weights."""
                randn = functools.partial(update_cases.randn, dtype=dtype)
                slices = torch.tensor([2, 0]) if len(shape) == 3 else None
                compact = (2, *shape[1:]) if len(shape) == 3 else shape
                param = randn(*shape)
                state = {"param": param}
                if rule is masked_sgd_:
                    state |= {"momentum_buffer": randn(*compact, seed=2)}
                    options = {"momentum": 0.9, "nesterov": True}
                else:
                    state |= {"exp_avg": randn(*compact, seed=2), "exp_avg_sq": randn(*compact, seed=3).square()}
                    options = {"weight_decay": 0.1}
                if dtype == BF16 and masked:
                    state["master"] = (param if slices is None else param[slices]).float()
                elif dtype == BF16:
                    options |= {"rounding": "stochastic", "seed": 3, "parameter_id": 5}
                mask = pack_bits(update_cases.random_mask(*compact)) if masked else None
                rest = {"grad": randn(*compact, seed=1), "mask": mask, "slices": slices}
                function = functools.partial(by_keyword(rule), lr=0.1, step=2, impl="triton", **options)
                return Case(function, state | rest, mutates=tuple(state))

            for _rule in (masked_sgd_, masked_adamw_):
                _what = "x".join(map(str, _shape)) + f" {str(_dtype)[6:]}" + (" masked" if _masked else "")
                CASES[f"masked_update/{_rule.__name__[7:-1]} {_what}"] = functools.partial(
                    _update_case, _rule, _shape, _dtype, _masked
                )


@case("masked_update/elements of a vector")
def _():
    """A parameter of one dimension, whose slices are elements, in other strides than its gradient."""
    param = in_layout(update_cases.randn(150), "strided")
    slices = torch.randperm(150, generator=torch.Generator().manual_seed(4))[:70]
    rest = {"grad": update_cases.randn(70, seed=1), "momentum_buffer": None, "mask": None, "slices": slices}
    function = functools.partial(masked_sgd_, rule=SGD(lr=0.5), update=Update(step=1))
    return compared(function, {"param": param, **rest}, mutates=("param",))


@case("masked_update/packed moments of slices")
def _():
    """Blocks of codes, the last of a row a short one; some without a mask bit."""
    shape = (2, 2, 150)
    mask = update_cases.random_mask(*shape)
    mask[..., 64:128], mask[1, 0] = False, False
    exp_avg, exp_avg_sq = update_cases.moments(shape, update_cases.PACKED)
    tensors = {"param": update_cases.randn(3, *shape[1:], dtype=BF16), "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}
    rest = {"grad": update_cases.randn(*shape, seed=1), "mask": pack_bits(mask), "slices": torch.tensor([2, 0])}
    options = {"lr": 0.1, "step": 2, "rounding": "stochastic", "seed": 3, "parameter_id": 5, "impl": "triton"}
    return Case(functools.partial(by_keyword(masked_adamw_), **options), tensors | rest, mutates=tuple(tensors))
