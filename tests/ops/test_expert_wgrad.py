"""expert_wgrad: the grouped weight gradient and each epilogue against plain sums."""

import pytest
import torch

from moe_unlearn.ops import (
    SGD,
    AdamW,
    Update,
    expert_wgrad,
    expert_wgrad_ref,
    masked_adamw_,
    masked_sgd_,
    route,
    weight_score,
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

T, K, E, M, P = 21, 2, 5, 12, 40


def case(pattern="skewed", dtype=torch.float32, seed=0, exact=False):
    """Factors of one layer: gradient rows in sorted order, inputs by token."""
    made = route(routing(pattern, T, E, K, seed=seed), E)
    generator = torch.Generator().manual_seed(seed)

    def values(rows, width):
        if exact:
            return integers(rows, width, dtype=dtype, seed=rows)
        return torch.randn(rows, width, generator=generator).to(dtype)

    return {
        "grad": values(T * K, M),
        "input": values(T, P),
        "expert_offsets": made.expert_offsets,
        "input_rows": made.sorted_rows // K,
    }


def by_hand(case, experts=range(E)):
    """float64 sum of outer products, one row after the other."""
    out = torch.zeros(len(list(experts)), M, P, dtype=torch.float64)
    bounds = case["expert_offsets"].tolist()
    if case["expert_offsets"].dim() == 1:
        bounds = list(zip(bounds[:-1], bounds[1:], strict=True))
    for i, e in enumerate(experts):
        for j in range(*bounds[e]):
            g = case["grad"][case["grad_rows"][j] if "grad_rows" in case else j]
            x = case["input"][case["input_rows"][j] if "input_rows" in case else j]
            out[i] += torch.outer(g.double(), x.double())
    return out


@pytest.mark.quick
@pytest.mark.parametrize("pattern", ROUTINGS)
def test_store_is_exact_on_integers_and_writes_every_element(pattern):
    made = case(pattern, exact=True)
    with poison():
        got = expert_wgrad(**made)
    assert torch.equal(got.double(), by_hand(made))
    empty = made["expert_offsets"].diff() == 0
    assert (got[empty] == 0).all()


@pytest.mark.quick
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_store_accuracy(dtype, layout):
    made = case(dtype=dtype)
    moved = {k: in_layout(v, layout) for k, v in made.items()}
    baseline = Reference(lambda: expert_wgrad_ref(**made)).baseline()
    assert_as_accurate(expert_wgrad(**moved), baseline, by_hand(made))


@pytest.mark.quick
def test_row_maps_on_either_side():
    made = case(exact=True)
    rows = torch.randperm(T * K)
    inverse = torch.empty_like(rows)
    inverse[rows] = torch.arange(T * K)
    shuffled = made | {"grad": made["grad"][rows], "grad_rows": inverse}
    assert torch.equal(expert_wgrad(**shuffled), expert_wgrad(**made))


@pytest.mark.quick
@pytest.mark.parametrize("listed", [[3], [4, 0], [2, 2], []])
def test_only_listed_experts_in_their_order(listed):
    made = case(exact=True)
    experts = torch.tensor(listed, dtype=torch.int32)
    got = expert_wgrad(**made, experts=experts)
    assert got.shape == (len(listed), M, P)
    assert torch.equal(got.double(), by_hand(made, listed))


@pytest.mark.quick
def test_bounds_of_a_part_of_each_experts_rows():
    """The two groups of a batch, forget rows first in every expert: their gradients add up to the whole."""
    made = case(exact=True)
    start, stop = made["expert_offsets"][:-1], made["expert_offsets"][1:]
    middle = (start + 2 * stop) // 3
    whole = expert_wgrad(**made)
    parts = []
    for bounds in (torch.stack([start, middle], 1), torch.stack([middle, stop], 1)):
        part = made | {"expert_offsets": bounds}
        parts.append(expert_wgrad(**part))
        assert torch.equal(parts[-1].double(), by_hand(part))
        assert torch.equal(expert_wgrad(**part, experts=torch.tensor([3, 1])), parts[-1][[3, 1]])
    assert torch.equal(parts[0] + parts[1], whole) and all(part.any() for part in parts)


@pytest.mark.quick
def test_rows_behind_the_last_expert_are_not_read():
    made = case("sentinels", exact=True)
    behind = int(made["expert_offsets"][-1])
    expected = expert_wgrad(**made)
    made["grad"][behind:] = torch.nan
    made["input_rows"][behind:] = 10**9
    assert torch.equal(expert_wgrad(**made), expected)


@pytest.mark.quick
def test_a_float32_result_of_bf16_rows_is_not_rounded_on_the_way():
    made = case(dtype=torch.bfloat16)
    got = expert_wgrad(**made, out_dtype=torch.float32)
    wide = {k: v.float() if v.is_floating_point() else v for k, v in made.items()}
    assert_as_accurate(got, Reference(lambda: expert_wgrad_ref(**wide)).baseline(), by_hand(made))
    out = torch.zeros(E, M, P)
    assert torch.equal(expert_wgrad(**made, out=out), got)


@pytest.mark.quick
def test_masked_store():
    made = case(exact=True)
    kept = torch.rand(E, M, P) > 0.4
    got = expert_wgrad(**made, mask=pack_bits(kept))
    assert torch.equal(got.double(), torch.where(kept, by_hand(made), 0))


@pytest.mark.quick
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_accumulate_adds_in_place(dtype):
    made = case(exact=True)
    experts = torch.tensor([1, 3])
    out = integers(2, M, P, dtype=dtype, seed=5)
    before = out.clone()
    kept = torch.rand(2, M, P) > 0.4
    version = out._version
    assert expert_wgrad(**made, experts=experts, out=out, mask=pack_bits(kept)) is out
    assert torch.equal(out.double(), before.double() + torch.where(kept, by_hand(made, [1, 3]), 0))
    assert out._version > version


@pytest.mark.quick
def test_accumulate_twice_is_twice():
    made, out = case(exact=True), torch.zeros(E, M, P)
    expert_wgrad(**made, out=out)
    expert_wgrad(**made, out=out)
    assert torch.equal(out.double(), 2 * by_hand(made))


@pytest.mark.quick
def test_a_bf16_buffer_is_rounded_once():
    made = case(dtype=torch.bfloat16)
    out = torch.randn(E, M, P).bfloat16()
    expected = (out.float() + expert_wgrad(**made, out_dtype=torch.float32)).bfloat16()
    assert torch.equal(expert_wgrad(**made, out=out), expected)


def update_case(dtype=torch.float32):
    torch.manual_seed(0)
    weight = torch.randn(E, M, P).to(dtype)
    return case(dtype=dtype), weight, torch.tensor([1, 3]), torch.rand(2, M, P) > 0.4


OPTIONS = [
    {"lr": 0.1, "weight_decay": 0.01},
    {"lr": 0.1, "weight_decay": 0.01, "rounding": "stochastic", "seed": 5, "parameter_id": 7},
]


@pytest.mark.quick
@pytest.mark.parametrize("options", OPTIONS, ids=["nearest", "stochastic"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_sgd_epilogue_is_store_then_masked_sgd(dtype, options):
    made, weight, experts, kept = update_case(dtype)
    other, mask = weight.clone(), pack_bits(kept)
    buffers = [torch.zeros(2, M, P) for _ in range(2)]
    for step in (1, 2):
        rest = options | {"momentum": 0.9, "step": step}
        by_keyword(expert_wgrad_sgd_)(weight, buffers[0], Factors(**made), experts=experts, mask=mask, **rest)
        dw = expert_wgrad(**made, experts=experts, out_dtype=torch.float32)
        by_keyword(masked_sgd_)(other, dw, buffers[1], mask, slices=experts, **rest)
    assert torch.equal(weight, other) and torch.equal(*buffers)


@pytest.mark.quick
@pytest.mark.parametrize("options", OPTIONS, ids=["nearest", "stochastic"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_adamw_epilogue_leaves_everything_else_bitwise_alone(dtype, options):
    made, weight, experts, kept = update_case(dtype)
    before, other, mask = weight.clone(), weight.clone(), pack_bits(kept)
    weight[0], before[0], other[0] = torch.nan, torch.nan, torch.nan
    moments = [torch.zeros(2, M, P) for _ in range(4)]
    for step in (1, 2, 3):
        rest = options | {"step": step}
        by_keyword(expert_wgrad_adamw_)(weight, *moments[:2], Factors(**made), experts=experts, mask=mask, **rest)
        dw = expert_wgrad(**made, experts=experts, out_dtype=torch.float32)
        by_keyword(masked_adamw_)(other, dw, *moments[2:], mask, slices=experts, **rest)
    bits = torch.int32 if dtype == torch.float32 else torch.int16
    assert torch.equal(weight.view(bits), other.view(bits))
    touched = torch.zeros(E, M, P, dtype=torch.bool)
    touched[experts] = kept
    assert torch.equal(weight[~touched].view(bits), before[~touched].view(bits))
    assert (weight[touched] != before[touched]).float().mean() > 0.9
    assert not (moments[0][~kept]).any() and moments[0][kept].all()


@pytest.mark.quick
def test_epilogues_keep_a_master_and_take_all_experts_by_default():
    made, weight, _, _ = update_case(torch.bfloat16)
    master, other = weight.float(), weight.clone()
    other_master = master.clone()
    expert_wgrad_sgd_(weight, None, Factors(**made), SGD(lr=1e-3), Update(step=1), master=master)
    dw = expert_wgrad(**made, out_dtype=torch.float32)
    masked_sgd_(other, dw, None, None, SGD(lr=1e-3), Update(step=1), master=other_master)
    assert torch.equal(weight, other) and torch.equal(master, other_master)
    assert torch.equal(master.bfloat16(), weight) and not torch.equal(master, weight.float())


@pytest.mark.quick
def test_autograd_notices_an_update_of_a_weight_it_still_needs():
    made, weight, experts, kept = update_case()
    weight.requires_grad_()
    loss = (weight**2).sum()
    with torch.no_grad():
        expert_wgrad_sgd_(weight, None, Factors(**made), SGD(lr=0.1), Update(step=1), experts=experts)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.quick
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_score_epilogue(dtype):
    forget, retain = case(seed=1, dtype=dtype), case("half_empty", seed=2, dtype=dtype)
    weight = torch.randn(E, M, P).to(dtype)
    experts = torch.tensor([0, 4])
    got = expert_wgrad_score(weight, Factors(**forget), Factors(**retain), gamma=0.5, experts=experts)
    sides = [expert_wgrad(**side, experts=experts, out_dtype=torch.float32) for side in (forget, retain)]
    assert torch.equal(got, weight_score(weight[experts], *sides, gamma=0.5))
    assert got.dtype == torch.float32 and torch.equal(got[0], weight[0].float() * sides[0][0])


@pytest.mark.quick
@pytest.mark.parametrize("m", [1, 2, 3])
def test_inner_products_are_exact_on_integers_and_masked(m):
    cases = [case(seed=i, exact=True) for i in range(m)]
    kept = torch.rand(E, M, P) > 0.4
    gradients = [Factors(**c) for c in cases]
    got = expert_wgrad_inner(gradients, mask=pack_bits(kept))
    sides = [torch.where(kept, by_hand(side), 0) for side in cases]
    expected = [[(a * b).sum((1, 2)) for b in sides] for a in sides]
    expected = torch.stack([torch.stack(row, 1) for row in expected], 1)
    assert got.dtype == torch.float64 and torch.equal(got, expected)
    assert torch.equal(got, got.transpose(1, 2)) and (got.diagonal(0, 1, 2)[:, 0] > 0).any()
    few = expert_wgrad_inner(gradients, experts=torch.tensor([3, 0]), mask=pack_bits(kept)[[3, 0]])
    assert torch.equal(few, expected[[3, 0]])
    assert expert_wgrad_inner(gradients, experts=torch.zeros(0).int()).shape == (0, m, m)


@pytest.mark.quick
def test_bad_gradient_sets():
    one = Factors(**case())
    with pytest.raises(ValueError, match="at least one gradient; got none"):
        expert_wgrad_inner([])
    with pytest.raises(ValueError, match="one M, P and dtype"):
        expert_wgrad_inner([one, one._replace(grad=torch.randn(T * K, M + 1))])
    with pytest.raises(ValueError, match="gamma must be positive; got 0"):
        expert_wgrad_score(torch.randn(E, M, P), one, one, gamma=0)
    with pytest.raises(ValueError, match=r"weight must be float \[5, 12, 40\]; got .* \[5, 40, 12\]"):
        expert_wgrad_score(torch.randn(E, P, M), one, one, gamma=1)
    with pytest.raises(ValueError, match=r"momentum_buffer must be float \[2, 12, 40\]"):
        buffer, rule = torch.zeros(E, M, P), SGD(lr=1, momentum=0.9)
        expert_wgrad_sgd_(torch.randn(E, M, P), buffer, one, rule, Update(step=1), experts=torch.tensor([1, 3]))
    with pytest.raises(ValueError, match="step counts from 1; got 0"):
        expert_wgrad_sgd_(torch.randn(E, M, P), None, one, SGD(lr=1), Update(step=0))


def test_opcheck_of_the_epilogues():
    check = torch.library.opcheck
    ops = torch.ops.moe_unlearn
    made, weight, experts, kept = update_case()
    factors, mask = Factors(**made), pack_bits(kept)
    state = [torch.rand(2, M, P) for _ in range(2)]
    sgd, adamw = (*SGD(lr=0.1, momentum=0.9), *Update(step=2)), (*AdamW(lr=0.1, beta2=0.99), *Update(step=2))
    check(ops.expert_wgrad_sgd.default, (weight, state[0], None, *factors, experts, mask, *sgd, "auto"))
    check(ops.expert_wgrad_adamw.default, (weight, *state, None, *factors, experts, mask, *adamw, "auto"))
    check(ops.expert_wgrad_score.default, (weight, *factors, *factors, experts, 0.5, "auto"))
    lists = map(list, zip(factors, factors, strict=True))
    check(ops.expert_wgrad_inner.default, (*lists, experts, mask, "auto"))


def test_opcheck_and_compile():
    made = case()
    experts = torch.tensor([1, 3], dtype=torch.int32)
    mask = pack_bits(torch.rand(2, M, P) > 0.5)
    arguments = (made["grad"], made["input"], made["expert_offsets"], None, made["input_rows"], experts, mask)
    torch.library.opcheck(torch.ops.moe_unlearn.expert_wgrad.default, (*arguments, torch.float32, "auto"))
    out = torch.zeros(2, M, P)
    torch.library.opcheck(torch.ops.moe_unlearn.expert_wgrad_accumulate.default, (out, *arguments, "auto"))
    compiled = torch.compile(lambda: expert_wgrad(**made), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(), expert_wgrad(**made))


BAD = {
    "grad dims": ({"grad": torch.randn(3)}, ValueError, "grad must be float with two dimensions"),
    "input int": ({"input": torch.ones(T, P, dtype=torch.int64)}, ValueError, "input must be float"),
    "dtypes": ({"input": torch.randn(T, P).double()}, TypeError, "must have one dtype"),
    "offsets": ({"expert_offsets": torch.zeros(6)}, ValueError, r"int32 \[E \+ 1\] or \[E, 2\]"),
    "bounds": ({"expert_offsets": torch.zeros(5, 3).int()}, ValueError, r"int32 \[E \+ 1\] or \[E, 2\]"),
    "device": ({"input": torch.randn(T, P, device="meta")}, ValueError, "input must be on cpu"),
    "rows": ({"input_rows": torch.zeros(T * K)}, ValueError, "input_rows must be int32 or int64"),
    "experts": ({"experts": torch.ones(1, 1, dtype=torch.int64)}, ValueError, "experts must be int32 or int64"),
    "out": ({"out": torch.zeros(E, M, P + 1)}, ValueError, r"out must be float \[5, 12, 40\]"),
    "mask": ({"mask": torch.zeros(E, M, 1, dtype=torch.int32)}, ValueError, r"int32 words \[5, 12, 2\]"),
}


@pytest.mark.quick
@pytest.mark.parametrize("change,error,message", BAD.values(), ids=BAD)
def test_bad_inputs(change, error, message):
    with pytest.raises(error, match=message):
        expert_wgrad(**case() | change)
