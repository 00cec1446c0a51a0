"""The three levels, what they are measured against, and what a case must keep to."""

import dataclasses

import pytest
import torch

from moe_unlearn import backend
from moe_unlearn.regress import numeric, ours
from moe_unlearn.regress.case import Case, digest
from moe_unlearn.regress.numeric import ACCURATE, EQUAL, INACCURATE, CaseError, MutationError, evaluate, judge_all


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def product(function=torch.matmul, **options):
    def inputs(seed, rows=32, inner=128):
        return {"a": normal(rows, inner, seed=seed), "b": normal(inner, 64, seed=seed + 1)}

    def call(a, b):
        return function(a, b)

    return Case("product", call, lambda a, b: a @ b, inputs, {"rows": 32, "inner": 128}, **options)


def level(function, recorded, **options):
    made = evaluate(product(function, **options))
    return numeric.worst(judge_all(made.actual, made.measured_by(recorded.actual), made.gold))


@pytest.mark.quick
@pytest.mark.parametrize("gradients", [(), ("a", "b")])
def test_three_levels(gradients):
    recorded = evaluate(product(gradients=gradients))
    assert level(torch.matmul, recorded, gradients=gradients) == EQUAL
    assert level(lambda a, b: a.flip(1) @ b.flip(0), recorded, gradients=gradients) == ACCURATE
    rounded = lambda a, b: a.bfloat16().float() @ b  # noqa: E731
    assert level(rounded, recorded, gradients=gradients) == INACCURATE


def test_a_record_that_is_nearly_exact_calls_no_correct_kernel_wrong():
    """float64 inside is recorded, or by chance few errors; plain float32 errs by no more than its roundings."""
    precise = evaluate(product(lambda a, b: (a.double() @ b.double()).float()))
    made = evaluate(product())
    (verdict,) = judge_all(made.actual, made.measured_by(precise.actual), made.gold)
    assert verdict.level == ACCURATE and verdict.ratio > 2
    assert level(lambda a, b: a.bfloat16().float() @ b, precise) == INACCURATE
    coarse = evaluate(product(lambda a, b: a.bfloat16().float() @ b))
    assert level(torch.matmul, coarse) == ACCURATE


def test_values_of_another_output_have_no_spread():
    made = evaluate(product())
    other = {"output 1": torch.zeros(2)}
    assert made.measured_by(other) == other


@pytest.mark.quick
@pytest.mark.parametrize(
    "change",
    [
        lambda y: y.double(),
        lambda y: y[:-1],
        lambda y: y.t(),
        lambda y: y / 0,
        lambda y: torch.where(y > 2, torch.nan, y),
    ],
    ids=["dtype", "shape", "transposed", "infinite", "nan"],
)
def test_dtype_shape_and_nans(change):
    recorded = evaluate(product())
    changed = {name: change(value) for name, value in recorded.actual.items()}
    assert numeric.worst(judge_all(changed, recorded.actual, recorded.gold)) == INACCURATE


def test_signed_zero_and_integers():
    zero, gold = torch.zeros(4), torch.zeros(4, dtype=torch.float64)
    assert numeric.judge(-zero, zero, gold).level == ACCURATE
    ids = torch.arange(4)
    assert numeric.judge(ids, ids.clone(), ids).level == EQUAL
    assert numeric.judge(ids.flip(0), ids, ids).level == INACCURATE
    assert numeric.judge(ids.int(), ids, ids).level == INACCURATE


def test_outputs_that_come_and_go():
    one = {"output 0": torch.zeros(2)}
    for actual, expected in ((one, {}), ({}, one)):
        (verdict,) = judge_all(actual, expected, one)
        assert verdict.level == INACCURATE and "output 0" in verdict.message


def test_several_outputs_are_named():
    for outputs, names in (((1, 2), {"output 0", "output 1"}), ({"m": 1, "v": 2}, {"output m", "output v"})):
        made = outputs if isinstance(outputs, dict) else list(outputs)

        def call(a, b, made=made):
            return {k: v * a for k, v in made.items()} if isinstance(made, dict) else [v * a for v in made]

        case = dataclasses.replace(product(), function=call, reference=call)
        assert set(evaluate(case).actual) == names


def test_a_kernel_that_changes_its_inputs():
    with pytest.raises(MutationError, match="changed its input a"):
        evaluate(product(lambda a, b: a.mul_(2) @ b))


def test_whose_fault_it_is():
    case = product()
    with pytest.raises(CaseError, match="gives other values each time"):
        evaluate(
            dataclasses.replace(case, inputs=lambda seed, **sizes: {"a": torch.randn(2, 2), "b": torch.ones(2, 2)})
        )
    with pytest.raises(CaseError, match="its inputs fail"):
        evaluate(dataclasses.replace(case, inputs=lambda seed: {}))
    with pytest.raises(CaseError, match="its reference fails"):
        evaluate(dataclasses.replace(case, reference=lambda a: a))
    with pytest.raises(CaseError, match="expected a tensor"):
        evaluate(dataclasses.replace(case, function=lambda a, b: None, reference=lambda a, b: None))
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        evaluate(product(lambda a, b: a @ b[1:]))
    with pytest.raises(CaseError, match="'a': expected tensors"):
        evaluate(dataclasses.replace(case, inputs=lambda seed, **sizes: {"a": object(), "b": 1}))


def test_digests_tell_values_dtypes_and_shapes_apart():
    x = torch.arange(6.0)
    values = [
        x,
        x.double(),
        x.view(2, 3),
        x + 1,
        [x],
        (x,),
        [x, x],
        1,
        1.0,
        "1",
        True,
        None,
        torch.float32,
        x.int(),
        {"x": x},
        {"y": x},
    ]
    assert len({digest(value) for value in values}) == len(values)
    assert digest(x.view(2, 3).t()) == digest(x.view(2, 3).t().contiguous())


@pytest.mark.parametrize("case", ours.cases(), ids=lambda case: case.name)
def test_ours_meet_their_references(case):
    made = evaluate(case, 1)
    for verdict in judge_all(made.actual, made.baseline, made.gold):
        assert verdict.level != INACCURATE, verdict.message


def test_ours_are_every_op_and_gradient():
    cases = ours.cases()
    assert {case.name.split("/")[0] for case in cases} == {name.partition(".")[0] for name in backend.registered()}
    assert len(cases) == len({case.name for case in cases}) >= 40
    assert {name for case in cases for name in case.gradients} >= {"hidden_states", "lm_head", "gate_up_proj"}


def test_ours_are_independent_of_the_implementation():
    with pytest.raises(RuntimeError, match="has no implementation"):
        evaluate(ours.cases("cuda")[0])
