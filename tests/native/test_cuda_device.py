"""The CUDA library on a GPU: the cases of the CPU kernels' tests and a few that need a real device."""

import math
from dataclasses import replace

import pytest
import torch

from moe_unlearn import native
from moe_unlearn.backend import Unfit
from moe_unlearn.ops import (
    SGD,
    AdamW,
    Update,
    expert_wgrad_ref,
    masked_adamw_,
    masked_sgd_,
    route,
    score_histogram,
    score_mask,
)
from moe_unlearn.ops.retain_weights import retain_weights
from moe_unlearn.testing import ROUTINGS, assert_as_accurate, integers
from moe_unlearn.testing.yardstick import Reference
from tests.native import exact_mlp
from tests.ops.expert_mlp import cases as mlp
from tests.ops.expert_wgrad import cases as wgrad
from tests.ops.masked_update import cases as update_cases
from tests.ops.retain_weights import cases as weights_cases
from tests.ops.route import cases as route_cases
from tests.ops.weight_score import cases as score_cases
from tests.support.covers import cover
from tests.support.impls import impl_of

WHY_NOT = (
    "there is no GPU" if not torch.cuda.is_available() else native.load("cuda") and f"_C_cuda {native.load('cuda')}"
)
pytestmark = [pytest.mark.quick, pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT or "it runs")]
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
CUDA = impl_of("cuda")


# ---- route -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [route_cases.MANY_ROWS, (8192, 128, 8), (40000, 512, 16)], ids=str)
@pytest.mark.parametrize("pattern", ROUTINGS)
def test_route_has_the_bits_of_ref(pattern, size):
    route_cases.check(CUDA, route_cases.inputs(size, pattern))


@pytest.mark.parametrize("cells", route_cases.MANY_CELLS, ids=str)
def test_route_with_more_cells_than_shared_memory_holds(cells):
    arguments = route_cases.many_cells(3000, *cells)
    route_cases.check(CUDA, arguments)
    route_cases.check(CUDA, route_cases.without(arguments, group=True, tilt=True))


def test_route_of_a_million_tokens():
    route_cases.check(CUDA, route_cases.inputs((1 << 20, 512, 16), "skewed"))


def test_route_never_waits_for_the_host():
    """Work that a graph captures and replays cannot have read anything back."""
    arguments = CUDA.moved(route_cases.without(route_cases.inputs(route_cases.MANY_ROWS, "skewed"), tilt=True))
    expected = route(**arguments, impl="cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream):
        route(**arguments, impl="cuda")
        with torch.cuda.graph(graph, stream=stream):
            out = route(**arguments, impl="cuda")
    for _ in range(3):
        for tensor in out:
            tensor.fill_(-1)
        graph.replay()
        torch.cuda.synchronize()
        assert all(torch.equal(a, e) for a, e in zip(out, expected, strict=True))


# ---- weight_score ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(300, 1000), (64, 33, 2048)], ids=str)
def test_weight_score_of_many_blocks(shape):
    score_cases.check(CUDA, score_cases.terms(shape))
    score_cases.check(CUDA, score_cases.tied(shape), gamma=1.0)


# ---- retain_weights ----------------------------------------------------------------------------------------


@cover(cap=(math.inf, 1.1), size=(0, 1, 31, 32, 33, 70, 130))
def test_retain_weights_of_many_tokens(size, cap):
    made = weights_cases.passes(9001, size)
    weights_cases.assert_same(weights_cases.check(CUDA, made, cap=cap), weights_cases.run(CUDA, made, cap=cap))


def test_the_solver_finds_what_it_finds_on_the_reference():
    members = weights_cases.passes(3000, 12).members
    target = members.double().mean(0) * (1 + 0.2 * integers(12, low=-1, high=1).double())
    ours = retain_weights(members.cuda(), target, cap=3.0, impl="cuda")
    reference = retain_weights(members, target, cap=3.0, impl="ref")
    assert_as_accurate(ours.weights.cpu(), reference.weights, reference.weights.double())


# ---- masked_update -----------------------------------------------------------------------------------------


@cover(rule=tuple(update_cases.RULES), numerics=tuple(update_cases.NUMERICS))
def test_masked_update_of_many_blocks_has_the_bits_of_ref(rule, numerics):
    function, options = update_cases.RULES[rule]
    update_cases.check(CUDA, function, *update_cases.inputs(numerics, (40, 33, 256)), **options)


@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
def test_masked_update_rounds_as_torch_does(dtype):
    update_cases.check_conversions(CUDA, dtype)


@pytest.mark.slow
def test_offsets_beyond_two_to_the_31():
    """A bfloat16 parameter of 2^31 + 2^20 weights of which only the last words train."""
    rows = (1 << 11) + 1
    if torch.cuda.mem_get_info()[0] < 24 << 30:
        pytest.skip("less than 24 GB of the GPU are free")
    param = torch.zeros(rows, 1 << 20, dtype=BF16, device="cuda")
    grad = torch.ones_like(param)
    mask = torch.zeros(rows, 1 << 15, dtype=torch.int32, device="cuda")
    mask[-1, -2:] = -1
    masked_sgd_(param, grad, None, mask, SGD(lr=1.0), Update(step=1, rounding="stochastic"), impl="cuda")
    assert int((param != 0).sum()) == 64 and bool((param[-1, -64:] == -1).all())
    words, taken = score_mask(param, grad, param, gamma=1.0, threshold_bits=0, ties=0, impl="cuda")
    assert int(taken) == 0 and not bool(words.any())  # S = (-1 + 1) * 1
    histogram = score_histogram(param, grad, grad, gamma=1.0, digit=0, impl="cuda")
    assert int(histogram.sum()) == param.numel() and int(histogram[0x4000]) == 64


def test_work_goes_to_the_current_stream():
    """On a stream that still waits, nothing has been written yet; afterwards everything has."""
    param, grad = torch.zeros(1 << 20, device="cuda"), torch.ones(1 << 20, device="cuda")
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)
        masked_adamw_(
            param,
            grad,
            torch.zeros_like(param),
            torch.zeros_like(param),
            None,
            AdamW(lr=1.0),
            Update(step=1),
            impl="cuda",
        )
    early = param.clone()
    stream.synchronize()
    assert not bool(early.any()) and bool((param < 0).all())


hopper = pytest.mark.skipif(
    not WHY_NOT and torch.cuda.get_device_capability() != (9, 0), reason="needs Hopper: wgmma is nowhere else"
)


# ---- expert_mlp --------------------------------------------------------------------------------------------


@hopper
@pytest.mark.parametrize("pattern", ROUTINGS)
@pytest.mark.parametrize("flags", [(False, False), (False, True), (True, False), (True, True)], ids=str)
def test_mlp_is_exact_on_integers(flags, pattern):
    """A layer of parts of tiles, and one of several of them in each direction."""
    layout = dict(zip(("transposed", "interleaved"), flags, strict=True))
    exact_mlp.check(CUDA, exact_mlp.layer(pattern, 150, 264, 136, bias=True, **layout))
    exact_mlp.check(CUDA, exact_mlp.layer(pattern, 3000, 520, 392, **layout))


@hopper
def test_mlp_is_accurate_and_the_same_every_time():
    made = mlp.case("skewed", 2000, 512, 384, dtype=BF16, bias=True)
    mlp.check(CUDA, made)
    first = mlp.results(CUDA, made)
    for _ in range(20):
        assert all(torch.equal(a, b) for a, b in zip(mlp.results(CUDA, made), first, strict=True))


def test_mlp_of_other_layers_is_left_to_the_next_implementation():
    made = mlp.case(dtype=F32)
    with pytest.raises(Unfit, match="CUDA's expert_mlp needs"):
        mlp.results(CUDA, made)
    assert mlp.results(replace(CUDA, name="auto"), made)[0].isfinite().all()


# ---- expert_wgrad ------------------------------------------------------------------------------------------

LARGE = (768, 2048)


@hopper
@pytest.mark.parametrize("indexed", wgrad.INDEXED)
@pytest.mark.parametrize("pattern", ROUTINGS)
@pytest.mark.parametrize("shape", [(40, 136), (264, 8), (128, 128), LARGE], ids=str)
def test_wgrad_is_exact_on_integers(shape, pattern, indexed):
    for tokens in (60, 1000) if shape != LARGE else (3000,):
        made = wgrad.scattered(wgrad.factors(shape, pattern=pattern, tokens=tokens, exact=True), indexed)
        assert torch.equal(wgrad.store(CUDA, made, out_dtype=F32).double(), wgrad.gold(made))


@hopper
@pytest.mark.parametrize("tokens", [0, 1, 31, 32, 33, 64, 160, 161])
def test_wgrad_of_one_expert_with_rows_around_a_stage(tokens):
    for indexed in wgrad.INDEXED:
        made = wgrad.scattered(wgrad.factors((136, 16), pattern="one_expert", tokens=tokens, exact=True), indexed)
        assert torch.equal(wgrad.store(CUDA, made, out_dtype=F32).double(), wgrad.gold(made))


@hopper
@pytest.mark.parametrize("shape", [(40, 136), LARGE], ids=str)
def test_wgrad_is_accurate_and_the_same_every_time(shape):
    for indexed in wgrad.INDEXED:
        made = wgrad.scattered(wgrad.factors(shape, tokens=2000), indexed)
        first = wgrad.store(CUDA, made, out_dtype=F32)
        baseline = Reference(lambda made=made: expert_wgrad_ref(*made, None, None, F32)).baseline()
        assert_as_accurate(first, baseline, wgrad.gold(made))
        assert all(torch.equal(wgrad.store(CUDA, made, out_dtype=F32), first) for _ in range(20))


@hopper
@pytest.mark.parametrize("numerics", [name for name, (dtype, *_) in wgrad.NUMERICS.items() if dtype != F16])
@pytest.mark.parametrize("rule", wgrad.RULES)
def test_large_wgrad_update_is_masked_update_of_the_stored_gradient(rule, numerics):
    wgrad.check_update(CUDA, rule, numerics, wgrad.factors(LARGE, tokens=2000))


def test_wgrad_of_other_factors_is_left_to_the_next_implementation():
    made = wgrad.factors(dtype=F32, exact=True)
    with pytest.raises(Unfit, match="CUDA's expert_wgrad needs"):
        wgrad.store(CUDA, made)
    assert torch.equal(wgrad.store(replace(CUDA, name="auto"), made).double(), wgrad.gold(made))
