"""expert_wgrad in C++: dW against float64 sums, and each epilogue against the op it fuses, bit for bit."""

import itertools

import pytest
import torch

from moe_unlearn import native
from moe_unlearn.ops import (
    AdamW,
    Update,
    expert_wgrad,
    expert_wgrad_ref,
    masked_adamw_,
    masked_sgd_,
    route,
    weight_score_ref,
)
from moe_unlearn.ops.bits import pack_bits
from moe_unlearn.ops.expert_wgrad import (
    Factors,
    expert_wgrad_adamw_,
    expert_wgrad_inner,
    expert_wgrad_score,
    expert_wgrad_sgd_,
)
from moe_unlearn.testing import LAYOUTS, ROUTINGS, assert_as_accurate, in_layout, integers, poison, routing
from moe_unlearn.testing.yardstick import Reference
from tests.support.by_keyword import by_keyword

pytestmark = pytest.mark.quick
F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
E = 5
SMALL, BLOCKS = (12, 40), (250, 1100)  # M and P: one block an expert, and several with a ragged last


def factors(shape=SMALL, dtype=F32, pattern="skewed", tokens=21, top_k=2, exact=False, seed=0):
    """Factors of one layer: gradient rows in sorted order, inputs by token."""
    made = route(routing(pattern, tokens, E, top_k, seed=seed), E)
    generator = torch.Generator().manual_seed(seed)
    rows = [(tokens * top_k, shape[0]), (tokens, shape[1])]
    if exact:
        grad, input = (integers(*size, dtype=dtype, low=-1, high=1, seed=seed + i) for i, size in enumerate(rows))
    else:
        grad, input = (torch.randn(size, generator=generator).to(dtype) for size in rows)
    return Factors(grad, input, made.expert_offsets, None, made.sorted_rows // top_k)


def gold(made, experts=None):
    return expert_wgrad_ref(*(t.double() if t is not None and t.is_floating_point() else t for t in made), experts)


# which factors are gathered row by row; the rows of the others stand in order
INDEXED = ("neither", "grad", "input", "both")


def scattered(shape, indexed="input", pattern="skewed", tokens=60, exact=True, seed=0):
    """bfloat16 factors in sorted order, but the indexed ones scattered among rows of NaN."""
    made = factors(shape, BF16, pattern, tokens, exact=exact, seed=seed)
    made = made._replace(input=made.input[made.input_rows], input_rows=None)
    for name in {"neither": (), "both": ("grad", "input")}.get(indexed, (indexed,)):
        rows = getattr(made, name)
        place = torch.randperm(2 * len(rows), generator=torch.Generator().manual_seed(seed))[: len(rows)]
        wide = torch.full((2 * len(rows), rows.shape[1]), torch.nan, dtype=BF16)
        wide[place] = rows
        made = made._replace(**{name: wide, f"{name}_rows": place})
    return made


def poisoned_elsewhere(made, experts):
    """(factors with a part of each expert's rows, the same with NaN and infinity in all that the experts do not use)"""
    start, stop = made.expert_offsets[:-1], made.expert_offsets[1:]
    made = made._replace(expert_offsets=torch.stack([start + 3, stop - 2], 1))
    own = torch.cat([torch.arange(*made.expert_offsets[e].tolist()) for e in experts])
    poisoned = made
    for name in ("grad", "input"):
        rows, index = getattr(made, name), getattr(made, f"{name}_rows")
        wide = torch.full((len(rows), rows.shape[1] + 16), torch.inf, dtype=rows.dtype)
        wide[::2] = torch.nan
        used = own if index is None else index[own]
        wide[used, 8:-8] = rows[used]
        poisoned = poisoned._replace(**{name: wide[:, 8:-8]})
    return made, poisoned


def moved_to(device, made):
    return Factors(*(None if t is None else t.to(device) for t in made))


def store(made, impl="cpu", **options):
    return expert_wgrad(*made[:3], grad_rows=made.grad_rows, input_rows=made.input_rows, impl=impl, **options)


def keep(*shape, seed=0):
    kept = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.5
    kept[:, ::3, :64] = False  # whole words of zeros
    kept[1:3, shape[1] // 8 :] = False  # whole blocks, and the rest of one
    return kept


# ---- store and accumulate ------------------------------------------------------------------------------------


@pytest.mark.parametrize("pattern", ROUTINGS)
@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
def test_store_is_exact_on_integers_and_writes_every_element(pattern, dtype):
    made = factors(pattern=pattern, dtype=dtype, exact=True)
    with poison():
        got = store(made)
    assert torch.equal(got.double(), gold(made))
    assert not got[made.expert_offsets.diff() == 0].any()


@pytest.mark.parametrize("shape", [SMALL, BLOCKS], ids=str)
@pytest.mark.parametrize(
    "dtypes", [(F32, F32), (BF16, BF16), (BF16, F32), (F32, BF16), (F16, F16), (F16, BF16)], ids=str
)
@pytest.mark.slow(but=7)
def test_store_accuracy(shape, dtypes, instruction_set):
    dtype, out_dtype = dtypes
    made = factors(shape, dtype, tokens=200)
    baseline = Reference(lambda: expert_wgrad_ref(*made, None, None, out_dtype)).baseline()
    assert_as_accurate(store(made, out_dtype=out_dtype), baseline, gold(made))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_memory_layouts(layout, dtype):
    made = factors(dtype=dtype)
    moved = Factors(*(None if t is None else in_layout(t, layout) for t in made))
    assert torch.equal(store(moved), store(made))
    mask, out = pack_bits(keep(E, *SMALL)), torch.randn(E, *SMALL).to(dtype)
    expected = store(made, out=out.clone(), mask=mask)
    assert torch.equal(store(moved, out=in_layout(out, layout), mask=in_layout(mask, layout)), expected)


@pytest.mark.parametrize("listed", [[3], [4, 0], [2, 2], []], ids=str)
@pytest.mark.parametrize("kind", [torch.int32, torch.int64], ids=str)
def test_only_listed_experts_in_their_order(listed, kind):
    made = factors(exact=True)
    experts = torch.tensor(listed, dtype=kind)
    rows = torch.randperm(len(made.grad))
    shuffled = made._replace(grad=made.grad[rows], grad_rows=rows.argsort().to(kind))
    assert torch.equal(store(shuffled, experts=experts).double(), gold(made, experts))


def test_bounds_of_a_part_of_each_experts_rows():
    made = factors(exact=True)
    start, stop = made.expert_offsets[:-1], made.expert_offsets[1:]
    middle = (start + 2 * stop) // 3
    for bounds in ([start, middle], [middle, stop]):
        part = made._replace(expert_offsets=torch.stack(bounds, 1))
        assert torch.equal(store(part).double(), gold(part))
        assert torch.equal(store(part, experts=torch.tensor([3, 1])), store(part)[[3, 1]])


def test_rows_behind_the_last_expert_are_not_read():
    made = factors(pattern="sentinels", exact=True)
    behind, expected = int(made.expert_offsets[-1]), store(made)
    made.grad[behind:] = torch.nan
    made.input_rows[behind:] = 10**9
    assert torch.equal(store(made), expected)


@pytest.mark.parametrize("dtypes", [(F32, F32), (BF16, BF16), (BF16, F32), (F16, F16)], ids=str)
def test_masked_store_and_accumulate_round_once(dtypes, instruction_set):
    dtype, out_dtype = dtypes
    made, kept = factors(BLOCKS, dtype), keep(E, *BLOCKS)
    dw = store(made, out_dtype=F32)
    got = store(made, mask=pack_bits(kept), out_dtype=out_dtype)
    assert torch.equal(got, torch.where(kept, store(made, out_dtype=out_dtype), 0))
    out = torch.randn(dw.shape).to(out_dtype)
    expected = torch.where(kept, (out.float() + dw).to(out_dtype), out)
    assert torch.equal(store(made, out=out, mask=pack_bits(kept)), expected)


def test_float64_goes_to_the_reference():
    made = factors()
    assert torch.equal(store(made, out_dtype=F64), expert_wgrad_ref(*made, None, None, F64))
    out = torch.ones(E, *SMALL, dtype=F64)
    assert torch.equal(store(made, out=out.clone()), out + expert_wgrad_ref(*made, None, None, F64))


# ---- sgd and adamw -------------------------------------------------------------------------------------------

RULES = {
    "sgd": ({"lr": 0.1, "weight_decay": 0.01}, 0),
    "momentum": ({"lr": 0.1, "momentum": 0.9, "dampening": 0.2}, 1),
    "nesterov": ({"lr": 0.1, "momentum": 0.9, "nesterov": True}, 1),
    "adamw": ({"lr": 0.1, "weight_decay": 0.1, "betas": (0.8, 0.95)}, 2),
}
# dtypes of weight and state, rounding, whether there is a master
NUMERICS = {
    "float32": (F32, F32, "nearest", False),
    "narrow state": (BF16, BF16, "nearest", False),
    "half": (F16, F16, "nearest", False),
    "wide state": (BF16, F32, "nearest", False),
    "stochastic": (BF16, F32, "stochastic", False),
    "master": (BF16, F32, "nearest", True),
}


def check_update(
    rule, numerics, shape=SMALL, dtype=None, layout="contiguous", experts=(3, 1), tokens=21, impl="cpu", device="cpu"
):
    """Steps 1 and 2 of the fused update give the bits of masked_update on the stored dW."""
    options, states = RULES[rule]
    weight_dtype, state_dtype, rounding, has_master = NUMERICS[numerics]
    made = moved_to(device, factors(shape, dtype or weight_dtype, tokens=tokens))
    experts = None if experts is None else torch.tensor(experts, device=device)
    count = E if experts is None else len(experts)
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(E, *shape, generator=generator).to(device, weight_dtype)
    weight[0] = torch.nan if experts is not None else weight[0]
    mask = pack_bits(keep(count, *shape)).to(device)
    state = [torch.zeros(count, *shape, dtype=state_dtype, device=device) for _ in range(states)]
    master = (weight if experts is None else weight[experts]).float() if has_master else None
    random = {"rounding": rounding, "seed": 5, "parameter_id": 7}
    narrow = state_dtype == weight_dtype == made.grad.dtype and rounding == "nearest" and (states or not has_master)
    copies = [None if t is None else t.clone() for t in (weight, master, *state)]
    moved = [None if t is None else in_layout(t.clone(), layout) for t in (weight, master, *state)]
    for step in (1, 2):
        pair = (expert_wgrad_adamw_, masked_adamw_) if states == 2 else (expert_wgrad_sgd_, masked_sgd_)
        ours, theirs = map(by_keyword, pair)
        rest = options | random | {"step": step, "impl": impl}
        buffers = moved[2:] if states else [None]
        ours(moved[0], *buffers, made, experts=experts, mask=mask, master=moved[1], **rest)
        dw = store(made, impl, experts=experts, out_dtype=made.grad.dtype if narrow else F32)
        buffers = copies[2:] if states else [None]
        theirs(copies[0], dw, *buffers, mask, master=copies[1], slices=experts, **rest)
    for ours, theirs in zip(moved, copies, strict=True):
        if ours is not None:
            bits = {2: torch.int16, 4: torch.int32}[ours.element_size()]
            assert torch.equal(ours.contiguous().view(bits), theirs.view(bits))
    changed = copies[0] if experts is None else copies[0][experts]
    assert (changed != (weight if experts is None else weight[experts])).any()


@pytest.mark.parametrize("rule,numerics", itertools.product(RULES, NUMERICS))
def test_update_is_masked_update_of_the_stored_gradient(rule, numerics):
    if rule == "sgd" and numerics == "wide state":
        pytest.skip("without state there is none to be wide")
    check_update(rule, numerics)


@pytest.mark.parametrize("numerics", ["float32", "narrow state", "stochastic"])
def test_update_in_several_blocks_for_every_instruction_set(numerics, instruction_set):
    check_update("adamw", numerics, BLOCKS)
    check_update("momentum", numerics, BLOCKS, experts=None)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_update_in_every_memory_layout(layout):
    check_update("adamw", "narrow state", layout=layout)
    check_update("momentum", "master", layout=layout)


@pytest.mark.parametrize("dtype,numerics", [(BF16, "float32"), (F32, "narrow state"), (F16, "narrow state")], ids=str)
def test_factors_of_another_dtype_than_the_weight(dtype, numerics):
    check_update("adamw", numerics, dtype=dtype)


def test_experts_without_rows_still_decay_and_others_are_untouched():
    made = factors(pattern="half_empty", dtype=BF16)
    weight, m, v = torch.randn(E, *SMALL).bfloat16(), *(torch.ones(2, *SMALL).bfloat16() for _ in range(2))
    before = weight.clone()
    experts = torch.tensor([0, 1])
    expert_wgrad_adamw_(weight, m, v, made, AdamW(lr=0.1), Update(step=3), experts=experts, impl="cpu")
    assert (weight[0] != before[0]).all() and torch.equal(weight[2:], before[2:])
    assert torch.equal(m[0], torch.full(SMALL, 0.9).bfloat16())


def test_bad_options_of_an_update():
    made, weight = factors(), torch.randn(E, *SMALL)
    for options, message in (
        ({"step": 0}, "step counts from 1; got 0"),
        ({"step": 1, "rounding": "up"}, "rounding must be one of"),
        ({"step": 1, "momentum": 0.9}, "needs a momentum_buffer"),
        ({"step": 1, "nesterov": True}, "nesterov needs momentum"),
    ):
        with pytest.raises(ValueError, match=message):
            by_keyword(expert_wgrad_sgd_)(weight, None, made, lr=1, impl="cpu", **options)


# ---- score and inner products --------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
@pytest.mark.parametrize("shape", [SMALL, BLOCKS], ids=str)
def test_score_is_weight_score_of_the_stored_gradients(shape, dtype):
    sides = factors(shape, dtype, seed=1), factors(shape, dtype, "half_empty", seed=2)
    weight, experts = torch.randn(E, *shape).to(dtype), torch.tensor([4, 0])
    for layout in ("contiguous", "transposed"):
        got = expert_wgrad_score(in_layout(weight, layout), *sides, gamma=0.5, experts=experts, impl="cpu")
        # blocks of two gradients are of fewer rows: their products' bits may differ from the store's
        both = [store(side, experts=experts, out_dtype=F32) for side in sides]
        expected = weight_score_ref(weight[experts], *both, 0.5)
        reference = Reference(lambda: expert_wgrad_score(weight, *sides, gamma=0.5, experts=experts, impl="ref"))
        wide = [gold(side, experts) for side in sides]
        assert_as_accurate(got, reference.baseline(), (weight[experts].double() - wide[1] / 0.5) * wide[0])
        assert shape == BLOCKS or torch.equal(got, expected)


@pytest.mark.parametrize("m", [1, 2, 3])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_inner_products_are_exact_on_integers_and_masked(m, dtype):
    for shape in (SMALL, BLOCKS):
        gradients, kept = [factors(shape, dtype, exact=True, seed=i) for i in range(m)], keep(E, *shape)
        mask = pack_bits(kept)
        dw = [torch.where(kept, gold(side), 0).flatten(1) for side in gradients]
        expected = torch.stack([torch.stack([(a * b).sum(1) for b in dw], 1) for a in dw], 1)
        got = expert_wgrad_inner(gradients, mask=mask, impl="cpu")
        assert got.dtype == F64 and torch.equal(got, expected)
        few = expert_wgrad_inner(gradients, experts=torch.tensor([3, 0]), mask=mask[[3, 0]], impl="cpu")
        assert torch.equal(few, expected[[3, 0]])
    none = expert_wgrad_inner(gradients, experts=torch.zeros(0).int(), impl="cpu")
    assert none.shape == (0, m, m)


# ---- threads and instruction sets ----------------------------------------------------------------------------


def everything(dtype, exact=False):
    made = factors(BLOCKS, dtype, "sentinels", tokens=500, exact=exact)
    experts = torch.tensor([4, 1, 3])
    weight, state = torch.ones(E, *BLOCKS, dtype=dtype), [torch.zeros(3, *BLOCKS, dtype=dtype) for _ in range(2)]
    expert_wgrad_adamw_(weight, *state, made, AdamW(lr=0.1), Update(step=1), experts=experts, impl="cpu")
    return (
        store(made),
        store(made, out=torch.ones(E, *BLOCKS)),
        weight,
        *state,
        expert_wgrad_score(weight, made, made, gamma=1.0, impl="cpu"),
        expert_wgrad_inner([made, made], impl="cpu"),
    )


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_any_number_of_threads(dtype, threads):
    """Ours share the work out alike; what is left is the order of a library's sums, which integers do not show."""
    made = factors(BLOCKS, dtype, "sentinels", tokens=500)
    baseline = Reference(lambda: expert_wgrad_ref(*made)).baseline()
    assert_as_accurate(store(made), baseline, gold(made))
    several = everything(dtype, exact=True)
    torch.set_num_threads(1)
    assert all(torch.equal(a, b) and a.any() for a, b in zip(several, everything(dtype, exact=True), strict=True))


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_instruction_sets_give_the_same_bits(dtype):
    best = everything(dtype)
    for name in native.INSTRUCTION_SETS:
        native.instruction_set(name)
        assert all(torch.equal(a, b) for a, b in zip(best, everything(dtype), strict=True))
    native.instruction_set("")
