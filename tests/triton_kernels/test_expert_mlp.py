"""expert_mlp by its Triton kernels: every layout, gate and routing pattern against the float64 reference."""

import functools

import pytest
import torch

from moe_unlearn.ops import Gate, expert_mlp, expert_mlp_ref
from moe_unlearn.testing import LAYOUTS, ROUTINGS, check_against_ref, in_layout, integers, poison
from tests.ops.test_expert_mlp import GATES, GPT_OSS, GRADIENTS, LAYOUT_FLAGS, case

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
triton_mlp = functools.partial(expert_mlp, impl="triton")


@pytest.fixture(autouse=True, params=[80, 90], ids=["sm_80", "sm_90"])
def architecture(request, monkeypatch):
    """On a GPU both variants, pointers and persistent programs with descriptors, run as well if it is Hopper."""
    if torch.cuda.is_available() and torch.cuda.get_device_capability()[0] * 10 < request.param:
        pytest.skip(f"sm_{request.param} kernels do not run on this GPU")
    monkeypatch.setenv("MOE_UNLEARN_TRITON_ARCH", str(request.param))


def on(device, arguments):
    return {k: v.to(device) if torch.is_tensor(v) else v for k, v in arguments.items()}


def check(device, arguments, **keywords):
    gradients = GRADIENTS + (("gate_up_bias", "down_bias") if "down_bias" in arguments else ())
    with poison():
        check_against_ref(triton_mlp, expert_mlp_ref, on(device, arguments), gradients=gradients, **keywords)


@pytest.mark.quick
@pytest.mark.parametrize("pattern", [p for p in ROUTINGS if p != "all_sentinels"])
@pytest.mark.parametrize("top_k", [1, 2])
def test_routing_patterns(device, pattern, top_k):
    # enough rows that no single one, whose slope may be next to zero, makes up a row of a weight gradient
    check(device, case(pattern, tokens=61, top_k=top_k, bias=True))


# transposed, interleaved, bias, gated
@pytest.mark.parametrize("flags", LAYOUT_FLAGS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layout_flags(device, flags, dtype):
    transposed, interleaved, bias, gated = flags
    check(device, case(transposed=transposed, interleaved=interleaved, bias=bias, gated=gated, dtype=dtype))


@pytest.mark.parametrize("gate", GATES, ids=str)
@pytest.mark.parametrize("gated", [True, False])
def test_gates(device, gate, gated):
    check(device, case(gate=gate, gated=gated, bias=True, seed=3))


# several tiles of rows, of columns and of depth; the second shape is no multiple of 8, so no descriptor can name it
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("hidden,inner", [(320, 272), (131, 149)])
@pytest.mark.parametrize("flags", [(False, False), (True, True)], ids=["Qwen", "gpt-oss"])
def test_several_tiles(device, dtype, hidden, inner, flags):
    transposed, interleaved = flags
    gate = GPT_OSS if interleaved else Gate()
    shape = {"tokens": 150, "hidden": hidden, "inner": inner, "experts": 3, "top_k": 2}
    check(device, case(**shape, dtype=dtype, transposed=transposed, interleaved=interleaved, gate=gate, bias=True))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_memory_layouts_of_inputs_and_upstream_gradients(device, layout, dtype):
    arguments = on(device, case(bias=True, dtype=dtype))
    moved = {k: in_layout(v, layout) if torch.is_tensor(v) else v for k, v in arguments.items()}
    check(device, moved, gradient_layout=layout)
    expanded = arguments | {"hidden_states": arguments["hidden_states"][:1].expand(19, -1)}
    check(device, expanded, gradient_layout=layout)


@pytest.mark.quick
@pytest.mark.parametrize("tokens,experts,top_k", [(1, 5, 1), (1, 5, 5), (19, 1, 1), (130, 1, 1)])
def test_one_token_and_one_expert(device, tokens, experts, top_k):
    check(device, case("uniform", tokens=tokens, experts=experts, top_k=top_k, bias=True))


def test_no_token(device):
    arguments = on(device, case("uniform", tokens=0, bias=True))
    leaves = [arguments[k].requires_grad_() for k in GRADIENTS]
    out = triton_mlp(**arguments)
    assert out.shape == (0, 24)
    for leaf, grad in zip(leaves, torch.autograd.grad(out.sum(), leaves), strict=True):
        assert grad.shape == leaf.shape and (grad == 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_float32_routing_weights_in_a_narrow_layer(device, dtype):
    arguments = case(dtype=dtype)
    arguments["top_k_weights"] = torch.rand(19, 2) + 0.1
    check(device, arguments)


@pytest.mark.quick
@pytest.mark.parametrize("flags", LAYOUT_FLAGS, ids=str)
def test_integers_are_exact(device, flags):
    """relu on small integers: any order of additions must give the same bits, forward and backward."""
    transposed, interleaved, bias, gated = flags
    arguments = case("sentinels", transposed=transposed, interleaved=interleaved, bias=bias, gated=gated,
                     gate=Gate("relu"))  # fmt: skip
    names = GRADIENTS + (("gate_up_bias", "down_bias") if bias else ())
    for k in names:
        arguments[k] = integers(*arguments[k].shape, seed=len(k))
    arguments, upstream = on(device, arguments), integers(19, 24, seed=9).to(device)
    results = []
    for function, wide in ((triton_mlp, torch.float32), (expert_mlp_ref, torch.float64)):
        leaves = {k: v.to(wide).requires_grad_() if k in names else v for k, v in arguments.items()}
        out = function(**leaves)
        grads = torch.autograd.grad(out, [leaves[k] for k in names], upstream.to(wide))
        results.append([t.double() for t in (out, *grads)])
    for name, ours, exact in zip(("output", *names), *results, strict=True):
        assert torch.equal(ours, exact), name


@pytest.mark.quick
@pytest.mark.parametrize("pattern", ["first_empty", "last_empty", "half_empty", "one_expert"])
def test_an_empty_expert_has_exactly_zero_gradient(device, pattern):
    arguments = on(device, case(pattern, bias=True))
    leaves = [arguments[k].requires_grad_() for k in ("gate_up_proj", "down_proj", "gate_up_bias", "down_bias")]
    with poison():
        grads = torch.autograd.grad(triton_mlp(**arguments), leaves, torch.randn(19, 24).to(device))
    rows = arguments["expert_offsets"].diff()
    for grad in grads:
        assert (grad[rows == 0] == 0).all() and (grad[rows > 0].flatten(1) != 0).any(1).all()


@pytest.mark.quick
@pytest.mark.parametrize("pattern", ["sentinels", "all_sentinels"])
def test_sentinel_rows_contribute_nothing_even_with_nan_weights(device, pattern):
    arguments = on(device, case(pattern, bias=True))
    rows, offsets = arguments["sorted_rows"].long(), arguments["expert_offsets"]
    behind = rows[int(offsets[-1]) :]
    assert len(behind)
    results = []
    for value in (0.5, torch.nan):
        weights = arguments["top_k_weights"].clone()
        weights.view(-1)[behind] = value
        leaves = {k: (weights if k == "top_k_weights" else arguments[k]).clone().requires_grad_() for k in GRADIENTS}
        with poison():
            out = triton_mlp(**arguments | leaves)
            grads = torch.autograd.grad(out, list(leaves.values()), torch.ones_like(out))
        results.append((out, *grads))
        assert (grads[1].view(-1)[behind] == 0).all()
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b) and a.isfinite().all()


@pytest.mark.parametrize("wanted", [(k,) for k in GRADIENTS] + [("hidden_states", "down_proj")], ids=str)
def test_only_what_is_asked_for(device, wanted):
    """A gradient does not depend on which others are computed beside it."""
    arguments = on(device, case(dtype=torch.bfloat16))
    upstream = torch.randn(19, 24).bfloat16().to(device)

    def gradients(names):
        leaves = {k: v.detach().requires_grad_() if k in names else v for k, v in arguments.items()}
        return dict(zip(names, torch.autograd.grad(triton_mlp(**leaves), [leaves[k] for k in names], upstream), strict=True))

    alone, together = gradients(wanted), gradients(GRADIENTS)
    assert all(torch.equal(alone[k], together[k]) for k in wanted)


def test_the_same_bits_again_and_inputs_untouched(device):
    arguments = on(device, case("skewed", tokens=70, dtype=torch.bfloat16, bias=True))
    before = {k: v.clone() for k, v in arguments.items() if torch.is_tensor(v)}
    leaves = {k: arguments[k].requires_grad_() for k in GRADIENTS}
    runs = []
    for _ in range(3):
        out = triton_mlp(**arguments)
        runs.append((out, *torch.autograd.grad(out.square().sum(), list(leaves.values()))))
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(runs[0], run, strict=True))
    assert all(torch.equal(before[k], arguments[k]) for k in before)


def test_one_graph(device):
    arguments = on(device, case(bias=True))
    leaves = [arguments[k].requires_grad_() for k in GRADIENTS]
    compiled = torch.compile(lambda: triton_mlp(**arguments), fullgraph=True, backend="aot_eager")
    out, plain = compiled(), triton_mlp(**arguments)
    assert torch.equal(out, plain)
    for a, b in zip(*(torch.autograd.grad(o.square().sum(), leaves) for o in (out, plain)), strict=True):
        assert torch.equal(a, b)
