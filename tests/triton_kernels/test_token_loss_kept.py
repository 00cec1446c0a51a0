"""token_loss in Triton with the gradient of the hidden states computed in the forward: what is kept, and how exact.

The criterion is applied to it wherever hidden states need a gradient: in tests/ops/token_loss and test_token_loss.
"""

import pytest
import torch

from moe_unlearn.ops.token_loss import KINDS
from moe_unlearn.triton_kernels import token_loss_backward, token_loss_kept
from moe_unlearn.triton_kernels.token_loss import HEADROOM
from tests.ops.token_loss.cases import BF16, F16, F32, GRADIENTS, HEAD_OPTIONS, check, inputs_of, loss_and_gradients
from tests.support.by_keyword import token_loss
from tests.support.impls import TRITON
from tests.triton_kernels import tiles

pytestmark = pytest.mark.filterwarnings("ignore:.*encountered:RuntimeWarning")  # NaN and infinity are meant
HIDDEN = GRADIENTS[:1]


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Two spans of kept rows, each of one tile of rows and several of columns."""
    tiles.token_loss(monkeypatch)


def loss_of(inputs: dict) -> tuple[torch.Tensor, torch.Tensor]:
    leaf = inputs["hidden_states"].detach().clone().requires_grad_()
    return token_loss(**inputs | {"hidden_states": leaf}, impl="triton"), leaf


@pytest.mark.quick
@pytest.mark.parametrize("kind", KINDS)
def test_the_backward_multiplies_only_by_the_upstream_gradient(monkeypatch, kind):
    """No logit is computed in it."""
    loss, leaf = loss_of(inputs_of(TRITON, kind, BF16))

    def refused(*_):
        raise AssertionError("the backward gathers rows, to multiply them by the head")

    monkeypatch.setattr(token_loss_backward, "select_rows", refused)
    (grad,) = torch.autograd.grad(loss.sum(), leaf)
    assert grad.any() and grad.isfinite().all()


@pytest.mark.quick
@pytest.mark.parametrize("kind, dtype, kept", [("kl", F16, False), ("nll", F16, False), ("uce", F32, True)], ids=str)
def test_float16_keeps_nothing(monkeypatch, kind, dtype, kept):
    calls, original = [], token_loss_kept.fold
    monkeypatch.setattr(token_loss_kept, "fold", lambda *a, **k: calls.append(a) or original(*a, **k))
    loss_of(inputs_of(TRITON, kind, dtype))
    assert bool(calls) == kept


def test_without_gradients_nothing_is_kept(monkeypatch):
    monkeypatch.setattr(token_loss_kept, "fold", None)
    inputs = inputs_of(TRITON, dtype=BF16)
    assert token_loss(**inputs, impl="triton").any()
    with torch.no_grad():
        loss_of(inputs)


def test_a_second_backward_gives_the_same_gradient():
    loss, leaf = loss_of(inputs_of(TRITON, dtype=BF16))
    first, second = (torch.autograd.grad(loss.sum(), leaf, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.quick
@pytest.mark.parametrize("options", [{}, *HEAD_OPTIONS[:2]], ids=str)
def test_rows_whose_loss_exceeds_the_headroom_are_computed_again(options):
    """Their labels' logits are out of reach of the largest; all others keep every bit."""
    inputs = inputs_of(TRITON, dtype=BF16, weights=False) | options
    inputs["logit_softcap"] = 80.0 if "logit_softcap" in options else None
    counted = (inputs["labels"] >= 0).nonzero().squeeze(1)
    low = inputs["bias"].clone()
    low[7] = -1000.0  # column 7 is the label of a few rows of the first tile, and of no other
    labels = torch.where(inputs["labels"] == 7, 8, inputs["labels"])
    _, (before,) = loss_and_gradients(TRITON, inputs | {"bias": low, "labels": labels}, HIDDEN)
    few = counted[[1, 4]]
    labels[few] = 7
    loss, (grad,) = loss_and_gradients(TRITON, inputs | {"bias": low, "labels": labels}, HIDDEN)
    others = torch.ones_like(labels, dtype=torch.bool)
    others[few] = False
    assert (loss[few] > HEADROOM.value).all() and torch.equal(grad[others], before[others])
    check(TRITON, inputs | {"bias": low, "labels": labels}, gradients=HIDDEN)


@pytest.mark.quick
def test_only_tiles_with_a_row_whose_loss_exceeds_the_headroom_are_computed_again(monkeypatch):
    """Of two spans with a tile of rows each, the second has such a row."""
    inputs = inputs_of(TRITON, dtype=BF16, weights=False)
    inputs["bias"][7] = -1000.0
    counted = (inputs["labels"] >= 0).nonzero().squeeze(1)
    inputs["labels"] = torch.where(inputs["labels"] == 7, 8, inputs["labels"])
    inputs["labels"][counted[-1]] = 7
    written, fold = [], token_loss_kept.fold

    def watched(loss, rows, config, partials, first, kept, peaks=None):
        if peaks is not None:
            partials.fill_(torch.nan)
        fold(loss, rows, config, partials, first, kept, peaks)
        if peaks is not None:
            written.append(bool(partials.isfinite().any()))

    monkeypatch.setattr(token_loss_kept, "fold", watched)
    loss_of(inputs)
    assert len(counted) > 32 and written == [False, True]


@pytest.mark.parametrize("kind", ["nll", "uce"])
def test_a_confident_row_keeps_a_gradient_as_exact_as_any(kind):
    """The label's probability is nearly 1: its two parts in the gradient nearly cancel."""
    inputs = inputs_of(TRITON, kind, BF16, weights=False)
    head = inputs["lm_head"].float()
    sure = inputs["labels"] >= 0
    counted = sure.nonzero().squeeze(1)
    inputs["labels"][counted[::5]], inputs["labels"][counted[1::5]] = 0, len(head) - 1  # in both spans
    inputs["hidden_states"] = (3 * head[inputs["labels"].clamp(min=0)] / head.square().mean()).to(BF16)
    loss = token_loss(**inputs, impl="triton")
    likely = loss < 0.2 if kind == "nll" else loss > 0.6  # uce is log 2 where nll is 0
    assert likely[sure].float().mean() > 0.9
    check(TRITON, inputs, gradients=HIDDEN)


def close(dtype) -> dict:
    """Return inputs of kl whose reference is one bit of one number of each row away."""
    inputs = inputs_of(TRITON, "kl", dtype, weights=False)
    near = inputs["hidden_states"].clone()
    near[:, 3] = torch.nextafter(near[:, 3], torch.full_like(near[:, 3], torch.inf))
    return inputs | {"ref_hidden_states": near}


@pytest.mark.quick
@pytest.mark.parametrize("options", [{}, *HEAD_OPTIONS[1:]], ids=str)
@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.slow(but=2)
def test_where_model_and_reference_are_close_the_gradient_of_kl_is_as_exact_as_any(monkeypatch, arch, options):
    """p and q agree to three digits: either of them in 16 bits would leave nothing of p - q."""
    tiles.token_loss(monkeypatch, arch)
    inputs = close(BF16) | options
    assert token_loss(**inputs, impl="triton").max() < 1e-3
    check(TRITON, inputs, gradients=HIDDEN)


@pytest.mark.quick
@pytest.mark.parametrize("dtype, factor", [(BF16, 50), (F32, 50), (BF16, 1e5)], ids=str)
def test_where_they_are_far_apart_too(dtype, factor):
    """The largest logit of the model is the least of the reference: of a pair p, q or both are mostly 0.

    Differences of logits of 100,000 are infinite in float16.
    """
    inputs = inputs_of(TRITON, "kl", dtype, weights=False)
    inputs |= {name: by * inputs[name] for name, by in (("hidden_states", factor), ("ref_hidden_states", -factor))}
    loss = token_loss(**inputs, impl="triton")
    assert loss[inputs["labels"] >= 0].median() > 50
    check(TRITON, inputs, gradients=HIDDEN)


@pytest.mark.quick
def test_entries_that_the_reference_rules_out_add_p_alone():
    """q is 0 by a logit of -infinity: in a whole tile, in parts of others, and never in the model."""
    inputs = inputs_of(TRITON, "kl", BF16, weights=False)
    inputs["ref_hidden_states"][:, 0] = 1
    ruled_out = inputs["lm_head"].clone()
    ruled_out[20:64, 0] = -torch.inf
    inputs["ref_lm_head"] = ruled_out
    loss, (grad,) = loss_and_gradients(TRITON, inputs, HIDDEN)
    assert loss.isfinite().all() and grad.isfinite().all()
    check(TRITON, inputs, gradients=HIDDEN)


def test_kl_has_the_same_bits_without_a_gradient():
    inputs = inputs_of(TRITON, "kl", BF16)
    assert torch.equal(loss_of(inputs)[0].detach(), token_loss(**inputs, impl="triton"))
