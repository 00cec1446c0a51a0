"""The CUDA kernels without a GPU: they compile, spill nothing and cost what the ledger says; and their very code,
bindings and launchers, run in emulated threads, has the bits of the reference for any GPU and order of threads."""

import importlib.util
import itertools
import math
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from moe_unlearn.backend import Unfit
from moe_unlearn.ops import expert_wgrad
from moe_unlearn.ops.bits import pack_bits
from moe_unlearn.ops.expert_wgrad import expert_wgrad_adamw_, expert_wgrad_sgd_
from moe_unlearn.ops.masked_update import SGD, AdamW, Update
from moe_unlearn.ops.native import expert_mlp as mlp_glue
from moe_unlearn.ops.native.expert_wgrad import _check_hopper
from moe_unlearn.regress import ledger, nvcc, sass, static
from moe_unlearn.testing import LAYOUTS, ROUTINGS, in_layout, poison
from tests.native import cuda as tool
from tests.native import exact_mlp
from tests.ops.expert_mlp import cases as mlp
from tests.ops.expert_wgrad import cases as wgrad
from tests.ops.masked_update import cases as update_cases
from tests.ops.retain_weights import cases as weights_cases
from tests.ops.route import cases as route_cases
from tests.ops.weight_score import cases as score_cases
from tests.static.ledger import ARCHITECTURES
from tests.support.covers import cover
from tests.support.impls import CPU, REF

pytestmark = [pytest.mark.slow, pytest.mark.skipif(nvcc.compiler() is None, reason="there is no nvcc")]
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
# what the ops of Hopper multiply by, what copies their boxes, and what asks L2 ahead
HOPPER = {
    "expert_mlp": ("HGMMA.64x128x16.F32.BF16", "UTMALDG.2D", "UTMALDG.3D", "UTMALDG.3D.MULTICAST"),
    "expert_wgrad": ("HGMMA.64x128x16.F32.BF16", "UTMALDG.2D", "UTMALDG.2D.MULTICAST", "UBLKPF.L2"),
}
CUDA = replace(CPU, kind="cuda")  # emulated, on a machine with a GPU too: see the fixture `gpu`


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
    if op in HOPPER and arch == "sm_90a" and importlib.util.find_spec("triton"):
        listing = "".join(sass.functions(tmp_path / "out").values())
        for instruction in (*HOPPER[op], "LDGSTS", "USETMAXREG"):
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


@cover(full=True, cap=(math.inf, 1.1), size=(0, 1, 31, 32, 33, 70))
def test_retain_weights_of_several_parts_of_the_tokens(gpu, size, cap):
    weights_cases.check(CPU, weights_cases.passes(1500, size), cap=cap)


def test_retain_weights_of_many_experts_whose_parts_take_several_stages(gpu):
    """18 parts of 512 tokens: the stage in shared memory is filled twice."""
    weights_cases.check(CPU, weights_cases.passes(4700, 300), cap=1.1)


def test_retain_weights_of_one_shape_are_the_same_on_any_gpu(gpu):
    made, results = weights_cases.passes(1500, 37), []
    for multiprocessors in (1, 4):
        gpu.emulate(multiprocessors, seed=multiprocessors)
        results.append(weights_cases.run(CPU, made, cap=2.0))
    weights_cases.assert_same(*results)


# ---- masked_update -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
def test_masked_update_rounds_as_torch_does(gpu, dtype):
    update_cases.check_conversions(CPU, dtype)


def test_a_slice_out_of_range_stops_the_kernel(gpu, monkeypatch):
    monkeypatch.setattr(sys.modules["moe_unlearn.ops.masked_update"], "check_indices", lambda *given: None)
    common, state = update_cases.inputs("fp32", (4, 5, 70), slices=[0, 1])
    with pytest.raises(RuntimeError, match="trap"):
        update_cases.run(CPU, update_cases.sgd, common | {"slices": torch.tensor([0, 9])}, state)


def test_words_in_any_layout_of_the_mask(gpu):
    common, state = update_cases.inputs("fp32", (4, 5, 70))
    common["mask"] = in_layout(common["mask"], "strided")
    update_cases.assert_same(
        (
            update_cases.run(REF, update_cases.sgd, common, state),
            update_cases.apply(CPU, update_cases.sgd, update_cases.given(update_cases.sgd, common, state)),
        )
    )


# ---- expert_wgrad ------------------------------------------------------------------------------------------


@cover(full=True, indexed=wgrad.INDEXED, pattern=ROUTINGS, shape=((264, 8), (128, 128), (40, 136)))
def test_wgrad_of_parts_of_tiles_several_and_exactly_one(gpu, shape, pattern, indexed):
    made = wgrad.scattered(wgrad.factors(shape, pattern=pattern, tokens=60, exact=True), indexed)
    gpu.emulate(1 + len(indexed) % 3, seed=len(indexed))
    assert torch.equal(wgrad.store(CUDA, made, out_dtype=F32).double(), wgrad.gold(made))


@pytest.mark.parametrize("indexed", wgrad.INDEXED)
def test_wgrad_in_many_orders_of_threads(gpu, indexed):
    """Experts of more stages than the ring has, and tiles that two consumers have in turn."""
    made = wgrad.scattered(wgrad.factors((40, 264), tokens=400, exact=True), indexed)
    assert max(made.expert_offsets.diff()) > 5 * 64 and min(made.expert_offsets.diff()) > 0
    for seed in range(5):
        gpu.emulate(2 + seed, seed=seed)
        assert torch.equal(wgrad.store(CUDA, made, out_dtype=F32).double(), wgrad.gold(made))


@pytest.mark.parametrize(
    "indexed,shape",
    [
        ("input", (136, 264)),
        ("grad", (264, 136)),
        ("both", (264, 136)),
        ("neither", (136, 264)),
        ("neither", (264, 264)),
        ("input", (264, 264)),
    ],
)
def test_wgrad_of_pairs_of_tiles(gpu, shape, indexed):
    """2 x 3, 3 x 2 and 3 x 3 tiles of dW: pairs that share either factor, none, and tiles without a partner."""
    made = wgrad.scattered(wgrad.factors(shape, tokens=150, exact=True), indexed)
    rows = made.expert_offsets.diff()
    assert rows.max() > 2 * 64 and rows.min() < 64  # whole stages, and less than one
    gpu.emulate(len(indexed) - 3, seed=len(indexed))
    assert torch.equal(wgrad.store(CUDA, made, out_dtype=F32).double(), wgrad.gold(made))


@pytest.mark.parametrize("indexed", wgrad.INDEXED)
def test_wgrad_of_pairs_without_a_mask_bit_is_not_computed(gpu, indexed, monkeypatch):
    """12 tiles: of some pairs one has a bit, of an expert's only the last row of a second one, of another none."""
    monkeypatch.setattr(sys.modules["moe_unlearn.ops.expert_wgrad"], "check_rows", lambda *given: None)
    made = wgrad.scattered(wgrad.factors((40, 264), tokens=150, exact=True), indexed)
    kept = torch.ones(wgrad.E, 40, 264, dtype=torch.bool)
    kept[::2, :, 128:256] = False
    kept[1] = kept[3] = False
    kept[3, -1, 136] = True
    expected = torch.where(kept, wgrad.gold(made), 0)
    for rows in (made.grad_rows, made.input_rows):
        if rows is not None:
            rows[made.expert_offsets[1] : made.expert_offsets[2]] = 10**9  # a crash if it is read
    for seed in range(4):
        gpu.emulate(1 + seed % 2, seed=seed)
        assert torch.equal(wgrad.store(CUDA, made, mask=pack_bits(kept), out_dtype=F32).double(), expected)


@pytest.mark.parametrize("tokens", [0, 1, 63, 64, 65, 128, 256, 257])
def test_wgrad_of_one_expert_with_rows_around_a_stage(gpu, tokens):
    for indexed in wgrad.INDEXED:
        made = wgrad.scattered(wgrad.factors((136, 16), pattern="one_expert", tokens=tokens, exact=True), indexed)
        assert torch.equal(wgrad.store(CUDA, made, out_dtype=F32).double(), wgrad.gold(made))


def test_wgrad_updates_of_several_tiles(gpu):
    wgrad.check_update(CUDA, "adamw decay", "bf16 stochastic", wgrad.factors((40, 136)))
    wgrad.check_update(CUDA, "sgd nesterov", "bf16 master", wgrad.factors((136, 8)), experts=None, layout="transposed")
    wgrad.check_update(CUDA, "adamw decay", "bf16 packed stochastic", wgrad.factors((136, 200)))


@pytest.mark.parametrize(("numerics", "masked"), [("bf16", False), ("bf16 master", True), ("bf16 packed", True)])
def test_wgrad_asks_for_what_its_epilogue_reads_and_nothing_else(gpu, numerics, masked):
    """Once each row of a tile with a mask bit: of experts that fill the ring, weights and what is not packed."""
    width = 256 if "packed" in numerics else 264  # rows of codes and scales that are multiples of 16 bytes too
    made = wgrad.factors((40, width), tokens=400)
    experts = [3, 1, 0]
    kept = wgrad.keep(3, 40, width) if masked else torch.ones(3, 40, width, dtype=torch.bool)
    weight = torch.zeros(wgrad.E, 40, width, dtype=BF16)
    master = torch.zeros(kept.shape) if "master" in numerics else None
    state = [torch.zeros(kept.shape, dtype=F32 if "master" in numerics else BF16) for _ in range(2)]
    own = [(weight, experts), (master, range(3)), *((moment, range(3)) for moment in state)]
    if "packed" in numerics:
        own, state = own[:1], [update_cases.packed(moment.float(), second=i == 1) for i, moment in enumerate(state)]
    stages = [-(-int(rows) // 64) for rows in made.expert_offsets.diff()]
    assert {stages[e] >= 4 for e in experts} == {True, False}
    expected = []
    for listed, e in enumerate(experts):
        for row, column in itertools.product(range(40), range(0, width, 128) if stages[e] >= 4 else ()):
            if kept[listed, row, column : column + 128].any():
                places = [t[at[listed], row, column : column + 128] for t, at in own if t is not None]
                expected += [(place.data_ptr(), place.nbytes) for place in places]
    gpu.emulate()
    arguments = {"experts": torch.tensor(experts), "mask": wgrad.words_of(kept) if masked else None, "master": master}
    expert_wgrad_adamw_(weight, *state, made, AdamW(lr=0.1), Update(step=1), impl="cpu", **arguments)
    assert expected and sorted(gpu.prefetched()) == sorted(expected)


def test_wgrad_asks_for_what_it_adds_to_and_no_state_that_its_rule_leaves_alone(gpu):
    made, out = wgrad.factors((40, 136), pattern="one_expert", tokens=260), torch.zeros(wgrad.E, 40, 136)
    e, buffer = int(made.expert_offsets.diff().argmax()), torch.zeros_like(out)
    rows = [out[e, row, column : column + 128] for row in range(40) for column in (0, 128)]
    gpu.emulate()
    wgrad.store(CUDA, made, out_dtype=F32)
    assert gpu.prefetched() == []
    for ask in (
        lambda: expert_wgrad(*made[:3], input_rows=made.input_rows, out=out, impl="cpu"),
        lambda: expert_wgrad_sgd_(out, buffer, made, SGD(lr=0.1), Update(step=1), impl="cpu"),
    ):
        gpu.emulate()
        ask()
        assert sorted(gpu.prefetched()) == sorted((row.data_ptr(), row.nbytes) for row in rows)


@pytest.mark.parametrize("indexed", wgrad.INDEXED)
def test_wgrad_inner_products_in_many_orders_of_threads(gpu, indexed):
    """6 tiles, experts of more stages than the ring has, with less than one and none, of one gradient or of both."""
    sides = [("neither", "skewed", 120), (indexed, "half_empty", 330)]
    gradients = [
        wgrad.scattered(wgrad.factors((136, 264), pattern=pattern, tokens=tokens, exact=True), side)
        for side, pattern, tokens in sides
    ]
    rows = torch.stack([one.expert_offsets.diff() for one in gradients])
    assert rows.max() > 5 * 64 > 64 > rows.min() == 0 < rows.amax(0).min()
    kept = wgrad.keep(wgrad.E, 136, 264)
    kept[1, :, 128:] = False
    for seed in range(4):
        gpu.emulate(1 + seed, seed=seed)
        wgrad.check_inner(CUDA, gradients[:: 1 if seed % 2 else -1], kept if seed > 1 else None)


def test_wgrad_inner_products_of_three_gradients_and_of_one(gpu):
    gradients = [wgrad.scattered(wgrad.factors((264, 8), exact=True, seed=i), "grad") for i in range(3)]
    for seed, some in enumerate((gradients, gradients[:1])):
        gpu.emulate(2, seed=seed)
        wgrad.check_inner(CUDA, some)


def test_wgrad_inner_products_leave_out_what_has_no_bit_or_lies_beyond(gpu):
    """An infinite row of dW without a bit, whose words have some behind the last column; and a column of one expert."""
    kept = torch.ones(wgrad.E, 40, 136, dtype=torch.bool)
    kept[:, 5], kept[0, :, 7] = False, False
    gradients = [wgrad.scattered(wgrad.factors((40, 136), exact=True, seed=i), "neither") for i in range(2)]
    for one in gradients:
        one.grad[:, 5], one.input[0, 7] = torch.inf, torch.inf
    wgrad.check_inner(CUDA, gradients, kept)


def test_wgrad_beyond_what_the_kernel_takes_is_an_error(gpu):
    made, fine = wgrad.scattered(wgrad.factors((40, 136)), "input"), torch.zeros(7, 64, dtype=BF16)
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
            wgrad.store(CUDA, made._replace(grad=grad, input=made.input.to(grad.dtype)))
    with pytest.raises(RuntimeError, match="Hopper"):
        wgrad.check_update(CUDA, "adamw", "fp16", wgrad.factors((40, 136)))
    gpu.emulate(capability=100)
    with pytest.raises(RuntimeError, match="Hopper"):
        wgrad.store(CUDA, made)


def test_wgrad_of_an_expert_that_does_not_exist_stops_the_kernel(gpu):
    made, weight = wgrad.scattered(wgrad.factors((40, 136)), "input"), torch.zeros(wgrad.E, 40, 136)
    bounds = torch.tensor([[0, 1]])
    with pytest.raises(RuntimeError, match="trap"):
        gpu.expert_wgrad_sgd_(weight, None, None, *made[:2], bounds, None, made.input_rows, torch.tensor([9]), None,
                              0.1, 0.0, 1.0, 0.0, False, 1, False, 0, 0, 0)  # fmt: skip


# ---- expert_mlp --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
def test_mlp_in_many_orders_of_threads(gpu, seed):
    """A depth of more stages than the ring, whose parities repeat, and of one piece in the last; tiles of some rows."""
    layout = {"transposed": seed > 1, "interleaved": seed % 2 == 1, "bias": seed in (0, 3)}
    gpu.emulate(1 + seed % 3, seed=seed)
    exact_mlp.check(CUDA, exact_mlp.layer("sentinels", 80, 392, 136, **layout))


@pytest.mark.parametrize("tokens", [1, 63, 64, 65, 128, 129])
def test_mlp_of_one_expert_with_rows_around_a_tile(gpu, tokens):
    """Tiles whose lower half has no row, one and all of its own."""
    gpu.emulate(1 + tokens % 2, seed=tokens)
    exact_mlp.check(CUDA, exact_mlp.layer("one_expert", tokens, 72, 8, top_k=1, transposed=True))


@pytest.mark.parametrize(("tokens", "multiprocessors"), [(260, 2), (300, 5)])
def test_mlp_of_pairs_of_blocks(gpu, tokens, multiprocessors):
    """Two row tiles that share weights; a third one, whose columns two blocks split or of which one has none."""
    gpu.emulate(multiprocessors, seed=tokens)
    exact_mlp.check(CUDA, exact_mlp.layer("one_expert", tokens, 72, 136, top_k=1, transposed=tokens == 300))


@pytest.mark.parametrize("interleaved", [False, True])
def test_mlp_of_several_column_tiles(gpu, interleaved):
    gpu.emulate(2, seed=interleaved)
    exact_mlp.check(CUDA, exact_mlp.layer("one_expert", 20, 8, 264, top_k=1, interleaved=interleaved))


def test_mlp_activates_what_is_stored(gpu):
    """Pre-activations beyond 256 are not all bfloat16 numbers: both passes take them as they were rounded."""
    made = exact_mlp.layer("uniform", 7, 16, 24, experts=2, bias=True)
    made["gate_up_bias"][:] = 256
    exact_mlp.check(CUDA, made)


def test_mlp_of_more_experts_than_a_block_has_threads(gpu):
    gpu.emulate(2, seed=2)
    exact_mlp.check(CUDA, exact_mlp.layer("uniform", 3, 8, 8, experts=500))


def test_mlp_reads_no_row_of_others_and_nothing_beside_its_operands(gpu):
    """Weights and rows are windows of tensors whose rest is NaN; so are the weights of experts without a row."""
    made = exact_mlp.layer("half_empty", 60, 72, 40)
    for name, empty in (("gate_up_proj", torch.nan), ("down_proj", torch.inf)):
        made[name][made["expert_offsets"].diff() == 0] = empty
    expected = exact_mlp.gold(made)
    for name in ("hidden_states", "gate_up_proj", "down_proj", "grad_out"):
        wide = torch.full((*made[name].shape[:-1], made[name].shape[-1] + 16), torch.nan, dtype=BF16)
        wide[..., 8:-8] = made[name]
        made[name] = wide[..., 8:-8]
    grad_out = made.pop("grad_out")
    with poison():
        out, z = mlp.forward("cpu", **made)
        got = exact_mlp.Results(out, z, *mlp.gradients("cpu", grad_out=grad_out, z=z, **made))
    assert all(torch.equal(a.double(), b) for a, b in zip(got, expected, strict=True))


def test_mlp_of_rows_that_no_expert_has(gpu):
    """They come out as zero, whatever lies in their hidden states, weights, z and upstream gradients."""
    made = exact_mlp.layer("sentinels", 20, 16, 24, experts=3, top_k=1, bias=True)
    expected, used = exact_mlp.gold(made), int(made["expert_offsets"][-1])
    away = made["sorted_rows"][used:].long()  # with one expert a token, a slot is its token
    assert len(away) > 0
    for name in ("hidden_states", "top_k_weights", "grad_out"):
        made[name][away] = torch.nan
    grad_out = made.pop("grad_out")
    with poison():
        out, z = mlp.forward("cpu", **made)
        unused = z.clone()
        unused[used:] = torch.nan
        got = exact_mlp.Results(out, z, *mlp.gradients("cpu", grad_out=grad_out, z=unused, **made))
    assert all(torch.equal(a.double(), b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("interleaved", [False, True])
def test_mlp_computes_any_part_of_its_backward(gpu, interleaved):
    arguments = exact_mlp.layer("sentinels", 7, 8, 8, experts=2, bias=True, interleaved=interleaved)
    grad_out = arguments.pop("grad_out")
    z = mlp.forward("cpu", **arguments)[1]
    whole = mlp.backward("cpu", grad_out=grad_out, z=z, **arguments)
    for wanted in ((0,), (1,), (2,), (3,), (1, 3), (0, 1), (2, 3), ()):
        part = mlp.backward("cpu", grad_out=grad_out, z=z, needs=[i in wanted for i in range(5)], **arguments)
        for i in range(4):
            assert torch.equal(part[i], whole[i]) if i in wanted else part[i].numel() == 0


@pytest.mark.parametrize("layout", LAYOUTS)
def test_mlp_takes_rows_and_biases_in_any_layout(gpu, layout, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    arguments = exact_mlp.layer("sentinels", 7, 16, 24, experts=3, bias=True)
    grad_out, expected = arguments["grad_out"], exact_mlp.gold(arguments)
    for name in ("hidden_states", "top_k_weights", "gate_up_bias", "down_bias"):
        arguments[name] = in_layout(arguments[name], layout)
    x, weights, rows, offsets, w1, w2, b1, b2, _, *options, _ = mlp.flat(arguments)
    routed = weights, rows, offsets, w1, w2
    out, z = mlp_glue.forward_cuda(x, *routed, b1, b2, *options)
    z, grad_out = in_layout(z, layout), in_layout(grad_out, layout)
    d_x, d_weights, dz, scaled, _ = mlp_glue.backward_cuda(grad_out, x, *routed, b2, z, *options, [True] * 5)
    for ours, theirs in zip((out, z, d_x, d_weights, dz, scaled), expected, strict=True):
        assert torch.equal(ours.double(), theirs)


def test_mlp_beyond_what_the_kernel_takes_is_an_error(gpu):
    weights, fine = torch.zeros(2, 2), torch.zeros(3, 16, 24, dtype=BF16)
    mlp_glue.check_hopper((9, 0), weights, "silu", True, fine, fine[:1, 8:, :8])
    for capability in ((8, 9), (10, 0)):
        with pytest.raises(Unfit, match="compute capability 9.0"):
            mlp_glue.check_hopper(capability, weights, "silu", True, fine)
    for activation, gated in (("gelu", True), ("silu", False)):
        with pytest.raises(Unfit, match=f"SwiGLU alone; got '{activation}'"):
            mlp_glue.check_hopper((9, 0), weights, activation, gated, fine)
    with pytest.raises(Unfit, match="float64"):
        mlp_glue.check_hopper((9, 0), weights.double(), "silu", True, fine)
    with pytest.raises(Unfit, match="at most 4095 experts; got 4096"):
        mlp_glue.check_hopper((9, 0), weights, "silu", True, fine[:1, :8, :8].repeat(4096, 1, 1))
    for bad in (fine.float(), fine[..., :20], fine[..., 4:12], fine.mT):
        with pytest.raises(Unfit, match="sizes that 8 divides"):
            mlp_glue.check_hopper((9, 0), weights, "silu", True, fine, bad)
    # the launcher's own word
    for expected, case, device in (
        ("SwiGLU alone", {"gated": False}, {}),
        ("16-byte addresses", {"hidden": 20}, {}),
        ("Hopper", {"experts": 4096, "hidden": 8, "inner": 8}, {}),
        ("Hopper", {}, {"capability": 100}),
        ("an error of the emulated launch", {}, {"shared_limit": 1024}),
    ):
        gpu.emulate(**device)
        with pytest.raises(RuntimeError, match=expected):
            mlp.forward("cpu", **mlp.case(dtype=BF16, **case))
