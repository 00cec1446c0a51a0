"""The accuracy criterion on seeded bugs, and how often it rejects what is correct."""

import math

import pytest
import torch

from moe_unlearn.testing import (
    AccuracyError,
    assert_as_accurate,
    check_against_ref,
    criterion,
    in_layout,
    outcomes,
    poison,
)
from moe_unlearn.testing.yardstick import RUNS, YARDSTICKS, Baseline, Reference, yardstick

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def product(dtype, rows=96, inner=80, columns=128, seed=0):
    """A matrix product: gold in float64 and one in `dtype`."""
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(rows, inner, generator=generator).to(dtype)
    b = torch.randn(inner, columns, generator=generator).to(dtype)
    return a.double() @ b.double(), a @ b


@pytest.mark.quick
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_correct_result_passes(dtype):
    gold, baseline = product(dtype)
    assert_as_accurate(baseline, baseline, gold)
    assert_as_accurate(gold.to(dtype), baseline, gold)


def zero_row(out):
    out[17] = 0


def swap_columns(out):
    out[5, [3, 9]] = out[5, [9, 3]]


def stale_element(out):
    out[40, 7] = out[39, 7]


def scale_a_row(out):
    out[60] *= 1.02


def flip_sign(out):
    out[95, 127] *= -1


def put_nan(out):
    out[0, 0] = torch.nan


def put_infinity(out):
    out[95, 0] = torch.inf


@pytest.mark.quick
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bug", [zero_row, swap_columns, stale_element, scale_a_row, flip_sign, put_nan, put_infinity])
def test_a_seeded_bug_fails(bug, dtype):
    gold, baseline = product(dtype)
    actual = baseline.clone()
    bug(actual)
    with pytest.raises(AccuracyError):
        assert_as_accurate(actual, baseline, gold)


def one_by_one(a, b):
    total = torch.zeros(len(a), b.shape[1])
    for k in range(len(b)):
        total = total + torch.outer(a[:, k].float(), b[k].float())
    return total.to(a.dtype)


ORDERS = {"library": torch.matmul, "reversed": lambda a, b: a.flip(1) @ b.flip(0), "one by one": one_by_one}


@pytest.mark.quick
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("kind", YARDSTICKS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_order_of_sums_passes_whatever_the_yardstick(dtype, kind, order):
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(shape, generator=generator).to(dtype) for shape in ((64, 500), (500, 96)))
    gold = a.double() @ b.double()
    with yardstick(kind):
        baseline = Reference(lambda: a @ b).baseline()
    actual = ORDERS[order](a, b)
    assert_as_accurate(actual, baseline, gold)
    if dtype == torch.float32 and kind == "exact":  # as it was: the reference's error alone is the measure
        with pytest.raises(AccuracyError):
            assert_as_accurate(actual, baseline.value, gold)
    wrong = actual.clone()
    wrong[17, 5] += (
        1e-5 * gold[17].abs().max() if dtype == torch.float32 else 6 * float(criterion.ulp(gold.max(), dtype))
    )
    with pytest.raises(AccuracyError):
        assert_as_accurate(wrong, baseline, gold)


@pytest.mark.quick
def test_the_spread_is_made_only_where_it_is_needed():
    gold, value = product(torch.float32)

    def made():
        raise RuntimeError("asked for")

    assert_as_accurate(value, Baseline(value, made), gold)
    with pytest.raises(RuntimeError, match="asked for"):
        assert_as_accurate(value + 1e-3, Baseline(value, made), gold)


@pytest.mark.quick
def test_errors_of_one_cause_count_as_one():
    """A factor on all: its error is one draw, of which 2 deviations are no wonder; a wrong factor is one."""
    gold = torch.randn(40, 50, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    runs = gold * (1 + 1e-5 * torch.randn(RUNS, 1, 1, generator=generator, dtype=torch.float64))
    baseline = Baseline(gold.float(), lambda: runs.float())
    assert_as_accurate((gold * (1 + 2e-5)).float(), baseline, gold)
    with pytest.raises(AccuracyError):
        assert_as_accurate((gold * (1 + 2e-4)).float(), baseline, gold)
    apart = gold * (1 + 1e-5 * torch.randn(RUNS, 40, 50, generator=generator, dtype=torch.float64))
    with pytest.raises(AccuracyError, match="rms"):
        assert_as_accurate((gold * (1 + 2e-5)).float(), Baseline(gold.float(), lambda: apart.float()), gold)


@pytest.mark.quick
def test_a_gold_of_zeros_is_judged_too():
    zeros = torch.zeros(4, 64)
    baseline = Baseline(zeros, lambda: torch.zeros(16, 4, 64))
    assert_as_accurate(zeros, baseline, zeros.double())
    with pytest.raises(AccuracyError, match="rms error"):
        # within two of the smallest last bits in each row
        assert_as_accurate(zeros + 2 * torch.finfo(torch.float32).tiny * 2**-23, baseline, zeros.double())


def test_a_margin_that_is_no_number_fails(monkeypatch):
    monkeypatch.setattr(criterion, "margin", lambda *args: criterion.Margin(0.0, math.nan, "row", "rms is NaN"))
    with pytest.raises(AccuracyError, match="rms is NaN"):
        assert_as_accurate(torch.ones(64), torch.ones(64), torch.ones(64).double())


def test_an_unknown_yardstick_is_named():
    with pytest.raises(ValueError, match="yardstick must be one of .*; got 'mine'"), yardstick("mine"):
        pass


@pytest.mark.quick
def test_small_errors_everywhere_fail_the_rms():
    """Each row stays inside twice its largest error, the whole does not stay inside 1.25 of the RMS."""
    gold, baseline = product(torch.float32, rows=512, inner=2000)
    actual = (gold + 1.7 * (baseline.double() - gold)).float()
    with pytest.raises(AccuracyError, match="rms"):
        assert_as_accurate(actual, baseline, gold)


@pytest.mark.quick
def test_wrong_dtype_and_shape_fail():
    gold, baseline = product(torch.float32)
    with pytest.raises(AccuracyError, match="dtype"):
        assert_as_accurate(baseline.double(), baseline, gold)
    with pytest.raises(AccuracyError, match="shapes"):
        assert_as_accurate(baseline[1:], baseline, gold)
    with pytest.raises(AccuracyError, match="integer"):
        assert_as_accurate(torch.tensor([1]), torch.tensor([2]), torch.tensor([2]))


@pytest.mark.quick
def test_short_rows_are_pooled():
    gold = torch.randn(7, 30, dtype=torch.float64)
    pooled = criterion._pooled_maximum(gold.abs())
    assert pooled.shape == (2,)  # pools of three rows, the seventh joins the last
    assert pooled[0] == gold[:3].abs().max() and pooled[1] == gold[3:].abs().max()
    assert criterion._pooled_maximum(torch.ones(1, 3)).shape == (1,)
    assert criterion._pooled_maximum(torch.tensor(2.0)).shape == (1,)


@pytest.mark.parametrize(
    "shape,dtype",
    [
        ((16, 64), torch.float32),
        pytest.param((4, 256), torch.float32, marks=pytest.mark.nightly),
        pytest.param((16, 64), torch.bfloat16, marks=pytest.mark.nightly),
    ],
    ids=str,
)
def test_false_rejections_are_rare(shape, dtype):
    """10,000 sums of 48 terms added in another order: at most one may be rejected."""
    generator = torch.Generator().manual_seed(1)
    rejected = 0
    for _ in range(2_000):
        terms = torch.randn(48, *shape, generator=generator).to(dtype)
        # as float32 adds up one after the other
        baseline = terms.float().cumsum(0)[-1].to(dtype)
        gold = terms.double().sum(0)
        for _ in range(5):
            order = torch.randperm(48, generator=generator)
            actual = terms[order].float().cumsum(0)[-1].to(dtype)
            try:
                assert_as_accurate(actual, baseline, gold)
            except AccuracyError:
                rejected += 1
    assert rejected <= 1


@pytest.mark.quick
@pytest.mark.parametrize("layout", criterion.LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.int32], ids=str)
def test_layouts_keep_values(layout, dtype):
    value = criterion.integers(3, 4, 5, dtype=dtype)
    other = in_layout(value, layout)
    assert torch.equal(other, value)
    assert other.is_contiguous() == (layout in ("contiguous", "offset"))


@pytest.mark.quick
@pytest.mark.parametrize("pattern", criterion.ROUTINGS)
@pytest.mark.parametrize("top_k", [1, 3])
def test_routing_patterns(pattern, top_k):
    index = criterion.routing(pattern, 200, 8, top_k)
    assert index.shape == (200, top_k) and index.dtype == torch.int64
    counts = torch.bincount(index.flatten(), minlength=9)
    expected_empty = {
        "one_expert": [0, 1, 2, 3, 5, 6, 7, 8],
        "first_empty": [0, 8],
        "last_empty": [7, 8],
        "half_empty": [0, 2, 4, 6, 8],
        "all_sentinels": list(range(8)),
        "sentinels": [],
    }.get(pattern, [8])
    assert [e for e in range(9) if counts[e] == 0] == expected_empty
    assert criterion.routing(pattern, 0, 8, top_k).shape == (0, top_k)


@pytest.mark.quick
def test_check_against_ref_sees_a_wrong_gradient():
    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 2

        @staticmethod
        def backward(ctx, grad):
            # reads the gradient as if it were contiguous: right only for uniform or contiguous ones
            return torch.as_strided(grad, grad.shape, (grad.shape[1], 1)) * 2

    x = torch.randn(96, 80)
    check_against_ref(lambda x: Wrong.apply(x), lambda x: x * 2, {"x": x}, gradients=("x",))
    with pytest.raises(AccuracyError, match="gradient of x"):
        check_against_ref(
            lambda x: Wrong.apply(x),
            lambda x: x * 2,
            {"x": x},
            gradients=("x",),
            gradient_layout="transposed",
        )


@pytest.mark.quick
def test_poison_fills_and_restores():
    before = torch.are_deterministic_algorithms_enabled()
    with poison():
        assert torch.empty(4).isnan().all()
        assert (torch.empty(4, dtype=torch.int32) == torch.iinfo(torch.int32).max).all()
    assert torch.are_deterministic_algorithms_enabled() == before


def test_gold_has_the_upstream_gradients_of_the_op():
    """float32 results of bfloat16 inputs: their gradients are float32 numbers, in the truth too."""
    inputs = {"x": torch.tensor([1.0, 2.0, 0.5], dtype=torch.bfloat16), "w": torch.ones(3)}

    def product(x, w):
        return x.to(w.dtype) * w

    actual, _, gold = outcomes(product, product, inputs, gradients=("x", "w"))["gradient of w"]
    assert torch.equal(actual.double(), gold) and not torch.equal(actual, actual.bfloat16().float())


def test_outputs_of_a_dict_and_missing_ones_are_named():
    x = {"x": torch.ones(3)}
    assert set(outcomes(lambda x: {"m": x, "v": x}, lambda x: {"m": x, "v": x}, x)) == {"output m", "output v"}
    with pytest.raises(AccuracyError, match="different outputs"):
        check_against_ref(lambda x: (x,), lambda x: (x, x), x)
