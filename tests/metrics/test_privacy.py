"""Min-40 %, AUC, PrivLeak, NLL and routing drift against known values."""

import math

import pytest
import torch
from sklearn.metrics import roc_auc_score

from moe_unlearn.metrics import (
    TokenScores,
    auc,
    evaluate,
    membership_auc,
    min_k,
    nll,
    privleak,
    routing_drift,
    token_scores,
)
from moe_unlearn.metrics.privacy import add_privleak

pytestmark = pytest.mark.quick


def scores(*logprobs, counted=None):
    values = torch.tensor(logprobs)
    return TokenScores(values, values > -1, torch.tensor(counted or [True] * len(values)))


@pytest.mark.parametrize("levels", [3, 10_000])  # many ties, hardly any
def test_auc_equals_sklearn(levels):
    generator = torch.Generator().manual_seed(levels)
    for sizes in [(1, 1), (1, 9), (50, 37), (200, 3)]:
        negative, positive = (torch.randint(levels, (n,), generator=generator).double() for n in sizes)
        expected = roc_auc_score([0] * sizes[0] + [1] * sizes[1], torch.cat([negative, positive]).numpy())
        assert auc(negative, positive) == pytest.approx(expected, abs=1e-12)


def test_auc_refuses_what_it_cannot_rank():
    with pytest.raises(ValueError, match="negative scores"):
        auc(torch.empty(0), torch.ones(2))
    with pytest.raises(ValueError, match="positive scores without NaN"):
        auc(torch.ones(2), torch.tensor([1.0, math.nan]))


def test_min_k_is_the_mean_of_the_lowest_40_percent():
    assert min_k([scores(-1.0, -9.0, -3.0, -7.0, -5.0)]).item() == pytest.approx(-8)
    assert min_k([scores(-1.0, -2.0)]).item() == -2  # at least one
    assert min_k([scores(-1.0, -9.0, counted=[True, False])]).item() == -1
    with pytest.raises(ValueError, match="example 1"):
        min_k([scores(-1.0), scores(-1.0, counted=[False])])


def test_nll_is_per_token_not_per_example():
    assert nll([scores(-1.0), scores(-4.0, -4.0, -100.0, counted=[True, True, False])]) == pytest.approx(3)
    for empty in ([], [scores(-1.0, counted=[False])]):
        with pytest.raises(ValueError, match="at least one token with a label"):
            nll(empty)


def test_the_sign_of_privleak():
    known, fresh = [scores(-0.1), scores(-0.2)], [scores(-5.0), scores(-6.0)]
    assert membership_auc(known, fresh) == 0 and membership_auc(fresh, known) == 1
    assert privleak(0.0, 0.5) == -100 and privleak(0.5, 0.5) == 0 and privleak(1.0, 0.5) == 100
    assert math.isnan(privleak(0.3, 0.0))


def test_routing_drift():
    before = torch.tensor([[1.0, 1.0, 0.0], [0.5, 0.5, 1.0]])
    after = torch.tensor([[0.0, 1.0, 1.0], [0.5, 0.5, 1.0]])
    per_layer, mean = routing_drift(before, after)
    assert per_layer.tolist() == [0.5, 0.0] and mean == 0.25
    assert routing_drift(before, before)[1] == 0
    disjoint = routing_drift(torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 2.0]]))
    assert disjoint[1] == 1
    with pytest.raises(ValueError, match="one shape; got"):
        routing_drift(before, after[:1])
    with pytest.raises(ValueError, match="sum to the same K"):
        routing_drift(before, 2 * after)


def test_evaluate_is_flat_and_leaves_the_model_alone(random_model, tokenizer, examples):
    random_model.train()
    weights = {k: v.clone() for k, v in random_model.state_dict().items()}
    sets = {"forget": examples[:1], "retain": examples[1:2]}
    plain = evaluate(random_model, tokenizer, **sets)
    assert set(plain) == {f"{metric}_{side}" for metric in ("verbmem", "knowmem", "nll", "extraction") for side in "fr"}
    full = evaluate(random_model, tokenizer, **sets, holdout=examples[2:], reference=random_model)
    assert full["privleak"] == (0 if full["minkauc"] else pytest.approx(math.nan, nan_ok=True))
    assert {k: full[k] for k in plain} == plain and {"nll_h", "minkauc"} <= set(full)
    assert all(isinstance(value, float) for value in full.values())
    given = evaluate(random_model, tokenizer, **sets, holdout=examples[2:], reference_auc=0.5)
    assert given["privleak"] == pytest.approx(200 * (full["minkauc"] - 0.5))
    assert full["nll_f"] == pytest.approx(nll(token_scores(random_model, examples[:1])), rel=1e-5)
    assert random_model.training
    assert all(torch.equal(v, weights[k]) for k, v in random_model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in random_model.parameters())


def test_privleak_is_added_where_both_models_have_an_auc():
    rows = [{"minkauc": 0.25}, {"nll_f": 1.0}, {"minkauc": 0.5, "privleak": 3.0}]
    add_privleak(rows, {"minkauc": 0.5})
    assert rows == [{"minkauc": 0.25, "privleak": -50.0}, {"nll_f": 1.0}, {"minkauc": 0.5, "privleak": 0.0}]
    add_privleak(rows, {})
    assert rows[0]["privleak"] == -50.0
