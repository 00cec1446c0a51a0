"""The CUDA library on a GPU: the cases of the CPU kernels' tests and a few that need a real device."""

import math

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
    weight_score_ref,
)
from moe_unlearn.ops.bits import pack_bits
from moe_unlearn.ops.expert_wgrad import expert_wgrad_score
from moe_unlearn.ops.retain_weights import moments, retain_weights, tilted_weights
from moe_unlearn.testing import LAYOUTS, ROUTINGS, assert_as_accurate, in_layout, integers, poison
from moe_unlearn.testing.yardstick import Reference
from tests.native import test_expert_wgrad as wgrad_cases
from tests.native import test_masked_update as update_cases
from tests.native import test_retain_weights as weights_cases
from tests.ops.route import cases as route_cases
from tests.ops.weight_score import cases as score_cases
from tests.support.impls import impl_of

WHY_NOT = (
    "there is no GPU" if not torch.cuda.is_available() else native.load("cuda") and f"_C_cuda {native.load('cuda')}"
)
pytestmark = [pytest.mark.quick, pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT or "it runs")]
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
CUDA = impl_of("cuda")


def on_gpu(arguments, layout="contiguous"):
    """The tensors among the values (or elements) on the GPU, in a layout."""
    if isinstance(arguments, dict):
        return {k: on_gpu(v, layout) for k, v in arguments.items()}
    if isinstance(arguments, tuple):
        return tuple(on_gpu(v, layout) for v in arguments)
    return in_layout(arguments.cuda(), layout) if isinstance(arguments, torch.Tensor) else arguments


def on_cpu(tensors):
    return [None if t is None else t.cpu() for t in tensors]


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


@pytest.mark.parametrize("cap", [math.inf, 1.1])
@pytest.mark.parametrize("num_tokens", [0, 1, 40, 9001])
@pytest.mark.parametrize("size", [0, 1, 31, 32, 33, 70, 130])
def test_retain_weights_against_the_formulas(size, num_tokens, cap):
    members, words, tilt = weights_cases.case(num_tokens, size)
    results = []
    for _ in range(2):
        with poison():
            weights = tilted_weights(words.cuda(), tilt.cuda(), weights_cases.BIAS, cap=cap, impl="cuda")
            sums = moments(words.cuda(), tilt.cuda(), weights_cases.BIAS, cap=cap, impl="cuda")
        results.append(on_cpu((weights, *sums)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    for got, gold in zip(results[0], weights_cases.oracle(members, tilt, cap), strict=True):
        assert_as_accurate(got.float(), gold.float(), gold)


def test_the_solver_finds_what_it_finds_on_the_reference():
    members, _, _ = weights_cases.case(3000, 12)
    target = members.double().mean(0) * (1 + 0.2 * integers(12, low=-1, high=1).double())
    ours = retain_weights(members.cuda(), target, cap=3.0, impl="cuda")
    reference = retain_weights(members, target, cap=3.0, impl="ref")
    assert_as_accurate(ours.weights.cpu(), reference.weights, reference.weights.double())


# ---- masked_update -----------------------------------------------------------------------------------------


def check_update(rule, tensors, layout="contiguous", **options):
    expected = update_cases.run(rule, tensors, "ref", **options)
    moved = {k: None if v is None else in_layout(v.cuda(), layout) for k, v in tensors.items()}
    update_cases.update(rule, moved, "cuda", **options)
    actual = on_cpu(moved[k] for k in ("param", "first", "second", "master"))
    update_cases.assert_same_bits(actual, expected)


@pytest.mark.parametrize("dtypes", update_cases.DTYPES, ids=str)
@pytest.mark.parametrize(
    "rule, options", [("sgd", o) for o in update_cases.SGD_CASES] + [("adamw", o) for o in update_cases.ADAMW_CASES]
)
def test_masked_update_has_the_bits_of_ref(rule, options, dtypes):
    for shape in ((4, 5, 70), (3, 64), (40, 33, 256)):
        check_update(rule, update_cases.case(shape, dtypes), **options)
    check_update(rule, update_cases.case(dtypes=dtypes, keep=None), step=1, **options)


@pytest.mark.parametrize("dtypes", [(BF16, F32, F32), (BF16, BF16, BF16), (F32, F32, F32)], ids=str)
@pytest.mark.parametrize("rule", ["sgd", "adamw"])
def test_masked_update_with_stochastic_rounding_and_masters(rule, dtypes):
    options = {"weight_decay": 0.1} | ({"momentum": 0.9} if rule == "sgd" else {})
    random = {"rounding": "stochastic", "seed": -5, "parameter_id": 1 << 33}
    check_update(rule, update_cases.case(dtypes=dtypes), step=(1 << 32) + 7, **random, **options)
    for slices in (None, [3, 0]):
        check_update(rule, update_cases.case(dtypes=dtypes, slices=slices), **random, **options)
        check_update(rule, update_cases.case(dtypes=dtypes, slices=slices, master=True), **options)


@pytest.mark.parametrize("slices", [None, [], [0]])
@pytest.mark.parametrize("shape", [(3, 0), (3, 1), (1,), (31,), (32,), (33,), (95,), (2, 2, 2, 64)], ids=str)
def test_masked_update_of_shapes(shape, slices):
    for keep in (0.5, None):
        check_update("adamw", update_cases.case(shape, (BF16, F32, F32), slices, keep), rounding="stochastic")
        check_update("sgd", update_cases.case(shape, (F32, F32, F32), slices, keep), momentum=0.9)


@pytest.mark.parametrize("shape", [(0, 4), ()], ids=str)
def test_masked_update_of_nothing_and_of_one_number(shape):
    check_update("adamw", update_cases.case(shape, (BF16, F32, F32)), rounding="stochastic")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("slices", [None, [3, 1]])
@pytest.mark.parametrize("dtypes", [(F32, F32, F32), (BF16, F16, BF16)], ids=str)
def test_masked_update_of_every_layout(dtypes, slices, layout):
    check_update("adamw", update_cases.case((4, 3, 2, 41), dtypes, slices), layout)


def test_masked_weights_keep_every_bit():
    for dtypes in ((F32,) * 3, (BF16,) * 3, (F16,) * 3):
        tensors = update_cases.case((6, 64), dtypes, keep=0.5)
        kept = update_cases.pack_bits(torch.arange(384).view(6, 64) % 3 == 0)
        tensors |= {"mask": kept}
        check_update("adamw", tensors, weight_decay=0.1)


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


# ---- expert_wgrad ------------------------------------------------------------------------------------------

hopper = pytest.mark.skipif(
    not WHY_NOT and torch.cuda.get_device_capability() != (9, 0), reason="needs Hopper: wgmma is nowhere else"
)
LARGE = (768, 2048)


def wgrad(made, **options):
    moved = on_gpu(options)
    with poison():
        return wgrad_cases.store(wgrad_cases.moved_to("cuda", made), "cuda", **moved).cpu()


@hopper
@pytest.mark.parametrize("indexed", wgrad_cases.INDEXED)
@pytest.mark.parametrize("pattern", ROUTINGS)
@pytest.mark.parametrize("shape", [(40, 136), (264, 8), (128, 128), LARGE], ids=str)
def test_wgrad_is_exact_on_integers(shape, pattern, indexed):
    for tokens in (60, 1000) if shape != LARGE else (3000,):
        made = wgrad_cases.scattered(shape, indexed, pattern, tokens)
        assert torch.equal(wgrad(made, out_dtype=F32).double(), wgrad_cases.gold(made))


@hopper
@pytest.mark.parametrize("tokens", [0, 1, 31, 32, 33, 64, 160, 161])
def test_wgrad_of_one_expert_with_rows_around_a_stage(tokens):
    for indexed in wgrad_cases.INDEXED:
        made = wgrad_cases.scattered((136, 16), indexed, "one_expert", tokens)
        assert torch.equal(wgrad(made, out_dtype=F32).double(), wgrad_cases.gold(made))


@hopper
@pytest.mark.parametrize("indexed", wgrad_cases.INDEXED)
def test_wgrad_reads_no_row_of_another_expert(indexed):
    experts = torch.tensor([3, 1])
    made, poisoned = wgrad_cases.poisoned_elsewhere(
        wgrad_cases.scattered((40, 136), indexed, "uniform", tokens=200), experts
    )
    assert torch.equal(wgrad(poisoned, experts=experts, out_dtype=F32).double(), wgrad_cases.gold(made, experts))


@hopper
@pytest.mark.parametrize("shape", [(40, 136), LARGE], ids=str)
def test_wgrad_is_accurate_and_the_same_every_time(shape):
    for indexed in wgrad_cases.INDEXED:
        made = wgrad_cases.scattered(shape, indexed, tokens=2000, exact=False)
        first = wgrad(made, out_dtype=F32)
        baseline = Reference(lambda made=made: expert_wgrad_ref(*made, None, None, F32)).baseline()
        assert_as_accurate(first, baseline, wgrad_cases.gold(made))
        assert all(torch.equal(wgrad(made, out_dtype=F32), first) for _ in range(20))


@hopper
@pytest.mark.parametrize("dtype", [BF16, F16, F32], ids=str)
def test_wgrad_is_stored_and_added_under_masks_in_every_layout(dtype):
    made, kept = wgrad_cases.scattered((40, 136), exact=False), wgrad_cases.keep(wgrad_cases.E, 40, 136)
    dw, mask = wgrad(made, out_dtype=F32), pack_bits(kept)
    assert torch.equal(wgrad(made, mask=mask, out_dtype=dtype), torch.where(kept, dw, 0).to(dtype))
    out = torch.randn(dw.shape).to(dtype)
    expected = torch.where(kept, (out.float() + dw).to(dtype), out)
    for layout in LAYOUTS:
        moved, words = in_layout(out.cuda(), layout), in_layout(mask.cuda(), layout)
        wgrad_cases.store(wgrad_cases.moved_to("cuda", made), "cuda", out=moved, mask=words)
        assert torch.equal(moved.cpu(), expected)


@hopper
@pytest.mark.parametrize("numerics", sorted(set(wgrad_cases.NUMERICS) - {"half"}))
@pytest.mark.parametrize("rule", wgrad_cases.RULES)
def test_wgrad_update_is_masked_update_of_the_stored_gradient(rule, numerics):
    if (rule, numerics) != ("sgd", "wide state"):
        where = {"impl": "cuda", "device": "cuda"}
        wgrad_cases.check_update(rule, numerics, (40, 136), BF16, **where)
        wgrad_cases.check_update(rule, numerics, (136, 8), BF16, "transposed", experts=None, **where)
        wgrad_cases.check_update(rule, numerics, LARGE, BF16, tokens=2000, **where)


@hopper
def test_wgrad_score_is_weight_score_of_the_stored_gradients():
    sides = [wgrad_cases.scattered((40, 136), name, seed=i) for i, name in enumerate(("input", "grad"))]
    weight, experts = torch.randn(wgrad_cases.E, 40, 136).bfloat16(), torch.tensor([4, 0])
    both = [wgrad(side, experts=experts, out_dtype=F32) for side in sides]
    moved = [wgrad_cases.moved_to("cuda", side) for side in sides]
    with poison():
        got = expert_wgrad_score(weight.cuda(), *moved, gamma=0.5, experts=experts.cuda(), impl="cuda").cpu()
    assert torch.equal(got, weight_score_ref(weight[experts], *both, 0.5))


def test_wgrad_of_other_factors_is_left_to_the_next_implementation():
    made = wgrad_cases.factors((40, 136), exact=True)
    with pytest.raises(Unfit, match="CUDA's expert_wgrad needs"):
        wgrad(made)
    moved = wgrad_cases.moved_to("cuda", made)
    assert torch.equal(wgrad_cases.store(moved, "auto").double().cpu(), wgrad_cases.gold(made))
