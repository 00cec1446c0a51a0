"""expert_mlp: every layout, gate and routing pattern against the float64 reference, and the known MoE bugs."""

import itertools

import pytest
import torch

from moe_unlearn import backend
from moe_unlearn.ops import Gate, route
from moe_unlearn.ops.gate import activate, activate_backward
from moe_unlearn.testing import LAYOUTS, ROUTINGS, assert_as_accurate, in_layout, integers, poison, routing
from moe_unlearn.testing.yardstick import Reference
from tests.ops.expert_mlp.cases import GATES, GRADIENTS, LAYOUT_FLAGS, case, check, flat, names_of, results, takes
from tests.support.by_keyword import expert_mlp
from tests.support.covers import cover
from tests.support.impls import REF, Impl, impls

IMPLS = impls("expert_mlp")
ANY_GATE = tuple(kind for kind in IMPLS if kind != "cuda")  # CUDA has SwiGLU alone
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
PATTERNS = tuple(pattern for pattern in ROUTINGS if pattern != "all_sentinels")


def dtype_for(impl: Impl) -> torch.dtype:
    """Return the dtype of a test that is about another thing: CUDA has but one."""
    return torch.bfloat16 if impl.kind == "cuda" else torch.float32


@pytest.mark.quick
@cover(takes, indirect=["impl"], impl=IMPLS, pattern=PATTERNS, dtype=DTYPES, top_k=(1, 2, 3), bias=(False, True))
def test_routing_patterns(bias, top_k, dtype, pattern, impl):
    check(impl, case(pattern, inner=40, top_k=top_k, dtype=dtype, bias=bias))


@pytest.mark.quick
@cover(takes, indirect=["impl"], full=True, impl=IMPLS, flags=LAYOUT_FLAGS, bias=(False, True), dtype=DTYPES[:2])
def test_layout_flags(dtype, bias, flags, impl):
    transposed, interleaved, gated = flags
    layout = {"transposed": transposed, "interleaved": interleaved, "gated": gated}
    check(impl, case(inner=40, bias=bias, dtype=dtype, **layout))


@pytest.mark.quick
@cover(takes, indirect=["impl"], impl=IMPLS, gate=GATES, gated=(True, False))
def test_gates(gated, gate, impl):
    check(impl, case(gate=gate, gated=gated, bias=True, seed=3, dtype=dtype_for(impl)))


@pytest.mark.quick
@pytest.mark.parametrize("gate", GATES, ids=str)
@pytest.mark.parametrize("interleaved,gated", [(False, True), (True, True), (False, False)])
def test_derivatives_are_as_accurate_as_autograd(gate, interleaved, gated):
    torch.manual_seed(0)
    z, upstream = torch.randn(64, 96), torch.randn(64, 48 if gated else 96)

    def by_autograd(z, upstream):
        z = z.requires_grad_()
        return torch.autograd.grad(activate(z, gate, interleaved, gated), z, upstream)[0]

    baseline = Reference(lambda: by_autograd(z.clone(), upstream)).baseline()
    gold = by_autograd(z.double(), upstream.double())
    assert_as_accurate(activate_backward(z, upstream, gate, interleaved, gated), baseline, gold)


@pytest.mark.quick
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("gate", [Gate(), Gate("silu", 1.0, 1.5), Gate("relu", limit=1.5)], ids=str)
def test_gradient_is_cut_at_the_clamp_as_torch_cuts_it_and_nan_is_never_lost(gate, gated):
    values = [-torch.inf, -2.0, -1.5, 0.0, 1.5, 2.0, torch.inf, torch.nan]
    z = torch.cartesian_prod(torch.tensor(values), torch.tensor(values)).requires_grad_()
    out = activate(z, gate, gated=gated)
    (expected,) = torch.autograd.grad(out, z, torch.ones_like(out))
    got = activate_backward(z.detach(), torch.ones_like(out), gate, False, gated)
    finite = z.isfinite().all(1)
    assert torch.equal(got[finite] == 0, expected[finite] == 0)
    assert not (expected.isnan() & got.isfinite()).any()
    if gate == Gate():  # nothing is clamped: a token that is NaN must show in both
        assert got[z.isnan().all(1)].isnan().all() and expected[z.isnan().all(1)].isnan().all()


@pytest.mark.quick
@cover(indirect=["impl"], impl=ANY_GATE, layout=LAYOUTS, dtype=DTYPES[:2])
def test_memory_layouts_of_inputs_and_upstream_gradients(dtype, layout, impl):
    arguments = impl.moved(case(bias=True, dtype=dtype))
    moved = {k: in_layout(v, layout) if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}
    check(impl, moved, gradient_layout=layout)
    expanded = arguments | {"hidden_states": arguments["hidden_states"][:1].expand(19, -1)}
    check(impl, expanded, gradient_layout=layout)


@pytest.mark.quick
def test_expanded_upstream_gradient():
    arguments = case()
    x = arguments["hidden_states"].requires_grad_()
    (a,) = torch.autograd.grad(expert_mlp(**arguments).sum(), x)
    (b,) = torch.autograd.grad((expert_mlp(**arguments) * torch.ones(19, 24)).sum(), x)
    assert torch.equal(a, b)


@pytest.mark.quick
@cover(indirect=["impl"], impl=IMPLS, size=((1, 5, 1), (1, 5, 5), (33, 1, 1), (1, 40, 16)))
def test_few_tokens_and_many_experts(size, impl):
    tokens, experts, top_k = size
    check(impl, case("uniform", tokens, experts=experts, top_k=top_k, bias=True, dtype=dtype_for(impl)))


@pytest.mark.quick
def test_no_token(impl):
    arguments = case("uniform", tokens=0, top_k=5, bias=True, dtype=torch.bfloat16)
    out, *grads = results(impl, arguments)
    assert out.shape == (0, 24)
    for name, grad in zip(names_of(arguments, impl), grads, strict=True):
        assert grad.shape == arguments[name].shape and not grad.any()


@pytest.mark.quick
@cover(takes, indirect=["impl"], impl=IMPLS, weights=(*DTYPES, torch.float64))
def test_routing_weights_of_their_own_dtype(weights, impl):
    arguments = case(dtype=torch.bfloat16 if weights == torch.float32 else dtype_for(impl))
    arguments["top_k_weights"] = arguments["top_k_weights"].to(weights)
    check(impl, arguments)
    out, _, grad, *_ = results(impl, arguments)
    assert out.dtype == arguments["hidden_states"].dtype and grad.dtype == weights


@pytest.mark.quick
@cover(
    indirect=["impl"],
    impl=ANY_GATE,
    transposed=(False, True),
    interleaved=(False, True),
    bias=(False, True),
)
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_integers_are_exact(dtype, bias, interleaved, transposed, impl):
    """relu on small integers: any order of additions must give the same bits, forward and in float32 backward."""
    layout = {"transposed": transposed, "interleaved": interleaved, "gate": Gate("relu")}
    arguments = case("sentinels", 40, 40, 33, bias=bias, **layout)
    names = names_of(arguments)
    low = 1 if dtype == torch.bfloat16 else 3  # so that bfloat16 holds every sum
    arguments |= {k: integers(*arguments[k].shape, seed=len(k), low=-low, high=low, dtype=dtype) for k in names}
    if dtype == torch.bfloat16:
        for name in ("gate_up_proj", "down_proj"):
            arguments[name] *= (torch.rand(arguments[name].shape) < 0.1).to(dtype)
    wide = {k: v.double() if k in names else v for k, v in arguments.items()}
    with poison():
        got, expected = results(impl, arguments, exact=True), results(REF, wide, exact=True)
    for name, a, b in zip(("output", *names), got, expected, strict=True):
        assert torch.equal(a.double(), b) or (name != "output" and dtype == torch.bfloat16), name


@pytest.mark.quick
@pytest.mark.parametrize("pattern", ["first_empty", "last_empty", "half_empty", "one_expert"])
def test_an_empty_expert_has_exactly_zero_gradient(pattern):
    arguments = case(pattern, bias=True)
    leaves = [arguments[k].requires_grad_() for k in ("gate_up_proj", "down_proj", "gate_up_bias", "down_bias")]
    with poison():
        grads = torch.autograd.grad(expert_mlp(**arguments), leaves, torch.randn(19, 24))
    rows = arguments["expert_offsets"].diff()
    for grad in grads:
        assert (grad[rows == 0] == 0).all() and (grad[rows > 0].flatten(1) != 0).any(1).all()


@pytest.mark.quick
@cover(takes, indirect=["impl"], impl=IMPLS, pattern=("sentinels", "all_sentinels"), dtype=DTYPES[:2])
def test_sentinel_rows_contribute_nothing_even_with_nan_weights(dtype, pattern, impl):
    arguments = case(pattern, bias=True, dtype=dtype)
    away = routing(pattern, 19, 5, 2) == 5
    clean = results(impl, arguments | {"top_k_weights": arguments["top_k_weights"].masked_fill(away, 0.0)})
    arguments["top_k_weights"] = arguments["top_k_weights"].masked_fill(away, torch.nan)
    with poison():
        got = results(impl, arguments)
    for a, b in zip(got, clean, strict=True):
        assert torch.equal(a, b) and a.isfinite().all()
    assert not got[2][away].any()
    assert pattern == "sentinels" or not any(values.any() for values in got)


@pytest.mark.quick
@cover(takes, indirect=["impl"], impl=IMPLS, dtype=DTYPES[:2])
def test_a_nan_token_stays_in_its_row(dtype, impl):
    arguments = case("uniform", dtype=dtype)
    arguments["hidden_states"][7] = torch.nan
    for rows in results(impl, arguments)[:2]:
        assert rows[7].isnan().all() and rows[torch.arange(19) != 7].isfinite().all()


@pytest.mark.quick
def test_only_what_is_asked_for_is_computed(monkeypatch):
    calls = []
    real = backend._kernels["expert_wgrad", "ref"]
    monkeypatch.setitem(backend._kernels, ("expert_wgrad", "ref"), lambda *a: calls.append(a[0].shape) or real(*a))
    arguments = case(bias=True)
    x = arguments["hidden_states"].requires_grad_()
    expert_mlp(**arguments, impl="ref").sum().backward()
    assert calls == [] and x.grad is not None
    arguments["down_proj"].requires_grad_()
    expert_mlp(**arguments, impl="ref").sum().backward()
    assert len(calls) == 1


@pytest.mark.quick
def test_runs_repeat_bitwise_and_inputs_are_untouched():
    arguments = case(bias=True, dtype=torch.bfloat16)
    copies = {k: v.clone() for k, v in arguments.items() if isinstance(v, torch.Tensor)}
    first = expert_mlp(**arguments)
    for _ in range(20):
        assert torch.equal(expert_mlp(**arguments), first)
    assert all(torch.equal(arguments[k], v) for k, v in copies.items())


@pytest.mark.quick
def test_permuting_tokens_permutes_the_output():
    index = routing("uniform", 19, 5, 2)
    arguments = case("uniform", gate=Gate("relu"))
    for k in GRADIENTS:
        arguments[k] = integers(*arguments[k].shape, seed=len(k))
    order = torch.randperm(19)
    made = route(index[order], 5)
    moved = arguments | {
        "hidden_states": arguments["hidden_states"][order],
        "top_k_weights": arguments["top_k_weights"][order],
        "sorted_rows": made.sorted_rows,
        "expert_offsets": made.expert_offsets,
    }
    assert torch.equal(expert_mlp(**moved), expert_mlp(**arguments)[order])


WEIGHTS = ("gate_up_proj", "down_proj", "gate_up_bias", "down_bias")


@pytest.mark.quick
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("trained", [[1, 3], [4, 0], [], [0, 1, 2, 3, 4]], ids=str)
def test_only_trained_experts_get_a_gradient(trained, transposed):
    arguments = case(bias=True, transposed=transposed)
    names = (*GRADIENTS, "gate_up_bias", "down_bias")
    leaves = [arguments[k].requires_grad_() for k in names]
    upstream = torch.randn(19, 24)
    everything = torch.autograd.grad(expert_mlp(**arguments), leaves, upstream)
    arguments["trained_experts"] = torch.tensor(trained, dtype=torch.int32)
    with poison():
        got = torch.autograd.grad(expert_mlp(**arguments), leaves, upstream)
    for name, a, b in zip(names, got, everything, strict=True):
        if name in WEIGHTS:
            frozen = torch.ones(5, dtype=torch.bool)
            frozen[trained] = False
            b = b.masked_fill(frozen.view(-1, *[1] * (b.dim() - 1)), 0)
        assert torch.equal(a, b), name


@pytest.mark.quick
@pytest.mark.parametrize("wanted", [c for n in (1, 2, 3) for c in itertools.combinations(range(6), n)], ids=str)
def test_any_subset_of_gradients_is_the_same_gradients(wanted):
    arguments = case("sentinels", bias=True)
    names = (*GRADIENTS, "gate_up_bias", "down_bias")
    upstream = torch.randn(19, 24)
    leaves = [arguments[k].requires_grad_() for k in names]
    everything = torch.autograd.grad(expert_mlp(**arguments), leaves, upstream)
    for i, leaf in enumerate(leaves):
        leaf.requires_grad_(i in wanted)
    got = torch.autograd.grad(expert_mlp(**arguments), [leaves[i] for i in wanted], upstream)
    assert all(torch.equal(g, everything[i]) for i, g in zip(wanted, got, strict=True))


@pytest.mark.quick
def test_autocast_computes_in_its_dtype_and_gives_gradients_in_the_weights_own():
    arguments = case(bias=True)
    names = (*GRADIENTS, "gate_up_bias", "down_bias")
    leaves = [arguments[k].requires_grad_() for k in names]
    with torch.autocast("cpu", torch.bfloat16):
        out = expert_mlp(**arguments)
    upstream = torch.randn(19, 24).bfloat16().float()
    got = torch.autograd.grad(out, leaves, upstream)
    narrow = {k: v.detach().bfloat16().requires_grad_() if k in names else v for k, v in arguments.items()}
    narrow["top_k_weights"] = arguments["top_k_weights"]
    plain = expert_mlp(**narrow)
    expected = torch.autograd.grad(plain, [narrow[k] for k in names], upstream.bfloat16())
    assert out.dtype == torch.float32 and torch.equal(out, plain.float())
    assert all(a.dtype == torch.float32 and torch.equal(a, b.float()) for a, b in zip(got, expected, strict=True))
    with torch.autocast("cpu", torch.bfloat16):
        wide = {k: v.double() if k in names else v for k, v in arguments.items()}
        assert expert_mlp(**wide).dtype == torch.float64


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("pattern", ["skewed", "sentinels"])
def test_opcheck(pattern, bias):
    arguments = case(pattern, bias=bias, tokens=7)
    for k in GRADIENTS:
        arguments[k].requires_grad_()
    if bias:
        arguments["trained_experts"] = torch.tensor([1, 3], dtype=torch.int32)
    torch.library.opcheck(torch.ops.moe_unlearn.expert_mlp.default, flat(arguments))


@pytest.mark.parametrize(
    "needs", [[True] * 5, [True, False, False, False, False], [False, False, False, True, True]], ids=str
)
def test_opcheck_of_the_backward(needs):
    arguments = case("sentinels", bias=True, tokens=7)
    x, weights, rows, offsets, w1, w2, _, b2, _, *options, impl = flat(arguments)
    z = torch.ops.moe_unlearn.expert_mlp(*flat(arguments))[1]
    wanted = needs
    values = (torch.randn(7, 24), x, weights, rows, offsets, w1, w2, b2, z, *options, wanted, impl)
    torch.library.opcheck(torch.ops.moe_unlearn.expert_mlp_backward.default, values)


@pytest.mark.parametrize("transposed", [False, True])
def test_gradcheck_in_float64(transposed):
    arguments = case(tokens=5, hidden=6, inner=4, experts=3, bias=True, dtype=torch.float64, transposed=transposed)
    names = [*GRADIENTS, "gate_up_bias", "down_bias"]

    def function(*values):
        return expert_mlp(**arguments | dict(zip(names, values, strict=True)))

    assert torch.autograd.gradcheck(function, [arguments[n].requires_grad_() for n in names])


@pytest.mark.slow
@pytest.mark.parametrize("impl", ANY_GATE, indirect=True)
def test_compiles_without_graph_breaks(impl):
    arguments = impl.moved(case(bias=True))
    leaves = [arguments[k].requires_grad_() for k in GRADIENTS]
    compiled = torch.compile(lambda: expert_mlp(**arguments, impl=impl.name), fullgraph=True, backend="aot_eager")
    upstream = impl.moved(torch.randn(19, 24))
    ours = torch.autograd.grad(compiled(), leaves, upstream)
    theirs = torch.autograd.grad(expert_mlp(**arguments, impl=impl.name), leaves, upstream)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.quick
def test_double_backward_is_refused():
    arguments = case()
    x = arguments["hidden_states"].requires_grad_()
    (grad,) = torch.autograd.grad(expert_mlp(**arguments).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="no double backward"):
        grad.sum().backward()


BAD = {
    "hidden dim": ({"hidden_states": torch.randn(19, 2, 12)}, ValueError, r"hidden_states must be float \[T, H\]"),
    "hidden int": ({"hidden_states": torch.ones(19, 24, dtype=torch.int64)}, ValueError, "hidden_states must be float"),
    "weights rows": ({"top_k_weights": torch.rand(18, 2)}, ValueError, r"must be \[19, 2\]; got \[18, 2\]"),
    "K = 0": ({"top_k_weights": torch.rand(19, 0)}, ValueError, "K >= 1"),
    "trained": ({"trained_experts": torch.tensor([0])}, TypeError, "trained_experts must be int32"),
    "rows dtype": ({"sorted_rows": torch.zeros(38, dtype=torch.int64)}, TypeError, "sorted_rows must be int32"),
    "rows size": ({"sorted_rows": torch.zeros(37, dtype=torch.int32)}, ValueError, r"sorted_rows must be \[38\]"),
    "offsets size": ({"expert_offsets": torch.zeros(5).int()}, ValueError, r"expert_offsets must be \[6\]"),
    "w1 shape": ({"gate_up_proj": torch.randn(5, 24, 32)}, ValueError, r"gate_up_proj must be \[5, 32, 24\]"),
    "w2 dtype": ({"down_proj": torch.randn(5, 24, 16).double()}, TypeError, "down_proj must be torch.float32"),
    "w dims": ({"down_proj": torch.randn(24, 16)}, ValueError, "three dimensions"),
    "bias": ({"down_bias": torch.randn(5, 23)}, ValueError, r"down_bias must be \[5, 24\]; got \[5, 23\]"),
    "gate": ({"gate": Gate("swish")}, ValueError, "'swish'"),
    "impl": ({"impl": "cuda"}, RuntimeError, "no implementation cuda"),
    "impl name": ({"impl": "fast"}, ValueError, "'fast'"),
    "device": ({"down_proj": torch.randn(5, 24, 16, device="meta")}, ValueError, "must be on cpu"),
}


@pytest.mark.quick
@pytest.mark.parametrize("change,error,message", BAD.values(), ids=BAD)
def test_bad_inputs(change, error, message):
    with pytest.raises(error, match=message):
        expert_mlp(**case() | change)
