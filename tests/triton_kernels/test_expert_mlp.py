"""expert_mlp in Triton: both passes against the reference, every layout, gate and routing pattern.

Most tests shrink the tiles of `configs`, so that small shapes have several, with tails, in each direction;
`test_shipped_tiles` takes them as they are. Each call takes the interpreter a good part of a second, so properties that
live in different code are combined, not multiplied: gates know nothing of the architecture, routing nothing of dtypes.
"""

import functools
import itertools

import pytest
import torch

from moe_unlearn.ops import Gate
from moe_unlearn.ops.expert_mlp import largest_of
from moe_unlearn.testing import LAYOUTS, ROUTINGS, check_against_ref, in_layout, integers, poison
from moe_unlearn.triton_kernels import configs
from tests.ops.expert_mlp.cases import (
    ALL,
    GATES,
    GPT_OSS,
    GRADIENTS,
    LAYOUT_FLAGS,
    backward,
    backward_case,
    case,
    forward,
    gradients,
    names_of,
    on,
)
from tests.support.by_keyword import expert_mlp, expert_mlp_ref
from tests.support.covers import cover, pairwise
from tests.triton_kernels import tiles

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
DTYPES = (BF16, FP16, FP32)
ARCHITECTURES = (80, 90)
# each alone, and every two of them wanted together, one of them alone and neither
NEEDS = [tuple(i == j for j in range(5)) for i in range(5)]
NEEDS += [tuple(case.values()) for case in pairwise({f"need {i}": (False, True) for i in range(5)})]
NEEDS = sorted(set(NEEDS) - {ALL})
# one and a half tiles of depth and of columns, 16 bytes long in every dtype, as descriptors need them
SHAPE = {"tokens": 19, "hidden": 24, "inner": 24, "experts": 3, "top_k": 2}
triton_mlp = functools.partial(expert_mlp, impl="triton")


@pytest.fixture
def small_tiles(monkeypatch):
    """On architecture `use(arch)`."""

    return lambda arch: tiles.expert_mlp(monkeypatch, arch)


@pytest.fixture(params=ARCHITECTURES, ids=["sm_80", "sm_90"])
def arch(request, small_tiles):
    small_tiles(request.param)
    return request.param


def check(device, arguments, layout="contiguous"):
    """Output, z, and what both passes leave to expert_wgrad, in memory full of NaN."""
    both = backward_case(device, arguments, layout)
    for function, values in ((forward, on(device, arguments)), (gradients, both)):
        with poison():
            check_against_ref(functools.partial(function, "triton"), functools.partial(function, "ref"), values)


@pytest.mark.parametrize("gated,interleaved,transposed", list(itertools.product([True, False], repeat=3)))
def test_layouts(device, arch, gated, interleaved, transposed):
    turn = gated + interleaved + transposed + arch // 10
    flags = {"gated": gated, "interleaved": interleaved, "transposed": transposed, "bias": turn % 2 == 0}
    check(device, case(**SHAPE, **flags, dtype=DTYPES[turn % 3]))


ROUTED = [(p, 1 + i % 3, ARCHITECTURES[i % 2]) for i, p in enumerate(ROUTINGS)]


@pytest.mark.quick
@pytest.mark.parametrize("pattern,top_k,on_arch", [*ROUTED, ("skewed", 3, 90)])
@pytest.mark.slow
def test_routing_patterns(device, small_tiles, pattern, top_k, on_arch):
    small_tiles(on_arch)
    check(device, case(pattern, **SHAPE | {"top_k": top_k, "experts": 4}, bias=True))


# one tile: the formulas, not the layout, are at stake
@pytest.mark.parametrize("gate", [*GATES, Gate("gelu_tanh", 1.702, 0.7, 1.0)], ids=str)
@pytest.mark.parametrize("gated", [True, False])
def test_gates(device, small_tiles, gate, gated):
    small_tiles(80)
    check(device, case("uniform", 16, 16, 16, experts=1, top_k=1, gate=gate, gated=gated, bias=True, seed=3))


@pytest.mark.quick
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("gate", [Gate(), Gate("silu", 1.0, 1.5), Gate("relu", limit=1.5), Gate("gelu_tanh")], ids=str)
def test_gradient_is_cut_at_the_clamp_as_torch_cuts_it_and_nan_is_never_lost(device, small_tiles, gate, gated):
    """z takes every pair of special values; da is 1, so that dz is the derivative itself."""
    small_tiles(80)
    values = torch.tensor([-2.0, -1.5, 0.0, 1.5, 2.0, torch.nan])
    z = torch.cartesian_prod(values, values) if gated else values[:, None]
    arguments = case("uniform", len(z), 16, 1, experts=1, top_k=1, gate=gate, gated=gated)
    arguments |= {"top_k_weights": torch.ones(len(z), 1), "down_proj": torch.eye(16, 1)[None]}
    arguments = on(device, arguments | {"z": z, "grad_out": torch.ones(len(z), 16)})
    ours, reference = (backward(impl, **arguments) for impl in ("triton", "ref"))
    for name, a, b in zip(("dz", "scaled", "largest"), ours[2:], reference[2:], strict=True):
        assert torch.equal(a.isnan(), b.isnan()), name
        assert torch.equal(a == 0, b == 0), name


@pytest.mark.quick
@cover(value=(torch.nan, -torch.inf, 3e38), halves=((True, False), (True, True), (False, False)), place=(0, 17, 31))
@pytest.mark.slow
def test_the_largest_values_are_those_of_one_place(device, small_tiles, halves, value, place):
    """A weight of one row, or a gradient of one token, makes the largest; which it is says NaN and infinity too."""
    gated, interleaved = halves
    small_tiles(80 if place else 90)
    arguments = case("uniform", 32, 24, 20, experts=3, top_k=1, gated=gated, interleaved=interleaved)
    arguments["top_k_weights"][place] = value
    both = backward_case(device, arguments)
    *_, dz, scaled, largest = backward("triton", **both)
    assert torch.equal(largest.nan_to_num(), largest_of(dz, scaled).nan_to_num()) and largest.dtype == FP32
    assert bool(largest[1].isnan()) == (value != value) and not bool((largest == 0).any())
    assert largest[1].isnan() or largest[1] > 1e36


# two tiles of columns in each product, and of rows in one expert
WIDE = {"hidden": 272, "inner": 144, "experts": 2, "top_k": 1, "bias": True}
PAIRS = {"transposed": True, "interleaved": True, "gate": GPT_OSS}
SHIPPED = {
    "sm_80": (80, WIDE | {"tokens": 150, "dtype": BF16}),
    "sm_80, pairs": (80, WIDE | PAIRS | {"tokens": 150, "dtype": FP16}),
    "sm_90": (90, WIDE | {"tokens": 150, "dtype": BF16}),
    "sm_90, pairs": (90, WIDE | PAIRS | {"tokens": 150, "dtype": BF16}),
    "sm_90, few rows": (90, WIDE | {"tokens": 70, "gated": False, "dtype": FP16}),
    # no multiple of 16 bytes: no descriptor can name it
    "sm_90, odd": (90, WIDE | {"tokens": 150, "hidden": 131, "inner": 149, "dtype": BF16}),
    "sm_90, pairs, odd": (90, WIDE | PAIRS | {"tokens": 70, "hidden": 131, "inner": 149, "dtype": BF16}),
    "sm_100": (100, WIDE | {"tokens": 150, "dtype": BF16}),
    "float32": (90, WIDE | {"tokens": 70, "hidden": 131, "inner": 77, "dtype": FP32}),
}


@pytest.mark.parametrize("on_arch,arguments", SHIPPED.values(), ids=SHIPPED)
def test_shipped_tiles(device, monkeypatch, on_arch, arguments):
    if device.type == "cuda" and torch.cuda.get_device_capability()[0] * 10 < on_arch:
        pytest.skip(f"tiles for sm_{on_arch} do not fit this GPU")
    monkeypatch.setenv("MOE_UNLEARN_TRITON_ARCH", str(on_arch))
    check(device, case("uniform", **arguments))


@pytest.mark.parametrize("layout", [layout for layout in LAYOUTS if layout != "contiguous"])
def test_memory_layouts_of_inputs_and_upstream_gradients(device, small_tiles, layout):
    small_tiles(90)  # what no descriptor can name goes by pointers
    arguments = on(device, case(**SHAPE, bias=True, dtype=BF16))
    moved = {k: in_layout(v, layout) if torch.is_tensor(v) else v for k, v in arguments.items()}
    check(device, moved, layout)


@pytest.mark.quick
@pytest.mark.slow
def test_expanded_inputs(device, small_tiles):
    """One token, one expert and one gradient, each many times in the same memory."""
    small_tiles(90)
    arguments = on(device, case(**SHAPE))
    for name in ("hidden_states", "gate_up_proj", "down_proj"):
        arguments[name] = arguments[name][:1].expand_as(arguments[name])
    grad_out = torch.randn(1, 1, generator=torch.Generator().manual_seed(1)).to(device).expand(19, 24)
    both = backward_case(device, arguments) | {"grad_out": grad_out}
    check_against_ref(functools.partial(forward, "triton"), functools.partial(forward, "ref"), arguments)
    check_against_ref(functools.partial(backward, "triton"), functools.partial(backward, "ref"), both)


@pytest.mark.quick
@pytest.mark.parametrize(
    "tokens,experts,top_k,on_arch", [(1, 5, 1, 90), (1, 5, 5, 80), (33, 1, 1, 80), (1, 40, 16, 90)]
)
@pytest.mark.slow(but=1)
def test_few_tokens_and_many_experts(device, small_tiles, tokens, experts, top_k, on_arch):
    small_tiles(on_arch)
    check(device, case("uniform", tokens, experts=experts, top_k=top_k, bias=True))


@pytest.mark.quick
def test_no_token(device, small_tiles):
    small_tiles(90)
    arguments = on(device, case("uniform", tokens=0, bias=True))
    leaves = [arguments[k].requires_grad_() for k in GRADIENTS]
    out = triton_mlp(**arguments)
    assert out.shape == (0, 24)
    for leaf, grad in zip(leaves, torch.autograd.grad(out.sum(), leaves), strict=True):
        assert grad.shape == leaf.shape and (grad == 0).all()


@pytest.mark.parametrize("dtype,on_arch", [(BF16, 90), (FP16, 80)], ids=str)
def test_float32_routing_weights_in_a_narrow_layer(device, small_tiles, dtype, on_arch):
    small_tiles(on_arch)
    arguments = case(**SHAPE, dtype=dtype)
    arguments["top_k_weights"] = torch.rand(19, 2, generator=torch.Generator().manual_seed(0)) + 0.1
    check(device, arguments)


# the flags once more, with the weight gradients of the public op
@pytest.mark.parametrize("flags", LAYOUT_FLAGS[1::2], ids=str)
def test_integers_are_exact(device, small_tiles, flags):
    """relu on small integers: any order of additions must give the same bits, forward and backward."""
    transposed, interleaved, bias, gated = flags
    small_tiles(ARCHITECTURES[sum(flags) % 2])
    layout = {"transposed": transposed, "interleaved": interleaved, "gated": gated, "gate": Gate("relu")}
    arguments = case("sentinels", **SHAPE, bias=bias, **layout)
    names = names_of(arguments)
    for k in names:
        arguments[k] = integers(*arguments[k].shape, seed=len(k))
    arguments, upstream = on(device, arguments), integers(19, 24, seed=9).to(device)
    results = []
    for function, wide in ((triton_mlp, torch.float32), (expert_mlp_ref, torch.float64)):
        leaves = {k: v.to(wide).requires_grad_() if k in names else v for k, v in arguments.items()}
        with poison():
            out = function(**leaves)
            grads = torch.autograd.grad(out, [leaves[k] for k in names], upstream.to(wide))
        results.append([t.double() for t in (out, *grads)])
    for name, ours, exact in zip(("output", *names), *results, strict=True):
        assert torch.equal(ours, exact), name


@pytest.mark.parametrize("dtype,on_arch", [(BF16, 80), (FP32, 90)], ids=str)
def test_gradients_of_the_public_op(device, small_tiles, dtype, on_arch):
    small_tiles(on_arch)
    # enough rows that no single one, whose slope may be next to zero, makes up a row of a weight gradient
    arguments = on(device, case("uniform", **SHAPE | {"tokens": 40, "experts": 2}, bias=True, dtype=dtype))
    with poison():
        biased = (*GRADIENTS, "gate_up_bias", "down_bias")
        check_against_ref(triton_mlp, expert_mlp_ref, arguments, gradients=biased)


@pytest.mark.quick
@pytest.mark.parametrize(
    "pattern,interleaved,on_arch", [("sentinels", False, 80), ("sentinels", True, 90), ("all_sentinels", True, 80)]
)
@pytest.mark.slow
def test_rows_behind_the_last_expert_come_out_as_zero_whatever_they_hold(
    device, small_tiles, pattern, interleaved, on_arch
):
    small_tiles(on_arch)
    arguments = on(device, case(pattern, **SHAPE, bias=True, interleaved=interleaved))
    count = int(arguments["expert_offsets"][-1])
    behind = arguments["sorted_rows"][count:].long()
    assert len(behind)
    results = []
    for value in (0.5, torch.nan):
        arguments["top_k_weights"].view(-1)[behind] = value
        both = backward_case(device, arguments)
        both["z"][count:] = value
        with poison():
            results.append((*forward("triton", **arguments), *backward("triton", **both)))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b) and a.isfinite().all()
    out, z, d_x, d_weights, dz, scaled, largest = results[1]
    assert (d_weights.view(-1)[behind] == 0).all()
    assert all((rows[count:] == 0).all() for rows in (z, dz, scaled))
    if pattern == "all_sentinels":
        assert (out == 0).all() and (d_x == 0).all()


@pytest.mark.quick
@pytest.mark.slow
def test_a_nan_token_stays_in_its_row(device, arch):
    arguments = on(device, case("uniform", **SHAPE))
    arguments["hidden_states"][7] = torch.nan
    both = backward_case(device, arguments)
    others = torch.arange(19) != 7
    for result in (forward("triton", **arguments)[0], backward("triton", **both)[0]):
        assert result[7].isnan().all() and result[others].isfinite().all()


@pytest.mark.quick
@pytest.mark.parametrize("needs", NEEDS, ids=str)
@pytest.mark.slow(but=1)
def test_only_what_is_asked_for_and_the_same_bits(device, small_tiles, needs):
    small_tiles(ARCHITECTURES[sum(needs) % 2])
    both = backward_case(device, case("sentinels", tokens=9, bias=True, interleaved=needs[0]))
    everything = backward("triton", **both)
    with poison():
        some = backward("triton", **both, needs=needs)
    for wanted, a, b in zip(needs[:4], some, everything, strict=False):
        assert torch.equal(a, b) if wanted else a.shape == (0, b.shape[1])
        assert a.dtype == b.dtype
    known = everything[4] * torch.tensor(needs[2:4], device=device)
    assert torch.equal(some[4], known if needs[4] else known[:0]) and some[4].dtype == known.dtype


@pytest.mark.quick
@pytest.mark.slow
def test_the_same_bits_again_and_inputs_untouched(device, arch):
    both = backward_case(device, case(**SHAPE, dtype=BF16, bias=True))
    arguments = {k: v for k, v in both.items() if k not in ("z", "grad_out")}
    before = {k: v.clone() for k, v in both.items() if torch.is_tensor(v)}
    runs = [(*forward("triton", **arguments), *backward("triton", **both)) for _ in range(2)]
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(runs[0], run, strict=True))
    assert all(torch.equal(before[k], both[k]) for k in before)


def test_compiles_without_graph_breaks(device, small_tiles):
    small_tiles(90)
    arguments = on(device, case(tokens=7, bias=True))
    leaves = [arguments[k].requires_grad_() for k in GRADIENTS]
    compiled = torch.compile(lambda: triton_mlp(**arguments), fullgraph=True, backend="aot_eager")
    out, plain = compiled(), triton_mlp(**arguments)
    assert torch.equal(out, plain)
    for a, b in zip(*(torch.autograd.grad(o.square().sum(), leaves) for o in (out, plain)), strict=True):
        assert torch.equal(a, b)


@pytest.mark.quick
@pytest.mark.parametrize("hidden,inner,dtype", [(2048, 768, BF16), (2880, 2880, BF16), (2048, 1408, FP16)], ids=str)
def test_production_shapes_get_descriptors_on_hopper(hidden, inner, dtype):
    shipped = configs.expert_mlp(512, hidden, False, dtype, 90, True)
    for tile in (shipped.gate_up, shipped.linear, shipped.activation):
        assert tile.descriptors and tile.persistent and tile.rows == 128
    assert not configs.expert_mlp(512, hidden, False, dtype, 80, True).linear.descriptors
    assert not configs.expert_mlp(512, hidden, False, dtype, 90, False).linear.descriptors
