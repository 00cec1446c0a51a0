"""expert_mlp in Triton: what its two passes hand on, with descriptors (sm_90) and without (sm_80), and shipped tiles.

What the op computes is tested in tests/ops/expert_mlp, with descriptors and tiles as small as here.
Most tests shrink the tiles of `configs`, so that small shapes have several, with tails, in each direction;
`test_shipped_tiles` takes them as they are. Each call takes the interpreter a good part of a second, so properties that
live in different code are combined, not multiplied.
"""

import functools
import itertools

import pytest
import torch

from moe_unlearn.ops import Gate
from moe_unlearn.ops.expert_mlp import largest_of
from moe_unlearn.testing import check_against_ref, poison
from moe_unlearn.triton_kernels import configs
from tests.ops.expert_mlp.cases import (
    ALL,
    GPT_OSS,
    backward,
    backward_case,
    case,
    forward,
    gradients,
    on,
)
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
def test_layouts_by_pointers(device, small_tiles, gated, interleaved, transposed):
    small_tiles(80)
    turn = gated + interleaved + transposed
    flags = {"gated": gated, "interleaved": interleaved, "transposed": transposed, "bias": turn % 2 == 0}
    check(device, case(**SHAPE, **flags, dtype=DTYPES[turn % 3]))


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


@pytest.mark.quick
@pytest.mark.parametrize("hidden,inner,dtype", [(2048, 768, BF16), (2880, 2880, BF16), (2048, 1408, FP16)], ids=str)
def test_production_shapes_get_descriptors_on_hopper(hidden, inner, dtype):
    shipped = configs.expert_mlp(512, hidden, False, dtype, 90, True)
    for tile in (shipped.gate_up, shipped.linear, shipped.activation):
        assert tile.descriptors and tile.persistent and tile.rows == 128
    assert not configs.expert_mlp(512, hidden, False, dtype, 80, True).linear.descriptors
    assert not configs.expert_mlp(512, hidden, False, dtype, 90, False).linear.descriptors
