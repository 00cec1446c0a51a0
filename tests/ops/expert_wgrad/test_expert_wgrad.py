"""expert_wgrad in every implementation: the stored gradient and inner products against exact sums."""

import pytest
import torch

from moe_unlearn.ops import SGD, AdamW, Update, expert_wgrad, expert_wgrad_ref
from moe_unlearn.ops.expert_wgrad import Factors, expert_wgrad_inner, expert_wgrad_sgd_
from moe_unlearn.testing import LAYOUTS, ROUTINGS, assert_as_accurate, integers
from moe_unlearn.testing.yardstick import Reference
from tests.ops.expert_wgrad.cases import (
    DTYPES,
    F32,
    F64,
    INDEXED,
    ODD,
    SHAPE,
    E,
    check_inner,
    factors,
    gold,
    keep,
    parts,
    scattered,
    spoiled,
    store,
    takes,
    words_of,
)
from tests.support.covers import cover
from tests.support.impls import REF, impls

pytestmark = pytest.mark.quick
IMPLS = impls("expert_wgrad")
SHAPES, ROWS = (SHAPE, ODD), 80


def test_the_worked_example(impl):
    grad, input = torch.zeros(2, 3, 8).bfloat16()
    grad[:, 0], input[:, 0] = torch.tensor([1, 2, 3]), torch.tensor([1, 1, 2])
    dw = store(impl, Factors(grad, input, torch.tensor([0, 3, 3], dtype=torch.int32)))
    assert dw[0, 0, 0] == 9 and dw.sum() == 9


@pytest.mark.parametrize("pattern", ROUTINGS)
def test_the_reference_adds_outer_products_row_by_row(pattern):
    for made in (factors(pattern=pattern, exact=True), *parts(scattered(factors(pattern=pattern, exact=True), "both"))):
        bounds = made.expert_offsets.tolist()
        bounds = bounds if made.expert_offsets.dim() == 2 else list(zip(bounds[:-1], bounds[1:], strict=True))
        expected = torch.zeros(E, *SHAPE, dtype=F64)
        for e in range(E):
            for j in range(*bounds[e]):
                g = made.grad[j if made.grad_rows is None else made.grad_rows[j]]
                x = made.input[j if made.input_rows is None else made.input_rows[j]]
                expected[e] += torch.outer(g.double(), x.double())
        assert torch.equal(gold(made), expected)


@cover(takes, indirect=["impl"], impl=IMPLS, pattern=ROUTINGS, dtype=DTYPES, shape=SHAPES, indexed=(None, *INDEXED))
def test_store_is_exact_on_integers_and_writes_every_element(indexed, shape, dtype, pattern, impl):
    made = factors(shape, dtype, pattern, exact=True)
    got = store(impl, made if indexed is None else scattered(made, indexed))
    assert got.dtype == dtype and torch.equal(got.double(), gold(made))
    assert not got[made.expert_offsets.diff() == 0].any()


@cover(takes, indirect=["impl"], impl=IMPLS, dtype=DTYPES, out_dtype=DTYPES, shape=SHAPES)
def test_accuracy(shape, out_dtype, dtype, impl):
    """A wide result of narrow rows is not rounded on the way."""
    made = factors(shape, dtype)
    baseline = Reference(lambda: expert_wgrad_ref(*made, None, None, out_dtype)).baseline()
    assert_as_accurate(store(impl, made, out_dtype=out_dtype), baseline, gold(made))


@cover(takes, indirect=["impl"], impl=IMPLS, layout=LAYOUTS, dtype=DTYPES)
def test_memory_layouts(dtype, layout, impl):
    made, words, out = factors(dtype=dtype), words_of(keep(E, *SHAPE)), torch.randn(E, *SHAPE).to(dtype)
    expected, alone = store(impl, made, out=out, mask=words), store(impl, made)
    # CUDA copies the rows of factors 16 bytes at a time
    moved = impl.moved(made, "contiguous" if impl.kind == "cuda" else layout)
    assert torch.equal(store(impl, moved), alone)
    out = impl.moved(out, layout)
    expert_wgrad(*moved[:3], input_rows=moved.input_rows, out=out, mask=impl.moved(words, layout), impl=impl.name)
    assert torch.equal(out.cpu(), expected)


@cover(indirect=["impl"], impl=IMPLS, listed=([3], [3, 0], [2, 2], []), kind=(torch.int32, torch.int64))
def test_only_listed_experts_in_their_order(kind, listed, impl):
    made = scattered(factors(exact=True), "both")
    made = made._replace(grad_rows=made.grad_rows.to(kind), input_rows=made.input_rows.to(kind))
    got = store(impl, made, experts=torch.tensor(listed, dtype=kind), out_dtype=F32)
    assert got.shape == (len(listed), *SHAPE) and torch.equal(got.double(), gold(made, listed))


@cover(indirect=["impl"], impl=IMPLS, indexed=INDEXED)
def test_bounds_of_a_part_of_each_experts_rows(indexed, impl):
    for part in parts(scattered(factors(exact=True), indexed)):
        assert part.grad.any() and torch.equal(store(impl, part).double(), gold(part))
        assert torch.equal(store(impl, part, experts=torch.tensor([3, 1])).double(), gold(part, [3, 1]))


@cover(indirect=["impl"], impl=IMPLS, indexed=INDEXED, pattern=("uniform", "sentinels"))
def test_rows_of_others_are_not_read(pattern, indexed, impl):
    """Rows behind the last expert, and what is outside of the bounds of the experts that are listed."""
    made, listed = scattered(factors(pattern=pattern, exact=True), indexed), None
    if pattern == "uniform":
        listed = torch.tensor([3, 1])
        made = parts(made)[0]
    spoilt = spoiled(made, range(E) if listed is None else listed.tolist())
    assert torch.equal(store(impl, spoilt, experts=listed).double(), gold(made, listed))


def test_a_row_of_nan_shows_in_its_expert_alone(impl):
    made = factors(exact=True)
    expected, (first, last) = gold(made), made.expert_offsets[1:3].tolist()
    made.grad[first:last] = torch.nan
    got = store(impl, made)
    assert first < last and got[1].isnan().all()
    assert torch.equal(got[[0, 2, 3]].double(), expected[[0, 2, 3]])


@cover(takes, indirect=["impl"], impl=IMPLS, dtype=DTYPES, out_dtype=DTYPES, shape=SHAPES)
def test_masks_and_sums_round_once(shape, out_dtype, dtype, impl):
    made, kept = factors(shape, dtype), keep(E, *shape)
    dw, words = store(impl, made, out_dtype=F32), words_of(kept)
    got, whole = (store(impl, made, mask=mask, out_dtype=out_dtype) for mask in (words, None))
    assert torch.equal(got, torch.where(kept, whole, 0))
    out = torch.randn(dw.shape).to(out_dtype)
    expected = torch.where(kept, (out.float() + dw).to(out_dtype), out)
    assert torch.equal(store(impl, made, out=out, mask=words), expected)


def test_sums_go_into_the_buffer_of_the_listed_experts(impl):
    made, experts, out = factors(exact=True), torch.tensor([1, 3]), integers(2, *SHAPE, seed=5)
    words, buffer = words_of(keep(2, *SHAPE)), impl.moved(out)
    version, options = buffer._version, impl.moved({"experts": experts, "mask": words, "input_rows": made.input_rows})
    for _ in range(2):
        assert expert_wgrad(*impl.moved(made[:3]), out=buffer, impl=impl.name, **options) is buffer
    expected = out.double() + 2 * torch.where(keep(2, *SHAPE), gold(made, experts), 0)
    assert torch.equal(buffer.cpu().double(), expected) and buffer._version > version


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # infinity times zero is meant
def test_a_masked_infinity_is_zero(impl):
    made, kept = factors(), keep(E, *SHAPE)
    made.input[:, 3], kept[..., 3] = torch.inf, False
    got = store(impl, made, mask=words_of(kept))
    assert got.isfinite().all() and not got[~kept].any() and got[kept].any()


def test_nothing_to_do(impl):
    none = torch.zeros(0, dtype=torch.int64)
    without = factors(tokens=0)
    assert not store(impl, without).any()
    assert store(impl, without, experts=none).shape == (0, *SHAPE)
    assert store(impl, without._replace(grad=without.grad[:, :0])).shape == (E, 0, SHAPE[1])
    assert store(impl, factors(tokens=1, top_k=1)).any()
    without, none = impl.moved((without, none))
    assert not expert_wgrad_inner([without] * 2, impl=impl.name).any()
    assert expert_wgrad_inner([without] * 2, experts=none, impl=impl.name).shape == (0, 2, 2)
    without = without._replace(grad=without.grad[:, :0])
    assert not expert_wgrad_inner([without] * 2, impl=impl.name).any()


@pytest.mark.parametrize("impl", [kind for kind in IMPLS if kind != "cuda"], indirect=True)
def test_float64_goes_to_the_reference(impl):
    made, out = factors(dtype=F64), torch.ones(E, *SHAPE, dtype=F64)
    assert torch.equal(store(impl, made), store(REF, made))
    if impl.kind != "triton":  # which makes a wide result of narrow factors itself
        made = factors(dtype=F32)
        assert torch.equal(store(impl, made, out_dtype=F64), store(REF, made, out_dtype=F64))
        assert torch.equal(store(impl, made, out=out), out + store(REF, made, out_dtype=F64))


# ---- Inner products ----------------------------------------------------------------------------------------


@cover(takes, indirect=["impl"], impl=IMPLS, m=(1, 2, 3, 4), dtype=DTYPES, shape=SHAPES)
def test_inner_products_are_exact_on_integers_and_masked(shape, dtype, m, impl):
    gradients = [factors(shape, dtype, pattern, exact=True, seed=i) for i, pattern in enumerate(ROUTINGS[:m])]
    gradients[0] = scattered(gradients[0], "grad")
    kept = keep(E, *shape)
    kept[2] = False
    check_inner(impl, gradients, kept)
    whole, listed = torch.stack([gold(one) for one in gradients], 1).flatten(2), torch.tensor([3, 0])
    got = expert_wgrad_inner(impl.moved(gradients), experts=impl.moved(listed), impl=impl.name).cpu()
    assert torch.equal(got, (whole @ whole.mT)[listed])


@cover(takes, indirect=["impl"], impl=IMPLS, dtype=DTYPES)
def test_inner_product_accuracy(dtype, impl):
    made = [factors(dtype=dtype, seed=i) for i in range(3)]
    wide = [Factors(*(t.double() if t is not None and t.is_floating_point() else t for t in one)) for one in made]
    got = expert_wgrad_inner(impl.moved(made), impl=impl.name).cpu()
    baseline = Reference(lambda: expert_wgrad_inner(made, impl="ref")).baseline()
    assert_as_accurate(got, baseline, expert_wgrad_inner(wide, impl="ref"))
    assert torch.equal(got, got.mT)


@pytest.mark.slow
def test_compiles_without_a_graph_break_and_runs_agree(impl):
    made, words = impl.moved((factors(), words_of(keep(E, *SHAPE))))
    rest = {"input_rows": made.input_rows, "impl": impl.name}

    def function():
        out = torch.ones(E, *SHAPE, device=impl.device)
        expert_wgrad(*made[:3], out=out, mask=words, **rest)
        return out, expert_wgrad(*made[:3], **rest), expert_wgrad_inner([made] * 2, impl=impl.name)

    runs = [function(), function(), torch.compile(function, fullgraph=True, backend="aot_eager")()]
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(runs[0], run, strict=True))


# ---- The op and its reference ------------------------------------------------------------------------------


def test_opcheck():
    check, ops, made = torch.library.opcheck, torch.ops.moe_unlearn, factors(dtype=F32)
    experts, words, weight = torch.tensor([1, 3]), words_of(keep(2, *SHAPE)), torch.randn(E, *SHAPE)
    state = [torch.rand(2, *SHAPE) for _ in range(2)]
    sgd, adamw = (*SGD(lr=0.1, momentum=0.9), *Update(step=2)), (*AdamW(lr=0.1, beta2=0.99), *Update(step=2))
    check(ops.expert_wgrad.default, (*made, experts, words, F32, "auto"))
    check(ops.expert_wgrad_accumulate.default, (torch.zeros(2, *SHAPE), *made, experts, words, "auto"))
    check(ops.expert_wgrad_sgd.default, (weight, state[0], None, *made, experts, words, *sgd, "auto"))
    check(ops.expert_wgrad_adamw.default, (weight, *state, None, *made, experts, words, *adamw, "auto"))
    check(ops.expert_wgrad_inner.default, (*map(list, zip(made, made, strict=True)), experts, words, "auto"))


BAD = {
    "grad dims": ({"grad": torch.randn(3)}, ValueError, "grad must be float with two dimensions"),
    "input int": ({"input": torch.ones(40, 72, dtype=torch.int64)}, ValueError, "input must be float"),
    "dtypes": ({"input": torch.randn(40, 72).double()}, TypeError, "must have one dtype"),
    "offsets": ({"expert_offsets": torch.zeros(6)}, ValueError, r"int32 \[E \+ 1\] or \[E, 2\]"),
    "bounds": ({"expert_offsets": torch.zeros(5, 3).int()}, ValueError, r"int32 \[E \+ 1\] or \[E, 2\]"),
    "device": ({"input": torch.randn(40, 72, device="meta")}, ValueError, "input must be on cpu"),
    "rows": ({"input_rows": torch.zeros(ROWS)}, ValueError, "input_rows must be int32 or int64"),
    "experts": ({"experts": torch.ones(1, 1, dtype=torch.int64)}, ValueError, "experts must be int32 or int64"),
    "out": ({"out": torch.zeros(E, 40, 73)}, ValueError, r"out must be float \[4, 40, 72\]"),
    "mask": ({"mask": torch.zeros(E, 40, 1, dtype=torch.int32)}, ValueError, r"int32 words \[4, 40, 3\]"),
}


@pytest.mark.parametrize("change,error,message", BAD.values(), ids=BAD)
def test_bad_inputs(change, error, message):
    with pytest.raises(error, match=message):
        expert_wgrad(**factors(dtype=F32)._asdict() | change)


def test_bad_gradient_sets():
    one, weight = factors(dtype=F32), torch.randn(E, *SHAPE)
    with pytest.raises(ValueError, match="at least one gradient; got none"):
        expert_wgrad_inner([])
    with pytest.raises(ValueError, match="one M, P and dtype"):
        expert_wgrad_inner([one, one._replace(grad=torch.randn(ROWS, 41))])
    with pytest.raises(ValueError, match=r"weight must be float \[4, 40, 72\]; got .* \[4, 72, 40\]"):
        expert_wgrad_sgd_(weight.mT.contiguous(), None, one, SGD(lr=1), Update(step=1))
    with pytest.raises(ValueError, match=r"momentum_buffer must be float \[2, 40, 72\]"):
        rule = SGD(lr=1, momentum=0.9)
        expert_wgrad_sgd_(weight, torch.zeros_like(weight), one, rule, Update(step=1), experts=torch.tensor([1, 3]))
