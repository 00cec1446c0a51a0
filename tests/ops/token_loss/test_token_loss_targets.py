"""The kind "ce" of token_loss: targets of a reference or of the model itself, lowered at the label or without it."""

import math

import pytest
import torch

from moe_unlearn.ops.token_loss import IGNORED, Formula
from tests.ops.token_loss.cases import (
    DTYPES,
    GRADIENTS,
    HEAD_OPTIONS,
    check,
    check_opcheck_and_one_graph,
    make,
    small_workspace,
)
from tests.support.by_keyword import token_loss, token_loss_ref
from tests.support.impls import REF

pytestmark = pytest.mark.quick
PENALTIES = (0.0, 4.0, math.inf)


def targets(of, penalty, **options):
    inputs = make(kind="kl" if of == "reference" else "nll", **options)
    return inputs | {"kind": "ce", "label_penalty": penalty}


@pytest.mark.parametrize("of", ["reference", "itself"])
@pytest.mark.parametrize("penalty", PENALTIES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_value_and_gradients(dtype, penalty, of, monkeypatch):
    small_workspace(monkeypatch)
    check(REF, targets(of, penalty, dtype=dtype), chunk_rows=50)


@pytest.mark.parametrize("of", ["reference", "itself"])
@pytest.mark.parametrize("options", HEAD_OPTIONS, ids=str)
def test_scale_and_softcap(options, of, monkeypatch):
    small_workspace(monkeypatch)
    check(REF, targets(of, 4.0) | options, chunk_rows=50)


@pytest.mark.parametrize("of", ["reference", "itself"])
@pytest.mark.parametrize("penalty", PENALTIES)
def test_loss_and_slope_by_hand(penalty, of):
    """With an identity head hidden states are logits: dl/dz = p - q, q the targets, without the label at infinity."""
    inputs = targets(of, penalty, tokens=6, hidden=9, vocabulary=9, dtype=torch.float64, weights=False)
    labels = torch.tensor([3, 1, 8, 0, 0, 5])
    inputs |= {"lm_head": torch.eye(9, dtype=torch.float64), "bias": None, "labels": labels}
    h = inputs["hidden_states"].requires_grad_()
    z = h.detach() if of == "itself" else inputs["ref_hidden_states"]
    p, q = (torch.softmax(values.detach().clone(), 1) for values in (h, z))
    at = torch.arange(6)
    q[at, labels] *= math.exp(-penalty)
    q /= q.sum(1, keepdim=True)
    loss = token_loss(**inputs)
    loss.sum().backward()
    torch.testing.assert_close(loss.detach(), -(q * p.log()).sum(1))
    torch.testing.assert_close(h.grad, p - q)
    if of == "itself" and penalty == math.inf:
        # the gradient of -log(1 - p_y), which the paper starts from
        z = h.detach().requires_grad_()
        torch.log1p(-torch.softmax(z, 1)[at, labels]).neg().sum().backward()
        torch.testing.assert_close(h.grad, z.grad)


def test_a_label_alone_in_its_tile_and_one_that_the_model_is_sure_of(monkeypatch):
    """Tiles of one column, one of which holds nothing but a target of zero; logits that leave 1 - p no bits."""
    small_workspace(monkeypatch, size=1)
    h = torch.tensor([[0.0, 0.0, 0.0], [90.0, 0.0, 0.0], [0.0, 400.0, 0.0]], requires_grad=True)
    labels, head = torch.tensor([1, 0, 1]), torch.eye(3)
    loss = token_loss(h, head, labels, kind="ce", label_penalty=math.inf)
    loss.sum().backward()
    torch.testing.assert_close(loss.detach(), torch.tensor([math.log(3), 90.0, 400.0]))
    slope = torch.tensor([[1 / 3 - 0.5, 1 / 3, 1 / 3 - 0.5], [1.0, -0.5, -0.5], [-0.5, 1.0, -0.5]])
    torch.testing.assert_close(h.grad, slope)


@pytest.mark.parametrize("of", ["reference", "itself"])
def test_dropped_rows_are_exactly_zero_whatever_they_hold(of):
    inputs = targets(of, math.inf)
    dropped = (inputs["labels"] == IGNORED) | (inputs["token_weights"] == 0)
    for name in ("hidden_states", "ref_hidden_states"):
        if name in inputs:
            inputs[name] = torch.where(dropped[:, None], math.nan, inputs[name])
    leaves = [inputs[name].requires_grad_() for name in GRADIENTS[:3]]
    loss = token_loss(**inputs)
    grads = torch.autograd.grad(loss, leaves, torch.where(dropped, math.nan, 1.0))
    assert not loss[dropped].any() and not grads[0][dropped].any()
    assert loss[~dropped].all() and all(grad.isfinite().all() and grad.any() for grad in grads)


def test_a_frozen_head_for_the_reference():
    inputs = targets("reference", 4.0) | {"ref_lm_head": make(seed=9)["lm_head"]}
    check(REF, inputs)
    other = token_loss_ref(**inputs | {"ref_lm_head": inputs["lm_head"]})
    assert not torch.allclose(token_loss(**inputs), other)


@pytest.mark.slow
def test_opcheck_and_one_graph():
    inputs = targets("reference", 4.0, tokens=6, hidden=5, vocabulary=7)
    check_opcheck_and_one_graph(
        inputs, Formula("ce", 2.0, 3.0, drop_zero_weights=False, chunk_rows=4, label_penalty=4.0)
    )


@pytest.mark.parametrize(
    "change,message",
    [
        ({"label_penalty": -1.0}, "label_penalty must be at least 0.*; got -1.0 for 'ce'"),
        ({"label_penalty": math.nan}, "label_penalty must be at least 0"),
        ({"kind": "nll"}, "label_penalty must be .* 0 for kinds other than 'ce'; got 4.0 for 'nll'"),
        (
            {"ref_hidden_states": None, "ref_lm_head": torch.ones(97, 24)},
            "kind 'kl' needs a reference with hidden_states",
        ),
        ({"labels": torch.full((600,), 97)}, r"labels must be in \[0, 97\) or -100; got 97"),
    ],
)
def test_bad_arguments(change, message):
    with pytest.raises(ValueError, match=message):
        token_loss(**targets("itself", 4.0) | change)


def test_a_kernel_that_is_not_there_is_an_error():
    with pytest.raises(RuntimeError, match="'token_loss.tiled' has no implementation cpu"):
        token_loss(**targets("itself", 4.0), impl="cpu")
