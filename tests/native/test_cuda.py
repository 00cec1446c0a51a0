"""The CUDA kernels without a GPU: they compile, spill nothing and cost what the ledger says; and their very code,
bindings and launchers, run in emulated threads, has the bits of the reference for any GPU and order of threads."""

import importlib.util
import math
import subprocess

import pytest
import torch

from moe_unlearn.backend import Unfit
from moe_unlearn.ops.bits import pack_bits
from moe_unlearn.ops.expert_wgrad import expert_wgrad_ref, expert_wgrad_score
from moe_unlearn.ops.native.expert_wgrad import _check_hopper
from moe_unlearn.ops.retain_weights import moments, tilted_weights
from moe_unlearn.ops.weight_score import weight_score_ref
from moe_unlearn.regress import ledger, nvcc, sass, static
from moe_unlearn.testing import LAYOUTS, ROUTINGS, assert_as_accurate, in_layout, poison
from moe_unlearn.testing.yardstick import Reference
from tests.native import cuda as tool
from tests.native import test_expert_wgrad as wgrad_cases
from tests.native import test_masked_update as update_cases
from tests.native import test_retain_weights as weights_cases
from tests.ops.route import cases as route_cases
from tests.ops.weight_score import cases as score_cases
from tests.static.ledger import ARCHITECTURES
from tests.support.covers import cover
from tests.support.impls import CPU, REF

pytestmark = [pytest.mark.slow, pytest.mark.skipif(nvcc.compiler() is None, reason="there is no nvcc")]
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


# ---- What the compiler says --------------------------------------------------------------------------------


def test_no_op_costs_more_than_the_ledger_says():
    """What has changed since it was recorded is compiled, and a tenth of the rest, which rotates with the day."""
    report = static.check(ARCHITECTURES, compilers=["nvcc"])
    found = [*report.notes, *report.problems] if nvcc.version() in ledger.read() else report.problems
    assert report.measured and not found, "\n".join(["if meant so: make ledger", *found])


@pytest.mark.nightly
@pytest.mark.parametrize("arch", tool.ARCHITECTURES)
@pytest.mark.parametrize("op", tool.CASES)
def test_an_op_compiles_without_warning_spill_or_growth(op, arch, tmp_path):
    # for Hopper the host's half of the binding too
    measured = nvcc.measure(tool.CASES[op], arch, tmp_path / "out" if arch == "sm_90a" else None)
    found = ledger.violations(arch, measured)
    recorded = ledger.read().get(nvcc.version())
    if recorded is not None:
        own = {name: entry for name, entry in recorded[arch].items() if name.startswith(f"{op}/")}
        found += ledger.differences(arch, own, measured)
    assert measured and not found, "\n".join(["if meant so: make ledger", *found])
    if (op, arch) == ("expert_wgrad", "sm_90a") and importlib.util.find_spec("triton"):
        listing = "".join(sass.functions(tmp_path / "out").values())
        for instruction in ("HGMMA.64x128x16.F32.BF16", "UTMALDG.2D", "LDGSTS", "USETMAXREG"):
            assert instruction in listing


def test_the_ledger_holds_nothing_forbidden_and_every_op():
    for compiler, by_arch in ledger.read().items():
        if compiler.startswith("nvcc"):
            assert tuple(by_arch) == tool.ARCHITECTURES
            for arch, entries in by_arch.items():
                assert not ledger.violations(arch, entries)
                assert {name.partition("/")[0] for name in entries} == set(tool.CASES)


# ---- The emulation -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", ["plans.cpp", "hopper.cpp"])
def test_launch_plans_and_the_emulation_of_hopper(source, tmp_path):
    """Grids, spans and shared memory, from the kernels' own headers; flaws of a Hopper kernel that must show."""
    program = tmp_path / "program"
    tool.compile_host(source, program)
    process = subprocess.run([program], capture_output=True, text=True)
    assert process.returncode == 0, process.stdout


# ---- route -------------------------------------------------------------------------------------------------


def test_route_on_every_number_of_blocks_and_order_of_threads(gpu):
    """Blocks beyond a warp, whose counts are scanned in steps of 32; spans that end inside a step."""
    for pattern in ROUTINGS:
        for multiprocessors in (1, 5) if pattern != "skewed" else (1, 2, 5, 33, 64):
            gpu.emulate(multiprocessors, seed=multiprocessors)
            route_cases.check(CPU, route_cases.inputs(route_cases.MANY_ROWS, pattern))
    for seed in range(10):
        gpu.emulate(3, seed=seed)
        route_cases.check(CPU, route_cases.inputs((257, 33, 5), "sentinels"))


@pytest.mark.parametrize("cells", route_cases.MANY_CELLS, ids=str)
def test_route_with_more_cells_than_shared_memory_holds(gpu, cells):
    arguments = route_cases.many_cells(200, *cells)
    for given in (arguments, route_cases.without(arguments, group=True, tilt=True)):
        if cells[0] <= 1024:
            route_cases.check(CPU, given)
            continue
        # more experts than the kernel takes are left to ref
        with pytest.raises(RuntimeError, match="emulated launch"):
            route_cases.run(CPU, given)
        module = importlib.import_module("moe_unlearn.ops.route")
        ours = CPU.moved(given)
        out = module._route_cuda(*ours.values())
        route_cases.assert_same([*out, ours["log_weight"]], route_cases.run(REF, given))


# ---- weight_score ------------------------------------------------------------------------------------------


def test_weight_score_where_a_block_has_little_shared_memory(gpu):
    gpu.emulate(2, 99 * 1024)
    for shape in score_cases.SHAPES:
        score_cases.check_histograms(CPU, score_cases.terms(shape))


@pytest.mark.parametrize("multiprocessors", [1, 4])
def test_ties_across_spans_are_taken_in_flat_order(gpu, multiprocessors):
    """Spans of five steps and of two, each with ties, on both sides of the last one taken."""
    given = score_cases.tied((300, 1000), most=2)
    bits = score_cases.patterns(given, 1.0)
    threshold = int(bits.median())
    equal = int((bits == threshold).sum())
    assert equal > 3000
    for ties in (5, equal // 2, equal - 1):
        gpu.emulate(multiprocessors, seed=ties)
        score_cases.check_mask(CPU, given, gamma=1.0, threshold=threshold, ties=ties)


# ---- retain_weights ----------------------------------------------------------------------------------------


@cover(full=True, cap=(math.inf, 1.1), num_tokens=(0, 1, 40, 1500), size=(0, 1, 31, 32, 33, 70))
def test_retain_weights_against_the_formulas(gpu, size, num_tokens, cap):
    weights_cases.test_against_the_formulas(size, num_tokens, cap, None)


def test_retain_weights_of_many_experts_whose_parts_take_several_stages(gpu):
    """18 parts of 512 tokens: the stage in shared memory is filled twice."""
    weights_cases.test_against_the_formulas(300, 4700, 1.1, None)


def test_retain_weights_of_one_shape_are_the_same_on_any_gpu(gpu):
    _, words, tilt = weights_cases.case(1500, 37)
    results = []
    for multiprocessors in (1, 4):
        gpu.emulate(multiprocessors, seed=multiprocessors)
        results.append(
            (tilted_weights(words, tilt, -0.3, cap=2.0, impl="cpu"), *moments(words, tilt, -0.3, cap=2.0, impl="cpu"))
        )
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_retain_weights_overflow_strides_and_solver(gpu):
    weights_cases.test_overflow_leaves_nan_and_infinity_where_the_reference_does()
    weights_cases.test_strided_words_and_tilt()
    members, _, _ = weights_cases.case(500, 5)
    target = members.double().mean(0) * 0.9
    ours, reference = (weights_cases.retain_weights(members, target, impl=impl) for impl in ("cpu", "ref"))
    assert_as_accurate(ours.weights, reference.weights, reference.weights.double())


# ---- masked_update -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtypes", update_cases.DTYPES, ids=str)
@pytest.mark.parametrize("rule", update_cases.RULES, ids=str)
def test_masked_update_has_the_bits_of_ref(gpu, rule, dtypes):
    update_cases.test_same_bits_as_ref(rule, dtypes, None)
    # whole rows of words, moved 16 bytes at a time
    rule, options = rule
    update_cases.check(rule, update_cases.case((3, 64), dtypes), **options)


@pytest.mark.parametrize("dtypes", [(BF16, F32, F32), (BF16, BF16, BF16), (F32, F32, F32)], ids=str)
@pytest.mark.parametrize("rule", ["sgd", "adamw"])
def test_masked_update_with_stochastic_rounding_and_masters(gpu, rule, dtypes):
    update_cases.test_stochastic_rounding_and_masters(rule, dtypes, None)


@pytest.mark.parametrize("shape", [(0, 4), (3, 0), (3, 1), (1,), (31,), (33,), (2, 2, 2, 64), ()], ids=str)
@pytest.mark.parametrize("slices", [None, [], [0]])
def test_masked_update_of_shapes(gpu, shape, slices):
    update_cases.test_shapes(shape, slices)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("slices", [None, [3, 1]])
@pytest.mark.parametrize("dtypes", [(F32, F32, F32), (BF16, F16, BF16)], ids=str)
def test_masked_update_of_every_layout(gpu, dtypes, slices, layout):
    update_cases.test_every_memory_layout(dtypes, slices, layout, None)


@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
def test_masked_update_rounds_as_torch_does(gpu, dtype):
    update_cases.test_conversions_round_as_torch_does(dtype, None)


@pytest.mark.parametrize("dtypes", [(F32, F32, F32), (BF16, BF16, BF16), (F16, F16, F16)], ids=str)
def test_masked_weights_keep_every_bit(gpu, dtypes):
    update_cases.test_masked_weights_keep_every_bit_and_are_not_read_into_their_neighbours(dtypes, None)
    update_cases.test_expanded_gradient()


def test_a_slice_out_of_range_stops_the_kernel(gpu):
    with pytest.raises(RuntimeError, match="trap"):
        update_cases.run("sgd", update_cases.case(slices=[0, 1]) | {"slices": torch.tensor([0, 9])}, "cpu")


def test_words_in_any_layout_of_the_mask(gpu):
    tensors = update_cases.case((4, 5, 70))
    expected = update_cases.run("sgd", tensors, "ref")
    tensors["mask"] = in_layout(tensors["mask"], "strided")
    update_cases.assert_same_bits(update_cases.run("sgd", tensors, "cpu"), expected)


# ---- expert_wgrad ------------------------------------------------------------------------------------------

# M and P: parts of tiles, several tiles in each direction, exactly one
WGRAD_SHAPES = ((40, 136), (264, 8), (128, 128))


def check_wgrad(made):
    with poison():
        got = wgrad_cases.store(made, out_dtype=F32)
    assert torch.equal(got.double(), wgrad_cases.gold(made))


@cover(full=True, indexed=wgrad_cases.INDEXED, pattern=tuple(ROUTINGS), shape=WGRAD_SHAPES)
def test_wgrad_is_exact_on_integers(gpu, shape, pattern, indexed):
    choice = wgrad_cases.INDEXED.index(indexed)
    gpu.emulate(1 + choice % 3, seed=choice)
    check_wgrad(wgrad_cases.scattered(shape, indexed, pattern))


@pytest.mark.parametrize("indexed", wgrad_cases.INDEXED)
def test_wgrad_in_many_orders_of_threads(gpu, indexed):
    """Experts of up to 11 stages, twice around the ring, and tiles that two consumers have in turn."""
    made = wgrad_cases.scattered((40, 264), indexed, tokens=400)
    assert max(made.expert_offsets.diff()) > 2 * 5 * 32 and min(made.expert_offsets.diff()) > 0
    for seed in range(6):
        gpu.emulate(1 + seed % 3, seed=seed)
        check_wgrad(made)


@pytest.mark.parametrize("indexed", wgrad_cases.INDEXED)
def test_wgrad_of_tiles_without_a_mask_bit_is_not_computed(gpu, indexed):
    """15 tiles of which 7, an expert's only bit in the last row, and none of another expert are kept."""
    shape, made = (40, 264), wgrad_cases.scattered((40, 264), indexed, tokens=150)
    kept = torch.ones(wgrad_cases.E, *shape, dtype=torch.bool)
    kept[::2, :, 128:256] = False
    kept[1] = kept[3] = False
    kept[3, -1, 136] = True
    expected = torch.where(kept, wgrad_cases.gold(made), 0)
    for name in ("grad_rows", "input_rows"):
        if getattr(made, name) is not None:
            getattr(made, name)[made.expert_offsets[1] : made.expert_offsets[2]] = 10**9  # a crash if it is read
    for seed in range(4):
        gpu.emulate(1 + seed % 2, seed=seed)
        with poison():
            got = wgrad_cases.store(made, mask=pack_bits(kept), out_dtype=F32)
        assert torch.equal(got.double(), expected)


@pytest.mark.parametrize("tokens", [0, 1, 31, 32, 33, 64, 160, 161])
def test_wgrad_of_one_expert_with_rows_around_a_stage(gpu, tokens):
    for indexed in wgrad_cases.INDEXED:
        check_wgrad(wgrad_cases.scattered((136, 16), indexed, "one_expert", tokens))


@pytest.mark.parametrize("indexed", wgrad_cases.INDEXED)
def test_wgrad_reads_no_row_of_another_expert(gpu, indexed):
    """Rows between the bounds of the listed experts are NaN and infinite; so is what lies beside the columns."""
    made = wgrad_cases.scattered((40, 136), indexed, "uniform", tokens=200)
    experts = torch.tensor([3, 1])
    made, poisoned = wgrad_cases.poisoned_elsewhere(made, experts)
    expected = wgrad_cases.gold(made, experts)
    assert torch.equal(wgrad_cases.store(poisoned, experts=experts, out_dtype=F32).double(), expected)


@pytest.mark.parametrize("dtype", [BF16, F16, F32], ids=str)
def test_wgrad_is_stored_and_added_under_masks_in_every_layout(gpu, dtype):
    made, kept = wgrad_cases.scattered((40, 136), exact=False), wgrad_cases.keep(wgrad_cases.E, 40, 136)
    dw, mask = wgrad_cases.store(made, out_dtype=F32), pack_bits(kept)
    baseline = Reference(lambda: expert_wgrad_ref(*made, None, None, F32)).baseline()
    assert_as_accurate(dw, baseline, wgrad_cases.gold(made))
    with poison():
        got = wgrad_cases.store(made, mask=mask, out_dtype=dtype)
    assert torch.equal(got, torch.where(kept, dw, 0).to(dtype))
    out = torch.randn(dw.shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    expected = torch.where(kept, (out.float() + dw).to(dtype), out)
    for layout in LAYOUTS:
        moved = in_layout(out.clone(), layout)
        assert torch.equal(wgrad_cases.store(made, out=moved, mask=in_layout(mask, layout)), expected)


@pytest.mark.parametrize("numerics", sorted(set(wgrad_cases.NUMERICS) - {"half"}))
@pytest.mark.parametrize("rule", wgrad_cases.RULES)
def test_wgrad_update_is_masked_update_of_the_stored_gradient(gpu, rule, numerics):
    if (rule, numerics) != ("sgd", "wide state"):
        wgrad_cases.check_update(rule, numerics, (40, 136), BF16)
        wgrad_cases.check_update(rule, numerics, (136, 8), BF16, "transposed", experts=None)


def test_wgrad_score_is_weight_score_of_the_stored_gradients(gpu):
    sides = (
        wgrad_cases.scattered((40, 136), "input", seed=1),
        wgrad_cases.scattered((40, 136), "grad", "half_empty", seed=2),
    )
    experts = torch.tensor([4, 0])
    for dtype in (BF16, F16, F32):
        weight = torch.randn(wgrad_cases.E, 40, 136).to(dtype)
        both = [wgrad_cases.store(side, experts=experts, out_dtype=F32) for side in sides]
        for layout in ("contiguous", "transposed"):
            with poison():
                got = expert_wgrad_score(in_layout(weight, layout), *sides, gamma=0.5, experts=experts, impl="cpu")
            assert torch.equal(got, weight_score_ref(weight[experts], *both, 0.5))


def test_wgrad_beyond_what_the_kernel_takes_is_an_error(gpu):
    made, fine = wgrad_cases.scattered((40, 136)), torch.zeros(7, 64, dtype=BF16)
    _check_hopper((9, 0), fine, fine[:, 8:48], fine[3:])
    for capability in ((8, 9), (10, 0)):
        with pytest.raises(Unfit, match="compute capability 9.0"):
            _check_hopper(capability, fine)
    for bad in (fine.float(), fine[:, :63], fine[:, 4:60], fine.t(), torch.zeros(7, 60, dtype=BF16)[:, :56]):
        with pytest.raises(Unfit, match="multiple of 8 columns"):
            _check_hopper((9, 0), fine, bad)
    # the launcher's own word
    for expected, grad in (("bfloat16", made.grad.float()), ("Hopper", made.grad[:, :39])):
        with pytest.raises(RuntimeError, match=expected):
            wgrad_cases.store(made._replace(grad=grad, input=made.input.to(grad.dtype)))
    with pytest.raises(RuntimeError, match="Hopper"):
        wgrad_cases.check_update("adamw", "half", (40, 136), BF16)
    gpu.emulate(capability=100)
    with pytest.raises(RuntimeError, match="Hopper"):
        wgrad_cases.store(made)


def test_wgrad_of_an_expert_that_does_not_exist_stops_the_kernel(gpu):
    made, weight = wgrad_cases.scattered((40, 136)), torch.zeros(wgrad_cases.E, 40, 136)
    bounds = torch.tensor([[0, 1]])
    with pytest.raises(RuntimeError, match="trap"):
        gpu.expert_wgrad_sgd_(weight, None, None, *made[:2], bounds, None, made.input_rows, torch.tensor([9]), None,
                              0.1, 0.0, 1.0, 0.0, False, 1, False, 0, 0, 0)  # fmt: skip
