"""expert_wgrad: the grouped weight gradient and each epilogue against plain sums."""

import pytest
import torch

from moe_unlearn.ops import expert_wgrad, expert_wgrad_ref, masked_adamw_, masked_sgd_, route, weight_score
from moe_unlearn.ops.bits import pack_bits
from moe_unlearn.ops.expert_wgrad import (
    expert_wgrad_adamw_,
    expert_wgrad_inner,
    expert_wgrad_score,
    expert_wgrad_sgd_,
)
from moe_unlearn.testing import LAYOUTS, ROUTINGS, assert_as_accurate, in_layout, integers, poison, routing

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
    for i, e in enumerate(experts):
        for j in range(bounds[e], bounds[e + 1]):
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
    assert_as_accurate(expert_wgrad(**moved), expert_wgrad_ref(**made), by_hand(made))


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


def update_case():
    torch.manual_seed(0)
    weight = torch.randn(E, M, P)
    return case(), weight, torch.tensor([1, 3]), torch.rand(2, M, P) > 0.4


@pytest.mark.quick
def test_sgd_epilogue_is_store_then_masked_sgd():
    made, weight, experts, kept = update_case()
    other, mask = weight.clone(), pack_bits(kept)
    buffers = [torch.zeros(2, M, P) for _ in range(2)]
    options = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01, "step": 1}
    expert_wgrad_sgd_(weight, buffers[0], **made, experts=experts, mask=mask, **options)
    dw = expert_wgrad(**made, experts=experts)
    masked_sgd_(other, dw, buffers[1], mask, slices=experts, **options)
    assert torch.equal(weight, other) and torch.equal(*buffers)


@pytest.mark.quick
def test_adamw_epilogue_leaves_everything_else_bitwise_alone():
    made, weight, experts, kept = update_case()
    before, other, mask = weight.clone(), weight.clone(), pack_bits(kept)
    moments = [torch.zeros(2, M, P) for _ in range(4)]
    options = {"lr": 0.1, "weight_decay": 0.1}
    for step in (1, 2, 3):
        expert_wgrad_adamw_(weight, *moments[:2], **made, experts=experts, mask=mask, step=step, **options)
        masked_adamw_(
            other, expert_wgrad(**made, experts=experts), *moments[2:], mask, slices=experts, step=step, **options
        )
    assert torch.equal(weight, other)
    touched = torch.zeros(E, M, P, dtype=torch.bool)
    touched[experts] = kept
    assert torch.equal(weight[~touched], before[~touched])
    assert (weight[touched] != before[touched]).all()


@pytest.mark.quick
def test_autograd_notices_an_update_of_a_weight_it_still_needs():
    made, weight, experts, kept = update_case()
    weight.requires_grad_()
    loss = (weight**2).sum()
    with torch.no_grad():
        expert_wgrad_sgd_(weight, None, **made, experts=experts, mask=None, lr=0.1, step=1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.quick
def test_score_epilogue():
    forget, retain = case(seed=1), case(seed=2)
    weight = torch.randn(E, M, P)
    experts = torch.tensor([0, 4])
    got = expert_wgrad_score(weight, [forget, retain], gamma=0.5, experts=experts)
    expected = weight_score(
        weight[experts],
        expert_wgrad(**forget, experts=experts),
        expert_wgrad(**retain, experts=experts),
        gamma=0.5,
    )
    assert torch.equal(got, expected)


@pytest.mark.quick
def test_inner_products_are_exact_on_integers_and_masked():
    forget, retain = case(seed=1, exact=True), case(seed=2, exact=True)
    kept = torch.rand(E, M, P) > 0.4
    got = expert_wgrad_inner([forget, retain], mask=pack_bits(kept))
    sides = [torch.where(kept, by_hand(side), 0) for side in (forget, retain)]
    expected = [[(a * b).sum((1, 2)) for b in sides] for a in sides]
    assert torch.equal(got, torch.stack([torch.stack(row, 1) for row in expected], 1))
    with pytest.raises(ValueError, match="two gradients; got 1"):
        expert_wgrad_inner([forget])


def test_opcheck_and_compile():
    made = case()
    experts = torch.tensor([1, 3], dtype=torch.int32)
    mask = pack_bits(torch.rand(2, M, P) > 0.5)
    arguments = (made["grad"], made["input"], made["expert_offsets"], None, made["input_rows"], experts, mask)
    torch.library.opcheck(torch.ops.moe_unlearn.expert_wgrad.default, (*arguments, torch.float32, "auto"))
    out = torch.zeros(2, M, P)
    torch.library.opcheck(
        torch.ops.moe_unlearn.expert_wgrad_accumulate.default, (*arguments[:3], out, *arguments[3:], "auto")
    )
    compiled = torch.compile(lambda: expert_wgrad(**made), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(), expert_wgrad(**made))


BAD = {
    "grad dims": ({"grad": torch.randn(3)}, ValueError, "grad must be float with two dimensions"),
    "input int": ({"input": torch.ones(T, P, dtype=torch.int64)}, ValueError, "input must be float"),
    "dtypes": ({"input": torch.randn(T, P).double()}, TypeError, "must have one dtype"),
    "offsets": ({"expert_offsets": torch.zeros(6)}, ValueError, r"expert_offsets must be int32 \[E \+ 1\]"),
    "rows": ({"input_rows": torch.zeros(T * K)}, ValueError, "input_rows must be int32 or int64"),
    "experts": ({"experts": torch.ones(1, 1, dtype=torch.int64)}, ValueError, "experts must be int32 or int64"),
    "out": ({"out": torch.zeros(E, M, P + 1)}, ValueError, r"out must be float \[5, 12, 40\]"),
    "mask": ({"mask": torch.zeros(E, M, 1, dtype=torch.int32)}, ValueError, r"int32 words \[5, 12, 2\]"),
}  # fmt: skip


@pytest.mark.quick
@pytest.mark.parametrize("change,error,message", BAD.values(), ids=BAD)
def test_bad_inputs(change, error, message):
    with pytest.raises(error, match=message):
        expert_wgrad(**case() | change)
