"""The kind "logit_margin" of token_loss: the squared distance of the largest logit from the mean of all."""

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
from tests.support.by_keyword import token_loss
from tests.support.impls import REF

pytestmark = pytest.mark.quick


def margins(**options):
    return make(**options) | {"kind": "logit_margin"}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_value_and_gradients(dtype, monkeypatch):
    small_workspace(monkeypatch)
    check(REF, margins(dtype=dtype), chunk_rows=50)


@pytest.mark.parametrize("options", HEAD_OPTIONS, ids=str)
def test_scale_and_softcap(options, monkeypatch):
    small_workspace(monkeypatch)
    check(REF, margins() | options, chunk_rows=50)


def test_loss_and_slope_by_hand(monkeypatch):
    """With an identity head hidden states are logits; the first of several largest ones is lowered, in any tile."""
    small_workspace(monkeypatch, size=1)
    h = torch.tensor([[1.0, 4.0, 1.0], [3.0, 0.0, 3.0], [2.0, 2.0, 2.0], [math.nan] * 3], requires_grad=True)
    labels = torch.tensor([0, 2, 1, IGNORED])
    loss = token_loss(h, torch.eye(3), labels, kind="logit_margin")
    assert loss.tolist() == [4.0, 1.0, 0.0, 0.0]
    loss.backward(torch.tensor([1.0, 3.0, 1.0, math.nan]))
    expected = [[-4 / 3, 8 / 3, -4 / 3], [4.0, -2.0, -2.0], [0.0] * 3, [0.0] * 3]
    torch.testing.assert_close(h.grad, torch.tensor(expected))


def test_dropped_rows_are_exactly_zero_whatever_they_hold():
    inputs = margins()
    dropped = (inputs["labels"] == IGNORED) | (inputs["token_weights"] == 0)
    inputs["hidden_states"] = torch.where(dropped[:, None], math.nan, inputs["hidden_states"])
    leaves = [inputs[name].requires_grad_() for name in GRADIENTS[:3]]
    loss = token_loss(**inputs)
    grads = torch.autograd.grad(loss, leaves, torch.where(dropped, math.nan, 1.0))
    assert not loss[dropped].any() and not grads[0][dropped].any()
    assert loss[~dropped].all() and all(grad.isfinite().all() and grad.any() for grad in grads)


def test_labels_say_only_which_rows_count():
    inputs = margins()
    other = torch.where(inputs["labels"] == IGNORED, IGNORED, 10**9)
    assert torch.equal(token_loss(**inputs), token_loss(**inputs | {"labels": other}))
    none = token_loss(**inputs | {"labels": torch.full_like(other, IGNORED)})
    assert none.shape == other.shape and not none.any()


@pytest.mark.slow
def test_opcheck_and_one_graph():
    inputs = margins(tokens=6, hidden=5, vocabulary=7)
    check_opcheck_and_one_graph(inputs, Formula("logit_margin", 2.0, 3.0, drop_zero_weights=False, chunk_rows=4))


@pytest.mark.parametrize(
    "change,message",
    [
        ({"label_penalty": 4.0}, "label_penalty must be .* 0 for kinds other than 'ce'; got 4.0 for 'logit_margin'"),
        ({"ref_hidden_states": torch.ones(600, 24)}, "other kinds take neither; got kind 'logit_margin' with"),
    ],
)
def test_bad_arguments(change, message):
    with pytest.raises(ValueError, match=message):
        token_loss(**margins() | change)


def test_a_kernel_that_is_not_there_is_an_error():
    with pytest.raises(RuntimeError, match="'token_loss.logit_margin' has no implementation cpu"):
        token_loss(**margins(), impl="cpu")
